"""Differences between two snapshots of a run, or between any two SAEs on the same activations.

Numbers that differ, side by side, then the latents. A latent lives when it fires at least once in 1 / DEAD_RATE
activations, by the firing rates in sparsity.safetensors: one that lives in B alone was *born*, one that lives in A
alone *died*. Of those that live in both, the cosine of the two decoder rows tells how far one *turned*: by more than
45° counts. Where it is below SAME_COSINE, a better match is searched in all rows of B, since latents may change places
(and do, in SAEs of different runs). Of two SAEs of different width only the best match is reported, in both directions;
its mean is the mean max cosine similarity of Sharkey et al. (2022, "Taking features out of superposition with sparse
autoencoders").

Needs numpy alone, and besides the two decoders a block of BLOCK_BYTES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from monitor.evaluation.results import Evaluation, read_evaluation
from monitor.files import read_json
from trainer.snapshot import SnapshotError, read_manifest, read_sparsity

DEAD_RATE = 1e-6
"""The field's usual bound: a latent that fires more rarely counts as dead."""
SAME_COSINE = 0.9
"""From this cosine on, a latent is taken for the same one without a look at the others."""
TURNED_COSINE = math.cos(math.radians(45))
EDGES = (-1.0, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Edges of the bins of cosines; the last bin includes 1."""
HELD_OUT = "held-out "
"""Before the name of a number on held-out text that training measures too."""
DIGITS = 6
"""Digits of a cosine in the result."""
BLOCK_BYTES = 64 << 20
"""Size of the cosines that are held at a time."""


OnProgress = Callable[[str, int, int], None]
"""Called with (SAE, latents matched, latents to match)."""


def _ignore_progress(sae: str, done: int, total: int) -> None: ...


class CompareError(ValueError):
    """The two cannot be compared; `str(error)` says why."""


@dataclass(frozen=True)
class ComparedSae:
    """One SAE on disk, and its numbers."""

    folder: Path
    metrics: dict[str, Any]
    """Its entry in the manifest."""
    evaluation: Evaluation

    def numbers(self) -> dict[str, float]:
        """Training's metrics and the evaluation's, which say `held-out` where both have the name."""
        held_out = {
            f"{HELD_OUT}{name}" if name in self.metrics else name: value
            for name, value in self.evaluation.values.items()
        }
        return {
            name: value
            for name, value in {**self.metrics, **held_out}.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }


@dataclass(frozen=True)
class CosineDistribution:
    """Cosines of decoder rows, one per latent. Values of no latent are None."""

    mean: float | None
    p10: float | None
    median: float | None
    p90: float | None
    counts: list[int]
    """Latents per bin of EDGES."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"edges": list(EDGES)}


@dataclass(frozen=True)
class TurnedLatent:
    """A latent that has another direction in B."""

    latent: int
    cosine: float
    """Cosine of its decoder rows in A and in B."""
    match: int
    """The latent of B that is nearest to it as it was in A."""
    match_cosine: float


@dataclass(frozen=True)
class SameWidth:
    """Latents of two SAEs of one width, by index."""

    latents: int
    live: list[int]
    """Latents that fire in A, and in B."""
    born: list[int]
    """The most frequent first, as `died`."""
    died: list[int]
    turned: list[TurnedLatent]
    """The farthest first."""
    elsewhere: int
    """Turned latents that another index of B has."""
    rate_changed_twofold: int
    same_index: CosineDistribution
    matched: CosineDistribution

    @property
    def cosines(self) -> dict[str, CosineDistribution]:
        """Cosines by the way in which latents of A and B are matched."""
        return {"same_index": self.same_index, "matched": self.matched}

    def as_json(self) -> dict[str, Any]:
        document = asdict(self)
        del document["same_index"], document["matched"]
        return document | {"cosine": {way: cosine.as_json() for way, cosine in self.cosines.items()}}


@dataclass(frozen=True)
class DifferentWidths:
    """Latents of two SAEs whose indices have nothing in common: the best match of each on the other side."""

    latents: list[int]
    """Number of latents in A, and in B."""
    live: list[int]
    a_in_b: CosineDistribution
    b_in_a: CosineDistribution

    @property
    def cosines(self) -> dict[str, CosineDistribution]:
        """Cosines by the way in which latents of A and B are matched."""
        return {"a_in_b": self.a_in_b, "b_in_a": self.b_in_a}

    def as_json(self) -> dict[str, Any]:
        cosines = {way: cosine.as_json() for way, cosine in self.cosines.items()}
        return {"latents": self.latents, "live": self.live, "cosine": cosines}


@dataclass(frozen=True)
class Incomparable:
    """Latents of two SAEs between which no cosine means anything."""

    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"incomparable": self.reason}


LatentComparison = SameWidth | DifferentWidths | Incomparable


@dataclass(frozen=True)
class SaeComparison:
    """The comparison of two SAEs."""

    numbers: dict[str, tuple[float | None, float | None]]
    """Numbers by name, in A and in B."""
    latents: LatentComparison

    def as_json(self) -> dict[str, Any]:
        numbers = {name: list(values) for name, values in self.numbers.items()}
        return {"numbers": numbers, "latents": self.latents.as_json()}


