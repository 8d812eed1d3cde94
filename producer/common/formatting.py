"""Sizes, counts and durations as people read them: three digits at most, and the unit in which they are few.

Libraries for this write a duration either too coarsely for a table ("an hour") or too long ("1 hour, 31 minutes and 3
seconds").
"""

from __future__ import annotations

SI_PREFIXES = ("", "k", "M", "G", "T")


def format_bytes(size: float) -> str:
    """1_540_000 → `1.54 MB`. Decimal units, as disks, networks and GPUs are sold in."""
    number, prefix = _scale(size)
    return f"{number} {prefix}B"


def format_count(count: float) -> str:
    """1_800_000 → `1.8 M`, 52 → `52`."""
    number, prefix = _scale(count)
    return f"{number} {prefix}".rstrip()


def format_duration(seconds: float) -> str:
    """90 → `90 s`, 600 → `10 min`, 9000 → `2.5 h`, 864_000 → `10.0 days`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def _scale(value: float) -> tuple[str, str]:
    """(digits, SI prefix) of a value, rounded to three digits."""
    prefix, *larger = SI_PREFIXES
    while abs(value) >= 999.5 and larger:
        prefix, *larger = larger
        value /= 1000
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}", prefix
