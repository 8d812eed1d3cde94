"""CONTRACT: the messages between producer and trainer, and how each becomes frames and is read back.

A message is a msgpack map (`v`, `kind` and the fields below), followed for CHUNK and LEASE by one raw frame:

    CHUNK payload    for each hook in HELLO's order: rows × width numbers, row-major, little-endian
    LEASE payload    one bit per position of the shard (window × context + offset), set where the trainer has it already

Everything from the other side is checked here, field by field, before any other code uses it: a fault raises
WireError with a kind that can be counted. Unknown fields are ignored, so that a newer peer may say more. No pickle, no
torch.

A connection holds one session: a second HELLO on it ends the first. One that has no session, because no HELLO came or
was accepted, is closed after ten seconds, and so is one on which more bytes came of a message without an end than its
credit allows. What a run streams (the fingerprint and all that goes with it) is settled by the first activations
that the trainer accepts. Until then a producer that differs from those at work is refused for the moment, and when they
have left, its own facts count.

No message revokes a single lease: a producer that stalls loses its whole session, because the credit it holds must
return together with its leases.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Literal

import msgpack
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

VERSION = 1
MAX_HEADER_BYTES = 64 * 1024
MAX_MASK_BYTES = 8 * 1024 * 1024
MAX_CHUNK_BYTES = 64 * 1024 * 1024
MAX_CHUNK_POSITIONS = 8 * 30 * 1024
"""windows × context of one chunk: two masks of so many bits and the other fields fit into a header."""
TARGET_CHUNK_BYTES = 2 * 1024 * 1024
"""The size that producers aim at: fast, and small enough that a heartbeat never waits long behind a chunk."""

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

Count = Annotated[int, Field(ge=0, lt=2**48)]
Text = Annotated[str, Field(max_length=1024)]
Word = Annotated[str, Field(min_length=1, max_length=128)]
Bits = Annotated[bytes, Field(max_length=MAX_CHUNK_POSITIONS // 8)]


class WireError(ValueError):
    """A message that cannot be used. `kind` names the fault for the metric: size, garbage, version, kind or field."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason[:1024])
        self.kind = kind


class Message(BaseModel):
    """Base of all messages: immutable, checked on arrival, unknown fields ignored."""

    model_config = ConfigDict(
        frozen=True, strict=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )
    kind: ClassVar[str]


HookNumbers = Annotated[list[Count], Field(max_length=256)]
"""Places in HELLO's list of hooks, ascending."""


class Hook(BaseModel):
    """One place of the language model whose activations are streamed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    name: Word
    module: Text
    """Path of the module, with `:input` after it where not its output is streamed: `model.layers.2:input`."""
    width: Annotated[int, Field(gt=0, le=2**20)]


class CorpusShare(BaseModel):
    """One corpus of a mixture."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")
    name: Word
    shards: Annotated[int, Field(gt=0, le=2**24)]
    """Its shards in each epoch of the mixture; they are numbered behind those of the corpora before it."""


class Hello(Message):
    """producer → trainer: who the producer is and what it would stream. Answered by WELCOME or REJECT."""

    kind = "HELLO"
    producer: Word
    """Random, constant over the life of a process: a new session of the same producer ends its old one."""
    session: Word
    """Random for each session."""
    name: Text
    """Host and process, for messages to people."""
    fingerprint: Word
    """Over all that decides the activations: files, tokenizer, windows, exclusions, hooks, model and revision."""
    shards: Annotated[int, Field(gt=0, le=2**24)]
    held_out: Annotated[float, Field(ge=0, lt=1)]
    context: Annotated[int, Field(gt=0, le=2**17)]
    hooks: Annotated[list[Hook], Field(min_length=1, max_length=256)]
    dtype: Literal["bfloat16", "float32"]
    chunk_rows: Annotated[int, Field(gt=0, lt=2**24)]
    """Most activations in one chunk of this producer; the unit of credit."""
    norm_bounds: list[Annotated[float, Field(gt=0)]] | None
    """Per hook, the norm above which an activation is an outlier; the HELLO that settles the run decides for all."""
    provenance: dict[Word, JsonValue]
    """Facts for the snapshot: model, revision, corpus, exclusions, self-check."""
    revision: Text = ""
    """Newest checkpoint of a language model under training that this producer sees; empty for its first weights."""
    revision_number: Count = 0
    corpora: Annotated[list[CorpusShare], Field(max_length=256)] = []
    """Of a mixture; which shard of a corpus a number stands for may differ from epoch to epoch."""

    @model_validator(mode="after")
    def _one_bound_per_hook(self) -> Hello:
        if self.norm_bounds is not None and len(self.norm_bounds) != len(self.hooks):
            raise ValueError(f"{len(self.norm_bounds)} norm_bounds for {len(self.hooks)} hooks")
        return self

    @model_validator(mode="after")
    def _corpora_have_all_shards(self) -> Hello:
        if self.corpora and (counted := sum(corpus.shards for corpus in self.corpora)) != self.shards:
            raise ValueError(f"its corpora have {counted} shards of {self.shards}")
        return self


class Welcome(Message):
    """trainer → producer: the session stands."""

    kind = "WELCOME"
    session: Word
    run: Word
    incarnation: Word
    """Random for each start of the trainer."""
    endpoints: Annotated[list[Text], Field(min_length=1, max_length=256)]
    """The addresses to stream to: one, or one per rank when the trainer is spread."""
    heartbeat_seconds: Annotated[float, Field(gt=0)]
    dead_seconds: Annotated[float, Field(gt=0)]
    max_chunk_bytes: Count
    norm_bounds: list[float] | None


