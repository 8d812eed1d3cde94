"""Latents one can read: what each one fires on, what it does to the next token, what lies near it, how it came about.

Everything is read off the newest snapshot whose `latents.safetensors` (`activations`) is written, and off the SAE's
own weights; both are mapped, so that they take no memory that others want.

    density       share of held-out rows on which the latent fires
    strongest     its largest activation there, in the units of the raw activations
    age           tokens trained since its decoder row was first seen with the direction it has (cosine ≥ 0.9 from each
                  snapshot to the next); it may be older than the first snapshot
    promoted      what the latent's direction adds to the logits, about the mean over the vocabulary ("logit lens"): the
                  direct path only, through the final norm's gain and the unembedding. The norm also divides by the size
                  of the whole stream, which is another one on each row: logits are told up to one factor.

Plain data in, plain data out: what is returned is ready for JSON.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from monitor.evaluation.evaluator import Subject
from monitor.evaluation.latents.activations import (
    GONE,
    TOP_TOKENS,
    LatentActivations,
    active,
    load_decoder,
    load_latents,
)
from monitor.evaluation.latents.explanation import explain
from monitor.evaluation.latents.texts import Texts
from monitor.files import is_within
from monitor.run_directory import (
    LATENTS,
    NotThere,
    explained_in,
    explained_saes,
    first_to,
    is_explained,
    read_json,
)
from monitor.snapshot_index import manifest_of
from producer.corpus.windows import Windows
from producer.lm.errors import ModelError
from producer.lm.model import LanguageModel
from producer.lm.unembedding import Unembedding
from producer.settings import CorpusSettings
from trainer.saes.inference import InferenceSae
from trainer.snapshot import SnapshotError

AROUND = (32, 16)
"""Tokens shown before and after the one that a context is about;"""
AROUND_IN_TABLE = (6, 6)
"""fewer in a table."""
CONTEXTS = 16
AMONG_STRONGEST = 32
"""Firings among which they are sought; what lies below is shown by quantiles."""
LOWER = (0.9, 0.75, 0.5, 0.25, 0.05)
"""Quantiles of a latent's activations at which further contexts are shown."""
CONTEXTS_AT_QUANTILE = 4
BINS = 40
PROMOTED = 12
MOST_PAST = 24
"""Snapshots in which a latent is shown; of more, some are passed over."""
RESIDUAL = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out")
"""Hooks whose activations are, or are added to, the residual stream."""
NEAREST = 12
LONGEST_TEXT = 4_000
"""Characters of a text that is searched by."""
FIRING_SHOWN = 60

Order = Literal["index", "density", "strongest", "norm", "age"]


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
        return Subject(self.folder.name, sae)

    def column(self, name: Order) -> np.ndarray:
        match name:
            case "index":
                return np.arange(self.latents.d_sae)
            case "density":
                return self.latents.density
            case "strongest":
                return np.abs(self.latents.strongest)
            case "norm":
                return self.norms
            case "age":
                return self.tokens - self.latents.born


