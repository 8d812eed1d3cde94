"""Labels, notes and bookmarks of latents, which people leave: notes.json in the run directory.

{"format": 1, "notes": {"SAE": {"INDEX": {"label", "note", "is_bookmarked", "snapshot", "changed"}}}}. The file is
replaced as a whole, so that it is never half written; another monitor of the same run may write it too, and the later
one of two changes to the same latent stays. A latent is meant as it was in `snapshot`: in training it may turn.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from monitor.files import read_json
from trainer.state.durable import replace_text

FILE = "notes.json"
FORMAT = 1
LONGEST_LABEL = 200
LONGEST_NOTE = 4_000
MOST_NOTES = 20_000
"""Notes of one run: the file is read and written as a whole."""


class NoteError(ValueError):
    """A note that cannot be kept; `str(error)` says why."""


@dataclass(frozen=True)
class Note:
    """What people have said about one latent."""

    label: str = ""
    """A few words for what it fires on."""
    note: str = ""
    is_bookmarked: bool = False
    snapshot: str = ""
    """The snapshot that was looked at."""
    changed: str = ""
    """When it was written, ISO 8601."""

    @property
    def is_empty(self) -> bool:
        return not (self.label or self.note or self.is_bookmarked)


def parse_note(document: dict[str, Any], snapshot: str) -> Note:
    """A note from the body of a request. Raises NoteError."""
    if unknown := sorted(document.keys() - {"label", "note", "is_bookmarked"}):
        raise NoteError(f"unknown key {unknown[0]!r}; expected label, note, is_bookmarked")
    for key, longest in (("label", LONGEST_LABEL), ("note", LONGEST_NOTE)):
        value = document.get(key, "")
        if not isinstance(value, str) or len(value) > longest:
            raise NoteError(f"{key}: expected text of at most {longest:,} characters")
    if not isinstance(document.get("is_bookmarked", False), bool):
        raise NoteError("is_bookmarked: expected true or false")
    return Note(
        label=" ".join(document.get("label", "").split()),
        note=document.get("note", "").strip(),
        is_bookmarked=document.get("is_bookmarked", False),
        snapshot=snapshot,
        changed=datetime.now(UTC).isoformat(timespec="seconds"),
    )


class Notes:
    """The notes of one run. Any thread may ask."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory
        self._path = run_directory / FILE

    def of_sae(self, sae: str) -> dict[int, Note]:
        """The notes of one SAE, by latent."""
        return {int(index): _note(one) for index, one in self._read().get(sae, {}).items() if index.isdecimal()}

    def all(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All notes as JSON has them."""
        return {sae: {index: asdict(_note(one)) for index, one in notes.items()} for sae, notes in self._read().items()}

    def write(self, sae: str, index: int, note: Note) -> None:
        """Keeps a note in place of an earlier one; an empty one removes it. Raises NoteError."""
        with self._locked():
            self._refuse_foreign_file()
            notes = self._read()
            own = {key: value for key, value in notes.get(sae, {}).items() if key != str(index)}
            if not note.is_empty:
                if sum(map(len, notes.values())) >= MOST_NOTES:
                    raise NoteError(f"this run has {MOST_NOTES:,} notes, the most that are kept; remove some")
                own[str(index)] = asdict(note)
            notes[sae] = dict(sorted(own.items(), key=lambda item: int(item[0]) if item[0].isdecimal() else -1))
            notes = {name: one for name, one in notes.items() if one}
            text = json.dumps({"format": FORMAT, "notes": notes}, indent=1, ensure_ascii=False)
            replace_text(self._path, text + "\n")

    def _read(self) -> dict[str, dict[str, dict[str, Any]]]:
        document = read_json(self._path, self._directory) or {}
        notes = document.get("notes") if document.get("format") == FORMAT else None
        if not isinstance(notes, dict):
            return {}
        return {
            sae: {index: one for index, one in own.items() if isinstance(one, dict)}
            for sae, own in notes.items()
            if isinstance(own, dict)
        }

    def _refuse_foreign_file(self) -> None:
        """Raises NoteError where the file would be lost: it is damaged, or of a later version."""
        document = read_json(self._path, self._directory)
        if self._path.exists() and (document is None or document.get("format") != FORMAT):
            raise NoteError(f"{self._path} cannot be read by this version; move it away to begin anew")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Held by one writer of this run at a time, in whatever process."""
        with open(self._directory / f".{FILE}.lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _note(document: dict[str, Any]) -> Note:
    """A note as the file has it; what is of another type counts as absent."""
    keys = ("label", "note", "snapshot", "changed")
    texts = {key: value for key in keys if isinstance(value := document.get(key), str)}
    return Note(**texts, is_bookmarked=document.get("is_bookmarked") is True)
