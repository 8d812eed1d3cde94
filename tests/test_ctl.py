"""A stream that lives while SAEs come and go: `python -m trainer ctl`, over real sockets and with real processes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from producer.common.run_file import read_run_file
from producer.settings import ProducerSettings
from producer.wire import Bye, Hello, held_out_shards
from tests.drills.named_producer import NamedSource
from tests.small_run import by_key, checkpoint_of, publish_snapshot
from tests.small_stream import (
    CAPACITY,
    CHUNK_ROWS,
    Producing,
    hello_of,
    named_source,
    new_ledger,
    stream_settings,
    wait_for,
)
from trainer.control import ctl
from trainer.control.commands import handle
from trainer.control.ctl import CtlError, ask
from trainer.control.requests import Inbox, serve_requests
from trainer.phases import RunPhase, SaePhase
from trainer.report import StepReport
from trainer.settings import TrainerSettings
from trainer.snapshot import Manifest, is_pinned, read_manifest, snapshot_names
from trainer.state import checkpoint
from trainer.state.checkpoint import load_newest
from trainer.stream.buffer import Batch, ShuffleBuffer
from trainer.stream.intake import Intake
from trainer.stream.ledger.resume import restore_ledger
from trainer.stream.ledger.shards import FailureReport
from trainer.stream.payload import TORCH_DTYPE
from trainer.training.loop import STARVED_REPORT_SECONDS, Loop
from trainer.training.resuming import roster_of
from trainer.training.roster import Roster
from trainer.training.run import Run

ROOT = Path(__file__).parent.parent
TOP = {"name": "top", "architecture": "topk", "d_sae": 16, "k": 2}
JUMP = {"name": "jump", "architecture": "jumprelu", "d_sae": 12, "target_l0": 2.0, "ema_tokens": 1000}
WIDE = {"name": "wide", "architecture": "batchtopk", "d_sae": 24, "k": 3}


# The line, without a run behind it


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose trainer answers with what it was asked."""
    inbox, over = Inbox(threading.Event()), threading.Event()

    def serve() -> None:
        while not over.is_set():
            inbox.wait(0.05)
            if (request := inbox.next()) is not None:
                request.answer({"ok": True, "said": request.command, "given": request.arguments})

    thread = threading.Thread(target=serve)
    thread.start()
    with serve_requests(tmp_path, inbox):
        yield tmp_path
    over.set()
    thread.join()


def test_only_the_owner_can_speak_to_a_trainer(echo: Path) -> None:
    """The socket file has mode 0600 from its first moment, whatever the umask."""
    assert stat.S_IMODE((echo / "ctl").stat().st_mode) == 0o600
    assert stat.S_ISSOCK((echo / "ctl").stat().st_mode)


@pytest.mark.parametrize(
    "line",
    [b"garbage\n", b"[]\n", b"{}\n", b'{"command": 3}\n', b"\xff\xfe\n", b"[" * 60_000 + b"\n", b"x" * 70_000 + b"\n"],
    ids=["garbage", "list", "empty", "number", "bytes", "nested", "long"],
)
def test_garbage_is_answered_and_harmless(echo: Path, line: bytes) -> None:
    """Whoever sends no request is told what one is; the next client is served."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(echo / "ctl"))
        connection.sendall(line)
        answer = json.loads(connection.makefile("rb").readline())
    assert not answer["ok"] and answer["code"] == 2
    assert ask(echo, {"command": "next"})["said"] == "next"


def test_clients_that_hang_up_or_say_nothing_hold_nobody_up(echo: Path) -> None:
    """Some connect and wait, some leave before their answer; twenty others are served at once."""
    silent = [socket.socket(socket.AF_UNIX) for _ in range(5)]
    for connection in silent:
        connection.connect(str(echo / "ctl"))
    for _ in range(5):
        with socket.socket(socket.AF_UNIX) as rude:
            rude.connect(str(echo / "ctl"))
            rude.sendall(b'{"command": "status"}\n')
    answers: list[str] = []
    clients = [
        threading.Thread(target=lambda n=n: answers.append(ask(echo, {"command": f"c{n}"})["said"])) for n in range(20)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(60)
    for connection in silent:
        connection.close()

    assert sorted(answers) == sorted(f"c{n}" for n in range(20))


def test_a_run_directory_with_a_long_path_has_a_socket_too(tmp_path: Path) -> None:
    """A socket's path has at most 107 bytes; a run directory's may have more."""
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    inbox = Inbox(threading.Event())
    with serve_requests(deep, inbox):
        assert (deep / "ctl").exists()
        inbox.close()
        with pytest.raises(CtlError, match="the trainer is leaving"):
            ask(deep, {"command": "status"})
    assert not (deep / "ctl").exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    """What a killed trainer left behind answers nobody, and does not stand in the way of the next."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "ctl"))
    with pytest.raises(CtlError, match="no trainer is at work"):
        ask(tmp_path, {"command": "status"})
    inbox = Inbox(threading.Event())
    with serve_requests(tmp_path, inbox):
        inbox.close()
        with pytest.raises(CtlError, match="leaving"):
            ask(tmp_path, {"command": "status"})


