"""The SAEs of a run and what they share, as one state that is trained batch by batch.

Its shape comes from the first producer's HELLO, its input scales from the first half bufferful of activations. SAEs may
join and leave between two steps; the others do not notice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from producer.lm.precision import product_dtype
from producer.wire import Hello
from trainer.parallel.ranks import ALONE, OtherRanks, Ranks
from trainer.phases import SaePhase
from trainer.planning.sae_cost import place_saes
from trainer.report import RanksReport, SaeReport
from trainer.saes.base import Sae
from trainer.saes.settings import SaeSettings
from trainer.saes.start import check_start, open_start, read_start, require_widths
from trainer.settings import TrainerSettings
from trainer.snapshot import FileParts
from trainer.state.checkpoint import FileRecord, shard_name
from trainer.state.format import LatentRange, RunState, SaeTensors
from trainer.stream.buffer import Batch
from trainer.training.device import default_threads, make_thread_pool, pick_device
from trainer.training.remote import RemoteSaeTrainer
from trainer.training.roster import Member, Roster
from trainer.training.sae_trainer import SaeTrainer

log = logging.getLogger("sluice.trainer")

T = TypeVar("T")


class NoVariance(ValueError):
    """The activations of a hook do not vary: nothing can be learned from them."""


LEAST_VARIANCE = 1e-12
"""Of an element, as a share of its mean square: below that activations differ by rounding alone."""


def scale_of(x: Tensor) -> float:
    """The factor for raw activations [n, width] that makes the variance of an element 1.

    About the mean, not about zero: a mean far larger than the spread, which b_dec takes away at once, would otherwise
    shrink what is to be learned, and with it every threshold, bandwidth and learning rate. Raises NoVariance.
    """
    if len(x) == 1:
        raise NoVariance(
            "there is 1 activation when training begins, and no scale can be estimated from one; give the corpus more "
            "text, or lower corpus.held_out"
        )
    x = x.double()
    scale = float((x.shape[1] / (x - x.mean(0)).square().sum(1).mean()).sqrt())
    square = float(x.square().mean())
    # The mean of equal numbers is rounded, too: constant activations have a variance that is not quite 0.
    if square * scale**2 > 1 / LEAST_VARIANCE or scale > torch.finfo(torch.float32).max:
        raise NoVariance(
            f"the first {len(x):,} activations do not vary (their rms is {square**0.5:.3g}), so that nothing can be "
            "learned from them; hook another place: this module is constant, as one that was zeroed or pruned"
        )
    return scale


def _scale(x: Tensor, hook: str) -> float:
    try:
        return scale_of(x)
    except NoVariance as error:
        raise NoVariance(f"model.hooks = {hook!r}: {error}") from None


@dataclass(frozen=True)
class CalibratedSae:
    """An SAE, or its EMA copy, ready to be published."""

    sae_trainer: SaeTrainer
    sae: Sae
    is_average: bool
    firing_rate: Tensor
    """Of this rank's latents."""

    @property
    def name(self) -> str:
        """Its folder in a snapshot."""
        name = self.sae_trainer.settings.name
        return f"{name}-ema" if self.is_average else name


@dataclass(frozen=True)
class WrittenSae:
    """An SAE, or its EMA copy, that was written into a snapshot, or could not be."""

    name: str
    fault: str | None
    numbers: dict[str, Any]
    parts: FileParts | None

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> WrittenSae:
        parts = document["parts"]
        file_parts = None if parts is None else FileParts(parts["bytes"], tuple(parts["sha256"]))
        return cls(document["name"], document["fault"], document["numbers"], file_parts)

    def as_json(self) -> dict[str, Any]:
        parts = None if self.parts is None else {"bytes": self.parts.bytes, "sha256": self.parts.sha256}
        return {"name": self.name, "fault": self.fault, "numbers": self.numbers, "parts": parts}


