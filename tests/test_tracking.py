"""MLflow through a real sqlite store and real servers: what every run ends as, and that nothing waits for MLflow."""

import os
import re
import shutil
import socket
import sqlite3
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY, new_storage
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracking import MlflowClient
from sqlalchemy import Column, MetaData, String, Table, create_engine, insert, make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, registry

from asc_ray.config.composition import load_config
from asc_ray.errors import UserError
from asc_ray.plan import dump
from asc_ray.shown import masked
from asc_ray.tracking.config import TrackingConfig, database_of, default_uri
from asc_ray.tracking.runs import Tracker
from asc_ray.tracking.spool import Spool
from asc_ray.tracking.store import on_a_network
from asc_ray.tracking.things import Thing, first_line, parameters

sys.path.insert(0, str(ROOT / "bench"))
import tracking

PARENT = Thing("demo", "k", "pipeline")
ODD = """it's "100%25" a?b#c@d here"""
TEACHER = Thing("teacher", "t1", "teacher", {"optimizer.epochs": 2}, {"asc_ray.network": "passt"})


@contextmanager
def tracker(storage, parent=PARENT, complete=(), said=None, **settings):
    if not (storage / "mlflow.db").exists():
        new_storage(storage)
    tell = (said if said is not None else []).append
    with (
        closing(Tracker(TrackingConfig(**settings), storage, tell)) as made,
        made.parent(parent, "name: demo\n", complete),
    ):
        yield made


def all_runs(uri, experiment="asc-ray"):
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def runs(storage):
    return {run.info.run_name: run for run in all_runs(default_uri(storage))}


def test_a_pipeline_is_a_parent_with_children_and_their_curves(tmp_path):
    corpus = {"name": "esc", "digest": "0123", "source_type": "local", "source": "/esc"}
    teacher = Thing("teacher", "t1", "teacher", {"optimizer.epochs": 2}, {"asc_ray.network": "passt"}, corpus)
    (tmp_path / "report.html").write_text("x")
    with tracker(tmp_path, Thing("demo", "k", "pipeline", {"preset": "small", "a.b": 1})) as t:
        t.start(teacher)
        for epoch in (1, 2):
            t.log(teacher, {"train/loss": 1.0 / epoch}, epoch, epoch=True)
        t.end(teacher)
        t.log(t.top, {"test/accuracy": 0.5})
        t.log_file(t.top, tmp_path / "report.html")
    found = runs(tmp_path)
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    parent, child = found["demo"], found["teacher"]
    assert parent.data.params == {"preset": "small", "a.b": "1"}
    assert parent.data.metrics == {"test/accuracy": 0.5}
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.data.tags["asc_ray.kind"] == "teacher"
    assert child.data.params == {"optimizer.epochs": "2"}
    assert child.data.metrics == {"train/loss": 0.5}
    assert child.inputs.dataset_inputs[0].dataset.name == "esc"
    client = MlflowClient(default_uri(tmp_path))
    assert [m.step for m in client.get_metric_history(child.info.run_id, "train/loss")] == [1, 2]
    assert sorted(f.path for f in client.list_artifacts(parent.info.run_id)) == ["config.yaml", "report.html"]
    assert client.get_experiment_by_name("asc-ray").tags["mlflow.experimentKind"] == "custom_model_development"
    assert [path.stat().st_size for path in (tmp_path / "tracking").iterdir()] == [0], "all of it was sent"


def test_names_that_mlflow_does_not_take_as_they_are(tmp_path):
    storage = tmp_path / ODD
    table = Thing("a's table", "k1", "table", {"rows (2)": 1})
    with tracker(storage) as t:
        t.log(t.top, {"test/device/iPhone (2)": 0.5})
        t.start(table)
        t.end(table)
        t.tag(table, {"asc_ray.winner": "true"})
    with tracker(storage):
        pass
    assert len(all_runs(default_uri(storage))) == 2, "they are known again"
    assert list(tmp_path.iterdir()) == [storage], "nothing is beside the storage"
    found = runs(storage)
    assert found["demo"].data.metrics == {"test/device/iPhone _2_": 0.5}
    assert found["a's table"].data.tags["asc_ray.winner"] == "true"
    assert found["a's table"].data.params == {"rows _2_": "1"}


