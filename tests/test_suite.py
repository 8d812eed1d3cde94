"""A suite of SAEs from one stream: tables that stand for an SAE of each layer, and what one SAE of it equals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from producer.common.hook_ranges import expand_ranges
from producer.common.run_file import read_run_file, settings_from
from producer.common.toml import SettingsError
from producer.settings import ProducerSettings
from producer.wire import Hook
from tests.small_run import by_key
from tests.test_run import hello
from trainer.saes.patterns import expand_sae, names_matching
from trainer.settings import TrainerSettings
from trainer.stream.buffer import Batch
from trainer.training.run import Run

SUITE = Path(__file__).parent.parent / "deploy" / "suite.toml"
LAYERS, WIDTH = range(2), 6
HOOKS = [f"blocks.{layer}.hook_{site}" for site in ("mlp_in", "mlp_out") for layer in LAYERS]


# Patterns


def test_a_range_of_layers_is_a_list_of_hooks() -> None:
    assert expand_ranges(["embed", "blocks.{9..11}.hook_z[3]"]) == [
        "embed", "blocks.9.hook_z[3]", "blocks.10.hook_z[3]", "blocks.11.hook_z[3]",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="goes from 3 to 2; write the lower layer first"):
        expand_ranges(["blocks.{3..2}.hook_z"])


def test_a_table_is_an_sae_of_each_layer() -> None:
    """The target has the layer of the hook, start_from too, and the name gets it at its star or its end."""
    table = {
        "name": "mlp",
        "hook": "blocks.*.hook_mlp_in",
        "target": "blocks.*.hook_mlp_out",
        "start_from": "old/mlp.*",
    }

    assert expand_sae(table, HOOKS) == [
        {"name": f"mlp.{n}", "hook": HOOKS[n], "target": HOOKS[2 + n], "start_from": f"old/mlp.{n}"} for n in LAYERS
    ]
    assert [one["name"] for one in expand_sae(table | {"name": "layer-*-mlp"}, HOOKS)] == ["layer-0-mlp", "layer-1-mlp"]
    plain = {"name": "mlp", "hook": HOOKS[0]}
    assert expand_sae(plain, HOOKS) == [plain]


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        ("blocks.*.hook_z", 'sae "s": "blocks.*.hook_z" matches no hook that is streamed; model.hooks has blocks.0'),
        ("blocks.*.hook_*", "more than one"),
    ],
)
def test_a_pattern_that_means_nothing_is_refused(hook: str, message: str) -> None:
    table = {"name": "s", "architecture": "topk", "d_sae": 8, "k": 2, "hook": hook}
    with pytest.raises(SettingsError) as error:
        settings_from(TrainerSettings, {"model": {"name": "m", "hooks": HOOKS}, "sae": [table]})
    assert message in str(error.value)


def test_names_of_a_command_may_be_patterns() -> None:
    assert names_matching("mlp.*", ["mlp.0", "resid.0", "mlp.1"]) == ["mlp.0", "mlp.1"]
    assert names_matching("mlp.0", ["resid.0"]) == ["mlp.0"], "a plain name is looked up, and missed, elsewhere"


def test_the_suite_of_the_demo_is_sixteen_saes() -> None:
    """Both processes read the same sixteen hooks; an override of a table is one of all its layers."""
    settings = read_run_file(TrainerSettings, SUITE, ["sae.mlp.k=8"])
    model = read_run_file(ProducerSettings, SUITE, []).model

    assert model is not None and model.hooks == settings.hooks and len(settings.hooks) == 16
    assert len(settings.sae) == 16
    assert [sae.name for sae in settings.sae[-4:]] == [f"transcoder.{layer}" for layer in range(4)]
    assert {sae.target for sae in settings.sae if sae.skip} == {f"blocks.{layer}.hook_mlp_out" for layer in range(4)}
    assert [getattr(sae, "k", None) for sae in settings.sae if sae.name.startswith("mlp.")] == [8] * 4


# Training


def run_of(directory: Path, *tables: dict[str, Any]) -> Run:
    document = {
        "run": {"directory": str(directory), "threads": 1, "deterministic": True},
        "stream": {"dtype": "float32"},
        "model": {"name": "m", "hooks": HOOKS, "device": "cpu", "dtype": "float32", "batch_windows": 4},
        "buffer": {"rows": 256},
        "optimizer": {"batch": 32, "device": "cpu", "matmul": "float32", "learning_rate": 1e-2, "warmup_tokens": 0},
        "sae": list(tables),
    }
    settings = settings_from(TrainerSettings, document)
    return Run(settings, hello([Hook(name=name, module=name, width=WIDTH) for name in HOOKS]))


def batches(count: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    names = np.zeros(32, np.int64)
    for _ in range(count):
        yield Batch([torch.randn(32, WIDTH, generator=generator) for _ in HOOKS], names, names)


def trained(run: Run) -> dict[str, torch.Tensor]:
    first, *others = batches(12)
    run.initialise(first.x)
    for batch in others:
        run.train_step(batch)
    return by_key(run.state()[1])


SITES: list[dict[str, Any]] = [
    {"name": "mlp", "hook": "blocks.*.hook_mlp_out", "architecture": "batchtopk", "d_sae": 16, "k": 3},
    {"name": "skip", "hook": "blocks.*.hook_mlp_in", "target": "blocks.*.hook_mlp_out", "skip": True,
     "architecture": "topk", "d_sae": 16, "k": 3},
]  # fmt: skip


def test_each_sae_of_a_suite_is_the_one_trained_alone(tmp_path: Path) -> None:
    """Bit for bit: weights, moments, statistics. Alone, the seed is that of its place in the suite."""
    suite = trained(run_of(tmp_path / "suite", *SITES))
    tables = [table for site in SITES for table in expand_sae(site, HOOKS)]

    for place, table in enumerate(tables):
        alone = trained(run_of(tmp_path / table["name"], table | {"seed": place}))
        assert alone.keys() == {key for key in suite if key.startswith(f"{table['name']}/")}
        assert all(torch.equal(value, suite[key]) for key, value in alone.items()), table["name"]


def test_the_last_sae_of_a_hook_takes_it_along(tmp_path: Path) -> None:
    """A hook is forgotten when nobody reads it any more; the others go on without its activations."""
    run = run_of(tmp_path, *SITES)
    trained(run)
    run.detach(run.roster.find("mlp.0"))
    assert run.roster.forgotten_hooks == []
    run.detach(run.roster.find("skip.0"))
    assert run.roster.forgotten_hooks == [HOOKS[0], HOOKS[2]]

    (batch,) = batches(1)
    batch.x[0] = batch.x[2] = torch.empty(32, 0)
    run.train_step(batch)
    assert [one.settings.name for one in run.in_training] == ["mlp.1", "skip.1"]
