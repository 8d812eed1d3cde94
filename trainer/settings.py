"""What the trainer reads of the run file: the buffer, the optimizer, the SAEs, snapshots and checkpoints."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from producer.settings import (
    CorpusSettings,
    Device,
    MetricsSettings,
    ModelSettings,
    Positive,
    RunSettings,
    Seconds,
    StreamSettings,
    Table,
)


class BufferSettings(Table):
    """[buffer]: where rows wait and mix."""

    rows: Positive = 262_144
    """Capacity. Memory is this times the bytes of a row; for good mixing at least batch × context / 5."""


class OptimizerSettings(Table):
    """[optimizer]: what all SAEs of the run share."""

    batch: Positive = 4096
    """Rows in one step."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes the GPU when there is one."""
    matmul: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the encoder product; auto takes bfloat16 where this machine multiplies it faster."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Adam's rate; without it, 2e-4 / sqrt(d_sae / 16384) per SAE, the field's rule for long runs."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Adam's decay of first and second moments."""
    eps: Annotated[float, Field(gt=0)] = 6.25e-10
    """Adam's epsilon, small because gradients of rare latents are (OpenAI's value)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of an SAE's whole gradient; longer ones are scaled down. The loss is in units of variance; 0 never
    clips."""
    warmup_tokens: Annotated[int, Field(ge=0)] = 1_000_000
    """The learning rate rises linearly over these rows."""
    cooldown: float = Field(default=0.2, ge=0.0, le=1.0)
    """The learning rate falls linearly to zero over this last fraction of run.tokens; needs run.tokens."""


class SaeSettings(Table):
    """[[sae]]: one sparse autoencoder on the stream."""

    name: str = Field(min_length=1, max_length=64)
    """Its folder in a snapshot and its label in the metrics: letters, digits, dot, dash, underscore."""
    architecture: Literal["topk", "jumprelu"]
    """topk: exactly k latents per row, with AuxK. jumprelu: a learned threshold per latent, trained to a target L0."""
    hook: str | None = None
    """Which of model.hooks it learns; without it, the only one."""
    d_sae: Positive
    """How many latents."""
    k: Positive | None = None
    """topk: latents per row."""
    k_aux: Positive | None = None
    """topk: dead latents that explain the residual; without it, half of d_in."""
    aux_weight: float = Field(default=1 / 32, ge=0.0)
    """topk: weight of the auxiliary loss; 0 turns it off."""
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """jumprelu: mean number of latents per row to aim at."""
    l0_weight: float = Field(default=0.1, ge=0.0)
    """jumprelu: weight of (L0 / target_l0 − 1)²; a larger one reaches the target sooner and reconstructs worse."""
    bandwidth: float = Field(default=0.5, gt=0.0)
    """jumprelu: width of the straight-through kernel, where the mean square of an element of x is 1. 2 is the wide
    kernel (Anthropic's), which on ground truth finds the rarest features too; 0.5 reconstructs the demo's activations
    better and touches fewer entries."""
    initial_threshold: float = Field(default=0.25, gt=0.0)
    """jumprelu: threshold at the start, in the same scale."""
    pre_act_weight: float = Field(default=3e-6, ge=0.0)
    """jumprelu: weight of the loss that lifts dead latents, beside a reconstruction in units of variance; 0 turns it
    off."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Overrides optimizer.learning_rate for this SAE."""
    dead_tokens: Positive = 10_000_000
    """A latent silent for this many rows counts as dead."""
    revive_tokens: Positive | None = None
    """A latent silent for this many rows is worked on by AuxK or the pre-act loss; without it, dead_tokens."""

    @model_validator(mode="after")
    def _complete(self) -> SaeSettings:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name.startswith("."):
            raise ValueError(f"name {self.name!r} becomes a folder: use letters, digits, dot, dash, underscore")
        if self.architecture == "topk":
            if self.k is None:
                raise ValueError(f"sae {self.name!r}: architecture topk needs k, such as k = 32")
            if self.k > self.d_sae:
                raise ValueError(
                    f"sae {self.name!r}: k = {self.k} exceeds d_sae = {self.d_sae}; lower k or raise d_sae"
                )
        if self.architecture == "jumprelu":
            if self.target_l0 is None:
                raise ValueError(f"sae {self.name!r}: architecture jumprelu needs target_l0, such as target_l0 = 32")
            if self.target_l0 > self.d_sae:
                raise ValueError(f"sae {self.name!r}: target_l0 = {self.target_l0:g} exceeds d_sae = {self.d_sae}")
        if foreign := sorted(_ONLY_FOR[_OTHER[self.architecture]] & self.model_fields_set):
            raise ValueError(
                f"sae {self.name!r}: {', '.join(foreign)} belong to {_OTHER[self.architecture]}; remove them"
            )
        return self

    @model_serializer(mode="wrap")
    def _only_what_applies(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = _ONLY_FOR[_OTHER[self.architecture]]
        return {name: value for name, value in serialise(self).items() if name not in foreign}


_OTHER = {"topk": "jumprelu", "jumprelu": "topk"}
_ONLY_FOR = {
    "topk": {"k", "k_aux", "aux_weight"},
    "jumprelu": {"target_l0", "l0_weight", "bandwidth", "initial_threshold", "pre_act_weight"},
}


class SnapshotSettings(Table):
    """[snapshots]: what is published for others to load."""

    every_tokens: Positive = 10_000_000
    """A snapshot after this many rows, and one at the end."""
    keep: Positive = 10
    """How many of the newest stay on disk."""


class CheckpointSettings(Table):
    """[checkpoint]: what resuming needs; private to the trainer."""

    every_seconds: Seconds = 300.0
    """A crash costs at most this much training, plus one bufferful of the language model's work."""
    keep: Positive = 2
    """How many of the newest stay on disk."""


class TrainerSettings(BaseModel):
    """All that the trainer reads, checked against each other."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: RunSettings = RunSettings()
    stream: StreamSettings = StreamSettings()
    model: ModelSettings | None = None
    corpus: CorpusSettings = CorpusSettings()
    buffer: BufferSettings = BufferSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    sae: list[SaeSettings] = Field(min_length=1)
    snapshots: SnapshotSettings = SnapshotSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _agree(self) -> TrainerSettings:
        if self.model is None and self.corpus.kind != "synthetic":
            raise ValueError('table [model] is missing: add it with name and hooks, such as name = "gpt2"')
        names = [sae.name for sae in self.sae]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sae.name: {', '.join(repeated)} is used more than once; each SAE needs its own name")
        for sae in self.sae:
            if sae.hook is None and len(self.hooks) > 1:
                raise ValueError(
                    f"sae {sae.name!r} names no hook and model.hooks has {len(self.hooks)}; choose one of them"
                )
            if sae.hook is not None and sae.hook not in self.hooks:
                raise ValueError(
                    f"sae {sae.name!r}: hook {sae.hook!r} is not streamed; "
                    f"model.hooks has {', '.join(self.hooks)}: use one of them or add it there"
                )
        if 2 * self.optimizer.batch > self.buffer.rows:
            raise ValueError(
                f"buffer.rows = {self.buffer.rows} is under two batches (optimizer.batch = {self.optimizer.batch}); "
                "raise buffer.rows or lower optimizer.batch"
            )
        return self

    @property
    def hooks(self) -> list[str]:
        """The hooks that are streamed; the synthetic source has one of its own."""
        return self.model.hooks if self.model is not None else ["synthetic"]

    def hook_of(self, sae: SaeSettings) -> int:
        """The index of an SAE's hook in the stream."""
        return self.hooks.index(sae.hook or self.hooks[0])
