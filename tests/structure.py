"""Figures of the code's structure, for comparing one commit with another.

    python -m tests.structure [COMMIT …]     # each commit, and the working tree beside it, as a Markdown table

Counts are of producer/, trainer/ and monitor/; bare participles are counted in tests/ too. A bare participle is a
variable such as `found`: the name says that something was found, and not what. A duplicate is a function whose body,
of DUPLICATE_LINES or more, is that of another one; a class name used twice is one that a reader has to tell apart by
its module.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from trainer.saes import registry

ROOT = Path(__file__).parent.parent
PACKAGES = ("producer", "trainer", "monitor")
"""In the order of the data; imports run against it."""
PARTICIPLES = frozenset(
    {
        *("asked", "chosen", "done", "found", "given", "gone", "kept", "known", "left", "listed", "made", "measured"),
        *("moved", "named", "read_back", "said", "seen", "shown", "taken", "taught", "told", "wanted", "written"),
    }
)
OVER = frozenset(
    {
        *("complete", "drained", "dry", "ended", "exhausted", "finished", "leaving", "winding_down"),
        *("is_complete", "is_finished", "is_over", "_is_over"),
    }
)
"""Names of functions that ask whether something is over."""
LONG_FILE, LONG_CLASS, DUPLICATE_LINES = 400, 250, 4

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass
class Figures:
    """What was counted in one tree."""

    modules: Counter[str] = field(default_factory=Counter)
    """By folder."""
    long_files: list[str] = field(default_factory=list)
    long_classes: list[str] = field(default_factory=list)
    functions: list[int] = field(default_factory=list)
    """Lines of each."""
    upward_imports: list[str] = field(default_factory=list)
    architecture_lists: list[str] = field(default_factory=list)
    over_predicates: list[str] = field(default_factory=list)
    untyped_dicts: int = 0
    local_imports: int = 0
    participles: Counter[str] = field(default_factory=Counter)
    test_participles: Counter[str] = field(default_factory=Counter)
    bodies: dict[str, list[str]] = field(default_factory=dict)
    """Places of functions by what they do."""
    classes: Counter[str] = field(default_factory=Counter)

    def rows(self) -> dict[str, str]:
        """The figures in words, by their names."""
        lines = self.functions or [0]
        return {
            "modules": f"{self.modules.total()} in {len(self.modules)} folders; most: {_most(self.modules, 3)}",
            f"files over {LONG_FILE} lines": _listed(self.long_files),
            f"classes over {LONG_CLASS} lines": _listed(self.long_classes),
            "lines of a function": f"median {statistics.median(lines):g}, longest {max(lines)}",
            "upward imports": _listed(self.upward_imports),
            "files that list architectures": _listed(self.architecture_lists),
            "predicates of “over”": _listed(self.over_predicates),
            "`dict[str, Any]`": str(self.untyped_dicts),
            "function-level imports": str(self.local_imports),
            "bare participles": f"{self.participles.total()}; most: {_most(self.participles, 5)}",
            "bare participles in tests": f"{self.test_participles.total()}; most: {_most(self.test_participles, 5)}",
            "duplicate functions": _listed([" = ".join(places) for places in self.bodies.values() if len(places) > 1]),
            "class names used twice": _listed([name for name, count in self.classes.items() if count > 1]),
        }


def measure(files: Mapping[str, str]) -> Figures:
    """Counts in source files, given by path; those of tests are searched for participles alone."""
    figures = Figures()
    for path, text in sorted(files.items()):
        tree = ast.parse(text)
        if path.startswith("tests/"):
            figures.test_participles.update(_participles(tree))
            continue
        figures.participles.update(_participles(tree))
        figures.modules[str(PurePosixPath(path).parent)] += not path.endswith("__init__.py")
        if (lines := len(text.splitlines())) > LONG_FILE:
            figures.long_files.append(f"{path} {lines}")
        if 2 * sum(f'"{name}"' in text for name in registry.names()) > len(registry.names()):
            figures.architecture_lists.append(path)
        figures.untyped_dicts += text.count("dict[str, Any]")
        figures.upward_imports += [f"{path} → {module}" for module in _upward_imports(path, tree)]
        figures.local_imports += len(set(_local_imports(tree)))
        for node in ast.walk(tree):
            _measure_node(figures, PurePosixPath(path).stem, node)
    return figures


def _measure_node(figures: Figures, module: str, node: ast.AST) -> None:
    if isinstance(node, ast.ClassDef):
        figures.classes[node.name] += 1
        if _lines(node) > LONG_CLASS:
            figures.long_classes.append(f"{node.name} {_lines(node)}")
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        figures.functions.append(_lines(node))
        if node.name in OVER:
            figures.over_predicates.append(f"{module}.{node.name}")
        body = "\n".join(map(ast.unparse, node.body[ast.get_docstring(node) is not None :]))
        if body.count("\n") + 1 >= DUPLICATE_LINES:
            figures.bodies.setdefault(body, []).append(f"{module}.{node.name}")


def _participles(tree: ast.Module) -> Iterator[str]:
    """Names of variables that are bare participles, once for each assignment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in PARTICIPLES:
            yield node.id


def _lines(node: Definition) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _upward_imports(path: str, tree: ast.Module) -> Iterator[str]:
    """Modules of a later stage that a file imports."""
    later = PACKAGES[PACKAGES.index(path.split("/")[0]) + 1 :]
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        yield from (name for name in names if name.split(".")[0] in later)


def _local_imports(tree: ast.Module) -> Iterator[ast.AST]:
    """Import statements inside functions; those of nested functions come more than once."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from (node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom))


def _listed(entries: Sequence[str]) -> str:
    return f"{len(entries)}: {', '.join(entries)}" if entries else "0"


def _most(counts: Counter[str], number: int) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.most_common(number))


def files_of(commit: str | None) -> dict[str, str]:
    """The Python files of the packages and tests in a commit, or in the working tree, by path."""
    if commit is None:
        paths = [path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py")]
        return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}
    names = _git("ls-tree", "-r", "--name-only", commit, *PACKAGES, "tests").splitlines()
    return {name: _git("show", f"{commit}:{name}") for name in names if name.endswith(".py")}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.structure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", metavar="COMMIT", nargs="*")
    trees = {name or "working tree": measure(files_of(name)).rows() for name in [*parser.parse_args().commits, None]}
    print("| | " + " | ".join(trees) + " |\n|---|" + "---|" * len(trees))
    for figure in trees["working tree"]:
        print(f"| {figure} | " + " | ".join(rows[figure] for rows in trees.values()) + " |")


if __name__ == "__main__":
    main()
