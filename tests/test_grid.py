"""A grid of SAEs from one [[sae]] table: which cells it has, what they are called, and which grids are refused."""

from __future__ import annotations

from typing import Any

import pytest

from producer.common.run_file import settings_from
from producer.common.toml import SettingsError
from trainer.saes.grid import expand_grid
from trainer.saes.patterns import expand_sae
from trainer.settings import TrainerSettings

TABLE: dict[str, Any] = {"name": "topk", "architecture": "topk", "grid": {"d_sae": [64, 128], "k": [4, 8]}}


def settings(*tables: dict[str, Any]) -> TrainerSettings:
    return settings_from(TrainerSettings, {"model": {"name": "m", "hooks": ["h"]}, "sae": list(tables)})


def test_a_grid_is_an_sae_for_each_size_and_sparsity() -> None:
    """Every other key is that of all cells."""
    saes = settings(TABLE | {"dead_tokens": 1000}).sae

    assert [(sae.name, sae.d_sae, getattr(sae, "k", None)) for sae in saes] == [
        ("topk-64-4", 64, 4),
        ("topk-64-8", 64, 8),
        ("topk-128-4", 128, 4),
        ("topk-128-8", 128, 8),
    ]
    assert {sae.dead_tokens for sae in saes} == {1000}


def test_a_grid_may_have_one_list() -> None:
    """The other key stands in the table itself."""
    sizes = {"name": "wide", "architecture": "jumprelu", "target_l0": 4, "grid": {"d_sae": [64, 128]}}
    sparsities = {"name": "sparse", "architecture": "batchtopk", "d_sae": 64, "grid": {"k": [4, 8]}}

    assert [sae.name for sae in settings(sizes, sparsities).sae] == ["wide-64", "wide-128", "sparse-4", "sparse-8"]


def test_a_table_without_a_grid_stays_as_it_is() -> None:
    plain = {"name": "topk", "architecture": "topk", "d_sae": 64, "k": 4}

    assert expand_grid(plain) == [plain]


def test_a_grid_of_each_layer_is_named_by_the_layer_first() -> None:
    table = TABLE | {"hook": "blocks.*.hook_mlp_out", "grid": {"k": [4, 8]}}

    assert [(cell["name"], cell["hook"]) for cell in expand_sae(table, ["blocks.3.hook_mlp_out"])] == [
        ("topk.3-4", "blocks.3.hook_mlp_out"),
        ("topk.3-8", "blocks.3.hook_mlp_out"),
    ]


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        (TABLE | {"grid": {}}, "grid has no list; add one"),
        (TABLE | {"grid": [64]}, "grid = [64]: expected a table, such as grid = { d_sae = [1024, 4096] }"),
        (TABLE | {"grid": {"k": []}}, "grid.k = []: expected a list of at least 1 entry"),
        (TABLE | {"grid": {"k": 4}}, "grid.k = 4: expected a list, such as grid.k = [16, 32]"),
        (TABLE | {"grid": {"k": [4, 0]}}, "grid.k.1 = 0: expected a number above 0"),
        (TABLE | {"grid": {"ks": [4]}}, "grid.ks = [4]: no such key (did you mean k?)"),
        (TABLE | {"grid": {"k": [4, 8, 4]}}, "grid.k = [4, 8, 4] has 4 more than once"),
        (TABLE | {"k": 4}, "k = 4 and grid.k are both set; remove one"),
        (
            TABLE | {"architecture": "jumprelu"},
            "grid.k is not for jumprelu, which has no k: remove grid.k, or use topk",
        ),
    ],
)
def test_a_grid_that_means_nothing_is_refused(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings(table)

    assert f'sae "topk": {sentence}' in str(error.value)


def test_faults_of_several_grids_are_told_together() -> None:
    with pytest.raises(SettingsError) as error:
        settings(TABLE | {"grid": {}}, TABLE | {"name": "other", "grid": {"k": []}})

    assert [line.split(":")[0] for line in str(error.value).split("\n")] == ['sae "topk"', 'sae "other"']


def test_a_cell_may_not_have_the_name_of_another_sae() -> None:
    with pytest.raises(SettingsError, match="topk-64-8 is used more than once"):
        settings(TABLE, {"name": "topk-64-8", "architecture": "topk", "d_sae": 32, "k": 2})


def test_a_cell_that_cannot_be_is_named() -> None:
    with pytest.raises(SettingsError, match='sae "topk-64-65": k = 65 exceeds d_sae = 64'):
        settings(TABLE | {"grid": {"d_sae": [64], "k": [65]}})
