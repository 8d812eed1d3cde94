"""`python -m trainer ctl RUN_DIR COMMAND`: a person speaks to a running trainer, through a socket file of its run.

The file is `RUN_DIR/ctl`, mode 0600. A connection carries one line each way, JSON:

    {"command": "detach", "name": "wide", "now": false}
    {"ok": true, "said": "…", …}       or       {"ok": false, "error": "…", "code": 2}

The trainer's end is a thread that knows only lines: it puts a request into an `Inbox`, which the training loop empties
between two steps. Both ends are here, and light: no torch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import StreamRequestHandler, ThreadingMixIn, UnixStreamServer
from typing import Any

from producer.common.addresses import expand_path, path_argument
from producer.common.completion import complete
from producer.common.formatting import format_count
from producer.common.parsing import ParseError, parse_object
from producer.common.shell import shell_command
from producer.common.toml import SettingsError, read_toml, show_value

log = logging.getLogger("sluice.trainer")

MAX_REQUEST_BYTES = 1 << 16
REQUEST_SECONDS = 10.0
"""How long the trainer waits for a client's line."""
ANSWER_SECONDS = 600.0
"""How long the client waits for the trainer, which may be writing a large checkpoint."""
MAX_ADDRESS_BYTES = 100
"""Of a socket's path; the system's limit is 104 or 108, a terminating zero included."""

Answer = dict[str, Any]


class Request:
    """What a client asked; `answer` is called once."""

    def __init__(self, command: str, arguments: dict[str, Any]) -> None:
        self.command = command
        self.arguments = arguments
        self._answer: Future[Answer] = Future()

    def answer(self, answer: Answer) -> None:
        self._answer.set_result(answer)

    def wait(self) -> Answer:
        return self._answer.result()


def refusal(error: str, code: int = 2) -> Answer:
    """The answer to what was not done; `code` is the client's exit code."""
    return {"ok": False, "error": error, "code": code}


