"""Our SAEs, written in each format and loaded by the library it belongs to: what they make of real activations.

`SLUICE_PEERS_PYTHON=… python -m tests.peers.compare` prints the table of README.md.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.peers.family import FAMILY, Zoo, begin, difference, options_of, print_snapshot, real_rows
from trainer.saes.export import main as export
from trainer.saes.inference import InferenceSae, load_sae
from trainer.saes.settings import SaeSettings
from trainer.snapshot import SnapshotError

SCRIPT = Path(__file__).parent / "theirs.py"
LIBRARY = {
    "snapshot": "sae_lens",
    "saelens": "sae_lens",
    "jumprelu": "sae_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
"""Who loads what: a snapshot's folder as it is, and every export format."""
NAMES = [*FAMILY, "repair", "topk-ema", "batchtopk-ema"]
CLOSE_CALL = 1e-5
"""Rows are compared whose closest latent is further than this from its threshold, in units of the pre-activations."""


@dataclass(frozen=True)
class Peers:
    """The other libraries, each run in one process for many jobs."""

    python: Path

    def load(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Lets them load and run what the jobs name; what each says of itself."""
        return self._ask("load", jobs)

    def evaluate(self, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Lets SAELens measure SAEs on a language model and tokens; its numbers."""
        return self._ask("evaluate", jobs)

    def save(self, jobs: list[dict[str, Any]]) -> None:
        self._run("save", jobs)

    def optimize(self, jobs: list[dict[str, Any]]) -> None:
        """Lets sparsify's optimizers change weights by the gradients that the jobs name."""
        self._run("optimize", jobs)

    def _ask(self, what: str, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        output = self._run(what, jobs)
        return [json.loads(line.removeprefix("told ")) for line in output.splitlines() if line.startswith("told ")]

    def _run(self, what: str, jobs: list[dict[str, Any]]) -> str:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "jobs.json"
            path.write_text(json.dumps(jobs))
            command = [str(self.python), str(SCRIPT), what, str(path)]
            process = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        assert process.returncode == 0, process.stderr[-4000:]
        return process.stdout


@dataclass(frozen=True)
class Verdict:
    """What a library made of one of ours; only `refusal` when we would not write it."""

    refusal: str = ""
    facts: dict[str, Any] | None = None
    difference: dict[str, float] | None = None
    """Of latents, x_hat, forward and folded, relative."""

    @property
    def worst(self) -> float:
        assert self.difference is not None
        return max(self.difference.values())


@dataclass(frozen=True)
class Comparison:
    """Verdicts by SAE and format."""

    of_all: dict[tuple[str, str], Verdict]

    def __getitem__(self, key: tuple[str, str]) -> Verdict:
        return self.of_all[key]

    @classmethod
    def of(cls, peers: Peers, zoo: Zoo, directory: Path) -> Comparison:
        verdicts, jobs = {}, {}
        for name in NAMES:
            folder = zoo.folder(name)
            sae = load_sae(folder)
            x = zoo.rows.read_by(zoo.settings(name.removesuffix("-ema")))
            save_file({"x": x[is_clear_cut(sae, x)].contiguous()}, directory / f"{name}.safetensors")
            for format_name, library in LIBRARY.items():
                key, target = (name, format_name), directory / name / format_name
                if format_name == "snapshot":
                    target = folder
                    if "topk" in sae.cfg["architecture"] and "transcoder" in sae.cfg["architecture"]:
                        verdicts[key] = Verdict(refusal="SAELens has no top-k transcoders")
                        continue
                elif refusal := _export(folder, format_name, target):
                    verdicts[key] = Verdict(refusal=refusal)
                    continue
                jobs[key] = {
                    "library": library,
                    "folder": str(target),
                    "x": str(directory / f"{name}.safetensors"),
                    "out": str(directory / f"{name}.{format_name}.safetensors"),
                    "ours": sae,
                }
        answers = peers.load([{key: value for key, value in job.items() if key != "ours"} for job in jobs.values()])
        for (key, job), answer in zip(jobs.items(), answers, strict=True):
            theirs, x = load_file(job["out"]), load_file(job["x"])["x"]
            verdicts[key] = Verdict(facts=answer, difference=_differences(job["ours"], theirs, x))
        return cls(verdicts)


def is_clear_cut(sae: InferenceSae, x: Tensor) -> Tensor:
    """Rows on which no latent is within rounding of jumping, [rows] bool; nearly all are."""
    pre_acts = sae.pre_acts(x)
    margins = sae.activation.margins(pre_acts, sae.weights, sae.cfg)
    clear = margins > CLOSE_CALL * pre_acts.square().mean().sqrt()
    assert clear.float().mean() > 0.9
    return clear


def _differences(ours: InferenceSae, theirs: dict[str, Tensor], x: Tensor) -> dict[str, float]:
    latents, y_hat = ours.encode(x), ours(x)
    # Nobody's `decode` knows x: a skip map is in `forward` only.
    expected = {"latents": latents, "x_hat": latents @ ours.W_dec + ours.b_dec, "forward": y_hat, "folded": y_hat}
    return {name: difference(value, expected[name]) for name, value in theirs.items()}


def _export(folder: Path, format_name: str, target: Path) -> str:
    """Writes it by the command; what it said when it would not."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output), contextlib.redirect_stdout(io.StringIO()):
        code = export([str(folder), "--format", format_name, "--to", str(target)])
    assert code in (0, 2), output.getvalue()
    assert (code == 0) == target.is_dir()
    return output.getvalue().strip()


def start_difference(zoo: Zoo, name: str, directory: Path) -> float | None:
    """How far a run that starts from our own snapshot is from it before its first step; None when it is refused."""
    settings, folder = zoo.settings(name.removesuffix("-ema")), zoo.folder(name)
    options = options_of(settings)
    options |= {
        "start_from": str(folder),
        "architecture": "relu" if name in ("tied", "repair") else options["architecture"],
    }
    options |= {"sparsity_weight": 1.0} if name == "repair" else {}
    for key in ("whitening", "train"):
        options.pop(key, None)
    try:
        adopted = begin(SaeSettings.of(**options), zoo.rows)
    except SnapshotError:
        return None
    x = zoo.rows.read_by(settings)
    x = x[is_clear_cut(load_sae(folder), x)]
    printed = print_snapshot(adopted, zoo.rows, directory / name, calibrated=False)
    new = load_sae(printed / settings.name)
    return difference(new(x), load_sae(folder)(x))


def table(comparison: Comparison, zoo: Zoo, directory: Path) -> str:
    """Markdown: a row per SAE, a column per format, the largest relative difference in each cell."""
    lines = [f"| | {' | '.join(LIBRARY)} | start_from |", "|---|" + "---|" * (len(LIBRARY) + 1)]
    for name in NAMES:
        cells = []
        for format_name in LIBRARY:
            verdict = comparison[name, format_name]
            cells.append("–" if verdict.refusal else f"{(verdict.facts or {})['class']} {_digit(verdict.worst)}")
        started = start_difference(zoo, name, directory)
        cells.append("–" if started is None else _digit(started))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _digit(difference: float) -> str:
    return f"{difference:.0e}" if difference else "0"


def main() -> None:
    """Trains, compares, prints."""
    with tempfile.TemporaryDirectory() as folder:
        zoo, exports = Zoo(real_rows(), Path(folder) / "zoo"), Path(folder) / "exports"
        exports.mkdir()
        comparison = Comparison.of(Peers(Path(os.environ["SLUICE_PEERS_PYTHON"])), zoo, exports)
        print(table(comparison, zoo, Path(folder) / "starts"))


if __name__ == "__main__":
    main()
