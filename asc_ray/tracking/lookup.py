"""Questions to a tracking server, for `asc-ray export`."""

from collections.abc import Mapping
from pathlib import Path

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from asc_ray.errors import UserError
from asc_ray.places import opened
from asc_ray.shown import masked
from asc_ray.tracking.config import database_of
from asc_ray.tracking.things import KEY_TAG, STORAGE_TAG, first_line


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
    return [(opened(r.data.tags[STORAGE_TAG]), r.data.tags[KEY_TAG]) for r in found if KEY_TAG in r.data.tags]


def runs_of(uri: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Return the newest run's ID for each key that the server has a run for."""
    if (database := database_of(uri)) and not database.is_file():
        return {}
    client = client_of(uri)
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {}
    for name, key in keys.items():
        if found := client.search_runs(everywhere, f"tags.`{KEY_TAG}` = '{key}'", max_results=1):
            runs[name] = found[0].info.run_id
    return runs


def client_of(uri: str) -> MlflowClient:
    """Return a client of a server that answers. Raises UserError."""
    try:
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"tracking.uri {masked(uri)}: MLflow cannot be reached ({first_line(error, uri)}); start the server, or "
            "name another"
        ) from None
    return client
