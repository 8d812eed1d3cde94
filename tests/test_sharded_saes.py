"""SAEs whose latents are spread over ranks: the gradients, weights, statistics and bytes against one process.

Everything is float64 here but the comparison of values in selections, so that what differs is the order of sums alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from producer.settings import CorpusSettings, SyntheticSettings
from tests.small_ranks import SIZES, SmallRanks
from tests.small_saes import D_IN, FAMILY, HOOKS, UNSCALED, hook_widths, publish_sae, rows_of
from trainer.parallel.ranks import ALONE, Ranks
from trainer.planning.exchange import exchanged_bytes
from trainer.planning.workload import step_costs
from trainer.report import SaeReport
from trainer.saes.architectures.batchtopk import BatchTopK
from trainer.saes.architectures.jumprelu import JumpReLU
from trainer.saes.architectures.topk import FixedK
from trainer.saes.base import Sae
from trainer.saes.folding import Whitening
from trainer.saes.gradients import THROUGH_ENCODER
from trainer.saes.hooks import SaeHooks
from trainer.saes.initial import random_rows
from trainer.saes.settings import SHARED_PARAMETERS, SaeSettings
from trainer.saes.start import check_start, open_start, read_start
from trainer.settings import OptimizerSettings, ParallelSettings, TrainerSettings
from trainer.training.averaging import AverageWeights
from trainer.training.sae_trainer import SaeTrainer

D_SAE = 37
"""Divides by no number of ranks."""
STEPS, BATCH = 50, 64
THRESHOLD = "calibrated"
"""Name of BatchTopK's threshold beside tensors."""
GRADIENTS, WEIGHTS = 1e-12, 1e-9
"""Largest differences allowed, relative to the norm."""


@pytest.fixture(scope="module")
def small_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRanks]:
    with SmallRanks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


LACKING: dict[str, list[str]] = {
    "auxk": ["pre_act_weight"],
    "resample": ["k_aux", "pre_act_weight"],
    "none": ["k_aux", "pre_act_weight"],
}
"""Keys that mean nothing with a way of revival."""


