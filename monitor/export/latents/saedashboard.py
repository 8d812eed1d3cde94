"""Latents in SAEDashboard's two formats.

    sae_vis_data   what `SaeVisData.load_json` reads and `save_feature_centric_vis` draws; tokens are ids
    batch          what SAEDashboard writes for Neuronpedia's importer, `NeuronpediaDashboardBatch`; tokens are texts

Correlations of latents, and the effects of single sequences on the loss, are not measured here: their lists are empty.
SAEDashboard reads intervals and density out of titles, which are therefore written as it writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from monitor.evaluation.latents.views import Histogram
from monitor.export.latents.dashboards import Dashboard, SequenceGroup
from monitor.export.latents.neuronpedia import DIGITS, NeuronpediaSource

TICKS = 5

Document = dict[str, Any]


def sae_vis_data(dashboards: Sequence[Dashboard]) -> Document:
    """The document that `SaeVisData.load_json` reads."""
    return {
        "feature_data_dict": {str(one.index): _feature_data(one) for one in dashboards},
        "feature_stats": {
            "max": [max(0.0, one.strongest) for one in dashboards],
            "frac_nonzero": [one.density for one in dashboards],
            "skew": [],
            "kurtosis": [],
            "quantile_data": [],
            "quantiles": [],
        },
    }


def _feature_data(dashboard: Dashboard) -> Document:
    logits = dashboard.logits
    promoted, suppressed = ([], []) if logits is None else (logits.promoted, logits.suppressed)
    return {
        "feature_tables_data": {
            "neuron_alignment_indices": [index for index, _, _ in dashboard.aligned],
            "neuron_alignment_values": [value for _, value, _ in dashboard.aligned],
            "neuron_alignment_l1": [share for _, _, share in dashboard.aligned],
        },
        "acts_histogram_data": _histogram(dashboard.activations, f"ACTIVATIONS<br>DENSITY = {dashboard.density:.3%}"),
        "logits_table_data": {
            "top_token_ids": [one.id for one in promoted],
            "top_logits": [one.effect for one in promoted],
            "bottom_token_ids": [one.id for one in suppressed],
            "bottom_logits": [one.effect for one in suppressed],
        },
        "logits_histogram_data": _histogram(None if logits is None else logits.histogram, None),
        "sequence_data": {"seq_group_data": [_group(group, dashboard) for group in dashboard.groups]},
        "dfa_data": None,
        "decoder_weights_data": None,
    }


def _histogram(histogram: Histogram | None, title: str | None) -> Document:
    if histogram is None or not histogram.counts:
        return {"bar_heights": [], "bar_values": [], "tick_vals": [], "title": title}
    edges = histogram.edges
    step = (edges[-1] - edges[0]) / (TICKS - 1)
    return {
        "bar_heights": histogram.counts,
        "bar_values": [round((low + high) / 2, 5) for low, high in pairwise(edges)],
        "tick_vals": [round(edges[0] + tick * step, 2) for tick in range(TICKS)],
        "title": title,
    }


def _group(group: SequenceGroup, dashboard: Dashboard) -> Document:
    if group.share is None:
        title = f"TOP ACTIVATIONS<br>MAX = {group.high:.3f}"
    else:
        title = f"INTERVAL {group.low:.3f} - {group.high:.3f}<br>CONTAINS {group.share:.3%}"
    by_token = None if dashboard.logits is None else dashboard.logits.by_token
    return {
        "title": title,
        "seq_data": [
            {
                "original_index": sequence.window,
                "qualifying_token_index": sequence.at,
                "token_ids": sequence.ids,
                "feat_acts": [round(value, DIGITS) for value in sequence.values],
                "token_logits": [
                    0.0 if by_token is None else round(float(by_token[token]), DIGITS) for token in sequence.ids
                ],
            }
            for sequence in group.sequences
        ],
    }


def batch(
    source: NeuronpediaSource, dashboards: Sequence[Dashboard], text_name: str, windows: tuple[int, int]
) -> Document:
    """The document of `NeuronpediaDashboardBatch`. `windows` are the number and the length of those looked at."""
    return {
        "model_id": source.model_id,
        "layer": source.layer,
        "sae_set": source.set_name,
        "sae_id_suffix": None,
        "features": [
            _batch_feature(one)
            | {"n_prompts_total": windows[0], "n_tokens_in_prompt": windows[1], "dataset": text_name}
            for one in dashboards
        ],
    }


def _batch_feature(dashboard: Dashboard) -> Document:
    logits = dashboard.logits
    promoted, suppressed = ([], []) if logits is None else (logits.promoted, logits.suppressed)
    activations = _histogram(dashboard.activations, None)
    effects = _histogram(None if logits is None else logits.histogram, None)
    return {
        "feature_index": dashboard.index,
        "neuron_alignment_indices": [index for index, _, _ in dashboard.aligned],
        "neuron_alignment_values": [round(value, DIGITS) for _, value, _ in dashboard.aligned],
        "neuron_alignment_l1": [round(share, DIGITS) for _, _, share in dashboard.aligned],
        "neg_str": [one.token for one in suppressed],
        "neg_values": [round(one.effect, DIGITS) for one in suppressed],
        "pos_str": [one.token for one in promoted],
        "pos_values": [round(one.effect, DIGITS) for one in promoted],
        "frac_nonzero": dashboard.density,
        "freq_hist_data_bar_values": activations["bar_values"],
        "freq_hist_data_bar_heights": activations["bar_heights"],
        "logits_hist_data_bar_values": effects["bar_values"],
        "logits_hist_data_bar_heights": effects["bar_heights"],
        "activations": [
            {
                "bin_min": -1.0 if group.share is None else group.low,
                "bin_max": group.high,
                "bin_contains": -1.0 if group.share is None else group.share,
                "tokens": sequence.tokens,
                "values": [round(value, DIGITS) for value in sequence.values],
                "qualifying_token_index": sequence.at,
            }
            for group in dashboard.groups
            for sequence in group.sequences
        ],
    }
