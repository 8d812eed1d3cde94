"""The live table of any run, in a terminal: `python -m monitor top URL`.

A thread asks the monitor every POLL_SECONDS, and for evaluations only when something has changed, so that a slow line
never holds up the keyboard. Lost connections are taken up again. In a pipe it prints one frame and ends.
"""

from __future__ import annotations

import argparse
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from monitor.cli.client import (
    BROKEN,
    LARGEST_DOCUMENT,
    Monitor,
    MonitorError,
    NotModified,
    UsageError,
    add_address,
    document_of,
    monitor_of,
)
from monitor.cli.terminal import live, results
from monitor.evaluation.results import Evaluation
from monitor.run_directory import SILENT_SECONDS
from monitor.summary import is_evaluated, with_evaluations
from producer.common.completion import complete
from producer.common.formatting import format_duration
from producer.common.shell import shell_command

POLL_SECONDS = 1.0
EVALUATIONS_SECONDS = 15.0
"""How often evaluations are asked for when no new snapshot has come."""
FRAME_SECONDS = 0.25
NO_REPORT = "no report yet: the trainer is not started, waits for its first producer, or fills its buffer"


@dataclass
class Seen:
    """What the monitor has told."""

    run: dict[str, Any] | None = None
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    """The newest of each SAE, from any snapshot;"""
    final: dict[str, Evaluation] = field(default_factory=dict)
    """those of the newest snapshot alone."""
    snapshots: int = 0
    broken: str | None = None
    """Why nothing is heard at the moment."""


class Watcher:
    """Asks the monitor; `seen` is replaced, never changed, so that another thread may draw it."""

    def __init__(self, monitor: Monitor) -> None:
        self.seen = Seen()
        self.failed: MonitorError | None = None
        self._monitor = monitor
        self._tag = ""
        self._next_list = 0.0

    def look(self) -> None:
        """Asks once. Raises MonitorError, or one of BROKEN."""
        run = self._monitor.read("/v1/run")
        if run is None or not {"state", "report", "latest", "directory"} <= run.keys():
            raise MonitorError(f"{self._monitor.base} tells of no run; is this the address of a Sluice monitor?")
        before = self.seen
        evaluations, final, snapshots = before.evaluations, before.final, before.snapshots
        # After the end the monitor may leave as soon as it has measured: who asks seldom would not see it.
        is_due = run["state"] == "finished" or time.monotonic() >= self._next_list
        if before.run is None or run["latest"] != before.run["latest"] or is_due:
            self._next_list = time.monotonic() + EVALUATIONS_SECONDS
            if (listed := self._list()) is not None:
                # Each page has the newest; of an SAE that none of them has measured, what was known stays.
                evaluations, snapshots = evaluations | _newest_evaluations(listed["snapshots"]), listed["count"]
                final = _newest_evaluations(listed["snapshots"][-1:])
        self.seen = Seen(run, evaluations, final, snapshots)

    def _list(self) -> dict[str, Any] | None:
        """The newest snapshots, and the `count` of all; None when they are those of last time."""
        headers = {"If-None-Match": self._tag} if self._tag else {}
        try:
            with self._monitor.open("/v1/snapshots", headers) as answer:
                self._tag = answer.headers.get("ETag", "")
                document = document_of(answer.read(LARGEST_DOCUMENT), f"{self._monitor.base}/v1/snapshots")
                snapshots = document.get("snapshots", [])
                return {"snapshots": snapshots, "count": document.get("count", len(snapshots))}
        except NotModified:
            return None

    def follow(self) -> None:
        """Asks for ever, until the monitor refuses; then `failed` says why."""
        while self.failed is None:
            try:
                self.look()
            except MonitorError as error:
                self.failed = error
            except BROKEN as error:
                self.seen = replace(self.seen, broken=str(error))
            time.sleep(POLL_SECONDS)


def _newest_evaluations(snapshots: list[dict[str, Any]]) -> dict[str, Evaluation]:
    """By SAE, from a list of snapshots as the service answers, oldest first."""
    return {
        name: Evaluation.from_json(sae["evaluation"])
        for snapshot in snapshots
        for name, sae in snapshot["saes"].items()
        if sae["evaluation"]
    }