class Explorer:
    """Answers questions about the latents of one run, with the language model it was trained on, from any thread."""

    def __init__(self, run_directory: Path, model: LanguageModel, corpus: CorpusSettings) -> None:
        self._directory = run_directory
        self._model = model
        self._corpus = corpus
        self._texts = Texts(model.tokenizer)
        self._opened: dict[Path, tuple[int, Explained]] = {}
        self._opening = threading.Lock()
        self._searching = threading.Lock()
        self._unembedding: Unembedding | None = None
        with suppress(ModelError):
            self._unembedding = model.unembedding()

    def open(self, sae: str, snapshot: str | None = None) -> Explained:
        """One SAE of the newest snapshot, or of the one named. Raises NotThere."""
        newest = explained_in(self._directory, sae)
        if newest is None:
            known = ", ".join(repr(entry["name"]) for entry in explained_saes(self._directory)) or "none yet"
            raise NotThere(f"the latents of sae {sae!r} have not been looked at yet; the run's SAEs are {known}")
        if snapshot is not None and not is_explained(self._directory, snapshot, sae):
            raise NotThere(f"no latents of sae {sae!r} in snapshot {snapshot!r}; the newest are in {newest}")
        name = snapshot or newest
        try:
            return self._open(self._directory / "snapshots" / name / sae, int(name))
        except (*GONE, SnapshotError):
            raise NotThere(f"snapshot {name} has just been retired; ask again") from None

    def _open(self, folder: Path, tokens: int) -> Explained:
        """Maps the files, once. A trainer that has gone back may publish another snapshot under the same name."""
        if not is_within(folder / LATENTS, folder):
            raise SnapshotError(f"{folder / LATENTS} is a link out of its folder")
        written = (folder / LATENTS).stat().st_mtime_ns
        with self._opening:
            known = self._opened.get(folder)
            if known is None or known[0] != written:
                # What was retired is let go: as long as it is mapped, it takes room on the disk.
                self._opened = {path: one for path, one in self._opened.items() if path.is_dir()}
                if (cfg := read_json(folder / "cfg.json", folder)) is None:
                    raise SnapshotError(f"{folder} holds no cfg.json")
                with safe_open(folder / "sae_weights.safetensors", "pt") as file:
                    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                known = self._opened[folder] = (
                    written, Explained(folder, tokens, cfg, weights, load_latents(folder / LATENTS))
                )  # fmt: skip
        return known[1]

    # The table

    def table(
        self, sae: str, order: Order = "strongest", descending: bool = True, search: str = "", offset: int = 0,
        limit: int = 50, snapshot: str | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """A part of the table of latents: those whose top tokens contain `search`, or the one of that number.

        A `search` in quotes is always a token. Sorted by one column, activations by how far they are from zero; latents
        that never fired come last, whatever the order, but by index. An `offset` beyond the end is the last page.
        """
        it, texts = self.open(sae, snapshot), self._texts
        chosen = self._matching(it, texts, search.strip())
        column = it.column(order)[chosen]
        rank = np.argsort(-column if descending else column, kind="stable")
        if order != "index":
            silent = it.latents.firings[chosen][rank] == 0
            rank = np.concatenate([rank[~silent], rank[silent]])
        offset = min(offset, max(0, len(chosen) - 1) // limit * limit)
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
        if search.isdecimal() and len(search) < 10:
            return everything[everything == int(search)]
        search = (search[1:-1] if len(search) > 2 and search[0] == search[-1] == '"' else search).casefold()
        ids = it.latents.top_ids
        known = np.unique(ids[ids >= 0])
        wanted = [token for token in known if search in texts.of(int(token)).casefold()]
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
            "hook": " + ".join(it.subject.hooks.reads),
            "target": it.subject.hooks.writes[0] if it.subject.hooks.is_transcoder else None,
            "architecture": it.cfg.get("architecture"),
            "explanation": self._explanation(it, latent),
            "contexts": _distinct_contexts(it.latents, texts, positions, values),
            "lower": [
                {"quantile": quantile, "contexts": found}
                for quantile in LOWER
                if (found := _contexts_at(it.latents, texts, positions, values, quantile))
            ],
            "histogram": _histogram(values),
            "written_at": it.subject.hooks.writes[-1],
            **self._effect(it, texts, latent),
            "nearest": [
                self._line(it, texts, other) | {"cosine": cosine} for other, cosine in neighbours
            ],
            "past": self._past(it, latent),
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
        """[vocabulary], about its mean; None where what the latent writes is no part of the residual stream.

        Of a crosscoder, what it writes at the last of its hooks.
        """
        hook = it.subject.hooks.writes[-1]
        width = {hook.name: hook.width for hook in self._model.hooks}.get(hook)
        if self._unembedding is None or width != len(self._unembedding.gain) or not hook.endswith(RESIDUAL):
            return None
        direction = it.weights["W_dec"][latent].float()[-width:].to(self._unembedding.gain.device)
        effect = self._unembedding.logits(direction).cpu()
        return effect - effect.mean()

    def _past(self, it: Explained, latent: int) -> list[dict[str, Any]]:
        """The latent in the run's snapshots, oldest first: its direction, and where it was looked at, what it did."""
        sae, present = it.folder.name, it.weights["W_dec"][latent].float()
        names = first_to(self._directory, sae, it.folder.parent.name)
        step = max(1, -(-len(names) // MOST_PAST))
        found = []
        for name in reversed(names[::-1][::step]):  # the newest always
            folder = self._directory / "snapshots" / name / sae
            with suppress(*GONE, SnapshotError):
                manifest_of(folder.parent)  # which refuses what leads out of the snapshot
                row = load_decoder(folder)[latent : latent + 1].flatten()
                if row.shape == present.shape:
                    cosine = float(torch.cosine_similarity(row, present, 0))
                    found.append({"snapshot": name, "tokens": int(name), "cosine": cosine} | self._did(folder, latent))
        return found

    def _did(self, folder: Path, latent: int) -> dict[str, Any]:
        """What a latent did in a snapshot; None for all of it where nobody looked."""
        with suppress(*GONE, SnapshotError):
            line = self._line(self._open(folder, int(folder.parent.name)), self._texts, latent)
            return {name: line[name] for name in ("density", "strongest", "top_tokens")}
        return {"density": None, "strongest": None, "top_tokens": []}

    # By text

    def fires(self, sae: str, text: str, at: int | None = None) -> dict[str, Any]:
        """Which latents fire on a text, and where; with `at`, those that fire on that one of its tokens.

        Latents come by how close they are to the strongest that they were on held-out text. Raises NotThere, and
        ValueError for a text that has no tokens or too many.
        """
        it, texts = self.open(sae), self._texts
        if not text.strip() or len(text) > LONGEST_TEXT:
            raise ValueError(f"a text of {len(text)} characters; expected 1 to {LONGEST_TEXT:,}, not only spaces")
        windows = texts.windows(text, self._corpus)
        if not windows.kept.any():
            raise ValueError("this text has no token that an SAE is shown: special tokens are left out")
        pieces = texts.pieces(windows.ids[windows.kept].tolist())
        if at is not None and not 0 <= at < len(pieces):
            raise ValueError(f"at = {at}: the text has tokens 0 to {len(pieces) - 1}")
        with self._searching:  # one at a time: each needs memory for some rows of all latents
            row, latent, value = self._activations(it, windows)
        here = slice(None) if at is None else row == at
        strength = np.zeros(it.latents.d_sae, np.float32)
        np.maximum.at(strength, latent[here], np.abs(value[here]))
        fired = np.flatnonzero(strength)
        relative = strength[fired] / np.maximum(np.abs(it.latents.strongest[fired]), strength[fired])
        best = fired[np.argsort(-relative, kind="stable")][:FIRING_SHOWN]
        return {
            "sae": sae,
            "snapshot": it.folder.parent.name,
            "text": text,
            "at": at,
            "tokens": pieces,
            "active": np.bincount(row, minlength=len(pieces)).tolist(),
            "firing": len(fired),
            "latents": [
                self._line(it, texts, int(index)) | {"values": _along(row, latent, value, index, len(pieces))}
                for index in best
            ],
        }

    def _activations(self, it: Explained, windows: Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, latent, value) of everything that is active on the kept positions, which are rows 0, 1, …"""
        hooks = [hook.name for hook in self._model.hooks]
        seen = dict(zip(hooks, self._model.activations(torch.from_numpy(windows.ids)), strict=True))
        kept = torch.from_numpy(windows.kept)
        x = torch.cat([seen[hook].cpu()[kept].float() for hook in it.subject.hooks.reads], 1)
        row, latent, value = active(it.subject, x)
        return row.numpy(), latent.numpy(), value.numpy()


def _along(row: np.ndarray, latent: np.ndarray, value: np.ndarray, index: int, tokens: int) -> list[float]:
    """One latent's activation on each token."""
    values = np.zeros(tokens, np.float32)
    values[row[latent == index]] = value[latent == index]
    return values.tolist()


def _told_apart(tokens: list[str]) -> list[str]:
    """Each once; those that differ only in how many spaces they have look the same on a page."""
    return list({re.sub(r"[^\S\n]+", " ", token): token for token in reversed(tokens)}.values())[::-1]


# --- Contexts --------------------------------------------------------------------------------------------------------


def _distinct_contexts(
    latents: LatentActivations, texts: Texts, positions: np.ndarray, values: np.ndarray
) -> list[dict[str, Any]]:
    """The strongest firings, each text once: `times` counts those with the same few tokens around the firing one."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    for firing, position in enumerate(positions[:AMONG_STRONGEST].tolist()):
        window, place = divmod(position, latents.context)
        key = tuple(latents.ids[window, max(0, place - 5) : place + 3].tolist())
        if key in found:
            found[key]["times"] += 1
        elif len(found) < CONTEXTS:
            found[key] = _context(latents, texts, positions, values, firing)
    return list(found.values())


def _contexts_at(
    latents: LatentActivations, texts: Texts, positions: np.ndarray, values: np.ndarray, quantile: float
) -> list[dict[str, Any]]:
    """Firings around one quantile of the latent's activations, where they are not among the strongest already."""
    middle = round((1 - quantile) * (len(values) - 1))
    first = middle - CONTEXTS_AT_QUANTILE // 2
    if first < AMONG_STRONGEST or first + CONTEXTS_AT_QUANTILE > len(values):
        return []
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
