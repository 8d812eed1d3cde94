"""Sources of activations: a shard number → windows → activations.

Two sources share one shape: a language model reading text, and synthetic vectors of known ground truth. Everything
that decides which activations a shard has is in `facts`; their hash is the stream's fingerprint, so that two producers
either stream the same activations or are not let in together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from producer.corpus import Text, open_text
from producer.corpus.rendering.windows import Windows
from producer.corpus.synthetic import SyntheticActivations
from producer.lm.errors import ModelError, non_finite_message
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.lm.precision import dtype_name
from producer.lm.revisions import FIRST, Revision, describe, first_settings, follows, newest_checkpoint, settings_of
from producer.settings import ProducerSettings
from producer.wire import CorpusShare, Hook, held_out_shards

log = logging.getLogger("sluice.producer")

CPU_TOKENS, GPU_TOKENS = 4096, 32_768
"""About how many tokens one forward pass takes, unless model.batch_windows says otherwise or others are faster."""
CALIBRATION_SECONDS, CALIBRATION_ROUNDS = 2.5, 5
MAX_CONCURRENT_PASSES = 4
"""Most forward passes side by side on a CPU; each needs memory of its own."""
MIN_SPEEDUP = 1.05
"""Passes of another size must be this much faster to be preferred."""
BOUND_TOKENS = 4096
"""Tokens whose norms give the median. Not a forward pass: the bound must not depend on how large one is."""
HEAVY = 3.0
"""An activation is heavy whose norm is over so many times the median."""


class Source(Protocol):
    """Shards of activations, as the producer's loop reads them."""

    hooks: list[Hook]
    context: int
    shards: int
    held_out: float
    """Fraction of the shards that are never trained on."""
    corpora: list[CorpusShare]
    """Of a mixture."""
    batch_windows: int
    concurrent_passes: int
    """Number of forward passes that run side by side."""
    facts: dict[str, JsonValue]
    """Facts that decide the activations, and names of their origin, for the stream's HELLO and the snapshots."""
    device: torch.device

    def choose_batch(self) -> None:
        """Sets `batch_windows` to what is fastest here, unless the settings say it."""
        ...

    @property
    def layers(self) -> tuple[int, int]:
        """(layers that run, layers of the whole model)"""
        ...

    @property
    def measurements(self) -> dict[str, JsonValue]:
        """Measurements of the start, for the stream's HELLO and the snapshots; they decide no activation."""
        ...

    def use_revision(self, name: str) -> None:
        """Loads a revision of a language model under training. Raises ModelError."""
        ...

    def find_newest(self) -> Revision:
        """Looks for the newest revision of a language model under training."""
        ...

    @property
    def revision_bounds(self) -> list[float] | None:
        """Norm bounds of the present revision, per hook; None where the run has one for all, or nothing is dropped."""
        ...

    def windows(self, shard: int, epoch: int = 0) -> Windows: ...

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        """Computes the activations of the windows with these indices: [len(indices), context, width] per hook."""
        ...


