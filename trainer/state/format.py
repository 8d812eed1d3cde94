"""The contents of a checkpoint as typed parts, and the keys under which they are stored.

A checkpoint has a document (JSON) and tensors (safetensors):

    CheckpointDocument    counters, schedules, the roster, the ledger's books, the state of the buffer's draw
    CheckpointTensors     weights, moments, statistics, the bits of open shards, the names of buffered activations

The document's keys are the names of the fields below; those of `RunState` are at its top level, beside `format`. The
tensors' keys are

    sae/NAME/parameters/W_enc, sae/NAME/ema/W_enc
    sae/NAME/adam/W_enc.exp_avg, .exp_avg_sq, .step
    sae/NAME/adam/W_enc.z, adam/weight_sum              of another optimizer, with names of its own
    sae/NAME/statistics/FIELD, sae/NAME/whitening/FIELD
    ledger/SERIAL.trained, .discarded
    buffer/names

The tensors with one row per latent may be spread over files by ranges of latents: `CheckpointDocument.latents` lists
them. Where it lists none, one file has all rows, as in version 3.

No other module names a key. Whoever owns a part makes it in `state()` and takes it in `restore()`. The format changes
with VERSION, and with an entry of MIGRATIONS (`migrations`) that brings older documents to it. Light: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from pydantic import TypeAdapter, ValidationError

from producer.wire import Hello, unpack_bits
from trainer.saes.settings import SHARED_PARAMETERS
from trainer.state.migrations import VERSION, CheckpointFormatError, Json, migrated

if TYPE_CHECKING:
    from torch import Tensor

# The document ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaeState:
    """Counters and schedule of one SAE trainer."""

    variance: float
    """Of the scaled activations that it reconstructs: the unit of its loss."""
    skipped_steps: int
    tokens: int
    """Tokens that this SAE has trained on."""
    joined_at: int
    """Tokens that the run had trained on when it joined."""
    cooldown: tuple[int, int] | None
    """Start and end of a cooldown that was asked for, in its own tokens."""
    seed: int
    matmul: str
    """Number format of its products, a dtype of torch."""
    planned_tokens: int | None
    """Tokens that it was to train on when it joined; its defaults follow from them. None: without an end."""


@dataclass(frozen=True)
class RunState:
    """Counters of the run, and its SAEs by name. SAEs whose first weights are still to be drawn are not in it."""

    step: int
    seconds: float
    """Time spent training, without pauses."""
    scales: list[float] | None
    """One per hook; None until they are estimated."""
    saes: dict[str, SaeState]


@dataclass(frozen=True)
class MemberState:
    """One SAE of the roster."""

    settings: Json
    """Its [[sae]] table."""
    number: int
    joined_at: int = 0
    attached: bool = False
    leaving: bool = False
    ended: bool = False


@dataclass(frozen=True)
class RosterState:
    """The SAEs of the run, and what was ordered through `ctl`."""

    members: list[MemberState]
    joined: int
    gone: list[str] = field(default_factory=list)
    paused: bool = False
    threads: int | None = None
    forgotten_hooks: list[str] = field(default_factory=list)
    """Hooks whose last SAE has left."""


@dataclass(frozen=True)
class OpenShardState:
    """A shard that was leased and is not finished. Its bits are `ShardBits`."""

    serial: int
    epoch: int
    shard: int
    positions: int
    """How many positions its bits cover."""
    attempt: int = 0
    rows: int | None = None
    failures: int = 0
    deaths: int = 0
    given_up: bool = False
    revision: str = ""


@dataclass(frozen=True)
class QuarantinedShardState:
    """A shard that is not trained on; `rows` of it were never received, None where nobody knows how many."""

    epoch: int
    shard: int
    rows: int | None
    reason: str


@dataclass(frozen=True)
class LedgerState:
    """The ledger's books."""

    run: str
    seed: int
    stream: Hello | None
    norm_bounds: list[float] | None
    epoch: int
    cursor: int
    """How many shards of the epoch's order were leased."""
    next_serial: int
    finished_in_epoch: int
    rows_trained: int
    rows_discarded: int
    rows_set_aside: int
    set_aside: list[QuarantinedShardState]
    sessions_lost: int
    rejected: dict[str, int]
    errors: dict[str, int]
    auth_failures: int
    breaches: dict[str, int]
    open: list[OpenShardState]
    trained_by_corpus: dict[str, int] = field(default_factory=dict)
    """Tokens of each corpus of a mixture."""
    trained_by_revision: dict[str, int] = field(default_factory=dict)
    """Tokens of each revision of the language model, in the order in which they came."""
    newest_revision: str = ""
    newest_revision_number: int = 0
    revision_bounds: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class LatentRange:
    """A range of an SAE's latents, whose rows are in one file of the checkpoint."""

    file: str
    first: int
    end: int


