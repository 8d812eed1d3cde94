"""CONTRACT: the parser of a command such as `python -m trainer check`, with examples at the end of its help; numbers
among its arguments. Light.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from producer.common.shell import shell_command
from producer.common.toml import show_value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wraps a text of one line to the terminal; a text of several lines keeps them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def positive_number(text: str) -> float:
    """An argument that is a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{show_value(text)}: expected a number above 0")
    return value


def positive_count(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not (text.isdecimal() and text.isascii() and int(text)):
        raise argparse.ArgumentTypeError(f"{show_value(text)}: expected a whole number above 0")
    return int(text)


def command_parser(
    package: str, command: str, description: str, examples: Sequence[str] = (), epilog: str = ""
) -> argparse.ArgumentParser:
    """The parser of `python -m PACKAGE COMMAND`, named as the shell at hand takes it.

    `examples` are arguments that a user might type; `epilog` comes before them.
    """
    program = shell_command(package, command)
    lines = [epilog, ""] if epilog and examples else [epilog] if epilog else []
    if examples:
        lines += ["examples:" if len(examples) > 1 else "example:"]
        lines += [f"  {program} {arguments}".rstrip() for arguments in examples]
    return argparse.ArgumentParser(
        program, description=description, formatter_class=_HelpFormatter, epilog="\n".join(lines) or None
    )
