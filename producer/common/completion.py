"""CONTRACT: shell completion, by argcomplete, which is imported only when a shell asks. Light.

    eval "$(register-python-argcomplete sluice-trainer)"      # bash; --shell zsh, fish or tcsh for the others

Each command hands its parser to `complete` before it parses. A shell that asks has set `_ARGCOMPLETE`: what may follow
is written to it, and the process ends.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import BaseModel


def command_arguments() -> list[str]:
    """The words behind the program: of this process, or, where a shell asks what may follow, those typed so far."""
    if "_ARGCOMPLETE" not in os.environ:
        return sys.argv[1:]
    from argcomplete.lexers import split_line

    words = split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    return list(words[int(os.environ["_ARGCOMPLETE"]) :])


def complete(parser: argparse.ArgumentParser, arguments: list[str] | None) -> None:
    """Answers a shell that asks what may follow `arguments`, and ends the process; without one, does nothing."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    import argcomplete

    # The names of commands before `arguments`, such as `ctl`, belong to the program and not to this parser.
    commands = 0 if arguments is None else len(command_arguments()) - len(arguments)
    os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + commands)
    argcomplete.autocomplete(parser)


def complete_run_file(action: argparse.Action, commands: Collection[str]) -> None:
    """Makes a run file's place take .toml files, and the names of `commands` that may stand there instead."""

    def candidates(prefix: str, **_: object) -> Iterable[str]:
        from argcomplete.completers import FilesCompleter

        return [*commands, *FilesCompleter(["toml"])(prefix)]

    action.completer = candidates  # type: ignore[attr-defined]


def complete_settings(action: argparse.Action, kind: type[BaseModel]) -> None:
    """Makes an override's place take the keys of `kind`, such as `run.tokens=`."""

    def candidates(prefix: str, **_: object) -> Iterable[str]:
        return [f"{key}=" for key in setting_keys(kind)]

    action.completer = candidates  # type: ignore[attr-defined]


def setting_keys(kind: type[BaseModel]) -> Iterable[str]:
    """`table.key` of every setting of a run file, the tables of SAEs left out: their names are the file's."""
    for table, field in kind.model_fields.items():
        for model in (field.annotation, *getattr(field.annotation, "__args__", ())):  # `ModelSettings | None` has two
            if isinstance(model, type) and hasattr(model, "model_fields") and table != "sae":
                yield from (f"{table}.{key}" for key in model.model_fields)
