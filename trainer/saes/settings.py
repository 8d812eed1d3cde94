"""[[sae]] of the run file: the settings that every SAE has, resolved to those of its architecture.

The settings of an architecture are a subclass beside its equations, in `trainer.saes.NAME`. Validating a table as
`SaeSettings` returns an instance of the subclass that its `architecture` names, and refuses keys that do not apply to
it. Light, until a table is validated: the module of an architecture imports torch.

    sae = SaeSettings.of(name="topk", architecture="topk", d_sae=4096, k=32)      # a TopKSettings
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from producer.common.explain import nearest
from producer.common.fields import Natural, PathText, Positive, Table
from producer.common.toml import show_value
from trainer.saes import registry

Revival = Literal["auxk", "pre_act", "resample", "none"]

SHARED_PARAMETERS = ("b_dec", "W_skip")
"""Parameters of an SAE that belong to no single latent; all others have one row per latent."""


@dataclass(frozen=True)
class CostTerms:
    """The terms of a step's cost that depend on the architecture, beside the sizes of an SAE."""

    active: float
    """Latents per activation in the sparse products."""
    first_active: float = 0.0
    """The same at the start, where the number is annealed."""
    total_k: float = 0.0
    """The sum of all k that are selected; 0 where a threshold decides."""
    decodings: int = 1
    """Number of times that latents are decoded."""
    losses: int = 1
    """Number of losses that write gradients of their own."""
    batch_selections: int = 0
    """Selections among all values of a batch."""
    latent_parameters: int = 3
    """Trained parameters with a row or a number per latent."""
    scalars: int = 0
    """Numbers that a step sums over latents for its losses alone, beside those that revive latents."""
    tied: bool = False
    """Encoder and decoder are one matrix."""
    l0_is_assumed: bool = False
    """`active` is unknown before training."""
    encodings: float = 1.0
    """Number of times that all pre-activations are computed."""


