"""What MLflow's tracking server is told, from records; only the thread of a `Tracker` calls it.

Every record can be sent twice: a run is known by its tag `asc_ray.run`, and figures have the time of their record.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read by MLflow when it is imported. Its telemetry writes to the environment from a thread, and a request that reads
# the environment at that moment fails.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
from mlflow.entities import Dataset, DatasetInput, Metric, Param, Run, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from asc_ray.tracking.things import KEY_TAG, RUN_TAG, STORAGE_TAG, first_line

# Messages about database migrations do not help the user of a pipeline.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.ERROR)
logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # a traceback for each error, which the tracker tells
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines and a request for each run
# A request fails soon, because it is tried again: by the thread, or by the user's next command.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

# Where MLflow's pages have no switch between model training and GenAI, they go by it.
_KIND_OF_EXPERIMENT = {"mlflow.experimentKind": "custom_model_development"}
_MOST_METRICS, _MOST_PARAMETERS, _MOST_CHARACTERS = 1000, 100, 6000  # the protocol's limits
# Another attempt would end as this one.
_FOR_GOOD = (
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "INVALID_STATE",
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "MALFORMED_REQUEST",
)


class _Known:
    """A run on the server. `epoch`: the last one that it has; None where only the server knows."""

    def __init__(self, run: Run | None = None) -> None:
        self.id: str = run.info.run_id if run else ""
        self.status: str = run.info.status if run else ""
        self.key: str = run.data.tags.get(KEY_TAG, "") if run else ""
        self.end: int = (run.info.end_time or 0) if run else 0
        self.epoch: int | None = None if run else 0
        self.metrics: dict[str, float] = dict(run.data.metrics) if run else {}  # the last values
        self.tags: dict[str, str] = dict(run.data.tags) if run else {}


class Server:
    """An experiment's runs of one storage. Methods raise MlflowException, or another error of its store."""

    def __init__(self, uri: str, experiment: str, storage: str, files: str | None, say: Callable[[str], None]) -> None:
        """`storage`: its path or URI. `files`: URI of a folder for runs' files; None: where the server puts them."""
        self._uri, self._experiment, self._storage, self._files, self._say = uri, experiment, storage, files, say
        self._client = MlflowClient(uri)
        self._opened: dict[str, dict[str, Any]] = {}  # the record that opened a run, to make it anew
        self._connect()

    def _connect(self) -> None:
        client, name = self._client, self._experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            self._id = client.create_experiment(name, self._files, _KIND_OF_EXPERIMENT)
        else:
            self._id = found.experiment_id
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(self._id)
                self._say(f"MLflow's experiment {name} was deleted; it is restored, because this run is one of its own")
        self._runs: dict[str, _Known] = {}
        storage, token = self._storage, None
        query = f"tags.`{STORAGE_TAG}` {_equal(storage)}"
        while True:
            page = client.search_runs(
                [self._id], query, ViewType.ACTIVE_ONLY, 1000, ["attributes.start_time ASC"], token
            )
            own = [run for run in page if run.data.tags[STORAGE_TAG] == storage]
            self._runs |= {run.data.tags.get(RUN_TAG, ""): _Known(run) for run in own}
            token = page.token
            if not token:
                break

    def apply(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Tell the server what the records say, with the metrics of one run in few requests."""
        waiting: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            if record["do"] == "log":
                waiting.setdefault(record["run"], []).append(record)
                continue
            if own := waiting.pop(record["run"], None):
                self._tried("log", record["run"], own)
            self._tried(record["do"], record["run"], record)
        for run, own in waiting.items():
            self._tried("log", run, own)

    def _tried(self, do: str, run: str, what: Any) -> None:
        """Tell it; make the run anew if somebody has deleted it, and go on if the server refuses it for good."""
        tell = _DO[do].__get__(self)
        if run not in self._runs and do not in _OPENING:
            self._say(f"MLflow has no run {run} any more; what belongs to it is left out")
            return
        try:
            tell(what)
        except MlflowException as error:
            if error.error_code not in _FOR_GOOD or "is malformed" in str(error):  # a damaged sqlite file
                raise
            if not self._deleted(run):
                self._say(f"MLflow refuses a part of {run}: {first_line(error, self._uri)}")
                return
            before = set(self._runs)
            self._connect()
            for lost in sorted(before - set(self._runs), key=lambda run: self._opened.get(run, {}).get("below") or ""):
                if lost in self._opened:
                    self._say(f"{lost}: its run in MLflow was deleted; it is made anew, without what it had")
                    self._open(self._opened[lost])
            if run in self._runs:
                tell(what)

    def _deleted(self, run: str) -> bool:
        """Whether somebody has deleted the run, or the experiment with it."""
        if run not in self._runs:
            return False
        try:
            info = self._client.get_run(self._runs[run].id).info
            experiment = self._client.get_experiment(self._id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise
        return "deleted" in (info.lifecycle_stage, experiment.lifecycle_stage)

    def _take_over(self, record: Mapping[str, Any]) -> None:
        """End the runs whose driver was killed or interrupted: those of complete artifacts are FINISHED.

        This driver holds the storage's lock, so no other is alive.
        """
        complete = set(record["complete"])
        for run in self._runs.values():
            if run.status != "FINISHED" and run.key in complete:
                self._terminate(run, "FINISHED", record["time"])
            elif run.status == "RUNNING":
                self._terminate(run, "KILLED", record["time"])

    def _open(self, record: Mapping[str, Any]) -> None:
        """Resume the run, or create it.

        A finished run is resumed if it is a parent's, or if this record was sent before. Otherwise its thing was
        deleted and is made again, which is another run.
        """
        name, known = record["run"], self._runs.get(record["run"])
        self._opened[name] = dict(record)
        tags = dict(record["tags"])
        if (parent := record["below"]) in self._runs:  # somebody may have deleted it
            tags[MLFLOW_PARENT_RUN_ID] = self._runs[parent].id
        if known and (known.status != "FINISHED" or not parent or record["time"] <= known.end):
            if known.status != "RUNNING" and record["time"] > known.end:
                self._client.update_run(known.id, "RUNNING")
                known.status = "RUNNING"
            self._tag({**record, "tags": tags})
            return
        tags |= {STORAGE_TAG: self._storage, RUN_TAG: name}
        run = self._client.create_run(self._id, record["time"], tags, record["name"])
        self._runs[name] = known = _Known()
        known.id, known.status, known.key, known.tags = run.info.run_id, "RUNNING", tags[KEY_TAG], tags
        parameters = [Param(_named(key), str(value)[:_MOST_CHARACTERS]) for key, value in record["parameters"].items()]
        for start in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(known.id, params=parameters[start : start + _MOST_PARAMETERS])
        if corpus := record["corpus"]:
            self._client.log_inputs(known.id, [DatasetInput(Dataset(**corpus))])

    def _log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Log metrics, without epochs and final figures that the run has from before."""
        run = self._runs[records[0]["run"]]
        entries, last = [], run.epoch
        for record in records:
            metrics = {_named(name): float(value) for name, value in record["metrics"].items()}
            if record["epoch"] and metrics:
                if last is None:
                    history = self._client.get_metric_history(run.id, next(iter(metrics)))
                    last = max((metric.step for metric in history), default=0)
                if record["step"] <= last:
                    continue
                last = record["step"]
            else:  # every command tells the final figures
                metrics = {name: value for name, value in metrics.items() if run.metrics.get(name) != value}
                run.metrics |= metrics
            entries += [Metric(name, value, record["time"], record["step"]) for name, value in metrics.items()]
        for start in range(0, len(entries), _MOST_METRICS):
            self._client.log_batch(run.id, metrics=entries[start : start + _MOST_METRICS])
        run.epoch = last

    def _tag(self, record: Mapping[str, Any]) -> None:
        """Set tags and remove those that are None, without what is so already: every command tells them."""
        run = self._runs[record["run"]]
        differing = {tag: value for tag, value in record["tags"].items() if run.tags.get(tag) != value}
        if set_now := {tag: value for tag, value in differing.items() if value is not None}:
            self._client.log_batch(run.id, tags=[RunTag(tag, value) for tag, value in set_now.items()])
        for tag in differing.keys() - set_now.keys():
            self._client.delete_tag(run.id, tag)
            del run.tags[tag]
        run.tags |= set_now

    def _file(self, record: Mapping[str, Any]) -> None:
        if Path(record["path"]).is_file():  # it may have been deleted since
            self._client.log_artifact(self._runs[record["run"]].id, record["path"], record["folder"])

    def _text(self, record: Mapping[str, Any]) -> None:
        self._client.log_text(self._runs[record["run"]].id, record["text"], record["path"])

    def _end(self, record: Mapping[str, Any]) -> None:
        run = self._runs[record["run"]]
        if run.status != record["status"] or run.end < record["time"]:
            self._terminate(run, record["status"], record["time"])

    def _whole(self, record: Mapping[str, Any]) -> None:
        """Make the run of what has ended as if it had been tracked, where it was not."""
        known = self._runs.get(record["run"])
        if known is None or known.status not in ("FINISHED", "FAILED"):
            self._open(record)
            epochs = [{**record, "metrics": metrics, "step": step, "epoch": True} for step, metrics in record["curve"]]
            if epochs:
                self._log(epochs)
            self._end(record)

    def _terminate(self, run: _Known, status: str, time: int) -> None:
        self._client.set_terminated(run.id, status, time)
        run.status, run.end = status, time


_OPENING = {"open": Server._open, "whole": Server._whole, "take over": Server._take_over}
_DO = {
    **_OPENING,
    "log": Server._log,
    "tag": Server._tag,
    "file": Server._file,
    "text": Server._text,
    "end": Server._end,
}


def _named(name: str) -> str:
    """Replace the characters that MLflow does not allow, because a corpus may name scenes and devices as it likes."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _equal(value: str) -> str:
    """Return a filter's condition for this value; one with both kinds of quotes finds a little more."""
    if "'" not in value:
        return f"= '{value}'"
    return f'= "{value}"' if '"' not in value else "LIKE '" + value.replace("'", "_") + "'"
