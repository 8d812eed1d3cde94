"""A run in the terminal, as `python -m monitor top` shows it.

A thread polls the monitor, and asks for evaluations only when something has changed, so that a slow connection never
holds up the keyboard. After a lost connection it goes on polling. In a pipe, one picture is printed.
"""

from __future__ import annotations

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

from monitor.cli.client import Monitor, parse_document, read_body
from monitor.cli.errors import MonitorError, NotModified, UsageError
from monitor.cli.terminal import live, results
from monitor.evaluation.results import Evaluation
from monitor.run_directory import SILENT_SECONDS
from monitor.summary import is_evaluated, with_evaluations
from producer.common.formatting import format_duration

POLL_SECONDS = 1.0
EVALUATIONS_SECONDS = 15.0
"""How often evaluations are asked for when no new snapshot has come."""
KEY_SECONDS = 0.25
"""How long a key is waited for before the picture is drawn anew."""
NO_REPORT = "no report yet: the trainer is not started, waits for its first producer, or fills its buffer"

Run = dict[str, Any]
"""The JSON of /v1/run."""
Evaluations = dict[str, Evaluation]
"""The newest evaluation of each SAE."""


@dataclass(frozen=True)
class RunView:
    """A run as the monitor last showed it."""

    run: Run | None = None
    evaluations: Evaluations = field(default_factory=dict)
    """The newest of each SAE, from any snapshot;"""
    final_evaluations: Evaluations = field(default_factory=dict)
    """those of the newest snapshot alone."""
    snapshots: int = 0
    connection_error: str | None = None
    """Why the monitor does not answer at the moment."""


class RunPoller:
    """Polls the monitor; `view` is replaced and never changed, so that another thread may draw it."""

    def __init__(self, monitor: Monitor) -> None:
        self.view = RunView()
        self.refusal: MonitorError | None = None
        """Why polling has ended."""
        self._monitor = monitor
        self._list_tag = ""
        self._next_list_at = 0.0

    def poll(self) -> None:
        """Polls the monitor once. Raises MonitorError, or ConnectionError."""
        run = self._monitor.read("/v1/run")
        if run is None or not {"state", "report", "latest", "directory"} <= run.keys():
            raise MonitorError(f"{self._monitor.base} shows no run; is this the address of a Sluice monitor?")
        view = replace(self.view, run=run, connection_error=None)
        # The monitor of a finished run may leave once it has evaluated, so that a rare look would miss the results.
        is_due = run["state"] == "finished" or time.monotonic() >= self._next_list_at
        if self.view.run is None or run["latest"] != self.view.run["latest"] or is_due:
            self._next_list_at = time.monotonic() + EVALUATIONS_SECONDS
            if (page := self._list()) is not None:
                # The page has the newest snapshots; an SAE that none of them has evaluated keeps its evaluation.
                snapshots = page.get("snapshots", [])
                view = replace(
                    view,
                    evaluations=view.evaluations | _newest_evaluations(snapshots),
                    final_evaluations=_newest_evaluations(snapshots[-1:]),
                    snapshots=page.get("count", len(snapshots)),
                )
        self.view = view

    def _list(self) -> dict[str, Any] | None:
        """The JSON of /v1/snapshots; None when it is that of the last time."""
        headers = {"If-None-Match": self._list_tag} if self._list_tag else {}
        try:
            with self._monitor.open("/v1/snapshots", headers) as response:
                self._list_tag = response.headers.get("ETag", "")
                return parse_document(read_body(response), f"{self._monitor.base}/v1/snapshots")
        except NotModified:
            return None

    def run(self) -> None:
        """Polls until the monitor refuses."""
        while self.refusal is None:
            try:
                self.poll()
            except MonitorError as error:
                self.refusal = error
            except ConnectionError as error:
                self.view = replace(self.view, connection_error=str(error))
            time.sleep(POLL_SECONDS)


def _newest_evaluations(snapshots: list[dict[str, Any]]) -> Evaluations:
    """Those in the JSON of /v1/snapshots, which are sorted from old to new."""
    return {
        name: Evaluation.from_json(sae["evaluation"])
        for snapshot in snapshots
        for name, sae in snapshot["saes"].items()
        if sae["evaluation"]
    }  # fmt: skip