class SaeSettings(Table):
    """[[sae]]: one sparse autoencoder on the stream."""

    SHAPE: ClassVar[frozenset[str]] = frozenset(
        {"architecture", "d_sae", "hook", "hooks", "target", "skip", "whitening", "optimizer"}
    )
    """Keys that must not change when a run is resumed."""
    CONDITIONS: ClassVar[dict[str, Callable[[Any], bool]]] = {
        "skip": lambda sae: sae.target is not None,
        "k_aux": lambda sae: sae.revival == "auxk",
        "aux_weight": lambda sae: sae.revival == "auxk",
    }
    """Keys that apply only with certain values of others, and the test of these."""
    REVIVALS: ClassVar[frozenset[str]] = frozenset({"auxk", "resample", "none"})
    """Values that `revive` may have."""
    HAS_TRANSCODER: ClassVar[bool] = True
    """The architecture can reconstruct another hook than it reads."""
    IS_SHARDED: ClassVar[bool] = True
    """Ranks can share its latents."""
    IS_TUNABLE: ClassVar[bool] = False
    """`trainer tune` can train it by what the language model does with it, at the L0 that it has."""

    name: str = Field(min_length=1, max_length=64, examples=["topk"])
    """Its folder in a snapshot and its label in the metrics: letters, digits, dot, dash, underscore."""
    architecture: str = Field(examples=["topk"])
    """topk: the k largest latents of each activation. batchtopk: k per activation on average. jumprelu: a learned
    threshold per latent. relu: an L1-like penalty. tied: relu with one matrix for both directions. gated: which latents
    are active, and how much, apart. p_anneal: relu whose penalty turns from L1 towards a count of latents.
    matching_pursuit: latents are chosen one by one. repair: a trained relu or tied SAE, its suppressed latents
    rescaled. (Matryoshka is a key, not an architecture.)"""

    hook: str | None = None
    """Which of model.hooks it reads; without it, the only one. `blocks.*.hook_resid_post` makes an SAE of each layer,
    called NAME.LAYER; `*` in hooks and target is the same layer."""
    hooks: list[str] | None = Field(default=None, examples=[["blocks.6.hook_resid_post", "blocks.7.hook_resid_post"]])
    """Several of model.hooks under one code: a crosscoder."""
    target: str | None = None
    """The hook it reconstructs, when that is another one than it reads: a transcoder."""
    skip: bool = False
    """Transcoders: add a linear map from input to target, which the latents need not spend themselves on."""

    d_sae: Positive = Field(examples=[4096])
    """How many latents. `grid = { d_sae = [1024, 4096], k = [16, 32] }` instead makes an SAE of each combination."""

    revive: Revival | None = None
    """What helps dead latents. auxk (default of topk, batchtopk): they explain what the others leave over. pre_act
    (default of jumprelu): they are pulled up to their threshold. resample (default of relu with l1, gated): they are
    moved onto activations with a large error. none (default of the others)."""
    k_aux: Positive | None = None
    """auxk: dead latents that explain the residual; without it, half of d_in."""
    aux_weight: float = Field(default=1 / 32, gt=0.0)
    """auxk: weight of its loss; revive = "none" turns it off."""
    dead_tokens: Positive = 10_000_000
    """A latent silent for this many tokens counts as dead."""
    revive_tokens: Positive | None = None
    """A latent silent for this many tokens is revived; resampling happens every two such spans. Without it, a 150th of
    the run, at least 10,000 and at most dead_tokens; without an end, dead_tokens."""
    reinitialise_tokens: Natural = 0
    """Last resort: a latent silent for this many tokens, which nothing else can reach since no activation of the batch
    lifts it above zero, starts anew in the direction of a large error; 0 never. Three times revive_tokens is a fair
    value."""

    initial_bias: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """b_dec at the start."""
    initial_directions: Literal["random", "data"] = "random"
    """Decoder rows at the start: random, or towards activations of the data."""
    whitening: bool = False
    """Train on activations whose covariance is the identity; undone in every snapshot."""
    seed: Natural | None = None
    """Seed of its first weights; without it, from run.seed and its place among the SAEs."""
    start_from: PathText | None = Field(default=None, examples=["runs/gpt2/snapshots/000020000256/topk"])
    """Folder of an SAE to go on from: one of a Sluice snapshot, one that SAELens saved, or one of sparsify."""

    tokens: Positive | None = None
    """Tokens after which this SAE is finished, its cooldown included; without it, it ends with the run."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Overrides optimizer.learning_rate for this SAE."""
    optimizer: Literal["adam", "signum", "muon"] = "adam"
    """What changes its weights. signum (sparsify's default): signs of gradients, and a mean of weights that needs no
    falling rate. muon: momentum with equal singular values, for two products more in each step. Both keep one tensor
    per weight matrix, where Adam keeps two; optimizer.betas and optimizer.eps are Adam's."""
    ema_tokens: Positive | None = None
    """Publish beside it, as NAME-ema, the mean of its weights over about this many tokens: less noisy while the
    learning rate is constant."""

    @classmethod
    def of(cls, **options: Any) -> SaeSettings:
        """Settings of the class that `architecture` names. Raises pydantic.ValidationError."""
        return cls.model_validate(options)

    @model_validator(mode="wrap")
    @classmethod
    def _resolve(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Any:
        """Returns a checked instance of the architecture's class."""
        if not isinstance(data, dict):
            return handler(data)
        if cls is SaeSettings:
            if (architecture := registry.find(data.get("architecture"))) is not None:
                return architecture.Settings.model_validate(data)
            if isinstance(data.get("architecture"), str):
                name, names = data["architecture"], registry.names()
                raise ValueError(
                    f"sae {show_value(data.get('name', '?'))}: architecture = {show_value(name)} is not one of "
                    f"{', '.join(names)}{nearest(name, names)}"
                )
            return handler({key: value for key, value in data.items() if key in cls.model_fields})
        foreign = [key for key in data if key not in cls.model_fields and registry.is_key(key)]
        settings = handler({key: value for key, value in data.items() if key not in foreign})
        if faults := [*settings.faults(), *settings._faults_of_keys(foreign)]:
            raise ValueError(f"sae {show_value(settings.name)}: " + "; ".join(faults))
        return settings

    @model_serializer(mode="wrap")
    def _only_what_applies(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialise(self).items() if self.applies(key)}

    @classmethod
    def model_of(cls, table: Mapping[str, Any]) -> type[SaeSettings]:
        """The class whose keys the table may have, for error messages."""
        architecture = registry.find(table.get("architecture")) if cls is SaeSettings else None
        return cls if architecture is None else architecture.Settings

    # Facts of the architecture, which subclasses override

    def faults(self) -> Iterator[str]:
        """Settings that do not go together, in a sentence each, with what to change."""
        yield from self._faults_of_name()
        yield from self._faults_of_revival()
        yield from self._faults_of_hooks()
        if self.whitening and self.start_from is not None:
            yield "whitening would change the space that start_from was trained in: remove one"

    @property
    def title(self) -> str:
        """The architecture for messages, with the options on which possible starts depend."""
        return self.architecture

    @property
    def variant(self) -> str:
        """The architecture for messages, with the options on which the keys that apply depend."""
        return self.architecture

    @property
    def levels(self) -> list[int]:
        """Sizes of the nested dictionaries of a Matryoshka SAE; one for all others."""
        return [self.d_sae]

    @property
    def default_revival(self) -> Revival:
        """`revival` without `revive`."""
        return "none"

    @property
    def unit_decoder(self) -> bool:
        """Decoder rows are kept at unit norm."""
        return self.target is None

    @property
    def centred(self) -> bool:
        """b_dec is subtracted from the encoder's input."""
        return self.target is None

    def sparsity_warmup(self, warmup_tokens: int) -> int:
        """Tokens over which the weight of the penalty rises; `warmup_tokens` are the learning rate's."""
        return 0

    def cost_terms(self) -> CostTerms:
        """The terms of a step's cost that depend on the architecture."""
        return CostTerms(active=min(ASSUMED_L0, self.d_sae), l0_is_assumed=True)

    def start_fault(self, cfg: Mapping[str, Any]) -> str | None:
        """The reason why training cannot start from a published SAE with this cfg.json; None when it can."""
        return None

    # Derived values

    @property
    def revival(self) -> Revival:
        """The method that revives dead latents."""
        return self.revive or self.default_revival

    def applies(self, key: str) -> bool:
        """A key has a meaning for this SAE."""
        return key not in self.CONDITIONS or self.CONDITIONS[key](self)

    def shape(self) -> dict[str, Any]:
        """The settings that must not change when a run is resumed."""
        return self.model_dump(mode="json", include=set(self.SHAPE), exclude_none=True)

    def _faults_of_name(self) -> Iterator[str]:
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name) or self.name.startswith("."):
            yield f"name {show_value(self.name)} becomes a folder: use letters, digits, dot, dash, underscore"
        if self.name in ("manifest.json", "LATEST", "pinned"):
            yield f"name {show_value(self.name)} is that of a file in a snapshot: choose another"

    def _faults_of_revival(self) -> Iterator[str]:
        if {"none"} == self.REVIVALS and (self.revive in ("auxk", "resample") or self.reinitialise_tokens):
            yield f"nothing revives the latents of {self.architecture}: remove revive and reinitialise_tokens"
        if self.revive == "pre_act" and self.revive not in self.REVIVALS:
            yield f"revive = pre_act needs a threshold, which {self.architecture} has not: use auxk, resample or none"

    def _faults_of_hooks(self) -> Iterator[str]:
        if self.hooks is not None:
            if self.hook is not None:
                yield "hook and hooks are both set: hooks alone names those of a crosscoder"
            if len(set(self.hooks)) < len(self.hooks) or len(self.hooks) < 2:
                yield f"hooks = {show_value(self.hooks)} must name two or more different hooks; for one use hook"
            if self.target is not None:
                yield "hooks and target are both set: a crosscoder reconstructs what it reads; remove one"
        if self.target is not None and self.target == self.hook:
            yield f"target is the hook it reads, {self.hook}: remove target, or name another hook"
        if self.target is not None and not self.HAS_TRANSCODER:
            names = [name for name in registry.names() if registry.get(name).Settings.HAS_TRANSCODER]
            yield f"target is not for {self.architecture}: use {', '.join(names[:-1])} or {names[-1]}"
        if self.whitening and (self.target is not None or self.hooks is not None):
            yield "whitening is for autoencoders of one hook: remove whitening, or target and hooks"
        if self.skip and self.target is None:
            yield "skip needs target, the hook that a transcoder reconstructs: set target or remove skip"

    def _faults_of_keys(self, foreign: list[str]) -> Iterator[str]:
        """Keys without a meaning: those of other architectures, and those whose condition does not hold."""
        idle = [key for key in self.CONDITIONS if key in self.model_fields_set and not self.applies(key)]
        if keys := [key for key in [*idle, *foreign] if key != "skip"]:
            yield f"{', '.join(keys)} {'mean' if len(keys) > 1 else 'means'} nothing for {self.variant}; remove"


