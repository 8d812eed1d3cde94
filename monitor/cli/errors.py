"""Errors of commands that ask a monitor. A broken connection is a ConnectionError, which another try may mend."""

from __future__ import annotations


class MonitorError(Exception):
    """The monitor did not give what was asked for; `str(error)` says what was wrong and what to do."""


class NotModified(MonitorError):
    """The content is still the one that the tag in If-None-Match names."""


class UsageError(MonitorError):
    """The command line cannot be carried out; exit code 2."""


class Gone(MonitorError):
    """The server does not have it (any more)."""
