"""The tables of the run file that a producer reads: [run], [stream], [model], [corpus] and the ports of [monitor].

CONTRACT: the trainer and the monitor read the same tables, beside their own (`TrainerSettings`, `MonitorSettings`).
`producer.common.run_file` reads the file. Light: pydantic only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from producer.common.addresses import is_loopback, unreachable
from producer.common.fields import (
    CorpusName,
    Device,
    Devices,
    Endpoint,
    Host,
    HostName,
    HubName,
    Natural,
    PathText,
    Port,
    PositionRange,
    Positive,
    SecondsOrNever,
    SocketSeconds,
    Table,
    Whole,
)
from producer.common.hook_ranges import expand_ranges
from producer.common.shell import shell_command
from producer.common.toml import show_value


class RunSettings(Table):
    """[run]: what is one run, where it lives and when it ends."""

    directory: PathText = "runs/run"
    """Folder of the run: checkpoint, snapshots, metrics.jsonl, summary.json. Created when missing."""
    tokens: Positive | None = Field(default=None, examples=[1_000_000])
    """Tokens to train on before the run ends; without it, the run ends with the data."""
    seed: Annotated[Whole, Field(ge=0, le=2**53)] = 0
    """Seeds the order of shards, the draw from the buffer and the initial weights."""
    threads: Positive | None = None
    """CPU threads of the trainer's and the producer's arithmetic, each; without it, torch decides."""
    max_quarantined_ratio: float = Field(default=0.05, ge=0.0, le=1.0)
    """A run of whose shards more than this share is quarantined ends as failed (exit code 1). Losing a file of many
    changes no SAE that one would notice, and a night's run should not fail for it; more than one shard in twenty means
    that something is wrong with the corpus, a disk or the model."""
    deterministic: bool = False
    """The same weights, bit by bit, whatever number of producers, and whoever was killed and started again. Slower."""

    @property
    def folder(self) -> Path:
        """The run directory, as an absolute path: what is shown to people, who may stand elsewhere."""
        return Path(self.directory).absolute()


class StreamSettings(Table):
    """[stream]: the socket between producers and trainer."""

    endpoint: Endpoint = "tcp://127.0.0.1:5710"
    """ZeroMQ address the trainer binds and producers connect to. Off loopback it needs `keys`."""
    keys: PathText | None = Field(default=None, examples=["keys"])
    """Folder of CURVE keys, as the producer's command `keys DIR` writes it; needed off loopback."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Number format of activations on the wire and in the buffer."""
    heartbeat_seconds: SocketSeconds = 1.0
    """Each side sends a heartbeat this often."""
    dead_seconds: SocketSeconds = 10.0
    """A side silent for this long counts as dead; its leases return."""
    stall_seconds: SecondsOrNever = 120.0
    """A producer that lives, has credit and makes no progress on its shard for this long loses the lease."""
    patience_seconds: SecondsOrNever = 300.0
    """A producer that finds no trainer for this long gives up, with exit code 1."""

    @model_validator(mode="after")
    def _closed_to_other_machines(self) -> StreamSettings:
        if not is_loopback(self.endpoint) and self.keys is None:
            raise ValueError(
                f"stream.endpoint = {show_value(self.endpoint)} is reachable from other machines and "
                f"stream.keys is not set: write keys with `{shell_command('producer', 'keys', 'DIR')}` and set "
                'keys = "DIR", or use tcp://127.0.0.1:5710'
            )
        if self.dead_seconds < 3 * self.heartbeat_seconds:
            raise ValueError(
                f"stream.dead_seconds = {self.dead_seconds:g} is under three heartbeats "
                f"(heartbeat_seconds = {self.heartbeat_seconds:g}): one late beat would kill a healthy peer; raise it"
            )
        return self


