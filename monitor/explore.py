"""Latents one can read: what each one fires on, what it does to the next token, what lies near it, how it came about.

Everything is read off the newest snapshot whose `latents.safetensors` (`monitor.latents`) is written, and off the SAE's
own weights, which are mapped, not loaded: a page of one latent among 131,072 touches a few megabytes.

    density       share of held-out rows on which the latent fires
    strongest     its largest activation there, in the units of the raw activations
    age           tokens trained since its decoder row was first seen with the direction it has (cosine ≥ 0.9 from one
                  looked-at snapshot to the next); at least that old
    promoted      what the latent's direction adds to the logits through the final norm's gain and the unembedding, per
                  unit of activation, about the mean over the vocabulary ("logit lens"; the direct path only)

Plain data in, plain data out: what is returned is ready for JSON.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from monitor.evaluate import Subject
from monitor.explanation import explain
from monitor.latents import TOP_TOKENS, LatentActivations, load_latents
from monitor.run_directory import LATENTS, NotThere, explained_saes, explained_snapshots, read_json
from producer.activations import LanguageModel, ModelError
from producer.settings import CorpusSettings
from producer.tokens import windows_of
from trainer.saes.inference import InferenceSae

AROUND = (32, 16)
"""Tokens shown before and after the one that a context is about;"""
AROUND_IN_TABLE = (10, 5)
"""fewer in a table."""
CONTEXTS = 16
LOWER = (0.9, 0.75, 0.5, 0.25, 0.05)
"""Quantiles of a latent's activations at which further contexts are shown."""
CONTEXTS_AT_QUANTILE = 4
BINS = 40
PROMOTED = 12
ROWS_OF_VOCABULARY = 1 << 14
NEAREST = 12
LONGEST_TEXT = 4_000
"""Characters of a text that is searched by."""
FIRING_SHOWN = 60

Order = Literal["index", "density", "strongest", "norm", "age"]
ORDERS: tuple[Order, ...] = ("index", "density", "strongest", "norm", "age")


class Texts:
    """Token ids as the text they stand for. A tokenizer serves one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._known: dict[int, str] = {}

    def of(self, token: int) -> str:
        """One token alone; bytes that are no character by themselves show as �."""
        if token not in self._known:
            with self._lock:
                self._known[token] = self._tokenizer.decode([token])
        return self._known[token]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One text per token, which put together are the text: the last token of a character that has several shows it.

        The text of a token may depend on those before it, so each is what the text grows by.
        """
        pieces, told = [], ""
        with self._lock:
            for end in range(1, len(ids) + 1):
                text = self._tokenizer.decode(ids[:end])
                unfinished = text.endswith("\ufffd") and end < len(ids)
                pieces.append("" if unfinished else text[len(told) :])
                told = told if unfinished else text
        return pieces

    def windows(self, text: str, settings: CorpusSettings) -> Any:
        with self._lock:
            return windows_of([text], self._tokenizer, settings)


@dataclass(frozen=True)
class Explained:
    """One SAE of one snapshot, with what its latents did."""

    folder: Path
    tokens: int
    cfg: dict[str, Any]
    weights: dict[str, Tensor]
    """Mapped from the file."""
    latents: LatentActivations

    @cached_property
    def norms(self) -> np.ndarray:
        """‖row of W_dec‖, float32 [d_sae]."""
        return torch.linalg.vector_norm(self.weights["W_dec"].float(), dim=1).numpy()

    @cached_property
    def subject(self) -> Subject:
        sae = InferenceSae(self.cfg, {name: weight.float() for name, weight in self.weights.items()})
        reads = tuple(sae.hooks)
        return Subject(self.folder.name, sae, reads, reads if sae.target is None else (sae.target,))

    def column(self, name: Order) -> np.ndarray:
        match name:
            case "index":
                return np.arange(self.latents.d_sae)
            case "density":
                return self.latents.density
            case "strongest":
                return self.latents.strongest
            case "norm":
                return self.norms
            case "age":
                return self.tokens - self.latents.born


