"""Fetches a snapshot from a running monitor and believes nothing it has not checked.

    python -m monitor pull http://127.0.0.1:8710 --to snapshots

A snapshot is gathered in `.part-NAME`, each file as `FILE.part` until its sha256 is the manifest's; the manifest comes
last, and only then is the folder renamed to its name. So a folder that has its name is whole. Killed or cut off, the
next call goes on where it was, with Range. A snapshot that is retired on the server meanwhile is given up for the
newest one. The server is not trusted with paths: a manifest that leads out of the folder is refused.

The network side is the standard library's.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.durable import replace_text
from trainer.snapshot import FORMAT, NAME, SnapshotError, file_sha256, verify

TIMEOUT_SECONDS = 30.0
TRIES = 5
PAUSE_SECONDS = 0.5
"""Before the second try; doubled before each further one."""
PIECE_BYTES = 1 << 18
LARGEST_MANIFEST = 64 << 20
BROKEN = (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
"""What goes wrong between here and the server, as against what goes wrong with this machine's disk."""

Tell = Callable[[str, int, int], None]
"""Called with (path, bytes so far, bytes in all) as a file grows."""


class PullError(Exception):
    """The snapshot could not be fetched; `str(error)` says what was wrong and what to do."""


class Gone(PullError):
    """The server does not have it (any more)."""


def pull(url: str, to: Path, name: str | None = None, tell: Tell = lambda path, done, size: None) -> Path:
    """Fetches the newest snapshot, or the one called `name`, into a folder of `to`; returns that folder.

    A snapshot that is already there and whole is not fetched again. Raises PullError, or OSError when the disk refuses.
    """
    base = _base(url)
    for _ in range(TRIES):
        manifest, text = _fetch_manifest(base, name)
        try:
            return _fetch_snapshot(base, to, manifest, text, tell)
        except Gone:
            if name is not None:
                raise
            # Retired while it was fetched; the newest one is another now.
            shutil.rmtree(_workplace(to, manifest["name"]), ignore_errors=True)
    raise PullError(f"{base}: each snapshot was retired before it was fetched; ask the operator to keep more of them")


def _fetch_manifest(base: str, name: str | None) -> tuple[dict[str, Any], str]:
    """The manifest, parsed and checked, and its text as the server has it."""
    address = f"{base}/v1/snapshots/{name}/manifest.json" if name else f"{base}/v1/snapshots/latest"
    try:
        with _open(address) as answer:
            text = answer.read(LARGEST_MANIFEST).decode("utf-8", "replace")
    except BROKEN as error:
        raise PullError(f"{error}; is the monitor running there?") from None
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise PullError(f"{address} has format {manifest['format']!r}, not {FORMAT}: update Sluice")
        if not NAME.fullmatch(manifest["name"]) or name not in (None, manifest["name"]):
            raise PullError(f"{address} gives a snapshot called {manifest['name']!r}; refused")
        for entry in manifest["files"]:
            _check_path(entry["path"])
            int(entry["bytes"]), bytes.fromhex(entry["sha256"])
        for sae in manifest["saes"]:
            _check_path(f"{sae}/evaluation.json")
        return manifest, text
    except (ValueError, KeyError, TypeError) as error:
        raise PullError(f"{address} is no manifest ({error!r}); is this the address of a Sluice monitor?") from None


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or path == "manifest.json":
        raise PullError(f"the manifest lists {path!r}, which does not belong into a snapshot; refused")


def _fetch_snapshot(base: str, to: Path, manifest: dict[str, Any], text: str, tell: Tell) -> Path:
    final, work = to / manifest["name"], _workplace(to, manifest["name"])
    if final.is_dir():
        return _already_there(final, manifest)
    work.mkdir(parents=True, exist_ok=True)
    for entry in manifest["files"]:
        _fetch_file(f"{base}/v1/snapshots/{manifest['name']}/{urllib.parse.quote(entry['path'])}", work, entry, tell)
    for sae in manifest["saes"]:
        _fetch_evaluation(base, work, manifest["name"], sae)
    replace_text(work / "manifest.json", text)
    os.rename(work, final)
    return final


def _workplace(to: Path, name: str) -> Path:
    return to / f".part-{name}"


def _already_there(final: Path, manifest: dict[str, Any]) -> Path:
    try:
        if verify(final)["files"] == manifest["files"]:
            return final
    except SnapshotError as error:
        raise PullError(f"{error}; delete {final} and pull again") from None
    raise PullError(f"{final} holds another run's snapshot of the same name; pull into another folder with --to DIR")


def _fetch_file(address: str, work: Path, entry: dict[str, Any], tell: Tell) -> None:
    """One file of the manifest, resumed when part of it is there. A wrong hash is tried once more from the start."""
    whole = work / entry["path"]
    part = whole.with_name(whole.name + ".part")
    if whole.is_file() and file_sha256(whole) == entry["sha256"]:
        return
    whole.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        _retrying(lambda: _download(address, part, entry, tell))
        if part.stat().st_size == entry["bytes"] and file_sha256(part) == entry["sha256"]:
            part.replace(whole)
            return
        part.unlink()
    raise PullError(
        f"{address} differs from what the manifest says (sha256 {entry['sha256'][:12]}…), twice; "
        "the file is damaged on the server or on the way: tell its operator"
    )


