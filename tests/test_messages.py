"""Inputs × messages: what is told about each mistake in a run file or on a command line, word for word.

Each row goes through the command line's real reader, in this process; a few go through real processes at the end.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monitor.cli import compare, pull, top
from monitor.settings import MonitorSettings
from producer.__main__ import main as producer
from producer.common.command_line import parse_command_line
from producer.common.run_file import settings_from
from producer.common.toml import SettingsError
from producer.settings import ProducerSettings
from trainer.__main__ import main as trainer
from trainer.saes.settings import SaeSettings
from trainer.settings import TrainerSettings

ROOT = Path(__file__).parent.parent

GOOD = """
[run]
directory = "runs/x"
[model]
name = "gpt2"
hooks = ["blocks.6.hook_resid_post"]
[[sae]]
name = "topk"
architecture = "topk"
d_sae = 4096
k = 32
"""

WHOLE = "expected a whole number"
BOOL = "expected true or false, in small letters and without quotes"
TEXT = "expected text in double quotes"
PORT = "is no port; expected 1 to 65535, or 0 for any free one"

OVERRIDES: list[tuple[str, str]] = [
    # [run]: whole numbers, booleans, paths
    ("run.tokens=1.5", f"run.tokens = 1.5: {WHOLE}, such as run.tokens = 1000000. Tokens to train on"),
    ("run.tokens=1,000,000", f'run.tokens = "1,000,000": {WHOLE}, without quotes and units: 1_000_000.'),
    ("run.tokens=10M", f'run.tokens = "10M": {WHOLE}, without quotes and units: 10_000_000.'),
    ('run.tokens="1_000"', f'run.tokens = "1_000": {WHOLE}, without quotes and units: 1_000.'),
    ("run.tokens=true", f"run.tokens = true: {WHOLE}"),
    ("run.tokens=0", "run.tokens = 0: expected a number above 0."),
    ("run.tokens=", f'run.tokens = "": {WHOLE}'),
    ("run.tokens=5e400", f"run.tokens = inf: {WHOLE}"),
    ("run.tokens=" + "9" * 5000, 'run.tokens = "9999'),
    ("run.seed=-1", "run.seed = -1: expected a number of at least 0."),
    ("run.seed=1e30", "run.seed = 1e+30: expected a number of at most 9007199254740992."),
    ("run.threads=2.5", f"run.threads = 2.5: {WHOLE}. CPU threads"),
    ("run.deterministic=True", f'run.deterministic = "True": {BOOL}: true. The same weights'),
    ("run.deterministic=1", f"run.deterministic = 1: {BOOL}. The same weights"),
    ("run.directory=", 'run.directory = "" is empty; name a file or folder. Folder of the run'),
    ("run.directory=5", f'run.directory = 5: {TEXT}: "5". Folder of the run'),
    ("run.directory=$NO_SUCH", "holds the environment variable NO_SUCH, which is not set; set it, or write the path"),
    ("run.directory=${HOME", "holds ${HOME, which is no environment variable; expected $NAME or ${NAME}"),
    ("run.directory=s3://b/c", "is an address (s3://), not a path of this machine; mount or copy it, and name that"),
    ('run.directory="a\\u0000b"', 'run.directory = "a\\u0000b" holds a control character; correct the path'),
    (
        "run.directory=~no-such-user/x",
        "begins with ~no-such-user, a user whom this machine does not have; for a folder",
    ),
    (
        "run.dir=x",
        'run.dir = "x": no such key; there are directory, tokens, seed, threads, max_quarantined_ratio, ',
    ),
    ("run.x.y=5", "run.x = { y = 5 }: no such key; there are directory"),
    ("run.tokens.x=5", f"run.tokens = {{ x = 5 }}: {WHOLE}"),
    # [stream]: endpoints, choices, seconds
    (
        "stream.endpoint=tcp://127.0.0.1",
        'stream.endpoint = "tcp://127.0.0.1" names no port: write tcp://127.0.0.1:5710.',
    ),
    ("stream.endpoint=tcp://127.0.0.1:99999", "has 99999 as its port; expected 1 to 65535, or 0 for any free one."),
    ("stream.endpoint=tcp://127.0.0.1:5xx", "has 5xx as its port; expected 1 to 65535"),
    ("stream.endpoint=tcp://127.0.0.1:5710/", "has 5710/ as its port; expected 1 to 65535"),
    ("stream.endpoint=tcp://:5710", "names no host: write tcp://127.0.0.1:PORT for this machine, or tcp://HOST:PORT"),
    ("stream.endpoint=tcp://::1:5710", "has an IPv6 address without brackets; write it as in tcp://[::1]:5710"),
    ("stream.endpoint=tcp://[::g]:5710", "has [::g] as its host, which is no IPv6 address; expected one such as [::1]"),
    ("stream.endpoint=tcp://300.1.1.1:5710", "has 300.1.1.1 as its host, which is no IPv4 address; expected one such"),
    ("stream.endpoint=tcp://a b:5710", "has a b as its host; expected a name or an address, such as 127.0.0.1"),
    ("stream.endpoint=127.0.0.1:5710", "names no transport: write tcp://127.0.0.1:5710, or ipc://FILE on one machine"),
    ("stream.endpoint=udp://127.0.0.1:5710", "names no transport: write tcp://127.0.0.1:5710, or ipc://FILE"),
    ("stream.endpoint=ipc://", 'stream.endpoint = "ipc://" is empty; name a file or folder'),
    ("stream.endpoint=ipc://" + "x" * 108, "has a path of 108 bytes, and 107 at most can be bound; use a shorter one"),
    ("stream.endpoint=tcp://*:5710", "is reachable from other machines and stream.keys is not set"),
    ("stream.dtype=bf16", 'stream.dtype = "bf16": expected one of "bfloat16", "float32" (did you mean bfloat16?).'),
    ("stream.keys=", 'stream.keys = "" is empty; name a file or folder'),
    ("stream.heartbeat_seconds=1s", 'stream.heartbeat_seconds = "1s": expected a number, such as stream.heartbeat_s'),
    (
        "stream.dead_seconds=inf",
        "stream.dead_seconds = inf: expected a finite number, such as stream.dead_seconds = 10",
    ),
    ("stream.dead_seconds=1e9", "stream.dead_seconds = 1000000000.0: expected a number of at most 86400."),
    # [model]
    ("model.name=", 'model.name = "" is empty; name a file or folder. Hugging Face name, or path of a folder'),
    ("model.name=12", f'model.name = 12: {TEXT}: "12". Hugging Face name'),
    ("model.name=https://huggingface.co/a/b", 'is an address; write the name on the hub alone, such as "a/b"'),
    ("model.hooks=h", 'model.hooks = "h": expected a list, such as model.hooks = ["blocks.6.hook_resid_post"]. Hooks'),
    ("model.hooks=[]", "model.hooks = []: expected a list of at least 1 entry, such as model.hooks = ["),
    ("model.hooks=[1]", f'model.hooks.0 = 1: {TEXT}: "1". Hooks to read'),
    ('model.hooks=["a", "a"]', 'model.hooks = ["a", "a"] names a more than once; name each hook once. Hooks to read'),
    (
        "model.device=cuda:x",
        'model.device = "cuda:x" is no device; expected "auto", "cpu", "cuda", or one GPU by number',
    ),
    ("model.dtype=fp16", 'model.dtype = "fp16": expected one of "auto", "float32", "bfloat16", "float16".'),
    ("model.revision=2024-01-01", f'model.revision = 2024-01-01: {TEXT}: "2024-01-01".'),
    # [corpus]
    (
        "corpus.paths=a.txt",
        'corpus.paths = "a.txt": expected a list, such as corpus.paths = ["a.txt", "b.txt"]. Files,',
    ),
    ('corpus.paths=["a", ""]', 'corpus.paths.1 = "" is empty; name a file or folder. Files, folders or globs'),
    ("corpus.paths={a=1}", "corpus.paths = { a = 1 }: expected a list, such as corpus.paths"),
    ("corpus.kind=json", '"chat", "mixture", "activations", "synthetic" (did you mean jsonl?). stdlib: Python'),
    ("corpus.kind=text", 'corpus.kind = "text" needs corpus.paths, such as paths = ["data/*.txt"]'),
    ("corpus.held_out=1", "corpus.held_out = 1: expected a number below 1. Fraction of shards"),
    ("corpus.context=999_999", "corpus.context = 999999: expected a number of at most 131072. Tokens in one window"),
    ("corpus.synthetic=5", "corpus.synthetic = 5: expected a table, which begins with a line [corpus.synthetic]"),
    ("corpus.synthetic.d_in=4", "corpus.synthetic.features: missing; add it, such as corpus.synthetic.features = 128."),
    # [buffer] [optimizer]
    ("buffer.rows=many", f'buffer.rows = "many": {WHOLE}, such as buffer.rows = 262144. Capacity in tokens.'),
    ("buffer.rows=5000", "buffer.rows = 5000 is under two batches (optimizer.batch = 4096)"),
    ("optimizer.betas=0.9", "optimizer.betas = 0.9: expected a list, such as optimizer.betas = [0.9, 0.95]. Adam"),
    (
        "optimizer.betas=[0.9]",
        "optimizer.betas = [0.9]: expected a list of at least 2 entries, such as optimizer.betas",
    ),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 = 1.0: expected a number below 1. Adam's decay"),
    (
        "optimizer.clip=nan",
        "optimizer.clip = nan: expected a finite number, such as optimizer.clip = 1.0. Largest norm",
    ),
    ("optimizer.cooldown=20%", 'optimizer.cooldown = "20%": expected a number, such as optimizer.cooldown = 0.2. The'),
    ("optimizer.learning_rat=1", "optimizer.learning_rat = 1: no such key (did you mean learning_rate?); there are"),
    ("optimizer.tokens=5", "optimizer.tokens = 5: no such key (did you mean run.tokens or sae.tokens?); there are"),
    ("optimiser.batch=1", "[optimiser]: no such table (did you mean optimizer?); the tables are run, stream, model"),
    # [[sae]]
    ("sae.0.d_sae=0", "sae.0.d_sae = 0: expected a number above 0. How many latents."),
    (
        "sae.0.architecture=top-k",
        'sae "topk": architecture = "top-k" is not one of topk, batchtopk, jumprelu, relu, p_anneal, tied, gated',
    ),
    ("sae.0.matryoshka=256", "sae.0.matryoshka = 256: expected a list, such as matryoshka = [256, 1024, 4096]. Sizes"),
    ("sae.0.name=", 'sae.0.name = "": expected text that is not empty, such as name = "topk". Its folder'),
    ("sae.0.name=" + "x" * 65, "expected text of at most 64 characters. Its folder"),
    ("sae.0.k=5000", 'sae "topk": k = 5000 exceeds d_sae = 4096; lower k or raise d_sae'),
    ("sae.0.start_from=", 'sae.0.start_from = "" is empty; name a file or folder. Folder of an SAE to go on from'),
    ("sae.tpok.k=3", 'override "sae.tpok.k=3": no [[sae]] is named "tpok" (did you mean topk?), nor has that number'),
    ("sae.k=3", 'override "sae.k=3": say which entry, as in sae.0.k=…'),
    # [snapshots] [checkpoint] [monitor]
    (
        "snapshots.keep=0",
        "snapshots.keep = 0: expected a number above 0. Number of newest snapshots that stay on disk.",
    ),
    (
        "checkpoint.every_seconds=0",
        "checkpoint.every_seconds = 0: expected a number above 0. Time between two checkpoints",
    ),
    ("monitor.trainer_port=99999", f"monitor.trainer_port = 99999 {PORT}. Prometheus port of the trainer"),
    ("monitor.producer_port=-1", f"monitor.producer_port = -1 {PORT}. Prometheus port of the first producer"),
    ("monitor.trainer_port=5710", "and monitor.trainer_port = 5710 name the same port; change one"),
    ("monitor.host=*", 'monitor.host = "*" names no address; write 127.0.0.1 for this machine alone, or 0.0.0.0 for'),
    ("monitor.host=http://a", 'monitor.host = "http://a" is an address with more than a host; write the host alone'),
    ("monitor.host=[::1]", 'monitor.host = "[::1]" has brackets, which an IPv6 address does without here; write ::1'),
    # Overrides that are none
    ("batch=5", 'override "batch=5": expected section.key=value, such as optimizer.batch=2048'),
    ("run.seed.=5", 'override "run.seed.=5": expected section.key=value'),
    ("model.name=\udcff", "holds bytes that are not UTF-8"),
]

MONITOR: list[tuple[str, str]] = [
    ("monitor.service_port=70000", f"monitor.service_port = 70000 {PORT}. HTTP port that serves the run"),
    ("monitor.port=8710", "monitor.port and monitor.service_port are both 8710: metrics and service need a port each"),
    ("monitor.host=0.0.0.0", "is reachable from other machines and monitor.token_file is not set"),
    ("monitor.token_file=", 'monitor.token_file = "" is empty; name a file or folder. A file that holds the token'),
    ("monitor.probe_file=[]", f'monitor.probe_file = []: {TEXT}, such as monitor.probe_file = "probes.jsonl".'),
    ("monitor.evaluate=off", f'monitor.evaluate = "off": {BOOL}. Measure each new snapshot'),
    ("monitor.evaluation_share=0", "monitor.evaluation_share = 0: expected a number of at least 0.01. Share of the"),
    (
        "monitor.allowed_hosts=a",
        'monitor.allowed_hosts = "a": expected a list, such as monitor.allowed_hosts = ["monitor',
    ),
    ('monitor.allowed_hosts=["http://a"]', 'monitor.allowed_hosts.0 = "http://a" is no host\'s name; write it without'),
    ("monitor.poll_seconds=inf", "monitor.poll_seconds = inf: expected a finite number, such as monitor.poll_seconds"),
    ("monitor.servic_port=1", "monitor.servic_port = 1: no such key (did you mean service_port?); there are"),
]

PRODUCER: list[tuple[str, str]] = [
    ("stream.endpoint=tcp://127.0.0.1:0", "stands for any free port; name the one that the trainer's log shows"),
    ("stream.endpoint=tcp://127.0.0.1:*", "stands for any free port; name the one that the trainer's log shows"),
    ("stream.endpoint=ipc://*", "stands for any free file; name the one that the trainer's log shows"),
]

FILES: list[tuple[bytes, str]] = [
    (GOOD.encode("utf-16"), "is UTF-16; save it as UTF-8"),
    (GOOD.encode("utf-32"), "is UTF-32; save it as UTF-8"),
    (GOOD.encode("utf-16-le"), "is not text in UTF-8 (it holds zero bytes); save it as UTF-8"),
    (GOOD.encode().replace(b"gpt2", b"g\xe9"), "is not UTF-8: byte 0xe9 in line 5; save it as UTF-8"),
    (
        b"[run]\ndeterministic = True\n",
        "is not valid TOML: line 2, column 17: Invalid value: deterministic = True; true and false are written in",
    ),
    (
        b"[run]\ndirectory = runs/x\n",
        "line 2, column 13: Invalid value: directory = runs/x; text stands in double quotes",
    ),
    (b"[run]\ntokens = 1,000\n", "line 2, column 11: Expected newline or end of document after a statement: tokens ="),
    (b"[a.b]\n[a.b]\n", "line 2, column 5: Cannot declare [a.b] twice"),
    (b"[run]\nseed = 1\nseed = 2\n", "line 3, column 9: Cannot overwrite a value: seed = 2"),
    (b'[run]\ndirectory = "x\n', "line 2, column 15: The line ends before its closing quote: directory ="),
    (b"[run]\n[model", "line 2, at its end: Expected ']' at the end of a table declaration"),
    (b"[sae]\nk = 1\n[[sae]]\nk = 2\n", "each SAE is a table [[sae]], with two brackets"),
    (
        GOOD.replace("[[sae]]", "[sae]").encode(),
        "sae: expected one table or more, each beginning with [[sae]]. The file",
    ),
    (GOOD.partition("[[sae]]")[0].encode(), "sae: expected one table or more, each beginning with [[sae]]."),
    (GOOD.replace("[run]", "[[run]]").encode(), "run: expected one table [run], with one bracket on each side"),
    (
        b"run = 5\n" + GOOD.replace("[run]", "[buffer]").encode(),
        "run = 5: expected a table, which begins with a line [run]",
    ),
    (
        b"sae = [5]\n" + GOOD.partition("[[sae]]")[0].encode(),
        "sae.0 = 5: expected a table, which begins with a line [[sae]]",
    ),
    (b"tokens = 5\n" + GOOD.encode(), "tokens = 5: a key stands under [run] or [[sae]], not before the first table"),
    (
        GOOD.replace("d_sae = 4096", "").encode(),
        "sae.0.d_sae: missing; add it, such as d_sae = 4096. How many latents.",
    ),
    (GOOD.replace('name = "gpt2"', "").encode(), 'model.name: missing; add it, such as model.name = "gpt2". Hugging'),
    (b"x = " + b"[" * 5000, "is not valid TOML: nested too deeply"),
    (b"x = " + b"9" * 5000, "is not valid TOML: an integer of 5,000 digits at line 1 column 5"),
    (b"#" * (1 << 21), "is larger than 1,048,576 bytes; is it the right file?"),
]


def error_text(capsys: pytest.CaptureFixture[str], kind: Any, folder: Path, data: bytes, *overrides: str) -> str:
    """What the operator reads; the process would end with code 2."""
    (folder / "run.toml").write_bytes(data)
    with pytest.raises(SystemExit) as stop:
        parse_command_line("python -m x", "", kind, [str(folder / "run.toml"), *overrides])
    assert stop.value.code == 2
    return capsys.readouterr().err


def short(value: object) -> str:
    """An id that is the same in every process."""
    name = value.__module__ if callable(value) else str(value)
    return name[:40].encode("ascii", "replace").decode()


@pytest.mark.parametrize(("override", "sentence"), OVERRIDES, ids=short)
def test_the_trainer_tells(override: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One mistake, one line: name, value, expectation, what to do; nothing of Python."""
    message = error_text(capsys, TrainerSettings, tmp_path, GOOD.encode(), override)

    assert sentence in message
    assert not [word for word in ("'", "None", "valid dictionary", "Input should") if word in _without_prose(message)]