@dataclass(frozen=True)
class CheckpointDocument:
    """All of a checkpoint that is no tensor."""

    run: RunState
    roster: RosterState
    ledger: LedgerState
    buffer_random: Json | None
    """State of the buffer's random numbers, as numpy gives it; None before there is a buffer."""
    blocks: int = 1
    """parallel.blocks of the run."""
    latents: dict[str, list[LatentRange]] = field(default_factory=dict)
    """Ranges from 0 to d_sae by the SAE's name; an SAE that is not in it is in one file."""

    @property
    def ranks(self) -> int:
        """How many ranks have written it."""
        return max((len(ranges) for ranges in self.latents.values()), default=1)


# The tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's count of steps, and its tensors by the name of the moment, then of the parameter."""

    steps: int
    moments: dict[str, dict[str, Tensor]]
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StatisticsState:
    """The fields of `Statistics`."""

    tokens: int
    reference: Tensor
    tokens_since_fired: Tensor
    firings: Tensor
    x_sum: Tensor
    x_hat_sum: Tensor
    sums: Tensor


@dataclass(frozen=True)
class WhiteningState:
    """The fields of `Whitening`."""

    centre: Tensor
    matrix: Tensor
    inverse: Tensor


@dataclass(frozen=True)
class SaeTensors:
    """Tensors of one SAE trainer."""

    parameters: dict[str, Tensor]
    optimizer: OptimizerState
    statistics: StatisticsState
    ema: dict[str, Tensor]
    """Averages of the parameters; empty without an averaged copy."""
    whitening: WhiteningState | None

    def by_key(self) -> dict[str, Tensor]:
        """Tensors by their key, without the SAE's name in front."""
        tensors = {f"parameters/{name}": value for name, value in self.parameters.items()}
        tensors |= {f"ema/{name}": value for name, value in self.ema.items()}
        for moment, of_parameters in self.optimizer.moments.items():
            for name, value in of_parameters.items():
                tensors[f"adam/{name}.{moment}"] = value
                tensors[f"adam/{name}.step"] = value.new_tensor(float(self.optimizer.steps))
        of_numbers = self.statistics.sums  # float64
        tensors |= {f"adam/{name}": of_numbers.new_tensor(value) for name, value in self.optimizer.scalars.items()}
        statistics = self.statistics
        tensors |= {f"statistics/{name}": value for name, value in vars(statistics).items() if name != "tokens"}
        tensors["statistics/tokens"] = statistics.tokens_since_fired.new_tensor(statistics.tokens)
        if self.whitening is not None:
            tensors |= {f"whitening/{name}": value for name, value in vars(self.whitening).items()}
        return tensors

    def rows_by_key(self) -> dict[str, Tensor]:
        """The part of `by_key` with one row per latent."""
        return {key: tensor for key, tensor in self.by_key().items() if has_latent_rows(key)}

    @classmethod
    def from_keys(cls, tensors: Mapping[str, Tensor]) -> SaeTensors:
        """The inverse of `by_key`. Raises KeyError."""
        return cls(
            parameters=_below("parameters/", tensors),
            optimizer=_optimizer_of(_below("adam/", tensors)),
            statistics=StatisticsState(
                int(tensors["statistics/tokens"]),
                *(tensors[f"statistics/{field.name}"] for field in fields(StatisticsState)[1:]),
            ),
            ema=_below("ema/", tensors),
            whitening=WhiteningState(*(tensors[f"whitening/{field.name}"] for field in fields(WhiteningState)))
            if _below("whitening/", tensors)
            else None,
        )


def sae_of(key: str) -> str:
    """The SAE that the tensor of this key belongs to, with its name in front; empty for other tensors."""
    return key.removeprefix("sae/").partition("/")[0] if key.startswith("sae/") else ""


def has_latent_rows(key: str) -> bool:
    """Whether the tensor of this key, without or with the SAE's name in front, has one row per latent."""
    part, _, name = key.rpartition("/")
    if part.endswith("statistics"):
        return name in ("tokens_since_fired", "firings")
    parameter, _, moment = name.partition(".")
    if part.endswith("adam") and moment in ("step", ""):
        return False
    return part.endswith(("parameters", "ema", "adam")) and parameter not in SHARED_PARAMETERS