class ModelSettings(Table):
    """[model]: the language model and where its activations are read."""

    name: HubName = Field(examples=["gpt2"])
    """Hugging Face name, or path of a folder that holds the model and its tokenizer, or of a .gguf file (extra `gguf`);
    `./gpt2` is always a folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it, so that the stream stays the same."""
    revisions: list[str] | None = Field(default=None, min_length=1, examples=[["step1000", "step2000"]])
    """A model under training as it was saved: each epoch reads the next of these revisions on the hub, or folders
    below `name`; the last one stays."""
    watch: PathText | None = Field(default=None, examples=["out"])
    """A folder into which a training run saves checkpoints: the newest complete one is read, and the next one as soon
    as it is there. `name` is read before, and gives the tokenizer."""
    hooks: list[str] = Field(min_length=1, examples=[["blocks.6.hook_resid_post"]])
    """Hooks to read, by TransformerLens' names: `blocks.6.hook_resid_post` (also resid_pre, attn_out, resid_mid,
    mlp_in, mlp_out), `blocks.6.mlp.hook_post`, `blocks.6.attn.hook_z` (also q, k, v; one head: `hook_z[3]`),
    `hook_embed`, `ln_final.hook_normalized`; or a module path of the model, for its input `PATH:input`, for the second
    of a tuple `PATH[1]`. `blocks.{0..3}.hook_resid_post` stands for layers 0 to 3."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes the GPU when there is one. CUDA_VISIBLE_DEVICES decides which."""
    devices: Devices = Field(default=[], examples=[["cuda:0", "cuda:1"]])
    """Devices over which the blocks are spread, in place of `device` (extra `large`): GPUs, which share them evenly and
    work on as many passes at a time; then `cpu` and `disk`, which hold what does not fit there, slowly."""
    load: Literal["4bit", "8bit"] | None = None
    """Quantise the weights when they are loaded (bitsandbytes, extra `quantized`). Without it, as the checkpoint is."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the language model; auto is bfloat16 on a GPU, and on a CPU that is measured to be faster in it."""
    batch_windows: Positive | None = None
    """Windows in one forward pass; without it, as many as are measured to be fast: about 4096 tokens on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    @model_validator(mode="after")
    def _one_way_to_revisions(self) -> ModelSettings:
        names = [name for name in ("revision", "revisions", "watch") if getattr(self, name) is not None]
        if len(names) > 1:
            raise ValueError(f"model.{names[0]} and model.{names[1]} exclude each other; leave one out")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> ModelSettings:
        if self.devices and self.device != "auto":
            raise ValueError(
                f"model.device = {show_value(self.device)} and model.devices = {show_value(self.devices)} both say "
                "where the model is; leave one of them out"
            )
        if self.devices and self.load:
            raise ValueError(f'model.load = "{self.load}" is for one device; leave model.devices out, or model.load')
        return self

    @field_validator("hooks")
    @classmethod
    def _expand(cls, hooks: list[str]) -> list[str]:
        hooks = expand_ranges(hooks)
        if repeated := sorted({hook for hook in hooks if hooks.count(hook) > 1}):
            raise ValueError(f"names {', '.join(repeated)} more than once; name each hook once")
        return hooks


BYTES_PER_TOKEN = 4
"""About how many bytes of text one token stands for."""
HEAVY_NORM = 3.0
"""An activation is heavy whose norm is more than so many times the median, and typical otherwise."""
SHARED_BY_MIXTURE = ("context", "epochs", "outlier_factor")
"""Settings that the corpora of a mixture share."""


class CorpusSettings(Table):
    """[corpus]: which text, how it becomes windows of tokens, and which positions are streamed."""

    kind: Literal[
        "stdlib", "text", "jsonl", "parquet", "huggingface", "tokens", "chat", "mixture", "activations", "synthetic"
    ] = "stdlib"
    """stdlib: Python's own sources. text, jsonl, parquet: files. huggingface: a dataset by name (extra `hf`).
    tokens: flat binary files of token ids. chat: messages in jsonl, parquet or a dataset, rendered by the tokenizer's
    chat template. mixture: several corpora; tables [[corpus]] stand for it. activations: files of activations that
    others saved, and synthetic: vectors of known ground truth, both without a language model."""
    name: CorpusName | None = Field(default=None, examples=["web"])
    """Name of a corpus of a mixture, in metrics and evaluations; without it, its kind."""
    weight: float | None = Field(default=None, gt=0.0, examples=[0.25])
    """Share of the text that a corpus of a mixture has, relative to the weights of the others; without it, 1."""
    mixture: list[CorpusSettings] | None = Field(default=None, min_length=1)
    """[[corpus]]: the corpora of a mixture. An epoch lasts until each was read once; meanwhile others are read
    again."""
    paths: list[PathText] = Field(default=[], examples=[["a.txt", "b.txt"]])
    """Files, folders or globs for text, jsonl, parquet, tokens, chat and activations."""
    column: str = "text"
    """Field (jsonl) or column (parquet, huggingface) that holds the text, a list of texts, or token ids; `meta.body` is
    a field of a column. A chat's messages are also found as `messages` and `conversations`."""
    dataset: HubName | None = Field(default=None, examples=["HuggingFaceFW/fineweb"])
    """Name of the dataset on the hub, or a folder, for kind huggingface."""
    subset: str | None = None
    """Configuration of that dataset, such as `wikitext-103-v1`."""
    split: str = "train"
    """Split of that dataset."""
    revision: str | None = None
    """Branch, tag or commit of that dataset; pin it, so that the stream stays the same."""
    streaming: bool = True
    """Read that dataset over the network as it is needed, instead of downloading it first."""
    token_dtype: Literal["uint16", "uint32", "int32", "int64"] = "uint16"
    """Number format of files without a header, for kind tokens."""
    shard_bytes: Positive = 1_000_000
    """About how much text one shard holds (text, jsonl, tokens); a shard is what one producer works on at a time. Where
    shards are unlike, several should fit into buffer.rows: one token is about four bytes of text."""
    max_document_bytes: Positive = 16_000_000
    """The longest document: a line of jsonl, a text.gz file, a row of parquet or of a dataset. A longer one fails its
    shard. Tokenizing takes about 200 bytes of memory for each."""
    held_out: float = Field(default=0.0625, ge=0.0, lt=1.0)
    """Fraction of shards, chosen by hash, never trained on: the evaluation's text."""
    roles: list[Literal["system", "user", "assistant", "tool"]] = Field(default=[], examples=[["assistant"]])
    """Stream only what messages of these roles say, for kind chat; without any, every token of the conversation."""
    packing: Literal["pack", "separate", "separate_masked"] = "pack"
    """pack: documents follow each other through windows. separate: each document has windows of its own, padded.
    separate_masked: those share windows, and none attends to another or counts its positions; refused for language
    models in which that is not the same."""
    positions: list[PositionRange] = Field(default=[], examples=[["8:"]])
    """Positions of a window whose activations are streamed, as slices of Python: `8:`, `0:64:2`, `-16:`; `not 0:8`
    leaves out; each applies to what the ones before left. Without any, all."""
    epochs: Natural = 1
    """Passes over the corpus before the data counts as finished; 0 goes on for ever."""
    context: Annotated[Whole, Field(gt=0, le=2**17)] = 256
    """Tokens in one window, BOS included."""
    prepend_bos: bool = True
    """Start each window with the tokenizer's BOS token, where it has one; an encoder's begins with [CLS] and ends with
    [SEP]."""
    exclude_special: bool = True
    """Stream no activation of a BOS, EOS, padding or other special token."""
    outlier_factor: float = Field(default=10.0, ge=0.0)
    """Drop activations whose norm exceeds this many times the median of the corpus' first windows (attention sinks); 0
    keeps all."""
    synthetic: SyntheticSettings | None = None
    """[corpus.synthetic], for kind synthetic."""

    @model_validator(mode="before")
    @classmethod
    def _tables_as_mixture(cls, table: Any) -> Any:
        """Takes tables [[corpus]] as one of kind mixture, and gives each corpus of it what they share."""
        if isinstance(table, list):
            entries = [entry for entry in table if isinstance(entry, dict)]
            shared = {key: entry[key] for entry in reversed(entries) for key in SHARED_BY_MIXTURE if key in entry}
            table = {"kind": "mixture", "mixture": table} | shared
        if not isinstance(table, dict) or not isinstance(table.get("mixture"), list):
            return table
        shared = {key: table[key] for key in SHARED_BY_MIXTURE if key in table}
        parts = [shared | entry if isinstance(entry, dict) else entry for entry in table["mixture"]]
        return {"held_out": 0.0} | table | {"mixture": parts}

    @model_validator(mode="after")
    def _mixture_is_of_texts(self) -> CorpusSettings:
        if (self.kind == "mixture") != (self.mixture is not None):
            raise ValueError(
                'corpus.kind = "mixture" and the tables [[corpus.mixture]] go together; write tables [[corpus]] instead'
            )
        if self.mixture is None:
            return self
        for part in self.mixture:
            if part.kind in ("mixture", "activations", "synthetic"):
                raise ValueError(f'a corpus of a mixture has kind = "{part.kind}"; each must be a text')
            for key in SHARED_BY_MIXTURE:
                if getattr(part, key) != getattr(self, key):
                    raise ValueError(
                        f"corpus.{key} is {show_value(getattr(self, key))} in one [[corpus]] and "
                        f"{show_value(getattr(part, key))} in another; the corpora of a mixture share it: set it once"
                    )
        names = [part.label for part in self.mixture]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two [[corpus]] are named {show_value(repeated[0])}; give each a name of its own")
        others = type(self).model_fields.keys() - {"kind", "mixture", "held_out", *SHARED_BY_MIXTURE}
        if strange := sorted(key for key in others if getattr(self, key) != type(self).model_fields[key].default):
            raise ValueError(f"corpus.{strange[0]} stands in each [[corpus]] of a mixture, and not above them")
        if self.held_out:
            raise ValueError("corpus.held_out stands in each [[corpus]] of a mixture, and not above them")
        return self

    @property
    def label(self) -> str:
        """The name of a corpus of a mixture."""
        return self.name or self.kind

    @property
    def texts(self) -> list[CorpusSettings]:
        """The corpora of a mixture; of any other kind, itself."""
        return [self] if self.mixture is None else self.mixture

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> CorpusSettings:
        if self.kind in ("text", "jsonl", "parquet", "tokens", "activations") and not self.paths:
            raise ValueError(f'corpus.kind = "{self.kind}" needs corpus.paths, such as paths = ["data/*.txt"]')
        if self.kind == "chat" and bool(self.paths) == bool(self.dataset):
            raise ValueError(
                'corpus.kind = "chat" needs either corpus.paths, such as paths = ["chats/*.jsonl"], or corpus.dataset'
            )
        if not any(self.streamed_positions):
            raise ValueError(
                f"corpus.positions = {show_value(self.positions)} leaves none of the {self.context} positions of a "
                "window; correct the ranges, or raise corpus.context"
            )
        if self.packing != "pack" and self.kind in ("synthetic", "activations"):
            raise ValueError(
                f'corpus.packing = "{self.packing}" is of documents, and corpus.kind "{self.kind}" has none'
            )
        if self.roles and self.kind != "chat":
            raise ValueError(
                f'corpus.roles = {show_value(self.roles)} are of conversations, and corpus.kind is "{self.kind}"; '
                'set kind = "chat", or leave roles out'
            )
        if self.kind == "huggingface" and not self.dataset:
            raise ValueError(
                'corpus.kind = "huggingface" needs corpus.dataset, such as dataset = "HuggingFaceFW/fineweb"'
            )
        if self.kind == "synthetic" and self.synthetic is None:
            raise ValueError(
                'corpus.kind = "synthetic" needs a table [corpus.synthetic] with d_in, features and shards'
            )
        return self

    @property
    def streamed_positions(self) -> list[bool]:
        """For each position of a window, whether `positions` has it."""
        streamed = [not self.positions or self.positions[0].startswith("not ")] * self.context
        for text in self.positions:
            numbers = [int(number) if number else None for number in text.removeprefix("not ").split(":")]
            for position in range(self.context)[slice(*numbers)]:
                streamed[position] = not text.startswith("not ")
        return streamed


