"""The cost model on sizes that can be worked out by hand, and the command that tells it."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.planning import cost
from trainer.planning.cost import CUDA, Machine, StepCost
from trainer.planning.estimate import main
from trainer.planning.sharding import Group, days_of, fewest_gpus, sharded_step
from trainer.planning.workload import blocks_parameters, step_costs, training_threads
from trainer.saes.encoder import BLOCK_BYTES, BLOCK_BYTES_ON_CPU
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "deploy" / "demo.toml")
GROWTH = str(ROOT / "tests" / "benchmarks" / "growth.toml")
TINY = StepCost("tiny", "topk", d_in=4, d_out=4, d_sae=10, batch=3, active=2, total_k=2)
UNIT = Machine("unit", matmul_flops=1.0, bandwidth=1.0, memory=1e9)
"""One FLOP and one byte a second: seconds are counts."""


def estimate_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def step_costs_of(*saes: dict[str, Any], width: int = 4, hooks: int = 1) -> list[StepCost]:
    model = {"name": "m", "hooks": [f"blocks.{number}.hook_resid_post" for number in range(hooks)]}
    settings = TrainerSettings.model_validate({"model": model, "optimizer": {"batch": 3}, "sae": list(saes)})
    return step_costs(settings, width, cost.HALF)


# Counting -------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_tiny_step_are_those_of_the_formulas() -> None:
    """B 3, d 4, n 10, k 2: 240 FLOPs of the product, 192 gathered bytes, 2 × 40 weights in the optimizer."""
    parts = cost.step_parts(TINY, UNIT)

    assert parts["encoder product"] == 2 * 3 * 4 * 10
    assert parts["sparse products"] == pytest.approx(0.85 * 4 * (3 * 2) * 4 * 2)
    assert parts["optimizer"] == 40 * (4 + 4 + 28 + 2 + 4) + 40 * (4 + 4 + 28 + 2 + 8)  # 88 per d_in × d_sae
    assert parts["optimizer"] == 88 * 40
    assert parts["pre-activations"] == 3 * 2 * (3 * 10)
    assert cost.step_seconds(TINY, UNIT) == sum(parts.values())


def test_memory_is_four_bytes_a_parameter_and_eight_of_moments() -> None:
    """Two matrices of 40, ten biases, one of 4 outputs: 94 numbers."""
    parts = cost.memory_parts(TINY, cost.CPU)

    assert TINY.parameters == 94
    assert parts["parameters"] == 4 * 94
    assert parts["moments"] == 8 * 94
    assert parts["gradients"] == 4 * 94
    assert parts["bfloat16 copies"] == 2 * 80
    assert parts["pre-activations"] == 2 * 3 * 10  # the batch is smaller than a block


def test_an_optimizer_costs_what_its_registry_says() -> None:
    """Muon keeps half of Adam's moments, and multiplies 2 × 40 weights by [4, 4] twice; matching pursuit encodes k
    times; an annealed k is held in memory as large as it begins. Sums over SAEs of different kinds have all parts."""
    plain, muon, pursuit, annealed = step_costs_of(
        {"name": "plain", "architecture": "topk", "d_sae": 10, "k": 2},
        {"name": "muon", "architecture": "topk", "d_sae": 10, "k": 2, "optimizer": "muon"},
        {"name": "pursuit", "architecture": "matching_pursuit", "d_sae": 10, "k": 2},
        {"name": "annealed", "architecture": "topk", "d_sae": 10, "k": 2, "anneal_tokens": 9, "anneal_from": 7},
    )

    assert cost.memory_parts(muon, cost.CPU)["moments"] == 4 * 94
    assert cost.optimizer_flops(muon) == 2 * 2 * 80 * 4 and cost.optimizer_flops(plain) == 0
    assert cost.product_flops(pursuit) == 2 * cost.product_flops(plain)
    rows = [cost.memory_parts(sae, cost.CPU)["rows and entries"] for sae in (plain, annealed)]
    assert rows[1] - rows[0] == cost.ENTRY_MEMORY * 3 * (7 - 2)


def test_pre_activations_are_held_in_blocks() -> None:
    """So much at a time as the SAEs themselves hold, or 256 tokens."""
    (sae,) = step_costs_of({"name": "a", "architecture": "topk", "d_sae": 2**15, "k": 2})
    wide = StepCost("wide", "topk", 4, 4, 2**15, 4096, 2, 2)

    assert cost.memory_parts(sae, cost.CPU)["pre-activations"] == 2 * 3 * 2**15
    assert cost.memory_parts(wide, cost.CPU)["pre-activations"] == 2**24
    assert (cost.CPU.block_bytes, cost.CUDA.block_bytes) == (BLOCK_BYTES_ON_CPU, BLOCK_BYTES)


def test_what_is_written_to_disk_has_the_size_of_its_numbers() -> None:
    """A snapshot: matrices, biases, perhaps a threshold; a checkpoint: weights, moments, two counters."""
    assert cost.snapshot_bytes(TINY) == 4 * (80 + 20 + 4)
    assert cost.checkpoint_bytes(TINY) == 12 * 94 + 16 * 10
    assert cost.buffer_bytes(100, [4, 4], 2) == 100 * (16 + 24)


@pytest.mark.parametrize("field", ["d_sae", "d_in", "batch", "active", "total_k"])
@pytest.mark.parametrize("machine", [UNIT, cost.MACHINES["h200"]])
def test_more_of_anything_is_never_faster(field: str, machine: Machine) -> None:
    sizes = [StepCost(**{**vars(TINY), field: getattr(TINY, field) * factor}) for factor in (1, 2, 4, 8)]
    seconds = [cost.step_seconds(size, machine) for size in sizes]

    assert seconds == sorted(seconds)


def test_an_sae_costs_what_its_settings_ask_for() -> None:
    """A tied SAE has one matrix, a crosscoder reads two hooks, Multi-TopK has 5 k, a transcoder keeps no norms."""
    first, second = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
    plain, tied, cross, multi, trans = step_costs_of(
        {"name": "plain", "architecture": "topk", "d_sae": 32, "k": 2, "hook": first},
        {"name": "tied", "architecture": "tied", "d_sae": 32, "sparsity_weight": 1.0, "hook": first},
        {"name": "cross", "architecture": "topk", "d_sae": 32, "k": 2, "hooks": [first, second]},
        {"name": "multi", "architecture": "topk", "d_sae": 32, "k": 2, "hook": first, "multi_topk": 0.125},
        {"name": "trans", "architecture": "topk", "d_sae": 32, "k": 2, "hook": first, "target": second, "skip": True},
        hooks=2,
    )

    assert (tied.encoder, tied.decoder) == (0, 128)
    assert (cross.d_in, cross.d_out) == (8, 8)
    assert (plain.active, multi.active) == (2, 10)
    assert trans.parameters == plain.parameters + 16
    assert cost.optimizer_bytes(trans) == 128 * 38 * 2
    assert tied.l0_is_assumed and not plain.l0_is_assumed


# Sharded --------------------------------------------------------------------------------------------------------------


def test_sharded_latents_divide_the_weights_and_not_the_rows() -> None:
    """On four GPUs: a quarter of product and Adam each; one activation's candidates of three others; sums in a ring."""
    machine = Machine("gpu", 1.0, 1.0, 1e9, CUDA, link=1.0, network=1.0)
    sae = StepCost("sae", "topk", 4, 4, 64, 3, 2, 2)
    one, four = (sharded_step([sae], machine, gpus, token_bytes=8) for gpus in (1, 4))

    for part in ("encoder product", "optimizer", "pre-activations"):
        assert four.seconds[part] == one.seconds[part] / 4
    assert one.bytes["rows in"] == sum(one.bytes.values()) == 3 * 8
    assert four.bytes["rows in"] == four.bytes["activations"] == 3 * 8
    assert four.bytes["candidates"] == 3 * (2 * 8)
    assert four.bytes["reconstructions"] == 2 * 3 / 4 * (4 * 3 * 4)
    assert four.seconds["reconstructions"] == 2 * 3 / 4 * 48