@pytest.fixture(autouse=True)
def as_many_threads_as_ranks_have() -> Iterator[None]:
    """Bits of torch's products depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(name: str, **options: Any) -> dict[str, Any]:
    table = {"name": "s", "revive_tokens": 200, "dead_tokens": 200} | FAMILY[name] | options | {"d_sae": D_SAE}
    if "matryoshka" in table:
        table["matryoshka"] = [*table["matryoshka"][:-1], D_SAE]
    for key in LACKING.get(str(table.get("revive")), []):
        table.pop(key, None)
    return {key: value for key, value in table.items() if value is not None}


RESAMPLE: dict[str, Any] = {"revive": "resample"}
REINITIALISE: dict[str, Any] = {"revive": "none", "reinitialise_tokens": 300}
AUXK: dict[str, Any] = {"revive": "auxk", "k_aux": 4}
QUICK: dict[str, dict[str, Any]] = {
    "topk auxk": case("topk", k_aux=4),
    "topk abs": case("topk abs"),
    "topk auxk muon": case("topk skip transcoder", k_aux=4, optimizer="muon"),
    "gated signum, resampled": case("gated", optimizer="signum", **RESAMPLE),
    "topk multi matryoshka": case("topk multi", matryoshka=[4, 16, 32]),
    "topk skip transcoder, resampled": case("topk skip transcoder", **RESAMPLE),
    "batchtopk matryoshka auxk": case("batchtopk matryoshka", k_aux=3),
    "jumprelu pre_act": case("jumprelu"),
    "jumprelu auxk, averaged": case("jumprelu log", **AUXK, ema_tokens=500),
    "relu tanh crosscoder, reinitialised": case("relu crosscoder", penalty="tanh", **REINITIALISE),
    "relu l1 whitened": case("relu l1", whitening=True),
    "tied": case("tied", sparsity_weight=0.5),
    "gated auxk": case("gated", **AUXK),
    "repair": case("repair"),
}
"""One case for every mechanism that ranks have to agree on."""


def all_cases() -> dict[str, dict[str, Any]]:
    """Every kind of SAE with every way to revive its latents."""
    cases = {}
    for name in (name for name in FAMILY if name != "matching_pursuit"):
        for revival in [{}] if name in ("tied", "repair") else [{}, AUXK, RESAMPLE, REINITIALISE]:
            # A small p amplifies the last digits, so that they tell nothing after 50 steps.
            mild = {"anneal_tokens": 50_000} if name == "p_anneal" else {}
            cases[f"{name} {revival.get('revive', '')}".strip()] = case(name, **revival, **mild)
    penalised: dict[str, Any] = {"target_l0": None, "sparsity_weight": 0.5}
    cases["jumprelu l0"] = case("jumprelu", **penalised, penalty="l0")
    cases["jumprelu tanh, all lifted"] = case("jumprelu", **penalised, penalty="tanh", pre_act_on="all")
    return cases


# Training on ranks


def sae_trainer_of(ranks: Ranks, table: Mapping[str, Any], clip: float) -> SaeTrainer:
    """An SAE trainer in float64 with the first weights of one process, some of its latents hardly ever active."""
    settings = SaeSettings.of(**table)
    optimizer = OptimizerSettings(learning_rate=1e-2, warmup_tokens=0, clip=clip)
    hooks, widths = SaeHooks.from_settings(settings, HOOKS), hook_widths(settings)

    def initialised(ranks: Ranks) -> SaeTrainer:
        sae_trainer = SaeTrainer(
            settings, optimizer, hooks, widths, torch.device("cpu"), torch.float64, run_tokens=100_000, ranks=ranks
        )
        sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED)
        return sae_trainer

    sae, sae_trainer = initialised(ALONE).sae, initialised(ranks)
    silence_some(sae)
    weights = {name: value.double() for name, value in sae.parameters.items()}
    sae_trainer.sae.parameters = {name: value.clone() for name, value in sae_trainer.sae.rows_of_rank(weights).items()}
    sae_trainer._reset_optimizer(sae_trainer.statistics.reference.double())
    if sae_trainer._average is not None:
        sae_trainer._average = AverageWeights(sae_trainer.sae.parameters, 500)
    if (whitening := sae_trainer._whitening) is not None:
        parts = (whitening.centre, whitening.matrix, whitening.inverse)
        sae_trainer._whitening = Whitening(*(part.double() for part in parts))
    return sae_trainer


def silence_some(sae: Sae) -> None:
    """Changes every fourth latent such that it is hardly ever active."""
    silent = torch.tensor([latent % 4 == 1 for latent in sae.latents])
    if isinstance(sae, FixedK | JumpReLU):  # small, but above zero: AuxK has something to work with
        sae.W_enc[silent] *= 0.05
        sae.b_enc[silent] = 0.0
    else:
        sae.b_enc[silent] = -50.0


def batch_of(settings: SaeSettings, seed: int) -> dict[str, Tensor]:
    return {hook: rows.double() for hook, rows in rows_of(settings, BATCH, seed).items()}


Trained = tuple[dict[str, Tensor], dict[str, Tensor], SaeReport]


def train(ranks: Ranks, table: Mapping[str, Any], fault: str | None = None) -> Trained:
    """(gradients of the last step, tensors after it, report), of the latents of this rank."""
    sae_trainer = sae_trainer_of(ranks, table, clip=0.05)
    if fault is not None:
        FAULTS[fault][1](sae_trainer)
    gradients: dict[str, Tensor] = {}
    sum_shared = sae_trainer.sae.sum_shared

    def remember(grads: dict[str, Tensor]) -> None:
        sum_shared(grads)
        assert THROUGH_ENCODER not in grads
        gradients.clear()
        gradients.update({name: value.clone() for name, value in grads.items()})

    sae_trainer.sae.sum_shared = remember  # type: ignore[method-assign]
    for step in range(1, STEPS + 1):
        sae_trainer.step(batch_of(sae_trainer.settings, step))
    return gradients, tensors_of(sae_trainer), sae_trainer.report(UNSCALED)


def tensors_of(sae_trainer: SaeTrainer) -> dict[str, Tensor]:
    """Weights, moments, averages and counters by name; names of shared ones end in one of SHARED_PARAMETERS."""
    _, tensors = sae_trainer.state()
    by_part = {
        "weight": tensors.parameters,
        **tensors.optimizer.moments,
        "ema": tensors.ema,
        "statistics": {
            "tokens_since_fired": tensors.statistics.tokens_since_fired,
            "firings": tensors.statistics.firings,
        },
    }
    return {f"{part} {name}": value.clone() for part, of in by_part.items() for name, value in of.items()}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all latents; those that are shared must be equal on all ranks."""
    whole = {}
    for name in parts[0]:
        if name.split()[-1] in (*SHARED_PARAMETERS, THRESHOLD):
            assert all(torch.equal(part[name], parts[0][name]) for part in parts), name
            whole[name] = parts[0][name]
        else:
            whole[name] = torch.cat([part[name] for part in parts])
    return whole