class SyntheticSettings(Table):
    """[corpus.synthetic]: activations that are sparse sums of known unit directions (Sharkey et al. 2022)."""

    d_in: Positive = Field(examples=[64])
    """Width of an activation."""
    features: Positive = Field(examples=[128])
    """Number of true directions."""
    active: float = Field(default=5.0, gt=0.0)
    """Mean number of true features in an activation."""
    decay: float = Field(default=1.0, gt=0.0, le=1.0)
    """Feature i is decay**i as frequent as feature 0; 1 makes all equally frequent."""
    correlated: bool = False
    """Features come together or avoid each other, as a random correlation matrix says."""
    shards: Positive = 64
    """Number of shards."""
    shard_windows: Positive = 64
    """Windows in a shard."""

    @model_validator(mode="before")
    @classmethod
    def _without_naming(cls, table: Any) -> Any:
        """Accepts `naming = false`, which earlier versions wrote into the settings of each run."""
        if isinstance(table, dict) and table.get("naming") is False:
            return {key: value for key, value in table.items() if key != "naming"}
        return table


def deterministic_fault(run: RunSettings, model: ModelSettings | None) -> str | None:
    """Names a setting that leaves a deterministic run to measurements, and what to set; None when none does."""
    if run.deterministic and model is not None and model.watch is not None:
        return "run.deterministic and model.watch exclude each other: when a checkpoint comes is chance; use revisions"
    if run.deterministic and model is not None and model.dtype == "auto":
        return 'run.deterministic needs model.dtype = "float32" or "bfloat16": "auto" is measured at each start'
    return None


