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

    It is meant for the working directory of this process or, where it is to work `anywhere`, for any.
    """
    return shlex.join([_python(anywhere), "-m", package, *arguments])


def _python(anywhere: bool) -> str:
    """The shortest path to this Python: the name alone where the shell's PATH leads to it."""
    executable = Path(sys.executable or "python")
    if anywhere:
        return str(executable)
    for name in ("python", "python3"):
        if (found := shutil.which(name)) is not None and os.path.abspath(found) == str(executable):
            return name
    here = Path.cwd()
    return str(executable.relative_to(here) if executable.is_relative_to(here) else executable)
