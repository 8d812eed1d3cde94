"""Kind `huggingface`: a dataset of the hub, read by `datasets`, which is imported when such a corpus is opened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.corpus.base import Corpus, CorpusError, Document, import_library, raise_faults
from producer.corpus.sources.columns import Column
from producer.corpus.sources.files import data_file, files_in_folder
from producer.settings import CorpusSettings

log = logging.getLogger(__name__)

RESHARD_UP_TO = 512
"""Files of a streamed dataset up to which each footer is read for its row groups; 10,000 would take an hour."""


class HuggingFaceCorpus(Corpus):
    """A dataset of the hub, or of a local folder, through the `datasets` library (extra `hf`).

    Streamed, a shard is a row group of a parquet file, or a file of another format; downloaded, it is a run of rows of
    about `shard_bytes`. The commit is looked up once, so that a branch which moves cannot change a running stream.
    """

    def __init__(self, settings: CorpusSettings) -> None:
        datasets = import_library("datasets", settings)
        commit = _commit(settings)
        try:
            dataset = _load(datasets, settings, commit)
            first = next(iter(dataset), None)
            columns = dataset.column_names or list(first or ())
        except Exception as error:  # `datasets` raises errors of a dozen libraries; each means that it cannot be opened
            raise CorpusError(
                f"{_name(settings)} cannot be opened: {type(error).__name__}: {error}; "
                "check dataset, subset, split and revision, the network, and HF_TOKEN if access is restricted"
            ) from error
        column = Column(settings)
        raise_faults(_dataset_faults(settings, column, first, columns))
        self._name = _name(settings)
        self._column = column
        self._dataset = dataset.select_columns(column.roots(columns))
        shards = self._dataset.num_shards if settings.streaming else _runs(self._dataset, settings.shard_bytes)
        access = "streamed" if settings.streaming else "downloaded"
        contents = f"{self._name}, commit {commit or 'unknown'}, {access}"
        identity = [settings.subset, settings.split, settings.column, settings.streaming, *_origin(settings, commit)]
        text_bytes = None if settings.streaming else [self._dataset.data.nbytes // shards] * shards
        super().__init__(settings, shards, contents, identity, text_bytes)

    @classmethod
    def more_shards_advice(cls, settings: CorpusSettings) -> str:
        if settings.streaming:
            return "Set corpus.streaming = false."
        return super().more_shards_advice(settings)

    def _read(self, shard: int) -> Iterator[Document]:
        records = self._dataset.shard(num_shards=self.shards, index=shard, contiguous=True)
        for row, record in enumerate(records):
            yield from self._column.documents(record, f"{self._name}, shard {shard}, row {row:,}")


def _load(datasets: Any, settings: CorpusSettings, commit: str | None) -> Any:
    dataset = datasets.load_dataset(
        settings.dataset,
        settings.subset,
        split=settings.split,
        revision=commit,
        streaming=settings.streaming,
    )
    if settings.streaming and hasattr(dataset, "reshard") and dataset.num_shards <= RESHARD_UP_TO:
        return dataset.reshard()
    return dataset


def _commit(settings: CorpusSettings) -> str | None:
    """Looks up the commit of corpus.revision; for a local folder, or without network, returns the setting itself."""
    from huggingface_hub import HfApi  # a dependency of datasets

    assert settings.dataset is not None, "CorpusSettings demands a name for this kind"
    if Path(settings.dataset).exists():
        return settings.revision
    try:
        return HfApi().dataset_info(settings.dataset, revision=settings.revision, timeout=30).sha
    except Exception as error:  # load_dataset either finds a copy in its cache or says better what is wrong
        log.warning("cannot look up the commit of dataset %s: %s", settings.dataset, error)
        return settings.revision


def _origin(settings: CorpusSettings, commit: str | None) -> list[object]:
    """Returns what identifies the dataset's contents: a local folder's files, or the hub's name and commit."""
    folder = Path(settings.dataset or "")
    if not folder.is_dir():
        return [settings.dataset, commit]
    files = [data_file(path, name) for name, path in sorted(files_in_folder(folder, ("",)))]
    return [[[file.name, file.size, file.digest] for file in files]]


def _dataset_faults(
    settings: CorpusSettings, column: Column, first: dict[str, Any] | None, columns: list[str]
) -> list[str]:
    """Says what is wrong with the dataset, judged by its first row."""
    if first is None:
        return [f"{_name(settings)} holds no rows; name another split or subset"]
    if column.name(columns) is None:
        return [f"{_name(settings)}: {column.missing(columns, first)}"]
    try:
        list(column.documents(first, _name(settings)))
    except CorpusError as error:
        return [] if "corpus.max_document_bytes" in str(error) else [str(error)]
    return []


def _runs(dataset: Any, shard_bytes: int) -> int:
    """Counts the runs of rows of about `shard_bytes` that a downloaded dataset has."""
    return max(1, min(len(dataset), round(dataset.data.nbytes / shard_bytes)))


def _name(settings: CorpusSettings) -> str:
    subset = f", subset {settings.subset!r}" if settings.subset else ""
    return f"corpus.dataset = {settings.dataset!r}{subset}, split {settings.split!r}"
