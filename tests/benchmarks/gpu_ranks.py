"""Parts of `make gpu-check` on ranks and large SAEs: python -m tests.benchmarks.gpu_ranks (ranks | share | auxk) DEVICE

    ranks   two ranks train an SAE of each selection: bits of one process in two blocks. Over NCCL where there are two
            GPUs; else on one, with collectives through the host's memory, since NCCL takes each GPU once
    share   one rank's share of 2^24 latents, d 4096, batch 131,072: the step within 25 % and the memory within 10 % of
            the estimate; what other ranks would send is not there, so results mean nothing
    auxk    a step that revives 20,000 latents, with sparse and with dense products

On a CPU all of it is small, and shows that it runs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from tests.small_saes import D_IN, rows_of
from trainer.kernels.select import DENSE_ABOVE, DENSE_ABOVE_ON_GPU
from trainer.parallel.ranks import ALONE, Ranks
from trainer.planning import cost
from trainer.planning.cost import StepCost
from trainer.saes.hooks import SaeHooks
from trainer.saes.settings import SaeSettings
from trainer.settings import OptimizerSettings
from trainer.training.sae_trainer import SaeTrainer

WORLD, BLOCKS, STEPS = 2, 2, 20
TABLES = (
    {"architecture": "topk", "k": 4, "k_aux": 4},
    {"architecture": "batchtopk", "k": 4, "matryoshka": [16, 64]},
    {"architecture": "jumprelu", "target_l0": 4.0},
)
TIME_TOLERANCE, MEMORY_TOLERANCE = 0.25, 0.10
UNSCALED = {"a": 1.0}


def sae_trainer_of(
    table: dict[str, object], width: int, device: torch.device, ranks: Ranks, dtype: torch.dtype
) -> SaeTrainer:
    settings = SaeSettings.of(**({"name": "s", "revive_tokens": 200, "dead_tokens": 200} | table))  # type: ignore[arg-type]
    hooks = SaeHooks.from_settings(settings, ["a"])
    return SaeTrainer(settings, OptimizerSettings(learning_rate=1e-3), hooks, {"a": width}, device, dtype, ranks=ranks)


# Two ranks


class ThroughHost(Ranks):
    """Ranks whose tensors are on one GPU: gloo exchanges them in the host's memory."""

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        return tensor.copy_(super().sum(tensor.cpu(), purpose))

    def gather(self, piece: Tensor, purpose: str) -> Tensor:
        return super().gather(piece.cpu(), purpose).to(piece.device)

    def exchange(self, pieces: Tensor, purpose: str) -> Tensor:
        return super().exchange(pieces.cpu(), purpose).to(pieces.device)

    def broadcast(self, tensor: Tensor, purpose: str) -> Tensor:
        return tensor.copy_(super().broadcast(tensor.cpu(), purpose))


def trained(table: dict[str, object], device: torch.device, ranks: Ranks) -> dict[str, Tensor]:
    """Weights of this rank's latents after some steps, on the host."""
    sae_trainer = sae_trainer_of(table | {"d_sae": 64}, D_IN, device, ranks, torch.float32)
    sae_trainer.initialise(rows_of(sae_trainer.settings, 256, 0), UNSCALED)
    for step in range(1, STEPS + 1):
        sae_trainer.step({hook: x.to(device) for hook, x in rows_of(sae_trainer.settings, 64, step).items()})
    return {name: value.cpu() for name, value in sae_trainer.sae.parameters.items()}


def train_on_rank(rank: int, folder: str, device_name: str) -> None:
    has_gpus = device_name == "cuda" and torch.cuda.device_count() >= WORLD
    device = torch.device("cuda", rank if has_gpus else 0) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("nccl" if has_gpus else "gloo", store=store, rank=rank, world_size=WORLD)
    kind = Ranks if has_gpus or device.type == "cpu" else ThroughHost
    ranks = kind(rank, WORLD, None, BLOCKS, latents_per_unit=1, device=device if has_gpus else "cpu")
    torch.save([trained(table, device, ranks) for table in TABLES], f"{folder}/{rank}")
    dist.destroy_process_group()


def check_ranks(device_name: str) -> bool:
    """Whether two ranks train the SAEs of one process, to the bit."""
    if device_name == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(train_on_rank, (folder, device_name), WORLD)
        parts = [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(WORLD)]
    backend = "nccl" if device_name == "cuda" and torch.cuda.device_count() >= WORLD else "gloo"
    same = True
    for number, table in enumerate(TABLES):
        alone = Ranks(0, 1, None, BLOCKS, latents_per_unit=1, device=device_name)
        for name, value in trained(table, torch.device(device_name), alone).items():
            pieces = [part[number][name] for part in parts]
            whole = pieces[0] if len(pieces[0]) == len(value) else torch.cat(pieces)
            difference = float((whole - value).abs().max())
            same &= difference == 0.0
            print(json.dumps({"sae": table["architecture"], "weight": name, "backend": backend, "differs": difference}))
    return same


