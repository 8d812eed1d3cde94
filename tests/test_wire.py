"""The messages: what one side encodes the other reads back, and nothing else gets through."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from producer.wire import (
    KINDS,
    MAX_CHUNK_POSITIONS,
    MAX_HEADER_BYTES,
    VERSION,
    Bye,
    Chunk,
    Credit,
    Drain,
    Heartbeat,
    Hello,
    Hook,
    Lease,
    Message,
    Reject,
    ShardEnd,
    ShardFail,
    Welcome,
    WireError,
    decode,
    encode,
    held_out_shards,
    pack_bits,
    unpack_bits,
)

quick = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

counts = st.integers(0, 2**48 - 1)
words = st.text(min_size=1, max_size=128)
texts = st.text(max_size=60)
positive = st.floats(min_value=1e-30, max_value=1e30)
bits = st.binary(max_size=64)
hooks = st.lists(st.builds(Hook, name=words, module=texts, width=st.integers(1, 2**20)), min_size=1, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def hellos(draw: st.DrawFn) -> Hello:
    streamed = draw(hooks)
    bounds = st.lists(positive, min_size=len(streamed), max_size=len(streamed))
    return Hello(
        producer=draw(words),
        session=draw(words),
        name=draw(texts),
        fingerprint=draw(words),
        shards=draw(st.integers(1, 2**24)),
        held_out=draw(st.floats(0, 1, exclude_max=True)),
        context=draw(st.integers(1, 2**17)),
        hooks=streamed,
        dtype=draw(st.sampled_from(("bfloat16", "float32"))),
        chunk_rows=draw(st.integers(1, 2**24 - 1)),
        norm_bounds=draw(st.none() | bounds),
        provenance=draw(st.dictionaries(words, json_values, max_size=3)),
    )


lease_names = {"shard": counts, "epoch": counts, "attempt": counts}
MESSAGES: dict[str, st.SearchStrategy[Message]] = {
    "HELLO": hellos(),
    "WELCOME": st.builds(
        Welcome, session=words, run=words, incarnation=words, endpoints=st.lists(texts, min_size=1, max_size=3),
        heartbeat_seconds=positive, dead_seconds=positive, max_chunk_bytes=counts,
        norm_bounds=st.none() | st.lists(positive, max_size=3),
    ),
    "REJECT": st.builds(Reject, code=words, reason=texts, retry=st.booleans()),
    "LEASE": st.builds(Lease, **lease_names),
    "CREDIT": st.builds(Credit, number=counts),
    "CHUNK": st.builds(
        Chunk, number=counts, incarnation=words, **lease_names, first_window=counts, windows=st.integers(1, 2**20),
        rows=counts, kept=bits, outliers=bits,
    ),
    "SHARD_END": st.builds(ShardEnd, **lease_names, rows=counts),
    "SHARD_FAIL": st.builds(ShardFail, **lease_names, error=texts, retry=st.booleans()),
    "HEARTBEAT": st.builds(Heartbeat, progress=counts),
    "DRAIN": st.builds(Drain, finished=st.booleans()),
    "BYE": st.builds(Bye),
}  # fmt: skip


def header(**fields: Any) -> bytes:
    return msgpack.packb({"v": VERSION, **fields})


def hello_header(**changes: Any) -> bytes:
    """A plain HELLO with some fields changed; a field set to None here is None, not left out."""
    plain = {
        "kind": "HELLO", "producer": "p", "session": "s", "name": "host", "fingerprint": "f", "shards": 4,
        "held_out": 0.25, "context": 8, "hooks": [{"name": "h", "module": "m", "width": 4}], "dtype": "float32",
        "chunk_rows": 16, "norm_bounds": None, "provenance": {},
    }  # fmt: skip
    return header(**(plain | changes))


def fault(frame: bytes) -> str:
    with pytest.raises(WireError) as error:
        decode(frame)
    assert len(str(error.value)) <= 1024, "a peer must not write novels into our log"
    return error.value.kind


def nested(depth: int) -> bytes:
    """A list in a list in a list, as msgpack: harmless to read, fatal to print."""
    return b"\x91" * depth + b"\x01"


# There and back


def test_every_kind_is_tried_here() -> None:
    """A new message needs a strategy above."""
    assert set(MESSAGES) == set(KINDS)


@pytest.mark.parametrize("kind", MESSAGES)
@quick
@given(data=st.data())
def test_decode_is_the_inverse_of_encode(kind: str, data: st.DataObject) -> None:
    """decode(encode(m)) == m."""
    message = data.draw(MESSAGES[kind])
    assert decode(encode(message)) == message
    assert decode(memoryview(encode(message))) == message


def test_header_is_a_plain_map() -> None:
    """What others have to write, byte for byte: a map with `v`, `kind` and the fields."""
    assert msgpack.unpackb(encode(Credit(number=7))) == {"v": 1, "kind": "CREDIT", "number": 7}


def test_unknown_fields_are_ignored() -> None:
    """A newer peer may say more, in any shape that msgpack has."""
    assert decode(header(kind="CREDIT", number=7, colour=[{"deep": b"\x00"}])) == Credit(number=7)


def test_largest_chunk_header_fits() -> None:
    """Both masks at their limit still make a header that the other side accepts."""
    large, mask = 2**48 - 1, bytes(MAX_CHUNK_POSITIONS // 8)
    chunk = Chunk(
        number=large, incarnation="i" * 128, shard=large, epoch=large, attempt=large, first_window=large,
        windows=2**20, rows=large, kept=mask, outliers=mask,
    )  # fmt: skip
    assert decode(encode(chunk)) == chunk


def test_too_large_a_header_is_refused_by_its_sender() -> None:
    """Sending it would only end in silence: the other side drops it and cannot say whose it was."""
    hello = decode(hello_header())
    assert isinstance(hello, Hello)
    with pytest.raises(WireError, match="70"):
        encode(hello.model_copy(update={"provenance": {"novel": "x" * 70_000}}))


def test_message_is_immutable() -> None:
    """It can be handed between threads."""
    with pytest.raises(ValidationError):
        Credit(number=1).number = 2  # type: ignore[misc]


# What is refused, and as what


def test_too_large_a_header_is_refused_unread() -> None:
    """64 KiB and one byte."""
    assert fault(bytes(MAX_HEADER_BYTES + 1)) == "size"


GARBAGE = {
    "empty": b"",
    "reserved": b"\xc1",
    "cut off": b"\x81",
    "list": b"\x90",
    "number": b"\x01",
    "text": b"\xa1v",
    "followed by something": header(kind="BYE") + b"\x00",
    "not utf-8": b"\x81\xa1\xff\x01",
    "nested": nested(60_000),
}


@pytest.mark.parametrize("frame", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_one_msgpack_map_is_garbage(frame: bytes) -> None:
    """Including a map that is cut off or followed by something."""
    assert fault(frame) == "garbage"


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.0, [1], {}])
def test_other_version_is_refused(version: object) -> None:
    """Only the integer 1 is version 1."""
    assert fault(msgpack.packb({"v": version, "kind": "BYE"})) == "version"
    assert fault(msgpack.packb({"kind": "BYE"})) == "version"


@pytest.mark.parametrize("kind", ["", "bye", "Message", "PICKLE", None, 1, ["BYE"], {"BYE": 1}, b"BYE"])
def test_unknown_kind_is_refused(kind: object) -> None:
    """It is counted, so that a newer peer is noticed."""
    assert fault(header(kind=kind)) == "kind"
    assert fault(header()) == "kind"


@pytest.mark.parametrize("depth", [100, 200, 500, 900, 1000, 1020])
def test_deeply_nested_values_do_not_bring_the_reader_down(depth: int) -> None:
    """Printing such a value, or copying it, would end in a RecursionError and with it the socket's thread."""
    assert fault(b"\x81\xa1v" + nested(depth)) == "version"
    assert fault(b"\x82\xa1v\x01\xa4kind" + nested(depth)) == "kind"
    plain = hello_header()
    assert plain.endswith(b"\x80")
    deep = plain[:-1] + b"\x81\xa1a" + nested(depth)
    if depth >= 500:
        assert fault(deep) == "field"
    else:
        assert decode(encode(decode(deep))) == decode(deep)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": True},
        {"shards": 4.0},
        {"shards": "4"},
        {"shards": 0},
        {"shards": 2**24 + 1},
        {"held_out": False},
        {"held_out": 1.0},
        {"held_out": float("nan")},
        {"context": -8},
        {"context": 2**40},
        {"producer": b"p"},
        {"producer": ""},
        {"producer": "p" * 129},
        {"name": "n" * 1025},
        {"dtype": "float64"},
        {"hooks": []},
        {"hooks": "h"},
        {"hooks": [{"name": "h", "module": "m"}]},
        {"hooks": [{"name": "h", "module": "m", "width": True}]},
        {"hooks": [{"name": "h", "module": "m", "width": 4}] * 257},
        {"norm_bounds": [0.0]},
        {"norm_bounds": [float("inf")]},
        {"norm_bounds": [1.0, 2.0]},
        {"norm_bounds": []},
        {"provenance": None},
        {"provenance": {"": 1}},
        {"provenance": {"k" * 60_000: 1}},
        {"provenance": {"weights": b"\x80\x04"}},
        {"provenance": {"when": msgpack.Timestamp(1)}},
        {"provenance": {"what": msgpack.ExtType(1, b"")}},
        {"provenance": {"loss": float("nan")}},
    ],
    ids=repr,
)
def test_faulty_field_is_refused(changes: dict[str, Any]) -> None:
    """A bool is no integer, a number is no text, every range is held, and provenance is fit for JSON."""
    assert isinstance(decode(hello_header()), Hello)
    assert fault(hello_header(**changes)) == "field"


