"""The model card of a snapshot: README.md of its repository on the Hugging Face hub.

Everything in it is read from the snapshot: cfg.json, manifest.json and, where the monitor has measured it,
evaluation.json. The head is the hub's own metadata, by which SAEs of SAELens are found there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tomli_w
from safetensors import safe_open

from monitor.evaluation.measures import MEASURES, Better, Measure, Stage
from monitor.evaluation.results import Evaluation, read_evaluation, value_of
from monitor.files import read_json
from producer.common.formatting import format_count
from producer.common.version import VERSION
from trainer.saes.description import Equations, equations_of, is_in_saelens
from trainer.saes.hooks import SaeHooks
from trainer.snapshot import Manifest, SnapshotError

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
TAGS = ("sparse-autoencoder", "mechanistic-interpretability", "sluice")
SETTINGS = ("model", "corpus", "buffer", "optimizer", "sae")
"""Tables of the run file that decide what was trained; the others say where and how it ran, and stay at home."""


@dataclass(frozen=True)
class CardSae:
    """One SAE in a model card."""

    name: str
    cfg: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: Evaluation | None
    equations: Equations
    weight_names: tuple[str, ...]

    @property
    def hooks(self) -> SaeHooks:
        return SaeHooks.from_metadata(self.cfg.get("metadata", {}))

    @property
    def loads_in_saelens(self) -> bool:
        return is_in_saelens(self.cfg)


def model_card(folder: Path, manifest: Manifest, repository: str, license_name: str | None) -> str:
    """README.md of the snapshot in `folder`, for a repository such as `someone/gpt2-saes`. Raises SnapshotError."""
    saes = [_sae(folder, name, metrics) for name, metrics in manifest.saes.items()]
    settings = published_settings(manifest.run.get("settings") or {})
    loader = jinja2.PackageLoader("monitor.publishing")
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(
        "card.md"
    ).render(  # facts that an older trainer did not record are undefined, and left out
        head=_head(manifest, license_name),
        repository=repository,
        title=repository.rpartition("/")[2],
        manifest=manifest,
        tokens=format_count(manifest.tokens),
        model=_model_name(manifest) or "a language model",
        stream=manifest.run.get("stream") or {},
        saes=saes,
        loaded=next((sae for sae in saes if sae.loads_in_saelens), None),
        measures=[measure for measure in MEASURES if any(_number(measure, sae) is not None for sae in saes)],
        cell=lambda measure, sae: _cell(measure, _number(measure, sae)),
        better=lambda measure: {Better.LOWER: "lower", Better.HIGHER: "higher", None: "–"}[measure.better],
        stages=Stage,
        settings=tomli_w.dumps(settings).strip(),
        version=VERSION,
    )


def published_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a run's settings that are published."""
    return {table: settings[table] for table in SETTINGS if table in settings}


def _sae(folder: Path, name: str, metrics: dict[str, Any]) -> CardSae:
    cfg = read_json(folder / name / "cfg.json", folder)
    if cfg is None:
        raise SnapshotError(f"{folder / name} holds no readable cfg.json")
    with safe_open(folder / name / "sae_weights.safetensors", "numpy") as file:
        weight_names = tuple(sorted(file.keys()))
    try:
        equations = equations_of(cfg, frozenset(weight_names))
    except KeyError:
        raise SnapshotError(f"{folder / name} has an architecture that this version does not know") from None
    return CardSae(name, cfg, metrics, read_evaluation(folder, name), equations, weight_names)


def _head(manifest: Manifest, license_name: str | None) -> str:
    """The card's metadata, as YAML."""
    from huggingface_hub import ModelCardData

    name = _model_name(manifest)
    base = name if name is not None and HUB_ID.fullmatch(name) and "/" in name and not Path(name).exists() else None
    data = ModelCardData(
        library_name="saelens", tags=list(TAGS), license=license_name, base_model=base,
    )  # fmt: skip
    return data.to_yaml()


def _model_name(manifest: Manifest) -> str | None:
    name = (manifest.run.get("stream") or {}).get("model")
    return name if isinstance(name, str) else None


def _number(measure: Measure, sae: CardSae) -> float | None:
    value = value_of(measure, sae.metrics, sae.evaluation)
    return None if isinstance(value, Mapping) else value


def _cell(measure: Measure, value: float | None) -> str:
    return "–" if value is None else format(value, measure.format)
