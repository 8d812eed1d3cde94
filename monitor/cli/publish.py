"""`python -m monitor publish`: a snapshot on the Hugging Face hub, with a model card."""

from __future__ import annotations

from pathlib import Path

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser
from producer.common.completion import complete


def main(arguments: list[str]) -> int:
    """Returns 0 when it is published or written, 1 when that failed, 2 for wrong usage."""
    parser = command_parser(
        "monitor",
        "publish",
        "Publish a snapshot on the Hugging Face hub, with a model card.",
        (
            "runs/gpt2/snapshots/000040000512 someone/gpt2-saes --dry-run     # writes ./gpt2-saes",
            "runs/gpt2 someone/gpt2-saes --private                            # the newest snapshot",
        ),
        epilog="`hf auth login` or HF_TOKEN gives the token, and HF_ENDPOINT another hub.",
    )
    parser.add_argument("snapshot", metavar="SNAPSHOT", type=path_argument, help="its folder, or a run directory")
    parser.add_argument("repository", metavar="REPO", help="such as someone/gpt2-saes")
    parser.add_argument("--sae", metavar="NAME", action="append", default=[], help="this SAE only; may be repeated")
    parser.add_argument("--license", metavar="ID", help="of the SAEs, for the card's head, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dry-run", action="store_true", help="write the folder that would be uploaded, and stop")
    parser.add_argument(
        "--to", metavar="DIR", type=path_argument, help="a new folder for --dry-run (default: the name of REPO, here)"
    )
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    if options.to is not None and not options.dry_run:
        parser.error("--to goes with --dry-run")
    from monitor.cli.publish_run import PublishJob, run  # imports what `--help` does not wait for

    folder = options.to or Path(Path(options.repository).name)
    return run(
        PublishJob(
            snapshot=options.snapshot,
            repository=options.repository,
            saes=options.sae,
            license_name=options.license,
            is_private=options.private,
            dry_run_folder=folder if options.dry_run else None,
        )
    )