def _download(address: str, part: Path, entry: dict[str, Any], tell: Tell) -> None:
    """Appends to `part` until it is as long as the manifest says; returns early only when the server ends early."""
    have = part.stat().st_size if part.is_file() else 0
    if have > entry["bytes"]:
        have = 0
    if have == entry["bytes"] and part.is_file():
        return
    headers = {"Range": f"bytes={have}-", "If-Range": f'"sha256-{entry["sha256"]}"'} if have else {}
    with _open(address, headers) as answer, open(part, "r+b" if have else "wb") as file:
        if answer.status != 206:
            have = 0  # the server has another file, or does not know ranges
        file.truncate(have)
        file.seek(have)
        while have < entry["bytes"] and (piece := answer.read(min(PIECE_BYTES, entry["bytes"] - have))):
            file.write(piece)
            have += len(piece)
            tell(entry["path"], have, entry["bytes"])
    if have < entry["bytes"]:
        raise http.client.IncompleteRead(b"", entry["bytes"] - have)


def _fetch_evaluation(base: str, work: Path, name: str, sae: str) -> None:
    """The monitor's measurements, when it has some: they are in no manifest, since they come later."""
    path = f"{sae}/evaluation.json"
    try:
        with _open(f"{base}/v1/snapshots/{name}/{urllib.parse.quote(path)}") as answer:
            text = answer.read(LARGEST_MANIFEST).decode("utf-8")
        json.loads(text)
    except (PullError, ValueError, *BROKEN):
        return
    if (work / sae).is_dir():
        replace_text(work / path, text)


# --- The network -----------------------------------------------------------------------------------------------------


def _base(url: str) -> str:
    """`host:port` is enough of an address."""
    base = url if "://" in url else f"http://{url}"
    parts = urllib.parse.urlsplit(base)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url!r} is no address of a monitor; expected one such as http://127.0.0.1:8710")
    return base.rstrip("/")


class UsageError(PullError):
    """The command line cannot be carried out; exit code 2."""


@contextmanager
def _open(address: str, headers: dict[str, str] | None = None) -> Iterator[Any]:
    """A response. Raises Gone for a 404, one of BROKEN for what another try may mend, PullError for the rest."""
    request = urllib.request.Request(address, headers={"Accept-Encoding": "identity", **(headers or {})})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        raise _explain(address, error) from None
    except urllib.error.URLError as error:
        raise ConnectionError(f"{address} cannot be reached ({error.reason})") from None
    with answer:
        yield answer


def _explain(address: str, error: urllib.error.HTTPError) -> Exception:
    with error:
        body = error.read(1 << 16)
    try:
        reason = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        # A Sluice monitor explains itself in JSON; the metrics port of one, and anybody else, does not.
        reason = f"{error.reason}; is this the address of a Sluice monitor, and its monitor.service_port?"
    if error.code in (429, 500, 502, 503, 504):
        return ConnectionError(f"{address} answers {error.code}: {reason}")
    return (Gone if error.code in (404, 410) else PullError)(f"{address} answers {error.code}: {reason}")


def _retrying(attempt: Callable[[], None]) -> None:
    """Connections break; what has arrived is kept, and each try goes on from there."""
    pause = PAUSE_SECONDS
    for left in reversed(range(TRIES)):
        try:
            return attempt()
        except BROKEN as error:
            if not left:
                raise PullError(f"the connection broke {TRIES} times ({error}); pull again to go on") from None
        time.sleep(pause)
        pause *= 2


# --- The command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`python -m monitor pull`: 0 fetched (or there already), 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m monitor pull", description="Fetch a snapshot from a monitor.")
    parser.add_argument("url", metavar="URL", help="where the monitor serves, such as http://127.0.0.1:8710")
    parser.add_argument("--to", metavar="DIR", type=Path, default=Path("."), help="folder to put it in (default: here)")
    parser.add_argument("--name", metavar="NAME", help="a snapshot by name, such as 000001234567 (default: the newest)")
    given = parser.parse_args(arguments)
    try:
        if given.name is not None and not NAME.fullmatch(given.name):
            raise UsageError(f"--name {given.name!r}: expected digits, such as 000001234567")
        if given.to.exists() and not given.to.is_dir():
            raise UsageError(f"--to {given.to}: this is a file; name a folder")
        with _progress() as tell:
            folder = pull(given.url, given.to, given.name, tell)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except (PullError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; pull again to go on from there", file=sys.stderr)
        return 1
    print(folder)
    return 0


@contextmanager
def _progress() -> Iterator[Tell]:
    """Bars on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda path, done, size: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, Any] = {}

        def tell(path: str, done: int, size: int) -> None:
            if path not in bars:
                bars[path] = progress.add_task(path, total=size)
            progress.update(bars[path], completed=done)

        yield tell
