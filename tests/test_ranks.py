"""Collectives and selection over ranks: the sets and the bytes of one process' arithmetic."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.small_ranks import SIZES, SmallRanks
from trainer.kernels import select
from trainer.kernels.sparse import Entries
from trainer.parallel import selection
from trainer.parallel.grouping import place
from trainer.parallel.ranks import ALONE, Ranks, latent_cuts

ROOT = Path(__file__).parent.parent
QUICK = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def small_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallRanks]:
    with SmallRanks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def test_one_module_imports_torch_distributed() -> None:
    importers = {
        path.relative_to(ROOT).as_posix()
        for package in ("producer", "trainer", "monitor")
        for path in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom) and "torch.distributed" in ast.unparse(node)
    }
    assert importers == {"trainer/parallel/ranks.py"}


def test_cuts_of_few_parts_are_among_those_of_more() -> None:
    """4 ranks hold pairs of the blocks of 8, also where d_sae is no multiple of either."""
    assert latent_cuts(10_000, 4) == [0, 2048, 5120, 7168, 10_000]
    assert latent_cuts(10_000, 4) == latent_cuts(10_000, 8)[::2]


# Selection


def one_process(pre_acts: Tensor, k: int, magnitude: bool) -> Tensor:
    """bool [rows, d_sae]: the k largest of each row, of equal ones the first."""
    order = (pre_acts.abs() if magnitude else pre_acts).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, order, True)


def local_largest(ranks: Ranks, pre_acts: Tensor, k: int, magnitude: bool) -> tuple[Tensor, Tensor, int]:
    held = ranks.latents(pre_acts.shape[1])
    own = pre_acts[:, held.start : held.stop]
    count = min(k, own.shape[1])
    order = (own.abs() if magnitude else own).sort(dim=1, descending=True, stable=True).indices[:, :count]
    start = torch.arange(0, own.numel() and count * len(own) + 1, max(1, count))[: len(own) + 1]
    candidates = Entries(start, order.flatten(), own.gather(1, order).flatten(), own.shape[1])
    chosen = selection.largest(ranks, candidates, k, candidates.column + held.start, magnitude)
    places = torch.zeros_like(own, dtype=torch.bool)
    places[chosen.row(), chosen.column] = True
    return places, chosen.value, sum(ranks.traffic.received_bytes.values())


@QUICK
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from(SIZES),
    rows=st.integers(1, 9),
    d_sae=st.integers(4, 40),
    k=st.integers(1, 12),
    kind=st.sampled_from(["normal", "few values", "equal", "zeros of both signs", "minus infinity"]),
    magnitude=st.booleans(),
)
def test_top_k_over_ranks_is_the_set_of_one_process(
    small_ranks: SmallRanks, seed: int, size: int, rows: int, d_sae: int, k: int, kind: str, magnitude: bool
) -> None:
    """Exactly k latents a row, the first of equal ones, whatever a rank holds and however many rows there are."""
    pre_acts = values_of(kind, rows, d_sae, seed)
    k = min(k, d_sae)

    parts = small_ranks.run(local_largest, size, pre_acts, k, magnitude)

    assert torch.equal(torch.cat([places for places, _, _ in parts], 1), one_process(pre_acts, k, magnitude))


def local_ties(ranks: Ranks, pre_acts: Tensor, k: int) -> int:
    """How many latents are chosen when keys have no latent in them, as a comparison of values alone would."""
    with patch.object(selection, "selection_keys", lambda value, latent: selection.ordered_bits(value) << 32):
        return int(local_largest(ranks, pre_acts, k, False)[0].sum())


def test_a_choice_by_value_alone_would_be_caught(small_ranks: SmallRanks) -> None:
    """It keeps all that tie for the last place."""
    pre_acts = values_of("few values", 9, 40, 0)

    assert sum(small_ranks.run(local_ties, 2, pre_acts, 5)) > int(one_process(pre_acts, 5, False).sum()) == 45


def values_of(kind: str, rows: int, d_sae: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, d_sae, generator=generator)
    return {
        "normal": normal,
        "few values": normal.round(),
        "equal": torch.full_like(normal, 0.5),
        "zeros of both signs": normal.sign() * 0.0,
        "minus infinity": normal.where(normal > 0, torch.tensor(-torch.inf)),
    }[kind]


def local_largest_of(ranks: Ranks, pre_acts: Tensor, count: int) -> Tensor:
    held = ranks.latents(pre_acts.shape[1])
    own = pre_acts[:, held.start : held.stop]
    chosen, _ = selection.largest_of(ranks, select.exceeding(own, 0.0), count, held.start)
    return chosen.dense()


@QUICK
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from(SIZES),
    rows=st.integers(1, 9),
    d_sae=st.integers(4, 40),
    fraction=st.floats(0.01, 1.2),
    kind=st.sampled_from(["normal", "few values", "equal", "bfloat16"]),
)
def test_batch_top_k_over_ranks_is_the_set_of_one_process(
    small_ranks: SmallRanks, seed: int, size: int, rows: int, d_sae: int, fraction: float, kind: str
) -> None:
    """Exactly the wanted number in all, ties row by row from the first, also where all of a batch tie."""
    pre_acts = values_of("normal" if kind == "bfloat16" else kind, rows, d_sae, seed)
    if kind == "bfloat16":
        pre_acts = pre_acts.bfloat16().float()
    count = max(1, round(fraction * rows * d_sae / 2))
    expected = select.largest_of(select.exceeding(pre_acts, 0.0), count)

    parts = small_ranks.run(local_largest_of, size, pre_acts, count)

    assert torch.equal(torch.cat(parts, 1), expected.dense())


def local_nth_largest(ranks: Ranks, values: Tensor, n: int) -> float:
    return selection.nth_largest(ranks, values[ranks.rank :: ranks.size], n)


@QUICK
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from(SIZES),
    count=st.integers(1, 40),
    fraction=st.floats(0.0, 1.3),
    kind=st.sampled_from(["normal", "few values", "equal", "zeros of both signs", "minus infinity"]),
)
def test_the_nth_largest_over_ranks_is_that_of_one_process(
    small_ranks: SmallRanks, seed: int, size: int, count: int, fraction: float, kind: str
) -> None:
    """The very value; the least of all where there are fewer than n, and a rank may have none."""
    values = values_of(kind, 1, count, seed)[0]
    n = max(1, round(fraction * count))

    answers = small_ranks.run(local_nth_largest, size, values, n)

    assert answers == [float(values.sort(descending=True).values[min(n, count) - 1])] * size


def test_nan_is_the_largest_of_a_row() -> None:
    """Whatever its sign bit: the step is then skipped, as in one process."""
    values = torch.tensor([torch.inf, torch.nan, -torch.nan, 0.0, -1.0])
    assert selection.ordered_bits(values).argsort(descending=True, stable=True).tolist() == [1, 2, 0, 3, 4]


# Sums


def summed_in_order(ranks: Ranks, parts: Tensor) -> tuple[Tensor, Tensor]:
    share = len(parts) // ranks.size
    own = parts[ranks.rank * share : (ranks.rank + 1) * share]
    return ranks.sum_in_order(own, "sums"), ranks.sum(own.sum(0), "sums")


def test_sums_in_order_have_the_same_bits_for_any_number_of_ranks(small_ranks: SmallRanks) -> None:
    """8 blocks on 1, 2 and 4 ranks, with 5 rows that divide by neither."""
    parts = torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)[:, None, None]
    alone = ALONE.sum_in_order(parts, "sums")

    for size in SIZES:
        for in_order, plain in small_ranks.run(summed_in_order, size, parts):
            assert torch.equal(in_order, alone)
            torch.testing.assert_close(plain, alone)


# Bytes


def traffic_of_each(ranks: Ranks) -> dict[str, int]:
    ranks.traffic.received_bytes.clear()
    ranks.sum(torch.ones(8, dtype=torch.float64), "sum")
    ranks.gather(torch.ones(8), "gather")
    ranks.exchange(torch.ones(ranks.size, 8), "exchange")
    ranks.broadcast(torch.ones(8), "broadcast")
    return dict(ranks.traffic.received_bytes)


def test_traffic_is_what_a_ring_moves(small_ranks: SmallRanks) -> None:
    """64 bytes summed, pieces of 32 bytes gathered, exchanged and broadcast."""
    assert small_ranks.run(traffic_of_each, 2) == [
        {"sum": 64, "gather": 32, "exchange": 32, "broadcast": 0},
        {"sum": 64, "gather": 32, "exchange": 32, "broadcast": 32},
    ]
    assert small_ranks.run(traffic_of_each, 4)[3] == {"sum": 96, "gather": 96, "exchange": 96, "broadcast": 32}


def test_a_process_by_itself_moves_nothing() -> None:
    total = ALONE.sum(torch.ones(2), "sums")
    assert total.tolist() == [1.0, 1.0]
    assert ALONE.gather(total, "rows").shape == (1, 2)
    assert ALONE.traffic.received_bytes == {}


# Placement groups


def test_saes_are_placed_by_cost_longest_first() -> None:
    """Equal loads where they exist; an SAE that joins goes where least is to do, and none moves."""
    costs = {"a": 4.0, "b": 3.0, "c": 3.0, "d": 2.0}

    assert place(costs, 2) == {"a": 0, "b": 1, "c": 1, "d": 0}
    assert place(costs | {"e": 1.0}, 2, {"a": 0, "b": 1, "c": 1, "d": 1}) == {"a": 0, "b": 1, "c": 1, "d": 1, "e": 0}
    assert place({"b": 3.0}, 2, {"a": 0, "b": 1}) == {"b": 1}, "one that has left is no load"