@dataclass(frozen=True)
class Comparison:
    """The comparison of two snapshots, or of two SAEs."""

    a: str
    b: str
    only_a: list[str]
    """SAEs that B has not."""
    only_b: list[str]
    saes: dict[str, SaeComparison]
    revisions: tuple[str | None, str | None] = (None, None)
    """Of a language model under training: the checkpoints that A and B were trained on last."""

    def as_json(self) -> dict[str, Any]:
        """The output of `compare --json`."""
        saes = {name: sae.as_json() for name, sae in self.saes.items()}
        revisions = {"revisions": list(self.revisions)} if any(self.revisions) else {}
        return {"a": self.a, "b": self.b, **revisions, "only_a": self.only_a, "only_b": self.only_b, "saes": saes}


def compare(a: Path, b: Path, on_progress: OnProgress = _ignore_progress) -> Comparison:
    """Compares the folders of two snapshots or two SAEs. Raises CompareError."""
    saes_a, saes_b = find_saes(a), find_saes(b)
    revisions = _revision(a), _revision(b)
    if len(saes_a) == len(saes_b) == 1:  # names may differ
        (name_a, sae_a), (name_b, sae_b) = *saes_a.items(), *saes_b.items()
        title = name_a if name_a == name_b else f"{name_a} → {name_b}"
        return Comparison(str(a), str(b), [], [], {title: compare_saes(sae_a, sae_b, on_progress)}, revisions)
    names = [name for name in saes_a if name in saes_b]
    if not names:
        raise CompareError(
            f"{a} has {', '.join(saes_a)} and {b} has {', '.join(saes_b)}: none by the same name; "
            "name one SAE's folder of each, such as SNAPSHOT/topk"
        )
    return Comparison(
        str(a),
        str(b),
        only_a=[name for name in saes_a if name not in saes_b],
        only_b=[name for name in saes_b if name not in saes_a],
        saes={name: compare_saes(saes_a[name], saes_b[name], on_progress) for name in names},
        revisions=revisions,
    )


def _revision(folder: Path) -> str | None:
    """The checkpoint of a language model under training that a snapshot, or the one around an SAE, was trained on."""
    snapshot = folder if (folder / "manifest.json").is_file() else folder.parent
    manifest = read_json(snapshot / "manifest.json", snapshot) or {}
    stream = manifest.get("run", {}).get("stream", {})
    # Before anything of a checkpoint was trained, a run that follows a model names no revision.
    is_followed = "revision" in stream or "model_revisions" in stream
    return str(stream.get("revision") or "its first weights") if is_followed else None


def find_saes(folder: Path) -> dict[str, ComparedSae]:
    """The SAEs of a snapshot, or the one whose folder it is, by name. Raises CompareError."""
    if (folder / "manifest.json").is_file():
        try:
            entries = read_manifest(folder).saes
        except SnapshotError as error:
            raise CompareError(str(error)) from None
        return {name: _load_sae(folder / name, metrics) for name, metrics in entries.items()}
    if (folder / "sae_weights.safetensors").is_file():
        manifest = read_json(folder.parent / "manifest.json", folder.parent) or {}
        return {folder.name: _load_sae(folder, manifest.get("saes", {}).get(folder.name, {}))}
    missing = "does not exist" if not folder.exists() else "holds neither a manifest.json nor sae_weights.safetensors"
    raise CompareError(f"{folder} {missing}; name a snapshot, such as RUN_DIR/snapshots/000001234567, or an SAE in one")


def _load_sae(folder: Path, metrics: dict[str, Any]) -> ComparedSae:
    return ComparedSae(folder, metrics, read_evaluation(folder.parent, folder.name) or Evaluation())


def compare_saes(a: ComparedSae, b: ComparedSae, on_progress: OnProgress = _ignore_progress) -> SaeComparison:
    """Numbers and latents of two SAEs. Raises CompareError."""
    numbers_a, numbers_b = a.numbers(), b.numbers()
    numbers = {name: (numbers_a.get(name), numbers_b.get(name)) for name in {**numbers_a, **numbers_b}}
    return SaeComparison(numbers, compare_latents(a, b, on_progress))


# --- Latents ---------------------------------------------------------------------------------------------------------


def compare_latents(a: ComparedSae, b: ComparedSae, on_progress: OnProgress = _ignore_progress) -> LatentComparison:
    """Compares the decoder rows and firing rates of two SAEs. Raises CompareError."""
    decoder_a, decoder_b = _unit_decoder(a), _unit_decoder(b)
    if decoder_a.shape[1] != decoder_b.shape[1]:
        return Incomparable(
            f"decoder rows have {decoder_a.shape[1]} entries in A and {decoder_b.shape[1]} in B: "
            "they live in different spaces, and no cosine between them means anything"
        )
    rate_a, rate_b = _firing_rates(a, len(decoder_a)), _firing_rates(b, len(decoder_b))
    if len(decoder_a) == len(decoder_b):
        return compare_same_width(decoder_a, decoder_b, rate_a, rate_b, partial(on_progress, a.folder.name))
    lives_a, lives_b = rate_a >= DEAD_RATE, rate_b >= DEAD_RATE
    cosine_a, _ = best_matches(
        decoder_a, decoder_b, np.flatnonzero(lives_a), on_rows=partial(on_progress, a.folder.name)
    )
    cosine_b, _ = best_matches(
        decoder_b, decoder_a, np.flatnonzero(lives_b), on_rows=partial(on_progress, b.folder.name)
    )
    return DifferentWidths(
        latents=[len(decoder_a), len(decoder_b)],
        live=[int(lives_a.sum()), int(lives_b.sum())],
        a_in_b=_distribution(cosine_a),
        b_in_a=_distribution(cosine_b),
    )


