"""CURVE keys on real sockets: who is let in, who is not, and that both sides say so."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import zmq

from producer.keys import KeysError, connect_encrypted, serve_encrypted, write_keys
from producer.link import RefusedByTrainer
from producer.settings import StreamSettings
from producer.wire import Reject
from tests.small_stream import (
    Peer,
    Producing,
    Tunnel,
    every_name,
    finish,
    stream_settings,
    train,
    trainer,
    wait_for,
)
from trainer.stream.intake import Intake

ROOT = Path(__file__).parent.parent


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    write_keys(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def other_keys(tmp_path: Path) -> Path:
    """Keys of another run; no file in them is known to `keys`."""
    write_keys(tmp_path / "other")
    return tmp_path / "other"


def settings_with(keys: Path | None, endpoint: str = "tcp://127.0.0.1:*", **changes: object) -> StreamSettings:
    return stream_settings(endpoint, keys=None if keys is None else str(keys), **changes)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def refusal(intake: Intake, keys: Path | None) -> str:
    """What a producer with these keys is told."""
    error = Producing(settings_with(keys, intake.endpoint)).wait_for_end()
    assert isinstance(error, RefusedByTrainer)
    return str(error)


# Files


def test_secrets_are_for_their_owner_alone(tmp_path: Path) -> None:
    """Mode 0600, whatever the umask; the new folder is 0700."""
    before = os.umask(0)
    try:
        write_keys(tmp_path / "keys")
    finally:
        os.umask(before)

    secrets = sorted((tmp_path / "keys").rglob("*.key_secret"))
    assert [path.name for path in secrets] == ["client.key_secret", "server.key_secret"]
    assert [mode(path) for path in secrets] == [0o600, 0o600]
    assert mode(tmp_path / "keys") == 0o700
    for path in (tmp_path / "keys").rglob("*.key"):
        assert "secret-key" not in path.read_text()


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    """`keys .` must not lock others out of a folder that holds more than keys."""
    (tmp_path / "project").mkdir(mode=0o755)
    write_keys(tmp_path / "project")

    assert mode(tmp_path / "project") == 0o755
    assert mode(tmp_path / "project" / "client.key_secret") == 0o600


@pytest.mark.parametrize("there", ["server.key", "server.key_secret", "client.key_secret", "clients/client.key"])
def test_keys_are_never_overwritten(tmp_path: Path, there: str) -> None:
    """One file of an old pair is enough to refuse; it stays as it was, and nothing is written beside it."""
    path = tmp_path / there
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")

    with pytest.raises(KeysError, match=r"already; choose another folder"):
        write_keys(tmp_path)
    assert path.read_text() == "precious"
    assert [other for other in tmp_path.rglob("*") if other.is_file()] == [path]


def test_keys_are_not_written_through_a_link(tmp_path: Path) -> None:
    """A link to nowhere is no file yet; a secret that followed it would lie where somebody else wants it."""
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "server.key_secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeysError, match="cannot be written"):
        write_keys(tmp_path / "keys")
    assert not (tmp_path / "elsewhere").exists()


def test_keys_are_written_by_a_command(tmp_path: Path) -> None:
    """`python -m producer keys DIR`: 0 and what goes where; 2 and a sentence when it cannot."""

    def run(folder: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "producer", "keys", str(folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    (tmp_path / "file").write_text("")
    first, again, impossible = run(tmp_path / "keys"), run(tmp_path / "keys"), run(tmp_path / "file" / "keys")

    assert first.returncode == 0
    assert "client.key_secret" in first.stdout
    assert (again.returncode, impossible.returncode) == (2, 2)
    assert "Traceback" not in again.stderr + impossible.stderr
    assert "cannot be written" in impossible.stderr


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("client.key_secret", None, "is missing"),
        ("server.key", None, "is missing"),
        ("client.key_secret", "hello", "is not a key file"),
        ("client.key_secret", 'metadata\ncurve\n    public-key = "{public}"\n', "holds no secret key"),
        ("client.key_secret", 'metadata\ncurve\n    public-key = "{public}"\n    secret-key = "short"\n', "is damaged"),
        ("server.key", 'metadata\ncurve\n    public-key = "short"\n', "is damaged"),
    ],
)
def test_a_producer_says_which_key_file_it_cannot_use(
    keys: Path, name: str, damage: str | None, complaint: str
) -> None:
    """The path and what is wrong with it, not an errno of ZeroMQ."""
    if damage is None:
        (keys / name).unlink()
    else:
        (keys / name).write_text(damage.format(public=zmq.curve_keypair()[0].decode()))
    error = Producing(settings_with(keys, "tcp://127.0.0.1:1")).wait_for_end()

    assert isinstance(error, KeysError)
    assert f"{keys / name} {complaint}" in str(error)


@pytest.mark.parametrize("missing", ["server.key_secret", "clients"])
def test_a_trainer_does_not_open_without_its_keys(keys: Path, missing: str) -> None:
    """It names what is missing and leaves nothing half open: with the file back, the same address can be bound."""
    settings = settings_with(keys)
    with trainer(settings) as intake:
        settings = settings_with(keys, intake.endpoint)
    (keys / missing).rename(keys / "away")
    with pytest.raises(KeysError, match=missing), trainer(settings):
        pass
    (keys / "away").rename(keys / missing)

    with trainer(settings) as intake:
        assert finish(intake, Producing(settings)) == every_name()


# Sockets


def test_an_encrypted_stream_is_a_stream(keys: Path) -> None:
    """Two producers with the right keys: every token once; nobody is counted as turned away."""
    with trainer(settings_with(keys)) as intake:
        settings = settings_with(keys, intake.endpoint)

        assert finish(intake, Producing(settings), Producing(settings)) == every_name()
        assert intake.stream_report().auth_failures == 0


def test_what_crosses_the_wire_cannot_be_read(keys: Path) -> None:
    """Somebody in between sees neither headers nor tokens."""
    with trainer(settings_with(keys)) as intake, Tunnel(intake.endpoint) as tunnel:
        names = finish(intake, Producing(settings_with(keys, tunnel.endpoint)))

    assert names == every_name()
    assert len(tunnel.traffic) > 4 * 4 * len(names)
    assert b"CURVE" in tunnel.traffic
    assert b"HELLO\xa8producer" not in tunnel.traffic
    assert b"SHARD_END" not in tunnel.traffic


def test_an_unknown_key_is_refused_and_both_sides_say_so(
    keys: Path, other_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The producer leaves with what to do, the trainer logs the key and counts; who is known goes on undisturbed."""
    shutil.copy(keys / "server.key", other_keys / "server.key")
    with trainer(settings_with(keys)) as intake:
        at_work = Producing(settings_with(keys, intake.endpoint))
        names = train(intake, 32)

        assert "does not know this producer's key" in refusal(intake, other_keys)
        wait_for(lambda: intake.stream_report().auth_failures == 1)
        key = (other_keys / "clients" / "client.key").read_text().split('"')[1]
        assert any(key in record.message for record in caplog.records if record.levelno == logging.WARNING)
        assert sorted(names + finish(intake, at_work)) == every_name()


