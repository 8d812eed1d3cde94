"""Train Sluice's embedded language model: a small Llama on the Python standard library's own sources.

One command reproduces it (most of an hour on two cores with bfloat16 matrix units):

    python -m producer.demo_lm.train --out producer/demo_lm

It learns a byte-level BPE of 4096 tokens and then the model, both from the training shards of the very
corpus the demo streams (`producer.corpus`, kind `stdlib`). The held-out shards are never read until the end,
when the figure of merit, bits per byte, is measured on them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from producer.corpus import Corpus, open_corpus
from producer.settings import CorpusSettings

VOCABULARY = 4096
CONTEXT = 512
END_OF_TEXT = "<|endoftext|>"
PEAK_LEARNING_RATE = 4e-3
BOS = 0
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=CONTEXT,
    tie_word_embeddings=True,
    bos_token_id=BOS,
    eos_token_id=BOS,
    pad_token_id=None,
)


def documents(corpus: Corpus, shards: list[int]) -> list[str]:
    return [str(text) for shard in shards for text in corpus.documents(shard)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, each followed by the end-of-text token."""
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [np.array([*row, tokenizer.eos_token_id], dtype=np.int64) for row in ids]


def batches(stream: np.ndarray, rows: int, generator: np.random.Generator) -> Iterator[torch.Tensor]:
    """Endless batches `[rows, CONTEXT]`: BOS, then CONTEXT − 1 tokens; each pass cuts the stream at a new offset."""
    length = CONTEXT - 1
    while True:
        cut = stream[int(generator.integers(length)) :]
        windows = cut[: len(cut) // length * length].reshape(-1, length)
        order = generator.permutation(len(windows))
        for start in range(0, len(order) - rows + 1, rows):
            batch = windows[order[start : start + rows]]
            yield torch.from_numpy(np.pad(batch, ((0, 0), (1, 0)), constant_values=BOS))


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[float, float]:
    """(bits per byte, nats per token) of `texts`, each packed into windows of CONTEXT with BOS, in fp32."""
    stream = np.concatenate(encode(tokenizer, texts))
    size = sum(len(text.encode()) for text in texts)
    nats = 0.0
    length = CONTEXT - 1
    for start in range(0, len(stream), length * 8):
        block = stream[start : start + length * 8]
        for rows in (
            block[: len(block) // length * length].reshape(-1, length),
            block[len(block) // length * length :][None],
        ):
            if rows.size:
                ids = torch.from_numpy(np.pad(rows, ((0, 0), (1, 0)), constant_values=BOS))
                nats += loss_of(model, ids, torch.float32).item() * rows.size
    return nats / math.log(2) / size, nats / len(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that receives model, tokenizer and report.json")
    parser.add_argument("--tokens", type=float, default=33e6, help="training tokens (default 33e6)")
    parser.add_argument("--rows", type=int, default=16, help=f"windows of {CONTEXT} tokens per step (default 16)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    corpus = open_corpus(CorpusSettings(kind="stdlib"))
    texts = documents(corpus, corpus.training_shards)
    tokenizer = train_tokenizer(texts)
    stream = np.concatenate(encode(tokenizer, texts))
    print(f"{len(texts)} files, {len(stream):,} tokens of training text", flush=True)

    model = LlamaForCausalLM(CONFIG)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = int(arguments.tokens // (arguments.rows * CONTEXT))
    step_loss = torch.compile(loss_of)
    source = batches(stream, arguments.rows, np.random.default_rng(0))
    began, running = time.monotonic(), None
    for step in range(steps):
        # Warm up over 100 steps, hold, then decay linearly to zero over the last 60 %.
        factor = min((step + 1) / 100, 1.0, (steps - step) / (0.6 * steps))
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * factor
        loss = step_loss(model, next(source), torch.bfloat16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            spent = time.monotonic() - began
            rate = (step + 1) * arguments.rows * CONTEXT / spent
            print(
                f"step {step + 1}/{steps}  loss {running:.3f}  {rate:,.0f} tokens/s  {spent / 60:.1f} min", flush=True
            )

    model.bfloat16()  # what is shipped is what is measured
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    held_out = documents(corpus, corpus.held_out_shards)
    bits, nats = bits_per_byte(model.float(), tokenizer, held_out)
    report = {
        "held_out_bits_per_byte": round(bits, 4),
        "held_out_nats_per_token": round(nats, 4),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for text in held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": steps * arguments.rows * CONTEXT,
        "training_text_tokens": len(stream),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
    }
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
