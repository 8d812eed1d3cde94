"""Upload of a folder to the Hugging Face hub, by its own library.

The library finds the token (`hf auth login`, HF_TOKEN) and the hub (HF_ENDPOINT), and shows the progress of large
files.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

HTTP_LIBRARIES = ("httpx", "httpx2", "requests")
"""What some release of huggingface_hub speaks HTTP with; errors of connections are that library's own."""


class HubError(Exception):
    """The hub did not take it; `str(error)` says why, and what to do."""


def upload(folder: Path, repository: str, private: bool, message: str) -> str:
    """Makes the repository if it does not exist, and commits the folder to it. Returns its address. Raises HubError."""
    api = HfApi(library_name="sluice")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except HFValidationError as error:
        raise HubError(f"{repository!r} is no name of a repository: {error}") from None
    except HfHubHTTPError as error:
        raise HubError(_explanation(error, repository, api.endpoint)) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in HTTP_LIBRARIES:
            raise
        raise HubError(f"{api.endpoint} cannot be reached ({error}): is this machine online?") from None
    return f"{api.endpoint}/{repository}"


def _explanation(error: HfHubHTTPError, repository: str, endpoint: str) -> str:
    status = error.response.status_code
    reason = error.server_message or f"status {status}"
    if status == 401:
        return f"{endpoint} does not know who you are ({reason}): run `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"{endpoint} does not let this token write to {repository} ({reason}): it needs the permission to write"
    return f"{endpoint} refuses {repository}: {reason}"
