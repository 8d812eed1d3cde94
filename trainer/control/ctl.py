"""`python -m trainer ctl RUN_DIR COMMAND`: an operator's commands to a running trainer, through its socket file.

The trainer's end, and the format of requests and answers, are in `requests`. Light: no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from producer.common.addresses import expand_path, path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete
from producer.common.formatting import format_bytes, format_count
from producer.common.parsing import ParseError, parse_object
from producer.common.shell import shell_command
from producer.common.toml import SettingsError, read_toml, show_value
from trainer.control.requests import Answer, socket_address
from trainer.report import RanksReport

NAME_HELP = "name of the SAE, or a pattern in quotes, such as 'mlp.*'"
ANSWER_SECONDS = 600.0
"""How long the client waits for the trainer, which may be writing a large checkpoint."""


class CtlError(Exception):
    """A command that was not carried out. The message is for the operator; `code` is the exit code."""

    def __init__(self, error: str, code: int) -> None:
        super().__init__(error)
        self.code = code


def main(arguments: list[str]) -> int:
    """Runs one command; exit codes: 0 done, 1 no trainer answers or it could not, 2 refused, with what to change."""
    parser = _parser()
    complete(parser, arguments)
    request = vars(parser.parse_args(arguments))
    directory, as_json, path = request.pop("run_directory"), request.pop("json"), request.get("sae")
    try:
        if path is not None:
            request["sae"] = read_sae_table(path)
        if request["command"] in ("pin", "unpin"):
            answer = pin(directory, request["command"], request["name"])
        else:
            answer = ask(directory, request)
    except CtlError as error:
        print(error, file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        return 130
    if as_json:
        print(json.dumps(answer, indent=1))
    elif request["command"] == "status":
        _show(answer)
    else:
        print(answer["said"])
    return 0


def ask(directory: Path, request: dict[str, Any]) -> Answer:
    """Sends a request to the trainer of `directory` and returns its answer. Raises CtlError."""
    if not directory.is_dir():
        kind = "is a file" if directory.is_file() else "does not exist"
        raise CtlError(f"{directory.absolute()} {kind}; name the run's directory, [run] directory of its file", 2)
    try:
        with socket_address(directory) as address, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(address)  # waits in the queue, which a connection with a timeout does not
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

    Needs no trainer: the mark is a file in the snapshot's folder, which is checked before a snapshot is retired.
    """
    from trainer import snapshot

    try:
        name = name or next(reversed(snapshot.snapshot_names(directory)), "")
        if command == "pin":
            snapshot.pin(directory, name)
            sentence = "pinned {}: it stays until it is unpinned"
        else:
            snapshot.unpin(directory, name)
            sentence = "unpinned {}: it stays as long as [snapshots] says"
    except (snapshot.SnapshotError, OSError) as error:
        raise CtlError(str(error), 2) from None
    return {"ok": True, "said": sentence.format(directory / "snapshots" / name), "snapshot": name}


def read_sae_table(path: Path) -> dict[str, Any]:
    """Reads the keys of one SAE: those of the file, or of its only [[sae]] table. Raises CtlError.

    A relative `start_from` is made absolute: the trainer may have another working directory.
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
    parser = command_parser(
        "trainer",
        "ctl",
        "Speaks to the trainer at work in RUN_DIR. What changes the run is on disk before it is answered.",
        ("runs/gpt2 status", "runs/gpt2 snapshot", "runs/gpt2 attach wider.toml", "runs/gpt2 cooldown topk"),
    )
    parser.add_argument(
        "run_directory", type=path_argument, metavar="RUN_DIR", help="[run] directory of the run's file"
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print the whole answer as JSON, for scripts")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, purpose: str) -> argparse.ArgumentParser:
        description = f"{purpose[0].upper()}{purpose[1:]}."
        return commands.add_parser(name, help=purpose, description=description, parents=[shared])

    command("status", "show the run, its stream and its SAEs")
    command("snapshot", "publish a snapshot now")
    command("cooldown", "let an SAE's learning rate fall to zero; it is finished then, and stays").add_argument(
        "name", help=NAME_HELP
    )
    command("attach", "add an SAE to the live stream").add_argument(
        "sae",
        type=path_argument,
        metavar="SAE.toml",
        help="the keys of one [[sae]] table of a run file",
    )
    detach = command("detach", "cool an SAE down, publish it and remove it")
    detach.add_argument("name", help=NAME_HELP)
    detach.add_argument("--now", action="store_true", help="without the cooldown")
    for name, purpose in (
        ("pin", "keep a snapshot for good, also when no trainer is at work"),
        ("unpin", "undo `pin`"),
    ):
        command(name, purpose).add_argument(
            "name", nargs="?", metavar="SNAPSHOT", help="its name (default: the newest)"
        )
    command("pause", "hold training, also across restarts, until `resume`; producers wait")
    command("resume", "go on after `pause`")
    command("retry-quarantined", "give shards that failed another chance, after what was wrong with them is mended")
    command("drain", "train on the tokens that are on their way, then stop; nothing has to be computed again")
    return parser


def _show(status: Answer) -> None:
    """Prints a status as a table."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    tokens = f"{status['tokens']:,}" + (f" of {status['target_tokens']:,}" if status["target_tokens"] else "")
    console.print(f"run {status['run']} · [bold]{status['state']}[/] · {tokens} tokens · "
                  f"{status['tokens_per_second']:,.0f}/s")  # fmt: skip
    producers = sum(status["producers"].values())
    console.print(f"{producers} producer{'' if producers == 1 else 's'} · buffer {status['buffer_rows']:,} of "
                  f"{status['buffer_capacity_rows']:,} tokens · epoch {status['epoch']}")  # fmt: skip
    if (ranks := status["ranks"])["count"] > 1:
        exchanged = ranks["exchange_bytes"]
        largest = sorted(exchanged, key=exchanged.__getitem__, reverse=True)[:3]
        purposes = ", ".join(f"{purpose} {format_bytes(exchanged[purpose])}" for purpose in largest)
        facts = " · ".join(RanksReport.from_json(ranks).facts)
        console.print(f"{facts} · exchanged {format_bytes(sum(exchanged.values()))}: {purposes}")
    _show_trouble(console, status)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    # Numbers are never cut; a hook's name may be long, and is shown only where there are several.
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
    """Prints quarantined shards, with their reasons, and those on which producers are lost."""
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
