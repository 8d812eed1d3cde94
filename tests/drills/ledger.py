"""The ledger under its Hypothesis machine: at length, and with bugs planted on purpose that the machine must catch.

    python -m tests.drills.ledger EXAMPLES STEPS SEED     # explores; prints how many moves were made

The bugs, of one line each, are in ledger_bugs.toml, and are planted into a copy by syntax tree. One that has no place
in the ledger any more fails the drill: it has to be written anew for the ledger as it is now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.drills.places import PLACES
from tests.drills.planting import plant, read_bugs
from tests.drills.scene import ROOT, Outcome

BUGS = read_bugs(Path(__file__).parent / "ledger_bugs.toml")
SUBTLE = {"a trainer that winds down does not wait for what is under way"}
"""Nothing is lost or trained twice by it, only done later: an example in tests/test_ledger.py is there to catch it."""


def long_machine(folder: Path, quick: bool) -> Outcome:
    """The unchanged ledger under its machine, from two random beginnings at once."""
    examples, steps = (50, 40) if quick else (700, 400)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seed: _explore_in(ROOT, examples, steps, seed), (1, 2)))
    for search in runs:
        assert search.returncode == 0, search.stdout[-3000:]
    moves = sum(int(told.stdout.split()[-1]) for told in runs)
    return Outcome(moves, note="moves of the adversary, all invariants after each")


def mutations(folder: Path, quick: bool) -> Outcome:
    """Every bug, alone, in a copy of its own; without one the copy must pass."""
    bugs = {name: bug for number, (name, bug) in enumerate(BUGS.items()) if not quick or number % 10 == 0}
    control = _copy(folder / "control")
    assert _explore_in(control, 100, 40, 0).returncode == 0, "the machine finds a fault in the ledger as it is"
    with ThreadPoolExecutor(2) as pool:
        searches = dict(zip(bugs, pool.map(lambda name: _caught(folder, name), bugs), strict=True))
    missed = sorted(name for name, search in searches.items() if not search and name not in SUBTLE)
    assert not missed, f"not caught: {'; '.join(missed)}"
    late = sum(search != "at once" for search in searches.values() if search)
    caught_count = sum(bool(search) for search in searches.values())
    note = f"bugs planted, {caught_count} caught, {late} of them only by a longer search"
    return Outcome(
        len(bugs), note=note, details={name: search or "not by the machine" for name, search in searches.items()}
    )


def _caught(folder: Path, name: str) -> str:
    """By which search the machine catches the bug; "" when by none."""
    copy = _copy(folder / name.replace(" ", "-"))
    path = copy / PLACES[BUGS[name].module][0]
    path.write_text(plant(path.read_text("utf-8"), BUGS[name]), "utf-8")
    for label, examples, steps in (("at once", 100, 40), ("in a longer search", 400, 120)):
        search = _explore_in(copy, examples, steps, 0)
        if search.returncode:
            assert "state = Stream()" in search.stdout or "it hangs" in search.stdout, search.stdout[-2000:]
            return label
    return ""


def _copy(folder: Path) -> Path:
    """What the machine needs of the tree."""
    leave = shutil.ignore_patterns("__pycache__", "demo_lm")
    for package in ("producer", "trainer", "tests/drills"):
        shutil.copytree(ROOT / package, folder / package, ignore=leave)
    shutil.copy(ROOT / "tests/test_ledger_machine.py", folder / "tests")
    return folder


def _explore_in(tree: Path, examples: int, steps: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.drills.ledger", *map(str, (examples, steps, seed))]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    try:
        return subprocess.run(
            command,
            cwd=tree,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1800,
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 1, f"{error.stdout!r}: it hangs")


def explore(examples: int, steps: int, number: int) -> int:
    """Lets the adversary make examples × steps moves at most; how many it made. Raises what the machine raises."""
    from hypothesis import HealthCheck, Phase, seed, settings
    from hypothesis.stateful import run_state_machine_as_test

    import trainer.stream.ledger.ledger as module
    from tests.test_ledger_machine import Stream

    assert Path(module.__file__).is_relative_to(Path.cwd()), "another tree than this one is explored"
    moves = counting(Stream)
    run_state_machine_as_test(
        seed(number)(Stream),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            phases=(Phase.generate,),
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return next(moves)


def counting(machine: type) -> Iterator[int]:
    """Counts the looks at the invariants of `machine`, of which there is one after each move."""
    moves, check_report = 0, machine.check_report  # type: ignore[attr-defined]

    def check_and_count(self: object) -> None:
        nonlocal moves
        moves += 1
        check_report(self)

    machine.check_report = check_and_count  # type: ignore[attr-defined]
    return iter(lambda: moves, -1)


if __name__ == "__main__":
    print(explore(*(int(word) for word in sys.argv[1:4])))