def test_missing_field_is_named() -> None:
    """The log says which field of which message is wrong."""
    with pytest.raises(WireError, match="LEASE field epoch"):
        decode(header(kind="LEASE", shard=1, attempt=1))


@settings(quick, max_examples=300)
@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_a_wire_error(frame: bytes) -> None:
    """Nothing else is ever raised."""
    survive(frame)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.binary(), inner, max_size=4),
    max_leaves=10,
)


@settings(quick, max_examples=300)
@given(st.data())
def test_spoilt_messages_are_a_message_or_a_wire_error(data: st.DataObject) -> None:
    """A good message with one field replaced by anything, or with a few bytes changed."""
    message = data.draw(st.one_of(*MESSAGES.values()))
    fields = {"v": VERSION, "kind": message.kind, **message.model_dump()}
    survive(msgpack.packb(fields | {data.draw(st.sampled_from(sorted(fields))): data.draw(junk)}))
    frame = bytearray(encode(message))
    for _ in range(3):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    survive(bytes(frame))


def survive(frame: bytes) -> None:
    try:
        message = decode(frame)
    except WireError as error:
        assert error.kind in ("size", "garbage", "version", "kind", "field")
    else:
        assert decode(encode(message)) == message


# Bits


def test_first_position_is_the_lowest_bit() -> None:
    """Positions 0, 3 and 8 of ten."""
    mask = np.zeros(10, bool)
    mask[[0, 3, 8]] = True
    assert pack_bits(mask) == bytes([0b00001001, 0b00000001])


