"""The trainer's part of the run file: the buffer, the optimizer, the SAEs, snapshots and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, model_validator

from producer.common.addresses import split_endpoint
from producer.common.fields import Device, Natural, Positive, SecondsOrNever, Table
from producer.common.hook_ranges import expand_ranges
from producer.common.toml import show_value
from producer.settings import (
    CorpusSettings,
    MetricsSettings,
    ModelSettings,
    RunSettings,
    StreamSettings,
    deterministic_fault,
)
from trainer.saes.hooks import SaeHooks
from trainer.saes.patterns import expand_saes
from trainer.saes.settings import SaeSettings


def _check_ranks(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    raise ValueError('is no number of ranks; expected "auto" or a whole number, such as 8')


SYNTHETIC_HOOK = "synthetic"
"""The only hook of a run without a language model."""

RanksOrAuto = Annotated[int | str, BeforeValidator(_check_ranks)]


class BufferSettings(Table):
    """[buffer]: where activations wait and are shuffled."""

    rows: Positive = 262_144
    """Capacity in tokens. Memory is this times the bytes of a token's activations. Batches mix contexts well from
    optimizer.batch × corpus.context / 5 on."""


class OptimizerSettings(Table):
    """[optimizer]: settings that all SAEs of the run share."""

    batch: Positive = 4096
    """Tokens of one step."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes the GPU when there is one."""
    matmul: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of matrices in products, whose sums are float32; auto takes bfloat16 where it is faster here."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Adam's rate; without it, one for the width of each SAE and the number of its tokens (docs/runs.md)."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Adam's decay rates of the first and second moment. One firing of a rare latent moves it by thirty learning rates
    in total if the second is 0.999, by six if it is 0.95, so that fewer latents die at the same error."""
    eps: Annotated[float, Field(gt=0)] = 6.25e-10
    """Adam's epsilon, small because gradients of rare latents are (OpenAI's value)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of an SAE's whole gradient; longer ones are scaled down. The loss is in units of variance; 0 never
    clips."""
    warmup_tokens: Natural | None = None
    """The learning rate rises linearly over these tokens; without it, over a fifteenth of the run, and at most
    1,000,000."""
    cooldown: float = Field(default=0.2, ge=0.0, le=1.0)
    """The learning rate falls linearly to zero over this last fraction of run.tokens or of an SAE's own tokens; `ctl
    cooldown` and `detach` take the same fraction of the tokens trained so far."""


class ParallelSettings(Table):
    """[parallel]: how the ranks that torchrun starts share the SAEs; `python -m trainer` alone is one rank."""

    latents: RanksOrAuto = "auto"
    """Ranks that share the latents of each SAE; auto takes all ranks of a placement group."""
    groups: Positive = 1
    """Placement groups of ranks that train different SAEs, whole ones for each: for sweeps and suites. SAEs are placed
    by the predicted time of their steps. May change whenever the run starts again."""
    data: Positive = 1
    """Ranks that train one shard of latents on different activations; 1 is the only value."""
    blocks: Positive = 1
    """Parts of the latents whose sums over latents are added in a fixed order. 8 gives the same bits on 1, 2, 4 and 8
    ranks; with 1 the last digits depend on the number of ranks. Fixed for the run."""
    exchange: Literal["float32", "bfloat16"] = "float32"
    """Number format of the partial reconstructions that ranks exchange; bfloat16 halves these bytes, and rounds each
    part and their sum once."""
    intakes: Positive = 1
    """Ranks that receive activations from producers; 1 is the only value so far."""

    @model_validator(mode="after")
    def _refuse_what_is_not_built(self) -> ParallelSettings:
        if self.data > 1:
            raise ValueError(
                f"data = {self.data} is not offered: the gradients of a shard of latents would cross the ranks in each "
                "step, which costs more than it saves until a batch has more activations than the SAE has latents; "
                "remove it, and share the latents over more ranks"
            )
        if self.intakes > 1:
            raise ValueError(f"intakes = {self.intakes} is not built yet: rank 0 receives everything; remove it")
        return self


class SnapshotSettings(Table):
    """[snapshots]: SAEs published for others to load."""

    every_tokens: Positive = 10_000_000
    """A snapshot after this many tokens, and one at the end."""
    keep: Positive = 10
    """Number of newest snapshots that stay on disk. Pinned ones (`ctl RUN pin`) stay too, and as many again of those
    that resuming from an older checkpoint has moved to snapshots/superseded."""
    keep_every_tokens: Positive | None = None
    """The first snapshot at or after each multiple of this many tokens stays for good; without it, none does."""


class CheckpointSettings(Table):
    """[checkpoint]: the state that resuming needs; private to the trainer."""

    every_seconds: SecondsOrNever = 300.0
    """Time between two checkpoints: a crash costs at most this much training, and the activations in the buffer; inf:
    only at the end."""
    keep: Positive = 2
    """Number of newest checkpoints that stay on disk."""


class TrainerSettings(BaseModel):
    """All tables that the trainer reads, checked against each other."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: RunSettings = RunSettings()
    stream: StreamSettings = StreamSettings()
    model: ModelSettings | None = None
    corpus: CorpusSettings = CorpusSettings()
    buffer: BufferSettings = BufferSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    parallel: ParallelSettings = ParallelSettings()
    sae: list[SerializeAsAny[SaeSettings]] = Field(min_length=1)
    snapshots: SnapshotSettings = SnapshotSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    monitor: MetricsSettings = MetricsSettings()

    @classmethod
    def expand(cls, document: dict[str, Any]) -> dict[str, Any]:
        """The document with a table for each SAE, also where one is a pattern or a grid. Raises SettingsError."""
        saes = document.get("sae")
        return document | {"sae": expand_saes(saes, _streamed_hooks(document))} if isinstance(saes, list) else document

    @model_validator(mode="after")
    def _check_tables(self) -> TrainerSettings:
        if self.model is None and self.corpus.kind != "synthetic":
            raise ValueError('table [model] is missing: add it with name and hooks, such as name = "gpt2"')
        names = [sae.name for sae in self.sae]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"sae.name: {', '.join(repeated)} is used more than once; each SAE needs its own name")
        for sae in self.sae:
            if fault := self.hook_fault(sae):
                raise ValueError(f"sae {show_value(sae.name)}: {fault}")
        if clash := sorted({f"{sae.name}-ema" for sae in self.sae if sae.ema_tokens} & set(names)):
            raise ValueError(f"sae.name: {', '.join(clash)} is also the name of an EMA copy; rename one of the two")
        if 2 * self.optimizer.batch > self.buffer.rows:
            raise ValueError(
                f"buffer.rows = {self.buffer.rows} is under two batches (optimizer.batch = {self.optimizer.batch}); "
                "raise buffer.rows or lower optimizer.batch"
            )
        port = self.monitor.trainer_port
        if self.stream.endpoint.startswith("tcp://") and port and split_endpoint(self.stream.endpoint)[1] == str(port):
            raise ValueError(
                f"stream.endpoint = {show_value(self.stream.endpoint)} and monitor.trainer_port = {port} name the same "
                "port; change one"
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

    def warnings(self) -> list[str]:
        """Sentences on settings that are allowed and will surprise: spans that end after the run or an SAE does."""
        return list(_late_spans(self))

    @property
    def hooks(self) -> list[str]:
        """The hooks that are streamed; the synthetic source has one of its own."""
        return self.model.hooks if self.model is not None else [SYNTHETIC_HOOK]

    def hook_fault(self, sae: SaeSettings) -> str | None:
        """Why this SAE cannot be trained on the stream, and what to change; None when it can."""
        if sae.hook is None and sae.hooks is None and len(self.hooks) > 1:
            return f"names no hook and model.hooks has {len(self.hooks)}; choose one of {', '.join(self.hooks)}"
        hooks = self.hooks_of(sae)
        if unknown := [hook for hook in (*hooks.reads, *hooks.writes) if hook not in self.hooks]:
            return (
                f"hook {show_value(unknown[0])} is not streamed; model.hooks has {', '.join(self.hooks)}: "
                "use one of them or add it there"
            )
        if sae.target is not None and not hooks.is_transcoder:
            return f"target is the hook it reads, {sae.target}: remove target, or name another hook"
        return None

    def hooks_of(self, sae: SaeSettings) -> SaeHooks:
        """The hooks that an SAE reads and writes."""
        return SaeHooks.from_settings(sae, self.hooks)


def _streamed_hooks(document: Mapping[str, Any]) -> list[str] | None:
    """The hooks that a document not yet validated streams; None where its [model] has faults."""
    model = document.get("model")
    names = model.get("hooks") if isinstance(model, dict) else [SYNTHETIC_HOOK]
    if not isinstance(names, list):
        return None
    try:
        return expand_ranges(name for name in names if isinstance(name, str))
    except ValueError:
        return None


def _late_spans(settings: TrainerSettings) -> Iterator[str]:
    """Sentences on spans of tokens that are longer than the run or the SAE's budget."""
    optimizer, snapshots, end = settings.optimizer, settings.snapshots, settings.run.tokens
    endless = end is None and not all(sae.tokens for sae in settings.sae)
    if endless and "cooldown" in optimizer.model_fields_set and optimizer.cooldown:
        yield (
            f"optimizer.cooldown = {optimizer.cooldown:g} needs an end to count back from, and run.tokens is not set: "
            "without it, learning rates fall only when `ctl cooldown` asks for it"
        )
    if end is not None:
        if snapshots.every_tokens > end:
            yield (
                f"snapshots.every_tokens = {snapshots.every_tokens:_} is longer than run.tokens = {end:_}: the only "
                "snapshot is the one at the end"
            )
        if (multiple := snapshots.keep_every_tokens) is not None and multiple > end:
            yield f"snapshots.keep_every_tokens = {multiple:_} is longer than run.tokens = {end:_}: none is kept for it"
    names: dict[str, list[str]] = {}
    for sae in settings.sae:
        for sentence in _late_spans_of(sae, optimizer, end):
            names.setdefault(sentence, []).append(sae.name)
    for sentence, saes in names.items():
        prefix = "" if len(saes) == len(settings.sae) else f"sae {', '.join(map(show_value, saes))}: "
        yield f"{prefix}{sentence}"


def _late_spans_of(sae: SaeSettings, optimizer: OptimizerSettings, run_tokens: int | None) -> Iterator[str]:
    """Sentences on one SAE, without its name."""
    if sae.tokens is not None and run_tokens is not None and sae.tokens > run_tokens:
        yield f"tokens = {sae.tokens:_} is longer than run.tokens = {run_tokens:_}: training ends with the run"
    ends = [(sae.tokens, "its tokens"), (run_tokens, "run.tokens")]
    end, what = min(((tokens, name) for tokens, name in ends if tokens is not None), default=(None, ""))
    if end is None:
        return
    longer, flat = f"is longer than {what} = {end:_}", round((1 - optimizer.cooldown) * end)
    if (warmup := optimizer.warmup_tokens or 0) > flat:
        if warmup <= end:
            longer = f"is longer than the {flat:_} tokens before the cooldown ({what} = {end:_})"
        yield (
            f"optimizer.warmup_tokens = {warmup:_} {longer}: the learning rate never reaches its full value; "
            f"lower it, such as to {max(1, end // 20):_}"
        )
    longer = f"is longer than {what} = {end:_}"
    if (warmup := sae.sparsity_warmup(optimizer.warmup_tokens or 0)) > end:
        yield f"sparsity_warmup_tokens = {warmup:_} {longer}: the penalty never reaches its full weight; lower it"
    if (span := getattr(sae, "anneal_tokens", 0)) > end:
        yield f"anneal_tokens = {span:_} {longer}: active latents never fall to the number that is set; lower it"
    if sae.dead_tokens > end:
        yield f"dead_tokens = {sae.dead_tokens:_} {longer}: no latent will count as dead; lower it"
    for key in ("revive_tokens", "reinitialise_tokens"):
        if (tokens := getattr(sae, key) or 0) > end:
            yield f"{key} = {tokens:_} {longer}: it takes no effect; lower it"
