"""Bugs of one line, planted by syntax tree: they find their place though lines have moved, or are laid out otherwise.

A bug names a function, a pattern of Python in it, and what stands there instead. In a pattern the names ANY, ANY2, …
stand for any expression, the same name for the same one:

    ["producer.wire"."held_out_shards"]
    "held-out shards are rounded down" = ["round(ANY)", "int(ANY)"]

A third element says which of several places is meant, counted from 0. A pattern is an expression, or statements one
after the other. One that fits nowhere, or at more places than expected, raises PatternError: the code has changed, and
the bug has to be written anew for the code as it is now.
"""

from __future__ import annotations

import ast
import copy
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WILDCARD = re.compile(r"ANY\d*")
IGNORED = {"ctx", "type_comment", "kind"}
"""Fields of a syntax tree that say nothing about what the code does."""

Bindings = dict[str, ast.expr]


class PatternError(Exception):
    """The code has changed, and a bug has no place in it any more. The message says which and why."""


@dataclass(frozen=True)
class Bug:
    """One change of the code, and its place."""

    module: str
    """Dotted, such as trainer.state.durable."""
    function: str
    """Qualified, such as Ledger.tick; empty for anything in the module."""
    old: str
    new: str
    nth: int | None = None
    """Which of several places, from 0; None when there is exactly one."""


@dataclass(frozen=True)
class _Match:
    """A match of a pattern: node `index` of a list of statements, or a field, of `parent`."""

    parent: ast.AST
    field: str
    index: int | None
    bindings: Bindings


def read_bugs(path: Path) -> dict[str, Bug]:
    """The bugs in a TOML file, by what they do: `["module"."function"]`, then `"what it does" = [old, new]`."""
    return {
        name: Bug(module, function, *change)
        for module, functions in tomllib.loads(path.read_text("utf-8")).items()
        for function, bugs in functions.items()
        for name, change in bugs.items()
    }


def plant(source: str, bug: Bug) -> str:
    """The source of a module with the bug in it. Raises PatternError."""
    tree = ast.parse(source)
    place = find(tree, bug)
    old, new = _patterns(bug)
    new = [_substitute(one, place.bindings) for one in new]
    if place.index is None:
        setattr(place.parent, place.field, new[0])
    else:
        getattr(place.parent, place.field)[place.index : place.index + len(old)] = new
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def find(tree: ast.Module, bug: Bug) -> _Match:
    """The one place of the bug. Raises PatternError."""
    scope = _function(tree, bug.function)
    if scope is None:
        raise PatternError(f"{bug.module} has no {bug.function}: write the bug {bug.old!r} anew")
    old, _ = _patterns(bug)
    places = list(_places(scope, old))
    if (bug.nth is None and len(places) != 1) or (bug.nth is not None and len(places) <= bug.nth):
        raise PatternError(
            f"{bug.module}, {bug.function}: {bug.old!r} fits at {len(places)} places: write the bug anew"
        )
    return places[bug.nth or 0]


def _patterns(bug: Bug) -> tuple[list[ast.AST], list[ast.AST]]:
    """Of `old` and `new`: one expression each, or statements."""
    try:
        return [ast.parse(bug.old, mode="eval").body], [ast.parse(bug.new, mode="eval").body]
    except SyntaxError:
        return list(ast.parse(bug.old).body), list(ast.parse(bug.new).body)


def _function(scope: ast.AST, name: str) -> ast.AST | None:
    """The function or class of this qualified name below `scope`."""
    if not name:
        return scope
    first, _, rest = name.partition(".")
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            result = _function(child, rest) if child.name == first else None
        else:
            result = _function(child, name)
        if result is not None:
            return result
    return None


def _places(scope: ast.AST, pattern: list[ast.AST]) -> Iterator[_Match]:
    """Yields the matches of the pattern, in the order of the text."""
    is_expression = isinstance(pattern[0], ast.expr)
    for field, value in ast.iter_fields(scope):
        if not isinstance(value, list):
            if isinstance(value, ast.AST):
                if is_expression and _matches(pattern[0], value, bindings := {}):
                    yield _Match(scope, field, None, bindings)
                yield from _places(value, pattern)
            continue
        for index, node in enumerate(value):
            bindings = {}
            if is_expression or isinstance(node, ast.stmt):
                run = value[index : index + len(pattern)]
                if len(run) == len(pattern) and all(map(_matches, pattern, run, [bindings] * len(run))):
                    yield _Match(scope, field, index, bindings)
            if isinstance(node, ast.AST):
                yield from _places(node, pattern)


def _matches(pattern: Any, node: Any, bindings: Bindings) -> bool:
    if isinstance(pattern, ast.Name) and WILDCARD.fullmatch(pattern.id) and isinstance(node, ast.expr):
        return ast.dump(bindings.setdefault(pattern.id, node)) == ast.dump(node)
    if isinstance(pattern, list):
        return (
            isinstance(node, list)
            and len(pattern) == len(node)
            and all(_matches(one, other, bindings) for one, other in zip(pattern, node, strict=True))
        )
    if not isinstance(pattern, ast.AST):
        return type(pattern) is type(node) and pattern == node
    return type(pattern) is type(node) and all(
        _matches(value, getattr(node, field, None), bindings)
        for field, value in ast.iter_fields(pattern)
        if field not in IGNORED
    )


def _substitute(new: ast.AST, bindings: Bindings) -> ast.AST:
    """Replaces the wildcards of `new` by what they stand for."""

    class Fill(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return copy.deepcopy(bindings[node.id]) if node.id in bindings else node

    return Fill().visit(new)
