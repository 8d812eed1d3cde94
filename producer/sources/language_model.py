"""Activations of a language model that reads a corpus."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pydantic import JsonValue
from torch import Tensor

from producer.corpus import Text, open_text
from producer.corpus.rendering.windows import Windows
from producer.corpus.survey import survey_shards
from producer.lm.errors import ModelError
from producer.lm.loading import load_language_model
from producer.lm.model import LanguageModel
from producer.lm.precision import dtype_name
from producer.lm.revisions import FIRST, Revision, describe, first_settings, follows, newest_checkpoint, settings_of
from producer.settings import ProducerSettings
from producer.sources.base import CPU_TOKENS, GPU_TOKENS, open_pass_threads, training_shards
from producer.sources.norms import norm_bounds
from producer.wire import Hook

log = logging.getLogger("sluice.producer")

CALIBRATION_SECONDS, CALIBRATION_ROUNDS = 2.5, 5
MAX_CONCURRENT_PASSES = 4
"""Most forward passes side by side on a CPU; each needs memory of its own."""
MIN_SPEEDUP = 1.05
"""Passes of another size must be this much faster to be preferred."""


class LanguageModelSource:
    """Activations of a language model that reads a corpus."""

    def __init__(self, settings: ProducerSettings) -> None:
        assert settings.model is not None
        self._batch_is_set = settings.model.batch_windows is not None or settings.run.deterministic
        self.context = settings.corpus.context
        # The corpus first: a wrong path should not wait for a model to load.
        self._text: Text = open_text(settings.corpus)
        log.info("corpus: %s", self._text.description)
        self._survey = survey_shards(self._text)
        self._model_settings = settings.model
        self.model: LanguageModel = load_language_model(first_settings(settings.model))
        self._tokenizer = self.model.tokenizer
        self._revision: str | None = settings.model.revisions[0] if settings.model.revisions else ""
        """None after a checkpoint that could not be loaded."""
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
        is_single = on_gpu or self.model.is_offloaded
        self.passes_under_way = self.model.stages
        self.concurrent_passes = 1 if is_single else min(MAX_CONCURRENT_PASSES, torch.get_num_threads())
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
            self._revision_bounds = norm_bounds(self, training_shards(self), self._outlier_factor)

    def _load_revision(self, name: str) -> None:
        began = time.monotonic()
        settings = settings_of(self._model_settings, name)
        self.model.network.release()  # or the memory of both would be needed
        self._revision = None
        model = load_language_model(settings, tokenizer=self._tokenizer)
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
            "shard_tokens": self._survey.tokens,
            "shard_unlikeness": self._survey.unlikeness,
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
