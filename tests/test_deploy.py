"""What `deploy/` has is valid by the schemas of whoever reads it, and runs as far as it can here.

The whole of KubeRay's schema is not here: `KUBERAY_CRDS` names a folder with the two files that docs/deploy.md says.
"""

import hashlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import ROOT, TINY, command, environment
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config
from store import SECRET

from asc_ray.config.composition import load_config
from asc_ray.tracking.config import default_uri

DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
JOB, CLUSTER = (yaml.safe_load((DEPLOY / "kuberay" / f"{name}.yaml").read_text()) for name in ("rayjob", "raycluster"))
AWS = yaml.safe_load((DEPLOY / "cluster-aws.yaml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "mlflow" / "compose.yaml").read_text())


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return a container file's instructions, each with what stands behind it, without comments."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(" ", 1)) for line in text.splitlines() if line]  # type: ignore[misc]


# --- the image --------------------------------------------------------------------------------------------------------


def test_every_file_is_about_one_ray_that_asc_ray_takes():
    version = CLUSTER["spec"]["rayVersion"]
    ((_, image), *_) = instructions(DEPLOY / "Containerfile")
    assert image.startswith(f"rayproject/ray:{version}-py311")
    wanted = map(Requirement, PROJECT["project"]["optional-dependencies"]["train"])
    assert version in next(each for each in wanted if each.name == "ray").specifier
    pods = [group["template"]["spec"]["containers"][0] for group in groups(CLUSTER["spec"])]
    tags = {pod["image"] for pod in pods} | {AWS["docker"]["image"]}
    assert tags == {f"REGISTRY/asc-ray:{PROJECT['project']['version']}"}


def copied() -> dict[str, str]:
    """Return what the image's COPY lines bring: where to, and from what in the checkout."""
    found = {}
    for word, rest in instructions(DEPLOY / "Containerfile"):
        if word == "COPY":
            *sources, target = rest.split()
            found |= {f"{target}{name}" if target.endswith("/") else target: name for name in sources}
    return found


def test_the_image_gets_what_the_package_is_built_from():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    texts = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    built_from = texts | {*wheel["packages"], *wheel["force-include"]}
    assert copied() == {f"asc-ray/{name}": name for name in built_from}
    assert all((ROOT / name).exists() for name in built_from)


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.campaign)])
def test_the_image_s_run_lines_install_the_package(tmp_path, fresh):
    """In an environment of their own, from what COPY brings. Unless `fresh`, this one's packages are there, too."""
    home, environment = tmp_path / "home", tmp_path / "env"
    for target, source in copied().items():
        (home / target).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, home / target)
    venv.create(environment, with_pip=True)
    installed = next(environment.glob("lib/python*/site-packages"))
    if not fresh:
        (installed / "these.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept |= {"PATH": f"{environment / 'bin'}:/usr/bin:/bin", "HOME": str(home)}

    lines = [rest for word, rest in instructions(DEPLOY / "Containerfile") if word == "RUN"]
    assert len(lines) == 1
    if not fresh:
        lines = [line.replace("pip install", "pip install --ignore-installed --no-deps") for line in lines]
    for line in lines:
        done = subprocess.run(["bash", "-c", line], cwd=home, env=kept, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    where = subprocess.run(
        ["bash", "-c", "asc-ray config presets && python -c 'import asc_ray; print(asc_ray.__file__)'"],
        cwd=tmp_path, env=kept, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "tau22" in where
    assert where.splitlines()[-1] == str(installed / "asc_ray" / "__init__.py")


# --- Kubernetes -------------------------------------------------------------------------------------------------------

# Of KubeRay 1.7's schema (ray.io/v1): the fields that may stand where ours do; below a pod it is Kubernetes' own.
JOB_FIELDS = {
    "entrypoint", "runtimeEnvYAML", "submissionMode", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "activeDeadlineSeconds", "backoffLimit", "rayClusterSpec", "clusterSelector", "submitterPodTemplate", "metadata",
    "jobId", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "suspend",
}  # fmt: skip
CLUSTER_FIELDS = {
    "rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    "gcsFaultToleranceOptions", "suspend",
}  # fmt: skip
GROUP_FIELDS = {"rayStartParams", "template"}
WORKER_FIELDS = GROUP_FIELDS | {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "idleTimeoutSeconds",
    "numOfHosts",
}
CRDS = {  # of KubeRay 1.7.0, ray-operator/config/crd/bases, with their SHA-256
    "ray.io_rayjobs.yaml": "01a5cf3b17c1769fda44af7e82debcd98722f0c27b9ab84d084681c6649121f5",
    "ray.io_rayclusters.yaml": "c44704442eef0c6721ad40c1d66782c8bd3fdab9d3344306a5820910a679baa1",
}


def groups(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_the_kubernetes_files_have_fields_that_kuberay_knows():
    for file in (JOB, CLUSTER):
        assert set(file) == {"apiVersion", "kind", "metadata", "spec"}
        assert file["apiVersion"] == "ray.io/v1"
    assert (JOB["kind"], CLUSTER["kind"]) == ("RayJob", "RayCluster")
    assert set(JOB["spec"]) <= JOB_FIELDS
    spec = CLUSTER["spec"]
    assert set(spec) <= CLUSTER_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    assert set(spec["headGroupSpec"]) == GROUP_FIELDS
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in groups(spec):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_job_s_cluster_is_the_one_that_stays():
    assert JOB["spec"]["rayClusterSpec"] == CLUSTER["spec"]


def test_the_job_s_configuration_is_one_and_its_trainings_fit_a_pod():
    program, stage, *options = shlex.split(JOB["spec"]["entrypoint"])
    assert (program, stage, options[0], *options[2::2]) == ("asc-ray", "pipeline", "--config", "--set", "--set")
    config = load_config(options[1], options[3::2])
    for group in groups(CLUSTER["spec"]):
        (container,) = group["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        mounted = container["volumeMounts"][0]["mountPath"]
        assert config.storage.is_relative_to(mounted)
        assert config.corpus.path is not None
        assert config.corpus.path.is_relative_to(mounted)
        for asked in (config.teachers.resources, config.logits.resources, config.student_resources):
            assert asked.cpus <= limits["cpu"]
            assert asked.gpus <= limits["nvidia.com/gpu"]


@pytest.mark.skipif("KUBERAY_CRDS" not in os.environ, reason="KUBERAY_CRDS names no folder with KubeRay's schema")
def test_the_kubernetes_files_are_valid_by_kuberay_s_own_schema():
    for (name, digest), file in zip(CRDS.items(), (JOB, CLUSTER), strict=True):
        content = (Path(os.environ["KUBERAY_CRDS"]) / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, f"{name} is not that of KubeRay 1.7.0"
        versions = yaml.load(content, yaml.CSafeLoader)["spec"]["versions"]
        schema = strict(next(version for version in versions if version["name"] == "v1")["schema"]["openAPIV3Schema"])
        validator = jsonschema.Draft4Validator(schema)
        assert [error.message for error in validator.iter_errors(file)] == []
        wrong = {**file, "spec": {**file["spec"], "backofLimit": 3}}
        assert "backofLimit" in next(validator.iter_errors(wrong)).message


def strict(schema: Any) -> Any:
    """Return the schema with unknown fields refused, which Kubernetes drops without a word."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    if "properties" in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found.setdefault("additionalProperties", False)
    return found


# --- Slurm, and a cloud's machines ------------------------------------------------------------------------------------


def test_the_batch_script_is_bash_and_asks_for_nodes_of_its_own():
    """tests/test_launcher.py runs it on two nodes."""
    script = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    assert {"--exclusive", "--ntasks-per-node=1"} <= set(asked)
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "Slurm reads none behind the first command"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_batch_script_satisfies_shellcheck():
    done = subprocess.run(["shellcheck", DEPLOY / "slurm.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_cloud_s_cluster_file_is_valid_by_ray_s_own_schema_and_its_nodes_are_alike(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    validate_config(prepare_config(AWS))
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config({**AWS, "max_workerz": 3}))
    for line in (*AWS["initialization_commands"], *AWS["setup_commands"], *AWS["head_setup_commands"]):
        subprocess.run(["bash", "-n", "-c", line], check=True)
    head, worker = shlex.split(AWS["head_start_ray_commands"][-1]), shlex.split(AWS["worker_start_ray_commands"][-1])
    assert {"RAY_AUTH_MODE=token;", "--port=6379", "--autoscaling-config=~/ray_bootstrap_config.yaml"} <= set(head)
    assert {"RAY_AUTH_MODE=token;", "--address=$RAY_HEAD_IP:6379"} <= set(worker)
    region = AWS["provider"]["region"]
    assert any(f".efs.{region}.amazonaws.com:/ /shared" in line for line in AWS["initialization_commands"])
    kind = AWS["available_node_types"]["worker"]
    assert kind["min_workers"] == kind["max_workers"] == AWS["max_workers"], "asc-ray does not wait for nodes to come"


@pytest.mark.campaign
def test_ray_makes_the_cloud_s_nodes(monkeypatch, tmp_path):
    """In moto's EC2: what Ray adds by itself (role, key, network, image) is found, and each node has the GPUs."""
    moto = pytest.importorskip("moto")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "made-up")
    monkeypatch.setenv("AWS_DEFAULT_REGION", AWS["provider"]["region"])
    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    with moto.mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        file = bootstrap_aws(prepare_config(AWS))
        file = AWSNodeProvider.fillout_available_node_types_resources(file)
        kinds = file["available_node_types"]
        assert kinds["worker"]["resources"]["GPU"] == 4
        provider = AWSNodeProvider(file["provider"], file["cluster_name"])
        for kind in ("head", "worker", "worker"):  # moto makes one of "1 to 2"
            provider.create_node(kinds[kind]["node_config"], {"ray-node-type": kind, "ray-node-name": kind}, 1)
        import boto3

        found = boto3.resource("ec2").instances.all()
        assert sorted(node.instance_type for node in found) == ["g5.12xlarge", "g5.12xlarge", "m5.xlarge"]


# --- MLflow -----------------------------------------------------------------------------------------------------------


def test_the_compose_file_has_no_secret_in_it():
    """Passwords and keys come from the environment, and compose refuses to start without them."""
    text = (DEPLOY / "mlflow" / "compose.yaml").read_text()
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if re.search("PASSWORD|KEY|URI|URL", name):
                assert value is None or "${" in value, f"{name} is written out"
    assert ":-}" not in text, "an empty value is not none: boto3 refuses an empty address"
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == {"POSTGRES_PASSWORD", "ARTIFACTS", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    page = (ROOT / "docs" / "deploy.md").read_text()
    assert [name for name in re.findall(r"\$\{(\w+)", text) if name not in page] == []


def server_s_packages() -> str:
    """Return the line that installs what the server's image has."""
    lines = [rest for word, rest in instructions(DEPLOY / "mlflow" / "Containerfile") if word == "RUN"]
    return next(line for line in lines if line.startswith("pip install"))


def test_the_server_s_image_has_the_client_s_mlflow():
    here = {each.name: each for each in map(Requirement, PROJECT["project"]["optional-dependencies"]["train"])}
    there = {each.name: each for each in map(Requirement, shlex.split(server_s_packages())[3:])}
    for name in ("mlflow", "sqlalchemy"):
        assert there[name].specifier == here[name].specifier
    assert "psycopg" in there
    assert "boto3" in there


@pytest.mark.campaign
def test_the_server_s_packages_go_together(tmp_path):
    venv.create(tmp_path, with_pip=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    kept["PATH"] = f"{tmp_path / 'bin'}:/usr/bin:/bin"
    check = "pip check && mlflow --version && python -c 'import boto3, psycopg, sqlalchemy.dialects.postgresql.psycopg'"
    for line in (server_s_packages(), check):
        done = subprocess.run(["bash", "-c", line], env=kept, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def postgres_program(name: str) -> str | None:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


class Postgres:
    """A cluster of PostgreSQL in a folder, run by a user without rights."""

    def __init__(self, folder: Path, password: str) -> None:
        self.data, self.port = folder / "data", free_port()
        self.user = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
        (folder / "password").write_text(password)
        if self.user:
            for path in (folder, folder / "password"):
                shutil.chown(path, "nobody", "nogroup")
        words = ["-D", self.data, "-U", "mlflow", f"--pwfile={folder / 'password'}", "-A", "scram-sha-256", "-N"]
        subprocess.run([postgres_program("initdb"), *words], check=True, capture_output=True, cwd=folder, **self.user)
        self.start()
        import psycopg

        self.login = f"user=mlflow password={password} host=127.0.0.1 port={self.port}"
        for _ in range(240):
            try:
                with psycopg.connect(f"{self.login} dbname=postgres", autocommit=True) as connection:
                    connection.execute("CREATE DATABASE mlflow")
                break
            except psycopg.OperationalError:
                time.sleep(0.25)

    def start(self) -> None:
        words = ["-D", self.data, "-p", str(self.port), "-k", self.data, "-c", "listen_addresses=127.0.0.1"]
        self.process = subprocess.Popen(
            [postgres_program("postgres"), *words], cwd=self.data, stderr=subprocess.DEVNULL, **self.user
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # its fast shutdown
        self.process.wait()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if lacks := [name for name in ("initdb", "postgres") if not postgres_program(name)]:
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(lacks)}")
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        node = Postgres(Path(folder), "letters1and2digits")
        yield node
        node.stop()


@contextmanager
def mlflow_server(variables: dict[str, str], postgres: Postgres) -> Iterator[str]:
    """Run the service `mlflow` of the compose file as it stands there, but for addresses, and yield its URI."""
    service, port = COMPOSE["services"]["mlflow"], free_port()

    def filled(text: str) -> str:
        return re.sub(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", lambda found: variables.get(found[1], found[2]), text)

    environment = {
        name: filled(value or f"${{{name}}}")  # one without a value is passed on
        for name, value in service["environment"].items()
        if value or name in variables
    }
    uri = environment["MLFLOW_BACKEND_STORE_URI"].replace("@postgres/", f"@127.0.0.1:{postgres.port}/")
    environment |= {"MLFLOW_BACKEND_STORE_URI": uri}
    words = [{"0.0.0.0": "127.0.0.1", "5000": str(port)}.get(word, word) for word in service["command"]]
    node = subprocess.Popen([sys.executable, "-m", *words], env=os.environ | environment, start_new_session=True)
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                assert node.poll() is None
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        node.wait()


def known(uri: str) -> dict[tuple[str, str], tuple[str, dict[str, float]]]:
    """Return what a server has of each run: its end and its figures, by kind and name."""
    client = MlflowClient(uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()], max_results=1000)
    return {
        (run.data.tags["asc_ray.kind"], run.info.run_name): (run.info.status, dict(run.data.metrics)) for run in runs
    }


@pytest.mark.campaign
def test_runs_are_in_postgresql_and_files_on_s3_also_after_both_started_again(finished, tmp_path, postgres, bucket):
    storage = Path(
        shutil.copytree(
            finished.storage, tmp_path / "storage", ignore=shutil.ignore_patterns("report", "mlflow.db", "tracking")
        )
    )
    variables = {
        "POSTGRES_PASSWORD": "letters1and2digits",
        "ARTIFACTS": f"s3://{bucket.name}/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{bucket.port}",
        **SECRET,
    }
    with mlflow_server(variables, postgres) as uri:
        settings = [f"storage={storage}", f"tracking.uri={uri}", "tracking.required=true"]
        words = [word for setting in settings for word in ("--set", setting)]
        told = command("pipeline", "--config", TINY, *words)
        done = subprocess.run(told, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        before = known(uri)
    own = known(default_uri(finished.storage))
    assert set(before) == set(own)
    for (kind, name), (status, metrics) in before.items():
        there, figures = own[kind, name]
        told = metrics.keys() == figures.keys()
        assert status == there
        assert told or (kind == "trial" and {"objective", "final_objective"} <= metrics.keys() <= figures.keys())

    postgres.stop()
    postgres.start()
    with mlflow_server(variables, postgres) as uri:
        assert known(uri) == before
        client = MlflowClient(uri)
        (parent,) = [
            run
            for each in client.search_experiments()
            for run in client.search_runs([each.experiment_id], "tags.`asc_ray.kind` = 'pipeline'")
        ]
        file = download_artifacts(run_id=parent.info.run_id, artifact_path="config.yaml", tracking_uri=uri)
        there = bucket.files("mlflow")
        kept = next(name for name in there if name.endswith(f"{parent.info.run_id}/artifacts/config.yaml"))
        assert there[kept] == Path(file).read_bytes()
        assert yaml.safe_load(Path(file).read_text())["name"] == "tiny"
