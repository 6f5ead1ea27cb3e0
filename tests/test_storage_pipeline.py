"""A pipeline whose driver is killed in the middle of stages, each time on another node: in a folder and on S3."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass

import pandas as pd
import pytest
from conftest import ROOT, TINY, command, environment, joined
from mlflow.tracking import MlflowClient
from ray._common.network_utils import find_free_port
from ray.util import get_node_ip_address
from store import SECRET, Place

import asc_ray
from asc_ray.artifacts import artifacts_in
from asc_ray.config.composition import load_config
from asc_ray.ensemble.stored import StoredEnsemble
from asc_ray.places import opened
from asc_ray.plan import Plan
from asc_ray.tracking.things import RUN_TAG, STORAGE_TAG

sys.path.insert(0, str(ROOT / "bench"))
from chaos import content

# What the driver has said when it is killed: a shard is being made, a teacher has a checkpoint, a trial has one.
KILLED_AT = (r"shards: 0/", r"cpr_128k_fms_1: 1/3", r"trial-000: 1/2", None)
STREAMS = "data.mode=stream"  # on an object storage, every second time


@dataclass(frozen=True)
class Resumed:
    place: Place
    uri: str  # of MLflow
    output: str

    def arguments(self, node: str) -> list[str]:
        return options([*self.place.settings(node), f"tracking.uri={self.uri}"])

    def plan(self, node: str) -> Plan:
        return Plan(load_config(TINY, [*self.place.settings(node), f"tracking.uri={self.uri}"]))


def options(settings: list[str]) -> list[str]:
    return ["--config", str(TINY), *(word for setting in settings for word in ("--set", setting))]


@pytest.fixture(scope="module", params=[pytest.param("folder", marks=pytest.mark.campaign), "s3"])
def resumed(request, tmp_path_factory) -> Resumed:
    folder = tmp_path_factory.mktemp("resumed")
    if request.param == "folder":
        place = Place(str(folder / "storage"), folder)
    else:
        place = Place(
            request.getfixturevalue("bucket").uri("tiny"), folder / "nodes", request.getfixturevalue("bucket")
        )
    run = Resumed(place, f"sqlite:///{folder}/mlflow.db", "")
    output = ""
    for number, pattern in enumerate(KILLED_AT):
        streams = ["--set", STREAMS] if place.bucket and number % 2 else []
        words = command("pipeline", *run.arguments(f"node-{number}"), *streams)
        driver = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=joined(), cwd=folder
        )  # MLflow's files of a database without a server go to the working directory
        assert driver.stdout is not None
        said = ""
        for line in driver.stdout:
            said += line
            if pattern and re.search(pattern, line):
                driver.kill()
        assert driver.wait() == (-9 if pattern else 0), said
        output += said
    return Resumed(place, run.uri, output)


def test_its_artifacts_are_those_of_an_unbroken_run_to_the_bit(resumed, finished):
    ours, theirs = ({a.path.name: a for a in artifacts_in(s)} for s in (resumed.place.node("fresh"), finished.storage))
    assert ours.keys() == theirs.keys()
    for name, artifact in ours.items():
        one, other = content(artifact), content(theirs[name])
        assert {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)} == set(), name
    assert not [
        artifact for stage in resumed.plan("fresh").by_stage().values() for artifact in stage if not artifact.complete
    ]


def test_verify_reads_every_byte_from_the_storage(resumed):
    done = subprocess.run(
        command("verify", resumed.place.setting), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{resumed.place.setting}: 14 artifacts checked" in done.stdout
    assert "0 damaged" in done.stdout


def test_nothing_of_the_building_stays_in_the_storage(resumed):
    if resumed.place.bucket:
        names = resumed.place.bucket.files("tiny").keys()
        known = {f"{a.stage}/{a.path.name}/{name}" for a in artifacts_in(resumed.place.node("fresh"))
                 for name in (*a.manifest()["files"], "manifest.json")}  # fmt: skip
        assert names == known
    else:
        storage = resumed.place.node("")
        assert not [path for pattern in ("**/*.tmp", "*/*.partial", ".ray") for path in storage.glob(pattern)]


def test_a_node_that_streams_has_no_shard(resumed):
    if not resumed.place.bucket:
        pytest.skip("a folder is common to all nodes")
    assert list(resumed.place.node("node-3").glob("clips/*/*.index"))
    assert not list(resumed.place.node("node-3").glob("clips/*/*.arrow"))
    assert list(resumed.place.node("node-2").glob("clips/*/*.arrow"))


def test_no_credential_is_written_anywhere(resumed):
    """Neither in what is stored, nor on the nodes, nor in MLflow, nor in what the driver says."""
    if not resumed.place.bucket:
        pytest.skip("a folder has none")
    contents = {**resumed.place.bucket.files("tiny"), "output": resumed.output.encode()}
    folder = resumed.place.disks.parent
    contents |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert any(name.endswith("mlflow.db") for name in contents)
    assert any(name.endswith(".jsonl") for name in contents), "what waits for MLflow"
    for secret in SECRET.values():
        assert [name for name, content in contents.items() if secret.encode() in content] == []


def test_mlflow_has_one_finished_run_a_thing_of_this_storage(resumed):
    client = MlflowClient(resumed.uri)
    runs = client.search_runs([client.get_experiment_by_name("asc-ray").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {run.data.tags[STORAGE_TAG] for run in runs} == {resumed.place.setting}
    names = [run.data.tags[RUN_TAG] for run in runs]
    assert len(names) == len({*names}) == 11


def test_commands_that_look_and_hand_over_take_the_storage_by_its_name(resumed, tmp_path):
    status = subprocess.run(
        command("status", *resumed.arguments("looking")), capture_output=True, text=True, env=environment(), check=True
    )
    plan = resumed.plan("looking")
    where = resumed.place.setting.partition("?")[0]
    assert status.stdout.count(" done ") == 14
    again = subprocess.run(
        command("pipeline", *resumed.arguments("looking")),
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert "Nothing to do" in again.stdout
    assert f"report  {where}/report/" in again.stdout
    table = asc_ray.results(resumed.place.setting)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 14
    assert (table.problem == "").all()
    assert table.path.str.startswith(where).all()
    assert StoredEnsemble(opened(resumed.place.setting)).labels == tuple(plan.clips.facts()["labels"])
    int8 = f"{where}/int8/{plan.int8['int8'].path.name}{resumed.place.setting.removeprefix(where)}"
    bundle = tmp_path / "bundle"
    done = subprocess.run(
        command("export", int8, bundle, *resumed.arguments("looking")), capture_output=True, text=True,
        env=environment(), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "registered as asc-ray version 1" in done.stdout
    assert os.listdir(bundle)


PORTS = ("dashboard-agent-grpc-port", "dashboard-agent-listen-port", "metrics-export-port", "runtime-env-agent-port")
WITHIN = [[f"--min-worker-port={first}", f"--max-worker-port={first + 399}"] for first in (21_000, 21_500)]
NODE = 'mount -t tmpfs none "$1" && shift && exec "$@"'


@pytest.mark.campaign
def test_nodes_need_no_common_folder(bucket, finished, tmp_path):
    """A driver and two nodes, each with a disk that the others do not see: namespaces of this machine."""
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        pytest.skip("only root may make namespaces, where the machine allows it")
    disk, address = tmp_path / "disk", f"{get_node_ip_address()}:{find_free_port()}"
    disk.mkdir()
    short = tempfile.mkdtemp()  # for Ray's sockets
    own = environment() | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": short}

    def node(*words: object) -> subprocess.Popen:
        return subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", NODE, "node", disk, *map(str, words)], env=own, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path,
        )  # fmt: skip

    def raylet(number: int, *words: str) -> subprocess.Popen:
        ports = [f"--{name}={find_free_port()}" for name in PORTS]
        process = node("ray", "start", "--block", "--num-cpus=1", *WITHIN[number], *ports, *words)
        assert process.stdout is not None
        assert any("Ray runtime started" in line for line in process.stdout), "it has ended"
        return process

    nodes = [raylet(0, "--head", "--include-dashboard=false", f"--port={address.rpartition(':')[2]}")]
    try:
        nodes.append(raylet(1, f"--address={address}"))
        run = Resumed(Place(bucket.uri("nodes"), tmp_path, bucket), f"sqlite:///{tmp_path}/mlflow.db", "")
        driver = node(*command("pipeline", *run.arguments("disk"), "--set", f"cluster.address={address}"))
        said, _ = driver.communicate()
        assert driver.returncode == 0, said
    finally:
        for process in reversed(nodes):
            process.terminate()
            process.wait()
        shutil.rmtree(short, ignore_errors=True)
    assert not list(disk.iterdir())
    made, whole = run.place.node("new"), finished.storage
    assert [content(artifact) for artifact in artifacts_in(made)] == [content(other) for other in artifacts_in(whole)]
