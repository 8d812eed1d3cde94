"""CURVE keys: who may connect, and to whom. CONTRACT: the trainer opens its socket with the same functions.

    keys/
        server.key            public key of the trainer; producers need it
        server.key_secret     the trainer's own, mode 0600
        client.key_secret     a producer's own, mode 0600
        clients/client.key    public keys of the producers that are let in

CURVE alone lets any client in, so the trainer asks a ZAP authenticator with the list of `clients/`. Domain and
enforcement are both set: should the authenticator not run, everybody is refused.
"""

from __future__ import annotations

import os
from pathlib import Path

import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

DOMAIN = "sluice"


class KeysError(ValueError):
    """Keys are missing or unreadable. The message is for the operator."""


def write_keys(folder: Path) -> None:
    """Writes a server's and a client's key pair; never overwrites one. Raises KeysError when there are some."""
    if (folder / "server.key_secret").exists():
        raise KeysError(f"{folder} holds keys already; choose another folder, or remove them first")
    (folder / "clients").mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name, public_folder in (("server", folder), ("client", folder / "clients")):
        public, secret = zmq.curve_keypair()
        _write(public_folder / f"{name}.key", public, None, 0o644)
        _write(folder / f"{name}.key_secret", public, secret, 0o600)


def _write(path: Path, public: bytes, secret: bytes | None, mode: int) -> None:
    text = f'curve\n    public-key = "{public.decode()}"\n'
    if secret is not None:
        text += f'    secret-key = "{secret.decode()}"\n'
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "w") as file:
        file.write(f"metadata\n{text}")


def serve_encrypted(context: zmq.Context, socket: zmq.Socket, folder: str) -> ThreadAuthenticator:
    """Makes `socket`, before it binds, a CURVE server that lets in the keys in `folder`/clients and nobody else."""
    if not zmq.has("curve"):
        raise KeysError("this ZeroMQ was built without CURVE; install pyzmq from its wheel")
    public, secret = _load(Path(folder) / "server.key_secret")
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve(domain=DOMAIN, location=str(Path(folder) / "clients"))
    socket.curve_publickey, socket.curve_secretkey = public, secret
    socket.curve_server = True
    socket.zap_domain = DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    return authenticator


def connect_encrypted(socket: zmq.Socket, folder: str) -> None:
    """Gives `socket`, before it connects, this producer's keys and the trainer's public one."""
    server, _ = _load(Path(folder) / "server.key", secret_needed=False)
    public, secret = _load(Path(folder) / "client.key_secret")
    socket.curve_serverkey = server
    socket.curve_publickey, socket.curve_secretkey = public, secret


def _load(path: Path, secret_needed: bool = True) -> tuple[bytes, bytes]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except OSError:
        raise KeysError(f"stream.keys: {path} is missing; write keys with `python -m producer keys DIR`") from None
    except ValueError as error:
        raise KeysError(f"stream.keys: {path} is not a key file: {error}") from None
    if secret is None and secret_needed:
        raise KeysError(f"stream.keys: {path} holds no secret key; copy the .key_secret file of this side")
    return public, secret or b""
