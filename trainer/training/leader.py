"""Rank 0's side of a run on many ranks: each change is announced to the others, then done by all.

The loop, the stream, the ledger and the files are rank 0's alone. The other ranks do what they are told (`follower`).
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from producer.common.parsing import parse_object
from producer.common.run_file import show_settings
from producer.lm.precision import dtype_name
from producer.wire import Hello
from trainer.parallel.commands import (
    Attach,
    Begin,
    Command,
    CoolDown,
    Detach,
    End,
    Idle,
    Initialise,
    Open,
    Publish,
    Report,
    Restore,
    SaveShard,
    States,
    TrainStep,
    encode_command,
)
from trainer.parallel.ranks import Ranks, World
from trainer.report import RankReport, RanksReport, SaeReport
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.state.checkpoint import FileRecord
from trainer.state.format import RunState, SaeState, SaeTensors
from trainer.state.run_directory import RunDirectoryError
from trainer.stream.buffer import Batch
from trainer.stream.payload import TORCH_DTYPE
from trainer.training.device import pick_device
from trainer.training.rank_meter import RankMeter
from trainer.training.remote import RemoteSaeTrainer
from trainer.training.roster import Member, Roster
from trainer.training.run import CalibratedSae, Run, WrittenSae
from trainer.training.sae_trainer import SaeTrainer

log = logging.getLogger("sluice.trainer")

IDLE_SECONDS = 5.0
"""A rank that hears nothing for so long is told that rank 0 is alive."""


class SharedRun(Run):
    """A run of which each rank has a share: of the latents of the SAEs that its placement group trains."""

    def __init__(
        self,
        settings: TrainerSettings,
        stream: Hello,
        roster: Roster,
        world: World,
        ranks: Ranks,
        host_ranks: Ranks,
        matmul: Mapping[str, torch.dtype] | None = None,
        local_rank: int = 0,
    ) -> None:
        super().__init__(settings, stream, roster, ranks, matmul, local_rank)
        self.world = world
        self.host_ranks = host_ranks
        self._rank_meter = RankMeter(world.rank, ranks)

    def shared_step(self, tokens: int, x: Mapping[str, Tensor]) -> None:
        """One step on activations of rank 0, which has them in `x`."""
        hooks: list[set[str]] = [set() for _ in range(self.settings.parallel.groups)]
        for one in self.in_training:
            hooks[self.group_of(one.settings.name)] |= one.hooks.names
        with self._rank_meter.step():
            self.step_on(self.share_activations(hooks, tokens, x), tokens)

    def report_text(self, reports: Sequence[SaeReport]) -> str:
        """This rank's answer to Report, JSON; of several placement groups the first rank tells of its SAEs."""
        report = self._rank_meter.report(
            sum(one.statistics.active_latents() for one in self.publishable if one.is_here)
        )
        tells = self.ranks.rank == 0 and self.ranks.group_index > 0
        return json.dumps(
            {
                "received_bytes": self.ranks.traffic.received_bytes,
                "rank": asdict(report),
                "saes": [asdict(each) for each in reports] if tells else [],
            }
        )

    def states_text(self) -> str:
        """The answer to States, JSON."""
        tells = self.ranks.rank == 0 and self.ranks.group_index > 0
        return json.dumps({one.settings.name: asdict(one.counters()) for one in self.here if one.has_weights and tells})

    def agree_on_removed(self, removed: list[Member]) -> list[Member]:
        """Removes the SAEs that could not begin on some rank; returns those of all ranks. Collective."""
        answers = self.world.gather_texts(json.dumps({"removed": [member.name for member in removed]}))
        names = {name for answer in answers for name in parse_object(answer)["removed"]}
        others = [member for member in self.roster.members if member.name in names]
        for member in others:
            self.detach_here(member)
        return [*removed, *others]

    def detach_here(self, member: Member) -> None:
        """Removes an SAE on this rank alone; the others do so too."""
        Run.detach(self, member)

    def share_activations(
        self, hooks: Sequence[Collection[str]], tokens: int, x: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raw activations [tokens, width] from rank 0, which has them in `x`, on each rank's device.

        `hooks` are those that each placement group reads: none gets others.
        """
        dtype, own = TORCH_DTYPE[self.stream.dtype], hooks[self.ranks.group_index]
        activations: dict[str, Tensor] = {}
        for hook in self.stream.hooks:
            if self.world.rank == 0:
                readers = [group for group, names in enumerate(hooks) if hook.name in names]
                if not readers:
                    continue
                value = x[hook.name].to(self.device).contiguous()
                for group in readers:
                    if group:
                        self.world.send_tensor(value.view(torch.uint8), group * self.ranks.size)
            elif hook.name in own:
                value = torch.empty(tokens, hook.width, dtype=dtype, device=self.device)
                if self.ranks.rank == 0:
                    with self.ranks.counted("activations", value.nbytes):
                        self.world.receive_tensor(value.view(torch.uint8))
            if hook.name in own:
                self.ranks.broadcast(value.view(torch.uint8), "activations")
                activations[hook.name] = value
        return activations

    def share_sample(self, tokens: int, x: list[Tensor]) -> list[Tensor]:
        """Raw activations of every hook from rank 0, on the host; none of those that are forgotten."""
        hooks = [hook.name for hook in self.stream.hooks if hook.name not in self.roster.forgotten_hooks]
        of_each = [hooks] * self.settings.parallel.groups
        activations = self.share_activations(of_each, tokens, self.by_hook(x) if x else {})
        nothing = torch.empty(tokens, 0, dtype=TORCH_DTYPE[self.stream.dtype])
        return [activations.get(hook.name, nothing).cpu() for hook in self.stream.hooks]


class Leader:
    """Announces commands to the other ranks."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._announced_at = time.monotonic()

    def announce(self, command: Command) -> None:
        self.world.send(encode_command(command))
        self._announced_at = time.monotonic()

    def keep_alive(self) -> None:
        """Tells the others that this rank is alive, when they have not heard of it for IDLE_SECONDS."""
        if time.monotonic() - self._announced_at >= IDLE_SECONDS:
            self.announce(Idle())

    def open(self, settings: TrainerSettings, directory: Path) -> tuple[Ranks, Ranks]:
        """Gives the other ranks their settings, and forms placement groups; returns this rank's, on device and host.

        Raises RunDirectoryError or DeviceError with what is wrong on some rank.
        """
        nonce = directory / f".ranks-{uuid.uuid4().hex}"
        nonce.write_text(nonce.name)
        try:
            self.announce(Open(settings=show_settings(settings), directory=str(directory), nonce=nonce.name))
            faults = [text for text in self.world.gather_texts("") if text]
        finally:
            nonce.unlink(missing_ok=True)
        if faults:
            raise RunDirectoryError("; ".join(faults))
        parallel = settings.parallel
        device = pick_device(settings.optimizer.device)
        return self.world.placement_group(device, parallel.groups, parallel.blocks, parallel.exchange)

    def end(self) -> None:
        """Lets the other ranks leave, and leaves the groups."""
        self.announce(End())
        self.world.close()


class LeaderRun(SharedRun):
    """The run of rank 0. What changes the run is announced first, and done by all ranks."""

    def __init__(
        self,
        settings: TrainerSettings,
        stream: Hello,
        roster: Roster,
        leader: Leader,
        ranks: Ranks,
        host_ranks: Ranks,
        checkpoint: Path | None,
    ) -> None:
        """`checkpoint` is the folder from which `restore` is called, if it is."""
        super().__init__(settings, stream, roster, leader.world, ranks, host_ranks)
        self._leader = leader
        self._checkpoint = checkpoint
        self._traffic: list[dict[str, int]] = []
        self._rank_reports: tuple[RankReport, ...] = ()
        matmul = {each.settings.name: dtype_name(each.sae.matmul_dtype) for each in self.sae_trainers}
        leader.announce(Begin(stream=stream, roster=self.roster.state(), matmul=matmul))

    def restore(self, state: RunState, tensors: dict[str, SaeTensors]) -> None:
        if self._checkpoint is not None:
            self._leader.announce(Restore(folder=str(self._checkpoint)))
        super().restore(state, tensors)

    def attach(self, sae: SaeSettings, joined_at: int, matmul: torch.dtype | None = None) -> SaeTrainer:
        sae_trainer = super().attach(sae, joined_at, matmul)
        table = sae.model_dump(mode="json", exclude_none=True)
        self._leader.announce(Attach(sae=table, joined_at=joined_at, matmul=dtype_name(sae_trainer.sae.matmul_dtype)))
        return sae_trainer

    def detach(self, member: Member) -> None:
        self._leader.announce(Detach(sae=member.name))
        super().detach(member)

    def cool_down(self, member: Member, now: bool = False) -> int:
        self._leader.announce(CoolDown(sae=member.name, now=now))
        return super().cool_down(member, now)

    def initialise(self, sample: list[Tensor]) -> list[Member]:
        scales = list(self._estimate_scales(sample).values())
        tokens = len(sample[0])
        self._leader.announce(Initialise(tokens=tokens, scales=scales))
        return self.agree_on_removed(self.draw_weights(self.share_sample(tokens, sample)))

    def train_step(self, batch: Batch) -> None:
        tokens = len(batch.x[0])
        self._leader.announce(TrainStep(tokens=tokens))
        self.shared_step(tokens, self.by_hook(batch.x))
        self.last_batch = batch

    def reports(self) -> tuple[SaeReport, ...]:
        self._leader.announce(Report())
        reports = self.reports_here()
        answers = [parse_object(text) for text in self.world.gather_texts(self.report_text(reports))]
        others = [SaeReport(**each | {"density": tuple(each["density"])}) for one in answers for each in one["saes"]]
        self._traffic = [answer["received_bytes"] for answer in answers]
        self._rank_reports = tuple(RankReport(**answer["rank"]) for answer in answers)
        by_name = {report.name: report for report in (*reports, *others)}
        return tuple(by_name[one.settings.name] for one in self.publishable)

    def ranks_report(self) -> RanksReport:
        """As of the last `reports`."""
        purposes = sorted({purpose for traffic in self._traffic for purpose in traffic})
        return RanksReport(
            count=self.world.size,
            exchange_bytes={each: sum(traffic.get(each, 0) for traffic in self._traffic) for each in purposes},
            exchange_seconds=dict(self.ranks.traffic.seconds),
            each=self._rank_reports,
        )

    def calibrated(self, activations: list[Tensor], folder: Path, facts: dict[str, Any]) -> Iterator[CalibratedSae]:
        tokens = len(activations[0])
        self._leader.announce(Publish(tokens=tokens, folder=str(folder), facts=facts))
        return super().calibrated(self.share_sample(tokens, activations), folder, facts)

    def published_elsewhere(self) -> list[WrittenSae]:
        """Raises OSError with what another placement group could not write."""
        answers = [parse_object(text) for text in self.world.gather_texts("{}")]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise OSError("; ".join(errors))
        return [WrittenSae.from_json(each) for answer in answers for each in answer.get("saes", [])]

    def state(self) -> tuple[RunState, dict[str, SaeTensors]]:
        if self.settings.parallel.groups > 1:
            self._leader.announce(States())
            states = {
                name: state for text in self.world.gather_texts("{}") for name, state in parse_object(text).items()
            }
            for one in self.sae_trainers:
                if isinstance(one, RemoteSaeTrainer) and one.has_weights:
                    state = states[one.settings.name]
                    cooldown = state["cooldown"] and tuple(state["cooldown"])
                    one.checkpoint_state = SaeState(**state | {"cooldown": cooldown})
        return super().state()

    @contextmanager
    def write_shards(self, folder: Path) -> Iterator[dict[str, FileRecord]]:
        """Raises OSError with what other ranks could not write."""
        self._leader.announce(SaveShard(folder=str(folder)))
        records: dict[str, FileRecord] = {}
        try:
            yield records
        finally:
            answers = [parse_object(text) for text in self.world.gather_texts("{}")]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise OSError("; ".join(errors))
        records |= {answer["file"]: FileRecord(answer["bytes"], answer["sha256"]) for answer in answers if answer}
