"""Run a pipeline with a search of many small trials on eight nodes and an S3 storage, and kill two of the nodes.

    python bench/many_nodes.py [--trials 300] [--nodes 8] [--killed 2] [--seed 0]

Each node is a raylet with one CPU and a disk of its own, which no other sees (a mount namespace, so it takes root). The
storage is on moto's S3 server. The pipeline is that of tests/tiny.yaml, with the CP-ResNet on two workers (DDP) and
trials of one epoch. Nodes are killed when a quarter and a half of the trials have ended. In the end all artifacts must
equal those of a run in a folder on this machine alone, which nothing disturbs. Printed are, of both runs: seconds a
stage, what a teacher and a trial cost beside the seconds of their epochs, how busy the slots were, and the driver's
peak memory.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos import ROOT, content, descendants, environment, kill
from memory import peak_memory
from mlflow.tracking import MlflowClient
from ray._common.network_utils import find_free_port
from ray.util import get_node_ip_address

from asc_ray.artifacts import artifacts_in
from asc_ray.places import node_folder

sys.path.insert(0, str(ROOT / "tests"))
from store import SECRET, Bucket, s3_server

SETTINGS = (
    "teachers.resources_for={cp_resnet: {workers: 2}}",
    "sweep.epochs=1", "sweep.seeds=1", "sweep.scheduler=none", "sweep.sampler=random",
    "cluster.connect_seconds=300",
)  # fmt: skip
PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port")
ISOLATED = ["unshare", "--mount", "bash", "-c", 'mount -t tmpfs none "$1" && shift && exec "$@"', "node"]
FIRST_PORT, PORTS_A_NODE = 20_000, 100  # of the workers


class Nodes:
    """Raylets with disks of their own, and a head without a slot."""

    def __init__(self, folder: Path, count: int) -> None:
        self.disk = folder / "disk"
        self.disk.mkdir()
        self.short = tempfile.mkdtemp()  # for Ray's sockets, whose paths must be short
        self.address = f"{get_node_ip_address()}:{find_free_port()}"
        head = ("--head", "--include-dashboard=false", f"--port={self.address.rpartition(':')[2]}", "--num-cpus=0")
        self.processes: list[subprocess.Popen[str] | None] = []
        try:
            self._add(*head)
            for _ in range(count):
                self._add(f"--address={self.address}", "--num-cpus=1")
        except BaseException:
            self.stop()
            raise

    def start(self, *words: object, out: int) -> subprocess.Popen[str]:
        """Start a process on a node that has it alone."""
        own = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": self.short}
        return subprocess.Popen(
            [*ISOLATED, str(self.disk), *map(str, words)], env=own, stdout=out, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, cwd=self.disk.parent,
        )  # fmt: skip

    def _add(self, *words: str) -> None:
        first, said = FIRST_PORT + len(self.processes) * PORTS_A_NODE, ""
        ports = [f"--min-worker-port={first}", f"--max-worker-port={first + PORTS_A_NODE - 1}"]
        self.processes.append(None)
        for _ in range(3):  # a busy machine may take longer than the half minute that Ray gives a node
            own = [f"--{name}={find_free_port()}" for name in PORTS]
            ray = Path(sys.executable).with_name("ray")
            process = self.start(ray, "start", "--block", *ports, *own, *words, out=subprocess.PIPE)
            self.processes[-1] = process
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if "Ray runtime started" in line:
                    return
            self.kill(len(self.processes) - 1)
        raise SystemExit(f"node {len(self.processes) - 1} has not started:\n{said}")

    def kill(self, number: int) -> None:
        """Kill a raylet with all that it has started."""
        process = self.processes[number]
        if process is None:
            return
        for pid in (*descendants(process.pid), process.pid):
            kill(pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        for number in reversed(range(len(self.processes))):
            self.kill(number)
        shutil.rmtree(self.short, ignore_errors=True)


def pipeline(trials: int, *settings: str) -> list[str]:
    given = [*SETTINGS, f"sweep.trials={trials}", *settings]
    words = [word for setting in given for word in ("--set", setting)]
    return [sys.executable, "-m", "asc_ray.cli", "pipeline", "--config", str(ROOT / "tests" / "tiny.yaml"), *words]


def watched(driver: subprocess.Popen[str], nodes: Nodes | None, killed: dict[int, int]) -> tuple[str, float]:
    """Read what a driver says until it ends, and kill nodes: `killed` maps numbers of ended trials to nodes.

    Return what it said, and its peak memory in GB.
    """
    said, peak, ended = "", 0.0, 0
    assert driver.stdout is not None
    for line in driver.stdout:
        said += line
        for pid in (driver.pid, *descendants(driver.pid, "asc_ray.cli")):
            peak = max(peak, peak_memory(pid) if Path(f"/proc/{pid}").exists() else 0.0)
        if re.search(r"trial-\d+: 1/1", line):
            ended += 1
            if nodes and (node := killed.pop(ended, None)):
                print(f"  node {node} killed after {ended} trials", flush=True)
                nodes.kill(node)
    if driver.wait():
        raise SystemExit(f"the pipeline ended with {driver.returncode}:\n{said[-3000:]}")
    return said, peak


def report(name: str, said: str, wall: float, peak: float, slots: int, uri: str) -> None:
    """Print what a run took, and what it took beside its epochs."""
    stages = {
        stage: float(seconds) for stage, seconds in re.findall(r"^ *(\w+) done in ([\d.]+) s", said, re.MULTILINE)
    }
    took = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items())
    print(f"{name}: {wall:.0f} s ({took}); driver's peak {peak:.2f} GB")
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("asc-ray").experiment_id], max_results=10_000)
    for kind, stage in (("teacher", "teachers"), ("trial", "sweep")):
        own = [run for run in runs if run.data.tags.get("asc_ray.kind") == kind]
        epochs = sum(
            metric.value
            for run in own
            for key in run.data.metrics
            if key.rpartition("/")[2] == "seconds"
            for metric in client.get_metric_history(run.info.run_id, key)
        )
        whole, count = stages[stage], max(1, len(own))
        busy, beside = 100 * epochs / slots / whole, (slots * whole - epochs) / count
        print(
            f"  {len(own)} {kind}s in {whole:.0f} s, {whole / count:.2f} s each; their epochs took {epochs:.0f} s, "
            f"{busy:.0f} % of {slots} slots; beside them {beside:.2f} s of a slot each"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--killed", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no node stays
    os.environ |= SECRET | {"AWS_EC2_METADATA_DISABLED": "true", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    victims = random.Random(options.seed).sample(range(1, options.nodes + 1), options.killed)
    times = [options.trials * (number + 1) // (2 * max(1, options.killed)) for number in range(options.killed)]
    folder = Path(tempfile.mkdtemp(prefix="many-nodes-"))
    with s3_server() as port:
        bucket, uri = Bucket(port).make(), f"sqlite:///{folder}/mlflow.db"
        nodes = Nodes(folder, options.nodes)
        try:
            own = (f"storage={bucket.uri('many')}", f"tracking.uri={uri}", f"cluster.address={nodes.address}")
            words = pipeline(options.trials, *own, f"data.cache={nodes.disk}", f"sweep.lookback={options.nodes + 2}")
            start = time.monotonic()
            driver = nodes.start(*words, out=subprocess.PIPE)
            said, peak = watched(driver, nodes, dict(zip(times, victims, strict=True)))
            name = f"{options.nodes} nodes, {options.killed} killed"
            report(name, said, time.monotonic() - start, peak, options.nodes, uri)
        finally:
            nodes.stop()
        start = time.monotonic()
        alone = pipeline(options.trials, f"storage={folder}/alone", f"sweep.lookback={options.nodes + 2}")
        driver = subprocess.Popen(alone, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said, peak = watched(driver, None, {})
        slots = len(os.sched_getaffinity(0))
        report("one node", said, time.monotonic() - start, peak, slots, f"sqlite:///{folder}/alone/mlflow.db")
        ours, theirs = (
            {artifact.path.name: content(artifact) for artifact in artifacts_in(storage)}
            for storage in (node_folder(bucket.uri("many"), folder / "looking"), folder / "alone")
        )
    differ = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differ:
        raise SystemExit(f"{len(differ)} of {len(theirs)} artifacts differ: {', '.join(differ)}")
    print(f"{len(ours)} artifacts, equal to the bit")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
