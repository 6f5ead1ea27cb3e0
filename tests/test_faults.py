"""A cluster of three nodes on this machine, and everything that can die while teachers train on it."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from conftest import TINY, command, processes
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from asc_ray.config.composition import load_config
from asc_ray.plan import Plan


@pytest.fixture
def cluster():
    """A head that trains nothing, and two nodes of one CPU."""
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = [nodes.add_node(num_cpus=1) for _ in range(2)]
    nodes.wait_for_nodes()
    yield nodes, workers
    nodes.shutdown()


@pytest.mark.campaign
def test_whatever_dies_teachers_end_with_the_weights_of_an_unbroken_run(finished, cluster, tmp_path):
    """Workers, then the trainers' controllers, then a node; beside them one system that fails whatever is done."""
    nodes, workers = cluster
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage, ignore=shutil.ignore_patterns("teachers", "mlflow.db"))
    log = tmp_path / "log"
    stranger = Plan(load_config(TINY, [f"storage={storage}"])).students["student"].path / "model.safetensors"
    hopeless = {"model": {"name": "passt", "pretrained": str(stranger)}, "frontend": {"hop": 320, "mels": 128}}
    overrides = [f"storage={storage}", f"teachers.recipes.hopeless={hopeless}", "teachers.allow_missing=1"]
    arguments = ["--config", TINY, *(word for override in overrides for word in ("--set", override))]
    with log.open("w") as out:
        driver = subprocess.Popen(
            command("pipeline", *arguments, "--set", f"cluster.address={nodes.address}"),
            stdout=out,
            stderr=out,
        )

    def wait_for(condition):
        while not (found := condition()):
            assert driver.poll() is None, log.read_text()
            time.sleep(0.01)
        return found

    def epoch(number):
        return list(storage.glob(f"teachers/*.partial/checkpoints/epoch-{number:05d}"))

    wait_for(lambda: epoch(1))
    for title in ("RayTrainWorker", "TrainController"):
        killed = wait_for(lambda title=title: processes(title))
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda killed=killed: processes("RayTrainWorker") - killed)
    nodes.remove_node(workers[0], allow_graceful=False)
    driver.wait()
    output = log.read_text()
    assert driver.returncode == 0, output

    plan, whole = (Plan(load_config(TINY, given)) for given in (overrides, [f"storage={finished.storage}"]))
    assert list(plan.left_out) == ["hopeless"]
    assert str(stranger) in plan.left_out["hopeless"]
    assert f"left out: hopeless failed ({plan.left_out['hopeless']})" in output
    for name, teacher in whole.teachers.items():
        mine, reference = (load_file(t.path / "model.safetensors") for t in (plan.teachers[name], teacher))
        assert all(torch.equal(mine[key], reference[key]) for key in reference), name
    # Without it the ensemble is that of the unbroken run, so nothing was made again.
    assert plan.report.key == whole.report.key
    assert "logits done" not in output
    status = subprocess.run(command("status", *arguments), capture_output=True, text=True, check=True).stdout
    assert "left out" in status
    strict = Plan(load_config(TINY, [*overrides, "teachers.allow_missing=0"]))
    assert strict.left_out == {}
    assert [artifact.name for artifact in strict.missing("teachers")] == ["hopeless"]
    assert strict.key == plan.key
