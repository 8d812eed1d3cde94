"""CONTRACT: our commands as a person can type them into the shell that shows them. Light.

Messages, help texts and pages show commands of ours; each is made here. `python` alone is another Python, or none,
where the virtual environment of this one is not active.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path


def shell_command(package: str, *arguments: str, anywhere: bool = False) -> str:
    """`python -m PACKAGE ARGUMENTS …`, with the Python that runs this process, quoted for a shell.

    Where this process was started by an installed script such as sluice-trainer, it is `sluice-PACKAGE ARGUMENTS …`.
    It is meant for the working directory of this process or, where it is to work `anywhere`, for any.
    """
    script = Path(sys.argv[0]).absolute().with_name(f"sluice-{package}")
    if Path(sys.argv[0]).name.startswith("sluice-") and script.is_file():
        return shlex.join([_shortest(script, (script.name,), anywhere), *arguments])
    python = Path(sys.executable or "python")
    return shlex.join([_shortest(python, ("python", "python3"), anywhere), "-m", package, *arguments])


def _shortest(program: Path, names: tuple[str, ...], anywhere: bool) -> str:
    """The shortest way to call `program`: one of `names` alone where the shell's PATH leads to it."""
    if anywhere:
        return str(program)
    for name in names:
        if (path := shutil.which(name)) is not None and os.path.abspath(path) == str(program):
            return name
    here = Path.cwd()
    return str(program.relative_to(here) if program.is_relative_to(here) else program)