# --- The picture -----------------------------------------------------------------------------------------------------


def draw(view: RunView, address: str, width: int) -> RenderableType:
    """The whole display."""
    if view.run is None:
        return Text(view.connection_error or f"asking {address} …", style="yellow" if view.connection_error else "dim")
    picture = _draw_run(view, view.run, width)
    if view.connection_error:
        warning = Text(f"  {view.connection_error}; trying again", style="yellow")
        return Group(_title(view.run), picture, warning)
    return Group(_title(view.run), picture)


def _draw_run(view: RunView, run: Run, width: int) -> RenderableType:
    report, summary = run["report"], run.get("summary")
    count = f"{view.snapshots} snapshot{'' if view.snapshots == 1 else 's'}, newest {run['latest']}"
    note = count if run["latest"] else "no snapshot yet"
    silent_seconds = run.get("silent_seconds") or 0.0
    if run["state"] == "finished" and summary:
        return _draw_results(view, run, summary, note, width)
    if report is None:
        return live(None, {}, None, NO_REPORT)
    if silent_seconds > SILENT_SECONDS:
        table = live(report | {"state": "silent", "tokens_per_second": 0.0}, view.evaluations, None, note, width)
        silence = format_duration(silent_seconds)
        warning = f"  no report for {silence}: the trainer is stopped, or waits for producers"
        return Group(table, Text(warning, style="yellow"))
    return live(report, view.evaluations, None, note, width)


def _draw_results(view: RunView, run: Run, summary: dict[str, Any], note: str, width: int) -> RenderableType:
    """The results of a finished run; until its last snapshot is evaluated, the last numbers of training."""
    duration = format_duration(summary["seconds"]) if "seconds" in summary else "?"
    note = f"{summary.get('outcome', 'finished')}: {summary['tokens']:,} tokens in {duration} · {note}"
    summary, report = with_evaluations(summary, view.final_evaluations), run["report"]
    if is_evaluated(summary) or report is None:
        return Group(results(summary, width), Text(f"  {note}", style="dim"))
    table = live(report | {"state": "finished", "stream": {"producers": {}}}, view.evaluations, None, note, width)
    activity = f": the monitor is {run['evaluation']}" if run.get("evaluation") else ""
    warning = Text(f"  its last snapshot has no numbers on held-out text so far{activity}", style="yellow")
    return Group(table, warning)


def _title(run: Run) -> Text:
    model = (run.get("settings") or {}).get("model") or {}
    source = f" · {model['name']} at {', '.join(model.get('hooks', []))}" if model.get("name") else ""
    return Text.assemble("  ", (str(run["directory"]), "bold"), (source, "dim"), overflow="ellipsis", no_wrap=True)


# --- The terminal ----------------------------------------------------------------------------------------------------


def run(url: str, token: str | None) -> int:
    """`python -m monitor top` with these arguments; returns the exit code."""
    console = Console(highlight=False)
    try:
        monitor = Monitor(url, token)
        poller = RunPoller(monitor)
        if console.is_terminal and sys.stdin.isatty():
            _watch(console, poller, monitor.base)
        else:
            poller.poll()
        console.print(draw(poller.view, monitor.base, console.width))
    except KeyboardInterrupt:
        return 0
    except (MonitorError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _watch(console: Console, poller: RunPoller, address: str) -> None:
    """Draws until `q`, Ctrl-C or SIGTERM. Raises MonitorError when the monitor refuses."""
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    threading.Thread(target=poller.run, name="poller", daemon=True).start()
    with _single_keys(), Live(console=console, screen=True, auto_refresh=False) as screen:
        while poller.refusal is None:
            hint = Text("  q leaves", style="dim")
            screen.update(Group(draw(poller.view, address, console.width), hint), refresh=True)
            try:
                if select.select([sys.stdin], [], [], KEY_SECONDS)[0] and sys.stdin.read(1) in ("q", "Q", ""):
                    return
            except KeyboardInterrupt:
                return
    raise poller.refusal


@contextmanager
def _single_keys() -> Iterator[None]:
    """Makes keys arrive one by one, without echo; restores the terminal afterwards."""
    attributes = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)
