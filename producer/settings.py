"""The run file: one TOML for all three processes, read once, refused with every fault at once.

CONTRACT: the trainer and the monitor read the same file with the same function. Each process validates the tables
it needs (`ProducerSettings` here, `TrainerSettings` and `MonitorSettings` in their packages) and leaves the others
alone, so each fact stands in one place. Light: pydantic only.

    settings = read_run_file(ProducerSettings, "deploy/demo.toml", ["model.device=cpu"])
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from producer.common.addresses import (
    check_host,
    check_host_name,
    check_port,
    expand_endpoint,
    expand_hub_name,
    expand_path,
    is_loopback,
    path_argument,
    unreachable,
)
from producer.common.explain import explain, explain_stray, nearest
from producer.common.parsing import ParseError, parse_toml
from producer.common.shell import shell_command
from producer.common.toml import SettingsError, read_toml, show_value, toml_value

TABLES = ("run", "stream", "model", "corpus", "buffer", "optimizer", "sae", "snapshots", "checkpoint", "monitor")


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _check_device(name: str) -> str:
    if name in ("auto", "cpu", "cuda") or re.fullmatch(r"cuda:[0-9]+", name):
        return name
    raise ValueError('is no device; expected "auto", "cpu", "cuda", or one GPU by number, such as "cuda:1"')


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number, which may be written as 1e6."""
Positive = Annotated[Whole, Field(gt=0)]
Natural = Annotated[Whole, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Beat = Annotated[float, Field(gt=0, le=86_400)]
"""Seconds that ZeroMQ counts itself, as a 32-bit number of milliseconds."""
Span = Annotated[float, Field(gt=0, allow_inf_nan=True)]
"""Seconds after which something is done; inf: never."""
PathText = Annotated[str, AfterValidator(expand_path)]
"""A path in the run file."""
HubName = Annotated[str, AfterValidator(expand_hub_name)]
"""A model or a data set in the run file."""
Endpoint = Annotated[str, AfterValidator(expand_endpoint)]
"""A ZeroMQ endpoint in the run file."""
Host = Annotated[str, AfterValidator(check_host)]
"""An address that a process listens on."""
HostName = Annotated[str, AfterValidator(check_host_name)]
"""A name by which others call a host."""
Port = Annotated[int, AfterValidator(check_port)]
"""A port that a process listens on; 0 is any free one."""
Device = Annotated[str, AfterValidator(_check_device)]


class Table(BaseModel):
    """One table of the run file: unknown keys and wrong types are refused, values never change afterwards."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class RunSettings(Table):
    """[run]: what is one run, where it lives and when it ends."""

    directory: PathText = "runs/run"
    """Folder of the run: checkpoint, snapshots, metrics.jsonl, summary.json. Created when missing."""
    tokens: Positive | None = Field(default=None, examples=[1_000_000])
    """Rows to train on before the run ends; without it, the run ends with the data."""
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
    heartbeat_seconds: Beat = 1.0
    """Both sides say that they live this often."""
    dead_seconds: Beat = 10.0
    """A side silent for this long is taken for dead; its leases return."""
    stall_seconds: Span = 120.0
    """A producer that lives, has credit and makes no progress on its shard for this long loses the lease."""
    patience_seconds: Span = 300.0
    """How long a producer looks for a trainer before it gives up with exit code 1."""

    @model_validator(mode="after")
    def _closed_to_strangers(self) -> StreamSettings:
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
    """Hugging Face name, or path of a folder that holds the model and its tokenizer; `./gpt2` is always a folder."""
    revision: str | None = None
    """Branch, tag or commit on the hub; pin it, so that the stream stays the same."""
    hooks: list[str] = Field(min_length=1, examples=[["blocks.6.hook_resid_post"]])
    """Where to read: `blocks.6.hook_resid_post` (also resid_pre, resid_mid, mlp_out), or a module path of the model."""
    device: Device = "auto"
    """`cpu`, `cuda`, `cuda:1`; auto takes the GPU when there is one. CUDA_VISIBLE_DEVICES decides which."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the language model; auto is bfloat16 on a GPU, and on a CPU that is measured to be faster in it."""
    batch_windows: Positive | None = None
    """Windows in one forward pass; without it, as many as are measured to be fast: about 4096 tokens on a CPU."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""

    @field_validator("hooks")
    @classmethod
    def _each_once(cls, hooks: list[str]) -> list[str]:
        if repeated := sorted({hook for hook in hooks if hooks.count(hook) > 1}):
            raise ValueError(f"names {', '.join(repeated)} more than once; name each hook once")
        return hooks


class CorpusSettings(Table):
    """[corpus]: which text, how it becomes windows of tokens, and which rows are kept."""

    kind: Literal["stdlib", "text", "jsonl", "parquet", "huggingface", "tokens", "synthetic"] = "stdlib"
    """stdlib: Python's own sources. text, jsonl, parquet: files. huggingface: a dataset by name (extra `hf`).
    tokens: flat binary files of token ids. synthetic: vectors of known ground truth, without a language model."""
    paths: list[PathText] = Field(default=[], examples=[["a.txt", "b.txt"]])
    """Files, folders or globs for text, jsonl, parquet and tokens."""
    column: str = "text"
    """Field (jsonl) or column (parquet, huggingface) that holds the text."""
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
    shards are unlike, several should fit into buffer.rows: a row is about four bytes of text, or one token."""
    max_document_bytes: Positive = 16_000_000
    """The longest document: a line of jsonl, a text.gz file, a row of parquet or of a dataset. A longer one fails its
    shard. Tokenizing takes about 200 bytes of memory for each."""
    held_out: float = Field(default=0.0625, ge=0.0, lt=1.0)
    """Fraction of shards, chosen by hash, never trained on: the evaluation's text."""
    epochs: Natural = 1
    """Passes over the corpus before the data counts as finished; 0 goes on for ever."""
    context: Annotated[Whole, Field(gt=0, le=2**17)] = 256
    """Tokens in one window, BOS included."""
    prepend_bos: bool = True
    """Start each window with the tokenizer's BOS token, where it has one."""
    exclude_special: bool = True
    """Keep no row of a BOS, EOS, padding or other special token."""
    outlier_factor: float = Field(default=10.0, ge=0.0)
    """Drop rows whose norm exceeds this many times the median of the corpus' first windows (attention sinks); 0 keeps
    all."""
    synthetic: SyntheticSettings | None = None
    """[corpus.synthetic], for kind synthetic."""

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> CorpusSettings:
        if self.kind in ("text", "jsonl", "parquet", "tokens") and not self.paths:
            raise ValueError(f'corpus.kind = "{self.kind}" needs corpus.paths, such as paths = ["data/*.txt"]')
        if self.kind == "huggingface" and not self.dataset:
            raise ValueError(
                'corpus.kind = "huggingface" needs corpus.dataset, such as dataset = "HuggingFaceFW/fineweb"'
            )
        if self.kind == "synthetic" and self.synthetic is None:
            raise ValueError(
                'corpus.kind = "synthetic" needs a table [corpus.synthetic] with d_in, features and shards'
            )
        return self


class SyntheticSettings(Table):
    """[corpus.synthetic]: rows that are sparse sums of known unit directions (Sharkey et al. 2022)."""

    d_in: Positive = Field(examples=[64])
    """Width of a row."""
    features: Positive = Field(examples=[128])
    """How many true directions there are."""
    active: float = Field(default=5.0, gt=0.0)
    """Mean number of true features in a row."""
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
    """What is left to measurements that differ from time to time, and what to set; None when nothing is."""
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
    """What a producer reads of the run file."""

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


S = TypeVar("S", bound=BaseModel)


def read_run_file(kind: type[S], path: str | Path, overrides: list[str]) -> S:
    """The tables of `kind` from the TOML file `path`, with `section.key=value` overrides applied.

    Raises SettingsError naming every fault: key, value, what is expected and what to do.
    """
    document = read_toml(path)
    faults = [fault for override in overrides if (fault := _apply(document, override))]
    faults += [explain_stray(kind, TABLES, name, table) for name, table in document.items() if name not in TABLES]
    wanted = {name: table for name, table in document.items() if name in kind.model_fields}
    try:
        settings = settings_from(kind, wanted)
    except SettingsError as error:
        faults += str(error).split("\n")
    if faults:
        raise SettingsError("\n".join(f"{path}: {fault}" for fault in faults))
    return settings


def settings_from(kind: type[S], document: dict[str, Any]) -> S:
    """`document` as settings of this kind. Raises SettingsError naming every fault, one a line."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        raise SettingsError("\n".join(explain(kind, document, fault) for fault in error.errors())) from None


def show_settings(settings: BaseModel) -> str:
    """The resolved settings as TOML that `read_run_file` accepts again; unset options are left out."""
    tables = settings.model_dump(exclude_none=True)
    return "\n".join(_toml_table(name, table) for name, table in tables.items())


def _toml_table(name: str, table: Any) -> str:
    if isinstance(table, list):
        return "\n".join(_toml_lines(f"[[{name}]]", entry, name) for entry in table)
    return _toml_lines(f"[{name}]", table, name)


def _toml_lines(heading: str, table: dict[str, Any], name: str) -> str:
    plain = [f"{key} = {toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    nested = [
        _toml_lines(f"[{name}.{key}]", value, f"{name}.{key}")
        for key, value in table.items()
        if isinstance(value, dict)
    ]
    return "\n".join([heading, *plain, "", *nested])


def _apply(document: dict[str, Any], override: str) -> str | None:
    """Sets one `section.key=value` in `document`; returns the fault, if there is one."""
    name = f"override {show_value(override)}"
    try:
        override.encode()
    except UnicodeEncodeError:
        return f"{ascii(name)[1:-1]} holds bytes that are not UTF-8"
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        return f"{name}: expected section.key=value, such as optimizer.batch=2048"
    place: Any = document
    for part in parts[:-1]:
        if isinstance(place, list):
            chosen = [entry for index, entry in enumerate(place) if _is_called(entry, part, index)]
            if not chosen:
                close = nearest(part, [str(entry["name"]) for entry in place if "name" in entry])
                return f'{name}: no [[{parts[0]}]] is named "{part}"{close}, nor has that number'
            place = chosen[0]
        else:
            place = place.setdefault(part, {})
        if not isinstance(place, dict | list):
            return f'{name}: "{part}" is a value, not a table'
    if isinstance(place, list):
        return f"{name}: say which entry, as in {parts[0]}.0.{parts[-1]}=…"
    place[parts[-1]] = _override_value(text)
    return None


def _is_called(entry: Any, part: str, index: int) -> bool:
    return isinstance(entry, dict) and part in (str(index), entry.get("name"))


def _override_value(text: str) -> Any:
    """The value behind the `=` of an override: TOML, or text that needs no quotes, as in model.name=gpt2."""
    try:
        document = parse_toml(f"value = {text}")
    except ParseError:
        return text.strip()
    return document["value"] if len(document) == 1 else text


def parse_command_line(program: str, purpose: str, kind: type[S], arguments: list[str] | None = None) -> S:
    """`RUN.toml [section.key=value …]` of the daemons; ends the process for --help, --print-settings and faults."""
    import argparse

    parser = argparse.ArgumentParser(
        prog=program, description=purpose, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run_file", type=path_argument, metavar="RUN.toml", nargs="?", help="the run's settings; deploy/ holds examples"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces one setting of the file")
    parser.add_argument("--print-settings", action="store_true", help="print the resolved settings and exit")
    given = parser.parse_intermixed_args(arguments)
    if given.run_file is None:
        parser.error("which run file? deploy/ holds examples, such as deploy/demo.toml")
    try:
        settings = read_run_file(kind, given.run_file, given.overrides)
    except SettingsError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if given.print_settings:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` is no error
        print(show_settings(settings))
        raise SystemExit(0)
    return settings
