"""Kind `stdlib`: the sources of the running Python's standard library, which every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from platform import python_version

from producer.corpus.base import Corpus, CorpusError
from producer.corpus.sources.files import EDGE_BYTES, edge_digest
from producer.settings import CorpusSettings

SHARDS = 64


class StdlibCorpus(Corpus):
    """The sources of the standard library: text without a network.

    A file's shard depends on its path alone, so what is held out stays held out in every version of Python. The
    embedded language model was trained on the training shards: do not change this mapping.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        self._files: list[list[Path]] = [[] for _ in range(SHARDS)]
        identity = []
        text_bytes = [0] * SHARDS
        self.skipped = 0
        """Files left out because they are not valid UTF-8; Python's own tests hold some."""
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
                continue
            data = path.read_bytes()
            if not _is_utf8(data):
                self.skipped += 1
                continue
            name = relative.as_posix()
            shard = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % SHARDS
            self._files[shard].append(path)
            text_bytes[shard] += len(data)
            identity.append([name, len(data), edge_digest(data[:EDGE_BYTES], data[-EDGE_BYTES:])])
        if not identity:
            raise CorpusError(f'corpus.kind = "stdlib": {root} holds no Python sources; choose another kind')
        skipped = f"{self.skipped} skipped: not UTF-8"
        contents = f"standard library of Python {python_version()}, {len(identity):,} files ({skipped})"
        super().__init__(settings, SHARDS, contents, identity, text_bytes)

    def _read(self, shard: int) -> Iterator[str]:
        for path in self._files[shard]:
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError as error:
                raise CorpusError(f"{path} changed since the corpus was opened: {error}") from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