class MetricsSettings(BaseModel):
    """The part of [monitor] that every process reads: where it shows its metrics. The monitor checks the rest."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    host: Host = "127.0.0.1"
    """Address the metrics ports and the HTTP service listen on."""
    trainer_port: Port = 9710
    """Prometheus port of the trainer; 0 takes any free one, which the log names."""
    producer_port: Port = 9711
    """Prometheus port of the first producer on a machine; the next ones take the next free port."""
    port: Port = 9712
    """Prometheus port of the monitor; 0 takes any free one, which the log names. Producers leave it alone."""
    allowed_hosts: list[HostName] = Field(default=[], examples=[["monitor.example.org"]])
    """Names by which browsers and scrapers may ask for what listens on loopback, beside loopback's own: those of a
    proxy before it."""


class ProducerSettings(BaseModel):
    """The tables of the run file that a producer reads."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    run: RunSettings = RunSettings()
    stream: StreamSettings = StreamSettings()
    model: ModelSettings | None = None
    corpus: CorpusSettings = CorpusSettings()
    monitor: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _text_needs_a_model(self) -> ProducerSettings:
        if self.model is None and self.corpus.kind != "synthetic":
            raise ValueError('table [model] is missing: add it with name and hooks, such as name = "gpt2"')
        if fault := deterministic_fault(self.run, self.model):
            raise ValueError(fault)
        if fault := unreachable(self.stream.endpoint):
            raise ValueError(f"stream.endpoint = {show_value(self.stream.endpoint)} {fault}")
        return self