class Reject(Message):
    """trainer → producer: the session is refused or ended."""

    kind = "REJECT"
    code: Word
    reason: Text
    retry: bool
    """True: start a new session. False: this producer can never serve this run (exit code 78)."""


class Lease(Message):
    """trainer → producer: work on this shard. The payload frame masks the activations that the trainer has already."""

    kind = "LEASE"
    shard: Count
    epoch: Count
    attempt: Count
    revision: Text = ""
    """Of a language model under training: the checkpoint whose activations are asked for."""
    hooks: HookNumbers = []
    """Those whose activations are asked for; empty for all."""


class Credit(Message):
    """trainer → producer: the highest chunk number that may be sent in this session, ever; only grows."""

    kind = "CREDIT"
    number: Count


class Chunk(Message):
    """producer → trainer: a few windows of a shard. The payload frame holds their activations."""

    kind = "CHUNK"
    number: Count
    """1, 2, 3, … in a session."""
    incarnation: Word
    shard: Count
    epoch: Count
    attempt: Count
    first_window: Count
    windows: Annotated[int, Field(gt=0, le=2**20)]
    rows: Count
    kept: Bits
    """One bit per position of these windows: the activations in the payload, in order."""
    outliers: Bits
    """Empty, or one bit per position: activations that are dropped because of their norm at any hook of HELLO."""
    hooks: HookNumbers = []
    """Those whose activations are in the payload, at least those of the lease; empty for all."""


class ShardEnd(Message):
    """producer → trainer: every activation of the shard was sent, named as an outlier, or masked."""

    kind = "SHARD_END"
    shard: Count
    epoch: Count
    attempt: Count
    rows: Count
    """All activations of the shard, those masked by the lease included."""
    norm_bounds: list[Annotated[float, Field(gt=0)]] | None = None
    """Of a language model under training, whose revisions have bounds of their own: those of this shard's."""


class ShardFail(Message):
    """producer → trainer: the shard could not be read or run."""

    kind = "SHARD_FAIL"
    shard: Count
    epoch: Count
    attempt: Count
    error: Text
    retry: bool


class Heartbeat(Message):
    """Both directions: the sender lives, and its progress (a producer's passes and chunks, a trainer's steps)."""

    kind = "HEARTBEAT"
    progress: Count
    revision: Text = ""
    """As in HELLO."""
    revision_number: Count = 0


class Drain(Message):
    """trainer → producer: the run is finished, or the trainer leaves and will be back."""

    kind = "DRAIN"
    finished: bool


class Bye(Message):
    """producer → trainer: the producer leaves; its leases are free."""

    kind = "BYE"


KINDS: dict[str, type[Message]] = {
    message.kind: message
    for message in (Hello, Welcome, Reject, Lease, Credit, Chunk, ShardEnd, ShardFail, Heartbeat, Drain, Bye)
}


def encode(message: Message) -> bytes:
    """The header frame of `message`. Raises WireError when the other side would refuse it for its size."""
    header = msgpack.packb({"v": VERSION, "kind": message.kind, **message.model_dump()})
    _check_size(header)
    return header


def decode(header: bytes | memoryview) -> Message:
    """The message in a header frame. Raises WireError for anything that is not one."""
    _check_size(header)
    try:
        fields = msgpack.unpackb(header, strict_map_key=True, max_map_len=512, max_array_len=4096)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError("garbage", f"header is not msgpack: {type(error).__name__}") from None
    if not isinstance(fields, dict):
        raise WireError("garbage", f"header is a {type(fields).__name__}, not a map")
    version, kind = fields.get("v"), fields.get("kind")
    if type(version) is not int or version != VERSION:
        raise WireError("version", f"protocol version {_excerpt(version)}; this side speaks {VERSION}")
    message = KINDS.get(kind) if isinstance(kind, str) else None
    if message is None:
        raise WireError("kind", f"unknown kind {_excerpt(kind)}")
    try:
        return message.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "combination"
        raise WireError("field", f"{message.kind} field {place}: {first['msg']}") from None


def _check_size(header: bytes | memoryview) -> None:
    if len(header) > MAX_HEADER_BYTES:
        raise WireError("size", f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are allowed")


def _excerpt(value: Any) -> str:
    """A value from the other side, short enough for an error; one that nests a thousand deep cannot be printed."""
    return repr(value)[:80] if isinstance(value, str | int | float) else type(value).__name__


def pack_bits(mask: np.ndarray) -> bytes:
    """Packs a bool array into bytes, first position in the lowest bit; trailing zero bytes stay."""
    return np.packbits(mask.ravel(), bitorder="little").tobytes()


def unpack_bits(bits: bytes | memoryview, count: int) -> np.ndarray:
    """Returns the first `count` bits as a bool array; bits beyond the end of `bits` are False."""
    available = min(count, 8 * len(bits))
    mask = np.zeros(count, bool)
    mask[:available] = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=available, bitorder="little")
    return mask


def held_out_shards(shards: int, fraction: float) -> list[int]:
    """Returns the shards never trained on: the `fraction` whose hashes come first, at least one if there are two.

    A function of the number of shards alone, so that producer, trainer and evaluation agree without talking. The
    embedded language model was trained on the shards that this leaves, so the hash must never change.
    """
    if fraction == 0 or shards < 2:
        return []
    count = min(max(1, round(fraction * shards)), shards - 1)

    def rank(shard: int) -> bytes:
        return hashlib.sha256(f"held-out {shard}".encode()).digest()[:8]

    return sorted(sorted(range(shards), key=rank)[:count])