def _explained(folder: Path, tokens: int) -> Explained:
    with safe_open(folder / "sae_weights.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Explained(folder, tokens, read_json(folder / "cfg.json") or {}, weights, load_latents(folder / LATENTS))


class Explorer:
    """Answers questions about the latents of one run, with the language model that it was trained on."""

    def __init__(self, run_directory: Path, model: LanguageModel, corpus: CorpusSettings) -> None:
        self._directory = run_directory
        self._model = model
        self._corpus = corpus
        self._texts = Texts(model.tokenizer)
        self._opened: dict[Path, tuple[int, Explained | None]] = {}
        self._unembedding: tuple[Tensor, Tensor] | None = None
        with suppress(ModelError):
            self._unembedding = model.unembedding()

    def open(self, sae: str, snapshot: str | None = None) -> Explained:
        """One SAE of the newest snapshot, or of the one named. Raises NotThere."""
        names = explained_snapshots(self._directory, sae)
        if not names:
            known = ", ".join(repr(entry["name"]) for entry in explained_saes(self._directory)) or "none yet"
            raise NotThere(f"the latents of sae {sae!r} have not been looked at yet; the run's SAEs are {known}")
        if snapshot is not None and snapshot not in names:
            raise NotThere(f"no latents of sae {sae!r} in snapshot {snapshot!r}; there are {', '.join(names)}")
        name = snapshot or names[-1]
        folder = self._directory / "snapshots" / name / sae
        try:
            # A trainer that has gone back to a checkpoint may publish another snapshot under the same name.
            written = (folder / LATENTS).stat().st_mtime_ns
            known_since, found = self._opened.get(folder, (0, None))
            if found is None or known_since != written:
                # What was retired is let go: as long as it is mapped, it takes room on the disk.
                self._opened = {path: known for path, known in self._opened.items() if path.is_dir()}
                found = _explained(folder, int(name))
                self._opened[folder] = (written, found)
        except (OSError, SafetensorError):
            raise NotThere(f"snapshot {name} has just been retired; ask again") from None
        return found

    # The table

    def table(
        self, sae: str, order: Order = "strongest", descending: bool = True, search: str = "", offset: int = 0,
        limit: int = 50, snapshot: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A part of the table of latents: those whose top tokens contain `search`, or the one of that number.

        Sorted by one column; latents that never fired come last, whatever the order, but by index.
        """
        it, texts = self.open(sae, snapshot), self._texts
        chosen = self._matching(it, texts, search.strip())
        column = it.column(order)[chosen]
        rank = np.argsort(-column if descending else column, kind="stable")
        if order != "index":
            silent = it.latents.firings[chosen][rank] == 0
            rank = np.concatenate([rank[~silent], rank[silent]])
        shown = chosen[rank[offset : offset + limit]]
        return {
            "sae": sae,
            "snapshot": it.folder.parent.name,
            "d_sae": it.latents.d_sae,
            "rows": it.latents.rows,
            "matching": len(chosen),
            "silent": int((it.latents.firings == 0).sum()),
            "order": order,
            "descending": descending,
            "search": search,
            "offset": offset,
            "limit": limit,
            "latents": [
                self._line(it, texts, int(latent)) | {"example": _example(it.latents, texts, int(latent))}
                for latent in shown
            ],
        }

    def _matching(self, it: Explained, texts: Texts, search: str) -> np.ndarray:
        everything = np.arange(it.latents.d_sae)
        if not search:
            return everything
        if search.isdecimal():
            return everything[everything == int(search)]
        ids = it.latents.top_ids
        known = np.unique(ids[ids >= 0])
        wanted = [token for token in known if search.casefold() in texts.of(int(token)).casefold()]
        return everything[np.isin(ids, wanted).any(1)]

    def _line(self, it: Explained, texts: Texts, latent: int) -> dict[str, Any]:
        """What a table tells of one latent, without a look at the others."""
        positions, values = it.latents.of(latent)
        ids = it.latents.ids.ravel()[positions[:TOP_TOKENS]]
        return {
            "index": latent,
            "density": len(values) / max(1, it.latents.rows),
            "firings": len(values),
            "strongest": float(values[0]) if len(values) else 0.0,
            "norm": float(torch.linalg.vector_norm(it.weights["W_dec"][latent].float())),
            "age": int(it.tokens - it.latents.born[latent]),
            "top_tokens": _told_apart([texts.of(int(token)) for token in ids]),
        }

    # One latent

    def latent(self, sae: str, latent: int, snapshot: str | None = None) -> dict[str, Any]:
        """Everything that the page of one latent shows. Raises NotThere."""
        it, texts = self.open(sae, snapshot), self._texts
        if not 0 <= latent < it.latents.d_sae:
            raise NotThere(f"sae {sae!r} has latents 0 to {it.latents.d_sae - 1}, not {latent}")
        positions, values = it.latents.of(latent)
        neighbours = self._nearest(it, latent)
        return self._line(it, texts, latent) | {
            "sae": sae,
            "snapshot": it.folder.parent.name,
            "d_sae": it.latents.d_sae,
            "rows": it.latents.rows,
            "hook": it.subject.reads[0] if len(it.subject.reads) == 1 else " + ".join(it.subject.reads),
            "target": it.subject.writes[0] if it.subject.writes != it.subject.reads else None,
            "architecture": it.cfg.get("architecture"),
            "explanation": self._explanation(it, latent),
            "contexts": _distinct_contexts(it.latents, texts, positions, values, CONTEXTS),
            "lower": [
                {"quantile": quantile, "contexts": found}
                for quantile in LOWER
                if (found := _contexts_at(it.latents, texts, positions, values, quantile))
            ],
            "histogram": _histogram(values),
            **self._effect(it, texts, latent),
            "nearest": [
                self._line(it, texts, other) | {"cosine": cosine} for other, cosine in neighbours
            ],
            "past": self._past(it, texts, latent),
        }  # fmt: skip

    def _explanation(self, it: Explained, latent: int) -> dict[str, Any] | None:
        """The n-gram that tells best where it fires, None for a wildcard; None when there is none."""
        told = explain(it.latents, latent)
        if not told.pattern:
            return None
        words = [None if token is None else self._texts.of(token) for token in told.pattern]
        return {"pattern": words, "precision": told.precision, "recall": told.recall, "f1": told.f1}

    def _nearest(self, it: Explained, latent: int) -> list[tuple[int, float]]:
        """Latents by the cosine of their decoder rows with this one's, the nearest first."""
        W_dec = it.weights["W_dec"].float()
        scale = torch.from_numpy(it.norms).clamp_min(1e-12)
        cosine = W_dec @ W_dec[latent] / (scale * scale[latent])
        cosine[latent] = -2
        found = cosine.topk(min(NEAREST, len(cosine) - 1))
        return list(zip(found.indices.tolist(), found.values.tolist(), strict=True))

    def _effect(self, it: Explained, texts: Texts, latent: int) -> dict[str, Any]:
        """The tokens that the latent's direction makes more and less likely; None where it writes no residual."""
        effect = self._logits(it, latent)
        if effect is None:
            return {"promoted": None, "suppressed": None}
        most = min(PROMOTED, len(effect))
        return {
            name: [{"token": texts.of(int(token)), "logit": float(effect[token])} for token in tokens]
            for name, tokens in (
                ("promoted", effect.topk(most).indices),
                ("suppressed", effect.topk(most, largest=False).indices),
            )
        }

    def _logits(self, it: Explained, latent: int) -> Tensor | None:
        """[vocabulary], about its mean; None where the latent writes something that no residual stream takes up."""
        if self._unembedding is None:
            return None
        gain, W_U = self._unembedding
        width = {hook.name: hook.width for hook in self._model.hooks}.get(it.subject.writes[-1])
        if width != len(gain):
            return None
        direction = it.weights["W_dec"][latent].float()[-width:].to(gain.device)
        # In float32, a part of the vocabulary at a time: the model's own type would round neighbours to ties.
        effect = torch.cat([rows.float() @ (gain * direction) for rows in W_U.split(ROWS_OF_VOCABULARY)]).cpu()
        return effect - effect.mean()

    def _past(self, it: Explained, texts: Texts, latent: int) -> list[dict[str, Any]]:
        """The same latent in every snapshot in which it was looked at, oldest first."""
        sae, present = it.folder.name, it.weights["W_dec"][latent].float()
        found = []
        for name in explained_snapshots(self._directory, sae):
            try:
                then = self.open(sae, name)
            except NotThere:
                continue
            if then.weights["W_dec"].shape != it.weights["W_dec"].shape:
                continue
            row = then.weights["W_dec"][latent].float()
            found.append(
                self._line(then, texts, latent)
                | {"snapshot": name, "tokens": then.tokens, "cosine": float(torch.cosine_similarity(row, present, 0))}
            )
        return found

    # By text

    def fires(self, sae: str, text: str, at: int | None = None) -> dict[str, Any]:
        """Which latents fire on a text, and where; with `at`, those that fire on that one of its tokens.

        Latents come by how close they are to the strongest that they were on held-out text. Raises NotThere, and
        ValueError for a text that has no tokens or too many.
        """
        it, texts = self.open(sae), self._texts
        model = self._model
        if not text.strip() or len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text)} characters; expected 1 to {LONGEST_TEXT:,}, not only spaces")
        windows = texts.windows(text, self._corpus)
        seen = dict(
            zip([hook.name for hook in model.hooks], model.activations(torch.from_numpy(windows.ids)), strict=True)
        )
        kept = torch.from_numpy(windows.kept)
        x = torch.cat([seen[hook].cpu()[kept].float() for hook in it.subject.reads], 1)
        latents = it.subject.sae.encode(x).numpy()
        pieces = texts.pieces(windows.ids[windows.kept].tolist())
        if at is not None and not 0 <= at < len(pieces):
            raise ValueError(f"at = {at}: the text has tokens 0 to {len(pieces) - 1}")
        strength = np.abs(latents if at is None else latents[at : at + 1]).max(0)
        fired = np.flatnonzero(strength)
        relative = strength[fired] / np.maximum(it.latents.strongest[fired], strength[fired])
        best = fired[np.argsort(-relative, kind="stable")][:FIRING_SHOWN]
        return {
            "sae": sae,
            "snapshot": it.folder.parent.name,
            "text": text,
            "at": at,
            "tokens": pieces,
            "active": [int(count) for count in (latents != 0).sum(1)],
            "firing": len(fired),
            "latents": [
                self._line(it, texts, int(latent)) | {"values": [float(value) for value in latents[:, latent]]}
                for latent in best
            ],
        }


