"""`python -m monitor export`: the numbers of a run, or the latents of its SAEs, for other programs.

python -m monitor export runs/gpt2 --to out                        # run.csv, training.csv, evaluation.csv
python -m monitor export runs/gpt2 --to out --format tensorboard
python -m monitor export runs/gpt2 --to out --format neuronpedia --sae topk
"""

from __future__ import annotations

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete

FORMATS = {
    "csv": "run.csv, training.csv, evaluation.csv",
    "parquet": "the same tables; needs the extra `parquet`",
    "tensorboard": "event files; needs the extra `tensorboard`",
    "wandb": "offline runs of Weights & Biases, for `wandb sync`; needs the extra `wandb`",
}
"""What each format of the run's numbers gives."""
LATENT_FORMATS = {
    "neuronpedia": "all latents, in batches that Neuronpedia's API takes",
    "saedashboard": "all latents, as SAEDashboard draws them and hands them to Neuronpedia",
}
"""What each format of latents gives, for which the language model is loaded."""


def main(arguments: list[str]) -> int:
    """Returns 0 when everything is written, 1 when it could not be, 2 for wrong usage."""
    formats = FORMATS | LATENT_FORMATS
    parser = command_parser(
        "monitor",
        "export",
        "Write the numbers of a run, or the latents of its SAEs, for other programs.",
        ("runs/gpt2 --to gpt2-csv", "runs/gpt2 --format neuronpedia --sae topk --to gpt2-latents"),
        epilog="formats:\n" + "\n".join(f"  {name:<12} {gives}" for name, gives in formats.items()),
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_argument, help="run directory; the trainer may be at work in it"
    )
    parser.add_argument("--to", metavar="DIR", type=path_argument, required=True, help="a new folder, or an empty one")
    parser.add_argument("--format", choices=formats, default="csv", help="see below (default: %(default)s)")
    latents = parser.add_argument_group("latents")
    latents.add_argument("--sae", metavar="NAME", action="append", help="this SAE only; may be repeated")
    latents.add_argument("--model-id", metavar="ID", help="Neuronpedia's name of the model (default: the model's own)")
    latents.add_argument("--source-set", metavar="SET", help="Neuronpedia's source set (default: RUN-SAE)")
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    is_of_latents = options.format in LATENT_FORMATS
    if not is_of_latents and (options.sae or options.model_id or options.source_set):
        parser.error(f"--sae, --model-id and --source-set go with --format {' or '.join(LATENT_FORMATS)}")
    from monitor.cli import export_run  # imports rich, which `--help` does not wait for

    if not is_of_latents:
        return export_run.run_numbers(options.run, options.to, options.format)
    return export_run.run_latents(
        options.run, options.to, options.format, options.sae or [], options.model_id, options.source_set
    )
