"""The ledger under its Hypothesis machine: at length, and with bugs planted on purpose that the machine must catch.

    python -m tests.drills.ledger EXAMPLES STEPS SEED     # explores; prints how many moves were made

The bugs are one-line changes in trainer/ledger.py, planted into a copy. One whose line is no longer there fails the
drill: it has to be written anew for the ledger as it is now.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.drills.scene import ROOT, Outcome

BUGS: dict[str, tuple[str, str]] = {
    "an old attempt is not fenced": (
        "(shard.shard, shard.epoch, shard.attempt) == (message.shard, message.epoch, message.attempt)",
        "(shard.shard, shard.epoch) == (message.shard, message.epoch)",
    ),
    "an attempt is used twice": ("shard.attempt += 1", "shard.attempt += 0"),
    "attempts begin anew after a restart": ('"shard", "attempt", "rows"', '"shard", "rows"'),
    "fenced rows are not counted": ('self.rejected["fenced"] += chunk.rows', "pass"),
    "refused rows are not counted": ("self.rejected[code] += rows", "pass"),
    "a row that is had is taken again": ("if (had & (kept | outliers)).any() or ", "if "),
    "rows had are not marked": ("had |= kept | outliers", "had |= outliers"),
    "outliers had are not marked": ("had |= kept | outliers", "had |= kept"),
    "outliers are not marked as discarded": ("shard.discarded[start : start + count] |= outliers", "pass"),
    "discarded rows are miscounted": ("self.rows_discarded += discarded", "self.rows_discarded += chunk.rows"),
    "a received row is counted twice": ("self.rows_received += chunk.rows", "self.rows_received += 2 * chunk.rows"),
    "a trained row is counted twice": ("self.rows_trained += len(serial)", "self.rows_trained += len(serial) + 1"),
    "trained rows are not marked": ("shard.trained[named] = True", "pass"),
    "a lease loses its mask": ('pack_bits(shard.had) if shard.had.any() else b""', 'b""'),
    "the mask names trained rows only": (
        'pack_bits(shard.had) if shard.had.any() else b""',
        'pack_bits(shard.trained) if shard.had.any() else b""',
    ),
    "a chunk of an earlier start is taken": ("if chunk.incarnation != self.incarnation:", "if False:"),
    "a gap in chunk numbers passes": (
        "if chunk.number != session.received + 1:",
        "if chunk.number <= session.received:",
    ),
    "a repeated chunk number passes": (
        "if chunk.number != session.received + 1:",
        "if chunk.number > session.received + 1:",
    ),
    "a chunk beyond credit is taken": ("if chunk.number > session.granted:", "if False:"),
    "credit exceeds the buffer by a chunk": ("free = ahead = self._free_rows", "free = ahead = self._free_rows + 4"),
    "credit is given twice": ("session.granted += 1", "session.granted += 2"),
    "credit under way is not reckoned": (
        "self.limits.capacity_rows - self.rows_buffered - self.rows_credited",
        "self.limits.capacity_rows - self.rows_buffered",
    ),
    "buffered rows are not reckoned": (
        "self.limits.capacity_rows - self.rows_buffered - self.rows_credited",
        "self.limits.capacity_rows - self.rows_credited",
    ),
    "credit is told as a difference": (
        "Credit(number=session.granted)",
        "Credit(number=session.granted - session.received)",
    ),
    "credit that idle producers hold never comes back": (
        "idle = [name for name, session in self.sessions.items() if session.credit_rows and not session.leases]",
        "idle: list[str] = []",
    ),
    "a lease does not return": ("session.leases.remove(shard)\n        shard.holder = None", "pass"),
    "a dead session is never dropped": (
        "if now - session.last_heard > self.limits.dead_seconds:",
        "if False:",
    ),
    "a stalled session is never dropped": (
        "and now - session.last_progress > self.limits.stall_seconds",
        "and False",
    ),
    "a producer's older session lives on": (
        "if known.hello.producer == hello.producer or session == hello.session:",
        "if session == hello.session:",
    ),
    "another corpus is let in": ("if self.stream.fingerprint != hello.fingerprint:", "if False:"),
    "a short shard counts as whole": ("if had != end.rows:", "if had > end.rows:"),
    "a whole shard is leased again": (
        "shard.rows, shard.complete, shard.deaths = end.rows, True, 0",
        "shard.rows, shard.complete, shard.deaths = end.rows, False, 0",
    ),
    "a shard closes before its last row": (
        "_count(self.trained) + _count(self.discarded) == self.rows",
        "_count(self.trained) + _count(self.discarded) + 1 >= (self.rows or 0)",
    ),
    "a finished shard stays open": ("del self.open[shard.serial]", "pass"),
    "a deadly shard is tried for ever": ("shard.deaths += 1", "pass"),
    "rows set aside are not counted": ("self.rows_set_aside += missing or 0", "pass"),
    "rows buffered of a shard given up vanish in a restart": ("if shard.given_up:", "if False:"),
    "the end of the data comes while shards are open": (
        "and all(shard.complete for shard in self.open.values())",
        "",
    ),
    "the end of the data comes an epoch early": ("and not self._epochs_left()", ""),
    "held-out shards are trained on": (
        "np.delete(np.arange(self.stream.shards), held_out_shards(self.stream.shards, self.stream.held_out))",
        "np.arange(self.stream.shards)",
    ),
    "each epoch skips its first shard": (
        "self._queue, self._cursor = self._permutation(self.epoch), 0",
        "self._queue, self._cursor = self._permutation(self.epoch), 1",
    ),
    "a checkpoint takes buffered rows for trained": (
        'np.packbits(getattr(shard, name), bitorder="little")',
        'np.packbits(shard.had if name == "trained" else shard.discarded, bitorder="little")',
    ),
    "a checkpoint forgets how far the epoch was": ('"cursor": self._cursor,', '"cursor": 0,'),
    "a checkpoint forgets which serials are taken": ('"next_serial": self._next_serial,', '"next_serial": 0,'),
    "a restart forgets outliers": ("shard.had = shard.trained | shard.discarded", "shard.had = shard.trained.copy()"),
    "a restart counts no trained row as received": (
        "self.rows_received = self.rows_trained",
        "self.rows_received = 0",
    ),
    "a trainer that leaves goes on leasing": (
        "if self._drained is None and not self.winding_down:",
        "if not self.winding_down:",
    ),
    "a trainer that winds down goes on leasing": (
        "if self._drained is None and not self.winding_down:",
        "if self._drained is None:",
    ),
    "a trainer that winds down never comes to its end": (
        "return self.exhausted or (self.winding_down and not under_way)",
        "return self.exhausted",
    ),
    "a trainer that winds down does not wait for what is under way": (
        "return self.exhausted or (self.winding_down and not under_way)",
        "return self.exhausted or self.winding_down",
    ),
}
SUBTLE = {"a trainer that winds down does not wait for what is under way"}
"""Nothing is lost or trained twice by it, only done later: an example in tests/test_ledger.py is there to catch it."""


def long_machine(folder: Path, quick: bool) -> Outcome:
    """The unchanged ledger under its machine, from two random beginnings at once."""
    examples, steps = (50, 40) if quick else (700, 400)
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda seed: _explore_in(ROOT, examples, steps, seed), (1, 2)))
    for told in runs:
        assert told.returncode == 0, told.stdout[-3000:]
    moves = sum(int(told.stdout.split()[-1]) for told in runs)
    return Outcome(moves, note="moves of the adversary, all invariants after each")


def mutations(folder: Path, quick: bool) -> Outcome:
    """Every bug, alone, in a copy of its own; without one the copy must pass."""
    chosen = {name: bug for number, (name, bug) in enumerate(BUGS.items()) if not quick or number % 10 == 0}
    control = _copy(folder / "control")
    assert _explore_in(control, 100, 40, 0).returncode == 0, "the machine finds a fault in the ledger as it is"
    with ThreadPoolExecutor(2) as pool:
        caught = dict(zip(chosen, pool.map(lambda name: _caught(folder, name), chosen), strict=True))
    missed = sorted(name for name, moves in caught.items() if not moves and name not in SUBTLE)
    assert not missed, f"not caught: {'; '.join(missed)}"
    late = sum(moves != "at once" for moves in caught.values() if moves)
    found = sum(bool(moves) for moves in caught.values())
    note = f"bugs planted, {found} caught, {late} of them only by a longer search"
    return Outcome(
        len(chosen), note=note, details={name: moves or "not by the machine" for name, moves in caught.items()}
    )


def _caught(folder: Path, name: str) -> str:
    """By which search the machine catches the bug; "" when by none."""
    copy = _copy(folder / name.replace(" ", "-"))
    path, (old, new) = copy / "trainer" / "ledger.py", BUGS[name]
    text = path.read_text()
    assert text.count(old) == 1, f"{name!r}: the ledger has {text.count(old)} lines with {old!r}; write the bug anew"
    path.write_text(text.replace(old, new))
    for told, examples, steps in (("at once", 100, 40), ("in a longer search", 400, 120)):
        search = _explore_in(copy, examples, steps, 0)
        if search.returncode:
            assert "state = Stream()" in search.stdout or "it hangs" in search.stdout, search.stdout[-2000:]
            return told
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

    import trainer.ledger
    from tests.test_ledger_machine import Stream

    assert Path(trainer.ledger.__file__).is_relative_to(Path.cwd()), "another tree than this one is explored"
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
    made, look = 0, machine.report_agrees  # type: ignore[attr-defined]

    def counted(self: object) -> None:
        nonlocal made
        made += 1
        look(self)

    machine.report_agrees = counted  # type: ignore[attr-defined]
    return iter(lambda: made, -1)


if __name__ == "__main__":
    print(explore(*(int(word) for word in sys.argv[1:4])))