@quick
@given(st.lists(st.booleans(), max_size=40), st.integers(0, 30))
def test_bits_come_back(values: list[bool], more: int) -> None:
    """unpack(pack(mask)) is the mask; what lies beyond the end of the bytes is False."""
    mask = np.array(values, bool)
    assert unpack_bits(pack_bits(mask), len(mask)).tolist() == values
    longer = unpack_bits(pack_bits(mask), 8 * len(pack_bits(mask)) + more)
    assert longer.dtype == bool and longer[: len(mask)].tolist() == values and not longer[len(mask) :].any()


def test_windows_follow_each_other_in_a_mask() -> None:
    """A [windows, context] mask is packed window after window."""
    mask = np.zeros((2, 4), bool)
    mask[1, 0] = True
    assert np.flatnonzero(unpack_bits(pack_bits(mask), 8)).tolist() == [4]


# Held-out shards


@pytest.mark.parametrize(
    ("shards", "fraction", "count"),
    [
        (100, 0.1, 10), (10, 0.01, 1), (3, 0.99, 2), (2, 0.5, 1),
        (10, 0.28, 3), (10, 0.22, 2), (10, 0.25, 2), (10, 0.35, 4),  # to the nearest; halves to the even one
    ],
)  # fmt: skip
def test_held_out_fraction_is_kept(shards: int, fraction: float, count: int) -> None:
    """At least one where there are two shards, and at least one to train on."""
    held_out = held_out_shards(shards, fraction)
    assert (
        len(held_out) == count == len(set(held_out))
        and held_out == sorted(held_out)
        and set(held_out) <= set(range(shards))
    )


@pytest.mark.parametrize(("shards", "fraction"), [(100, 0.0), (1, 0.5)])
def test_nothing_is_held_out_when_not_asked_or_not_possible(shards: int, fraction: float) -> None:
    """A single shard is trained on."""
    assert held_out_shards(shards, fraction) == []


def test_held_out_shards_are_always_the_same() -> None:
    """Producer, trainer and evaluation agree without talking, today and after an upgrade."""
    assert held_out_shards(64, 0.0625) == [0, 13, 33, 46]
    assert all(type(shard) is int for shard in held_out_shards(64, 0.0625))


def test_larger_fraction_holds_out_more_of_the_same() -> None:
    """Raising the fraction never brings a held-out shard into training."""
    assert set(held_out_shards(1000, 0.02)) < set(held_out_shards(1000, 0.1))


def test_held_out_shards_are_spread() -> None:
    """They come from all parts of the corpus: 1000 of 10,000, so each tenth has about 100."""
    tenths = np.bincount(np.array(held_out_shards(10_000, 0.1)) // 1000, minlength=10)
    assert tenths.min() > 60 and tenths.max() < 140
