"""`sluice-demo`, `make demo`: trainer, producer and monitor on loopback, from one run file; a live table, then results.

Everything shown is read from the run directory, as any user could: metrics.jsonl, evaluation.json, summary.json. The
three processes are the real ones, started as a user starts them; their logs lie in the run directory. Ctrl-C stops
all three and leaves nothing running.
"""

from __future__ import annotations

import argparse
import fcntl
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.markup import escape

from monitor.cli.terminal import live, results
from monitor.run_directory import last_report, newest_evaluations
from monitor.settings import MonitorSettings
from monitor.snapshot_index import index_of
from producer.common.addresses import path_argument
from producer.common.completion import command_arguments, complete, complete_settings
from producer.common.parsing import read_object
from producer.common.run_file import read_run_file
from producer.common.shell import shell_command
from producer.common.toml import SettingsError
from producer.common.version import VERSION
from trainer.settings import TrainerSettings

RUN_FILE = Path(__file__).with_name("demo.toml")
COMMANDS = {
    "trainer": ["-m", "trainer"],
    "producer": ["-m", "producer"],
    "monitor": ["-m", "monitor", "--until-evaluated"],
}
STOP_SECONDS = 15
PLAIN_EVERY_SECONDS = 10


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    arguments = command_arguments() if arguments is None else arguments
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    if options.files is not None:
        return _copy_files(options.files)
    return _run(_shortest(RUN_FILE), options.overrides)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name if Path(sys.argv[0]).name.startswith("sluice-") else "make demo",
        description="Trains two SAEs on a small language model, on this machine, in about three minutes.",
    )
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one setting of deploy/demo.toml"
    )
    parser.add_argument(
        "--files",
        type=path_argument,
        metavar="DIR",
        help="copy run files and deployment files to this new folder",
    )
    parser.add_argument("--version", action="version", version=f"Sluice {VERSION}")
    complete_settings(overrides, TrainerSettings)
    return parser