def frame(seen: Seen, address: str, width: int) -> RenderableType:
    """The whole picture."""
    run = seen.run
    if run is None:
        return Text(seen.broken or f"asking {address} …", style="yellow" if seen.broken else "dim")
    report, summary = run["report"], run.get("summary")
    snapshots = f"{seen.snapshots} snapshot{'' if seen.snapshots == 1 else 's'}, newest {run['latest']}"
    note = snapshots if run["latest"] else "no snapshot yet"
    silent = run.get("silent_seconds") or 0.0
    if run["state"] == "finished" and summary:
        picture = _finished(summary, seen, note, width)
    elif report is None:
        picture = live(None, {}, None, NO_REPORT)
    elif silent > SILENT_SECONDS:
        lines = live(report | {"state": "silent", "tokens_per_second": 0.0}, seen.evaluations, None, note, width)
        why = f"  no report for {format_duration(silent)}: the trainer is stopped, or waits for producers"
        picture = Group(lines, Text(why, style="yellow"))
    else:
        picture = live(report, seen.evaluations, None, note, width)
    if seen.broken:
        return Group(_title(run), picture, Text(f"  {seen.broken}; trying again", style="yellow"))
    return Group(_title(run), picture)


def _finished(summary: dict[str, Any], seen: Seen, note: str, width: int) -> RenderableType:
    """The results; until they are measured, what training counted last."""
    assert seen.run is not None
    seconds = format_duration(summary["seconds"]) if "seconds" in summary else "?"
    note = f"{summary.get('outcome', 'finished')}: {summary['tokens']:,} tokens in {seconds} · {note}"
    measured, report = with_evaluations(summary, seen.final), seen.run["report"]
    if is_evaluated(measured) or report is None:
        return Group(results(measured, width), Text(f"  {note}", style="dim"))
    ended = report | {"state": "finished", "stream": {"producers": {}}}
    why = Text("  its last snapshot has no numbers on held-out text so far", style="yellow")
    return Group(live(ended, seen.evaluations, None, note, width), why)


def _title(run: dict[str, Any]) -> Text:
    model = (run.get("settings") or {}).get("model") or {}
    source = f" · {model['name']} at {', '.join(model.get('hooks', []))}" if model.get("name") else ""
    return Text.assemble("  ", (str(run["directory"]), "bold"), (source, "dim"), overflow="ellipsis", no_wrap=True)


# --- The command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> int:
    """`python -m monitor top`: 0 left, 1 the monitor did not answer or refused, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        prog=shell_command("monitor", "top"), description="Watch a run in the terminal; q or Ctrl-C leaves."
    )
    add_address(parser)
    complete(parser, arguments)
    given = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        monitor = monitor_of(given)
        watcher = Watcher(monitor)
        if console.is_terminal and sys.stdin.isatty():
            _watch(console, watcher, monitor.base)
        else:
            watcher.look()
        console.print(frame(watcher.seen, monitor.base, console.width))
    except KeyboardInterrupt:
        return 0
    except (MonitorError, *BROKEN) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _watch(console: Console, watcher: Watcher, address: str) -> None:
    """Draws until `q`, Ctrl-C or SIGTERM. Raises MonitorError when the monitor refuses."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    threading.Thread(target=watcher.follow, name="watcher", daemon=True).start()
    with _keys(), Live(console=console, screen=True, auto_refresh=False) as screen:
        while watcher.failed is None:
            keys = Text("  q leaves", style="dim")
            screen.update(Group(frame(watcher.seen, address, console.width), keys), refresh=True)
            try:
                if select.select([sys.stdin], [], [], FRAME_SECONDS)[0] and sys.stdin.read(1) in ("q", "Q", ""):
                    return
            except KeyboardInterrupt:
                return
    raise watcher.failed


@contextmanager
def _keys() -> Iterator[None]:
    """Keys arrive one by one and are not shown; the terminal is left as it was."""
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