def test_the_fewest_gpus_hold_the_weights_and_meet_the_days() -> None:
    """18 bytes a weight and 2²⁴ × 4096 × 2 of them are 2.5 TB: 8 GPUs of 141 GB are too few, 24 are enough."""
    machine = cost.MACHINES["h200"]
    sae = StepCost("sae", "topk", 4096, 4096, 2**24, 16384, 64, 64)
    by_memory = fewest_gpus([Group([sae], 8192)], machine, None, None)
    in_three_days = fewest_gpus([Group([sae], 8192)], machine, 40_000_000_000, 3.0)

    assert by_memory is not None and in_three_days is not None
    assert not sharded_step([sae], machine, 8, 8192).fits
    assert by_memory.gpus == 24
    assert in_three_days.gpus > by_memory.gpus
    assert days_of(40_000_000_000, [sae], in_three_days.step_seconds) <= 3.0


# The command ----------------------------------------------------------------------------------------------------------


def test_several_saes_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's two SAEs on two numbers given by hand; tokens/s are the batch over their sum."""
    estimate = estimate_of(capsys, DEMO, "optimizer.device=cpu", "--matmul-tflops", "2", "--bandwidth-gbs", "20")
    each = [sae["step_seconds"] for sae in estimate["saes"].values()]

    assert list(estimate["saes"]) == ["topk", "jumprelu"]
    assert estimate["step_seconds"] == pytest.approx(sum(each))
    assert estimate["tokens_per_second"] == pytest.approx(2048 / sum(each))
    assert estimate["saes"]["topk"]["seconds"]["encoder product"] == pytest.approx(2 * 2048 * 256 * 4096 / 2e12)
    assert estimate["wire_bytes_per_token"] == 2 * 256
    assert estimate["memory"]["parameters"] == 4 * sum(sae["parameters"] for sae in estimate["saes"].values())
    assert estimate["memory"]["buffer"] == 131_072 * (2 * 256 + 24)