ASSUMED_L0 = 64.0
"""Active latents per activation where they depend on a penalty instead of a setting."""


class NestedSettings(SaeSettings):
    """Settings of an SAE whose dictionary may be nested (Matryoshka)."""

    SHAPE: ClassVar[frozenset[str]] = SaeSettings.SHAPE | {"matryoshka"}

    matryoshka: list[Positive] | None = Field(default=None, examples=[[256, 1024, 4096]])
    """Sizes of nested dictionaries that must each reconstruct alone, rising and ending at d_sae."""
    initial_rates: Literal["equal", "free"] = "equal"
    """Begin with encoder biases that let every latent fire equally often, or with none."""

    def faults(self) -> Iterator[str]:
        if self.matryoshka is not None and sorted({*self.matryoshka, self.d_sae}) != self.matryoshka:
            yield f"matryoshka = {show_value(self.matryoshka)} must rise and end at d_sae = {self.d_sae}"
        yield from super().faults()

    @property
    def levels(self) -> list[int]:
        return self.matryoshka or [self.d_sae]


class PenalisedSettings(SaeSettings):
    """Settings of an SAE that a penalty on its latents makes sparse."""

    CONDITIONS: ClassVar[dict[str, Callable[[Any], bool]]] = SaeSettings.CONDITIONS | {
        "sparsity_weight": lambda sae: sae.sparsity != "target_l0"
    }
    TYPICAL_WEIGHT: ClassVar[Mapping[str, int]] = {"l0": 1, "tanh": 1, "l1": 5, "l1_norm": 5}

    sparsity_weight: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the penalty beside |x − x_hat|², where an element of x has variance 1; all penalties but target_l0."""
    sparsity_warmup_tokens: Natural | None = None
    """The weight of the penalty rises linearly over these tokens. Without it: four times optimizer.warmup_tokens for
    target_l0, whose pull is strongest while L0 is still far off; none for the others."""

    @property
    def sparsity(self) -> str:
        """The penalty in force."""
        return "l1"

    def faults(self) -> Iterator[str]:
        if self.sparsity in self.TYPICAL_WEIGHT and self.sparsity_weight is None:
            yield f"penalty {self.sparsity} needs sparsity_weight, such as {self.TYPICAL_WEIGHT[self.sparsity]}"
        yield from super().faults()

    def sparsity_warmup(self, warmup_tokens: int) -> int:
        return self.sparsity_warmup_tokens or 0
