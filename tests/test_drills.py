"""The drills themselves: a few run here at their smallest, and the planted bugs still fit the code."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

from tests.drills import ledger, mutants, processes, strangers
from tests.drills.__main__ import DRILLS, Drill
from tests.drills.places import PLACES
from tests.drills.planting import Bug, PatternError, find, plant
from tests.drills.scene import ROOT


@pytest.mark.long
@pytest.mark.parametrize("drill", [processes.killed_in_checkpoint, strangers.broken_shards])
def test_a_drill_at_its_smallest(drill: Drill, tmp_path: Path) -> None:
    """It raises when its promise is broken, and checks every trained token by name."""
    outcome = drill(tmp_path, True)

    assert outcome.rounds and outcome.rows
    assert not outcome.lost and not outcome.repeated


@pytest.mark.parametrize("drill", [ledger, mutants], ids=lambda drill: drill.__name__)
def test_each_bug_has_its_place(drill: ModuleType) -> None:
    """Exactly one in the code as it is; `make drills` shows that it is caught there."""
    trees = {module: ast.parse((ROOT / path).read_text("utf-8")) for module, (path, *_) in PLACES.items()}
    faults = []
    for name, bug in drill.BUGS.items():
        try:
            find(trees[bug.module], bug)
        except PatternError as error:
            faults.append(f"{name}: {error}")
    assert not faults, "\n".join(faults)


SOURCE = """
def outer(a, b):
    # a comment
    if a < b:
        return limit(a,
                     b)
    return limit(a, b, a)
"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("a < b", "a <= b", "if a <= b:"),
        ("limit(ANY, ANY2)", "limit(ANY2, ANY)", "return limit(b, a)"),
        ("limit(ANY, ANY2, ANY)", "limit(ANY)", "return limit(a)"),
        ("if ANY:\n    return limit(a, b)", "pass", "pass"),
    ],
)
def test_a_bug_finds_its_place_by_what_the_code_does(old: str, new: str, line: str) -> None:
    """However it is laid out; and a wildcard is the same expression wherever it stands."""
    changed_source = plant(SOURCE, Bug("m", "outer", old, new))
    assert line in [one.strip() for one in changed_source.splitlines()]


@pytest.mark.parametrize(
    ("function", "old"), [("inner", "a < b"), ("outer", "b < a"), ("outer", "limit"), ("outer", "a")]
)
def test_a_bug_without_its_place_is_told(function: str, old: str) -> None:
    """No such function, no such pattern, or several places: a person has to write it anew."""
    with pytest.raises(PatternError, match="anew"):
        plant(SOURCE, Bug("m", function, old, "False"))


def test_every_drill_says_what_it_does() -> None:
    """Its first line is what a person reads when it fails."""
    assert all((drill.__doc__ or "").strip() for drill in DRILLS.values())
