"""Downloads snapshots from a running monitor and checks every file.

    python -m monitor pull http://127.0.0.1:8710 --to snapshots
    python -m monitor pull http://127.0.0.1:8710 --to snapshots --follow

A snapshot is gathered in `.part-NAME`, each file as `FILE.part` until its sha256 is the manifest's; of a large file the
manifest has one for each part, which is fetched and checked by itself. The manifest comes last, and only then is the
folder renamed to its name: a folder of that name is complete. After a kill or a broken connection, the next call goes
on from there, with Range. A snapshot that the server retires meanwhile is given up for
the newest one. The server is not trusted with paths: a manifest that leads out of the folder is refused.

`follow` goes on until the run is finished: it fetches each new snapshot, and evaluations as they come. It waits for a
service that does not answer for a while.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from monitor.cli.client import Monitor, read_body
from monitor.cli.errors import Gone, MonitorError, UsageError
from producer.common.formatting import format_bytes
from producer.common.parsing import parse_object
from trainer.snapshot import (
    FORMATS,
    NAME,
    SnapshotError,
    SnapshotFile,
    is_intact,
    part_sha256,
    read_manifest,
    snapshot_name,
    verify,
)
from trainer.state.durable import move_folder, replace_text

TRIES = 5
PAUSE_SECONDS = 0.5
"""Before the second try; doubled before each further one."""
LONGEST_PAUSE_SECONDS = 30.0
WAIT_SECONDS = 20.0
"""Duration of a request that waits for the next snapshot; after it, the run is asked whether there will be one."""

OnProgress = Callable[[str, int, int], None]
"""Called with (path, bytes so far, bytes in all) as a file grows."""


@dataclass(frozen=True)
class _Manifest:
    """A manifest that has been checked."""

    name: str
    files: list[SnapshotFile]
    saes: list[str]
    text: str
    """The manifest's text on the server."""


@dataclass(frozen=True)
class _Transfer:
    """The download of one snapshot into `folder`."""

    monitor: Monitor
    folder: Path
    on_progress: OnProgress
    pause_seconds: float


def pull(
    monitor: Monitor,
    to: Path,
    name: str | None = None,
    on_progress: OnProgress = lambda path, done, size: None,
    pause_seconds: float = PAUSE_SECONDS,
) -> Path:
    """Fetches the newest snapshot, or the one called `name`, into a folder of `to`; returns that folder.

    A snapshot that is there and complete is not fetched again. Raises MonitorError, ConnectionError when TRIES
    connections broke, or another OSError when the disk refuses.
    """
    for _ in range(TRIES):
        manifest = _fetch_manifest(monitor, name)
        transfer = _Transfer(monitor, to / f".part-{manifest.name}", on_progress, pause_seconds)
        try:
            return _fetch_snapshot(transfer, to / manifest.name, manifest)
        except Gone:
            # Retired during the download; another snapshot is the newest now.
            shutil.rmtree(transfer.folder, ignore_errors=True)
            if name is not None:
                raise
    raise MonitorError(
        f"{monitor.base}: each snapshot was retired before it was fetched; ask the operator to keep more of them"
    )


def follow(
    monitor: Monitor,
    to: Path,
    progress: Callable[[], AbstractContextManager[OnProgress]],
    on_snapshot: Callable[[Path], None],
    on_message: Callable[[str], None],
) -> None:
    """Fetches each snapshot that is newer than those in `to`, in order, as they appear, until the run is finished.

    Without any in `to`, it begins with the newest. Raises MonitorError, or OSError when the disk refuses.
    """
    after = max((path.name for path in to.glob("*") if NAME.fullmatch(path.name)), default="")
    unevaluated: list[Path] = []
    pause = PAUSE_SECONDS
    while True:
        try:
            run = monitor.read("/v1/run") or {}
            latest = run.get("latest") or ""
            if latest < after:
                on_message(f"the run has gone back to {latest or 'its beginning'}")
                after = latest
            for name in _newer(monitor, after) if latest > after else []:
                with suppress(Gone):  # retired before its turn came
                    with progress() as on_progress:
                        folder = pull(monitor, to, name, on_progress)
                    on_snapshot(folder)
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
        except ConnectionError as error:
            on_message(f"{error}; trying again")
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _newer(monitor: Monitor, after: str) -> list[str]:
    """The snapshots to fetch, oldest first: those newer than `after`, or the newest alone."""
    address: str | None = "/v1/snapshots"
    names: list[str] = []
    while address is not None:
        page = monitor.read(address) or {}
        page_names = [str(entry.get("name")) for entry in page.get("snapshots", [])]
        older = sorted(name for name in page_names if NAME.fullmatch(name) and (not names or name < names[0]))
        names = older + names
        # Each page must begin before the last one, so that no server can lead in a circle.
        is_last = not after or not older or older[0] <= after or page.get("next") is None
        address = None if is_last else f"/v1/snapshots?before={older[0]}"
    return [name for name in names if name > after] if after else names[-1:]


