"""The command line of the three processes: `RUN.toml [section.key=value …]`. CONTRACT. Light."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Collection, Mapping
from types import MappingProxyType

from producer.common.addresses import path_argument
from producer.common.completion import complete, complete_run_file, complete_settings
from producer.common.run_file import S, read_run_file, show_settings
from producer.common.toml import SettingsError
from producer.common.version import VERSION


def parse_command_line(
    program: str,
    purpose: str,
    kind: type[S],
    arguments: list[str] | None = None,
    commands: Collection[str] = (),
    flags: Mapping[str, str] = MappingProxyType({}),
) -> S:
    """Reads the settings that a command line names; ends the process for --help, --print-settings and faults.

    `commands` are what the caller takes in the run file's place; a shell that completes is told of them. `flags` are
    options of the caller's, with their help: it looks for them in `arguments` itself.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=purpose,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # the caller looks for whole flags
    )
    run_file = parser.add_argument(
        "run_file", type=path_argument, metavar="RUN.toml", nargs="?", help="the run's settings; deploy/ holds examples"
    )
    overrides = parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the file"
    )
    parser.add_argument("--print-settings", action="store_true", help="print the resolved settings and exit")
    for flag, meaning in flags.items():
        parser.add_argument(flag, action="store_true", help=meaning)
    parser.add_argument("--version", action="version", version=f"Sluice {VERSION}")
    complete_run_file(run_file, commands)
    complete_settings(overrides, kind)
    complete(parser, arguments)
    options = parser.parse_intermixed_args(arguments)
    if options.run_file is None:
        parser.error("which run file? deploy/ holds examples, such as deploy/demo.toml")
    try:
        settings = read_run_file(kind, options.run_file, options.overrides)
    except SettingsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if options.print_settings:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        print(show_settings(settings))
        raise SystemExit(0)
    return settings
