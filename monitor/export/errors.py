"""Errors of an export."""

from __future__ import annotations

from producer.common.installation import DISTRIBUTION


class ExportError(Exception):
    """What was asked for cannot be exported; `str(error)` says why, and what to do."""


def missing_extra(subject: str, package: str, extra: str) -> ExportError:
    """The error for a library that is not installed."""
    return ExportError(f'{subject} needs {package}, which is not installed: pip install "{DISTRIBUTION}[{extra}]"')
