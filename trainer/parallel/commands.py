"""What rank 0 tells the other ranks to do: each change of a run, announced before all ranks carry it out.

A command is one JSON text, sent over gloo. The tensors that belong to it follow through the placement group. Since all
ranks carry out the commands of one sequence, they call the same collectives in the same order.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from producer.wire import Hello
from trainer.state.format import RosterState


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Open(_Message):
    """The first command: the settings, and a file by which a rank sees whether it sees the run directory."""

    kind: Literal["open"] = "open"
    settings: str
    """TOML: run files may differ between machines, and rank 0's counts."""
    directory: str
    nonce: str


class Begin(_Message):
    """Makes the run, for a stream of this shape."""

    kind: Literal["begin"] = "begin"
    stream: Hello
    roster: RosterState
    matmul: dict[str, str]
    """dtype of each SAE's products: rank 0 has measured which is faster."""


class Restore(_Message):
    """Restores the run from a checkpoint."""

    kind: Literal["restore"] = "restore"
    folder: str


class Initialise(_Message):
    """Draws first weights; `tokens` activations of each hook follow. Each rank answers with SAEs that cannot begin."""

    kind: Literal["initialise"] = "initialise"
    tokens: int
    scales: list[float]


class TrainStep(_Message):
    """A step; `tokens` activations of each hook in training follow."""

    kind: Literal["train_step"] = "train_step"
    tokens: int


class Attach(_Message):
    kind: Literal["attach"] = "attach"
    sae: dict[str, Any]
    joined_at: int
    matmul: str


class Detach(_Message):
    kind: Literal["detach"] = "detach"
    sae: str


class CoolDown(_Message):
    kind: Literal["cool_down"] = "cool_down"
    sae: str
    now: bool


class Report(_Message):
    """Numbers of every SAE; each rank answers with its traffic."""

    kind: Literal["report"] = "report"


class Publish(_Message):
    """Calibrates the SAEs and writes this rank's latents into a snapshot; `tokens` activations of each hook follow.

    The first rank of each placement group answers with what it has written.
    """

    kind: Literal["publish"] = "publish"
    tokens: int
    folder: str
    facts: dict[str, Any]
    """The manifest's part on the run."""


class States(_Message):
    """The first rank of each placement group answers with the counters of its SAEs, for a checkpoint."""

    kind: Literal["states"] = "states"


class SaveShard(_Message):
    """Writes this rank's rows of a checkpoint to `folder`; each rank answers with the file, or an error."""

    kind: Literal["save_shard"] = "save_shard"
    folder: str


class Idle(_Message):
    """Nothing to do yet: rank 0 waits for activations, or is paused."""

    kind: Literal["idle"] = "idle"


class End(_Message):
    """The last command."""

    kind: Literal["end"] = "end"


Command = (
    Open
    | Begin
    | Restore
    | Initialise
    | TrainStep
    | Attach
    | Detach
    | CoolDown
    | Report
    | Publish
    | States
    | SaveShard
    | Idle
    | End
)
_COMMAND: TypeAdapter[Command] = TypeAdapter(Annotated[Command, Field(discriminator="kind")])


def encode_command(command: Command) -> bytes:
    return command.model_dump_json().encode()


def decode_command(text: bytes) -> Command:
    """Raises pydantic.ValidationError when `text` is no command."""
    return _COMMAND.validate_json(text)
