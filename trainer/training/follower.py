"""A rank other than 0: does what rank 0 announces, and nothing by itself.

It has no stream, no ledger and no socket of its own. It leaves on the command to, or when a connection closes: rank 0,
or another rank, has ended, and torchrun starts all of them again.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch
from safetensors import SafetensorError

from producer.common.parsing import parse_toml
from producer.common.process import ignore_stopping
from producer.common.run_file import settings_from
from producer.lm.precision import use_deterministic_algorithms
from trainer.parallel.commands import (
    Attach,
    Begin,
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
    decode_command,
)
from trainer.parallel.environment import Launch
from trainer.parallel.ranks import RankLostError, Ranks, World
from trainer.report import SaeReport
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings
from trainer.state.checkpoint import read, save_shard, shard_name
from trainer.training.device import DeviceError, pick_device
from trainer.training.leader import SharedRun
from trainer.training.publishing import write_latents
from trainer.training.roster import restore_roster

log = logging.getLogger("sluice.trainer")


def follow(launch: Launch) -> int:
    """Carries out rank 0's commands until it says that the run is over; returns the exit code."""
    try:
        world = World()
        ignore_stopping()  # torchrun sends SIGTERM to all ranks: rank 0 writes a checkpoint with them, then they leave
        Follower(world, launch).follow()
        world.close()
        return 0
    except RankLostError as error:
        log.warning("%s: leaving", error)
    except Exception:
        log.exception("a command of rank 0 failed")
    return 1


class Follower:
    """Carries out commands one by one."""

    def __init__(self, world: World, launch: Launch) -> None:
        self._world = world
        self._launch = launch
        self._settings: TrainerSettings | None = None
        self._ranks: tuple[Ranks, Ranks] | None = None
        """Of this rank's placement group, on its device and on the host."""
        self._last_reports: dict[str, SaeReport] = {}
        self._run: SharedRun | None = None

    @property
    def run(self) -> SharedRun:
        assert self._run is not None, "a command for a run came before the one that begins it"
        return self._run

    def follow(self) -> None:
        """Returns at the last command. Raises RankLostError when another rank has ended before."""
        while True:
            match decode_command(self._world.receive()):
                case Idle():
                    pass
                case TrainStep(tokens=tokens):
                    self.run.shared_step(tokens, {})
                case Report():
                    reports = self.run.reports_here()
                    self._last_reports = {report.name: report for report in reports}
                    self._world.gather_texts(self.run.report_text(reports))
                case States():
                    self._world.gather_texts(self.run.states_text())
                case SaveShard(folder=folder):
                    self._world.gather_texts(self._save_shard(Path(folder)))
                case Initialise(tokens=tokens, scales=scales):
                    self.run.scales = self.run.by_hook(scales)
                    self.run.agree_on_removed(self.run.draw_weights(self.run.share_sample(tokens, [])))
                case Publish(tokens=tokens, folder=folder, facts=facts):
                    sample = self.run.share_sample(tokens, [])
                    self._world.gather_texts(write_latents(self.run, self._last_reports, sample, Path(folder), facts))
                case Attach(sae=sae, joined_at=joined_at, matmul=matmul):
                    self.run.attach(SaeSettings.model_validate(sae), joined_at, getattr(torch, matmul))
                case Detach(sae=name):
                    self.run.detach(self.run.roster.find(name))
                case CoolDown(sae=name, now=now):
                    self.run.cool_down(self.run.roster.find(name), now)
                case Restore(folder=folder):
                    self._restore(Path(folder))
                case Open() as command:
                    self._open(command)
                case Begin() as command:
                    self._begin(command)
                case End():
                    return

    def _open(self, command: Open) -> None:
        settings = settings_from(TrainerSettings, parse_toml(command.settings))
        fault, device = "", torch.device("cpu")
        try:
            device = pick_device(settings.optimizer.device, self._launch.local_rank)
        except DeviceError as error:
            fault = f"rank {self._launch.rank}: {error}"
        path = Path(command.directory) / command.nonce
        if not path.is_file():
            fault = (
                f"run.directory = {command.directory} is not the same folder on rank {self._launch.rank} as on rank 0: "
                "put it on a file system that all machines share, at the same path"
            )
        faults = [text for text in self._world.gather_texts(fault) if text]
        if faults:
            raise RankLostError("the run cannot begin")
        if settings.run.threads is not None:
            torch.set_num_threads(settings.run.threads)
        if settings.run.deterministic:
            use_deterministic_algorithms()
        parallel, self._settings = settings.parallel, settings
        self._ranks = self._world.placement_group(device, parallel.groups, parallel.blocks, parallel.exchange)

    def _begin(self, command: Begin) -> None:
        assert self._settings is not None and self._ranks is not None
        saes = [SaeSettings.model_validate(member.settings) for member in command.roster.members]
        roster = restore_roster(command.roster, saes, self._settings.run.folder)
        matmul = {name: getattr(torch, dtype) for name, dtype in command.matmul.items()}
        self._run = SharedRun(
            self._settings, command.stream, roster, self._world, *self._ranks, matmul, self._launch.local_rank
        )

    def _restore(self, folder: Path) -> None:
        # Rank 0 has compared the files with their hashes.
        saved = read(folder, lambda _: self.run.share, verified=True)
        self.run.restore(saved.document.run, saved.tensors.saes)

    def _save_shard(self, folder: Path) -> str:
        """The answer to SaveShard, JSON: the file written, or an error."""
        name = shard_name(self._world.rank, self._world.size)
        try:
            record = save_shard(folder / name, self.run.tensors_here(), is_first=self.run.ranks.rank == 0)
        except (OSError, SafetensorError) as error:
            return json.dumps({"error": f"rank {self._world.rank}: {error}"})
        return json.dumps({"file": name, "bytes": record.bytes, "sha256": record.sha256})
