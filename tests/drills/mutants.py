"""Bugs of one line in everything but the ledger, each of which the tests of its module must notice.

Every bug is planted alone into a copy of the tree, and the tests that `PLACES` names for its module are run there.
Those of the ledger are in ledger.py, where a machine hunts them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from tests.drills.places import PLACES
from tests.drills.planting import Bug, plant, read_bugs
from tests.drills.scene import ROOT, Outcome

CAUGHT_AT_LEAST = 0.95
WORKERS = 2
RUN_SECONDS = 600
"""Tests of a module that take longer in all hang: that is noticed too. Each has the time that is usual."""
ATTEMPTS = 3
LEFT_OUT = ("test_the_weights_depend_neither_on_producers_nor_on_deaths", "test_orders_survive_a_kill_and_a_drain")
"""Tests of many processes, too slow to be run for each bug."""

FAILED = re.compile(r"(FAILED|ERROR) tests/")

BUGS = read_bugs(Path(__file__).parent / "mutants.toml")


def mutations(folder: Path, quick: bool) -> Outcome:
    """Every bug, alone, in a copy of the tree; without one all tests that are run must pass."""
    bugs = {name: bug for number, (name, bug) in enumerate(BUGS.items()) if not quick or number % 60 == 0}
    modules = dict.fromkeys(bug.module for bug in bugs.values())
    trees: SimpleQueue[Tree] = SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(WORKERS) as pool:
        for number in range(WORKERS):
            trees.put(stack.enter_context(Tree.copied(folder / str(number))))

        def run(module: str, bug: Bug | None = None) -> str:
            tree = trees.get()
            try:
                return tree.failure(module, bug)
            finally:
                trees.put(tree)

        for module, failure in zip(modules, pool.map(run, modules), strict=True):
            assert not failure, f"the tests of {module} fail without any bug: {failure}"
        # Those last whose change has everything compiled anew.
        order = sorted(bugs, key=lambda name: bugs[name].module == "trainer.kernels.cpu")
        failures = dict(zip(order, pool.map(lambda name: run(bugs[name].module, bugs[name]), order), strict=True))
    missed = [name for name in bugs if not failures[name]]
    share = 1 - len(missed) / len(bugs)
    assert share >= CAUGHT_AT_LEAST, f"{len(missed)} of {len(bugs)} bugs not caught: {'; '.join(missed)}"
    details = {name: failures[name] or "**not caught**" for name in bugs}
    note = f"bugs planted in {len(modules)} modules, {len(bugs) - len(missed)} caught"
    return Outcome(len(bugs), note=note, details=details)


@dataclass
class Tree:
    """A copy of the project, and a process that runs tests in it."""

    folder: Path
    server: subprocess.Popen[str]

    @classmethod
    @contextmanager
    def copied(cls, folder: Path) -> Iterator[Tree]:
        left_out = shutil.ignore_patterns(".git", ".venv*", ".*_cache", ".hypothesis", "*.pyc", "runs")
        shutil.copytree(ROOT, folder / "tree", ignore=left_out)
        command = [sys.executable, "-P", str(ROOT / "tests/drills/forked_pytest.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        ) as server:
            yield cls(folder, server)
            assert server.stdin is not None
            server.stdin.close()

    def failure(self, module: str, bug: Bug | None) -> str:
        """A test of the module's that fails with the bug in it, and fails again; or what else happens; "" if nothing.

        One that fails once and passes then has noticed the machine's load, and not the bug.
        """
        name, *tests = PLACES[module]
        path = self.folder / "tree" / name
        text, status = path.read_text("utf-8"), path.stat()
        try:
            if bug is not None:
                path.write_text(plant(text, bug), "utf-8")
            files = [f"tests/{test}.py" for test in tests]
            for _ in range(ATTEMPTS):
                failed = self._first_failure(files)
                if not failed or failed == self._first_failure([failed] if "::" in failed else files):
                    return failed.removeprefix("tests/")
            return ""
        finally:
            path.write_text(text, "utf-8")
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # what numba has compiled of it still holds

    def _first_failure(self, tests: list[str]) -> str:
        code = self._pytest(tests)
        assert code != "5", f"there are no tests in {tests}"
        if code == "0":
            return ""
        failed_lines = [
            line for line in (self.folder / "log").read_text(errors="replace").splitlines() if FAILED.match(line)
        ]
        return FAILED.sub("tests/", failed_lines[0]).partition(" - ")[0] if failed_lines else f"exit code {code}"

    def _pytest(self, files: list[str]) -> str:
        temporary = self.folder / "t"
        arguments = [
            *files, "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0",
            "-k", " and ".join(f"not {test}" for test in LEFT_OUT),
            "-m", "not gpu and not peers and not proof and not watch", f"--basetemp={temporary}",
        ]  # fmt: skip
        request = {
            "tree": str(self.folder / "tree"), "arguments": arguments, "log": str(self.folder / "log"),
            "seconds": RUN_SECONDS,
        }  # fmt: skip
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline().strip()
        assert answer, "the process that runs tests has ended"
        shutil.rmtree(temporary, ignore_errors=True)
        return answer