def _fetch_manifest(monitor: Monitor, name: str | None) -> _Manifest:
    """The manifest of the newest snapshot, or of the one called `name`. Raises MonitorError where it is none."""
    path = f"/v1/snapshots/{name}/manifest.json" if name else "/v1/snapshots/latest"
    address = monitor.base + path
    with monitor.open(path) as response:
        text = read_body(response).decode("utf-8", "replace")
    try:
        manifest = parse_object(text)
        if manifest["format"] not in FORMATS:
            raise MonitorError(f"{address} has format {manifest['format']!r}, not {FORMATS}: update Sluice")
        if not NAME.fullmatch(manifest["name"]) or name not in (None, manifest["name"]):
            raise MonitorError(f"{address} gives a snapshot called {manifest['name']!r}; refused")
        files, saes = list(map(SnapshotFile.from_entry, manifest["files"])), list(manifest["saes"])
        for file_path in (*(file.path for file in files), *(f"{sae}/evaluation.json" for sae in saes)):
            _check_path(file_path)
        return _Manifest(manifest["name"], files, saes, text)
    except (ValueError, KeyError, TypeError) as error:
        raise MonitorError(f"{address} is no manifest ({error!r}); is this the address of a Sluice monitor?") from None


def _check_path(path: str) -> None:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path or path == "manifest.json":
        raise MonitorError(f"the manifest lists {path!r}, which does not belong in a snapshot; refused")


def _fetch_snapshot(transfer: _Transfer, final: Path, manifest: _Manifest) -> Path:
    """Brings the snapshot to the folder `final`, by way of the transfer's folder."""
    if final.is_dir():
        _check_existing(final, manifest)
        _fetch_evaluations(transfer.monitor, final)
        return final
    work = transfer.folder
    work.mkdir(parents=True, exist_ok=True)
    for file in manifest.files:
        _fetch_file(transfer, _address(manifest.name, file.path), file)
    replace_text(work / "manifest.json", manifest.text)
    _fetch_evaluations(transfer.monitor, work)
    move_folder(work, final)
    return final


def _address(name: str, path: str) -> str:
    return f"/v1/snapshots/{name}/{urllib.parse.quote(path)}"


def _check_existing(final: Path, manifest: _Manifest) -> None:
    """Raises MonitorError where the folder holds another or a damaged snapshot."""
    try:
        if list(verify(final).files) == manifest.files:
            return
    except SnapshotError as error:
        raise MonitorError(f"{error}; delete {final} and pull again") from None
    raise MonitorError(f"{final} holds another run's snapshot of the same name; pull into another folder with --to DIR")


def _fetch_file(transfer: _Transfer, address: str, file: SnapshotFile) -> None:
    """Fetches one file of the manifest, or the rest of it, part by part where it has parts.

    A part with a wrong hash is fetched once more, from its start.
    """
    whole = transfer.folder / file.path
    partial = whole.with_name(whole.name + ".part")
    if is_intact(whole, file):
        return
    whole.parent.mkdir(parents=True, exist_ok=True)
    for part in _parts(file):
        for _ in range(2):
            _download_with_retries(transfer, address, partial, file, part)
            if part_sha256(partial, part.begin, part.end - part.begin) == part.sha256:
                break
            _shorten(partial, part.begin)
        else:
            raise MonitorError(
                f"{transfer.monitor.base}{address} differs from what the manifest says (bytes {part.begin:,} to "
                f"{part.end:,}, sha256 {part.sha256[:12]}…), twice; the file is damaged on the server or on the way: "
                "tell its operator"
            )
    _shorten(partial, file.bytes)
    partial.replace(whole)


@dataclass(frozen=True)
class _Part:
    """A part of a file that has a hash of its own; of most files all of it."""

    begin: int
    end: int
    sha256: str