def _copy_files(folder: Path) -> int:
    """Copies run files to start from, and everything that docs/deployment.md describes. Returns the exit code."""
    if folder.exists():
        print(f"{folder} exists; name a new folder", file=sys.stderr)
        return 2
    shutil.copytree(RUN_FILE.parent, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    print(f"run files and deployment files are in {folder}")
    return 0


def _shortest(path: Path) -> str:
    """The path from the working directory where it lies below it, else the whole path."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _run(run_file: str, overrides: list[str]) -> int:
    console = Console()
    try:
        settings = read_run_file(TrainerSettings, run_file, overrides)
    except SettingsError as error:
        console.print(escape(str(error)), style="red")
        return 2
    directory = Path(settings.run.directory)
    if directory.exists():
        if not _is_an_old_run(directory):
            console.print(
                f"{directory} is not the directory of a finished or stopped run; choose another run.directory"
            )
            return 2
        console.print(f"starting afresh: removing {directory}", style="dim")
        shutil.rmtree(directory)
    (directory / "logs").mkdir(parents=True)
    # Remembered, not raised: an exception in the midst of a Popen would leave a process that nothing would stop.
    interrupted = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: interrupted.set())
    processes: dict[str, subprocess.Popen[bytes]] = {}
    began = time.monotonic()
    try:
        for name, module in COMMANDS.items():
            if interrupted.is_set():
                raise KeyboardInterrupt
            log = open(directory / "logs" / f"{name}.log", "wb")  # noqa: SIM115 (the child keeps it open)
            # A session of its own: Ctrl-C reaches this process alone, which then stops the others in order.
            processes[name] = subprocess.Popen(
                [sys.executable, *module, run_file, *overrides], stdout=log, stderr=log, start_new_session=True
            )
        failed = _watch(console, directory, processes, began, interrupted, _page(run_file, overrides))
    except KeyboardInterrupt:
        _stop(processes)
        console.print(f"stopped; nothing is left running. The run so far lies in {directory}.")
        return 130
    finally:
        _stop(processes)
    if failed:
        console.print(f"[red]the {failed} failed[/]; the end of {directory}/logs/{failed}.log:")
        console.print(escape("".join(_tail(directory / "logs" / f"{failed}.log", 12))))
        return 1
    _show_results(console, settings, time.monotonic() - began, shell_command("monitor", run_file, *overrides))
    return 0


def _is_an_old_run(directory: Path) -> bool:
    """Whether the folder is a run directory that no trainer works in."""
    try:
        with open(directory / "lock", "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return [path.name for path in directory.iterdir()] in ([], ["logs"])
    except OSError:
        return False
    return (directory / "settings.toml").is_file()


def _watch(
    console: Console, directory: Path, processes: dict[str, subprocess.Popen[bytes]], began: float,
    interrupted: threading.Event, page: str,
) -> str | None:  # fmt: skip
    """Shows the run until all three processes have ended; returns the name of the first that failed, or None.

    Raises KeyboardInterrupt soon after `interrupted` was set.
    """
    printed = 0.0
    with Live(console=console, refresh_per_second=4, transient=False, auto_refresh=False) as screen:
        while any(process.poll() is None for process in processes.values()):
            if interrupted.is_set():
                raise KeyboardInterrupt  # before anything is called a failure that the same signal has stopped
            for name, process in processes.items():
                if process.poll():
                    return name
            elapsed = time.monotonic() - began
            frame = live(
                last_report(directory), newest_evaluations(directory), elapsed, _note(directory, processes, page)
            )
            if console.is_terminal:
                screen.update(frame, refresh=True)
            elif elapsed - printed >= PLAIN_EVERY_SECONDS:
                printed = elapsed
                console.print(frame)
            interrupted.wait(0.25)
    return next((name for name, process in processes.items() if process.returncode), None)


def _page(run_file: str, overrides: list[str]) -> str:
    """The address of the monitor's page."""
    table = read_run_file(MonitorSettings, run_file, overrides).monitor
    return f"http://{table.host}:{table.service_port}/" if table.service_port else "the port that its log names"


def _note(directory: Path, processes: dict[str, subprocess.Popen[bytes]], page: str) -> str:
    names = index_of(directory).names()
    if not names and (last_report(directory) or {}).get("state") == "filling":
        return f"filling the buffer before the first step · page at {page}"
    published = f"{len(names)} snapshot(s), newest {names[-1]}" if names else "no snapshot yet"
    if processes["trainer"].poll() is not None:
        return "training is done; the last snapshot is measured, and its latents are looked at"
    if not (directory / "metrics.jsonl").exists():
        return f"starting: loading the language model · page at {page}"
    return f"{published} · page at {page}"


def _stop(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Sends SIGTERM to the processes that still run, and SIGKILL to those that do not react."""
    running = [process for process in processes.values() if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for process in running:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _tail(path: Path, lines: int) -> list[str]:
    return path.read_text(errors="replace").splitlines(keepends=True)[-lines:]


def _dead_tokens(settings: TrainerSettings) -> str:
    return " or ".join(f"{tokens:,}" for tokens in sorted({sae.dead_tokens for sae in settings.sae}))


def _show_results(console: Console, settings: TrainerSettings, seconds: float, monitor: str) -> None:
    directory = Path(settings.run.directory)
    summary = read_object(directory / "summary.json")
    console.print()
    console.print(results(summary))
    console.print(
        f"{summary['tokens']:,} tokens in {summary['seconds']:.0f} s of training "
        f"({summary['tokens_per_second']:,.0f} tokens/s for {len(summary['saes'])} SAEs); {seconds:.0f} s in all.\n"
        "Measured on held-out text: L0, FVU, ΔCE, CE recovered, KL. "
        f"Dead: silent for the last {_dead_tokens(settings)} tokens.\n"
    )
    snapshot = directory / "snapshots" / (directory / "snapshots" / "LATEST").read_text().strip()
    console.print(f"The snapshot lies in [bold]{snapshot}[/]. Load it with SAELens, nothing of ours installed:\n")
    console.print(
        f'    from sae_lens import SAE\n    sae = SAE.load_from_disk("{snapshot}/{settings.sae[0].name}")\n',
        highlight=False,
    )
    console.print(
        "Curves, and every latent with what it fires on: start the monitor again, and open the page it names:\n"
    )
    console.print(f"    {monitor}\n", highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