class Run:
    """See the module's docstring. `stream` is the frozen HELLO of the first producer.

    On many ranks each has a run with its share of the latents, and all methods that change it are called by all.
    """

    def __init__(
        self,
        settings: TrainerSettings,
        stream: Hello,
        roster: Roster | None = None,
        ranks: Ranks = ALONE,
        matmul: Mapping[str, torch.dtype] | None = None,
        local_rank: int = 0,
    ) -> None:
        """`ranks` are those of this rank's placement group, which trains the SAEs that are placed there.

        `matmul` has the dtype of each SAE's products by its name; without it, it is chosen here.
        """
        self.settings = settings
        self.ranks = ranks
        self.stream = stream
        self.roster = roster or Roster.of(settings.sae)
        self.step = 0
        """Steps so far, restarts included."""
        self.seconds = 0.0
        """Time spent training, restarts included and pauses not."""
        self.scales: dict[str, float] | None = None
        """By the name of the hook: its activations are multiplied by it, so that an element's variance is 1. Frozen."""
        self.last_batch: Batch | None = None
        self.host_ranks = ranks
        """The same ranks, for tensors on the host."""
        self.on_progress: Callable[[], None] = lambda: None
        """Called as a snapshot or a checkpoint is being written, which may take long."""
        self.device = pick_device(settings.optimizer.device, local_rank)
        self._widths = {hook.name: hook.width for hook in stream.hooks}
        self._group_of = place_saes(settings, self.roster.settings, self._widths)
        self.sae_trainers = [
            self._make_sae_trainer(each, (matmul or {}).get(each.name)) for each in self.roster.members
        ]
        self._pool = self._make_thread_pool()

    def _make_thread_pool(self) -> ThreadPoolExecutor | None:
        """Threads that step the SAEs on a CPU; a GPU is kept busy by one thread."""
        if self.device.type != "cpu":
            return None
        is_alone = self.ranks.is_alone  # with others, collectives must come in one order
        saes = max(1, len(self.here)) if is_alone else 1
        self.roster.threads = self.settings.run.threads or self.roster.threads or default_threads(saes)
        return make_thread_pool(self.roster.threads, can_overlap=is_alone)

    def _make_sae_trainer(self, member: Member, matmul: torch.dtype | None = None) -> SaeTrainer:
        sae, optimizer = member.settings, self.settings.optimizer
        hooks, group = self.settings.hooks_of(sae), self._group_of[sae.name]
        is_here = group == self.ranks.group_index
        d_in = sum(self._widths[hook] for hook in hooks.reads)
        dtype = matmul or product_dtype(optimizer.matmul, optimizer.batch, d_in, sae.d_sae, self.device)
        where = f", on placement group {group}" if self.settings.parallel.groups > 1 else ""
        log.info("sae %s: %s, %d → %d, products in %s%s", sae.name, sae.architecture, d_in, sae.d_sae, dtype, where)
        seed = self.settings.run.seed * 1000 + member.number if sae.seed is None else sae.seed
        kind = SaeTrainer if is_here else RemoteSaeTrainer
        return kind(
            sae,
            optimizer,
            hooks,
            self._widths,
            self.device,
            dtype,
            seed,
            member.joined_at,
            self.settings.run.tokens,
            self.ranks if is_here else OtherRanks(group, self.ranks.size, self.ranks.blocks),
        )

    def sae_trainer(self, member: Member) -> SaeTrainer:
        return next(sae_trainer for sae_trainer in self.sae_trainers if sae_trainer.settings.name == member.name)

    def group_of(self, name: str) -> int:
        """The placement group of ranks that trains an SAE."""
        return self._group_of[name]

    # Lifecycle

    @property
    def here(self) -> list[SaeTrainer]:
        """SAE trainers of this rank's placement group."""
        return [sae_trainer for sae_trainer in self.sae_trainers if sae_trainer.is_here]

    @property
    def publishable(self) -> list[SaeTrainer]:
        """SAE trainers with at least one token behind them: those in reports and snapshots."""
        return [sae_trainer for sae_trainer in self.sae_trainers if sae_trainer.tokens]

    @property
    def lacking_weights(self) -> list[SaeTrainer]:
        """SAE trainers whose first weights are still to be drawn."""
        return [sae_trainer for sae_trainer in self.sae_trainers if not sae_trainer.has_weights]

    @property
    def in_training(self) -> list[SaeTrainer]:
        """SAE trainers that the next step changes; none when every SAE is finished."""
        return [one for one in self.sae_trainers if one.phase is not SaePhase.FINISHED]

    def phase(self, member: Member) -> SaePhase:
        """The SAE's phase, with the order to leave taken into account."""
        phase = self.sae_trainer(member).phase
        if member.leaving and phase in (SaePhase.COOLING_DOWN, SaePhase.FINISHED):
            return SaePhase.LEAVING
        return phase

    def attach(self, sae: SaeSettings, joined_at: int, matmul: torch.dtype | None = None) -> SaeTrainer:
        """Adds an SAE, whose weights are still to be drawn. Raises RosterError or SnapshotError, and changes nothing.

        `joined_at`: tokens that the run has trained on.
        """
        is_first = self.ranks.rank == 0  # the others read weights of their latents alone
        start = read_start(sae) if is_first else open_start(sae)
        member = self.roster.join(sae, joined_at)
        self._group_of = place_saes(self.settings, self.roster.settings, self._widths, self._group_of)
        try:
            sae_trainer = self._make_sae_trainer(member, matmul)
            if start is not None:
                require_widths(start, sae_trainer.sae)
                if self.scales is not None and is_first:
                    check_start(start, sae_trainer.sae, sae_trainer.input_transform(self.scales))
        except BaseException:
            self.roster.leave(member, keep_name=False)
            raise
        self.sae_trainers.append(sae_trainer)
        return sae_trainer

    def detach(self, member: Member) -> None:
        """Removes an SAE as it is. Hooks that it was trained on are forgotten where no other SAE reads them."""
        sae_trainer = self.sae_trainer(member)
        self.sae_trainers.remove(sae_trainer)
        self.roster.leave(member, keep_name=sae_trainer.tokens > 0)
        if sae_trainer.tokens:
            hooks_read = frozenset[str]().union(*(other.hooks.names for other in self.sae_trainers))
            self.roster.forgotten_hooks += sorted(sae_trainer.hooks.names - hooks_read)

    def cool_down(self, member: Member, now: bool = False) -> int:
        """Begins the cooldown of an SAE; returns its length in tokens."""
        return self.sae_trainer(member).cool_down(now)

    # Training

    def initialise(self, sample: list[Tensor]) -> list[Member]:
        """Draws the weights that are lacking from raw activations of every hook, and at first estimates the scales.

        An attached SAE that cannot begin is removed again, so that the others train on; returns those removed.
        """
        self._estimate_scales(sample)
        return self.draw_weights(sample)

    def _estimate_scales(self, sample: list[Tensor]) -> dict[str, float]:
        """The scales by hook, those of `sample` when there are none yet."""
        if self.scales is None:
            self.scales = {hook: _scale(x.float(), hook) for hook, x in self.by_hook(sample).items()}
        return self.scales

    def draw_weights(self, sample: list[Tensor]) -> list[Member]:
        assert self.scales is not None
        scaled = {hook: x.float() * self.scales[hook] for hook, x in self.by_hook(sample).items()}
        removed: list[Member] = []
        for sae_trainer in self.lacking_weights:
            try:
                sae_trainer.initialise(scaled, self.scales, open_start(sae_trainer.settings))
            except Exception as error:
                member = self.roster.find(sae_trainer.settings.name)
                if not member.attached:
                    raise
                log.error("sae %s cannot begin, and is out of the run again: %s", member.name, error)
                self.detach(member)
                removed.append(member)
        return removed

    def by_hook(self, values: Sequence[T]) -> dict[str, T]:
        """Values in the stream's order of hooks, by the name of the hook."""
        return {hook.name: value for hook, value in zip(self.stream.hooks, values, strict=True)}

    def train_step(self, batch: Batch) -> None:
        """One step of every SAE on the same activations; each hook is scaled once."""
        hooks = self.hooks_in_training()
        raw = {hook: x.to(self.device) for hook, x in self.by_hook(batch.x).items() if hook in hooks}
        self.step_on(raw, len(batch.x[0]))
        self.last_batch = batch

    def hooks_in_training(self) -> frozenset[str]:
        return frozenset[str]().union(*(sae_trainer.hooks.names for sae_trainer in self.in_training))

    def step_on(self, raw: Mapping[str, Tensor], tokens: int) -> None:
        """One step on raw activations of the hooks in training, on this run's device; there are so many `tokens`."""
        assert self.scales is not None
        in_training = [one for one in self.in_training if one.is_here]
        for one in self.in_training:
            if isinstance(one, RemoteSaeTrainer):
                one.count(tokens)
        scaled = {hook: x.float() * self.scales[hook] for hook, x in raw.items()}

        def step(sae_trainer: SaeTrainer) -> None:
            sae_trainer.step(scaled)

        for _ in self._pool.map(step, in_training) if self._pool else map(step, in_training):
            pass
        self.step += 1

    # Reports and snapshots; none of them changes anything but what inference needs

    def reports(self) -> tuple[SaeReport, ...]:
        """Numbers of every SAE that has trained."""
        return tuple(self._reports(self.publishable))

    def reports_here(self) -> tuple[SaeReport, ...]:
        """Numbers of those that this rank's placement group trains."""
        return tuple(self._reports([one for one in self.publishable if one.is_here]))

    def _reports(self, sae_trainers: Iterable[SaeTrainer]) -> Iterator[SaeReport]:
        scales = self.scales or self.by_hook([1.0] * len(self.stream.hooks))
        return (sae_trainer.report(scales) for sae_trainer in sae_trainers)

    def ranks_report(self) -> RanksReport:
        """The number of ranks, and what they have exchanged."""
        return RanksReport()

    def calibrated(self, activations: list[Tensor], folder: Path, facts: dict[str, Any]) -> Iterator[CalibratedSae]:
        """Every SAE here that has trained, with what inference needs fitted to raw activations of every hook.

        On many ranks each of them is then written into `folder` by all, before the next one comes.
        """
        assert self.scales is not None
        scaled = {hook: x.float() * self.scales[hook] for hook, x in self.by_hook(activations).items()}
        for sae_trainer in (one for one in self.publishable if one.is_here):
            for sae in filter(None, (sae_trainer.sae, sae_trainer.ema_sae)):
                sae_trainer.calibrate(sae, scaled)
                is_average = sae is not sae_trainer.sae
                yield CalibratedSae(sae_trainer, sae, is_average, sae_trainer.statistics.firing_rate())

    def published_elsewhere(self) -> list[WrittenSae]:
        """What other placement groups have written into a snapshot since `calibrated`."""
        return []

    # Checkpoints

    def share(self, name: str, d_sae: int) -> range:
        """The latents of an SAE that this rank holds, none of one that another placement group trains."""
        return self.ranks.latents(d_sae) if self._group_of.get(name) == self.ranks.group_index else range(0)

    def state(self) -> tuple[RunState, dict[str, SaeTensors]]:
        """Counters, and the tensors of each SAE here; SAEs without weights are left out."""
        counters = {each.settings.name: each.counters() for each in self.sae_trainers if each.has_weights}
        scales = None if self.scales is None else list(self.scales.values())
        return RunState(self.step, self.seconds, scales, counters), self.tensors_here()

    def tensors_here(self) -> dict[str, SaeTensors]:
        """The tensors of each SAE that this rank's placement group trains."""
        return {each.settings.name: each.tensors() for each in self.here if each.has_weights}

    def latent_ranges(self) -> dict[str, list[LatentRange]]:
        """Which file of a checkpoint has which latents, by the SAE's name; none for one rank, whose file has all."""
        size, world_size = self.ranks.size, self.ranks.size * self.settings.parallel.groups
        if world_size == 1:
            return {}
        ranges: dict[str, list[LatentRange]] = {}
        for sae_trainer in self.sae_trainers:
            if sae_trainer.has_weights:
                cuts = self.ranks.latent_cuts(sae_trainer.settings.d_sae)
                first = size * self._group_of[sae_trainer.settings.name]
                files = [shard_name(rank, world_size) for rank in range(first, first + size)]
                ranges[sae_trainer.settings.name] = [
                    LatentRange(file, first, end) for file, (first, end) in zip(files, pairwise(cuts), strict=True)
                ]
        return ranges

    def write_shards(self, folder: Path) -> AbstractContextManager[dict[str, FileRecord]]:
        """Lets the other ranks write their rows into a folder while the block runs; the dict has their files then."""
        return nullcontext({})

    def restore(self, state: RunState, tensors: dict[str, SaeTensors]) -> None:
        """Goes on from what `state` returned; the roster was handed in before, from `resuming.roster_of`."""
        self.step, self.seconds = state.step, state.seconds
        self.scales = None if state.scales is None else self.by_hook(state.scales)
        for sae_trainer in self.sae_trainers:
            name = sae_trainer.settings.name
            if name in state.saes:
                sae_trainer.restore(state.saes[name], tensors[name])