def test_a_wrong_server_key_is_told(keys: Path, other_keys: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The producer trusts another trainer than the one it found; the trainer counts and warns once."""
    shutil.copy(other_keys / "server.key", keys / "server.key")
    with trainer(settings_with(keys)) as intake:
        assert "no agreement on keys" in refusal(intake, keys)
        wait_for(lambda: intake.stream_report().auth_failures >= 3)

    lines = [record.message for record in caplog.records if "turned away" in record.message]
    assert len(lines) == 1
    assert "stream.keys" in lines[0]


@pytest.mark.parametrize("keyless", ["producer", "trainer"])
def test_keys_on_one_side_only_are_told(keys: Path, keyless: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither side streams in the clear to one that expects keys; both name the setting.

    Who sees it first hangs up. A producer that only sees the other hang up warns, and is sure a few seconds later.
    """
    advice = "stream.keys must be set on both sides or on neither"
    with trainer(settings_with(None if keyless == "trainer" else keys)) as intake:
        producer = Producing(settings_with(None if keyless == "producer" else keys, intake.endpoint))

        def tellers() -> set[str]:
            return {record.name for record in caplog.records if advice in record.message}

        wait_for(lambda: producer.refusal or "sluice.producer" in tellers())
        if keyless == "producer":
            wait_for(lambda: intake.ledger.auth_failures and "sluice.trainer" in tellers())
        assert advice in str(producer.wait_for_end())
        assert not intake.ledger.sessions


def test_a_client_key_can_be_withdrawn_and_given_back(keys: Path) -> None:
    """Deleting its file denies the next connection, putting it back admits it: nothing needs a restart."""
    with trainer(settings_with(keys)) as intake:
        settings = settings_with(keys, intake.endpoint)
        (keys / "clients" / "client.key").rename(keys / "withdrawn")

        assert "does not know this producer's key" in refusal(intake, keys)
        (keys / "withdrawn").rename(keys / "clients" / "any name will do.key")
        assert finish(intake, Producing(settings)) == every_name()


def test_a_withdrawn_key_ends_its_sessions_and_no_others(keys: Path, tmp_path: Path) -> None:
    """After SIGHUP: one producer is refused, the session of the other is the same as before."""
    second = tmp_path / "second"
    write_keys(second)
    (second / "clients" / "client.key").rename(keys / "clients" / "second.key")
    shutil.copy(keys / "server.key", second / "server.key")
    with trainer(settings_with(keys)) as intake:
        stays, goes = (Producing(settings_with(folder, intake.endpoint)) for folder in (keys, second))
        wait_for(lambda: stays.link.sessions == goes.link.sessions == 1)
        (keys / "clients" / "second.key").unlink()
        assert len(intake.ledger.sessions) == 2
        intake.reload_keys()
        error = goes.wait_for_end()

        assert isinstance(error, RefusedByTrainer)
        assert "its key was withdrawn" in str(error)
        assert stays.link.sessions == 1
        assert finish(intake, stays) == every_name()


def test_a_withdrawn_key_says_no_second_hello_on_its_old_connection(keys: Path) -> None:
    """Also without SIGHUP; the handshake of that connection was long ago."""
    settings = settings_with(keys)
    with trainer(settings) as intake, Peer(settings_with(keys, intake.endpoint)) as peer:
        peer.join()
        (keys / "clients" / "client.key").unlink()
        peer.send(peer.hello.model_copy(update={"session": "another"}))

        assert peer.receive(Reject).code == "key"


def test_without_its_doorkeeper_nobody_is_let_in(keys: Path, tmp_path: Path) -> None:
    """Should the thread that asks for keys be gone, the socket refuses everybody rather than nobody."""
    with zmq.Context() as context:
        context.linger = 0
        server = context.socket(zmq.ROUTER)
        authenticator, _ = serve_encrypted(context, server, str(keys))
        server.bind(f"ipc://{tmp_path}/door")

        def knocks() -> bool:
            client = context.socket(zmq.DEALER)
            connect_encrypted(client, str(keys))
            client.connect(f"ipc://{tmp_path}/door")
            client.send(b"here I am")
            return bool(server.poll(1000))

        assert knocks()
        server.recv_multipart()
        authenticator.stop()
        assert not knocks()
        context.destroy()


def test_a_broken_file_among_the_clients_locks_nobody_out(keys: Path) -> None:
    """A key that is just being copied here is passed over; the others count."""
    (keys / "clients" / "a.key").write_text("")
    (keys / "clients" / "b.key").mkdir()
    with trainer(settings_with(keys)) as intake:
        assert finish(intake, Producing(settings_with(keys, intake.endpoint))) == every_name()


def test_a_tunnel_without_a_trainer_is_no_verdict(caplog: pytest.LogCaptureFixture) -> None:
    """A proxy that accepts and hangs up is warned about; the producer waits for the trainer behind it."""
    with socket.create_server(("127.0.0.1", 0)) as door:

        def hang_up() -> None:
            while True:
                try:
                    door.accept()[0].close()
                except OSError:
                    return

        threading.Thread(target=hang_up, daemon=True).start()
        endpoint = f"tcp://127.0.0.1:{door.getsockname()[1]}"
        producer = Producing(settings_with(None, endpoint))
        wait_for(lambda: any("tunnel" in record.message for record in caplog.records))
        assert producer.link.state == "connecting"
        door.shutdown(socket.SHUT_RDWR)
    with trainer(settings_with(None, endpoint)) as intake:
        assert finish(intake, producer) == every_name()
