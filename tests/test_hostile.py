"""Files and requests by somebody who means harm: nothing of theirs is executed, and each is refused in a sentence."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from monitor.http.service import make_app
from producer.common.metrics import new_registry
from producer.corpus import CorpusError, open_corpus
from producer.lm.errors import ModelError
from producer.settings import CorpusSettings
from tests.small_model import load_model, write_model
from tests.small_run import publish_snapshot, small_checkpoint, start_run
from trainer.saes.inference import load_sae
from trainer.snapshot import SnapshotError, verify
from trainer.state.checkpoint import CheckpointError, load_newest, save

HUGE_HEADER = struct.pack("<Q", 1 << 60) + b"{}"
"""A safetensors file that claims a header of 2^60 bytes."""
LYING_HEADER = (lambda text: struct.pack("<Q", len(text)) + text)(
    b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
)
"""One that claims a tensor of 4 TB."""


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def bomb(tmp_path: Path) -> Any:
    """A pickle that must not go off; that it would is tried at the end."""
    trace = tmp_path / "executed"
    yield pickle.dumps(Bomb(trace))
    assert not trace.exists(), "a file's code was executed"
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()


def described(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
@pytest.mark.parametrize("content", [None, HUGE_HEADER, LYING_HEADER, b""])
def test_a_checkpoint_with_right_hashes_and_wrong_contents(
    tmp_path: Path, bomb: bytes, name: str, content: bytes | None
) -> None:
    """Whoever can write there can also write the hashes."""
    folder = save(tmp_path, small_checkpoint(), keep=1)
    (folder / name).write_bytes(bomb if content is None else content)
    files = {part: described(folder / part) for part in ("state.json", "state.safetensors")}
    (folder / "complete.json").write_text(json.dumps(files))

    with pytest.raises(CheckpointError, match=r"cannot be read .*: there is none before it"):
        load_newest(tmp_path)


@pytest.mark.parametrize("content", [None, HUGE_HEADER, LYING_HEADER, b""])
def test_a_snapshot_with_right_hashes_and_wrong_contents(tmp_path: Path, bomb: bytes, content: bytes | None) -> None:
    """The manifest agrees; the weights are none."""
    folder = publish_snapshot(tmp_path, 1000)
    weights = folder / "small" / "sae_weights.safetensors"
    weights.write_bytes(bomb if content is None else content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        entry |= described(folder / entry["path"])
    (folder / "manifest.json").write_text(json.dumps(manifest))
    verify(folder)

    with pytest.raises(SnapshotError, match="holds no readable SAE"):
        load_sae(folder / "small")


def instead(name: str, of: str | None = None) -> Callable[[Path, bytes], None]:
    def write(folder: Path, content: bytes) -> None:
        (folder / (of or name)).unlink()
        (folder / name).write_bytes(content)

    return write


@pytest.mark.parametrize(
    "write",
    [
        instead("pytorch_model.bin", of="model.safetensors"),
        instead("model.safetensors"),
        instead("tokenizer.json"),
        instead("config.json"),
    ],
)
def test_a_model_that_is_a_pickle(tmp_path: Path, bomb: bytes, write: Callable[[Path, bytes], None]) -> None:
    """Under the names of weights, tokenizer and configuration."""
    write(write_model(tmp_path / "model"), bomb)

    with pytest.raises(ModelError):
        load_model(tmp_path / "model")


def test_weights_that_would_fill_the_memory(tmp_path: Path) -> None:
    """A header may claim what it likes."""
    for content in (HUGE_HEADER, LYING_HEADER):
        instead("model.safetensors")(write_model(tmp_path / "model"), content)
        with pytest.raises(ModelError):
            load_model(tmp_path / "model")


def test_tokens_that_are_a_pickle(tmp_path: Path, bomb: bytes) -> None:
    """A numpy file of objects is read as what it is asked for: numbers."""
    trace = tmp_path / "executed"
    np.save(tmp_path / "tokens.npy", np.array([Bomb(trace)] * 64, object), allow_pickle=True)
    with suppress(CorpusError):  # by its length it may be no whole number of tokens
        open_corpus(CorpusSettings(kind="tokens", paths=[str(tmp_path / "tokens.npy")], context=8, held_out=0.0))


# Requests

WORDS = (
    "v1", "snapshots", "latest", "latents", "history", "run", "000000001000", "small", "cfg.json", "manifest.json",
    "metrics", "healthz", "readyz", "..", ".", "", "static", "page", "0", "-1", "sae_weights.safetensors",
)  # fmt: skip
PATHS = st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=7).map("/".join)
QUERIES = st.lists(
    st.tuples(
        st.sampled_from(("after", "token", "limit", "sort", "q", "sae", "since", "text", "x")),
        st.one_of(st.text(max_size=8), st.integers().map(str)),
    ),
    max_size=3,
)
HEADERS = st.lists(
    st.tuples(
        st.sampled_from((b"range", b"if-range", b"if-none-match", b"authorization", b"cookie", b"host", b"accept")),
        st.one_of(st.binary(max_size=24), st.sampled_from((b"bytes=0-", b"bytes=9-1", b"bytes=-5,1-2", b"*"))),
    ),
    max_size=3,
)


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = start_run(tmp_path_factory.mktemp("run") / "demo")
    publish_snapshot(directory, 1000)
    return make_app(directory, new_registry())


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(
    method=st.sampled_from(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "BREW")),
    path=PATHS,
    query=QUERIES,
    headers=HEADERS,
)
def test_no_request_brings_the_service_down(
    app: Any, method: str, path: str, query: list[tuple[str, str]], headers: list[tuple[bytes, bytes]]
) -> None:
    """Any path, query and headers: an answer below 500, and nothing from outside of the snapshot."""
    query_string = "&".join(f"{name}={value}" for name, value in query)
    status, body = asyncio.run(request(app, method, f"/{path}", query_string.encode("utf-8", "surrogatepass"), headers))

    assert 200 <= status < 500 or status == 503, (method, path, query, headers, body[:500])
    assert b"Traceback" not in body


async def request(
    app: Any, method: str, path: str, query: bytes, headers: list[tuple[bytes, bytes]]
) -> tuple[int, bytes]:
    """What the application answers, without a web server that would tidy the request up."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("utf-8", "surrogatepass"),
        "query_string": query,
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        messages.append(message)

    await asyncio.wait_for(app(scope, receive, send), 60)
    return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])
