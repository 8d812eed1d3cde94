"""CURVE keys: who may connect, and to whom. CONTRACT: the trainer opens its socket with the same functions.

    keys/
        server.key            public key of the trainer; producers need it
        server.key_secret     the trainer's own, mode 0600
        client.key_secret     a producer's own, mode 0600
        clients/client.key    public keys of the producers that are let in

CURVE alone lets any client in, so the trainer asks a ZAP authenticator with the list of `clients/`. Domain and
enforcement are both set: should the authenticator not run, everybody is refused. The list is read at each handshake
and each HELLO: a file added there lets its owner in at once, a file removed keeps it out from its next session on.
SIGHUP to the trainer ends the sessions whose key was removed, and no others.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from producer.common.logs import OutsideLog
from producer.common.shell import shell_command

log = logging.getLogger("sluice.keys")

DOMAIN = "sluice"


class KeysError(ValueError):
    """Keys are missing or unreadable. The message is for the operator."""


def write_keys(folder: Path) -> None:
    """Writes a server's and a client's key pair; never overwrites one. Raises KeysError when it cannot."""
    pairs = [(folder / "server.key", folder / "server.key_secret")]
    pairs += [(folder / "clients" / "client.key", folder / "client.key_secret")]
    if names := [path.name for pair in pairs for path in pair if path.exists()]:
        raise KeysError(f"{folder} holds {', '.join(names)} already; choose another folder, or remove them first")
    try:
        # A folder that was there already keeps its mode: it may be somebody's home.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "clients").mkdir(exist_ok=True)
        for public_path, secret_path in pairs:
            public, secret = zmq.curve_keypair()
            _write(public_path, public, None, 0o644)
            _write(secret_path, public, secret, 0o600)
        for directory in (folder / "clients", folder):
            _flush(directory)
    except OSError as error:
        raise KeysError(f"keys cannot be written to {folder}: {error.strerror}; choose another folder") from None


def _write(path: Path, public: bytes, secret: bytes | None, mode: int) -> None:
    text = f'curve\n    public-key = "{public.decode()}"\n'
    if secret is not None:
        text += f'    secret-key = "{secret.decode()}"\n'
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"metadata\n{text}")
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """Flushes the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def serve_encrypted(context: zmq.Context, socket: zmq.Socket, folder: str) -> tuple[ThreadAuthenticator, Clients]:
    """Makes `socket`, before it binds, a CURVE server that lets in the keys in `folder`/clients and nobody else.

    Returns the authenticator, which must be stopped before the context ends, and the keys that it consults.
    """
    if not zmq.has("curve"):
        raise KeysError("this ZeroMQ was built without CURVE; install pyzmq from its wheel")
    public, secret = _load(Path(folder).absolute() / "server.key_secret")
    client_folder = Path(folder).absolute() / "clients"
    if not client_folder.is_dir():
        raise KeysError(f"stream.keys: folder {client_folder} is missing: put the producers' public keys (*.key) there")
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    clients = Clients(client_folder)
    authenticator.configure_curve_callback(DOMAIN, clients)
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_server = True
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return authenticator, clients


class Clients:
    """The public keys in a folder, read anew each time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.outside = OutsideLog(log)
        """Log of lines that unknown peers cause; a caller that calls `allows` often also calls its `flush`."""

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator: whether the producer with this key is let in."""
        if self.allows(key):
            return True
        message = "a producer was turned away: no file in %s holds its public key %s"
        self.outside.warning(message, self._folder, key.decode())
        return False

    def allows(self, key: bytes) -> bool:
        """Whether a file in the folder holds this public key."""
        return any(key == self._key_in(path) for path in self._folder.glob("*.key"))

    def _key_in(self, path: Path) -> bytes | None:
        try:
            return zmq.auth.load_certificate(path)[0]
        except (OSError, ValueError) as error:  # being copied here just now, or no key at all
            self.outside.warning("%s is passed over: %s", path, error)
            return None


def connect_encrypted(socket: zmq.Socket, folder: str) -> None:
    """Gives `socket`, before it connects, this producer's keys and the trainer's public one."""
    server, _ = _load(Path(folder).absolute() / "server.key", secret_needed=False)
    public, secret = _load(Path(folder).absolute() / "client.key_secret")
    socket.curve_serverkey = server
    socket.curve_publickey, socket.curve_secretkey = public, secret


def _load(path: Path, secret_needed: bool = True) -> tuple[bytes, bytes]:
    """(public, secret) of a key file. Raises KeysError for one that ZeroMQ would not take."""
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        fault = "is missing" if not path.exists() else f"cannot be read ({error.strerror})"
        raise KeysError(
            f"stream.keys: {path} {fault}; write keys with `{shell_command('producer', 'keys', 'DIR')}`"
        ) from None
    except ValueError as error:
        raise KeysError(f"stream.keys: {path} is not a key file: {error}") from None
    if secret is None and secret_needed:
        raise KeysError(f"stream.keys: {path} holds no secret key; copy the .key_secret file of this side")
    if not _is_valid(public, secret):
        raise KeysError(f"stream.keys: {path} is damaged; copy it again, or write new keys")
    return public, secret or b""


def _is_valid(public: bytes, secret: bytes | None) -> bool:
    """A secret key must give the public one beside it; of a public key alone, length and alphabet can be checked."""
    try:
        return zmq.curve_public(secret or public) == public or secret is None
    except (zmq.ZMQError, ValueError):
        return False
