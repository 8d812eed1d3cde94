"""A log that nobody outside can forge or flood."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from producer.common.logs import BURST, TEXT_LENGTH, WINDOW_SECONDS, LineFormatter, OutsideLog, escape

ROOT = Path(__file__).parent.parent
FORGERY = "eve\n12:00:00 trainer INFO all is well\r\x1b[2K\u202e\x00\x9b1m\u2028"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def outside_log() -> tuple[OutsideLog, io.StringIO, Clock]:
    """A log of its own, what it has written, and its clock."""
    log, output, clock = logging.Logger("test"), io.StringIO(), Clock()
    handler = logging.StreamHandler(output)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    return OutsideLog(log, clock), output, clock


def test_what_does_not_print_is_written_as_its_escape() -> None:
    """Line ends, escape sequences, marks of direction and halves of characters; letters of any script stay."""
    assert escape(FORGERY) == (
        r"eve\n12:00:00 trainer INFO all is well\r\x1b[2K\u202e\x00\x9b1m\u2028"
    )  # fmt: skip
    assert escape("Zoë 模型 Привет -/_.%") == "Zoë 模型 Привет -/_.%"
    assert escape("\ud800") == r"\ud800"


def test_a_name_is_one_line_and_has_a_length() -> None:
    outside, output, _ = outside_log()
    outside.warning("producer %s, %d at work", FORGERY, 3)
    outside.warning("producer %s", "x" * 5000)

    first, second = output.getvalue().splitlines()
    assert first == f"WARNING producer {escape(FORGERY)}, 3 at work"
    assert len(second) < TEXT_LENGTH + 40


def test_no_record_can_look_like_two() -> None:
    """Also one that does not come through OutsideLog: further lines are indented, as are those of a traceback."""
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    log.error("%s", FORGERY)
    try:
        raise ValueError(FORGERY)
    except ValueError:
        log.exception("failed")

    lines = output.getvalue().split("\n")
    assert [line for line in lines if line[:1].strip()] == ["ERROR eve", "ERROR failed"]
    assert all(line.isprintable() for line in lines)


def test_lines_of_a_kind_are_counted_once_there_are_many() -> None:
    """A thousand in a minute: five, and one that counts the others; another kind is not touched by it."""
    outside, output, clock = outside_log()
    for number in range(1000):
        outside.info("refused %d", number)
    outside.info("another")
    outside.flush()
    assert output.getvalue().splitlines() == [*(f"INFO refused {number}" for number in range(BURST)), "INFO another"]

    clock.now = WINDOW_SECONDS
    outside.flush()
    assert output.getvalue().splitlines()[BURST + 1 :] == ["INFO refused 999 (the last of 995 more like it in 60 s)"]
    outside.info("refused %d", 1000)
    outside.flush(everything=True)
    assert output.getvalue().splitlines()[BURST + 2 :] == ["INFO refused 1000"]


def test_the_next_line_counts_what_came_before_it() -> None:
    """Where nobody calls flush, the count is written when the kind comes up again."""
    outside, output, clock = outside_log()
    for number in range(BURST + 2):
        outside.info("refused %d", number)
    clock.now = 2 * WINDOW_SECONDS
    outside.info("refused %d", 99)

    assert output.getvalue().splitlines()[BURST:] == [
        f"INFO refused {BURST + 1} (the last of 2 more like it in 120 s)",
        "INFO refused 99",
    ]


def test_threads_share_it() -> None:
    """Exactly the burst is written, whoever is first."""
    outside, output, _ = outside_log()
    threads = [threading.Thread(target=lambda: [outside.info("x") for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert output.getvalue().count("INFO x\n") == BURST


@pytest.mark.parametrize("process", ["producer", "trainer", "monitor"])
def test_every_process_writes_its_log_so(process: str) -> None:
    assert f'set_up("{process}")' in (ROOT / process / "__main__.py").read_text()
    code = (
        f"import logging; from producer.common.logs import set_up; set_up('{process}'); logging.warning('a\\nb\\x1b')"
    )
    log = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stderr

    assert log.split(" ", 1)[1] == f"{process} WARNING a\n    b\\x1b\n"