# One rank's share


@dataclass(frozen=True)
class Size:
    latents: int
    width: int
    batch: int
    k: int


LARGE, TOY = Size(2**24, 4096, 131_072, 64), Size(2**14, 64, 1024, 8)


class Absent(Ranks):
    """The first of several ranks without the others: what it would receive has the size of that, and no meaning."""

    def sum(self, tensor: Tensor, purpose: str) -> Tensor:
        return tensor

    def gather(self, piece: Tensor, purpose: str) -> Tensor:
        return piece.expand(self.size, *piece.shape)

    def exchange(self, pieces: Tensor, purpose: str) -> Tensor:
        return pieces

    def broadcast(self, tensor: Tensor, purpose: str) -> Tensor:
        return tensor


def cost_of(size: Size, ranks: int) -> StepCost:
    k = float(size.k)
    whole = StepCost("s", "topk", size.width, size.width, size.latents, size.batch, active=k, total_k=k)
    return replace(whole.sharded(ranks), number_bytes=cost.HALF)


def check_share(device_name: str) -> bool:
    """Whether a step takes the time and the memory that the estimate gives it; on a CPU they are only printed."""
    device, on_gpu = torch.device(device_name), device_name == "cuda"
    size = LARGE if on_gpu else TOY
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else 1e12
    machine = measured_machine(device)
    ranks = next(
        count for count in (24, 32, 48, 64, 128)
        if sum(cost.memory_parts(cost_of(size, count), machine.kernels).values()) < 0.85 * memory
    )  # fmt: skip
    table = {"architecture": "topk", "d_sae": size.latents, "k": size.k, "revive": "none"}
    share = Absent(0, ranks, None, latents_per_unit=1, device=device)
    sae_trainer = sae_trainer_of(table, size.width, device, share, torch.bfloat16)
    for name in ("W_enc", "W_dec"):  # drawing them on the host would take longer than all else
        sae_trainer.sae.parameters[name].normal_().div_(size.width**0.5)
    sae_trainer._reset_optimizer(torch.zeros(size.width, device=device))
    x = {"a": torch.randn(size.batch, size.width, device=device)}
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        sae_trainer.step(x)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    expected = cost_of(size, ranks)
    predicted = cost.step_seconds(expected, machine), sum(cost.memory_parts(expected, machine.kernels).values())
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    print(json.dumps({
        "ranks": ranks, "latents_here": len(sae_trainer.sae.latents), "step_seconds": min(seconds[1:]),
        "predicted_seconds": predicted[0], "peak_bytes": peak, "predicted_bytes": predicted[1],
    }))  # fmt: skip
    if peak is None:
        return True
    is_time_right = abs(min(seconds[1:]) / predicted[0] - 1) <= TIME_TOLERANCE
    return is_time_right and abs(peak / predicted[1] - 1) <= MEMORY_TOLERANCE


def measured_machine(device: torch.device) -> cost.Machine:
    """This device by its product and its copy, as `estimate` measures a machine."""
    side, numbers = (8192, 2**28) if device.type == "cuda" else (512, 2**20)
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    block, to = torch.ones(numbers, device=device), torch.empty(numbers, device=device)
    flops = 2 * side**3 / fastest(lambda: a @ a, device)
    bandwidth = 8 * numbers / fastest(lambda: to.copy_(block), device)
    return cost.Machine("here", flops, bandwidth, 1e12, cost.CUDA if device.type == "cuda" else cost.CPU)


def fastest(function: object, device: torch.device) -> float:
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        function()  # type: ignore[operator]
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# AuxK


def check_auxk(device_name: str) -> bool:
    """Prints the seconds of a step with many dead latents, for each share of active ones from which it is dense."""
    device, on_gpu = torch.device(device_name), device_name == "cuda"
    latents, width, batch, dead = (65_536, 2304, 16_384, 20_000) if on_gpu else (512, 64, 128, 128)
    table = {"architecture": "topk", "d_sae": latents, "k": 64 if on_gpu else 8, "revive_tokens": 1}
    sae_trainer = sae_trainer_of(table, width, device, ALONE, torch.bfloat16)
    x = {"a": torch.randn(batch, width, device=device)}
    sae_trainer.initialise({"a": torch.randn(1024, width)}, UNSCALED)
    for share in (DENSE_ABOVE, DENSE_ABOVE_ON_GPU):
        sae_trainer.sae.dense_above = share

        def step() -> None:
            sae_trainer.statistics.tokens_since_fired.zero_()
            sae_trainer.statistics.tokens_since_fired[:dead] = 10
            sae_trainer.step(x)

        print(json.dumps({"dense_above": share, "step_seconds": fastest(step, device)}))
    return True


CHECKS = {"ranks": check_ranks, "share": check_share, "auxk": check_auxk}

if __name__ == "__main__":
    sys.exit(int(not CHECKS[sys.argv[1]](sys.argv[2])))
