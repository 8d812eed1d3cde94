"""The script that counts figures of structure, on sources that one can count by hand."""

from __future__ import annotations

from tests.structure import measure
from trainer.saes import registry

LONG = "def same(x):\n    y = x + 1\n    z = y * 2\n    w = z - 3\n    return w\n"


def test_what_is_counted() -> None:
    """One of each figure, a nested local import once."""
    names = ", ".join(f'"{name}"' for name in registry.names())
    figures = measure(
        {
            "producer/__init__.py": "",
            "producer/a.py": "import monitor.metrics\nclass Work: ...\ndef f():\n    def g():\n        import json\n",
            "trainer/b.py": f"NAMES = [{names}]\nfound: dict[str, Any] = {{}}\nclass Work:\n    def dry(self): ...\n",
            "trainer/saes/c.py": LONG + LONG.replace("same", "other"),
        }
    )

    assert figures.modules == {"producer": 1, "trainer": 1, "trainer/saes": 1}
    assert figures.upward_imports == ["producer/a.py → monitor.metrics"]
    assert figures.architecture_lists == ["trainer/b.py"]
    assert figures.over_predicates == ["b.dry"]
    assert (figures.untyped_dicts, figures.local_imports, figures.participles) == (1, 1, {"found": 1})
    assert figures.rows()["duplicate functions"] == "1: c.same = c.other"
    assert figures.rows()["class names used twice"] == "1: Work"
    assert sorted(figures.functions) == [1, 2, 3, 5, 5]


def test_tests_are_searched_for_participles_alone() -> None:
    """A test's class name and length are not those of the code."""
    figures = measure({"tests/test_a.py": "class Work: ...\ntold = found = 1\n", "trainer/a.py": "class Work: ...\n"})

    assert figures.test_participles == {"told": 1, "found": 1}
    assert not figures.participles and figures.classes == {"Work": 1} and figures.modules == {"trainer": 1}


def test_long_files_and_classes_are_named() -> None:
    """With their lines."""
    figures = measure({"trainer/long.py": "class Long:\n" + "    x = 1\n" * 400})

    assert figures.long_files == ["trainer/long.py 401"]
    assert figures.long_classes == ["Long 401"]
