"""Every number that says how good an SAE is, declared once: its name, unit, meaning and format, and where it is shown.

Prometheus metrics, the live page, curves, the terminal, `compare`, Grafana's dashboards, summary.json and
docs/measures.md read this table. To add a measure, compute it in `monitor.evaluation.evaluator` or beside it, and add
its line to `MEASURES`.

Some measures are taken in training, over recent tokens: the trainer reports them, and `trainer.metrics` has their units
and help texts. The others are taken of a snapshot with the language model, on held-out text; they are the numbers of
evaluation.json. The same quantity may be measured in both ways: `fvu` is.

    python -m monitor.evaluation.measures > docs/measures.md
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from trainer import metrics as trainer_metrics


class Stage(Enum):
    """When a measure is taken."""

    TRAINING = "training"
    HELD_OUT = "held-out"


class Better(Enum):
    """Which of two values is the better one, all else equal."""

    LOWER = "lower"
    HIGHER = "higher"


@dataclass(frozen=True)
class TableColumn:
    """A column of a table in the terminal."""

    heading: str
    from_width: int = 0
    """Characters per line from which on the terminal has room for it."""


@dataclass(frozen=True)
class Chart:
    """A chart of the live page, by tokens trained, one curve per SAE."""

    title: str
    caption: str
    is_log: bool = False
    tick_format: str = ""
    """Format of the axis in d3's notation; empty for Plotly's choice."""


@dataclass(frozen=True)
class Curve:
    """A curve per SAE in a panel of the Grafana dashboard `training`."""

    panel: str
    """Title of the panel."""
    legend: str = ""
    """Text behind the name of the SAE."""


@dataclass(frozen=True)
class Measure:
    """One number of an SAE, or one for each value of `label`. It is shown where the fields below `help` say so.

    On the live page, everything that was measured on held-out text is listed.
    """

    name: str
    """Its key in evaluation.json or, in training, in the lines of metrics.jsonl and in manifest.json."""
    stage: Stage
    title: str
    """Name in tables for people."""
    format: str
    """Format specification for `format(value, …)`."""
    unit: str
    """The unit of the value; a `ratio` is a share of 1."""
    help: str
    """Its meaning, in a sentence."""
    better: Better | None = None
    """None where neither direction is good in itself."""
    label: str | None = None
    """The value is a dictionary, by what this names: `hook`, or `probe`."""
    metric: str | None = None
    """Name of the Prometheus metric."""
    summary_name: str | None = None
    """Its key in summary.json."""
    in_history: bool = False
    """Whether /v1/history has its course."""
    page_heading: str | None = None
    """Heading of a column in the live page's table of SAEs."""
    chart: Chart | None = None
    """On the live page; needs `in_history`."""
    live_column: TableColumn | None = None
    """Its column in the table of `monitor top` and of the demo while a run trains."""
    results_column: TableColumn | None = None
    """Its column in the table of a finished run; needs `summary_name`."""
    curves: tuple[Curve, ...] = ()
    """Its curves in Grafana; need `metric`."""


def _reported(name: str) -> tuple[str, str]:
    """Unit and help text of a number that the trainer reports."""
    metric = next(metric for metric in trainer_metrics.SAE if metric.name == f"sluice_{name}")
    return metric.unit, metric.help


TRAINING, HELD_OUT = Stage.TRAINING, Stage.HELD_OUT
LOWER, HIGHER = Better.LOWER, Better.HIGHER