def test_where_no_socket_can_be_made_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system without sockets costs `ctl`, not the run."""
    (tmp_path / "ctl").mkdir()
    with serve_requests(tmp_path, Inbox(threading.Event())):
        assert "cannot be opened, so there is no `ctl` for this run" in caplog.text


# The person's side


def run_ctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer", "ctl", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


def test_without_a_trainer_the_client_says_how_to_start_one(tmp_path: Path) -> None:
    """One line and exit code 1; a directory that is none is a fault of usage, 2."""
    alone, nowhere = run_ctl(tmp_path, "status"), run_ctl(tmp_path / "nowhere", "status")

    assert (alone.returncode, nowhere.returncode) == (1, 2)
    assert "python -m trainer RUN.toml`" in alone.stderr
    assert "does not exist" in nowhere.stderr
    assert not alone.stdout + nowhere.stdout and "Traceback" not in alone.stderr + nowhere.stderr


def test_snapshots_are_pinned_without_a_trainer(tmp_path: Path) -> None:
    """By name, or the newest; a name that is none tells what there is."""
    publish_snapshot(tmp_path, 1000)
    newest = publish_snapshot(tmp_path, 2000)

    assert run_ctl(tmp_path, "pin").returncode == 0 and is_pinned(newest)
    assert run_ctl(tmp_path, "unpin", newest.name).returncode == 0 and not is_pinned(newest)
    wrong = run_ctl(tmp_path, "pin", "000000000001")
    assert wrong.returncode == 2 and "there are 2, 000000001000 to 000000002000" in wrong.stderr


def test_client_and_help_are_light() -> None:
    """Neither torch nor pydantic's models of a run are needed to ask for a status."""
    heavy = ("torch", "zmq", "numpy", "pydantic", "rich")
    code = f"import sys, trainer.control.ctl; print([name for name in {heavy} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.stdout.strip() == "[]", process.stderr
    help_text = run_ctl("--help").stdout
    assert [name for name in ("status", "snapshot", "cooldown", "attach", "detach", "pin", "pause", "resume", "drain")
            if name not in help_text] == []  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("k = ", "is not valid TOML"),
        ("[[sae]]\nname = 'a'\n[[sae]]\nname = 'b'", "must hold one [[sae]] table"),
        ("[[sae]]\nname = 'a'\n[optimizer]\nbatch = 3", "must hold one [[sae]] table"),
    ],
)
def test_a_file_that_names_no_single_sae_is_refused(echo: Path, text: str, message: str, capsys: Any) -> None:
    """Before anybody is asked; exit code 2."""
    (echo / "sae.toml").write_text(text)
    assert ctl.main([str(echo), "attach", str(echo / "sae.toml")]) == 2
    assert message in capsys.readouterr().err
    assert ctl.main([str(echo), "attach", str(echo / "missing.toml")]) == 2
    assert "missing.toml does not exist" in capsys.readouterr().err


def test_the_file_may_hold_bare_keys_or_one_table(echo: Path, capsys: Any) -> None:
    """And a relative start_from is the client's, which may stand in another folder than the trainer."""
    for heading in ("", "[[sae]]\n"):
        (echo / "sae.toml").write_text(heading + 'name = "a"\nk = 3\nstart_from = "old/sae"')
        assert ctl.main([str(echo), "attach", str(echo / "sae.toml"), "--json"]) == 0
        fields = json.loads(capsys.readouterr().out)["given"]
        assert fields == {"sae": {"name": "a", "k": 3, "start_from": f"{Path.cwd()}/old/sae"}}


# A run in this process: the real loop, stream and producer


