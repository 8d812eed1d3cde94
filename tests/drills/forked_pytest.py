"""pytest, again and again, in forks of one process that has the libraries loaded: each run is spared their import.

    python -P tests/drills/forked_pytest.py     # a request in JSON a line; answers each with an exit code, or "hangs"

Nothing of Sluice is loaded before the fork: what a run imports is what lies in its `tree`.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress

LIBRARIES = ("numpy", "torch", "numba", "transformers", "safetensors.torch", "zmq", "pydantic", "pytest",
             "hypothesis", "starlette.testclient", "uvicorn", "prometheus_client", "plotly.graph_objects")  # fmt: skip
WITHOUT_REAPING = os.WEXITED | os.WNOHANG | os.WNOWAIT


def main() -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    for line in sys.stdin:
        print(run(**json.loads(line)), flush=True)


def run(tree: str, arguments: list[str], log: str, seconds: float) -> int | str:
    """pytest's exit code for these arguments in the folder `tree`, or −N for signal N; "hangs" after `seconds`."""
    child = os.fork()
    if not child:
        _become_pytest(tree, arguments, log)
    deadline = time.monotonic() + seconds
    while (in_time := time.monotonic() < deadline) and os.waitid(os.P_PID, child, WITHOUT_REAPING) is None:
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and whatever the tests started
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if in_time else "hangs"


def _become_pytest(tree: str, arguments: list[str], log: str) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(tree)
    sys.path.insert(0, tree)
    os.environ |= {"PYTHONPATH": tree, "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    try:
        os._exit(int(sys.modules["pytest"].main(arguments)))
    finally:
        os._exit(70)


if __name__ == "__main__":
    main()
