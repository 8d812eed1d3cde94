"""Explains latents of a run that a monitor shows: one JSON line each."""

from __future__ import annotations

import argparse
import json
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import asdict

from monitor.cli.client import Monitor
from monitor.cli.errors import MonitorError, UsageError
from monitor.interpretation.endpoint import Endpoint, EndpointError
from monitor.interpretation.prompts import Example
from monitor.interpretation.scoring import Interpretation, interpret


def run(options: argparse.Namespace, latents: Sequence[int], key: str | None) -> int:
    """`python -m monitor explain` with these arguments; returns the exit code."""
    explainer = Endpoint(options.endpoint, options.model, key)
    scorer = Endpoint(options.endpoint, options.scorer or options.model, key)
    failed = False
    try:
        monitor = Monitor(options.url, options.token)
        for latent in latents:
            address = f"/v1/latents/{urllib.parse.quote(options.sae)}/{latent}/examples"
            try:
                examples = monitor.read(address) or {}
                firing, silent = (list(map(Example.from_json, examples[kind])) for kind in ("firing", "silent"))
                answer = interpret(explainer, scorer, firing, silent)
            except ValueError as error:
                print(f"{options.sae} {latent}: {error}", file=sys.stderr)
                failed = True
                continue
            line = {"sae": options.sae, "latent": latent, "snapshot": examples["snapshot"], **asdict(answer)}
            print(json.dumps({**line, "model": options.model, "scorer": scorer.model}, ensure_ascii=False), flush=True)
            if options.save:
                monitor.write_note(
                    options.sae, latent, {"label": answer.explanation, "note": _note(answer, options.model)}
                )
    except (MonitorError, ConnectionError, EndpointError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 1
    return int(failed)


def _note(answer: Interpretation, model: str) -> str:
    detection, fuzzing = ("-" if score is None else f"{score:.2f}" for score in (answer.detection, answer.fuzzing))
    return f"explained by {model}; detection {detection}, fuzzing {fuzzing} (0.5 is chance)"
