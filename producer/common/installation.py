"""CONTRACT: whether the packages that Python imports are Sluice's own. Light.

Other distributions install a package called `trainer` as well. Where one comes first on the path, or was installed
over Sluice's files, an import fails far from the cause or, worse, does not fail.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

DISTRIBUTION = "sluice-sae"
PACKAGES = ("producer", "trainer", "monitor", "deploy")
ROOT = Path(__file__).parents[2]
"""The folder that holds Sluice's packages."""


def require_own_packages() -> None:
    """Ends the process with a sentence and exit code 2 when a package of another distribution is in the way."""
    hashes = _recorded_hashes()
    for package in PACKAGES:
        if (path := _foreign_package(package, hashes)) is not None:
            print(_sentence(package, path), file=sys.stderr)
            raise SystemExit(2)


def _foreign_package(package: str, hashes: dict[str, str]) -> Path | None:
    """The file that `import package` would run, when it is not Sluice's; None when it is."""
    own = ROOT / package / "__init__.py"
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin) if spec is not None and spec.origin is not None else ROOT / package
    if path.absolute() != own:
        return path
    recorded = hashes.get(f"{package}/__init__.py")
    return None if recorded in (None, _hash_of(own)) else own


def _recorded_hashes() -> dict[str, str]:
    """Hashes of Sluice's files as pip wrote them down; empty for a checkout."""
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {file.as_posix(): file.hash.value for file in files if file.hash is not None and file.hash.mode == "sha256"}


def _hash_of(path: Path) -> str:
    """sha256 of a file in base64url, as in a wheel's RECORD."""
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


def _sentence(package: str, path: Path) -> str:
    owners = importlib.metadata.packages_distributions().get(package, [])
    others = sorted({owner for owner in owners if owner != DISTRIBUTION})
    whose = f", of the distribution {' or '.join(others)}" if others else ""
    return (
        f'the package "{package}" at {path} is not Sluice\'s{whose}: both use this name. Install {DISTRIBUTION} in an '
        f"environment of its own, or uninstall the other and install {DISTRIBUTION} again"
    )
