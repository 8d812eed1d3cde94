"""Real ranks under a real torchrun: what a user starts, stops and kills, on any number of ranks in turn."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.small_processes import Start, small_processes, tokens_in_checkpoint, wait_until
from tests.test_end_to_end import RUN, all_rows, trained_rows
from trainer.control.ctl import CtlError, ask
from trainer.saes.selftest import check
from trainer.snapshot import snapshot_names, verify
from trainer.state.checkpoint import complete_folders, load_newest


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    text = RUN.replace("batch = 128", "batch = 1024").replace("d_sae = 32", "d_sae = 2048")
    (tmp_path / "run.toml").write_text(text.replace("DIR", str(tmp_path)))
    with small_processes(tmp_path, SECONDS_PER_STEP="0.05", OMP_NUM_THREADS="1") as start:
        yield start


def workers(torchrun: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of the ranks, by rank."""
    ranks: dict[int, int] = {}
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        variables = dict(entry.split(b"=", 1) for entry in environment if b"=" in entry)
        if b"LOCAL_RANK" in variables:
            ranks[int(variables[b"RANK"])] = int(child)
    return [ranks[rank] for rank in sorted(ranks)]


def weights(run: Path) -> bytes:
    """The file of the newest snapshot, which loads as any other and passes its self-test."""
    folder = run / "snapshots" / snapshot_names(run)[-1]
    verify(folder)
    check(folder / "topk")
    return (folder / "topk" / "sae_weights.safetensors").read_bytes()


DETERMINISTIC = ("run.deterministic=true", "run.tokens=20480", "parallel.blocks=2", "checkpoint.every_seconds=0.3")


@pytest.mark.long
def test_weights_and_rows_do_not_depend_on_the_number_of_ranks(start: Start, tmp_path: Path) -> None:
    """Alone; and on two ranks, then alone, then on two: the same file to the last bit, the same tokens in order."""
    trainer, producer = start("trainer", *DETERMINISTIC), start("producer", *DETERMINISTIC)
    assert (trainer.wait(120), producer.wait(120)) == (0, 0)
    expected, rows = weights(tmp_path / "run"), (tmp_path / "rows").read_bytes()
    (tmp_path / "run").rename(tmp_path / "alone")
    (tmp_path / "rows").unlink()

    start("producer", *DETERMINISTIC)
    for target, ranks in ((4096, 2), (12_000, 1), (20_480, 2)):
        running = start("trainer", *DETERMINISTIC, ranks=ranks)
        wait_until(lambda: tokens_in_checkpoint(tmp_path) >= target or running.poll() is not None)  # noqa: B023
        if target < 20_480:
            assert running.poll() is None, "the run ended before it could be stopped"
            running.terminate()
        running.wait(120)
        assert complete_folders(tmp_path / "run" / "checkpoint"), "nothing was saved"
    assert running.returncode == 0
    assert (tmp_path / "rows").read_bytes() == rows
    assert weights(tmp_path / "run") == expected
    log = (tmp_path / "trainer.log").read_text()
    assert log.count("the same command goes on") == 2 and "[rank 1]" not in log


SECOND = """
[[sae]]
name = "jump"
architecture = "jumprelu"
d_sae = 2048
target_l0 = 4.0
ema_tokens = 5000
"""
GROUPS = ("parallel.groups=2",)


@pytest.mark.long
def test_groups_of_ranks_train_the_saes_of_one_process(start: Start, tmp_path: Path) -> None:
    """In two groups, then in one process, then in one group of two ranks, then in two: the same files to the bit."""
    with open(tmp_path / "run.toml", "a") as file:
        file.write(SECOND)
    trainer, producer = start("trainer", *DETERMINISTIC), start("producer", *DETERMINISTIC)
    assert (trainer.wait(120), producer.wait(120)) == (0, 0)
    expected, rows = published(tmp_path / "run"), (tmp_path / "rows").read_bytes()
    (tmp_path / "run").rename(tmp_path / "alone")
    (tmp_path / "rows").unlink()

    start("producer", *DETERMINISTIC)
    stages: list[tuple[int, int, tuple[str, ...]]] = [(4096, 2, GROUPS), (8192, 1, ()), (12_000, 2, ()), (0, 2, GROUPS)]
    for target, ranks, groups in stages:
        running = start("trainer", *DETERMINISTIC, *groups, ranks=ranks)
        if target:
            wait_until(lambda: tokens_in_checkpoint(tmp_path) >= target or running.poll() is not None)  # noqa: B023
            assert running.poll() is None, "the run ended before it could be stopped"
            if groups:
                assert {sae["name"]: sae["group"] for sae in status(tmp_path)["saes"]} == {"topk": 1, "jump": 0}
            running.terminate()
        running.wait(120)
    assert running.returncode == 0
    assert (tmp_path / "rows").read_bytes() == rows
    assert published(tmp_path / "run") == expected
    log = (tmp_path / "trainer.log").read_text()
    assert "on placement group 1" in log and "[rank 1]" not in log


def published(run: Path) -> dict[str, bytes]:
    """The weights of each SAE of the newest snapshot, by its folder; all pass their self-test."""
    folder = run / "snapshots" / snapshot_names(run)[-1]
    verify(folder)
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    for sae in folders:
        check(sae)
    return {sae.name: (sae / "sae_weights.safetensors").read_bytes() for sae in folders}