# fmt: off
MEASURES: list[Measure] = [
    Measure("l0", TRAINING, "L0", ".1f", *_reported("l0"), LOWER,
            metric="sluice_l0", summary_name="l0", in_history=True, page_heading="L0", live_column=TableColumn("L0"),
            chart=Chart("L0", "latents active on an activation"), curves=(Curve("L0 by tokens"),)),
    Measure("fvu", TRAINING, "FVU", ".4f", *_reported("fvu"), LOWER,
            metric="sluice_fvu", summary_name="fvu", in_history=True, page_heading="FVU",
            live_column=TableColumn("FVU"),
            chart=Chart("FVU", "variance left unexplained", is_log=True, tick_format=".2~g"),
            curves=(Curve("FVU by tokens"), Curve("FVU"))),
    Measure("mse", TRAINING, "MSE", ".4g", *_reported("mse"), LOWER,
            metric="sluice_mse", summary_name="mse", curves=(Curve("MSE"),)),
    Measure("dead_latents", TRAINING, "dead latents", ",", *_reported("dead_latents"), LOWER,
            metric="sluice_dead_latents", summary_name="dead_latents",
            curves=(Curve("Dead and dense latents", "dead"),)),
    Measure("dead_latents_ratio", TRAINING, "dead latents, share", ".2%", *_reported("dead_latents_ratio"), LOWER,
            metric="sluice_dead_latents_ratio", summary_name="dead_latents_ratio", in_history=True,
            page_heading="dead", live_column=TableColumn("dead", 49), results_column=TableColumn("dead", 54),
            chart=Chart("Dead latents", "silent for dead_tokens", tick_format=".2~p")),
    Measure("shrinkage", TRAINING, "shrinkage", ".3f", *_reported("shrinkage"),
            metric="sluice_shrinkage", summary_name="shrinkage", in_history=True, page_heading="shrinkage",
            live_column=TableColumn("shrink", 67), results_column=TableColumn("shrink", 71),
            curves=(Curve("Shrinkage"),)),
    Measure("learning_rate", TRAINING, "learning rate", ".1e", *_reported("learning_rate"),
            metric="sluice_learning_rate", in_history=True, live_column=TableColumn("rate", 76),
            curves=(Curve("Learning rate"),)),
    Measure("grad_norm", TRAINING, "gradient norm", ".4g", *_reported("grad_norm"),
            metric="sluice_grad_norm", in_history=True, curves=(Curve("Gradient norm"),)),

    Measure("l0", HELD_OUT, "L0", ".1f", "latents",
            "Mean number of latents active on a held-out activation.", LOWER,
            metric="sluice_evaluation_l0", summary_name="held_out_l0", in_history=True,
            results_column=TableColumn("L0")),
    Measure("fvu", HELD_OUT, "FVU", ".4f", "ratio",
            "Fraction of variance unexplained on held-out activations: 0 is perfect.", LOWER,
            metric="sluice_evaluation_fvu", summary_name="held_out_fvu", in_history=True,
            page_heading="held-out FVU", results_column=TableColumn("FVU"), curves=(Curve("FVU", "held out"),)),
    Measure("fvu_typical", HELD_OUT, "FVU without heavy activations", ".4f", "ratio",
            "Fraction of variance unexplained on held-out activations whose norm is at most 3 times the median, about "
            "their own mean. Where it is far above the FVU of all, a few heavy activations flatter that.", LOWER,
            metric="sluice_evaluation_fvu_typical", summary_name="held_out_fvu_typical", in_history=True,
            page_heading="FVU, typical", results_column=TableColumn("typical", 88),
            curves=(Curve("FVU", "held out, typical"),)),
    Measure("fvu_per_activation", HELD_OUT, "FVU, mean over activations", ".4f", "ratio",
            "Mean over held-out activations of the share of each one's squared distance from the mean that is "
            "unexplained: each counts once, whatever its norm.", LOWER,
            metric="sluice_evaluation_fvu_per_activation", summary_name="held_out_fvu_per_activation"),
    Measure("fvu_by_norm", HELD_OUT, "FVU by norm / median", ".4f", "ratio",
            "Fraction of variance unexplained in bands of the norm, in multiples of its median.", LOWER,
            label="norm", summary_name="held_out_fvu_by_norm"),
    Measure("activations_by_norm", HELD_OUT, "activations by norm / median", ".2%", "ratio",
            "Share of the held-out activations in each of these bands.",
            label="norm", summary_name="held_out_activations_by_norm"),
    Measure("variance_by_norm", HELD_OUT, "variance by norm / median", ".2%", "ratio",
            "Share of the variance that the activations of each of these bands hold.",
            label="norm", summary_name="held_out_variance_by_norm"),
    Measure("fvu_by_hook", HELD_OUT, "FVU by hook", ".4f", "ratio",
            "Fraction of variance unexplained at each hook that a crosscoder writes.", LOWER,
            label="hook", summary_name="held_out_fvu_by_hook"),
    Measure("ce_delta", HELD_OUT, "ΔCE", ".4f", "nats per token",
            "Cross-entropy that the language model loses by reading x_hat for x, in nats per token: the primary "
            "number.", LOWER,
            metric="sluice_ce_delta", summary_name="ce_delta", in_history=True, page_heading="ΔCE",
            live_column=TableColumn("ΔCE", 40), results_column=TableColumn("ΔCE"),
            chart=Chart("ΔCE", "nats per token, on held-out text"), curves=(Curve("ΔCE by tokens"),)),
    Measure("ce_delta_by_corpus", HELD_OUT, "ΔCE by corpus", ".4f", "nats per token",
            "Cross-entropy lost by reading x_hat for x, on the text of each corpus of a mixture.", LOWER,
            label="corpus", summary_name="ce_delta_by_corpus"),
    Measure("fvu_by_corpus", HELD_OUT, "FVU by corpus", ".4f", "ratio",
            "Fraction of variance unexplained on the text of each corpus of a mixture.", LOWER,
            label="corpus", summary_name="held_out_fvu_by_corpus"),
    Measure("l0_by_corpus", HELD_OUT, "L0 by corpus", ".1f", "latents",
            "Mean number of latents active on an activation of each corpus of a mixture.", LOWER,
            label="corpus", summary_name="held_out_l0_by_corpus"),
    Measure("ce_recovered", HELD_OUT, "CE recovered, against zero ablation", ".4f", "ratio",
            "Share of the cross-entropy lost to zero ablation that the SAE recovers: 1 is no loss at all.", HIGHER,
            metric="sluice_ce_recovered", summary_name="ce_recovered", in_history=True, page_heading="CE recovered",
            live_column=TableColumn("CE rec.", 58), results_column=TableColumn("CE recov.", 48),
            curves=(Curve("Held out", "CE recovered"),)),
    Measure("ce_recovered_mean_ablation", HELD_OUT, "CE recovered, against mean ablation", ".4f", "ratio",
            "Share of the cross-entropy lost to mean ablation that the SAE recovers; the stricter of the two.", HIGHER,
            metric="sluice_ce_recovered_mean_ablation", summary_name="ce_recovered_mean_ablation",
            curves=(Curve("Held out", "CE recovered, mean ablation"),)),
    Measure("kl", HELD_OUT, "KL(clean ‖ SAE)", ".4f", "nats per token",
            "KL(P_clean ‖ P_sae) of the language model's predictions, in nats per token.", LOWER,
            metric="sluice_kl", summary_name="kl", in_history=True, page_heading="KL",
            results_column=TableColumn("KL", 79), curves=(Curve("Held out", "KL"),)),
    Measure("ce_clean", HELD_OUT, "CE of the model alone", ".4f", "nats per token",
            "Cross-entropy of the untouched language model, in nats per token.",
            metric="sluice_ce_clean", summary_name="ce_clean"),
    Measure("ce_sae", HELD_OUT, "CE with the reconstruction", ".4f", "nats per token",
            "Cross-entropy of the language model that reads x_hat, in nats per token.", LOWER,
            metric="sluice_ce_sae", summary_name="ce_sae"),
    Measure("ce_zero", HELD_OUT, "CE with zero ablation", ".4f", "nats per token",
            "Cross-entropy of the language model that reads zeros in place of x."),
    Measure("ce_mean_ablation", HELD_OUT, "CE with mean ablation", ".4f", "nats per token",
            "Cross-entropy of the language model that reads the mean in place of every x."),
    Measure("cosine", HELD_OUT, "cosine of x and x_hat", ".4f", "ratio",
            "Mean cosine of the activation that the SAE should reconstruct and its reconstruction, on held-out text: "
            "1 is the same direction.",
            HIGHER, metric="sluice_evaluation_cosine", summary_name="cosine", curves=(Curve("Held out", "cosine"),)),
    Measure("norm_ratio", HELD_OUT, "‖x_hat‖ / ‖x‖", ".3f", "ratio",
            "Mean ratio of the norm of the reconstruction to that of the activation, on held-out text."),
    Measure("shrinkage", HELD_OUT, "shrinkage", ".3f", "ratio",
            "E|x_hat|² / E[x·x_hat] about the mean of x on held-out text: 1 is unbiased, less is suppressed.",
            metric="sluice_evaluation_shrinkage", summary_name="held_out_shrinkage",
            curves=(Curve("Shrinkage", "held out"),)),
    Measure("dense_latents", HELD_OUT, "dense latents", ",", "latents",
            "Latents that fire on more than a tenth of the held-out activations.", LOWER,
            metric="sluice_evaluation_dense_latents", summary_name="held_out_dense_latents",
            curves=(Curve("Dead and dense latents", "dense"),)),
    Measure("dead_latents", HELD_OUT, "silent latents", ",", "latents",
            "Latents that fire on no held-out activation; rare ones are among them.", LOWER,
            metric="sluice_evaluation_dead_latents", summary_name="held_out_dead_latents"),
    Measure("explanation_f1", HELD_OUT, "F1 of n-grams", ".3f", "ratio",
            "Mean F1 with which an n-gram predicts where a latent fires, on other text than it was found on; "
            "1 is perfect.",
            HIGHER, metric="sluice_explanation_f1", summary_name="explanation_f1"),
    Measure("ablation_effects", HELD_OUT, "effects of ablation", ",.0f", "logits",
            "Effective number of the next logits that ablating one latent changes, mean over latents.", LOWER),
    Measure("ablation_effects_ratio", HELD_OUT, "effects of ablation, share of logits", ".2%", "ratio",
            "Effective share of the next logits that ablating one latent changes, mean over latents; less is sparser.",
            LOWER, metric="sluice_ablation_effects_ratio", summary_name="ablation_effects_ratio"),
    Measure("probe_accuracy", HELD_OUT, "probe accuracy by k", ".1%", "ratio",
            "Held-out accuracy of a probe on k latents, or on all activations (dense); 0.5 is chance.", HIGHER,
            label="probe", metric="sluice_probe_accuracy", summary_name="probe_accuracy"),
]
# fmt: on
"""All measures, in the order in which tables show them."""


