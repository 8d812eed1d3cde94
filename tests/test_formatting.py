"""Sizes, counts and durations as people read them."""

from __future__ import annotations

import pytest

from producer.common.formatting import format_bytes, format_count, format_duration


def test_three_digits_and_a_prefix():
    """What rounds to a thousand has the next prefix; the largest prefix holds all that is larger."""
    counts = (0, 52, 999, 999.9, 131_072, 1_800_000, 5.4e16)
    assert [format_count(count) for count in counts] == ["0", "52", "999", "1 k", "131 k", "1.8 M", "54,000 T"]
    sizes = (0, 12, 999.7, 1_540_000, 141e9, 2.5e12)
    assert [format_bytes(size) for size in sizes] == ["0 B", "12 B", "1 kB", "1.54 MB", "141 GB", "2.5 TB"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (86_400, "24.0 h"), (14 * 86_400, "14.0 days")],
)
def test_durations_from_seconds_to_weeks(seconds: float, text: str):
    assert format_duration(seconds) == text