def test_many_saes_have_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    """A grid of eighteen: a column for each would be wider than any terminal."""
    grid = Path(__file__).parent.parent / "deploy" / "scaling.toml"
    main([str(grid), "--matmul-tflops", "2", "--bandwidth-gbs", "20"])
    lines = capsys.readouterr().out.splitlines()

    assert sum("topk-" in line and "largest" not in line for line in lines) == 18
    assert max(map(len, lines)) <= 80


def test_the_slower_side_is_told_with_how_many_producers_balance_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's model has two blocks up to its hook: 4 × 256² of attention and 3 × 256 × 768 weights in each."""
    arguments = (DEMO, "optimizer.device=cpu", "--matmul-tflops", "2", "--bandwidth-gbs", "20")
    estimate = estimate_of(capsys, *arguments)
    main(list(arguments))
    text = " ".join(capsys.readouterr().out.split())

    assert blocks_parameters(ROOT / "producer" / "demo_lm", [1]) == 2 * (4 * 256**2 + 3 * 256 * 768)
    assert estimate["producers"] == pytest.approx(
        estimate["tokens_per_second"] / estimate["producer_tokens_per_second"]
    )
    assert estimate["producers"] < 1
    assert "The trainer is the slower side" in text
    assert "The largest part of a step: " in text


def test_a_run_lasts_as_long_as_its_last_line_says(capsys: pytest.CaptureFixture[str]) -> None:
    """On one machine the language model and the SAEs take turns: the seconds of a token add up."""
    arguments = (DEMO, "optimizer.device=cpu", "model.device=cpu", "--matmul-tflops", "2", "--bandwidth-gbs", "20")
    estimate = estimate_of(capsys, *arguments, "run.tokens=3_000_000")
    main([*arguments, "run.tokens=3_000_000"])
    text = " ".join(capsys.readouterr().out.split())

    turns = 1 / estimate["tokens_per_second"] + 1 / estimate["producer_tokens_per_second"]
    assert 86400 * estimate["days"] == pytest.approx(3_000_000 * turns)
    assert f"Where the two share one machine: {1 / turns:,.0f} tokens/s" in text
    assert "for 3,000,000 tokens, on one machine" in text and "with enough producers on others" in text


def test_what_comes_too_late_is_told_before_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [DEMO, "optimizer.device=cpu", "--matmul-tflops", "2", "--bandwidth-gbs", "20", "run.tokens=60_000"]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())

    assert "optimizer.warmup_tokens = 100_000 is longer than run.tokens = 60_000: the learning rate never" in text


def test_what_was_never_measured_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [GROWTH, "--width", "4096", "--machine", "h200", "--gpus", "24"]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    estimate = estimate_of(capsys, *arguments)

    assert "NCCL over several GPUs is untested" in text
    assert estimate["sharded"]["gpus"] == 24 and estimate["sharded"]["fits"]
    assert estimate["sharded"]["bytes"]["rows in"] == 131_072 * 4096 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((DEMO, "--machine", "h300"), '--machine "h300" is not known; there are h200, h100, a100'),
        ((DEMO, "--matmul-tflops", "2"), "give both"),
        ((DEMO, "--machine", "h200", "--bandwidth-gbs", "2"), "remove one"),
        ((DEMO, "--gpus", "8"), "need --machine"),
        ((DEMO, "--machine", "h200", "--gpus", "0"), "one at least"),
        ((DEMO, "--machine", "h200", "optimizer.matmul=float32"), "data sheet for bfloat16"),
        ((GROWTH, "--machine", "h200"), "add --width"),
        (("nowhere.toml",), "run file nowhere.toml does not exist"),
        ((DEMO, "sae.topk.kk=3"), "no such key"),
    ],
)
def test_what_is_missing_is_named(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 and what to do, on stderr."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    assert main(list(arguments)) == 2
    assert message in capsys.readouterr().err


def test_this_machine_is_measured_in_a_few_seconds() -> None:
    """The whole command, on a small run: two positive numbers, and an answer."""
    command = [sys.executable, "-m", "trainer", "estimate", DEMO, "optimizer.device=cpu", "--json"]
    machine = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)

    assert machine["machine"]["name"].startswith("this machine, ")
    assert machine["machine"]["matmul_flops"] > 1e9 and machine["machine"]["bandwidth"] > 1e8
    assert 1 < machine["tokens_per_second"] < 1e7