class LanguageModelSource:
    """Activations of a language model that reads a corpus."""

    def __init__(self, settings: ProducerSettings) -> None:
        assert settings.model is not None
        self._batch_is_set = settings.model.batch_windows is not None or settings.run.deterministic
        self.context = settings.corpus.context
        # The corpus first: a wrong path should not wait for a model to load.
        self._text: Text = open_text(settings.corpus)
        log.info("corpus: %s", self._text.description)
        self._model_settings = settings.model
        self.model: LanguageModel = load_language_model(first_settings(settings.model))
        self._tokenizer = self.model.tokenizer
        self._revision = settings.model.revisions[0] if settings.model.revisions else ""
        self._newest = FIRST
        self._outlier_factor = settings.corpus.outlier_factor
        self._revision_bounds: list[float] | None = None
        self._text.check_packing(self.model.tokenizer, self.model.vocabulary)
        if unknown := self.model.unknown_tokens:
            log.info(
                "the tokenizer has %d token(s) that the model does not know, such as %r (id %d): a shard whose text "
                "contains one fails",
                len(unknown), *next((token, number) for number, token in unknown.items()),
            )  # fmt: skip
        self.model.check_context(self.context)
        if self._text.has_shared_windows:
            difference = self.model.check_shared_windows(self.context)
            log.info("documents that share a window against each alone: largest difference %.3g of the rms", difference)
        check, dtype = self.model.self_check, dtype_name(self.model.dtype)
        log.info(
            "%s runs in %s%s on %s",
            settings.model.name, dtype, " (model.dtype = auto)" if settings.model.dtype == "auto" else "",
            self.model.device,
        )  # fmt: skip
        log.info(
            "self-check: cut model against the whole one: largest difference %.3g at rms %.3g (%s)",
            check.max_difference, check.scale, "passed" if check.passed else "FAILED",
        )  # fmt: skip
        self.device = self.model.device
        self.shards, self.held_out, self.corpora = self._text.shards, self._text.held_out, self._text.shares
        self.hooks = [Hook(name=hook.name, module=hook.path, width=hook.width) for hook in self.model.hooks]
        on_gpu = self.device.type == "cuda"
        self.concurrent_passes = 1 if on_gpu else min(MAX_CONCURRENT_PASSES, torch.get_num_threads())
        tokens = GPU_TOKENS if on_gpu else CPU_TOKENS // self.concurrent_passes
        self.batch_windows = settings.model.batch_windows or max(1, tokens // self.context)
        self.facts: dict[str, JsonValue] = {
            "model": settings.model.name,
            "model_revision": self.model.revision or settings.model.revision,
            "model_weights": self.model.fingerprint,
            "model_dtype": dtype,
            "corpus": self._text.description,
            "corpus_fingerprint": self._text.fingerprint,
            "tokens_fingerprint": self._text.tokens_fingerprint(self.model.tokenizer),
            "context": self.context,
            "prepend_bos": self._text.common("prepend_bos"),
            "exclude_special": self._text.common("exclude_special"),
            "outlier_factor": settings.corpus.outlier_factor,
        } | (self._arithmetic_facts() if settings.run.deterministic else {})
        if follows(settings.model):
            self.facts["model_revisions"] = describe(settings.model.revisions)

    def use_revision(self, name: str) -> None:
        if name != self._revision:
            self._load_revision(name)
        if follows(self._model_settings) and self._revision_bounds is None:
            held_out = set(held_out_shards(self.shards, self.held_out))
            shards = (shard for shard in range(self.shards) if shard not in held_out)
            self._revision_bounds = norm_bounds(self, shards, self._outlier_factor)

    def _load_revision(self, name: str) -> None:
        began = time.monotonic()
        model = load_language_model(settings_of(self._model_settings, name), tokenizer=self._tokenizer)
        widths = {hook.name: hook.width for hook in model.hooks}
        if widths != {hook.name: hook.width for hook in self.hooks} or model.vocabulary != self.model.vocabulary:
            raise ModelError(
                f"checkpoint {name} has hooks of widths {widths} and {model.vocabulary} token ids, and the run's model "
                f"has {[hook.width for hook in self.hooks]} and {self.model.vocabulary}; it is of another model"
            )
        if self._text.has_shared_windows:
            model.check_shared_windows(self.context)
        self.model, self._revision, self._revision_bounds = model, name, None
        log.info("loaded %s (weights %s) in %.1f s", name or "model.name", model.fingerprint[:12],
                 time.monotonic() - began)  # fmt: skip

    def find_newest(self) -> Revision:
        if self._model_settings.watch is not None:
            self._newest = newest_checkpoint(Path(self._model_settings.watch), self._newest)
        return self._newest

    @property
    def revision_bounds(self) -> list[float] | None:
        return self._revision_bounds

    def _arithmetic_facts(self) -> dict[str, JsonValue]:
        """Returns what decides the last bits of an activation: the sizes of products, and what computes them."""
        on_gpu = self.device.type == "cuda"
        return {
            "deterministic": True,
            "batch_windows": self.batch_windows,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "processor": torch.cuda.get_device_name(self.device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        }

    def choose_batch(self) -> None:
        """Measures how many windows a forward pass should take here, unless the settings say it.

        Activations depend on it only in rounding. Takes CALIBRATION_SECONDS at most; a model that is too slow for that
        keeps the default.
        """
        if self._batch_is_set:
            return
        default = self.batch_windows
        with open_pass_threads(self.concurrent_passes) as threads:
            seconds = self._seconds_per_window(default, threads)
        if seconds:
            fastest = min(seconds.values())
            if seconds.get(default, float("inf")) > MIN_SPEEDUP * fastest:
                self.batch_windows = min(size for size in seconds if seconds[size] <= (1 + MIN_SPEEDUP) / 2 * fastest)
        rates = ", ".join(f"{size}: {self.context / seconds[size]:,.0f}" for size in sorted(seconds))
        log.info(
            "%d windows in a forward pass, %d at a time (tokens/s by windows: %s)",
            self.batch_windows, self.concurrent_passes, rates or "not measured",
        )  # fmt: skip

    def _seconds_per_window(self, default: int, threads: ThreadPoolExecutor) -> dict[int, float]:
        """Times passes of several sizes, the best of some rounds each; returns nothing without time for the default."""
        sizes = {max(1, default // 4), max(1, default // 2), default, 2 * default, 4 * default}
        self._pass_seconds(1, threads)
        windows = CALIBRATION_SECONDS / self._pass_seconds(1, threads)
        while 2 * sum(sizes) > windows:
            if max(sizes) <= default:
                return {}
            sizes.remove(max(sizes))
        rounds = int(windows / sum(sizes))
        best: dict[int, float] = {}
        for _ in range(min(rounds, CALIBRATION_ROUNDS)):
            for size in sorted(sizes):
                try:
                    seconds = self._pass_seconds(size, threads) / (size * self.concurrent_passes)
                    best[size] = min(seconds, best.get(size, float("inf")))
                except torch.OutOfMemoryError:
                    sizes = {smaller for smaller in sizes if smaller < size}
        return {size: seconds for size, seconds in best.items() if size in sizes}

    def _pass_seconds(self, size: int, threads: ThreadPoolExecutor) -> float:
        """Times one forward pass over `size` windows in every thread, all side by side."""
        tokens = torch.arange(size * self.context).view(size, self.context) % self.model.vocabulary

        def forward(_: int) -> None:
            x = self.model.activations(tokens)[-1]
            x[-1, -1, -1].item()  # a GPU is done only then

        began = time.monotonic()
        list(threads.map(forward, range(self.concurrent_passes)))
        return time.monotonic() - began

    @property
    def layers(self) -> tuple[int, int]:
        return self.model.layers_run, self.model.layers_total

    @property
    def measurements(self) -> dict[str, JsonValue]:
        check = self.model.self_check
        return {
            "layers_run": self.model.layers_run,
            "layers_total": self.model.layers_total,
            "self_check": {
                "passed": check.passed,
                "largest_difference": check.max_difference,
                "rms": check.scale,
                "hooks": list(check.compared),
            },
        }

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        windows = self._text.windows(shard, epoch, self._tokenizer)
        self.model.check_ids(torch.from_numpy(windows.ids))  # before any activation of the shard is sent
        return windows

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        padded = windows.padded[indices]
        return self.model.activations(
            torch.from_numpy(windows.ids[indices]),
            torch.from_numpy(padded) if padded.any() else None,
            None if windows.positions is None else torch.from_numpy(windows.positions[indices]),
        )


class SyntheticSource:
    """Sparse sums of known directions; no language model, no text."""

    device = torch.device("cpu")
    concurrent_passes = 1
    layers = (0, 0)
    measurements: ClassVar[dict[str, JsonValue]] = {}
    revision_bounds = None

    def __init__(self, settings: ProducerSettings) -> None:
        self.data = SyntheticActivations(settings.corpus)
        self._shards: dict[int, np.ndarray] = {}
        """Activations of the shard that is worked on and of the one that is read ahead."""
        self.context = settings.corpus.context
        self._streamed = settings.corpus.streamed_positions
        self.corpora: list[CorpusShare] = []
        self.shards, self.held_out = self.data.shards, settings.corpus.held_out
        self.hooks = [Hook(name="synthetic", module="synthetic", width=self.data.d_in)]
        self.batch_windows = max(1, CPU_TOKENS // self.context)
        self.facts: dict[str, JsonValue] = {
            "corpus": self.data.description,
            "corpus_fingerprint": self.data.fingerprint,
            "context": self.context,
            "outlier_factor": settings.corpus.outlier_factor,
        }
        if settings.corpus.positions:
            self.facts["positions"] = list(settings.corpus.positions)
        if settings.run.deterministic:
            self.facts["deterministic"] = True

    def choose_batch(self) -> None:
        """There is nothing to choose: a pass is a copy."""

    def use_revision(self, name: str) -> None:
        """There is no language model."""

    def find_newest(self) -> Revision:
        return FIRST

    def windows(self, shard: int, epoch: int = 0) -> Windows:
        count = len(self._shard(shard)) // self.context
        shape = (count, self.context)
        kept = np.broadcast_to(np.array(self._streamed), shape).copy()
        return Windows(np.zeros(shape, np.int64), kept, np.zeros(shape, bool))

    def activations(self, shard: int, windows: Windows, indices: np.ndarray) -> list[Tensor]:
        activations = self._shard(shard)
        return [torch.from_numpy(activations.reshape(-1, self.context, activations.shape[1])[indices])]

    def _shard(self, shard: int) -> np.ndarray:
        """Returns the shard's activations, [shard_windows * context, d_in], computed once while it is needed."""
        if (activations := self._shards.get(shard)) is None:
            activations = self.data.activations(shard)
            self._shards = dict([*self._shards.items()][-1:]) | {shard: activations}
        return activations


def open_pass_threads(count: int) -> ThreadPoolExecutor:
    """Opens threads for forward passes side by side, each with its share of the cores.

    As fast as one pass after the other on all cores where nothing else runs; but those wait for their slowest core in
    each of their hundred operations, and lose a third of their speed to any other process that wakes now and then.
    """
    share = max(1, torch.get_num_threads() // count)
    return ThreadPoolExecutor(count, "pass", initializer=torch.set_num_threads, initargs=(share,))


def open_source(settings: ProducerSettings) -> Source:
    """Opens the source that the run file names. Raises CorpusError or ModelError for what an operator can mend."""
    return SyntheticSource(settings) if settings.corpus.kind == "synthetic" else LanguageModelSource(settings)


def fingerprint(facts: dict[str, JsonValue]) -> str:
    """Hashes what decides the activations: sha256, hex. Names and descriptions depend on the place and are left out."""
    decisive = {name: value for name, value in facts.items() if name not in ("model", "corpus")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def norm_bounds(source: Source, shards: Iterable[int], factor: float) -> list[float] | None:
    """Returns per hook `factor` times the median norm in the corpus' first windows; None when nothing is dropped.

    Attention sinks have a hundred times the usual norm; a bound from the median hardly notices them. Raises ModelError
    for a hook whose median is 0, or that gives what is not finite.
    """
    if not factor:
        return None
    for shard in shards:
        windows = source.windows(shard)
        indices = np.flatnonzero(windows.kept.any(1))[: max(1, BOUND_TOKENS // source.context)]
        if len(indices):
            norms = [
                [
                    x.float().norm(dim=-1).cpu().numpy()[windows.kept[batch]]
                    for x in source.activations(shard, windows, batch)
                ]
                for batch in np.array_split(indices, -(-len(indices) // source.batch_windows))
            ]
            by_hook = {
                hook.name: np.concatenate(parts)
                for hook, parts in zip(source.hooks, zip(*norms, strict=True), strict=True)
            }
            bounds = {hook: factor * _median_norm(source, hook, parts) for hook, parts in by_hook.items()}
            for hook, bound in bounds.items():
                log.info("%s: %s", hook, describe_norms(by_hook[hook], bound))
            return list(bounds.values())
    return None


def describe_norms(norms: np.ndarray, bound: float) -> str:
    """The distribution of the norms of a hook's first activations, and what of it FVU will mostly be about.

    Activations of norm up to `bound` are streamed. Those among them beyond HEAVY times the median are heavy.
    """
    median = float(np.median(norms))
    streamed = norms[norms <= bound]
    heavy = streamed[streamed > HEAVY * median]
    tenth, most = np.quantile(norms, [0.1, 0.9])
    text = f"norms: median {median:.4g}, from {tenth:.4g} to {most:.4g} in 80%, largest {norms.max():.4g}"
    text += f"; {len(norms) - len(streamed):,} of {len(norms):,} are beyond the bound {bound:.4g} and dropped"
    if not len(heavy):
        return text
    share = float(np.square(heavy, dtype=np.float64).sum() / np.square(streamed, dtype=np.float64).sum())
    return (
        f"{text}; {len(heavy) / len(streamed):.2%} of the others are over {HEAVY:g} × the median and hold {share:.0%} "
        "of the sum of squares: FVU in all is as much about them; the evaluation shows it without them (fvu_typical)"
    )


def _median_norm(source: Source, hook: str, norms: np.ndarray) -> float:
    """Returns the median. Raises ModelError where no bound can be made of it."""
    setting = f"model.hooks = {hook!r}"
    if not np.isfinite(norms).all():
        name, dtype = (
            source.facts.get(fact, default) for fact, default in (("model", "the source"), ("model_dtype", "float32"))
        )
        raise ModelError(f"{setting}: {non_finite_message(str(name), str(dtype))}")
    median = float(torch.from_numpy(norms).median())
    if median == 0:
        zeros = int((norms == 0).sum())
        raise ModelError(
            f"{setting}: {zeros:,} of the first {len(norms):,} activations are zero, so that their median norm, which "
            "corpus.outlier_factor counts from, is 0; hook another place, if this module was zeroed or pruned, or set "
            "corpus.outlier_factor = 0"
        )
    return median


def batches(windows: Windows, wanted: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Yields the indices of the windows with a wanted position, `size` at a time, in order."""
    needed = np.flatnonzero(wanted.any(1))
    for start in range(0, len(needed), size):
        yield needed[start : start + size]
