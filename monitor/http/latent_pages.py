"""HTML of latents: the table, the latents that fire on a text, and the page of one latent.

Pure functions of the records in `monitor.evaluation.latents.views`. The page of one latent needs no script, so that its
export, a single file, is the same page.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from monitor.evaluation.latents.views import FiringLatent, Latent, LatentTable, Order, TextFirings, TriedText
from monitor.http.html import render
from monitor.notes import Note

COLUMNS: dict[Order, tuple[str, str]] = {
    "index": ("latent", "its number in the SAE"),
    "density": ("density", "share of held-out tokens on which it fires"),
    "strongest": ("strongest", "its largest activation on them, in the units of the raw activations"),
    "norm": ("norm", "length of its decoder row"),
    "age": ("age", "tokens trained since its decoder row was first seen with this direction; at least"),
}
"""Keys that the table can be sorted by: heading and meaning."""


@dataclass(frozen=True)
class SortLink:
    """The heading of a column, a link that sorts by it."""

    name: str
    title: str
    meaning: str
    sort: str | None
    """`ascending` or `descending` where the table is sorted by this column."""
    next_descending: int
    """1 where the link sorts in descending order, otherwise 0."""

    @property
    def arrow(self) -> str:
        return {"descending": " ↓", "ascending": " ↑", None: ""}[self.sort]


def latent_table(table: LatentTable, notes: Mapping[int, Note], marked: str = "") -> str:
    """One page of the table. Its headings sort, by links that the script takes over."""
    columns = [_column(name, table) for name in COLUMNS]
    return render("latent_table.html", table=table, columns=columns, notes=notes, marked=marked)


def _column(name: Order, table: LatentTable) -> SortLink:
    title, meaning = COLUMNS[name]
    if table.order == name:
        sort = "descending" if table.descending else "ascending"
        return SortLink(name, title, meaning, sort, next_descending=int(not table.descending))
    return SortLink(name, title, meaning, None, next_descending=int(name != "index"))


@dataclass(frozen=True)
class FiringRow:
    """A latent in the table below a text."""

    latent: FiringLatent
    activation: float
    """On the token that was asked for, otherwise the one farthest from zero."""
    scale: float
    """The activation with the deepest shade: the latent's strongest on held-out text, or on this one."""

    @property
    def share(self) -> float:
        return abs(self.activation) / self.scale


def text_firings(firings: TextFirings) -> str:
    """The text, and the latents that fire on it, each with the text shaded by its activation."""
    rows = [_firing_row(latent, firings.at) for latent in firings.latents]
    return render("text_firings.html", firings=firings, rows=rows)


def _firing_row(latent: FiringLatent, at: int | None) -> FiringRow:
    activation = latent.values[at] if at is not None else max(latent.values, key=abs)
    return FiringRow(latent, activation, scale=max(abs(latent.strongest), abs(activation)))


@dataclass(frozen=True)
class NoteView:
    """What people have said about a latent, and whether the reader may change it."""

    note: Note | None
    is_writable: bool = False


def latent_page(
    latent: Latent, view: NoteView = NoteView(None), *, exported: bool = False, text: str = "", tried: str = ""
) -> str:  # fmt: skip
    """The page of one latent; exported, it stands alone: no links into the service, no script.

    `text` is one that is tried, and `tried` the HTML about it.
    """
    return render(
        "latent.html",
        title=f"{latent.sae} · latent {latent.index}",
        latent=latent,
        exported=exported,
        note=view.note or Note(),
        is_writable=view.is_writable,
        text=text or _suggested_text(latent),
        tried=tried,
    )


def _suggested_text(latent: Latent) -> str:
    """The text up to the strongest firing: what follows it is what the latent changes most."""
    if not latent.contexts:
        return ""
    strongest = latent.contexts[0]
    return "".join(strongest.tokens[: strongest.at + 1])


def tried_text(tried: TriedText) -> str:
    """A text that was tried on one latent."""
    scale = max(abs(tried.strongest), *(abs(value) for value in tried.values), 1e-12)
    return render("tried_text.html", tried=tried, scale=scale)