def measures(stage: Stage) -> list[Measure]:
    """The measures that are taken in training, or on held-out text."""
    return [measure for measure in MEASURES if measure.stage is stage]


def get(name: str, stage: Stage) -> Measure:
    """The measure of this name. Raises KeyError."""
    for measure in measures(stage):
        if measure.name == name:
            return measure
    raise KeyError(name)


def as_markdown() -> str:
    """docs/measures.md."""
    lines = [
        "# Measures of an SAE",
        "",
        "Written by `monitor/evaluation/measures.py`. Formulas and sources stand at the head of",
        "[evaluator.py](../monitor/evaluation/evaluator.py), [ablation.py](../monitor/evaluation/ablation.py),",
        "[probing.py](../monitor/evaluation/probing.py) and",
        "[explanation.py](../monitor/evaluation/latents/explanation.py).",
    ]
    headings = {
        Stage.TRAINING: "In training, over recent tokens: metrics.jsonl, manifest.json, summary.json",
        Stage.HELD_OUT: "Of a snapshot, on held-out text: evaluation.json",
    }
    for stage, heading in headings.items():
        lines += ["", f"## {heading}", "", "| key | unit | better | metric | in summary.json | meaning |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| `{measure.name}` | {measure.unit} | {measure.better.value if measure.better else '–'} "
            f"| {_code(measure.metric)} | {_code(measure.summary_name)} | {measure.help.replace('|', '&#124;')} |"
            for measure in measures(stage)
        ]
    return "\n".join(lines) + "\n"


def _code(name: str | None) -> str:
    return f"`{name}`" if name else "–"


if __name__ == "__main__":
    print(as_markdown(), end="")