def status(folder: Path) -> dict[str, Any]:
    return ask(folder / "run", {"command": "status"})


@pytest.mark.long
def test_an_operator_commands_all_groups(start: Start, tmp_path: Path) -> None:
    """An SAE joins the group with least to do, is in reports, snapshots and checkpoints, and leaves."""
    with open(tmp_path / "run.toml", "a") as file:
        file.write(SECOND)
    endless = ("corpus.epochs=1000", *GROUPS)
    trainer, _ = start("trainer", *endless, ranks=2), start("producer", *endless)
    run = tmp_path / "run"
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > 0 or trainer.poll() is not None)

    ask(run, {"command": "attach", "sae": {"name": "more", "architecture": "topk", "d_sae": 1024, "k": 4}})
    tokens = tokens_in_checkpoint(tmp_path)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > tokens + 5000)
    answer = status(tmp_path)
    saes = {sae["name"]: sae for sae in answer["saes"]}
    assert saes["more"]["group"] == 1 and 0 < saes["more"]["fvu"] < 1 and saes["more"]["l0"] == 4.0
    assert answer["ranks"]["count"] == 2 and answer["ranks"]["exchange_bytes"].keys() == {"activations"}
    ask(run, {"command": "detach", "name": "more", "now": True})
    wait_until(lambda: any((run / "snapshots").glob("*/more")) and len(status(tmp_path)["saes"]) == 2)
    trainer.terminate()
    trainer.wait(120)

    folder = complete_folders(run / "checkpoint")[-1]
    other = load_file(folder / "latents-00001-of-00002.safetensors")
    assert {key.split("/")[1] for key in other} == {"topk"} and "sae/topk/parameters/b_dec" in other
    assert not any(key.startswith("sae/topk") for key in load_file(folder / "state.safetensors"))
    saved = load_newest(run)
    assert saved is not None and set(saved.tensors.saes) == {"topk", "jump"}


@pytest.mark.long
def test_the_death_of_a_rank_loses_no_token_and_repeats_none(start: Start, tmp_path: Path) -> None:
    """Rank 1 is killed, then rank 0, in mid-run: the other leaves at once, and a new start trains what is left."""
    epochs, passes = 4, ("corpus.epochs=4",)
    start("producer", *passes)
    for victim in (1, 0):
        trainer = start("trainer", *passes, ranks=2)
        target = tokens_in_checkpoint(tmp_path) + 8000
        wait_until(lambda: tokens_in_checkpoint(tmp_path) >= target or trainer.poll() is not None)  # noqa: B023
        assert trainer.poll() is None, "the run ended before a rank could be killed"
        os.kill(workers(trainer)[victim], signal.SIGKILL)
        assert trainer.wait(120) != 0

    trainer = start("trainer", *passes, ranks=2)
    assert trainer.wait(120) == 0
    np.testing.assert_array_equal(trained_rows(tmp_path), all_rows(epochs))


@pytest.mark.long
def test_an_operator_commands_all_ranks(start: Start, tmp_path: Path) -> None:
    """Status tells of the ranks; an SAE joins, learns, is published and leaves; a checkpoint has each rank's rows."""
    endless = "corpus.epochs=1000"
    trainer, _ = start("trainer", endless, ranks=2), start("producer", endless)
    run = tmp_path / "run"
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > 0 or trainer.poll() is not None)

    small = {"name": "small", "architecture": "topk", "d_sae": 64, "k": 4}
    with pytest.raises(CtlError, match="d_sae = 64 is too small for 2 ranks"):
        ask(run, {"command": "attach", "sae": small})
    wide = {"name": "wide", "architecture": "batchtopk", "d_sae": 4096, "k": 4, "ema_tokens": 5000}
    ask(run, {"command": "attach", "sae": wide})
    tokens = tokens_in_checkpoint(tmp_path)
    wait_until(lambda: tokens_in_checkpoint(tmp_path) > tokens + 5000)
    ranks = ask(run, {"command": "status"})["ranks"]
    assert ranks["count"] == 2 and ranks["exchange_bytes"]["activations"] > 0
    assert [rank["rank"] for rank in ranks["each"]] == [0, 1] and all(rank["step_seconds"] for rank in ranks["each"])
    ask(run, {"command": "detach", "name": "wide", "now": True})
    wait_until(lambda: any((run / "snapshots").glob("*/wide-ema")))
    trainer.terminate()
    trainer.wait(120)

    folder = complete_folders(tmp_path / "run" / "checkpoint")[-1]
    halves = [load_file(folder / name) for name in ("state.safetensors", "latents-00001-of-00002.safetensors")]
    assert [len(half["sae/topk/parameters/W_enc"]) for half in halves] == [1024, 1024]
    saved = load_newest(tmp_path / "run")
    assert saved is not None and len(saved.tensors.saes["topk"].parameters["W_enc"]) == 2048
    assert set(saved.document.run.saes) == {"topk"}


def test_what_the_ranks_cannot_share_is_refused(start: Start, tmp_path: Path) -> None:
    """With what to change, and before anything is opened."""
    trainer = start("trainer", "sae.topk.d_sae=1024", ranks=2)

    assert trainer.wait(120) != 0
    log = (tmp_path / "trainer.log").read_text()
    assert 'sae "topk": d_sae = 1024 is too small for 2 ranks' in log and "exitcode  : 2" in log
    assert not (tmp_path / "run").exists()
