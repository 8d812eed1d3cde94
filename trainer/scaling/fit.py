"""`python -m trainer fit RUN_DIR`: the scaling law of a grid of SAEs, and what it predicts for the next size.

Exit codes: 0 fitted, 1 a package is missing or the disk failed, 2 the run has no grid that can be fitted.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec

from producer.common.addresses import path_argument
from producer.common.command_parser import command_parser, positive_count
from producer.common.completion import complete
from producer.common.installation import DISTRIBUTION
from trainer.scaling.cells import GridError, read_grid
from trainer.scaling.report import FILE, write_report

PURPOSE = f"""Fits a scaling law to the SAEs of a run that differ in d_sae and k alone, such as those of [[sae]] grid:

    L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)

after Gao et al. 2024 (arXiv 2406.04093, section 3.1.4), and L(tokens) for each of them. L is FVU, on held-out text
where the monitor has measured it. Says which parameters the losses do not identify and which SAEs are not converged,
and predicts the next size. The result is also written to {FILE} in the run directory; the monitor's page draws it."""


def main(arguments: list[str]) -> int:
    parser = _parser()
    complete(parser, arguments)
    options = parser.parse_args(arguments)
    if find_spec("scipy") is None:
        print(f'fits need scipy, which is not installed: pip install "{DISTRIBUTION}[scaling]"', file=sys.stderr)
        return 1
    from trainer.scaling.fitting import fit_grid  # imports numpy, which `--help` does not wait for

    try:
        grid = read_grid(options.directory, options.snapshot, options.sae)
        report = fit_grid(grid, options.hold_out, options.predict)
    except GridError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        write_report(options.directory, report)
    except OSError as error:
        print(f"{options.directory / FILE} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        from trainer.scaling.tables import show  # imports rich, which `--json` does not wait for

        show(report)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "trainer",
        "fit",
        PURPOSE,
        ("runs/scaling", "runs/scaling --hold-out 4096", "runs/scaling --predict 16384 65536 --json"),
    )
    parser.add_argument("directory", type=path_argument, metavar="RUN_DIR", help="run.directory of the run file")
    parser.add_argument("--sae", metavar="PATTERN", default="*", help="SAEs whose names match, such as 'topk-*'")
    parser.add_argument("--snapshot", metavar="NAME", help="as the SAEs were in this snapshot; without it, at the end")
    parser.add_argument(
        "--hold-out",
        type=positive_count,
        nargs="+",
        default=[],
        metavar="D_SAE",
        help="fit without these sizes, and predict them",
    )
    parser.add_argument(
        "--predict",
        type=positive_count,
        nargs="+",
        default=[],
        metavar="D_SAE",
        help="sizes to predict (default: the next one)",
    )
    parser.add_argument("--json", action="store_true", help="everything, for scripts")
    return parser
