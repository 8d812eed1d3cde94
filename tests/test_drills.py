"""The drills themselves: a few run here at their smallest, and the planted bugs still fit the ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.drills import ledger, processes, strangers
from tests.drills.__main__ import DRILLS, Drill
from tests.drills.scene import ROOT


@pytest.mark.parametrize("drill", [processes.killed_in_checkpoint, strangers.broken_shards])
def test_a_drill_at_its_smallest(drill: Drill, tmp_path: Path) -> None:
    """It raises when its promise is broken, and checks every trained row by name."""
    told = drill(tmp_path, True)

    assert told.rounds and told.rows
    assert not told.lost and not told.repeated


@pytest.mark.parametrize("bug", ledger.BUGS)
def test_each_bug_can_be_planted(bug: str) -> None:
    """Its line stands in the ledger once; `make drills` shows that the machine catches it."""
    old, new = ledger.BUGS[bug]

    assert old != new
    assert (ROOT / "trainer" / "ledger.py").read_text().count(old) == 1, "the ledger has changed: write the bug anew"


def test_every_drill_says_what_it_does() -> None:
    """Its first line is what a person reads when it fails."""
    assert all((drill.__doc__ or "").strip() for drill in DRILLS.values())