def compare_same_width(
    decoder_a: np.ndarray,
    decoder_b: np.ndarray,
    rate_a: np.ndarray,
    rate_b: np.ndarray,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> SameWidth:
    """Compares latents by index; decoders have rows of unit norm [d_sae, d_out], rates are [d_sae]."""
    lives_a, lives_b = rate_a >= DEAD_RATE, rate_b >= DEAD_RATE
    live = np.flatnonzero(lives_a & lives_b)
    cosine = np.einsum("ij,ij->i", decoder_a, decoder_b)
    match_cosine, match = cosine.copy(), np.arange(len(cosine))
    unsure = live[cosine[live] < SAME_COSINE]
    best, index = best_matches(decoder_a, decoder_b, unsure, on_rows=on_rows)
    better = best > cosine[unsure]
    match_cosine[unsure[better]], match[unsure[better]] = best[better], index[better]
    turned = live[cosine[live] < TURNED_COSINE]
    turned = turned[np.argsort(cosine[turned], kind="stable")]
    change = np.abs(np.log2(np.maximum(rate_b[live], DEAD_RATE) / np.maximum(rate_a[live], DEAD_RATE)))
    return SameWidth(
        latents=len(cosine),
        live=[int(lives_a.sum()), int(lives_b.sum())],
        born=_by_rate(np.flatnonzero(~lives_a & lives_b), rate_b),
        died=_by_rate(np.flatnonzero(lives_a & ~lives_b), rate_a),
        turned=[
            TurnedLatent(int(i), round(float(cosine[i]), DIGITS), int(match[i]), round(float(match_cosine[i]), DIGITS))
            for i in turned
        ],
        elsewhere=int((match_cosine[turned] >= TURNED_COSINE).sum()),
        rate_changed_twofold=int((change >= 1).sum()),
        same_index=_distribution(cosine[live]),
        matched=_distribution(match_cosine[live]),
    )


def best_matches(
    decoder_a: np.ndarray,
    decoder_b: np.ndarray,
    rows: np.ndarray,
    block_bytes: int = BLOCK_BYTES,
    on_rows: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """(cosine, index) of the row of `decoder_b` nearest to each of `rows` of `decoder_a`; rows have unit norm."""
    cosine, index = np.empty(len(rows), np.float32), np.empty(len(rows), np.int64)
    step = max(1, block_bytes // (4 * len(decoder_b)))
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        cosines = decoder_a[rows[block]] @ decoder_b.T
        index[block] = cosines.argmax(axis=1)
        cosine[block] = np.take_along_axis(cosines, index[block][:, None], axis=1)[:, 0]
        on_rows(min(start + step, len(rows)), len(rows))
    return cosine, index


def _unit_decoder(sae: ComparedSae) -> np.ndarray:
    """W_dec with rows of unit norm [d_sae, d_out]; a row of zeros stays one."""
    try:
        with safe_open(sae.folder / "sae_weights.safetensors", "np") as file:
            rows = np.asarray(file.get_tensor("W_dec"), np.float32)
    except Exception as error:
        raise CompareError(f"{sae.folder} holds no readable SAE: {error}") from None
    return rows / np.maximum(np.sqrt(np.einsum("ij,ij->i", rows, rows)), 1e-12)[:, None]


def _firing_rates(sae: ComparedSae, d_sae: int) -> np.ndarray:
    """Firing rate of each latent; 1 where there is no sparsity.safetensors, so that all count as living."""
    if not (sae.folder / "sparsity.safetensors").is_file():
        return np.ones(d_sae)
    return 10.0 ** read_sparsity(sae.folder).astype(np.float64)


def _by_rate(latents: np.ndarray, rate: np.ndarray) -> list[int]:
    """Latents by firing rate, the most frequent first."""
    return [int(latent) for latent in latents[(-rate[latents]).argsort(kind="stable")]]


def _distribution(cosines: np.ndarray) -> CosineDistribution:
    counts, _ = np.histogram(np.clip(cosines, -1, 1), EDGES)
    if not len(cosines):
        return CosineDistribution(None, None, None, None, counts.tolist())
    p10, median, p90 = (_round(value) for value in np.percentile(cosines, [10, 50, 90]))
    return CosineDistribution(_round(cosines.mean()), p10, median, p90, counts.tolist())


def _round(value: float) -> float | None:
    return round(float(value), DIGITS) if math.isfinite(value) else None