def _told_apart(tokens: list[str]) -> list[str]:
    """Each once; those that differ only in how many spaces they have look the same on a page."""
    return list({re.sub(r"[^\S\n]+", " ", token): token for token in reversed(tokens)}.values())[::-1]


# --- Contexts --------------------------------------------------------------------------------------------------------


def _distinct_contexts(
    latents: LatentActivations, texts: Texts, positions: np.ndarray, values: np.ndarray, most: int
) -> list[dict[str, Any]]:
    """The strongest firings, each text once: `times` counts those with the same few tokens up to the firing one."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for firing, position in enumerate(positions[: 8 * most].tolist()):
        window, place = divmod(position, latents.context)
        key = tuple(latents.ids[window, max(0, place - 5) : place + 3].tolist())
        if key in found:
            found[key]["times"] += 1
        elif len(found) < most:
            found[key] = _context(latents, texts, positions, values, firing)
    return list(found.values())


def _contexts_at(
    latents: LatentActivations, texts: Texts, positions: np.ndarray, values: np.ndarray, quantile: float
) -> list[dict[str, Any]]:
    """Firings around one quantile of the latent's activations, where there are enough to tell quantiles apart."""
    if len(values) < 10 * CONTEXTS_AT_QUANTILE:
        return []
    middle = round((1 - quantile) * (len(values) - 1))
    first = min(max(0, middle - CONTEXTS_AT_QUANTILE // 2), len(values) - CONTEXTS_AT_QUANTILE)
    chosen = range(first, first + CONTEXTS_AT_QUANTILE)
    return [_context(latents, texts, positions, values, firing) for firing in chosen]


def _example(latents: LatentActivations, texts: Texts, latent: int) -> dict[str, Any] | None:
    """The latent's strongest firing, briefly; None when it never fired."""
    positions, values = latents.of(latent)
    return _context(latents, texts, positions, values, 0, AROUND_IN_TABLE) if len(values) else None


def _context(
    latents: LatentActivations, texts: Texts, positions: np.ndarray, values: np.ndarray, firing: int,
    around: tuple[int, int] = AROUND,
) -> dict[str, Any]:  # fmt: skip
    """The text around one of the latent's firings, with its activation at each of the tokens shown."""
    window, place = divmod(int(positions[firing]), latents.context)
    begin = window * latents.context
    real = np.flatnonzero(latents.shown[window])
    # A BOS is no text. Without one, the stream has the first position too.
    text = int(real[0]) + (not latents.streamed[window, real[0]]), int(real[-1]) + 1
    first, last = max(text[0], place - around[0]), min(text[1], place + around[1] + 1)
    here = (positions >= begin + first) & (positions < begin + last)
    active = dict(zip((positions[here] - begin).tolist(), values[here].tolist(), strict=True))
    return {
        "value": float(values[firing]),
        "times": 1,
        "at": place - first,
        "cut_before": first > text[0],
        "cut_after": last < text[1],
        "tokens": texts.pieces(latents.ids[window, first:last].tolist()),
        "values": [active.get(place, 0.0) for place in range(first, last)],
    }


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """How often the latent fired how strongly: `counts` of equal bins between the `edges`."""
    if not len(values):
        return {"edges": [], "counts": []}
    low = min(0.0, float(values.min()))
    counts, edges = np.histogram(values, BINS, (low, max(float(values.max()), low + 1e-9)))
    return {"edges": edges.tolist(), "counts": counts.tolist()}
