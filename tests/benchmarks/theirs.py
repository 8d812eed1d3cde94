"""The peers' own training steps and activation paths, timed in their own environment with nothing of ours installed.

Also a plain Hugging Face forward pass, in any environment that has the library.

Reads one JSON object per line from standard input and answers each with one on standard output: `do` names a function
below, the rest are its arguments. What a request sets up is kept for the next one like it.

What is the peers' own: initialisation, forward, losses, gradients, clipping, optimizer, decoder normalisation, the
count of dead latents, and in the activation paths tokenisation, batching, hooks, buffers and shuffling.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "" if os.path.exists("/dev/nvidiactl") else "1")

import torch
from safetensors.torch import load_file
from torch import Tensor

Step = Callable[[Tensor], object]
LONG = 10**9
"""Samples or steps of a run that is never finished: schedules stay where they begin."""


def step(rows: str, device: str, **cell: Any) -> dict[str, float]:
    """Seconds of one training step; the first call of a cell takes two steps more, which are not counted."""
    batches = _batches(rows, cell["batch"], device)
    learn, count = _learner(json.dumps(cell, sort_keys=True), rows, device)
    while len(count) < 2:
        learn(batches[len(count)])
        count.append(1)
    batch = batches[len(count) % len(batches)]
    count.append(1)
    _synchronise(device)
    began = time.perf_counter()
    learn(batch)
    _synchronise(device)
    return {"seconds": time.perf_counter() - began}


@cache
def _batches(rows: str, batch: int, device: str) -> tuple[Tensor, ...]:
    return tuple(load_file(rows)["rows"].float().to(device).split(batch))


@cache
def _learner(cell: str, rows: str, device: str) -> tuple[Step, list[int]]:
    """(one training step, a list as long as the steps done)"""
    size = json.loads(cell)
    d_in = _batches(rows, size["batch"], device)[0].shape[1]
    make = {"saelens": _saelens, "dictionary_learning": _dictionary_learning, "sparsify": _sparsify}
    return make[size["library"]](size, d_in, device), []


def _saelens(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """SAETrainer.step, which its `fit` calls."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU"}[cell["architecture"]]
    options = {"k": cell["k"]}
    if cell["architecture"] == "jumprelu":
        options = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": cell["k"]}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=cell["d_sae"], device=device, **options)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=LONG,
            train_batch_size_samples=cell["batch"],
            lr=3e-4,
            lr_end=3e-5,
            device=device,
            autocast=cell["autocast"],
        ),
        sae,
        iter(()),
    )

    def learn(x: Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1

    return learn


def _dictionary_learning(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """`update` of its trainers, which trainSAE calls."""
    _without_nnsight()
    from dictionary_learning.trainers import BatchTopKTrainer, JumpReluTrainer, TopKTrainer

    common = dict(
        steps=LONG, activation_dim=d_in, dict_size=cell["d_sae"], layer=1, lm_name="-", device=device, warmup_steps=0
    )
    match cell["architecture"]:
        case "topk":
            trainer: Any = TopKTrainer(k=cell["k"], **common)
        case "batchtopk":
            trainer = BatchTopKTrainer(k=cell["k"], **common)
        case "jumprelu":
            trainer = JumpReluTrainer(target_l0=cell["k"], **common)
    loss, steps = trainer.loss, [0]

    def loss_in_autocast(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cell["autocast"]):
            return loss(*args, **kwargs)

    trainer.loss = loss_in_autocast

    def learn(x: Tensor) -> None:
        trainer.update(steps[0], x)
        steps[0] += 1

    return learn


def _sparsify(cell: dict[str, Any], d_in: int, device: str) -> Step:
    """SparseCoder and the loop of its Trainer, which only runs with a language model inside, line by line."""
    from sparsify import SparseCoder, SparseCoderConfig

    assert cell["architecture"] == "topk"
    sae = SparseCoder(d_in, SparseCoderConfig(num_latents=cell["d_sae"], k=cell["k"]), device=device)
    optimizer = torch.optim.Adam(sae.parameters())
    tokens_since_fired = torch.zeros(cell["d_sae"], dtype=torch.long, device=device)

    def learn(x: Tensor) -> None:
        sae.set_decoder_norm_to_unit_norm()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=cell["autocast"]):
            out = sae(x, dead_mask=None)
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        tokens_since_fired.add_(len(x))
        tokens_since_fired[out.latent_indices.flatten()] = 0

    return learn


# Activations ---------------------------------------------------------------------------------------------------------

BUFFER_ROWS = 16_384
TRAIN_BATCH = 4096
PIECE = 1024
"""Characters of a text for dictionary_learning, which keeps the first window of each and no more."""

Take = Callable[[], int]


def activations(seconds: float, **path: Any) -> dict[str, float]:
    """Rows per second of a library's own activation path. The first buffer is not counted."""
    take = _activations(json.dumps(path, sort_keys=True))
    take()
    rows, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        rows += take()
    return {"rows_per_second": rows / (time.perf_counter() - began)}


@cache
def _activations(path: str) -> Take:
    """Takes half a buffer of rows, which is what a refill replaces, and returns how many they were."""
    request = json.loads(path)
    make = {
        "saelens": _saelens_store,
        "dictionary_learning": _dictionary_learning_buffer,
        "sparsify": _sparsify_loop,
    }
    with open(request["texts"]) as file:
        return make[request["library"]](request, json.load(file))


def _saelens_store(path: dict[str, Any], texts: list[str]) -> Take:
    """ActivationsStore over its HookedProxyLM, which ends the pass at the hook."""
    import datasets
    from sae_lens.load_model import load_model
    from sae_lens.training.activations_store import ActivationsStore

    hook = f"model.layers.{path['layer']}"
    options = {"dtype": getattr(torch, path["dtype"])}
    model = load_model("AutoModelForCausalLM", path["model"], path["device"], options, [hook])
    store = ActivationsStore(
        model=model,
        dataset=datasets.Dataset.from_dict({"text": texts}),
        streaming=False,
        hook_name=hook,
        hook_head_index=None,
        context_size=path["context"],
        d_in=model.model.config.hidden_size,
        n_batches_in_buffer=BUFFER_ROWS // path["context"],
        total_training_tokens=1,
        store_batch_size_prompts=path["windows"],
        train_batch_size_tokens=TRAIN_BATCH,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device(path["device"]),
        dtype="float32",
        exclude_special_tokens=torch.tensor(model.tokenizer.all_special_ids, device=path["device"]),
    )
    return lambda: sum(len(store.next_batch()) for _ in range(BUFFER_ROWS // 2 // TRAIN_BATCH))


def _dictionary_learning_buffer(path: dict[str, Any], texts: list[str]) -> Take:
    """ActivationBuffer; in place of nnsight, which traces each pass, a plain hook that ends it."""
    _without_nnsight()
    from dictionary_learning.buffer import ActivationBuffer

    pieces = [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]
    model = _Traced(path)
    buffer = ActivationBuffer(
        itertools.cycle(pieces),
        model,
        model,
        d_submodule=model.network.config.hidden_size,
        n_ctxs=BUFFER_ROWS // path["context"],
        ctx_len=path["context"],
        refresh_batch_size=path["windows"],
        out_batch_size=TRAIN_BATCH,
        device=path["device"],
        remove_bos=True,
    )
    return lambda: sum(len(next(buffer)) for _ in range(BUFFER_ROWS // 2 // TRAIN_BATCH))


class _Saved:
    """What nnsight calls a proxy: `save` keeps it, `value` is what it held."""

    value: Any = None

    def save(self) -> _Saved:
        return self

    def stop(self) -> None:
        """The hook has ended the pass already."""


class _Traced:
    """As much of nnsight's LanguageModel as ActivationBuffer asks for; also the submodule that it reads."""

    def __init__(self, path: dict[str, Any]) -> None:
        self.network, self.tokenizer, self._layer = _model_of(path)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.dtype = self.network.dtype
        self.inputs, self.output = _Saved(), _Saved()

    @contextlib.contextmanager
    def trace(self, texts: list[str], invoker_args: dict[str, Any], **_: Any) -> Iterator[None]:
        tokens = self.tokenizer(texts, return_tensors="pt", padding=True, **invoker_args).to(self.network.device)
        self.inputs.value = ((), tokens)
        self.output.value = _until(self._layer, lambda: self.network(**tokens, use_cache=False))
        yield


def _sparsify_loop(path: dict[str, Any], texts: list[str]) -> Take:
    """The loop of its Trainer up to the SAE, line by line: a hook on the model, which runs to its end.

    The text became tokens before the loop, as there; that time is not counted.
    """
    import datasets
    from sparsify.data import chunk_and_tokenize
    from torch.utils.data import DataLoader

    model, tokenizer, layer = _model_of(path)
    model.requires_grad_(False)
    data = chunk_and_tokenize(
        datasets.Dataset.from_dict({"text": texts}), tokenizer, max_seq_len=path["context"], num_proc=1
    )
    exclude = torch.tensor(tokenizer.all_special_ids, device=path["device"])
    loader = DataLoader(data, batch_size=path["windows"], shuffle=False)
    tokens = itertools.chain.from_iterable(itertools.repeat(loader))
    rows = [0]

    def take() -> int:
        rows[0] = 0
        while rows[0] < BUFFER_ROWS // 2:
            x = next(tokens)["input_ids"].to(path["device"])
            mask = torch.isin(x, exclude, invert=True).flatten(0, 1)

            def hook(module: Any, inputs: Any, outputs: Any, mask: Tensor = mask) -> None:
                outputs = (outputs[0] if isinstance(outputs, tuple) else outputs).flatten(0, 1)
                rows[0] += len(outputs[mask])

            handle = layer.register_forward_hook(hook)
            model(x)
            handle.remove()
        return rows[0]

    return take


def forward(tokens: str, seconds: float, keep_memory: bool, **path: Any) -> dict[str, float]:
    """Passes per second of the bare model, cut after the hooked block, over batches [passes, windows, context]."""
    if keep_memory:
        _keep_memory()
    run, device = _cut_model(json.dumps(path, sort_keys=True)), path["device"]
    batches = load_file(tokens)["tokens"].to(device)
    for batch in batches[:3]:
        run(batch)
    passes, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        run(batches[passes % len(batches)])
        _synchronise(device)
        passes += 1
    return {"passes_per_second": passes / (time.perf_counter() - began)}


@cache
def _cut_model(path: str) -> Callable[[Tensor], object]:
    model, _, _ = _model_of(request := json.loads(path))
    model.layers, model.norm = model.layers[: request["layer"] + 1], torch.nn.Identity()

    def run(tokens: Tensor) -> None:
        with torch.inference_mode():
            model(input_ids=tokens, use_cache=False)

    return run


def _keep_memory() -> None:
    """Freed memory is used again instead of being returned to the system and cleared anew (GNU C library)."""
    library = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        library.mallopt(option, 2**30)


def _model_of(path: dict[str, Any]) -> tuple[Any, Any, Any]:
    """(the model without its head, its tokenizer, the hooked block)"""
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(path["model"], dtype=getattr(torch, path["dtype"])).to(path["device"])
    return model, AutoTokenizer.from_pretrained(path["model"]), model.layers[path["layer"]]


class _Ended(Exception):
    """The hooked block has run; its output is the argument."""


def _until(layer: Any, forward: Callable[[], object]) -> Tensor:
    """What `layer` gives when `forward` runs, which goes no further."""

    def hook(module: Any, inputs: Any, outputs: Any) -> None:
        raise _Ended(outputs[0] if isinstance(outputs, tuple) else outputs)

    handle = layer.register_forward_hook(hook)
    try:
        forward()
    except _Ended as end:
        return end.args[0]
    finally:
        handle.remove()
    raise RuntimeError("the hooked block did not run")


def _without_nnsight() -> None:
    """dictionary_learning imports nnsight for its buffer; its trainers need none."""
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=None))  # type: ignore[arg-type]


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main() -> None:
    # Libraries print what they like; only answers may reach the pipe.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"step": step, "activations": activations, "forward": forward}[request.pop("do")](**request)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            answer = {"error": f"{type(error).__name__} in {place.name}, {place.line}: {error}"[:300]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
