"""What the trainer reads of the run file: the buffer, the optimizer, the SAEs, snapshots and checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
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
    deterministic_fault,
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
    """Number format of matrices in products, whose sums are float32; auto takes bfloat16 where it is faster here."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Adam's rate; without it, 2e-4 / sqrt(d_sae / 16384) per SAE, the field's rule for long runs."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Adam's decay of first and second moments. One row of a rare latent moves it by thirty learning rates in all when
    the second is 0.999, by six when it is 0.95: fewer latents die at the same error."""
    eps: Annotated[float, Field(gt=0)] = 6.25e-10
    """Adam's epsilon, small because gradients of rare latents are (OpenAI's value)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of an SAE's whole gradient; longer ones are scaled down. The loss is in units of variance; 0 never
    clips."""
    warmup_tokens: Annotated[int, Field(ge=0)] = 1_000_000
    """The learning rate rises linearly over these rows."""
    cooldown: float = Field(default=0.2, ge=0.0, le=1.0)
    """The learning rate falls linearly to zero over this last fraction of run.tokens or of an SAE's own tokens; `ctl
    cooldown` and `detach` take the same fraction of the rows seen so far."""


class SaeSettings(Table):
    """[[sae]]: one sparse autoencoder on the stream."""

    name: str = Field(min_length=1, max_length=64)
    """Its folder in a snapshot and its label in the metrics: letters, digits, dot, dash, underscore."""
    architecture: Literal["topk", "batchtopk", "jumprelu", "relu", "tied", "gated", "repair"]
    """topk: the k largest latents of each row. batchtopk: k per row on average. jumprelu: a learned threshold per
    latent. relu: an L1-like penalty. tied: relu with one matrix for both directions. gated: which and how much apart.
    repair: a trained relu or tied SAE, its suppressed activations rescaled. (Matryoshka is a key, not an
    architecture.)"""

    hook: str | None = None
    """Which of model.hooks it reads; without it, the only one."""
    hooks: list[str] | None = None
    """Several of model.hooks under one code: a crosscoder."""
    target: str | None = None
    """The hook it reconstructs, when that is another one than it reads: a transcoder."""
    skip: bool = False
    """Transcoders: add a linear map from input to target, which the latents need not spend themselves on."""

    d_sae: Positive
    """How many latents."""
    matryoshka: list[Positive] | None = None
    """Sizes of nested dictionaries that must each reconstruct alone, rising and ending at d_sae."""

    k: Positive | None = None
    """topk, batchtopk: latents per row."""
    abs: bool = False
    """topk: choose by magnitude and keep signs."""
    multi_topk: float = Field(default=0.0, ge=0.0)
    """topk: weight of a second loss with 4 k latents, so that the code degrades gently; the source has 0.125."""

    penalty: Literal["target_l0", "l0", "tanh", "l1", "l1_norm"] | None = None
    """What makes it sparse. jumprelu: target_l0 (default), l0 or tanh. relu: l1 on unit decoder rows (Bricken 2023),
    l1_norm weighted by free decoder norms (default; Anthropic, April 2024) or tanh."""
    sparsity_weight: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the penalty beside |x − x_hat|², where an element of x has variance 1; all penalties but target_l0."""
    sparsity_warmup_tokens: Annotated[int, Field(ge=0)] | None = None
    """The weight of the penalty rises linearly over these rows. Without it: four times optimizer.warmup_tokens for
    target_l0, whose pull is strongest while L0 is still far off; none for the others."""
    target_l0: Annotated[float, Field(gt=0)] | None = None
    """jumprelu: mean number of latents per row to aim at."""
    l0_weight: float = Field(default=1.0, ge=0.0)
    """jumprelu: weight of (L0 / target_l0 − 1)²; with 1, L0 ends about 2 % above its target."""
    tanh_scale: float = Field(default=4.0, gt=0.0)
    """Penalty tanh: c in tanh(c · latent · decoder norm)."""

    bandwidth: float = Field(default=0.5, gt=0.0)
    """jumprelu: width of the straight-through kernel, where an element of x has variance 1. 2 is the wide
    kernel (Anthropic's), which on ground truth finds the rarest features too; 0.5 reconstructs the demo's activations
    better and touches fewer entries."""
    initial_threshold: float = Field(default=0.25, gt=0.0)
    """jumprelu: threshold at the start, in the same scale."""
    threshold: Literal["linear", "log"] = "linear"
    """jumprelu: train the threshold itself or its logarithm, which moves in proportion to its size."""
    straight_through: Literal["encoder", "threshold"] = "encoder"
    """jumprelu: the jump's gradient reaches the encoder too (Anthropic 2025), or the threshold only (Gemma Scope)."""

    revive: Literal["auxk", "pre_act", "resample", "none"] | None = None
    """What helps dead latents. auxk (default of topk, batchtopk): they explain what the others leave over. pre_act
    (default of jumprelu): they are pulled up to their threshold. resample (default of relu with l1, gated): they are
    moved onto rows with a large error. none (default of the others)."""
    k_aux: Positive | None = None
    """auxk: dead latents that explain the residual; without it, half of d_in."""
    aux_weight: float = Field(default=1 / 32, gt=0.0)
    """auxk: weight of its loss; revive = "none" turns it off."""
    pre_act_weight: float = Field(default=3e-6, gt=0.0)
    """pre_act: weight of its loss, beside a reconstruction in units of variance."""
    pre_act_on: Literal["dead", "all"] = "dead"
    """pre_act: lift the dead latents, or all that are below their threshold (Anthropic 2025; a dense product more)."""
    dead_tokens: Positive = 10_000_000
    """A latent silent for this many rows counts as dead."""
    revive_tokens: Positive | None = None
    """A latent silent for this many rows is worked on; resampling happens every two such spans. Without it,
    dead_tokens."""
    reinitialise_tokens: int = Field(default=0, ge=0)
    """Last resort: a latent silent for this many rows, which nothing else can reach since no row of the batch lifts it
    above zero, starts anew in the direction of a large error; 0 never. Three times revive_tokens is a fair value."""

    initial_bias: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """b_dec at the start."""
    initial_directions: Literal["random", "data"] = "random"
    """Decoder rows at the start: random, or towards rows of the data."""
    initial_rates: Literal["equal", "free"] = "equal"
    """topk, batchtopk, jumprelu: begin with encoder biases that let every latent fire equally often, or with none."""
    initial_norm: Annotated[float, Field(gt=0)] | None = None
    """Norm of encoder and decoder rows at the start where it is free (relu with l1_norm or tanh; 0.1 without it)."""
    whitening: bool = False
    """Learn from rows whose covariance is the identity; undone in every snapshot."""
    start_from: str | None = None
    """Folder of an SAE to go on from: one of a Sluice snapshot, one that SAELens saved, or one of sparsify."""
    train: Literal["scale", "scale+decoder", "scale+encoder", "all"] = "scale+decoder"
    """repair: what may change. Without the encoder the active latents stay exactly those they were."""

    tokens: Positive | None = None
    """Rows after which this SAE is finished, its cooldown included; without it, it ends with the run."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Overrides optimizer.learning_rate for this SAE."""
    ema_tokens: Positive | None = None
    """Publish beside it, as NAME-ema, the mean of its weights over about this many rows: less noisy while the learning
    rate is constant."""

    @model_validator(mode="after")
    def _complete(self) -> SaeSettings:
        if faults := list(_faults(self)):
            raise ValueError(f"sae {self.name!r}: " + "; ".join(faults))
        return self

    @model_serializer(mode="wrap")
    def _only_what_applies(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        foreign = set(_foreign(self))
        return {name: value for name, value in serialise(self).items() if name not in foreign}

    @property
    def sparsity(self) -> str | None:
        """The penalty in force; None for topk, batchtopk and repair."""
        default = {"jumprelu": "target_l0", "relu": "l1_norm", "tied": "l1", "gated": "l1"}.get(self.architecture)
        return self.penalty or default if self.architecture in _PENALTIES else default

    @property
    def reviving(self) -> str:
        """How dead latents are helped: `revive`, or the field's default for the architecture."""
        if self.revive is not None:
            return self.revive
        if self.architecture == "relu":
            return "resample" if self.sparsity == "l1" else "none"
        return _REVIVED_BY[self.architecture]

    @property
    def reads(self) -> list[str] | None:
        """The hooks whose rows it encodes; None for the only one."""
        return self.hooks or (None if self.hook is None else [self.hook])


_REVIVED_BY = {
    "topk": "auxk",
    "batchtopk": "auxk",
    "jumprelu": "pre_act",
    "tied": "none",
    "gated": "resample",
    "repair": "none",
}
_PENALTIES = {"jumprelu": {"target_l0", "l0", "tanh"}, "relu": {"l1", "l1_norm", "tanh"}}
_BELONGS: dict[str, Callable[[SaeSettings], bool]] = {
    "matryoshka": lambda s: s.architecture in ("topk", "batchtopk", "jumprelu"),
    "k": lambda s: s.architecture in ("topk", "batchtopk"),
    "abs": lambda s: s.architecture == "topk",
    "multi_topk": lambda s: s.architecture == "topk",
    "penalty": lambda s: s.architecture in _PENALTIES,
    "sparsity_weight": lambda s: s.sparsity not in (None, "target_l0"),
    "sparsity_warmup_tokens": lambda s: s.sparsity is not None,
    "target_l0": lambda s: s.sparsity == "target_l0",
    "l0_weight": lambda s: s.sparsity == "target_l0",
    "tanh_scale": lambda s: s.sparsity == "tanh",
    "bandwidth": lambda s: s.architecture == "jumprelu",
    "initial_threshold": lambda s: s.architecture == "jumprelu",
    "threshold": lambda s: s.architecture == "jumprelu",
    "straight_through": lambda s: s.architecture == "jumprelu",
    "k_aux": lambda s: s.reviving == "auxk",
    "aux_weight": lambda s: s.reviving == "auxk",
    "pre_act_weight": lambda s: s.reviving == "pre_act",
    "pre_act_on": lambda s: s.reviving == "pre_act",
    "initial_rates": lambda s: s.architecture in ("topk", "batchtopk", "jumprelu"),
    "skip": lambda s: s.target is not None,
    "initial_norm": lambda s: s.architecture == "relu" and s.sparsity != "l1",
    "train": lambda s: s.architecture == "repair",
}
"""Keys that belong to some SAEs only, and to which."""


def _foreign(sae: SaeSettings) -> list[str]:
    return [name for name, belongs in _BELONGS.items() if not belongs(sae)]


def _faults(sae: SaeSettings) -> Iterator[str]:
    """What does not go together, each with what to change."""
    kind = sae.architecture
    if not re.fullmatch(r"[A-Za-z0-9._-]+", sae.name) or sae.name.startswith("."):
        yield f"name {sae.name!r} becomes a folder: use letters, digits, dot, dash, underscore"
    if sae.name in ("manifest.json", "LATEST", "pinned"):
        yield f"name {sae.name!r} is that of a file in a snapshot: choose another"
    if kind in ("topk", "batchtopk"):
        if sae.k is None:
            yield f"architecture {kind} needs k, such as k = 32"
        elif sae.k > sae.d_sae:
            yield f"k = {sae.k} exceeds d_sae = {sae.d_sae}; lower k or raise d_sae"
        elif sae.multi_topk and 4 * sae.k > sae.d_sae:
            yield f"multi_topk uses 4 k = {4 * sae.k} latents, more than d_sae = {sae.d_sae}; lower k or raise d_sae"
    if sae.penalty is not None and sae.penalty not in _PENALTIES.get(kind, {sae.penalty}):
        yield f"penalty {sae.penalty} is not one of {kind}: use {', '.join(sorted(_PENALTIES[kind]))}"
    elif sae.sparsity == "target_l0":
        if sae.target_l0 is None:
            yield "architecture jumprelu needs target_l0, such as target_l0 = 32"
        elif sae.target_l0 > sae.d_sae:
            yield f"target_l0 = {sae.target_l0:g} exceeds d_sae = {sae.d_sae}; lower target_l0 or raise d_sae"
    elif sae.sparsity is not None and sae.sparsity_weight is None:
        yield f"penalty {sae.sparsity} needs sparsity_weight, such as {_TYPICAL_WEIGHT[sae.sparsity]}"
    if sae.matryoshka is not None and sorted({*sae.matryoshka, sae.d_sae}) != sae.matryoshka:
        yield f"matryoshka = {sae.matryoshka} must rise and end at d_sae = {sae.d_sae}"
    if sae.revive == "pre_act" and kind != "jumprelu":
        yield f"revive = pre_act needs a threshold, which {kind} has not: use auxk, resample or none"
    if kind in ("tied", "repair") and (sae.revive in ("auxk", "resample") or sae.reinitialise_tokens):
        yield f"nothing revives the latents of {kind}: remove revive and reinitialise_tokens"
    if kind == "repair" and sae.start_from is None:
        yield "architecture repair needs start_from, the folder of a trained relu or tied SAE"
    if kind == "tied" and sae.start_from is not None:
        yield "start_from is not for tied: no file says that two matrices are one; use architecture relu"
    if sae.hooks is not None:
        if sae.hook is not None:
            yield "hook and hooks are both set: hooks alone names those of a crosscoder"
        if len(set(sae.hooks)) < len(sae.hooks) or len(sae.hooks) < 2:
            yield f"hooks = {sae.hooks} must name two or more different hooks; for one use hook"
        if sae.target is not None:
            yield "hooks and target are both set: a crosscoder reconstructs what it reads; remove one"
    if sae.target is not None and sae.target == sae.hook:
        yield f"target is the hook it reads, {sae.hook}: remove target, or name another hook"
    if sae.target is not None and kind in ("tied", "gated", "repair"):
        yield f"target is not for {kind}: use topk, batchtopk, jumprelu or relu"
    if sae.target is not None and (kind, sae.sparsity) in (("relu", "l1"), ("jumprelu", "tanh")):
        # Latents would shrink and decoder rows grow for it.
        better = "l1_norm or tanh" if kind == "relu" else "target_l0 or l0"
        yield f"penalty {sae.sparsity} needs decoder rows of unit norm, which a transcoder has not: use {better}"
    if sae.whitening and (sae.target is not None or sae.hooks is not None):
        yield "whitening is for autoencoders of one hook: remove whitening, or target and hooks"
    if sae.whitening and sae.start_from is not None:
        yield "whitening would change the space that start_from was trained in: remove one"
    if sae.skip and sae.target is None:
        yield "skip needs target, the hook that a transcoder reconstructs: set target or remove skip"
    if foreign := [name for name in _foreign(sae) if name != "skip" and name in sae.model_fields_set]:
        what = f"{kind} with penalty {sae.sparsity}" if kind in _PENALTIES else kind
        yield f"{', '.join(foreign)} {'mean' if len(foreign) > 1 else 'means'} nothing for {what}; remove"


_TYPICAL_WEIGHT = {"l0": 1, "tanh": 1, "l1": 5, "l1_norm": 5}


class SnapshotSettings(Table):
    """[snapshots]: what is published for others to load."""

    every_tokens: Positive = 10_000_000
    """A snapshot after this many rows, and one at the end."""
    keep: Positive = 10
    """How many of the newest stay on disk. What `ctl RUN pin` has pinned stays too, and as many again of those that a
    return to an older checkpoint has moved to snapshots/superseded."""
    keep_every_tokens: Positive | None = None
    """The first snapshot at or after each multiple of this many rows stays for good; without it, none does."""


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
            if fault := self.hook_fault(sae):
                raise ValueError(f"sae {sae.name!r}: {fault}")
        if clash := sorted({f"{sae.name}-ema" for sae in self.sae if sae.ema_tokens} & set(names)):
            raise ValueError(f"sae.name: {', '.join(clash)} is also the name of an EMA copy; rename one of the two")
        if 2 * self.optimizer.batch > self.buffer.rows:
            raise ValueError(
                f"buffer.rows = {self.buffer.rows} is under two batches (optimizer.batch = {self.optimizer.batch}); "
                "raise buffer.rows or lower optimizer.batch"
            )
        if self.run.deterministic:
            self._require_determinism()
        return self

    def _require_determinism(self) -> None:
        if fault := deterministic_fault(self.run, self.model):
            raise ValueError(fault)
        if self.optimizer.matmul == "auto":
            raise ValueError(
                'run.deterministic needs optimizer.matmul = "float32" or "bfloat16": "auto" is measured at the start'
            )
        if 4 * self.optimizer.batch > self.buffer.rows:
            raise ValueError(
                f"run.deterministic draws from half of the buffer, and buffer.rows = {self.buffer.rows} is under four "
                f"batches (optimizer.batch = {self.optimizer.batch}); raise buffer.rows or lower optimizer.batch"
            )

    @property
    def hooks(self) -> list[str]:
        """The hooks that are streamed; the synthetic source has one of its own."""
        return self.model.hooks if self.model is not None else ["synthetic"]

    def hook_fault(self, sae: SaeSettings) -> str | None:
        """Why this SAE cannot live on the stream, and what to change; None when it can."""
        if sae.reads is None and len(self.hooks) > 1:
            return f"names no hook and model.hooks has {len(self.hooks)}; choose one of {', '.join(self.hooks)}"
        named = [*(sae.reads or []), *([sae.target] if sae.target else [])]
        if strange := [hook for hook in named if hook not in self.hooks]:
            return (
                f"hook {strange[0]!r} is not streamed; model.hooks has {', '.join(self.hooks)}: "
                "use one of them or add it there"
            )
        if sae.target is not None and self.inputs_of(sae) == [self.hooks.index(sae.target)]:
            return f"target is the hook it reads, {sae.target}: remove target, or name another hook"
        return None

    def inputs_of(self, sae: SaeSettings) -> list[int]:
        """Indices in the stream of the hooks an SAE reads."""
        return [self.hooks.index(name) for name in sae.reads or self.hooks[:1]]

    def target_of(self, sae: SaeSettings) -> int | None:
        """Index of the hook a transcoder reconstructs; None for an SAE that reconstructs what it reads."""
        return None if sae.target is None else self.hooks.index(sae.target)