def _without_prose(message: str) -> str:
    """The part that is made of the value and the expectation, without what the setting means."""
    return message.partition(". ")[0]


@pytest.mark.parametrize(("override", "sentence"), MONITOR, ids=short)
def test_the_monitor_tells(override: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """[monitor] is checked in full by the monitor alone."""
    assert sentence in error_text(capsys, MonitorSettings, tmp_path, GOOD.encode(), override)


@pytest.mark.parametrize(("override", "sentence"), PRODUCER, ids=short)
def test_the_producer_tells(override: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What can be bound but not connected to."""
    assert sentence in error_text(capsys, ProducerSettings, tmp_path, GOOD.encode(), override)


@pytest.mark.parametrize(("data", "sentence"), FILES, ids=range(len(FILES)))
def test_a_file_is_told(data: bytes, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Encodings, syntax with line and column, tables that are none."""
    assert sentence in error_text(capsys, TrainerSettings, tmp_path, data)


ACCEPTED: list[tuple[list[str], str, object]] = [
    (["run.tokens=1e6"], "run.tokens", 1_000_000),
    (["run.tokens=1_000_000"], "run.tokens", 1_000_000),
    (["corpus.context=1.28e2"], "corpus.context", 128),
    (["run.deterministic=false"], "run.deterministic", False),
    (["stream.patience_seconds=inf"], "stream.patience_seconds", float("inf")),
    (["checkpoint.every_seconds=inf"], "checkpoint.every_seconds", float("inf")),
    (["optimizer.learning_rate=1"], "optimizer.learning_rate", 1.0),
    (["model.name= gpt2"], "model.name", "gpt2"),
    (["model.name=gpt2/"], "model.name", "./gpt2"),
    (["model.name=org/model"], "model.name", "org/model"),
    (["model.name=~/m/"], "model.name", "/home/me/m"),
    (["corpus.dataset=data/x/"], "corpus.dataset", "./data/x"),
    (["run.directory=~/runs/a/"], "run.directory", "/home/me/runs/a"),
    (["run.directory=$HOME/${WHERE}//"], "run.directory", "/home/me/there"),
    (["run.directory=./a$"], "run.directory", "./a$"),
    (["run.directory=/"], "run.directory", "/"),
    (["stream.keys=~"], "stream.keys", "/home/me"),
    (['corpus.paths=["~/a.txt", "b/*.txt"]'], "corpus.paths", ["/home/me/a.txt", "b/*.txt"]),
    (["sae.0.start_from=$WHERE/s"], "sae.0.start_from", "there/s"),
    (["stream.endpoint=ipc://~/s"], "stream.endpoint", "ipc:///home/me/s"),
    (["stream.endpoint=ipc://@name"], "stream.endpoint", "ipc://@name"),
    (["stream.endpoint=tcp://[::1]:5711"], "stream.endpoint", "tcp://[::1]:5711"),
    (["stream.endpoint=tcp://127.0.0.1:*"], "stream.endpoint", "tcp://127.0.0.1:*"),
    (["stream.endpoint=tcp://127.0.0.1:0"], "stream.endpoint", "tcp://127.0.0.1:0"),
    (["stream.endpoint=tcp://*:5711", "stream.keys=k"], "stream.endpoint", "tcp://*:5711"),
    (["stream.endpoint=tcp://node-1.cluster:5711", "stream.keys=k"], "stream.keys", "k"),
    (["monitor.host=::1"], "monitor.host", "::1"),
]


@pytest.mark.parametrize(("overrides", "name", "value"), ACCEPTED, ids=short)
def test_what_is_meant_is_understood(
    overrides: list[str], name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, paths and endpoints as people write them; what was understood is read back as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("WHERE", "there")
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    place: Any = parse_command_line("x", "", TrainerSettings, [str(tmp_path / "run.toml"), *overrides])
    for part in name.split("."):
        place = place[int(part)] if part.isdigit() else getattr(place, part)

    assert place == value and type(place) is type(value)


def test_an_sae_that_is_attached_is_told_likewise() -> None:
    """`ctl attach` sends the keys of one table, which has no place in a run file."""
    with pytest.raises(SettingsError) as raised:
        settings_from(SaeSettings, {"name": "a", "architecture": "topk", "d_sae": 8, "k": "many", "start_from": ""})

    assert str(raised.value).split("\n") == [
        'start_from = "" is empty; name a file or folder. Folder of an SAE to go on from: one of a Sluice snapshot, '
        "one that SAELens saved, or one of sparsify.",
        'k = "many": expected a whole number, such as k = 32. Latents per activation.',
    ]


LATE: list[tuple[list[str], list[str]]] = [
    (["run.tokens=20e6"], []),
    (["snapshots.every_tokens=1e9"], []),  # without an end, everything comes in time
    (
        ["run.tokens=500_000"],
        [
            "snapshots.every_tokens = 10_000_000 is longer than run.tokens = 500_000: the only snapshot is the one at "
            "the end",
            "dead_tokens = 10_000_000 is longer than run.tokens = 500_000: no latent will count as dead; lower it",
        ],
    ),
    (
        ["run.tokens=20e6", "optimizer.warmup_tokens=17e6"],
        [
            "optimizer.warmup_tokens = 17_000_000 is longer than the 16_000_000 tokens before the cooldown (run.tokens "
            "= 20_000_000): the learning rate never reaches its full value; lower it, such as to 1_000_000"
        ],
    ),
    (
        ["run.tokens=20e6", "sae.0.architecture=jumprelu", "sae.0.target_l0=8", "sae.0.sparsity_warmup_tokens=21e6"],
        ["sparsity_warmup_tokens = 21_000_000 is longer than run.tokens = 20_000_000: the penalty never reaches its "
         "full weight; lower it"],
    ),
    (
        ["run.tokens=20e6", "sae.0.tokens=30e6", "sae.0.revive_tokens=21e6", "sae.0.reinitialise_tokens=22e6"],
        [
            "tokens = 30_000_000 is longer than run.tokens = 20_000_000: training ends with the run",
            "revive_tokens = 21_000_000 is longer than run.tokens = 20_000_000: it takes no effect; lower it",
            "reinitialise_tokens = 22_000_000 is longer than run.tokens = 20_000_000: it takes no effect; lower it",
        ],
    ),
    (
        ["sae.0.tokens=2e6", "optimizer.warmup_tokens=100_000", "sae.0.dead_tokens=1e6", "sae.0.revive_tokens=3e6"],
        ["revive_tokens = 3_000_000 is longer than its tokens = 2_000_000: it takes no effect; lower it"],
    ),
    (
        ["run.tokens=20e6", "snapshots.keep_every_tokens=30e6"],
        ["snapshots.keep_every_tokens = 30_000_000 is longer than run.tokens = 20_000_000: none is kept for it"],
    ),
    (
        ["optimizer.cooldown=0.3"],
        [
            "optimizer.cooldown = 0.3 needs an end to count back from, and run.tokens is not set: without it, learning "
            "rates fall only when `ctl cooldown` asks for it"
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "sentences"), LATE, ids=short)
def test_what_comes_too_late_is_told(overrides: list[str], sentences: list[str], tmp_path: Path) -> None:
    """Schedules that are longer than the run are allowed, and said at the start."""
    (tmp_path / "run.toml").write_text(GOOD.replace("k = 32", ""))
    topk = [] if any("architecture" in override for override in overrides) else ["sae.0.k=32"]
    arguments = [str(tmp_path / "run.toml"), *topk, *overrides]

    assert parse_command_line("x", "", TrainerSettings, arguments).warnings() == sentences


def test_a_sentence_about_some_saes_names_them(tmp_path: Path) -> None:
    """Those that share it, once."""
    one = GOOD.partition("[[sae]]")[2]
    more = "".join(
        "[[sae]]" + one.replace('"topk"\n', f'"{name}"\n', 1) + "dead_tokens = 30_000_000\n" for name in "ab"
    )
    (tmp_path / "run.toml").write_text(GOOD + more)
    settings = parse_command_line("x", "", TrainerSettings, [str(tmp_path / "run.toml"), "run.tokens=20e6"])

    assert [sentence.partition(" is")[0] for sentence in settings.warnings()] == [
        'sae "a", "b": dead_tokens = 30_000_000'
    ]


ARGUMENTS: list[tuple[Any, list[str], str]] = [
    (trainer, ["ctl", "", "status"], 'argument RUN_DIR: path "" is empty; name a file or folder'),
    (trainer, ["ctl", "$NO_SUCH/x", "status"], "holds the environment variable NO_SUCH, which is not set"),
    (trainer, ["ctl", "x", "attach", ""], 'argument SAE.toml: path "" is empty'),
    (trainer, ["check", ""], 'argument RUN_DIR: path "" is empty; name a file or folder'),
    (trainer, ["export", "s3://x", "--format", "sparsify", "--to", "y"], 'path "s3://x" is an address (s3://)'),
    (trainer, ["export", "x", "--format", "sparsify", "--to", ""], 'argument --to: path "" is empty'),
    (trainer, ["estimate", ""], 'argument RUN.toml: path "" is empty'),
    (trainer, ["estimate", "x", "--width", "0"], 'argument --width: "0": expected a whole number above 0'),
    (trainer, ["estimate", "x", "--days", "soon"], 'argument --days: "soon": expected a number above 0'),
    (trainer, [""], 'argument RUN.toml: path "" is empty'),
    (producer, ["keys", ""], 'argument DIR: path "" is empty'),
    (pull.main, ["http://127.0.0.1:8710", "--to", ""], 'argument --to: path "" is empty'),
    (compare.main, ["", "x"], 'argument A: path "" is empty'),
]


@pytest.mark.parametrize(("main", "arguments", "sentence"), ARGUMENTS, ids=short)
def test_paths_of_every_command_follow_the_rule(
    main: Any, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Usage, and exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)

    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("http://127.0.0.1:99999", "is no address of a monitor: Port out of range 0-65535"),
        ("http://127.0.0.1:port", "is no address of a monitor: Port could not be cast"),
        ("http://127.0.0.1:0", "is no address of a monitor; expected one such as http://127.0.0.1:8710"),
        ("http://[::1", "is no address of a monitor: Invalid IPv6 URL"),
        ("ftp://h", '"ftp://h" is no address of a monitor; expected one such as http://127.0.0.1:8710'),
        ("", '"" is no address of a monitor'),
    ],
)
@pytest.mark.parametrize("main", [pull.main, top.main], ids=["pull", "top"])
def test_an_address_of_no_monitor_is_told(
    main: Any, url: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is asked of the network."""
    assert main([url]) == 2
    assert sentence in capsys.readouterr().err


def test_home_folders_are_found_by_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Where no shell expands `~`, as in a service's unit, the command does."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert producer(["keys", "~/keys/"]) == 0
    assert (tmp_path / "keys" / "server.key").is_file()
    assert f'Set keys = "{tmp_path}/keys" under [stream]' in capsys.readouterr().out
    assert trainer(["ctl", "~/none", "status"]) == 2
    assert f"{tmp_path}/none does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "overrides", "sentence"),
    [
        ("trainer", ["stream.endpoint=tcp://127.0.0.1:99999"], "has 99999 as its port"),
        ("producer", ["stream.endpoint=tcp://127.0.0.1"], "names no port: write tcp://127.0.0.1:5710"),
        ("monitor", ["monitor.service_port=99999"], "monitor.service_port = 99999 is no port"),
    ],
)
def test_a_process_ends_with_code_2(package: str, overrides: list[str], sentence: str, tmp_path: Path) -> None:
    """No traceback, nothing written, nothing bound."""
    (tmp_path / "run.toml").write_text(GOOD)
    command = [sys.executable, "-m", package, "run.toml", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)

    assert process.returncode == 2
    assert sentence in process.stderr and "Traceback" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
