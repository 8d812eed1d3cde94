"""Fetches snapshots from a running monitor and believes nothing it has not checked.

    python -m monitor pull http://127.0.0.1:8710 --to snapshots
    python -m monitor pull http://127.0.0.1:8710 --to snapshots --follow

A snapshot is gathered in `.part-NAME`, each file as `FILE.part` until its sha256 is the manifest's; the manifest comes
last, and only then is the folder renamed to its name. So a folder that has its name is whole. Killed or cut off, the
next call goes on where it was, with Range. A snapshot that is retired on the server meanwhile is given up for the
newest one. The server is not trusted with paths: a manifest that leads out of the folder is refused.

Following goes on until the run is finished: each new snapshot in turn, and evaluations as they come. A service that is
away for a while is waited for.
"""

from __future__ import annotations

import argparse
import http.client
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from monitor.cli.client import (
    BROKEN,
    LARGEST_DOCUMENT,
    Gone,
    Monitor,
    MonitorError,
    UsageError,
    add_address,
    monitor_of,
)
from producer.common.addresses import path_argument
from producer.common.completion import complete
from producer.common.parsing import parse_object
from producer.common.shell import shell_command
from trainer.snapshot import FORMAT, NAME, SnapshotError, file_sha256, read_manifest, snapshot_name, verify
from trainer.state.durable import move_folder, replace_text

TRIES = 5
PAUSE_SECONDS = 0.5
"""Before the second try; doubled before each further one."""
LONGEST_PAUSE_SECONDS = 30.0
WAIT_SECONDS = 20.0
"""One request for the next snapshot lasts so long; then the run is asked whether there will be one."""
PIECE_BYTES = 1 << 18

Tell = Callable[[str, int, int], None]
"""Called with (path, bytes so far, bytes in all) as a file grows."""


def pull(monitor: Monitor, to: Path, name: str | None = None, tell: Tell = lambda path, done, size: None) -> Path:
    """Fetches the newest snapshot, or the one called `name`, into a folder of `to`; returns that folder.

    A snapshot that is already there and whole is not fetched again. Raises MonitorError, one of BROKEN when the line
    stays broken, or OSError when the disk refuses.
    """
    for _ in range(TRIES):
        manifest, text = _fetch_manifest(monitor, name)
        try:
            return _fetch_snapshot(monitor, to, manifest, text, tell)
        except Gone:
            # Retired while it was fetched; the newest one is another now.
            shutil.rmtree(_workplace(to, manifest["name"]), ignore_errors=True)
            if name is not None:
                raise
    raise MonitorError(
        f"{monitor.base}: each snapshot was retired before it was fetched; ask the operator to keep more of them"
    )