class Trainer:
    """A trainer's loop in a thread of its own, over an endless stream."""

    def __init__(self, directory: Path, starved_report_seconds: float = STARVED_REPORT_SECONDS, **changes: Any) -> None:
        self.directory = directory
        self.starved_report_seconds = starved_report_seconds
        self.settings = settings_for(directory, **changes)
        self.stop = threading.Event()
        self.reports: list[StepReport] = []
        self.published: list[int] = []
        """Tokens of each snapshot that was announced."""
        self.producer: Producing | None = None
        self.phase: RunPhase | None = None
        """In which the loop has ended."""

    @contextmanager
    def at_work(self) -> Iterator[Trainer]:
        self.directory.mkdir(exist_ok=True)
        inbox, saved = Inbox(self.stop), load_newest(self.directory)
        ledger = new_ledger(self.settings.stream, epochs=None)
        roster = Roster.of(self.settings.sae)
        if saved is not None:
            restore_ledger(ledger, saved.document.ledger, saved.tensors.shards)
            roster = roster_of(saved.document, self.settings)

        def make_buffer(hello: Hello) -> ShuffleBuffer:
            return ShuffleBuffer(CAPACITY, [hook.width for hook in hello.hooks], TORCH_DTYPE[hello.dtype], 0)

        with Intake(self.settings.stream, ledger, make_buffer) as self.intake, serve_requests(self.directory, inbox):
            self.loop = Loop(
                self.settings, roster, self.intake, inbox, self, handle, saved, self.starved_report_seconds
            )

            def train() -> None:
                self.phase = self.loop.train()

            thread = threading.Thread(target=train)
            thread.start()
            try:
                yield self
            finally:
                self.stop.set()
                thread.join(120)
                if self.producer is not None:
                    self.intake.drain(finished=True)
                    self.producer.wait_for_end()

    def produce(self) -> Trainer:
        self.producer = Producing(self.settings.stream, named_source())
        self.reach(64)
        return self

    def reach(self, rows: int) -> int:
        """Waits until so many more tokens are trained."""
        target = self.intake.ledger.tokens_trained + rows
        wait_for(lambda: self.intake.ledger.tokens_trained >= target)
        return self.intake.ledger.tokens_trained

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        return ask(self.directory, {"command": command, **fields})

    def refusal_of(self, command: str, **fields: Any) -> str:
        """The sentence with which a command is refused."""
        with pytest.raises(CtlError) as error:
            self.ask(command, **fields)
        assert error.value.code in (1, 2)
        return str(error.value)

    def sae(self, name: str) -> dict[str, Any]:
        return next(sae for sae in self.ask("status")["saes"] if sae["name"] == name)

    def names(self) -> list[str]:
        return [sae["name"] for sae in self.ask("status")["saes"]]

    def newest(self) -> Manifest:
        """The manifest of the newest snapshot."""
        return read_manifest(self.directory / "snapshots" / snapshot_names(self.directory)[-1])

    def on_report(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_fill(self, report: StepReport) -> None: ...
    def on_publish(self, tokens: int) -> None:
        self.published.append(tokens)

    def on_save(self) -> None: ...


def settings_for(directory: Path, **changes: Any) -> TrainerSettings:
    return TrainerSettings.model_validate(
        {
            "run": {"directory": str(directory), "threads": 1},
            "stream": stream_settings(f"ipc://{directory.parent}/stream"),
            "corpus": {"kind": "synthetic", "context": 8, "synthetic": {"d_in": 4, "features": 8, "shards": 6}},
            "buffer": {"rows": CAPACITY},
            "optimizer": {"batch": CHUNK_ROWS, "matmul": "float32", "learning_rate": 1e-3, "warmup_tokens": 64},
            "sae": [TOP, JUMP],
        }
        | changes
    )


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with Trainer(tmp_path / "run").at_work() as trainer:
        yield trainer


def test_a_trainer_without_producers_answers(trainer: Trainer) -> None:
    """And what needs tokens is refused with what to do."""
    status = trainer.ask("status")
    assert (status["state"], status["tokens"], status["producers"]) == ("waiting", 0, {"working": 0, "idle": 0})
    assert [sae["phase"] for sae in status["saes"]] == ["waiting", "waiting"]
    for command, fields in (("snapshot", {}), ("attach", {"sae": WIDE}), ("detach", {"name": "top"})):
        assert "no producer has come yet" in trainer.refusal_of(command, **fields)


def test_a_snapshot_that_is_due_at_the_end_is_announced_once(tmp_path: Path) -> None:
    """The last of a run is the same weights after the same tokens."""
    tokens = 8 * CHUNK_ROWS
    settings = {"run": {"directory": str(tmp_path / "run"), "threads": 1, "tokens": tokens}}
    with Trainer(tmp_path / "run", snapshots={"every_tokens": tokens // 2}, **settings).at_work() as trainer:
        trainer.produce()
        wait_for(lambda: trainer.phase is RunPhase.FINISHED)
    assert trainer.published == [tokens // 2, tokens]


def test_an_sae_joins_learns_and_leaves(trainer: Trainer) -> None:
    """Its own counter and warm-up; the resolved settings name it; its last snapshot has it and later ones have not."""
    tokens = trainer.produce().ask("attach", sae=WIDE)["joined_at"]
    assert 'name = "wide"' in (trainer.directory / "settings.toml").read_text()
    now = trainer.reach(320)
    entry = trainer.sae("wide")
    assert entry["attached"] and entry["phase"] == "constant"
    assert now - tokens - 64 <= entry["tokens"] <= trainer.intake.ledger.tokens_trained - tokens
    assert 0 < entry["l0"] <= 24 and entry["learning_rate"] == 1e-3

    answer = trainer.ask("detach", name="wide")
    assert entry["tokens"] // 5 <= answer["rows_left"]
    wait_for(lambda: "wide" not in trainer.names())
    assert sorted(trainer.newest().saes) == ["jump", "jump-ema", "top", "wide"]
    assert sorted(sae["name"] for sae in trainer.newest().run["settings"]["sae"]) == ["jump", "top", "wide"]
    assert 'name = "wide"' not in (trainer.directory / "settings.toml").read_text()
    trainer.reach(32)
    trainer.ask("snapshot")
    assert sorted(trainer.newest().saes) == ["jump", "jump-ema", "top"]
    wait_for(lambda: [sae.name for sae in trainer.reports[-1].saes] == ["top", "jump"])


def test_what_cannot_join_is_refused_with_what_to_change(trainer: Trainer, tmp_path: Path) -> None:
    """Faults of the file, all of them; hooks; names of the living, of EMA copies and of the departed; start_from."""
    trainer.produce()
    faulty = trainer.refusal_of("attach", sae=WIDE | {"d_sae": -1, "kk": 3})
    assert "d_sae = -1" in faulty and "kk = 3: no such key" in faulty
    assert "needs k" in trainer.refusal_of("attach", sae={"name": "x", "architecture": "topk", "d_sae": 8})
    assert "is not streamed" in trainer.refusal_of("attach", sae=WIDE | {"hook": "blocks.9.mlp_out"})
    for options in ({"name": "top"}, {"name": "jump-ema"}, {"name": "jump", "ema_tokens": 5}):
        assert "taken" in trainer.refusal_of("attach", sae=WIDE | options)
    assert "start_from" in trainer.refusal_of("attach", sae=WIDE | {"start_from": str(tmp_path / "nowhere")})
    trainer.ask("attach", sae=WIDE)
    trainer.reach(32)
    trainer.ask("detach", name="wide", now=True)
    wait_for(lambda: "wide" not in trainer.names())
    assert "by one that has left" in trainer.refusal_of("attach", sae=WIDE)
    for command, fields, message in (
        ("attach", {}, "needs the keys"),
        ("detach", {}, "name is missing"),
        ("detach", {"name": "nobody"}, "those of this run are top, jump"),
        ("dance", {}, "there is no command 'dance'"),
    ):
        assert message in trainer.refusal_of(command, **fields)
    assert trainer.names() == ["top", "jump"]
    trainer.reach(32)


def test_an_sae_goes_on_from_a_snapshot(trainer: Trainer) -> None:
    """start_from works for one that joins: its weights are those of the folder, in the run's scale."""
    trainer.produce().reach(640)
    trainer.ask("pause")
    folder = trainer.directory / "snapshots" / Path(trainer.ask("snapshot")["snapshot"]).name / "top"
    trainer.ask("attach", sae=TOP | {"name": "again", "start_from": str(folder)})
    run = trainer.loop.run
    assert run is not None and not run.lacking_weights
    first, again = run.sae_trainers[0].sae.parameters, run.sae_trainers[-1].sae.parameters
    torch.testing.assert_close(again["W_dec"], first["W_dec"])
    torch.testing.assert_close(again["b_dec"], first["b_dec"], rtol=1e-4, atol=1e-4)


def test_a_pattern_names_several_saes(trainer: Trainer) -> None:
    """Both leave at one command. A pattern that means none, or an SAE of each layer where no layer is streamed, is
    refused."""
    trainer.produce()
    for name in ("late.0", "late.1"):
        trainer.ask("attach", sae={"name": name, "architecture": "topk", "d_sae": 8, "k": 2})
    layers = {"name": "mlp", "architecture": "topk", "d_sae": 8, "k": 2, "hook": "blocks.*.hook_mlp_out"}

    assert "matches no hook that is streamed; model.hooks has synthetic" in trainer.refusal_of("attach", sae=layers)
    assert "no SAE is named like 'early.*'" in trainer.refusal_of("detach", name="early.*")
    said = trainer.ask("detach", name="late.*", now=True)["said"]
    assert said.count("leaves") + said.count("has left") == 2
    wait_for(lambda: not any(name.startswith("late") for name in trainer.names()))


def test_the_last_sae_stays(trainer: Trainer) -> None:
    """A run without SAEs is none; the sentence says how to end it instead."""
    trainer.produce().ask("detach", name="jump", now=True)
    assert "attach another first" in trainer.refusal_of("detach", name="top")


def test_a_run_is_complete_when_every_sae_is_finished(trainer: Trainer) -> None:
    """Also an endless one. Whoever is finished learns no more, stays in snapshots, and gets one at its end."""
    trainer.produce().ask("cooldown", name="jump")
    assert trainer.sae("jump")["phase"] in ("cooling", "finished")
    wait_for(lambda: trainer.sae("jump")["phase"] == "finished")
    wait_for(lambda: snapshot_names(trainer.directory))
    tokens = trainer.sae("jump")["tokens"]
    assert trainer.newest().saes["jump"]["tokens"] == tokens
    trainer.reach(64)
    assert trainer.sae("jump")["tokens"] == tokens
    assert trainer.ask("cooldown", name="jump")["said"] == "jump is finished already"
    trainer.ask("cooldown", name="top")
    wait_for(lambda: trainer.phase is RunPhase.FINISHED)
    assert sorted(trainer.newest().saes) == ["jump", "jump-ema", "top"]
    assert trainer.loop.roster.is_finished


def test_quarantined_shards_are_told_and_tried_again(trainer: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    """By name and reason, with unknown tokens where nobody knows them; what was retried is in the next checkpoint."""
    trainer.produce()
    with trainer.intake.lock:
        ledger = trainer.intake.ledger
        shard = next(one for one in ledger.shards.open.values() if one.holder is not None)
        ledger.bye(shard.holder or "", Bye(), 0.0)
        ledger.shards.set_quarantined(shard, FailureReport("a torn page"))
    assert ctl.main([str(trainer.directory), "status"]) == 0
    output = capsys.readouterr().out
    assert "1 shards quarantined, tokens of them not trained on: unknown" in output
    assert f"shard {shard.shard} of epoch {shard.epoch}: 'a torn page'" in output
    assert trainer.ask("status")["quarantined"]["tokens"] is None

    assert trainer.ask("retry-quarantined")["shards"] == 1
    saved = load_newest(trainer.directory)
    assert saved is not None and saved.document.ledger.set_aside == []
    assert trainer.ask("status")["quarantined"] == {"shards": 0, "tokens": 0, "newest": []}
    assert trainer.ask("retry-quarantined")["said"] == "no shard can be tried again"


def test_a_paused_run_holds_its_producers_and_goes_on(trainer: Trainer) -> None:
    """No step is made, the buffer fills up, nobody is lost, and reports say so; commands are still carried out."""
    trainer.produce()
    wait_for(lambda: trainer.ask("pause")["said"].startswith("paused"))
    tokens = trainer.ask("status")["tokens"]
    assert trainer.reports[-1].state == "paused"
    time.sleep(0.5)
    status = trainer.ask("status")
    assert (status["state"], status["tokens"], status["tokens_per_second"]) == ("paused", tokens, 0.0)
    assert status["producers"] == {"working": 1, "idle": 0} and status["buffer_rows"] > CAPACITY // 2
    trainer.ask("attach", sae=WIDE)
    trainer.ask("detach", name="jump", now=True)
    wait_for(lambda: trainer.names() == ["top", "wide"])
    trainer.ask("resume")
    trainer.reach(64)
    assert trainer.intake.ledger.sessions_lost == 0 and trainer.ask("status")["state"] != "paused"


def test_a_drained_run_has_trained_all_that_was_under_way(trainer: Trainer) -> None:
    """It stops without being complete, its producer has nothing to compute again, and who asks later is told."""
    trainer.produce().ask("drain")
    wait_for(lambda: trainer.phase is not None)
    ledger = trainer.intake.ledger
    assert trainer.phase is RunPhase.DRAINED and ledger.tokens_buffered == 0
    assert not any(session.leases and session.credit_tokens for session in ledger.sessions.values())
    assert all(int(shard.mask.sum()) == int(shard.trained.sum()) for shard in ledger.shards.open.values())


def test_orders_given_before_the_first_producer_last(tmp_path: Path) -> None:
    """A run that was paused before it began is paused when it is started again, and begins then."""
    with Trainer(tmp_path / "run").at_work() as first:
        first.ask("pause")
    with Trainer(tmp_path / "run").at_work() as second:
        second.producer = Producing(second.settings.stream, named_source())
        wait_for(lambda: second.ask("status")["buffer_rows"] > CAPACITY // 2)
        assert second.ask("status")["state"] == "paused"
        second.ask("resume")
        second.reach(64)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_resumed_run_lets_go_of_its_checkpoint(tmp_path: Path) -> None:
    """No tensor of the file it went on from is kept: it would take as much memory, and as much disk, as the run."""
    saes = [TOP | {"whitening": True}, JUMP]
    with Trainer(tmp_path / "run", sae=saes).at_work() as first:
        first.produce().ask("snapshot")  # and a checkpoint with it
    mapped = re.escape(f"{tmp_path}/run/checkpoint/") + ".*safetensors"
    tensors = load_newest(tmp_path / "run")
    assert tensors and re.search(mapped, Path("/proc/self/maps").read_text())
    del tensors
    with Trainer(tmp_path / "run", sae=saes).at_work() as again:
        again.produce()
        assert not re.search(mapped, Path("/proc/self/maps").read_text())


def test_the_roster_wins_over_the_run_file(tmp_path: Path) -> None:
    """Attached SAEs come back, detached ones do not; the resolved settings of the run are a run file too."""
    with Trainer(tmp_path / "run").at_work() as first:
        first.produce().ask("attach", sae=WIDE)
        first.ask("detach", name="jump", now=True)
        wait_for(lambda: first.names() == ["top", "wide"])
        first.reach(32)
        first.ask("pause")
        tokens = first.sae("wide")["tokens"]
    for saes in ([TOP, JUMP], [TOP, WIDE], [TOP]):
        with Trainer(tmp_path / "run", sae=saes).at_work() as again:
            assert again.names() == ["top", "wide"]
            assert again.sae("wide")["tokens"] == tokens


def test_one_that_never_began_leaves_no_trace(trainer: Trainer) -> None:
    """It goes at once, publishes nothing, and its name is free again."""
    trainer.produce().ask("pause")
    trainer.ask("attach", sae=WIDE)
    assert "nothing is published" in trainer.ask("detach", name="wide")["said"]
    trainer.ask("attach", sae=WIDE | {"k": 4})
    trainer.ask("resume")
    wait_for(lambda: trainer.sae("wide")["tokens"])


# Bits


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    names = np.zeros(32, np.int64)
    return [Batch([torch.randn(32, 4, generator=generator)], names, names) for _ in range(count)]


def fresh(tmp_path: Path) -> Run:
    run = Run(settings_for(tmp_path / "run"), hello_of(named_source()))
    run.initialise(batches(1)[0].x)
    return run


def through_the_disk(run: Run, tmp_path: Path) -> Run:
    """The run as a trainer finds it that is started again."""
    (tmp_path / "run").mkdir(exist_ok=True)
    checkpoint.save(tmp_path / "run", checkpoint_of(run), keep=1)
    saved = load_newest(tmp_path / "run")
    assert saved is not None
    again = Run(run.settings, run.stream, roster_of(saved.document, run.settings))
    again.restore(saved.document.run, saved.tensors.saes)
    return again


def same(ours: Run, theirs: Run) -> bool:
    (our_state, our_tensors), (their_state, their_tensors) = ours.state(), theirs.state()
    assert our_state == their_state and ours.roster.state() == theirs.roster.state()
    our_bits, their_bits = by_key(our_tensors), by_key(their_tensors)
    assert our_bits.keys() == their_bits.keys()
    return all(torch.equal(our_bits[key], their_bits[key]) for key in our_bits)


@pytest.mark.parametrize("what", ["attached", "attached-unbegun", "cooling", "leaving", "detached"])
def test_a_restart_in_the_middle_changes_no_bit(tmp_path: Path, what: str) -> None:
    """With one that joined, has still to begin, cools down, is about to leave or has left."""
    run, some = fresh(tmp_path), batches(12)
    settings = settings_for(tmp_path, sae=[WIDE]).sae[0]
    for batch in some[:4]:
        run.train_step(batch)
    if what.startswith("attached"):
        run.attach(settings, joined_at=128)
        if what == "attached":
            run.initialise(some[4].x)
    elif what == "detached":
        run.detach(run.roster.find("jump"))
    else:
        run.sae_trainers[0].cool_down()
        run.roster.find("top").leaving = what == "leaving"
    resumed = through_the_disk(run, tmp_path)
    for batch in some[4:]:
        for one in (run, resumed):
            one.initialise(batch.x)  # which begins those who have not
            one.train_step(batch)

    assert same(run, resumed)
    assert (run.sae_trainers[0].phase is SaePhase.FINISHED) == (what in ("cooling", "leaving"))


def test_an_sae_has_its_threads_for_good(tmp_path: Path) -> None:
    """With another number sums would round otherwise: neither who joins nor a restart changes it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run = Run(settings_for(tmp_path / "run", run={"directory": "x"}, sae=[TOP]), hello_of(named_source()))
        run.attach(settings_for(tmp_path, sae=[WIDE]).sae[0], joined_at=0)
        assert (torch.get_num_threads(), run.roster.threads) == (2, 2)
        torch.set_num_threads(1)
        through_the_disk(run, tmp_path)
        assert torch.get_num_threads() == min(2, os.cpu_count() or 1)
    finally:
        torch.set_num_threads(before)


def test_a_cooldown_that_has_begun_goes_on_when_it_is_asked_for(tmp_path: Path) -> None:
    """The rate never rises again: the budget's own cooldown is taken over, and then ends the SAE."""
    budget = {"directory": "x", "threads": 1, "tokens": 320}
    run = Run(settings_for(tmp_path / "run", run=budget), hello_of(named_source()))
    some = batches(10)
    run.initialise(some[0].x)
    for batch in some[:9]:
        run.train_step(batch)
    rate = run.sae_trainers[0].learning_rate
    assert run.sae_trainers[0].cool_down() == 32
    run.train_step(some[9])
    assert run.sae_trainers[0].phase is SaePhase.FINISHED and run.sae_trainers[0].learning_rate < rate


# Real processes

FILE = """
[run]
directory = "DIR/run"
[stream]
endpoint = "ipc://DIR/stream"
dtype = "float32"
heartbeat_seconds = 0.2
dead_seconds = 1.5
[corpus]
kind = "synthetic"
context = 8
outlier_factor = 1e6
[corpus.synthetic]
d_in = 8
features = 16
shards = 12
shard_windows = 64
[buffer]
rows = 16500
[optimizer]
batch = 64
matmul = "float32"
warmup_tokens = 500
[[sae]]
name = "top"
architecture = "topk"
d_sae = 32
k = 4
[[sae]]
name = "batch"
architecture = "batchtopk"
d_sae = 32
k = 4
ema_tokens = 1000
[snapshots]
every_tokens = 1500
[checkpoint]
every_seconds = 0.5
[monitor]
trainer_port = 0
producer_port = 0
"""
SHARD_ROWS, CONTEXT, WINDOWS, SHARDS = 512, 8, 64, 12


class Processes:
    """A run's real trainer, which records its rows, and real producers; made to end with the test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.directory, self.started = folder, folder / "run", list[subprocess.Popen[bytes]]()
        (folder / "run.toml").write_text(FILE.replace("DIR", str(folder)))

    def start(self, what: str, *overrides: str, pace: float = 0.0) -> subprocess.Popen[bytes]:
        programs = {
            "trainer": [str(ROOT / "tests/drills/recording_trainer.py"), str(self.folder / "rows")],
            "producer": [str(ROOT / "tests/drills/named_producer.py")],
        }
        command = [sys.executable, *programs[what]]
        with open(self.folder / f"{what}.log", "ab") as log:
            process = subprocess.Popen(
                [*command, str(self.folder / "run.toml"), *overrides], cwd=ROOT, stdout=log, stderr=log,
                env=os.environ | {"SECONDS_PER_STEP": str(pace)},
            )  # fmt: skip
        self.started.append(process)
        if what == "trainer":
            wait_for(self._answers, 60)
        return process

    def _answers(self) -> bool:
        """The trainer has its socket; what a killed one left behind does not count."""
        with socket.socket(socket.AF_UNIX) as connection:
            return not connection.connect_ex(str(self.directory / "ctl"))

    def produce(self) -> Producing:
        """A producer in this process."""
        settings = read_run_file(ProducerSettings, self.folder / "run.toml", [])
        source = NamedSource(settings)
        return Producing(settings.stream, source, hello_of(source, held_out=settings.corpus.held_out))

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        return ask(self.directory, {"command": command, **fields})

    def reach(self, rows: int) -> None:
        wait_for(lambda: self.ask("status")["tokens"] >= rows, 60)

    def rows(self) -> np.ndarray:
        """The names of the tokens trained on, in their order."""
        shard, window, position = np.fromfile(self.folder / "rows", np.int32).reshape(-1, 3).T
        return (shard * WINDOWS + window) * CONTEXT + position

    def bits(self, *saes: str) -> dict[str, str]:
        """sha256 of every tensor of some SAEs in the newest checkpoint."""
        saved = load_newest(self.directory)
        assert saved is not None
        return {
            key: hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            for key, tensor in by_key(saved.tensors.saes).items()
            if key.split("/")[0] in saes
        }


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[[str], Processes]]:
    all_processes: list[Processes] = []

    def make(name: str) -> Processes:
        all_processes.append(Processes(tmp_path / name))
        return all_processes[-1]

    yield make
    for one in all_processes:
        for process in one.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def all_rows(epochs: int = 1) -> np.ndarray:
    shards = np.setdiff1d(np.arange(SHARDS), held_out_shards(SHARDS, 0.0625))
    return np.sort(np.tile((shards[:, None] * SHARD_ROWS + np.arange(SHARD_ROWS)).ravel(), epochs))


@pytest.mark.long
def test_the_others_do_not_notice_by_a_bit(processes: Callable[[str], Processes]) -> None:
    """Two runs over the same tokens, in one of which an SAE joins and leaves again, and another of the file leaves.

    The whole corpus waits in the buffer before the first step, so that both draw the same batches.
    """
    calm, lively = processes("calm"), processes("lively")
    trainers = [calm.start("trainer"), lively.start("trainer", pace=0.02)]
    for run in (calm, lively):
        run.ask("pause")
    producers = [run.produce() for run in (calm, lively)]
    for run in (calm, lively):
        wait_for(lambda run=run: run.ask("status")["buffer_rows"] == len(all_rows()), 60)
        run.ask("resume")
    lively.reach(640)
    lively.ask("attach", sae=WIDE | {"d_sae": 64})
    lively.ask("attach", sae=TOP | {"name": "other", "tokens": 1000})
    lively.reach(1600)
    lively.ask("snapshot")
    lively.ask("detach", name="wide")
    lively.ask("detach", name="batch", now=True)
    assert [trainer.wait(120) for trainer in trainers] == [0, 0]
    assert [producer.wait_for_end() for producer in producers] == [None, None]

    np.testing.assert_array_equal(calm.rows(), lively.rows())
    np.testing.assert_array_equal(np.sort(calm.rows()), all_rows())
    assert calm.bits("top") == lively.bits("top")
    assert {name.split("/")[1] for name in calm.bits("top")} == {"parameters", "adam", "statistics"}
    summary = json.loads((lively.directory / "summary.json").read_text())
    assert {name: sae["tokens"] for name, sae in summary["saes"].items()} == {"top": len(all_rows()), "other": 1024}


@pytest.mark.long
def test_orders_survive_a_kill_and_a_drain(processes: Callable[[str], Processes]) -> None:
    """SIGKILL right after an answer: everything is as it was said. Then a drain; then the end, each token once."""
    run = processes("run")
    more = ("corpus.epochs=5", "checkpoint.every_seconds=1000.0")
    trainer, producer = run.start("trainer", *more, pace=0.01), run.start("producer", *more)
    run.reach(640)
    run.ask("attach", sae=WIDE)
    run.ask("detach", name="batch")
    run.ask("pause")
    before = run.ask("status")
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    bits = run.bits("top", "wide", "batch")

    trainer = run.start("trainer", *more, pace=0.01)
    after = run.ask("status")
    assert "the run is paused" in (run.folder / "trainer.log").read_text()
    assert after["state"] == "paused" and after["tokens"] == before["tokens"]
    for ours, theirs in zip(after["saes"], before["saes"], strict=True):
        assert {key: ours[key] for key in ("name", "tokens", "phase", "rows_left", "fvu")} == {
            key: theirs[key] for key in ("name", "tokens", "phase", "rows_left", "fvu")
        }
    run.ask("resume")
    assert run.bits("top", "wide", "batch") == bits
    wait_for(lambda: [sae["name"] for sae in run.ask("status")["saes"]] == ["top", "wide"], 60)
    run.ask("drain")
    assert trainer.wait(120) == 0 and producer.poll() is None
    saved = load_newest(run.directory)
    assert saved is not None and 0 < saved.document.ledger.rows_trained < len(all_rows(5))

    assert run.start("trainer", *more).wait(120) == 0
    assert producer.wait(120) == 0
    np.testing.assert_array_equal(np.sort(run.rows()), all_rows(5))
    assert not (run.directory / "ctl").exists()
