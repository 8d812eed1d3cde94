"""The page for people: one run and its snapshots, as plain HTML without scripts. A pure function of what was read.

Everything that comes from files is escaped; a number that is not known is shown as a dash, never as zero.
"""

from __future__ import annotations

from html import escape
from typing import Any
from urllib.parse import quote

from monitor.run_directory import wiring

SILENT_SECONDS = 120.0
"""A report older than this tells how it was, not how it is."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2321; --dim: #66706c; --line: #dfe3e0; --paper: #fbfbf9; --gold: #9a6b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9e7; --dim: #98a29d; --line: #343b38; --paper: #161a18; --gold: #e0b04a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2.25rem 0 .5rem; }
p { margin: .35rem 0; } a { color: var(--gold); }
.dim { color: var(--dim); } .state { color: var(--gold); font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem .4rem 0; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 500; color: var(--dim); } .long { white-space: normal; min-width: 16rem; }
.n { text-align: right; padding-right: 1.25rem; }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre { padding: .75rem 1rem; border: 1px solid var(--line); border-radius: 6px; overflow-x: auto; }
summary { cursor: pointer; color: var(--dim); } ul { margin: .25rem 0; padding-left: 1.1rem; }
"""


def run_page(run: dict[str, Any], snapshots: list[dict[str, Any]], base_url: str) -> str:
    """The whole page, from what /v1/run and /v1/snapshots answer; `base_url` is the address it was asked at."""
    refresh = "" if run["state"] == "finished" else '<meta http-equiv="refresh" content="30">'
    newest = snapshots[-1] if snapshots else None
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}<title>{escape(run["directory"])} · Sluice</title><style>{STYLE}</style></head><body>
<h1>{escape(run["directory"])}</h1>
{_headline(run)}
<h2>Sparse autoencoders</h2>
{_saes(run, newest)}
<h2>Snapshots</h2>
{_snapshots(snapshots)}
<h2>Take one with you</h2>
<pre>python -m monitor pull {escape(base_url.rstrip("/"))}</pre>
<p class="dim">It fetches the newest snapshot and checks every file; SAELens loads it with nothing of Sluice installed.
For programs: <a href="/v1/run">run</a>, <a href="/v1/snapshots">snapshots</a>,
<a href="/v1/snapshots/latest">latest</a>, <a href="/metrics">metrics</a>, <a href="/readyz">ready</a>.</p>
</body></html>
"""


def _headline(run: dict[str, Any]) -> str:
    settings, report = run["settings"] or {}, run["report"] or {}
    model = settings.get("model", {})
    facts = [f'<span class="state">{escape(run["state"])}</span>']
    silent = (run["silent_seconds"] or 0.0) if run["state"] == "running" else 0.0
    is_silent = silent > SILENT_SECONDS
    if run["state"] == "running" and report.get("state") and not is_silent:
        facts.append(escape(report["state"]))
    tokens = (run["summary"] or {}).get("tokens") if run["state"] == "finished" else report.get("tokens")
    if tokens is not None:
        target = report.get("target_tokens") if run["state"] == "running" else None
        facts.append(f"{tokens:,} tokens trained" + (f" of {target:,}" if target else ""))
    if is_silent:
        facts.append(f"nothing heard for {silent / 60:,.0f} min: the trainer is stopped, or waits for producers")
    elif run["state"] == "running" and report.get("tokens_per_second"):
        facts.append(f"{report['tokens_per_second']:,.0f} tokens/s")
    source = f"{model['name']} at {', '.join(model.get('hooks', []))}" if model.get("name") else ""
    return f"<p>{' · '.join(facts)}</p><p>{escape(source)}</p>"


def _saes(run: dict[str, Any], newest: dict[str, Any] | None) -> str:
    """The SAEs of the newest snapshot: as it was published, and as the language model found it."""
    if newest is None:
        return '<p class="dim">None published yet.</p>'
    rows = [_sae_row(name, sae["metrics"] or {}, sae["evaluation"] or {}) for name, sae in newest["saes"].items()]
    words, numbers = (
        ("name", "architecture", "reads → writes"),
        ("latents", "L0", "FVU", "dead latents", "ΔCE", "CE recovered", "KL", "held-out FVU"),
    )
    head = "".join(f"<th>{title}</th>" for title in words) + "".join(f"<th class=n>{title}</th>" for title in numbers)
    return f"""<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>
<p class="dim">Of snapshot {escape(newest["name"])}. FVU is the variance left unexplained, 0 is perfect. ΔCE is what
the language model loses by reading the reconstruction, KL how far its predictions move, both in nats per token; CE
recovered is against zero ablation; of a transcoder all of them are about the hook it writes, of a crosscoder about all
its hooks at once. NAME-ema is the mean of an SAE's recent weights: what is counted in training is not counted for it.
A dash: not known (yet).</p>"""


def _sae_row(name: str, metrics: dict[str, Any], evaluation: dict[str, Any]) -> str:
    cells = [
        _number(metrics.get("d_sae"), ","),
        _number(metrics.get("l0"), ".1f"),
        _number(metrics.get("fvu"), ".4f"),
        _number(metrics.get("dead_latents_ratio"), ".1%"),
        _number(evaluation.get("ce_delta"), "+.4f"),
        _number(evaluation.get("ce_recovered"), ".2%"),
        _number(evaluation.get("kl"), ".4f"),
        _number(evaluation.get("fvu"), ".4f"),
    ]
    what = f"<td>{escape(metrics.get('architecture') or '–')}</td><td class=long>{escape(wiring(metrics) or '–')}</td>"
    return f"<tr><td>{escape(name)}</td>{what}{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"


def _snapshots(snapshots: list[dict[str, Any]]) -> str:
    if not snapshots:
        return '<p class="dim">None published yet.</p>'
    rows = "".join(_snapshot_row(entry) for entry in reversed(snapshots))
    return f"""<div class="scroll"><table>
<tr><th>name</th><th class=n>tokens</th><th>published</th><th class=n>size</th>
<th>evaluated</th><th>files</th></tr>{rows}</table></div>"""


def _snapshot_row(entry: dict[str, Any]) -> str:
    address = f"/v1/snapshots/{entry['name']}"
    evaluated = [f"{sae}/evaluation.json" for sae, told in entry["saes"].items() if told["evaluation"]]
    links = "".join(
        f'<li><a href="{address}/{quote(path)}">{escape(path)}</a></li>' for path in [*entry["files"], *evaluated]
    )
    return (
        f'<tr><td><a href="{address}/manifest.json">{escape(entry["name"])}</a></td>'
        f"<td class=n>{entry['tokens']:,}</td>"
        f"<td>{escape(entry['created'])}</td><td class=n>{_size(entry['bytes'])}</td>"
        f"<td>{len(evaluated)} of {len(entry['saes'])}</td>"
        f"<td><details><summary>{len(entry['files']) + len(evaluated)}</summary><ul>{links}</ul></details></td></tr>"
    )


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "–"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"
