"""A real head node, and a job submitted to it with token authentication on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from asc_ray.config.composition import load_config
from asc_ray.plan import STAGES, Plan

RAY = Path(sys.executable).with_name("ray")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """Environment of a client of a head node of its own; the node ends with the test."""
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    port, dashboard, agent = free_port(), free_port(), free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{RAY.parent}:{environment['PATH']}"  # where the node finds the job's `python`
    start = ["start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    start += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--disable-usage-stats"]
    start += [f"--dashboard-agent-listen-port={agent}"]  # another Ray on this machine may have the default one
    log = (tmp_path / "head.log").open("w")
    node = subprocess.Popen([RAY, *start], env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        for _ in range(60):  # the agent that starts jobs comes up after the server that takes them
            ready = [RAY, "job", "submit", "--address", address, "--", "true"]
            if subprocess.run(ready, env=environment, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(1)
        else:
            pytest.fail((tmp_path / "head.log").read_text())
        yield environment | {"RAY_API_SERVER_ADDRESS": address}
    finally:
        os.killpg(node.pid, signal.SIGTERM)
        try:
            node.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(node.pid, signal.SIGKILL)


def test_the_pipeline_runs_as_a_submitted_job(head, finished, tmp_path):
    """Of a storage that has everything but the int8 model and what is made of it."""
    storage = tmp_path / "storage"
    shutil.copytree(
        finished.storage, storage, ignore=shutil.ignore_patterns("int8", "evaluation", "report", "mlflow.db")
    )
    submit = [RAY, "job", "submit", "--working-dir", ".", "--", "python", "jobs/pipeline.py"]
    done = subprocess.run(
        [*submit, "--config", "tests/tiny.yaml", "--set", f"storage={storage}"],
        cwd=ROOT,
        env=head,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    assert all(artifact.complete for group in plan.by_stage().values() for artifact in group)
    assert str(plan.report.path) in done.stdout

    wrong = {**head, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
    (tmp_path / "other").write_text("f" * 64)
    refused = subprocess.run([RAY, "job", "list"], env=wrong, capture_output=True, text=True, check=False)
    assert refused.returncode != 0


def test_every_stage_has_a_job():
    assert {path.stem for path in (ROOT / "jobs").glob("*.py")} == {*STAGES, "pipeline", "table", "export"} - {"corpus"}


def test_a_relative_storage_is_refused_in_a_job(tmp_path):
    """A job's working directory is a temporary copy: what is stored there is lost."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "pipeline.py", "--config", TINY],
        env=os.environ | {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({})},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "storage: found 'runs/demo'" in done.stderr
    assert "absolute" in done.stderr
