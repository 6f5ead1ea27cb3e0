"""MLflow through a real sqlite store: what every run ends as, and that a cut-off run is taken up again."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from conftest import TINY, new_storage
from mlflow.tracking import MlflowClient

from asc_ray.config.composition import load_config
from asc_ray.errors import UserError
from asc_ray.plan import dump
from asc_ray.tracking.config import default_uri
from asc_ray.tracking.runs import Tracker


def tracker(storage, key="k"):
    if not (storage / "mlflow.db").exists():
        new_storage(storage)
    return Tracker(None, "asc-ray", storage, "demo", key)


def runs(storage):
    client = MlflowClient(default_uri(storage))
    experiment = client.get_experiment_by_name("asc-ray")
    found = client.search_runs([experiment.experiment_id])
    return {run.info.run_name: run for run in found}


def test_a_pipeline_is_a_parent_with_children_and_their_curves(tmp_path):
    with tracker(tmp_path).parent({"a": {"b": 1, "c": [1, 2]}}) as t:
        t.start("teacher", "t1", {"optimizer": {"epochs": 2}})
        for epoch in (1, 2):
            t.log("teacher", {"loss": 1.0 / epoch, "note": "text"}, epoch)
        t.end("teacher")
        t.log_summary({"accuracy": 0.5})
        (tmp_path / "report.html").write_text("x")
        t.log_file("", tmp_path / "report.html")
    found = runs(tmp_path)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent, child = found["demo"], found["teacher"]
    assert parent.data.params == {"a.b": "1", "a.c": "[1, 2]"}
    assert parent.data.metrics == {"accuracy": 0.5}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.metrics == {"loss": 0.5}
    client = MlflowClient(default_uri(tmp_path))
    assert [m.step for m in client.get_metric_history(child.info.run_id, "loss")] == [1, 2]
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["report.html"]


def test_names_that_mlflow_does_not_take_as_they_are(tmp_path):
    storage = tmp_path / "it's here"
    storage.mkdir()
    with tracker(storage).parent({}) as t:
        t.log_summary({"test/accuracy/iPhone (2)": 0.5})
        t.start("a's table", "k1", {})
        t.end("a's table")
        t.tag("a's table", "k1", "asc_ray.winner", "true")
    found = runs(storage)
    assert found["demo"].data.metrics == {"test/accuracy/iPhone _2_": 0.5}
    assert found["a's table"].data.tags["asc_ray.winner"] == "true"


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_what_is_open_when_a_run_breaks_off_is_closed(tmp_path, raised, status):
    def broken():
        with tracker(tmp_path).parent({}) as t:
            t.start("teacher", "t1", {})
            raise raised("no room")

    with pytest.raises(raised):
        broken()
    assert {run.info.status for run in runs(tmp_path).values()} == {status}
    error = runs(tmp_path)["demo"].data.tags.get("asc_ray.error")
    assert error == ("no room" if status == "FAILED" else None)
    with tracker(tmp_path).parent({}):
        pass
    assert "asc_ray.error" not in runs(tmp_path)["demo"].data.tags


def abandon(storage):
    """A driver that was killed: its runs stay RUNNING."""
    parent = tracker(storage).parent({})
    t = parent.__enter__()
    t.start("done", "finished-artifact", {})
    t.start("half", "half-artifact", {})
    t.log("half", {"loss": 1.0}, 1)
    return {name: run.info.run_id for name, run in runs(storage).items()}, parent


def test_the_same_configuration_takes_its_runs_up_again(tmp_path):
    before, _killed = abandon(tmp_path)
    with tracker(tmp_path).parent({}, complete={"finished-artifact"}) as t:
        t.start("half", "half-artifact", {})
        t.log("half", {"loss": 0.5}, 2)
        t.end("half")
    found = runs(tmp_path)
    assert {name: run.info.run_id for name, run in found.items()} == before
    assert {run.info.status for run in found.values()} == {"FINISHED"}


def test_what_an_interrupt_overtook_is_finished_when_its_artifact_is(tmp_path):
    """The artifact was renamed into place, and before its run could end as FINISHED came the Ctrl-C."""

    def interrupted():
        with tracker(tmp_path).parent({}) as t:
            t.start("done", "finished-artifact", {})
            t.start("half", "half-artifact", {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with tracker(tmp_path, key="another configuration").parent({}, complete={"finished-artifact"}):
        assert {name: run.info.status for name, run in runs(tmp_path).items()}["done"] == "FINISHED"
        assert {name: run.info.status for name, run in runs(tmp_path).items()}["half"] == "KILLED"


def test_runs_that_nobody_takes_up_again_end_as_killed(tmp_path):
    _before, _killed = abandon(tmp_path)
    with tracker(tmp_path, key="another configuration").parent({}, complete={"finished-artifact"}):
        pass
    client = MlflowClient(default_uri(tmp_path))
    experiment = client.get_experiment_by_name("asc-ray")
    found = client.search_runs([experiment.experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in found) == [
        ("demo", "FINISHED"),
        ("demo", "KILLED"),
        ("done", "FINISHED"),
        ("half", "KILLED"),
    ]


def test_a_server_that_does_not_answer_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"tracking\.uri http://127\.0\.0\.1:9"):
        Tracker("http://127.0.0.1:9", "asc-ray", tmp_path, "demo", "k")


@pytest.fixture
def server(tmp_path):
    """A real tracking server on a port of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        f"{tmp_path}/files",
    ]
    node = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    uri = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{uri}/health").close()
                break
            except OSError:
                time.sleep(0.5)
        yield uri
    finally:
        os.killpg(node.pid, signal.SIGKILL)
        node.wait()


def test_runs_and_files_go_to_a_tracking_server_and_its_login_nowhere(server, tmp_path):
    uri = server.replace("//", "//me:hunter2@")
    config = load_config(TINY, [f"tracking.uri={uri}"])
    with Tracker(config.tracking.uri, "scenes", tmp_path / "storage", "demo", "k").parent(dump(config)) as t:
        t.start("teacher", "t1", {})
        t.log("teacher", {"loss": 0.25}, 1)
        t.end("teacher")
        (tmp_path / "report.html").write_text("a report")
        t.log_file("", tmp_path / "report.html")
    client = MlflowClient(server)
    found = client.search_runs([client.get_experiment_by_name("scenes").experiment_id])
    assert sorted((run.info.run_name, run.info.status) for run in found) == [
        ("demo", "FINISHED"),
        ("teacher", "FINISHED"),
    ]
    parent = next(run for run in found if run.info.run_name == "demo")
    assert [f.path for f in client.list_artifacts(parent.info.run_id)] == ["report.html"]
    assert list((tmp_path / "files").rglob("report.html"))
    assert parent.data.params["tracking.uri"].startswith("http://***@127.0.0.1")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_waits_for_the_end_of_a_request(tmp_path, monkeypatch, number, expected):
    """What is interrupted is not half-written, the signal is not lost, and the database stays usable."""
    ours = tracker(tmp_path)
    old = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    log_batch = ours._client.log_batch

    def interrupted(*arguments, **keywords):
        signal.raise_signal(number)
        log_batch(*arguments, **keywords)

    try:
        with pytest.raises(expected), ours.parent({}):  # noqa: PT012
            ours.start("student", "s", {})
            monkeypatch.setattr(ours._client, "log_batch", interrupted)
            ours.log("student", {"loss": 1.5}, step=1)
            pytest.fail("the signal was lost")
    finally:
        signal.signal(signal.SIGTERM, old)
    found = runs(tmp_path)
    assert {run.info.status for run in found.values()} == {"KILLED"}
    assert found["student"].data.metrics == {"loss": 1.5}