def _optimizer_of(tensors: Mapping[str, Tensor]) -> OptimizerState:
    """The state of an optimizer; keys are PARAMETER.MOMENT, PARAMETER.step, and names of numbers."""
    steps = 0
    moments: dict[str, dict[str, Tensor]] = {}
    scalars: dict[str, float] = {}
    for key, value in tensors.items():
        parameter, _, moment = key.partition(".")
        if moment == "step":
            steps = int(value)
        elif moment:
            moments.setdefault(moment, {})[parameter] = value
        else:
            scalars[key] = float(value)
    return OptimizerState(steps, moments, scalars)


@dataclass(frozen=True)
class ShardBits:
    """Which positions of an open shard are trained and which are discarded: uint8 arrays, eight positions a byte."""

    trained: np.ndarray
    discarded: np.ndarray

    @classmethod
    def pack(cls, trained: np.ndarray, discarded: np.ndarray) -> ShardBits:
        """From bool arrays, which are copied."""
        return cls(*(np.packbits(bits, bitorder="little") for bits in (trained, discarded)))

    def unpack(self, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """(trained, discarded) as bool arrays of this length."""
        return unpack_bits(self.trained.tobytes(), positions), unpack_bits(self.discarded.tobytes(), positions)

    def covers(self, positions: int) -> bool:
        """Whether there are as many bits as positions."""
        return len(self.trained) == len(self.discarded) == -(-positions // 8)


@dataclass(frozen=True)
class CheckpointTensors:
    """All tensors of a checkpoint."""

    saes: dict[str, SaeTensors]
    shards: dict[int, ShardBits]
    """By serial. A shard of which the checkpoint lacks bits is not in it."""
    buffer_names: np.ndarray | None
    """int64 [2, n], serials and positions in the order of the buffer; deterministic mode alone has it."""


# The whole ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BufferState:
    """What a buffer goes on from: the state of its random numbers, and the names of activations in deterministic
    mode."""

    random: Json | None
    names: np.ndarray | None = None


NEW_BUFFER = BufferState(random=None)


@dataclass(frozen=True)
class Checkpoint:
    """A run at one instant, between two steps."""

    document: CheckpointDocument
    tensors: CheckpointTensors

    @property
    def tokens(self) -> int:
        """Tokens that the run has trained on."""
        return self.document.ledger.rows_trained

    @property
    def buffer(self) -> BufferState:
        return BufferState(self.document.buffer_random, self.tensors.buffer_names)


def encode_document(document: CheckpointDocument) -> Json:
    """Plain JSON."""
    parts = _DOCUMENT.dump_python(document, mode="json")
    return {"format": VERSION, **parts.pop("run"), **parts}


def decode_document(document: Json) -> CheckpointDocument:
    """Migrates and validates a document. Raises CheckpointFormatError, which names what is wrong."""
    document = migrated(document)
    try:
        return _DOCUMENT.validate_python({**document, "run": document})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]).removeprefix("run.")
        raise CheckpointFormatError(f"{key}: {first['msg']}") from None


def encode_tensors(tensors: CheckpointTensors) -> dict[str, Tensor | np.ndarray]:
    """Tensors and arrays by key."""
    keyed: dict[str, Tensor | np.ndarray] = {}
    for name, sae in tensors.saes.items():
        keyed |= {f"sae/{name}/{key}": value for key, value in sae.by_key().items()}
    for serial, bits in tensors.shards.items():
        keyed |= {f"ledger/{serial}.{name}": value for name, value in vars(bits).items()}
    if tensors.buffer_names is not None:
        keyed["buffer/names"] = tensors.buffer_names
    return keyed


def decode_tensors(tensors: Mapping[str, Tensor], document: CheckpointDocument) -> CheckpointTensors:
    """The tensors of what `document` lists. Raises CheckpointFormatError.

    Those of SAEs share memory with `tensors`, which may be one mapped file; the others are copies.
    """
    saes: dict[str, SaeTensors] = {}
    for name in document.run.saes:
        try:
            saes[name] = SaeTensors.from_keys(_below(f"sae/{name}/", tensors))
        except KeyError as error:
            raise CheckpointFormatError(f"tensor sae/{name}/{error.args[0]} is missing") from None
    shards = {shard.serial: bits for shard in document.ledger.open for bits in _bits_of(shard.serial, tensors)}
    names = tensors.get("buffer/names")
    return CheckpointTensors(saes, shards, None if names is None else names.numpy().copy())


def _bits_of(serial: int, tensors: Mapping[str, Tensor]) -> Iterator[ShardBits]:
    """The bits of a shard, when the checkpoint has both arrays."""
    keys = [f"ledger/{serial}.{field.name}" for field in fields(ShardBits)]
    if all(key in tensors for key in keys):
        yield ShardBits(*(tensors[key].numpy().copy() for key in keys))


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


_DOCUMENT = TypeAdapter(CheckpointDocument)
