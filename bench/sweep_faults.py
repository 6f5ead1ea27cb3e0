"""Check a search on a cluster that loses a node: each trial ends once, with the results of an undisturbed search.

    python bench/sweep_faults.py CLIPS [--trials 200] [--nodes 4]

CLIPS is a finished clip store (`storage/clips/NAME-KEY` of any run). Nodes are raylets of one CPU on this machine, each
with its own workers; one is killed when half of the trials have ended. A trial is one epoch of sm1 on labels alone. The
same search then runs again without losing a node, and both must agree to the bit.
"""

import argparse
import logging
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from asc_ray.artifacts import Artifact
from asc_ray.cluster.sweep import run_sweep
from asc_ray.data.config import PartitionConfig
from asc_ray.resources import Resources
from asc_ray.search.config import SweepConfig
from asc_ray.search.trials import TrialResult
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.training.dataset import Source

STUDENT = StudentConfig.model_validate(
    {"model": {"name": "ds_flexinet", "size": "sm1"}, "distillation": {"soft_target": "none"}}
)
SPACE = {"optimizer.learning_rate": {"loguniform": [1e-4, 1e-2]}, "augment.freq_mixstyle.p": {"uniform": [0.0, 0.8]}}


def search(clips: Path, trials: int, nodes: int, lose_one: bool) -> tuple[list[TrialResult], Counter[str]]:
    """Run a search; return its results, and how often each trial was reported as ended."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    raylets = [cluster.add_node(num_cpus=1) for _ in range(nodes)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    sweep = SweepConfig.model_validate({"trials": trials, "epochs": 1, "lookback": nodes, "space": SPACE})
    ended: Counter[str] = Counter()

    def on_event(name: str, event: dict[str, Any]) -> None:
        if event.get("finished"):
            ended[name] += 1
            if lose_one and len(ended) == trials // 2:
                cluster.remove_node(raylets[0], allow_graceful=False)

    with tempfile.TemporaryDirectory() as folder:
        artifact = Artifact(Path(folder), "sweep", "sweep", "0", {}, {})
        source = Source(clips, PartitionConfig())
        results = run_sweep(artifact, source, {"none": None}, STUDENT, sweep, Limits(), Resources(), 3, on_event)
    ray.shutdown()
    cluster.shutdown()
    return results, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--nodes", type=int, default=4)
    options = parser.parse_args()
    found = []
    for lose_one in (True, False):
        start = time.perf_counter()
        results, ended = search(options.clips, options.trials, options.nodes, lose_one)
        found.append(results)
        states = ", ".join(f"{count} {state}" for state, count in Counter(r.state for r in results).items())
        twice = sum(count > 1 for count in ended.values())
        print(
            f"{options.nodes} nodes{', one killed half-way' if lose_one else ''}: {len(results)} trials in "
            f"{time.perf_counter() - start:.0f} s: {states}; {twice} twice",
            flush=True,
        )
        if len(ended) != options.trials or twice:
            raise SystemExit("some trials did not end once")
    if found[0] != found[1]:
        raise SystemExit("the results differ from those of whole nodes")
    print("both agree to the bit")


if __name__ == "__main__":
    main()
