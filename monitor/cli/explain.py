"""`python -m monitor explain`: what another language model says that latents stand for, with scores."""

from __future__ import annotations

import os

from monitor.cli.arguments import add_monitor_arguments
from producer.common.command_parser import command_parser
from producer.common.completion import complete

KEY = "OPENAI_API_KEY"


def main(arguments: list[str]) -> int:
    """Returns 0 when all latents are explained, 1 when a server refused or a latent could not be, 2 for wrong usage."""
    parser = command_parser(
        "monitor",
        "explain",
        "Ask a language model, on a server that you name, what latents stand for, and score its answers by "
        f"detection and fuzzing. Texts of the run are sent there. Its key, if it asks for one, is read from {KEY}.",
        ("http://127.0.0.1:8710 --sae topk --latents 5,17 --endpoint http://127.0.0.1:8000/v1 --model NAME",),
    )
    add_monitor_arguments(parser)
    parser.add_argument("--sae", required=True, metavar="NAME", help="the SAE")
    parser.add_argument("--latents", required=True, metavar="N,N,…", help="the latents, by number")
    parser.add_argument("--endpoint", required=True, metavar="URL", help="an OpenAI-compatible server, up to /v1")
    parser.add_argument("--model", required=True, metavar="NAME", help="the model that explains")
    parser.add_argument("--scorer", metavar="NAME", help="the model that scores (default: the same)")
    parser.add_argument(
        "--save", action="store_true", help="keep each explanation as the latent's note (needs the monitor's token)"
    )
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    parts = options.latents.split(",")
    if not all(part.strip().isdecimal() and len(part.strip()) < 10 for part in parts):
        parser.error(f"--latents {options.latents}: expected numbers with commas between them, such as 5,17")
    from monitor.cli.explain_latents import run  # imports the HTTP client and numpy, which `--help` does not wait for

    return run(options, [int(part) for part in parts], os.environ.get(KEY))
