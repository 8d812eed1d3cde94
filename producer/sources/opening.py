"""Opens the source that the run file names."""

from __future__ import annotations

from producer.settings import ProducerSettings
from producer.sources.base import Source
from producer.sources.language_model import LanguageModelSource
from producer.sources.saved import SavedSource
from producer.sources.synthetic import SyntheticSource


def open_source(settings: ProducerSettings) -> Source:
    """Opens the source that the run file names. Raises CorpusError or ModelError for what an operator can mend."""
    match settings.corpus.kind:
        case "synthetic":
            return SyntheticSource(settings)
        case "activations":
            return SavedSource(settings)
    return LanguageModelSource(settings)