def _parts(file: SnapshotFile) -> Iterator[_Part]:
    if file.parts is None:
        yield _Part(0, file.bytes, file.sha256)
        return
    for number, sha256 in enumerate(file.parts.sha256):
        begin = number * file.parts.bytes
        yield _Part(begin, min(begin + file.parts.bytes, file.bytes), sha256)


def _shorten(path: Path, size: int) -> None:
    """Cuts off what lies beyond `size` bytes."""
    if path.stat().st_size > size:
        os.truncate(path, size)


def _download_with_retries(transfer: _Transfer, address: str, partial: Path, file: SnapshotFile, part: _Part) -> None:
    """Downloads a part; each try continues from the bytes that have arrived. Raises ConnectionError after TRIES."""
    pause = transfer.pause_seconds
    for tries_left in reversed(range(TRIES)):
        try:
            return _download(transfer, address, partial, file, part)
        except ConnectionError as error:
            if not tries_left:
                raise ConnectionError(f"the connection broke {TRIES} times ({error})") from None
        time.sleep(pause)
        pause *= 2


def _download(transfer: _Transfer, address: str, partial: Path, file: SnapshotFile, part: _Part) -> None:
    """Appends to `partial` until it reaches the end of the part. Raises ConnectionError where it ends early."""
    size = partial.stat().st_size if partial.is_file() else 0
    if size >= part.end and partial.is_file():
        return
    is_rest = size > 0 or part.end < file.bytes
    headers = {"Range": f"bytes={size}-{part.end - 1}", "If-Range": f'"sha256-{file.sha256}"'} if is_rest else {}
    with transfer.monitor.open(address, headers) as response, open(partial, "r+b" if size else "wb") as output:
        if response.status_code != 206:
            size = 0  # the server has another file, or does not know ranges
        output.truncate(size)
        output.seek(size)
        for chunk in response.iter_raw():
            size += output.write(chunk[: part.end - size])
            transfer.on_progress(file.path, size, file.bytes)
            if size == part.end:
                break
    if size < part.end:
        raise ConnectionError(f"{transfer.monitor.base}{address} ended {part.end - size:,} bytes early")


def _fetch_evaluations(monitor: Monitor, folder: Path) -> bool:
    """Fetches the evaluations that the monitor has; no manifest lists them, since they come later.

    Returns whether the folder now has those of all SAEs.
    """
    manifest = read_manifest(folder)
    missing = [sae for sae in manifest.saes if not (folder / sae / "evaluation.json").is_file()]
    for sae in list(missing):
        try:
            with monitor.open(_address(manifest.name, f"{sae}/evaluation.json")) as response:
                text = read_body(response).decode("utf-8")
            parse_object(text)
        except (MonitorError, ConnectionError, ValueError):
            continue
        if (folder / sae).is_dir():
            replace_text(folder / sae / "evaluation.json", text)
            missing.remove(sae)
    return not missing


# --- The command -----------------------------------------------------------------------------------------------------


def run(url: str, token: str | None, to: Path, name: str | None, is_following: bool) -> int:
    """`python -m monitor pull` with these arguments; returns the exit code."""
    try:
        if name is not None and not NAME.fullmatch(name):
            raise UsageError(f"--name {name!r}: expected digits, such as 000001234567")
        if to.exists() and not to.is_dir():
            raise UsageError(f"--to {to}: this is a file; name a folder")
        monitor = Monitor(url, token)
        if is_following:
            follow(monitor, to, _progress, lambda folder: print(folder, flush=True), _print_error)
            return 0
        with _progress() as on_progress:
            folder = pull(monitor, to, name, on_progress)
    except UsageError as error:
        _print_error(str(error))
        return 2
    except ConnectionError as error:
        _print_error(f"{error}; pull again to go on")
        return 1
    except (MonitorError, OSError) as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        _print_error("stopped; pull again to go on from there")
        return 0 if is_following else 1
    print(folder)
    return 0


def _print_error(message: str) -> None:
    print(message, file=sys.stderr)


@contextmanager
def _progress() -> Iterator[OnProgress]:
    """Bars on a terminal; in a pipe, a line for each file that has come."""
    if not sys.stderr.isatty():
        yield lambda path, done, size: _print_error(f"{path}  {format_bytes(size)}") if done == size else None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bars: dict[str, TaskID] = {}

        def on_progress(path: str, done: int, size: int) -> None:
            if path not in bars:
                bars[path] = progress.add_task(path, total=size)
            progress.update(bars[path], completed=done)

        yield on_progress