def difference(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    return max(
        float((ours[name].double() - value).norm() / (value.double().norm() + 1e-30)) for name, value in theirs.items()
    )


def assert_parity(
    small_ranks: SmallRanks, table: Mapping[str, Any], sizes: tuple[int, ...], fault: str | None = None
) -> None:
    gradients, tensors, report = train(ALONE, table)
    for size in sizes:
        parts = small_ranks.run(train, size, table, fault)
        assert difference(joined([part[0] for part in parts]), gradients) <= GRADIENTS
        assert difference(joined([part[1] for part in parts]), tensors) <= WEIGHTS
        for part in parts:
            assert_same_report(part[2], report)


def assert_same_report(ours: SaeReport, theirs: SaeReport) -> None:
    """Counts are equal, numbers to nine digits."""
    for name, value in vars(theirs).items():
        expected = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        if isinstance(value, dict):
            expected = {key: pytest.approx(number, rel=1e-9) for key, number in value.items()}
        assert getattr(ours, name) == expected, name


@pytest.mark.parametrize("name", QUICK)
def test_ranks_train_the_sae_of_one_process(small_ranks: SmallRanks, name: str) -> None:
    """After 50 steps with clipping in force: gradients, weights, moments, averages, counters and report."""
    assert_parity(small_ranks, QUICK[name], (SIZES[list(QUICK).index(name) % 2],))


@pytest.mark.proof
@pytest.mark.parametrize("name", all_cases())
def test_ranks_train_every_sae_of_one_process(small_ranks: SmallRanks, name: str) -> None:
    """The same for every kind of SAE and every way of revival, on 2 and 4 ranks."""
    assert_parity(small_ranks, all_cases()[name], SIZES)


# First weights


@pytest.mark.parametrize("name", ["topk", "topk skip transcoder", "jumprelu crosscoder", "relu l1_norm", "gated"])
@pytest.mark.parametrize("directions", ["random", "data"])
def test_ranks_draw_the_first_weights_of_one_process(name: str, directions: str) -> None:
    """The same numbers whichever rows a rank holds; biases from products in float32, whose last digit depends on it."""
    table = case(name, initial_directions=directions)
    whole = first_weights(ALONE, table)

    for size in (2, 3, 4):
        parts = [first_weights(Ranks(rank, size, None, latents_per_unit=1), table) for rank in range(size)]
        for weight, value in joined(parts).items():
            if weight == "b_enc":
                torch.testing.assert_close(value, whole[weight], rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(value, whole[weight]), weight


def first_weights(ranks: Ranks, table: Mapping[str, Any]) -> dict[str, Tensor]:
    settings = SaeSettings.of(**table)
    hooks = SaeHooks.from_settings(settings, HOOKS)
    sae_trainer = SaeTrainer(
        settings, OptimizerSettings(), hooks, hook_widths(settings), torch.device("cpu"), torch.float32, ranks=ranks
    )
    sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED)
    return sae_trainer.sae.parameters


def test_random_rows_are_those_of_one_draw() -> None:
    """However many rows there are beyond a chunk, and at whichever of them a rank begins."""
    for rows, width in ((9000, 3), (4097, 1), (8200, 2), (10, 4)):
        expected = torch.randn(rows, width, generator=torch.Generator().manual_seed(3))
        for held in (range(rows), range(rows // 3, rows), range(5, min(rows, 4100))):
            drawn = random_rows(rows, width, torch.Generator().manual_seed(3), held)
            assert torch.equal(drawn, expected[held.start : held.stop])


# Planted faults


def norm_of_own_latents(sae_trainer: SaeTrainer) -> None:
    sae_trainer.optimizer._ranks = ALONE


def b_dec_summed_over_ranks(sae_trainer: SaeTrainer) -> None:
    sae = sae_trainer.sae

    def sum_shared(grads: dict[str, Tensor]) -> None:
        grads["b_dec"] += grads.pop(THROUGH_ENCODER)[0]
        sae.ranks.sum(grads["b_dec"], "sums")

    sae.sum_shared = sum_shared  # type: ignore[method-assign]


def b_dec_without_other_ranks(sae_trainer: SaeTrainer) -> None:
    def sum_shared(grads: dict[str, Tensor]) -> None:
        grads["b_dec"] += grads.pop(THROUGH_ENCODER)[0]

    sae_trainer.sae.sum_shared = sum_shared  # type: ignore[method-assign]


def k_aux_on_each_rank(sae_trainer: SaeTrainer) -> None:
    sae_trainer.sae.choose_largest = (  # type: ignore[method-assign]
        lambda candidates, k, latent: candidates.with_value(candidates.value.relu())
    )


def l0_of_own_latents(sae_trainer: SaeTrainer) -> None:
    sae_trainer.statistics._ranks = ALONE


def penalty_of_own_latents(sae_trainer: SaeTrainer) -> None:
    sae, whole_sum = sae_trainer.sae, sae_trainer.sae.ranks.sum
    sae.ranks.sum = lambda tensor, purpose: tensor if purpose == "scalars" else whole_sum(tensor, purpose)  # type: ignore[method-assign]


def places_in_another_order(sae_trainer: SaeTrainer) -> None:
    ranks = sae_trainer.sae.ranks
    counts = ranks.counts
    ranks.counts = lambda number, purpose="scalars": counts(number, purpose)[::-1]  # type: ignore[method-assign]


FAULTS: dict[str, tuple[str, Callable[[SaeTrainer], None]]] = {
    "the norm is not summed over ranks": ("relu l1 whitened", norm_of_own_latents),
    "b_dec counts once for each rank": ("relu l1 whitened", b_dec_summed_over_ranks),
    "b_dec learns from the encoder of one rank": ("relu l1 whitened", b_dec_without_other_ranks),
    "AuxK has k_aux latents on each rank": ("jumprelu auxk, averaged", k_aux_on_each_rank),
    "a statistic is that of one rank": ("relu l1 whitened", l0_of_own_latents),
    "the pull on L0 is that of one rank": ("jumprelu pre_act", penalty_of_own_latents),
    "two ranks point latents at one activation": ("relu tanh crosscoder, reinitialised", places_in_another_order),
}
"""By what is wrong: the case that shows it, and the change to an SAE trainer on each rank."""


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(small_ranks: SmallRanks, fault: str) -> None:
    """Each makes the comparison with one process fail."""
    with pytest.raises(AssertionError):
        assert_parity(small_ranks, QUICK[FAULTS[fault][0]], (2,), fault)


# First weights from a published SAE


def started(ranks: Ranks, table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of an SAE that begins with the weights of `start_from`, after three steps."""
    settings = SaeSettings.of(**table)
    hooks, optimizer = SaeHooks.from_settings(settings, HOOKS), OptimizerSettings(learning_rate=1e-3)
    sae_trainer = SaeTrainer(
        settings, optimizer, hooks, hook_widths(settings), torch.device("cpu"), torch.float32, ranks=ranks
    )
    sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED, open_start(settings))
    for step in range(1, 4):
        sae_trainer.step(rows_of(settings, BATCH, step))
    return tensors_of(sae_trainer)


@pytest.mark.parametrize(("published", "name"), [("topk", "topk"), ("relu l1", "repair")])
def test_ranks_go_on_from_a_published_sae(small_ranks: SmallRanks, published: str, name: str, tmp_path: Path) -> None:
    """Each takes its latents of the one file; with fixed blocks they train as one process does, to the bit."""
    torch.manual_seed(0)
    source = SaeSettings.of(**case(published))
    widths, hooks = hook_widths(source), SaeHooks.from_settings(source, HOOKS)
    first = SaeTrainer(source, OptimizerSettings(), hooks, widths, torch.device("cpu"), torch.float32)
    rows = rows_of(source, 256, 3)
    first.initialise(rows, UNSCALED)
    transform, rate = first.input_transform(UNSCALED), first.statistics.firing_rate()
    folder = publish_sae(tmp_path / "run", first.sae, transform, rate, rows["a"], {"hook_name": "a"})

    table = case(name) | {"start_from": str(folder)}
    expected = started(Ranks(0, 1, None, blocks=8, latents_per_unit=1), table)
    for size in SIZES:
        whole = joined(small_ranks.run(started, size, table, blocks=8))
        assert sha256(whole) == sha256(expected)


# Memory at the start

MANY, SAMPLE = 65_536, 16
"""Latents, and activations that first weights are drawn from."""


class LargestTensor(TorchDispatchMode):
    """Remembers how many numbers the largest float tensor has that an operation has made; views are no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not function.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return result


def largest_at_start(ranks: Ranks, table: Mapping[str, Any]) -> int:
    """Numbers in the largest tensor of an SAE's beginning: its first weights, or those of `start_from`, looked at."""
    settings = SaeSettings.of(**table)
    hooks, widths, rows = SaeHooks.from_settings(settings, HOOKS), hook_widths(settings), rows_of(settings, SAMPLE, 0)
    with LargestTensor() as largest:
        sae_trainer = SaeTrainer(
            settings, OptimizerSettings(), hooks, widths, torch.device("cpu"), torch.float32, ranks=ranks
        )
        if ranks.rank == 0 and (start := read_start(settings)) is not None:
            check_start(start, sae_trainer.sae, sae_trainer.input_transform(UNSCALED))
        sae_trainer.initialise(rows, UNSCALED, open_start(settings))
    return largest.numbers


@pytest.mark.parametrize("directions", ["random", "data"])
def test_no_rank_draws_a_whole_sae(directions: str) -> None:
    """The largest tensor of the beginning is the encoder's share of the rank, whatever rank it is."""
    table = case("topk", initial_directions=directions) | {"d_sae": MANY}

    assert largest_at_start(ALONE, table) == MANY * D_IN
    for rank in range(4):
        assert largest_at_start(Ranks(rank, 4, None, latents_per_unit=1), table) == MANY // 4 * D_IN


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_no_rank_reads_a_whole_sae(small_ranks: SmallRanks, name: str, tmp_path: Path) -> None:
    """Rank 0 looks at all weights before the others are told, a few latents at a time."""
    folder = tmp_path / "start"
    torch.manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(MANY, D_IN))
    weights = {"W_enc": torch.randn(D_IN, MANY), "W_dec": W_dec, "b_enc": torch.zeros(MANY), "b_dec": torch.ones(D_IN)}
    folder.mkdir()
    save_file(weights, folder / "sae_weights.safetensors")
    table = case(name) | {"d_sae": MANY, "start_from": str(folder)}
    cfg = {"architecture": "topk", "k": table["k"], "rescale_acts_by_decoder_norm": True}
    (folder / "cfg.json").write_text(json.dumps(cfg))

    assert small_ranks.run(largest_at_start, 4, table) == [MANY // 4 * D_IN] * 4


# Fixed blocks


def train_in_float32(ranks: Ranks, table: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors after 30 steps from the first weights that ranks draw themselves."""
    settings = SaeSettings.of(**table)
    hooks, optimizer = SaeHooks.from_settings(settings, HOOKS), OptimizerSettings(learning_rate=1e-2, clip=0.05)
    sae_trainer = SaeTrainer(
        settings, optimizer, hooks, hook_widths(settings), torch.device("cpu"), torch.float32, ranks=ranks
    )
    sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED)
    silence_some(sae_trainer.sae)
    for step in range(1, 31):
        sae_trainer.step(rows_of(settings, BATCH, step))
    sae_trainer.calibrate(sae_trainer.sae, rows_of(settings, BATCH, 1000))
    if isinstance(sae_trainer.sae, BatchTopK):
        return tensors_of(sae_trainer) | {THRESHOLD: torch.tensor(sae_trainer.sae.threshold)}
    return tensors_of(sae_trainer)


def sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def assert_same_bits(small_ranks: SmallRanks, table: Mapping[str, Any]) -> None:
    """sha256 of all weights, moments and counters after 30 steps on 1, 2 and 4 ranks."""
    alone = Ranks(0, 1, None, blocks=8, latents_per_unit=1)
    expected = sha256(train_in_float32(alone, table))

    for size in SIZES:
        assert sha256(joined(small_ranks.run(train_in_float32, size, table, blocks=8))) == expected


@pytest.mark.parametrize("name", [name for name in QUICK if "auxk" in name or "re" in name])
def test_eight_blocks_give_the_same_bits_on_any_number_of_ranks(small_ranks: SmallRanks, name: str) -> None:
    """With each selection, penalty and way of revival."""
    assert_same_bits(small_ranks, QUICK[name])


@pytest.mark.proof
@pytest.mark.parametrize("name", all_cases())
def test_eight_blocks_give_the_same_bits_for_every_sae(small_ranks: SmallRanks, name: str) -> None:
    """The same for every kind of SAE and every way of revival."""
    assert_same_bits(small_ranks, all_cases()[name])


# Bytes


def received_in_a_step(ranks: Ranks, table: Mapping[str, Any]) -> list[dict[str, int]]:
    """Bytes that this rank receives in its second and in its third step, by purpose."""
    settings = SaeSettings.of(**table)
    hooks, optimizer = SaeHooks.from_settings(settings, HOOKS), OptimizerSettings(learning_rate=1e-3)
    sae_trainer = SaeTrainer(
        settings, optimizer, hooks, hook_widths(settings), torch.device("cpu"), torch.float32, ranks=ranks
    )
    sae_trainer.initialise(rows_of(settings, 256, 0), UNSCALED)
    steps = []
    for step in (1, 2, 3):
        ranks.traffic.received_bytes.clear()
        sae_trainer.step(rows_of(settings, BATCH - 1, step))
        steps.append(dict(ranks.traffic.received_bytes))
    return steps[1:]


@pytest.mark.parametrize(("blocks", "exchange"), [(1, "float32"), (8, "float32"), (1, "bfloat16"), (8, "bfloat16")])
@pytest.mark.parametrize("size", SIZES)
def test_a_step_receives_the_bytes_that_are_planned(
    small_ranks: SmallRanks, size: int, blocks: int, exchange: str
) -> None:
    """To the byte and by purpose, of a batch that is no multiple of the ranks, before latents are dead."""
    for name in ("topk", "topk multi", "batchtopk matryoshka", "jumprelu", "relu crosscoder", "tied", "gated"):
        table = case(name, revive_tokens=10_000, optimizer="muon" if name == "topk" else "adam")
        (planned,) = planned_bytes(table, size, blocks, exchange)

        for steps in small_ranks.run(received_in_a_step, size, table, blocks=blocks, exchange=exchange):
            assert steps == [planned] * 2, name


def test_bfloat16_halves_the_exchange_of_reconstructions() -> None:
    """Of a batch that is a multiple of the ranks; nothing else changes."""
    table = case("topk")
    (exact,), (rounded,) = (planned_bytes(table, 4, 1, exchange, BATCH) for exchange in ("float32", "bfloat16"))

    assert exact["reconstructions"] == 2 * 3 / 4 * 4 * D_IN * BATCH
    assert rounded == exact | {"reconstructions": exact["reconstructions"] // 2}


# Reconstructions in bfloat16


@pytest.mark.parametrize("name", ["topk auxk", "batchtopk matryoshka auxk"])
def test_bfloat16_between_ranks_costs_little(small_ranks: SmallRanks, name: str) -> None:
    """After 50 steps FVU is that of one process within one percent, L0 and latents alive too; ranks have one b_dec."""
    _, _, expected = train(ALONE, QUICK[name])

    parts = small_ranks.run(train, 4, QUICK[name], exchange="bfloat16")
    joined([part[1] for part in parts])
    for _, _, report in parts:
        assert report.fvu == pytest.approx(expected.fvu, rel=0.01)
        assert report.l0 == pytest.approx(expected.l0, rel=0.01)


def test_bfloat16_in_blocks_gives_the_same_bits_on_any_number_of_ranks(small_ranks: SmallRanks) -> None:
    """Each block is rounded once, and their sum: on one rank too."""
    alone = Ranks(0, 1, None, blocks=8, latents_per_unit=1, exchange="bfloat16")
    expected = sha256(train_in_float32(alone, QUICK["topk auxk"]))

    for size in SIZES:
        parts = small_ranks.run(train_in_float32, size, QUICK["topk auxk"], blocks=8, exchange="bfloat16")
        assert sha256(joined(parts)) == expected


def planned_bytes(
    table: Mapping[str, Any], ranks: int, blocks: int, exchange: str = "float32", batch: int = BATCH - 1
) -> list[dict[str, int]]:
    """By purpose, without those of nothing."""
    settings = SaeSettings.of(**table)
    widths = hook_widths(settings)
    run = TrainerSettings(
        corpus=CorpusSettings(kind="synthetic", synthetic=SyntheticSettings(d_in=D_IN, features=24)),
        optimizer=OptimizerSettings(batch=batch, device="cpu"),
        parallel=ParallelSettings.model_validate({"exchange": exchange}),
        sae=[settings.model_copy(update={"hook": None, "hooks": None, "target": None})],
    )
    width = sum(widths.values()) if settings.hooks else widths["a"]
    costs = step_costs(run, width, number_bytes=4)
    return [{purpose: size for purpose, size in exchanged_bytes(cost, ranks, blocks).items() if size} for cost in costs]
