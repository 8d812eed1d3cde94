"""The version of a checkpoint's format, and what brings documents of older versions to it.

Light: no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

VERSION = 6
OLDEST_VERSION = 3
"""The oldest version that the migrations begin with."""

Json = dict[str, Any]


class CheckpointFormatError(ValueError):
    """The contents of a checkpoint are not what the format says. The message names the key."""


class UnknownVersion(CheckpointFormatError):
    """A checkpoint of a version that this release does not read."""

    def __init__(self, version: object) -> None:
        super().__init__(f"has format {version!r}, this version reads {VERSION}")


def _add_breaches(document: Json) -> Json:
    """The first releases of version 3 counted no breaches of the ledger's invariants."""
    ledger = document.get("ledger")
    return document | {"ledger": {"breaches": {}} | ledger} if isinstance(ledger, dict) else document


def _keep_latents_together(document: Json) -> Json:
    """Version 3 knew one rank: no blocks, and all rows of latents in one file."""
    return document | {"blocks": 1, "latents": {}}


PARTS_OF_LEDGER: Json = {
    "trained_by_corpus": {},
    "trained_by_revision": {},
    "newest_revision": "",
    "newest_revision_number": 0,
    "revision_bounds": {},
}
PARTS_OF_STREAM: Json = {"revision": "", "revision_number": 0, "corpora": []}


def _add_corpora_and_revisions(document: Json) -> Json:
    """Up to version 4 a run had one corpus, and one revision of the language model."""
    ledger = document.get("ledger")
    if not isinstance(ledger, dict):
        return document
    ledger = PARTS_OF_LEDGER | ledger
    if isinstance(ledger.get("stream"), dict):
        ledger["stream"] = PARTS_OF_STREAM | ledger["stream"]
    if isinstance(ledger.get("open"), list):
        ledger["open"] = [{"revision": ""} | shard if isinstance(shard, dict) else shard for shard in ledger["open"]]
    return document | {"ledger": ledger}


def _plan_without_end(document: Json) -> Json:
    """Up to version 5 the default learning rate was that of runs without an end."""
    saes = document.get("saes")
    if not isinstance(saes, dict):
        return document
    planned = {name: {"planned_tokens": None} | sae if isinstance(sae, dict) else sae for name, sae in saes.items()}
    return document | {"saes": planned}


MIGRATIONS: list[tuple[int, Callable[[Json], Json]]] = [
    (3, _add_breaches),
    (3, _keep_latents_together),
    (4, _add_corpora_and_revisions),
    (5, _plan_without_end),
]
"""In order: the newest version whose documents need the change, and the change. It leaves its argument alone."""


def migrated(document: Json) -> Json:
    """The document in the present version. Raises CheckpointFormatError for a version that cannot be read."""
    version = document.get("format")
    if not isinstance(version, int) or not OLDEST_VERSION <= version <= VERSION:
        raise UnknownVersion(version)
    for newest, migrate in MIGRATIONS:
        if version <= newest:
            document = migrate(document)
    return document