def follow(
    monitor: Monitor,
    to: Path,
    progress: Callable[[], AbstractContextManager[Tell]],
    arrived: Callable[[Path], None],
    say: Callable[[str], None],
) -> None:
    """Fetches each snapshot that is newer than those in `to`, in order, as they appear, until the run is finished.

    With none in `to` it begins with the newest. Raises MonitorError, or OSError when the disk refuses.
    """
    after = max((path.name for path in to.glob("*") if NAME.fullmatch(path.name)), default="")
    unevaluated: list[Path] = []
    pause = PAUSE_SECONDS
    while True:
        try:
            run = monitor.read("/v1/run") or {}
            latest = run.get("latest") or ""
            if latest < after:
                say(f"the run has gone back to {latest or 'its beginning'}")
                after = latest
            for name in _newer(monitor, after) if latest > after else []:
                with suppress(Gone):  # retired before its turn came
                    with progress() as tell:
                        folder = pull(monitor, to, name, tell)
                    arrived(folder)
                    unevaluated.append(folder)
                after = name
            unevaluated = [folder for folder in unevaluated if not _fetch_evaluations(monitor, folder)]
            if latest == after and run.get("state") == "finished":
                return
            with suppress(Gone):  # none yet
                monitor.read(
                    f"/v1/snapshots/latest?after={after or snapshot_name(0)}&wait={WAIT_SECONDS:g}", WAIT_SECONDS
                )
            pause = PAUSE_SECONDS
        except BROKEN as error:
            say(f"{error}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _newer(monitor: Monitor, after: str) -> list[str]:
    """The snapshots to fetch, oldest first: those newer than `after`, or the newest alone."""
    address: str | None = "/v1/snapshots"
    names: list[str] = []
    while address is not None:
        page = monitor.read(address) or {}
        listed = [str(entry.get("name")) for entry in page.get("snapshots", [])]
        older = sorted(name for name in listed if NAME.fullmatch(name) and (not names or name < names[0]))
        names = older + names
        # Each page begins before the one that came last: a server cannot lead in a circle.
        reaches = not after or not older or older[0] <= after or page.get("next") is None
        address = None if reaches else f"/v1/snapshots?before={older[0]}"
    return [name for name in names if name > after] if after else names[-1:]


def _fetch_manifest(monitor: Monitor, name: str | None) -> tuple[dict[str, Any], str]:
    """The manifest, checked, and its text as the server has it."""
    path = f"/v1/snapshots/{name}/manifest.json" if name else "/v1/snapshots/latest"
    address = monitor.base + path
    with monitor.open(path) as answer:
        text = answer.read(LARGEST_DOCUMENT).decode("utf-8", "replace")
    try:
        manifest = parse_object(text)
        if manifest["format"] != FORMAT:
            raise MonitorError(f"{address} has format {manifest['format']!r}, not {FORMAT}: update Sluice")
        if not NAME.fullmatch(manifest["name"]) or name not in (None, manifest["name"]):
            raise MonitorError(f"{address} gives a snapshot called {manifest['name']!r}; refused")
        for entry in manifest["files"]:
            _check_path(entry["path"])
            int(entry["bytes"]), bytes.fromhex(entry["sha256"])
        for sae in manifest["saes"]:
            _check_path(f"{sae}/evaluation.json")
        return manifest, text
    except (ValueError, KeyError, TypeError) as error:
        raise MonitorError(f"{address} is no manifest ({error!r}); is this the address of a Sluice monitor?") from None


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or path == "manifest.json":
        raise MonitorError(f"the manifest lists {path!r}, which does not belong into a snapshot; refused")


def _fetch_snapshot(monitor: Monitor, to: Path, manifest: dict[str, Any], text: str, tell: Tell) -> Path:
    final, work = to / manifest["name"], _workplace(to, manifest["name"])
    if final.is_dir():
        _check_what_is_there(final, manifest)
        _fetch_evaluations(monitor, final)
        return final
    work.mkdir(parents=True, exist_ok=True)
    for entry in manifest["files"]:
        _fetch_file(monitor, _address(manifest["name"], entry["path"]), work, entry, tell)
    replace_text(work / "manifest.json", text)
    _fetch_evaluations(monitor, work)
    move_folder(work, final)
    return final


def _address(name: str, path: str) -> str:
    return f"/v1/snapshots/{name}/{urllib.parse.quote(path)}"


def _workplace(to: Path, name: str) -> Path:
    return to / f".part-{name}"


def _check_what_is_there(final: Path, manifest: dict[str, Any]) -> None:
    try:
        if verify(final)["files"] == manifest["files"]:
            return
    except SnapshotError as error:
        raise MonitorError(f"{error}; delete {final} and pull again") from None
    raise MonitorError(f"{final} holds another run's snapshot of the same name; pull into another folder with --to DIR")


def _fetch_file(monitor: Monitor, address: str, work: Path, entry: dict[str, Any], tell: Tell) -> None:
    """One file of the manifest, resumed when part of it is there. A wrong hash is tried once more from the start."""
    whole = work / entry["path"]
    part = whole.with_name(whole.name + ".part")
    if whole.is_file() and file_sha256(whole) == entry["sha256"]:
        return
    whole.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(2):
        _retrying(lambda: _download(monitor, address, part, entry, tell))
        if part.stat().st_size == entry["bytes"] and file_sha256(part) == entry["sha256"]:
            part.replace(whole)
            return
        part.unlink()
    raise MonitorError(
        f"{monitor.base}{address} differs from what the manifest says (sha256 {entry['sha256'][:12]}…), twice; "
        "the file is damaged on the server or on the way: tell its operator"
    )


def _download(monitor: Monitor, address: str, part: Path, entry: dict[str, Any], tell: Tell) -> None:
    """Appends to `part` until it is as long as the manifest says; returns early only when the server ends early."""
    have = part.stat().st_size if part.is_file() else 0
    if have > entry["bytes"]:
        have = 0
    if have == entry["bytes"] and part.is_file():
        return
    headers = {"Range": f"bytes={have}-", "If-Range": f'"sha256-{entry["sha256"]}"'} if have else {}
    with monitor.open(address, headers) as answer, open(part, "r+b" if have else "wb") as file:
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


def _fetch_evaluations(monitor: Monitor, folder: Path) -> bool:
    """The monitor's measurements, as far as it has them: they are in no manifest, since they come later.

    Returns whether all are there now.
    """
    manifest = read_manifest(folder)
    missing = [sae for sae in manifest["saes"] if not (folder / sae / "evaluation.json").is_file()]
    for sae in list(missing):
        try:
            with monitor.open(_address(manifest["name"], f"{sae}/evaluation.json")) as answer:
                text = answer.read(LARGEST_DOCUMENT).decode("utf-8")
            parse_object(text)
        except (MonitorError, ValueError, *BROKEN):
            continue
        if (folder / sae).is_dir():
            replace_text(folder / sae / "evaluation.json", text)
            missing.remove(sae)
    return not missing


def _retrying(attempt: Callable[[], None]) -> None:
    """Connections break; what has arrived is kept, and each try goes on from there."""
    pause = PAUSE_SECONDS
    for left in reversed(range(TRIES)):
        try:
            return attempt()
        except BROKEN as error:
            if not left:
                raise ConnectionError(f"the connection broke {TRIES} times ({error})") from None
        time.sleep(pause)
        pause *= 2


# --- The command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`python -m monitor pull`: 0 fetched (or there already), 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "pull"),
        description="Fetch a snapshot from a monitor, every byte checked. Interrupted, the next call goes on there.",
    )
    add_address(parser)
    parser.add_argument(
        "--to", metavar="DIR", type=path_argument, default=Path("."), help="folder to put it in (default: here)"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--name", metavar="NAME", help="a snapshot by name, such as 000001234567 (default: the newest)")
    which.add_argument("--follow", action="store_true", help="and each new one, until the run is finished or Ctrl-C")
    complete(parser, arguments)
    given = parser.parse_args(arguments)
    try:
        if given.name is not None and not NAME.fullmatch(given.name):
            raise UsageError(f"--name {given.name!r}: expected digits, such as 000001234567")
        if given.to.exists() and not given.to.is_dir():
            raise UsageError(f"--to {given.to}: this is a file; name a folder")
        if given.follow:
            follow(monitor_of(given), given.to, _progress, lambda folder: print(folder, flush=True), _say)
            return 0
        with _progress() as tell:
            folder = pull(monitor_of(given), given.to, given.name, tell)
    except UsageError as error:
        _say(str(error))
        return 2
    except BROKEN as error:
        _say(f"{error}; pull again to go on")
        return 1
    except (MonitorError, OSError) as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("stopped; pull again to go on from there")
        return 0 if given.follow else 1
    print(folder)
    return 0


def _say(what: str) -> None:
    print(what, file=sys.stderr)


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