def test_help_and_faults_answer_without_torch() -> None:
    """`--help` comes soon, because nothing heavy is imported for it."""
    code = "import sys, trainer.planning.estimate; print('torch' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    command = [sys.executable, "-X", "importtime", "-m", "trainer", "estimate", "--help"]
    help_ = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert process.stdout.strip() == "False"
    assert help_.returncode == 0
    assert not re.search(r"\| +torch$", help_.stderr, re.MULTILINE)


def test_threads_are_those_that_learn_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """On eight cores: one SAE with run.threads = 2 uses two, four of them all eight, three without it 2 × 3."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def threads(saes: int, each: int | None) -> int:
        tables = [{"name": f"s{n}", "architecture": "topk", "d_sae": 8, "k": 2} for n in range(saes)]
        run = {} if each is None else {"threads": each}
        model = {"name": "m", "hooks": ["h"]}
        return training_threads(TrainerSettings.model_validate({"run": run, "model": model, "sae": tables}))

    assert (threads(1, 2), threads(4, 2), threads(3, None), threads(1, None)) == (2, 8, 6, 8)


def start_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert (
        main([GROWTH, "--width", "4096", "--machine", "h200", "--model-parameters", "4e9", "--json", *arguments]) == 0
    )
    return json.loads(capsys.readouterr().out)


def test_the_commands_that_start_a_large_run(capsys: pytest.CaptureFixture[str]) -> None:
    """24 ranks on 3 machines of 8, and as many producers as their rate asks for."""
    estimate = start_of(capsys, "--gpus", "24")
    start = estimate["start"]

    assert (start["ranks"], start["machines"], start["intakes"]) == (24, 3, 1)
    assert start["trainer"].startswith("torchrun --nnodes 3 --rdzv-endpoint HOST:29500 --nproc-per-node 8 ")
    assert start["trainer"].endswith(f"-m trainer {GROWTH}")
    assert start["producers"] == math.ceil(estimate["tokens_per_second"] / estimate["producer_tokens_per_second"])
    assert start["fault"] is None


def test_one_machine_and_one_process_are_started_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_of(capsys, "--gpus", "8")["start"]["trainer"].startswith("torchrun --standalone --nproc-per-node 8 ")
    assert "torchrun" not in start_of(capsys)["start"]["trainer"]


def test_a_stream_that_one_intake_cannot_take_bounds_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    """A small SAE on eight GPUs takes more than the 1.9 GB/s of one socket: the days follow from the socket."""
    small = start_of(capsys, "--gpus", "8", "sae.0.d_sae=65536", "run.tokens=40_000_000_000")
    intake_rate = 1.9e9 / (2 * 4096)

    assert small["tokens_per_second"] > intake_rate and small["start"]["intakes"] > 1
    assert small["start"]["intake_rate"] == pytest.approx(intake_rate)
    assert small["days"] == pytest.approx(40e9 / intake_rate / 86400)


SUITE = str(Path(__file__).parent.parent / "deploy" / "suite.toml")


def suite_estimate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([SUITE, "--width", "128", "--machine", "h200", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_groups_of_gpus_share_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    """Each trains some of the SAEs and gets their hooks alone; the slowest decides. A file for groups needs ranks."""
    groups = suite_estimate(capsys, "parallel.groups=4", "--gpus", "4")
    whole = suite_estimate(capsys, "--gpus", "1")

    names = [name for group in groups["groups"] for name in group["saes"]]
    assert len(groups["groups"]) == 4 and len(set(names)) == len(names) == 16
    slowest = max(group["step_seconds"] for group in groups["groups"])
    assert 1 / 4 <= slowest / whole["step_seconds"] < 1 / 3
    assert all(group["wire_bytes_per_token"] < whole["wire_bytes_per_token"] for group in groups["groups"])
    assert "--nproc-per-node 4" in groups["start"]["trainer"] and groups["start"]["fault"] is None
    assert "takes as many ranks for each group, and 1 was started" in suite_estimate(capsys, "parallel.groups=4")[
        "start"]["fault"]  # fmt: skip
    assert main([SUITE, "--width", "128", "--machine", "h200", "parallel.groups=4", "--gpus", "6"]) == 2
    assert "--gpus 6: parallel.groups = 4 take as many GPUs each; give a multiple of 4" in capsys.readouterr().err


def test_each_hook_has_its_part_of_wire_and_buffer(capsys: pytest.CaptureFixture[str]) -> None:
    """All hooks of a suite are as wide."""
    estimate = suite_estimate(capsys)

    assert estimate["hooks"]["count"] == 16
    assert 16 * estimate["hooks"]["wire_bytes_per_token"] == estimate["wire_bytes_per_token"]
    assert 16 * estimate["hooks"]["buffer"] == estimate["memory"].get("buffer", 16 * estimate["hooks"]["buffer"])
