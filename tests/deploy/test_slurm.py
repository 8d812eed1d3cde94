"""The batch scripts under a real Slurm: two nodes that are both this machine.

Needs root and Debian's slurmctld, slurmd, slurm-client and munge; run by `make slurm`. What is changed in the scripts
are the sizes that they ask for.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.synthetic_run import RUN_FILE, free_ports

SCRIPTS = Path(__file__).parents[2] / "deploy" / "slurm"
BIN = Path(sys.executable).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue")
PATH = f"{BIN}:{os.environ['PATH']}:/usr/sbin:/sbin"

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        any(shutil.which(program, path=PATH) is None for program in PROGRAMS) or os.geteuid() != 0,
        reason="needs root, and apt-get install slurmctld slurmd slurm-client munge",
    ),
]

CONFIGURATION = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def wait_until(holds: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


class Cluster:
    """Two nodes and a controller, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for name in ("state", "spool-n1", "spool-n2"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        configuration = CONFIGURATION.format(host=socket.gethostname(), ports=free_ports(3), folder=self.folder)
        (self.folder / "slurm.conf").write_text(configuration)
        options = {
            "socket": "munge.socket",
            "key-file": "munge.key",
            "pid-file": "munge.pid",
            "seed-file": "munge.seed",
        }
        munge = [f"--{name}={self.folder / file}" for name, file in options.items()]
        self._start("munged", "--foreground", "--force", f"--log-file={self.folder}/munge.log", *munge)
        wait_until((self.folder / "munge.socket").exists, 60, "munged has made no socket")
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%T").split() == ["idle"], 60, "the nodes are not idle")

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as out:
            self._processes.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def ask(self, *command: str) -> str:
        return self.run(*command).stdout

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\w+)", self.ask("scontrol", "show", "job", job))
        return match[1] if match else "gone"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.ask("scancel", "--user=root")
        cluster.stop()


def smaller(script: str) -> str:
    """The script with sizes that this machine has: no GPU, one processor and little memory for each task."""
    for large, small in (
        (r" --gpus-per-task=1", ""),
        (r"--cpus-per-task=8", "--cpus-per-task=1"),
        (r"--mem-per-cpu=4G", "--mem-per-cpu=1500M"),
        (r"--ntasks=2", "--ntasks=1"),
        (r"--array=0-3", "--array=0-0"),
    ):
        script = script.replace(large, small)
    return script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the scripts, a run file and keys."""
    for path in SCRIPTS.glob("*.sbatch"):
        (tmp_path / path.name).write_text(smaller(path.read_text()))
    (tmp_path / "run.toml").write_text(RUN_FILE)
    subprocess.run([BIN / "sluice-producer", "keys", tmp_path / "keys"], check=True, capture_output=True)
    return tmp_path


def test_a_run_with_more_producers_that_runs_out_of_time(cluster: Cluster, folder: Path) -> None:
    """Trainer and producer as one job, an array joins, the job goes back into the queue with a checkpoint, goes on."""
    port = str(free_ports(1)[0])
    job = cluster.run("sbatch", "--parsable", "sluice.sbatch", "run.toml", cwd=folder, SLUICE_PORT=port).stdout.strip()
    log = folder / f"sluice-{job}.log"
    metrics = folder / "run" / "metrics.jsonl"

    def logged(text: str, times: int = 1) -> Callable[[], bool]:
        return lambda: log.exists() and log.read_text().count(text) >= times

    wait_until(logged("joins (1 at work)"), 120, "no producer has joined")
    wait_until(lambda: metrics.exists() and metrics.read_text(), 60, "nothing is trained")
    array = cluster.run("sbatch", "--parsable", "producers.sbatch", "run.toml", cwd=folder).stdout.strip()
    wait_until(logged("joins (2 at work)"), 90, "the array's producer has not joined")

    cluster.ask("scancel", "--signal=USR1", "--batch", job)  # as Slurm does, 360 s before the end of its time
    wait_until(lambda: cluster.state(job) == "PENDING", 120, "the job is not in the queue again")
    assert "the trainer ended with exit code 0" in log.read_text()
    assert list((folder / "run" / "checkpoint").iterdir())
    reports = len(metrics.read_text().splitlines())

    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_until(lambda: cluster.state(job) == "RUNNING", 90, "the job does not start again")
    wait_until(lambda: len(metrics.read_text().splitlines()) > reports + 1, 120, "the trainer does not go on")
    cluster.ask("scancel", "--signal=TERM", "--batch", job)
    wait_until(lambda: cluster.state(job) in ("COMPLETED", "gone"), 120, "the job has not stopped")
    assert log.read_text().count("the trainer ended with exit code 0") == 2
    cluster.ask("scancel", array)


def test_without_keys_it_ends_at_once(cluster: Cluster, folder: Path) -> None:
    shutil.rmtree(folder / "keys")
    job = cluster.run("sbatch", "--parsable", "sluice.sbatch", "run.toml", cwd=folder).stdout.strip()
    wait_until(lambda: cluster.state(job) == "FAILED", 60, "it goes on without keys")
    assert "there are no keys in ./keys" in (folder / f"sluice-{job}.log").read_text()


@pytest.mark.parametrize("name", [path.name for path in SCRIPTS.glob("*.sbatch")])
def test_a_typo_in_a_directive_is_refused(cluster: Cluster, folder: Path, name: str) -> None:
    """Each option of each line in turn; and the script as it is, is accepted."""
    script = (folder / name).read_text()
    assert cluster.run("sbatch", "--test-only", name, "run.toml", cwd=folder).returncode == 0
    lines = script.splitlines()
    typos = 0
    for number, line in enumerate(lines):
        for option in re.finditer("--[a-z-]+", line) if line.startswith("#SBATCH") else ():
            typo = [*lines[:number], f"{line[: option.end()]}x{line[option.end() :]}", *lines[number + 1 :]]
            (folder / "typo.sbatch").write_text("\n".join(typo))
            process = cluster.run("sbatch", "--test-only", "typo.sbatch", "run.toml", cwd=folder)
            assert process.returncode != 0, typo[number]
            typos += 1
    assert typos > 5
