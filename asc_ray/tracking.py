"""MLflow, and the only module that imports it: one parent run per configuration, a child for each thing trained.

Only the driver talks to MLflow, so a sqlite store has one writer. A run that was cut off is taken up again by the same
configuration; runs that nobody takes up again are ended as KILLED, so none stays RUNNING.
"""

import json
import logging
import re
import signal
import threading
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

from asc_ray.errors import UserError

# Database migrations and similar chatter say nothing to the user of a pipeline.
for _name in ("alembic", "mlflow"):
    logging.getLogger(_name).setLevel(logging.ERROR)

STORAGE_TAG = "asc_ray.storage"
KEY_TAG = "asc_ray.key"
ERROR_TAG = "asc_ray.error"


def default_uri(storage: Path) -> str:
    return f"sqlite:///{storage / 'mlflow.db'}"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of a request: cut in two, a transaction would leave sqlite locked."""
    if threading.current_thread() is not threading.main_thread():  # the others get no signals
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
    """The runs of one configuration. `run(name)` children hang below the parent."""

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
                f"tracking.uri {self.uri}: MLflow cannot be reached ({str(error).splitlines()[0]}); "
                "start the server, or leave tracking.uri out to use a database in the storage"
            ) from None
        self._tags = {STORAGE_TAG: str(storage)}
        self._storage, self._name, self._key = storage, name, key
        self._open: dict[str, str] = {}  # name of the child -> run id
        self.parent_id = ""

    @contextmanager
    def parent(self, parameters: Mapping[str, Any], complete: Container[str] = ()) -> Iterator["Tracker"]:
        """The parent run for the duration; it and its children end FINISHED, FAILED, or KILLED on an interrupt.

        `complete`: keys of what is finished, though its driver may have died before it could say so.
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
                self._client.set_tag(self.parent_id, ERROR_TAG, str(error)[:5000])
            raise
        finally:
            for name in list(self._open):
                self.end(name, status)
            with _undisturbed():
                self._client.set_terminated(self.parent_id, status)

    @_undisturbed()
    def start(self, name: str, key: str, parameters: Mapping[str, Any]) -> str:
        """Open (or take up again) the child run of the thing with this key; returns its run id."""
        if name not in self._open:
            tags = {KEY_TAG: key, MLFLOW_PARENT_RUN_ID: self.parent_id}
            self._open[name] = self._take_up(name, tags, parameters)
        return self._open[name]

    @_undisturbed()
    def log(self, name: str, metrics: Mapping[str, Any], step: int) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(_named(k), float(v), now, step) for k, v in metrics.items() if isinstance(v, int | float)]
        self._client.log_batch(self._run_id(name), metrics=entries)

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
        """Final figures of the thing with this key, on its child run below this parent.

        Where it has none, for another command trained it, a new one with the `history` of its epochs.
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
        """Tag the child run of the thing with this key, whichever command of this storage tracked it."""
        if run := self._newest({**self._tags, MLFLOW_RUN_NAME: name, KEY_TAG: key}):
            self._client.set_tag(run.info.run_id, tag, value)

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Final figures on the parent run, where runs are compared."""
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
        """The newest run of this storage with the same key and name that did not finish, or a new one."""
        found = self._newest({**self._tags, MLFLOW_RUN_NAME: name, KEY_TAG: tags[KEY_TAG]})
        if found and (found.info.status != "FINISHED" or name == self._name):
            run_id = found.info.run_id
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
        """Have the runs of this storage say what is so, whenever their driver was killed or interrupted.

        What is complete is FINISHED; nothing is RUNNING, for the storage's lock says that no driver is alive.
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


def _named(metric: str) -> str:
    """The name with what MLflow does not take replaced: devices and scenes are called what their corpus calls them."""
    return re.sub(r"[^\w\-./ :]", "_", metric)


def _quoted(value: str) -> str:
    return f'"{value}"' if "'" in value else f"'{value}'"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[Param]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield Param(f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str))


def version() -> str:
    return mlflow.__version__