@pytest.mark.parametrize(
    ("raised", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_parent_that_breaks_off_says_how(tmp_path, raised, status):
    def broken():
        with tracker(tmp_path):
            raise raised("no room")

    with pytest.raises(raised):
        broken()
    assert {run.info.status for run in runs(tmp_path).values()} == {status}
    error = runs(tmp_path)["demo"].data.tags.get("asc_ray.error")
    assert error == ("no room" if status == "FAILED" else None)
    with tracker(tmp_path):
        pass
    assert "asc_ray.error" not in runs(tmp_path)["demo"].data.tags
    assert len(all_runs(default_uri(tmp_path))) == 1


DONE, HALF = (Thing(name, f"{name}-artifact", "teacher") for name in ("done", "half"))


def abandon(storage):
    """A driver that was killed: its runs stay RUNNING."""
    new_storage(storage)
    dead = Tracker(TrackingConfig(), storage, print)
    parent = dead.parent(PARENT, "")
    parent.__enter__()
    for thing in (DONE, HALF):
        dead.start(thing)
    dead.log(HALF, {"train/loss": 1.0}, 1, epoch=True)
    dead.close()
    found = runs(storage)
    assert {run.info.status for run in found.values()} == {"RUNNING"}
    return {name: run.info.run_id for name, run in found.items()}, parent


def test_the_same_configuration_takes_its_runs_up_again(tmp_path):
    """And an epoch that a resumed training reports again is not logged again."""
    before, _killed = abandon(tmp_path)
    with tracker(tmp_path, complete={DONE.key}) as t:
        t.start(HALF)
        t.log(HALF, {"train/loss": 1.0}, 1, epoch=True)
        t.log(HALF, {"train/loss": 0.5}, 2, epoch=True)
        t.end(HALF)
    found = runs(tmp_path)
    assert {name: run.info.run_id for name, run in found.items()} == before
    assert {run.info.status for run in found.values()} == {"FINISHED"}
    history = MlflowClient(default_uri(tmp_path)).get_metric_history(before["half"], "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_runs_that_nobody_takes_up_again_end_as_killed(tmp_path):
    _before, _killed = abandon(tmp_path)
    with tracker(tmp_path, Thing("demo", "another configuration", "pipeline"), complete={DONE.key}):
        pass
    found = all_runs(default_uri(tmp_path))
    assert sorted((run.info.run_name, run.info.status) for run in found) == [
        ("demo", "FINISHED"),
        ("demo", "KILLED"),
        ("done", "FINISHED"),
        ("half", "KILLED"),
    ]


def test_a_deleted_artifact_that_is_made_again_is_another_run(tmp_path):
    for _ in range(2):
        with tracker(tmp_path) as t:
            t.start(TEACHER)
            t.end(TEACHER)
            time.sleep(0.01)  # MLflow's clock has milliseconds
    assert sorted(run.info.run_name for run in all_runs(default_uri(tmp_path))) == ["demo", "teacher", "teacher"]


def test_what_is_sent_twice_is_there_once(tmp_path):
    """A driver dies after the server took the records and before it noted that."""
    kept = []
    with tracker(tmp_path) as t:
        append = t._spool.append
        t._spool.append = lambda record, durable: (kept.append(record), append(record, durable))
        t.start(TEACHER)
        t.log(TEACHER, {"train/loss": 0.5}, 1, epoch=True)
        t.log(TEACHER, {"test/accuracy": 0.5})
        t.end(TEACHER)
    for record in kept:
        append(record, durable=False)
    with tracker(tmp_path):
        pass
    assert sorted(run.info.run_name for run in all_runs(default_uri(tmp_path))) == ["demo", "teacher"]
    found = runs(tmp_path)["teacher"]
    assert found.info.status == "FINISHED"
    client = MlflowClient(default_uri(tmp_path))
    for name in ("train/loss", "test/accuracy"):
        assert [metric.value for metric in client.get_metric_history(found.info.run_id, name)] == [0.5]


def test_runs_that_somebody_deletes_are_made_anew_and_the_experiment_is_restored(tmp_path):
    said = []
    client = MlflowClient(default_uri(new_storage(tmp_path)))
    with tracker(tmp_path, said=said) as t:
        t.start(TEACHER)
        while (experiment := client.get_experiment_by_name("asc-ray")) is None or len(runs(tmp_path)) < 2:
            time.sleep(0.05)
        client.delete_run(runs(tmp_path)["teacher"].info.run_id)
        t.log(TEACHER, {"train/loss": 0.5}, 1, epoch=True)
        while "teacher" not in runs(tmp_path):
            time.sleep(0.05)
        t.end(TEACHER)
    assert runs(tmp_path)["teacher"].data.metrics == {"train/loss": 0.5}
    assert len([line for line in said if "its run in MLflow was deleted; it is made anew" in line]) == 1
    client.delete_experiment(experiment.experiment_id)
    with tracker(tmp_path, said=said):
        pass
    assert len([line for line in said if "MLflow's experiment asc-ray was deleted; it is restored" in line]) == 1
    assert runs(tmp_path)["demo"].info.status == "FINISHED"


def test_another_server_gets_what_was_made_before(tmp_path):
    """Once: a run that it has is left as it is."""
    curve = [(1, {"train/loss": 1.0}), (2, {"train/loss": 0.5})]
    for _ in range(2):
        with tracker(tmp_path) as t:
            t.whole(TEACHER, curve)
            t.log(TEACHER, {"test/accuracy": 0.25})
    found = runs(tmp_path)
    assert found["teacher"].info.status == "FINISHED"
    client = MlflowClient(default_uri(tmp_path))
    history = client.get_metric_history(found["teacher"].info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]
    assert len(client.get_metric_history(found["teacher"].info.run_id, "test/accuracy")) == 1
    assert len(all_runs(default_uri(tmp_path))) == 2


def test_a_tag_is_set_changed_and_removed(tmp_path):
    commands = [
        [{"state": "running", "error": "no room"}],
        [{"state": "complete", "error": None, "never": None}],
        [{"error": "again"}, {"error": None}, {"error": "again"}],
    ]
    found = []
    for command in commands:
        with tracker(tmp_path) as t:
            t.whole(TEACHER)
            for tags in command:
                t.tag(TEACHER, tags)
        tags = runs(tmp_path)["teacher"].data.tags
        found.append({name: tags.get(name) for name in ("state", "error", "never")})
    assert [one["state"] for one in found] == ["running", "complete", "complete"]
    assert [one["error"] for one in found] == ["no room", None, "again"]
    assert {one["never"] for one in found} == {None}


def test_a_record_that_a_crash_has_cut_spoils_no_other(tmp_path):
    whole, cut = b'{"number": 1}\n', b'{"number": 2, "me'
    (tmp_path / "spool").write_bytes(whole + cut)
    spool = Spool(tmp_path / "spool")
    spool.append({"number": 3}, durable=True)
    assert [record["number"] for record in spool.unsent()] == [1, 3]
    spool.sent()
    assert (tmp_path / "spool").read_bytes() == b""


def test_what_waits_for_a_deleted_parent_is_sent_without_it(tmp_path):
    said = []
    with tracker(tmp_path) as t:
        t.start(HALF)
    client = MlflowClient(default_uri(tmp_path))
    client.delete_run(runs(tmp_path)["demo"].info.run_id)
    with closing(Tracker(TrackingConfig(), tmp_path, said.append)) as later:
        later._parent = PARENT
        later.start(TEACHER)
        later.end(TEACHER)
    assert said == []
    assert "mlflow.parentRunId" not in runs(tmp_path)["teacher"].data.tags


@contextmanager
def garbage(database):
    database.write_bytes(b"no database" * 1000)
    yield


@contextmanager
def truncated(database):
    os.truncate(database, database.stat().st_size // 2)
    yield


@contextmanager
def locked(database):
    with closing(sqlite3.connect(database)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (garbage, "file is not a database; where nothing else uses the file now, move it away: the next run begins"),
        (truncated, "database disk image is malformed; where nothing else uses the file now, move it away"),
        (locked, "database is locked; end the program that holds the file, such as `mlflow ui`"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_and_stops_nobody(tmp_path, capfd, harm, reason):
    said, connect = [], sqlite3.connect
    with pytest.MonkeyPatch.context() as patch, harm(new_storage(tmp_path) / "mlflow.db"):
        patch.setattr("sqlite3.connect", lambda *words, **given: connect(*words, **{**given, "timeout": 0.1}))
        with tracker(tmp_path, said=said) as t:
            t.greet()
            t.start(TEACHER)
            t.end(TEACHER)
        with closing(Tracker(TrackingConfig(required=True), tmp_path, print)) as t, pytest.raises(UserError) as raised:
            t.greet()
    assert len(said) == 2, "once when it happens, and once at the end"
    assert f"MLflow at {default_uri(tmp_path)}, which does not answer ({reason}" in said[0]
    assert "records were not sent" in said[1]
    assert reason in str(raised.value)
    assert capfd.readouterr().err == ""
    new_storage(tmp_path)  # it is mended
    with tracker(tmp_path):
        pass
    assert {name: run.info.status for name, run in runs(tmp_path).items()} == {
        "demo": "FINISHED", "teacher": "FINISHED",
    }  # fmt: skip


def test_a_store_that_is_damaged_while_it_is_used_loses_no_record(tmp_path):
    said = []
    with tracker(tmp_path, said=said, wait_seconds=0.5) as t:
        t.start(TEACHER)
        while len(t._spool):
            time.sleep(0.01)
        database = tmp_path / "mlflow.db"
        with database.open("r+b") as file:  # MLflow holds the file open
            file.seek(4096)
            file.write(b"\xff" * (database.stat().st_size - 4096))
        t.log(TEACHER, {"train/loss": 0.5}, 1, epoch=True)
        while not said:
            time.sleep(0.01)
    assert "which does not answer (database disk image is malformed; where" in said[0]
    assert len(said) == 2
    new_storage(tmp_path)
    with tracker(tmp_path) as t:
        t.whole(TEACHER, [(1, {"train/loss": 0.5})])
    assert runs(tmp_path)["teacher"].data.metrics == {"train/loss": 0.5}


@given(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1))
def test_a_storage_of_any_name_has_a_uri(name):
    storage = Path("/storages") / name / "own"
    uri = default_uri(storage)
    assert make_url(uri).database == str(storage / "mlflow.db")
    assert database_of(uri) == storage / "mlflow.db"
    assert masked(uri) == uri


def test_a_file_system_of_a_network_is_known_by_its_type():
    mounts = """/dev/vda / ext4 rw 0 0
server:/x /shared nfs4 rw 0 0
tmpfs /shared/local tmpfs rw 0 0
me@there: /mnt/my\\040files fuse.sshfs rw 0 0
"""
    places = ("/shared/runs", "/sharedruns", "/shared/local/runs", "/mnt/my files", "/home")
    assert [on_a_network(Path(place), mounts) for place in places] == ["nfs4", "", "", "fuse.sshfs", ""]


def test_a_server_that_is_silent_is_named_and_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("asc_ray.tracking.runs.GREETING_SECONDS", 0.2)
    said = []
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with closing(Tracker(TrackingConfig(uri=uri, wait_seconds=0.0), tmp_path, said.append)) as t:
            t.greet()
            (warning,) = said
    assert f"MLflow at {uri}, which has not answered yet; the run goes on" in warning


def test_a_copied_storage_has_its_files_in_itself(tmp_path):
    """And its runs are taken up, not doubled. (In one process MLflow remembers where a run's files are.)"""
    one, two = tmp_path / ODD, tmp_path / "two"
    with tracker(one) as t:
        t.whole(TEACHER, [(1, {"train/loss": 1.0})])
    shutil.copytree(one, two)
    before = {name: run.info.run_id for name, run in runs(one).items()}
    with tracker(two) as t:
        t.whole(TEACHER, [(1, {"train/loss": 1.0})])
    assert {name: run.info.run_id for name, run in runs(two).items()} == before
    for storage in (one, two):
        for run in runs(storage).values():
            assert run.info.artifact_uri.startswith(f"{(storage / 'mlartifacts').as_uri()}/")
            assert run.data.tags["asc_ray.storage"] == str(storage)


def test_a_server_that_is_not_there_stops_nobody_and_gets_it_all_later(tmp_path):
    said = []
    with tracker(tmp_path, said=said, wait_seconds=0.5, uri="http://127.0.0.1:9") as t:
        t.start(TEACHER)
        t.greet()
        t.log(TEACHER, {"train/loss": 0.5}, 1, epoch=True)
    assert len(said) == 2, "once when it happens, and once at the end"
    assert "MLflow at http://127.0.0.1:9, which does not answer" in said[0]
    assert "records were not sent" in said[1]
    with closing(Tracker(TrackingConfig(uri="http://127.0.0.1:9", required=True), tmp_path, print)) as t:
        t._config = t._config.model_copy(update={"wait_seconds": 0.0})
        with pytest.raises(UserError, match=r"tracking\.required: MLflow at http://127\.0\.0\.1:9"):
            t.greet()


class Failing(tracking.Proxy):
    """Answers 503 until it is mended, and then passes requests on."""

    mended = False

    def answer(self):
        if self.mended:
            super().answer()
        else:
            self.send_error(503)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real tracking server on a port of its own, and its folder."""
    folder = new_storage(tmp_path_factory.mktemp("server") / ODD)
    with tracking.server(folder) as uri:
        yield uri, folder


def test_the_benchmark_of_a_slow_server(server, capsys):
    words = ["--trials", "2", "--epochs", "2", "--seconds", "0.2", "--slots", "2", "--delay", "0.01"]
    tracking.main([*words, "--uri", server[0]])
    output = capsys.readouterr().out
    assert re.search(r"^driver: [\d.]+ ms an epoch, [\d.]+ s in all, [\d.]+ %$", output, re.MULTILINE), output
    assert re.search(r"^writer: \d+ requests, ", output, re.MULTILINE)
    found = {run.info.run_name: run for run in all_runs(server[0], "bench")}
    assert sorted(found) == ["bench", "trial-000", "trial-001"]
    assert found["trial-001"].data.metrics["objective"] == 2.0


def test_a_server_that_fails_for_a_while_misses_nothing(server, tmp_path):
    Failing.behind, Failing.mended, said = server[0], False, []
    with tracking.proxy(Failing) as uri:
        settings = {"uri": uri, "experiment": "fails"}
        with tracker(tmp_path, said=said, wait_seconds=0.1, **settings) as t:
            t.start(TEACHER)
            t.log(TEACHER, {"train/loss": 1.0}, 1, epoch=True)
            t._answered.wait()
            Failing.mended = True
        with tracker(tmp_path, said=said, **settings) as t:  # the next command
            t.start(TEACHER)
            t.log(TEACHER, {"train/loss": 0.5}, 2, epoch=True)
            t.end(TEACHER)
    assert [line for line in said if "503" in line], said
    found = {run.info.run_name: run for run in all_runs(server[0], "fails")}
    assert {name: run.info.status for name, run in found.items()} == {"demo": "FINISHED", "teacher": "FINISHED"}
    history = MlflowClient(server[0]).get_metric_history(found["teacher"].info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5)]


def test_runs_and_files_go_to_a_tracking_server_and_its_login_nowhere(server, tmp_path):
    uri, folder = server
    config = load_config(TINY, [f"tracking.uri={uri.replace('//', '//me:hunter2@')}"])
    parent = Thing("demo", "k", "pipeline", parameters(config))
    (tmp_path / "report.html").write_text("a report")
    with (
        closing(Tracker(config.tracking, tmp_path / "storage", print)) as t,
        t.parent(parent, yaml.safe_dump(dump(config))),
    ):
        t.start(TEACHER)
        t.log_file(parent, tmp_path / "report.html")
        t.end(TEACHER)
    found = {run.info.run_name: run for run in all_runs(uri)}
    assert {name: run.info.status for name, run in found.items()} == {"demo": "FINISHED", "teacher": "FINISHED"}
    artifacts = MlflowClient(uri).list_artifacts(found["demo"].info.run_id)
    assert [f.path for f in artifacts] == ["config.yaml", "report.html"]
    assert list((folder / "files").rglob("report.html"))
    assert found["demo"].data.params["tracking.uri"].startswith("http://***@127.0.0.1")
    written = [path for place in (tmp_path, folder) for path in place.rglob("*") if path.is_file()]
    assert not [path for path in written if b"hunter2" in path.read_bytes()]


def test_sqlalchemy_s_remark_does_not_stand_before_the_cause():
    """MLflow's store flushes within queries, as when its disk is full."""
    table = Table("runs", MetaData(), Column("name", String, primary_key=True))
    mapped = type("Run", (), {})
    registry().map_imperatively(mapped, table)
    engine = create_engine("sqlite://")
    table.metadata.create_all(engine)
    with Session(engine) as session:
        session.execute(insert(table), [{"name": "one"}])
        twice = mapped()
        twice.name = "one"
        session.add(twice)
        with pytest.raises(IntegrityError, match="raised as a result of") as raised:
            session.query(mapped).all()
    assert first_line(raised.value, "sqlite:///x.db") == "UNIQUE constraint failed: runs.name"


def test_a_parameter_is_a_number_or_a_word():
    config = load_config("small", ["corpus.path=x", "student.augment.dir.threshold=auto"])
    number = load_config("small", ["corpus.path=x", "student.augment.dir.threshold=323"])
    word = parameters(config.student)
    assert word["augment.dir.threshold.word"] == "auto"
    assert "augment.dir.threshold" not in word
    assert parameters(number.student)["augment.dir.threshold"] == 323.0
    assert {name for name, value in word.items() if value is None} == set()
    assert word["optimizer.learning_rate"] == config.student.optimizer.learning_rate
    assert parameters(config.fusion, "fusion.")["fusion.ridge.word"] == "auto"
