"""Runs in MLflow: one parent run for each configuration, with a child run for each thing trained.

Only the driver talks to MLflow, so a sqlite database has one writer. The same configuration resumes a run that was cut
off. Runs that nobody resumes are ended as KILLED, so none stays RUNNING.
"""

import json
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from asc_ray.errors import UserError
from asc_ray.shown import masked
from asc_ray.tracking.config import default_uri

# Messages about database migrations do not help the user of a pipeline.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.ERROR)
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

STORAGE_TAG = "asc_ray.storage"
KEY_TAG = "asc_ray.key"
ERROR_TAG = "asc_ray.error"


def first_line(error: Exception, uri: str) -> str:
    return masked(next(iter(str(error).splitlines()), ""), uri)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay Ctrl-C and SIGTERM until a request has ended: an interrupted transaction would leave sqlite locked."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    caught: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if caught:
            signal.raise_signal(caught[0])


class Tracker:
    """The runs of one configuration: a parent and, by name, its children."""

    def __init__(self, uri: str | None, experiment: str, storage: Path, name: str, key: str) -> None:
        self.uri = uri or default_uri(storage)
        try:
            self._client = MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                location = None if uri else (storage / "mlartifacts").as_uri()
                self.experiment_id = self._client.create_experiment(experiment, artifact_location=location)
            else:
                self.experiment_id = found.experiment_id
        except (MlflowException, OSError) as error:
            raise UserError(
                f"tracking.uri {masked(self.uri)}: MLflow cannot be reached ({first_line(error, self.uri)}); "
                "start the server, or leave tracking.uri out to use a database in the storage"
            ) from None
        self._tags = {STORAGE_TAG: str(storage)}
        self._storage, self._name, self._key = storage, name, key
        self._open: dict[str, str] = {}  # name of the child -> run id
        self._epochs: dict[str, float] = {}  # run id -> its last logged epoch
        self.parent_id = ""

    @contextmanager
    def parent(self, parameters: Mapping[str, Any], complete: Container[str] = ()) -> Iterator["Tracker"]:
        """Open the parent run; at the end it and its open children are FINISHED, FAILED, or KILLED by an interrupt.

        `complete`: keys of finished artifacts; a driver may have died before it ended their runs.
        """
        self._end_stale(complete)
        self.parent_id = self._take_up(self._name, {KEY_TAG: self._key}, parameters)
        status = "FAILED"
        try:
            yield self
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        except Exception as error:
            with _undisturbed():
                self._client.set_tag(self.parent_id, ERROR_TAG, masked(error, self.uri)[:5000])
            raise
        finally:
            for name in list(self._open):
                self.end(name, status)
            with _undisturbed():
                self._client.set_terminated(self.parent_id, status)

    @_undisturbed()
    def start(self, name: str, key: str, parameters: Mapping[str, Any]) -> str:
        """Open or resume the child run of the thing with this key, and return its run id."""
        if name not in self._open:
            tags = {KEY_TAG: key, MLFLOW_PARENT_RUN_ID: self.parent_id}
            self._open[name] = self._take_up(name, tags, parameters)
        return self._open[name]

    @_undisturbed()
    def log(self, name: str, metrics: Mapping[str, Any], step: int) -> None:
        """Log metrics at a step; an epoch that was logged before the driver died is not logged again."""
        run_id = self._run_id(name)
        if metrics.get("epoch", math.inf) <= self._epochs.get(run_id, -math.inf):
            return
        now = int(time.time() * 1000)
        entries = [Metric(_named(k), float(v), now, step) for k, v in metrics.items() if isinstance(v, int | float)]
        self._client.log_batch(run_id, metrics=entries)

    @_undisturbed()
    def log_file(self, name: str, path: Path, folder: str | None = None) -> None:
        """Store a file as an artifact of the child `name`, or of the parent when `name` is empty."""
        self._client.log_artifact(self._run_id(name), str(path), folder)

    def record(
        self,
        name: str,
        key: str,
        parameters: Mapping[str, Any],
        history: Sequence[Mapping[str, float]],
        metrics: Mapping[str, float],
    ) -> None:
        """Log the final figures of the thing with this key on its child run below this parent.

        If it has no such run, because another command trained it, a new run gets the `history` of its epochs.
        """
        with _undisturbed():
            found = self._newest({MLFLOW_RUN_NAME: name, KEY_TAG: key, MLFLOW_PARENT_RUN_ID: self.parent_id})
        if found:
            self._open[name] = found.info.run_id
        self.start(name, key, parameters)
        if not found:
            for epoch in history:
                self.log(name, epoch, int(epoch["epoch"]))
        self.log(name, metrics, 0)
        self.end(name)

    @_undisturbed()
    def tag(self, name: str, key: str, tag: str, value: str) -> None:
        """Tag the newest run of the thing with this key, whichever command of this storage tracked it."""
        if run := self._newest({**self._tags, MLFLOW_RUN_NAME: name, KEY_TAG: key}):
            self._client.set_tag(run.info.run_id, tag, value)

    @_undisturbed()
    def ended_with(self, tag: str, name: str, key: str) -> bool:
        """Whether the run of the thing with this key has the tag and ended without an interrupt."""
        run = self._newest({**self._tags, MLFLOW_RUN_NAME: name, KEY_TAG: key})
        return run is not None and tag in run.data.tags and run.info.status in ("FINISHED", "FAILED")

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Log final figures on the parent run, where runs are compared."""
        self.log("", metrics, 0)

    @_undisturbed()
    def end(self, name: str, status: str = "FINISHED") -> None:
        run_id = self._open.pop(name, None)
        if run_id:
            self._client.set_terminated(run_id, status)

    def _run_id(self, name: str) -> str:
        return self._open[name] if name else self.parent_id

    @_undisturbed()
    def _take_up(self, name: str, tags: Mapping[str, str], parameters: Mapping[str, Any]) -> str:
        """Resume the newest run of this storage with this key and name, or create one; return its run id.

        A child run that has finished is not resumed.
        """
        found = self._newest({**self._tags, MLFLOW_RUN_NAME: name, KEY_TAG: tags[KEY_TAG]})
        if found and (found.info.status != "FINISHED" or name == self._name):
            run_id = found.info.run_id
            self._epochs[run_id] = found.data.metrics.get("epoch", -math.inf)
            self._client.update_run(run_id, "RUNNING")
            if ERROR_TAG in found.data.tags:
                self._client.delete_tag(run_id, ERROR_TAG)
            for key, value in tags.items():
                self._client.set_tag(run_id, key, value)
            return run_id
        run = self._client.create_run(self.experiment_id, tags={**self._tags, **tags}, run_name=name)
        flat = list(_flat(parameters))
        for start in range(0, len(flat), 100):  # the protocol's limit for one request
            self._client.log_batch(run.info.run_id, params=flat[start : start + 100])
        return run.info.run_id

    def _newest(self, tags: Mapping[str, str]) -> Run | None:
        query = " and ".join(f"tags.`{tag}` = {_quoted(value)}" for tag, value in tags.items())
        found = self._client.search_runs([self.experiment_id], query, max_results=1)
        return found[0] if found else None

    @_undisturbed()
    def _end_stale(self, complete: Container[str]) -> None:
        """Correct the status of runs whose driver was killed or interrupted.

        Runs of complete artifacts become FINISHED. Other RUNNING ones become KILLED, because this driver holds the
        storage's lock, so no other is alive.
        """
        query = f"attributes.status != 'FINISHED' and tags.`{STORAGE_TAG}` = {_quoted(str(self._storage))}"
        found = self._client.search_runs([self.experiment_id], query, max_results=500)
        unfinished = list(found)
        while found.token:
            found = self._client.search_runs([self.experiment_id], query, max_results=500, page_token=found.token)
            unfinished += found
        for run in unfinished:
            if run.data.tags.get(KEY_TAG) in complete:
                self._client.set_terminated(run.info.run_id, "FINISHED")
            elif run.info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")


def artifacts_of(uri: str, run_id: str) -> list[tuple[Path, str]]:
    """Return (storage, key) of what a run and its children have made; empty if the server does not know the run.

    Raises UserError if the server cannot be reached.
    """
    client = client_of(uri)
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return []
    query = f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run_id}'"
    found = [run, *client.search_runs([run.info.experiment_id], query, max_results=5000)]
    return [(Path(r.data.tags[STORAGE_TAG]), r.data.tags[KEY_TAG]) for r in found if KEY_TAG in r.data.tags]


def runs_of(uri: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Return the newest run's ID for each key that the server has a run for."""
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return {}
    client = client_of(uri)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {}
    for name, key in keys.items():
        if found := client.search_runs(everywhere, f"tags.`{KEY_TAG}` = '{key}'", max_results=1):
            runs[name] = found[0].info.run_id
    return runs


def client_of(uri: str) -> MlflowClient:
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"tracking.uri {masked(uri)}: MLflow cannot be reached ({first_line(error, uri)}); start the server, or "
            "name another"
        ) from None
    return client


def _named(metric: str) -> str:
    """Replace the characters that MLflow does not allow, because a corpus may name scenes and devices as it likes."""
    return re.sub(r"[^\w\-./ :]", "_", metric)


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[Param]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield Param(f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str))