class Inbox:
    """Requests on their way to the training loop. Set, as an event is, while there is something to attend to."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._changed = threading.Condition()
        self._requests: deque[Request] = deque()
        self._closed = False

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def is_set(self) -> bool:
        return self.stopping or bool(self._requests)

    def put(self, request: Request) -> None:
        with self._changed:
            if self._closed:
                request.answer(refusal("the trainer is leaving", code=1))
                return
            self._requests.append(request)
            self._changed.notify_all()

    def next(self) -> Request | None:
        with self._changed:
            return self._requests.popleft() if self._requests else None

    def wait(self, seconds: float) -> None:
        """Until a request is there, but not longer."""
        with self._changed:
            if not self.is_set():
                self._changed.wait(seconds)

    def close(self) -> None:
        """Nobody will attend to requests any more; those that wait, and later ones, are told so."""
        with self._changed:
            self._closed = True
            while self._requests:
                self._requests.popleft().answer(refusal("the trainer is leaving", code=1))


# The trainer's end


@contextmanager
def listening(directory: Path, inbox: Inbox) -> Iterator[None]:
    """Brings what clients ask into `inbox`. Where no socket can be made, training goes on without one."""
    try:
        server = _Server(directory, inbox)
    except OSError as error:
        log.warning("%s cannot be opened, so there is no `ctl` for this run: %s", directory / "ctl", error)
        yield
        return
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="ctl", daemon=True)
    thread.start()
    try:
        yield
    finally:
        inbox.close()
        server.shutdown()
        server.server_close()
        thread.join()
        with suppress(OSError):
            (directory / "ctl").unlink()


class _Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, directory: Path, inbox: Inbox) -> None:
        self.inbox = inbox
        # What a killed trainer left: the run directory's lock says that it lives no more.
        (directory / "ctl").unlink(missing_ok=True)
        with _address(directory) as address:
            super().__init__(address, _Handler)

    def server_bind(self) -> None:
        super().server_bind()
        os.chmod(str(self.server_address), 0o600)  # nobody gets in before `listen`, which comes next

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news; anything else is a fault of ours and is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(StreamRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS

    def handle(self) -> None:
        line = self.rfile.readline(MAX_REQUEST_BYTES + 1)
        if line:
            answer = self._ask(line)
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _ask(self, line: bytes) -> Answer:
        if len(line) > MAX_REQUEST_BYTES:
            return refusal(f"a request has at most {MAX_REQUEST_BYTES} bytes")
        try:
            asked = parse_object(line)
        except ParseError:
            asked = {}
        if not isinstance(asked.get("command"), str):
            return refusal('a request is one line of JSON, such as {"command": "status"}')
        request = Request(asked.pop("command"), asked)
        self.server.inbox.put(request)
        return request.wait()


@contextmanager
def _address(directory: Path) -> Iterator[str]:
    """A path of `directory/ctl` that is short enough for a socket; valid as long as the block."""
    path = directory / "ctl"
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    opened = os.open(directory, os.O_RDONLY)
    try:
        if not Path(f"/proc/self/fd/{opened}").exists():
            raise OSError(
                f"its path is longer than the {MAX_ADDRESS_BYTES} bytes a socket's may have; use a shorter one"
            )
        yield f"/proc/self/fd/{opened}/ctl"
    finally:
        os.close(opened)


# The client's end


class CtlError(Exception):
    """A command that was not carried out, in words for the person at the prompt; `code` is the exit code."""

    def __init__(self, error: str, code: int) -> None:
        super().__init__(error)
        self.code = code


def main(arguments: list[str]) -> int:
    """Runs one command; exit codes: 0 done, 1 no trainer answers or it could not, 2 refused, with what to change."""
    parser = _parser()
    complete(parser, arguments)
    given = vars(parser.parse_args(arguments))
    directory, as_json, path = given.pop("run_directory"), given.pop("json"), given.get("sae")
    try:
        if path is not None:
            given["sae"] = read_sae_table(path)
        if given["command"] in ("pin", "unpin"):
            answer = pin(directory, given["command"], given["name"])
        else:
            answer = ask(directory, given)
    except CtlError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    if as_json:
        print(json.dumps(answer, indent=1))
    elif given["command"] == "status":
        _show(answer)
    else:
        print(answer["said"])
    return 0


def ask(directory: Path, request: dict[str, Any]) -> Answer:
    """The answer of the trainer that works in `directory`. Raises CtlError."""
    if not directory.is_dir():
        kind = "is a file" if directory.is_file() else "does not exist"
        raise CtlError(f"{directory.absolute()} {kind}; name the run's directory, [run] directory of its file", 2)
    try:
        with _address(directory) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)  # waits for its turn, which a connection with a timeout does not
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(json.dumps(request, default=str).encode() + b"\n")
            line = connection.makefile("rb").readline()
    except (FileNotFoundError, ConnectionRefusedError):
        raise CtlError(
            f"no trainer is at work in {directory.absolute()}: start it with `{shell_command('trainer', 'RUN.toml')}`, "
            "the run's file",
            1,
        ) from None
    except TimeoutError:
        raise CtlError(f"the trainer did not answer within {ANSWER_SECONDS:.0f} s; its log may tell why", 1) from None
    except OSError as error:
        raise CtlError(f"{directory / 'ctl'} cannot be used: {error.strerror or error}", 1) from None
    if not line:
        raise CtlError("the trainer left before it answered", 1)
    try:
        answer = parse_object(line)
    except ParseError as error:
        raise CtlError(f"{directory / 'ctl'} gives no answer of a trainer: {error}", 1) from None
    if not answer.get("ok"):
        raise CtlError(str(answer.get("error", "the trainer gives no reason")), int(answer.get("code", 1)))
    return answer


def pin(directory: Path, command: str, name: str | None) -> Answer:
    """Pins or unpins a snapshot, the newest one without a name. Raises CtlError.

    Needs no trainer: the mark is a file in the snapshot's folder, and whoever retires looks for it.
    """
    from trainer import snapshot

    try:
        name = name or next(reversed(snapshot.snapshot_names(directory)), "")
        if command == "pin":
            snapshot.pin(directory, name)
            said = "pinned {}: it stays until it is unpinned"
        else:
            snapshot.unpin(directory, name)
            said = "unpinned {}: it stays as long as [snapshots] says"
    except (snapshot.SnapshotError, OSError) as error:
        raise CtlError(str(error), 2) from None
    return {"ok": True, "said": said.format(directory / "snapshots" / name), "snapshot": name}


def read_sae_table(path: Path) -> dict[str, Any]:
    """The keys of one SAE: those of the file, or of its only [[sae]] table. Raises CtlError.

    A relative `start_from` is one of this process' working directory, and the trainer may have another.
    """
    try:
        document = read_toml(path, "SAE file")
    except SettingsError as error:
        raise CtlError(str(error), 2) from None
    tables = document.get("sae", [document])
    if "sae" in document and (len(document) > 1 or not isinstance(tables, list) or len(tables) != 1):
        raise CtlError(f"{path} must hold one [[sae]] table and nothing else, or the keys of one", 2)
    sae = tables[0]
    if isinstance(start := sae.get("start_from"), str):
        try:
            sae["start_from"] = os.path.abspath(expand_path(start))
        except ValueError as error:
            raise CtlError(f"{path}: start_from = {show_value(start)}: {error}", 2) from None
    return sae


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=shell_command("trainer", "ctl"),
        description="Speaks to the trainer at work in RUN_DIR. What changes the run is on disk before it is answered.",
    )
    parser.add_argument(
        "run_directory", type=path_argument, metavar="RUN_DIR", help="[run] directory of the run's file"
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print the whole answer as JSON, for scripts")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, does: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.", parents=[shared])

    command("status", "show the run, its stream and its SAEs")
    command("snapshot", "publish a snapshot now")
    command("cooldown", "let an SAE's learning rate fall to zero; it is finished then, and stays").add_argument("name")
    command("attach", "add an SAE to the live stream").add_argument(
        "sae", type=path_argument, metavar="SAE.toml", help="the keys of one [[sae]] table of a run file"
    )
    detach = command("detach", "cool an SAE down, publish it and let it go")
    detach.add_argument("name")
    detach.add_argument("--now", action="store_true", help="without the cooldown")
    for name, does in (("pin", "keep a snapshot for good, also when no trainer is at work"), ("unpin", "undo `pin`")):
        command(name, does).add_argument("name", nargs="?", metavar="SNAPSHOT", help="its name (default: the newest)")
    command("pause", "hold training, also across restarts, until `resume`; producers wait")
    command("resume", "go on after `pause`")
    command("retry-quarantined", "give shards that failed another chance, after what was wrong with them is mended")
    command("drain", "train on the rows that are under way, then stop; nothing has to be computed again")
    return parser


def _show(status: Answer) -> None:
    """A status, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    tokens = f"{status['tokens']:,}" + (f" of {status['target_tokens']:,}" if status["target_tokens"] else "")
    console.print(f"run {status['run']} · [bold]{status['state']}[/] · {tokens} tokens · "
                  f"{status['tokens_per_second']:,.0f}/s")  # fmt: skip
    producers = sum(status["producers"].values())
    console.print(f"{producers} producer{'' if producers == 1 else 's'} · buffer {status['buffer_rows']:,} of "
                  f"{status['buffer_capacity_rows']:,} rows · epoch {status['epoch']}")  # fmt: skip
    _show_trouble(console, status)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    # Numbers are never cut; a hook's name may be long, and is told only where there are several.
    hooks = {sae["hook"] for sae in status["saes"]}
    for name in ("SAE", "kind", "latents", "tokens", "L0", "FVU", "dead", "rate", "schedule"):
        table.add_column(name, justify="left" if name in ("SAE", "kind", "schedule") else "right", no_wrap=True)
    if len(hooks) > 1:
        table.add_column("hook", overflow="fold")
    for sae in status["saes"]:
        row = (
            f"[bold]{sae['name']}[/]",
            sae["architecture"],
            str(sae["d_sae"]),
            format_count(sae["tokens"]),
            _number(sae["l0"], ".1f"),
            _number(sae["fvu"], ".4f"),
            _number(sae["dead_latents_ratio"], ".1%"),
            _number(sae["learning_rate"], ".0e"),
            sae["phase"] + (f", {format_count(sae['rows_left'])} left" if sae["rows_left"] else ""),
        )
        table.add_row(*row, *([sae["hook"]] if len(hooks) > 1 else []))
    console.print(table)


def _show_trouble(console: Any, status: Answer) -> None:
    """Quarantined shards, with their reasons, and those on which producers are lost."""
    quarantined = status["quarantined"]
    if quarantined["shards"]:
        tokens = "unknown" if quarantined["tokens"] is None else f"{quarantined['tokens']:,}"
        console.print(
            f"[yellow]{quarantined['shards']} shards quarantined, tokens of them not trained on: {tokens}[/] "
            "(`retry-quarantined` tries them again)"
        )
    for entry in quarantined["newest"]:
        console.print(f"  shard {entry['shard']} of epoch {entry['epoch']}: {entry['reason']!r}", markup=False)
    if status["suspect_shards"]:
        console.print(f"[yellow]{status['suspect_shards']} shards on which producer after producer was lost[/]")
    for entry in status["suspects"]:
        console.print(f"  shard {entry['shard']} of epoch {entry['epoch']}: {entry['deaths']} in a row")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
