"""A bundle as a registered model in MLflow."""

import io
import shutil
import tempfile
from contextlib import redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from asc_ray import runtime
from asc_ray.errors import ConfigError, UserError
from asc_ray.shown import masked
from asc_ray.tracking.lookup import client_of
from asc_ray.tracking.things import first_line


def _scene_model(bundle: runtime.Bundle | None = None) -> Any:
    """Return an MLflow model of the bundle: waves (N, samples) float32 in +-1 to a frame of scenes and probabilities.

    The class is local, so MLflow stores it by value and it loads without this module.
    """

    class SceneModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
        _skip_type_hint_validation = True  # the signature is the schema that MLflow wants type hints for

        def __init__(self):
            self.bundle: Any = bundle

        def load_context(self, context):
            self.bundle = runtime.Bundle(context.artifacts["bundle"])

        def predict(self, context, model_input, params=None):
            probabilities = self.bundle.probabilities(np.asarray(model_input))
            frame = pd.DataFrame(probabilities, columns=list(self.bundle.labels))
            frame.insert(0, "scene_label", [self.bundle.labels[k] for k in probabilities.argmax(axis=1)])
            return frame

    return SceneModel()


CHAMPION = "champion"
_VALIDATION, _JUDGED_ON = "asc_ray.validation", "asc_ray.judged_on"


def register(
    uri: str, run_id: str, bundle: Path, name: str, validation: float, judged_on: str, guessing: float = 0.0
) -> str:
    """Log the bundle as a model of the run, register it as `name`, and return a line about the version.

    It becomes the champion if its accuracy `validation` is above `guessing`, and if there is no champion, or its
    accuracy is above the champion's on the same clips, `judged_on`. The run ends when it ended before.
    Raises UserError if the server refuses.
    """
    client = client_of(uri)
    before = client.get_run(run_id).info
    try:
        return _register(client, uri, run_id, bundle, name, validation, judged_on, guessing)
    except (MlflowException, OSError) as error:
        raise UserError(
            f"{bundle}: is whole, but MLflow at {masked(uri)} did not register it as {name} "
            f"({first_line(error, uri)}); the same command tries it again"
        ) from None
    finally:
        client.set_terminated(run_id, before.status, before.end_time)


def check_name(name: str) -> None:
    """Raise ConfigError if MLflow does not allow the name for a model."""
    if not name.strip() or set(name) & set("/:"):
        raise ConfigError(f"--name {name!r}: a registered model's name is not empty, and has no / and no :")


def _register(
    client: MlflowClient,
    uri: str,
    run_id: str,
    bundle: Path,
    name: str,
    validation: float,
    judged_on: str,
    guessing: float,
) -> str:
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    opened = runtime.Bundle(bundle)
    tone = np.sin(2 * np.pi * 440 / opened.frontend.sample_rate * np.arange(opened.frontend.samples))
    example = tone[None].astype(np.float32) / 10
    signature = mlflow.models.infer_signature(example, _scene_model(opened).predict(None, example))
    # MLflow writes bars, and warnings about pickles, which are not for the user; the caller prints what became of it.
    quiet = redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, mlflow.start_run(run_id=run_id), quiet:
        logged = mlflow.pyfunc.log_model(
            name="bundle",
            python_model=_scene_model(),
            artifacts={"bundle": str(bundle)},
            signature=signature,
            input_example=example,
            code_paths=[_needed_code(Path(folder))],
            pip_requirements=[f"{package}=={version(package)}" for package in ("mlflow", "numpy", "onnxruntime")],
        )
        made = mlflow.register_model(
            logged.model_uri, name, tags={_VALIDATION: repr(validation), _JUDGED_ON: judged_on}
        )
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        champion = None
    line = f"registered as {name} version {made.version}"
    if validation <= guessing:
        return (
            f"{line}; it does not become the {CHAMPION}: {100 * validation:.1f} % on the validation part are no more "
            f"than guessing may reach there, {100 * guessing:.1f} %"
        )
    if champion is not None and champion.tags.get(_JUDGED_ON) != judged_on:
        return (
            f"{line}; version {champion.version} stays the {CHAMPION}: it was validated on other clips, so the two "
            f"cannot be compared; MLflow's page of the model can give this one the alias {CHAMPION}"
        )
    before = -1.0 if champion is None else float(champion.tags[_VALIDATION])
    if champion is not None and validation <= before:
        return (
            f"{line}; version {champion.version} stays the {CHAMPION} ({100 * before:.1f} % on the validation part, "
            f"this one {100 * validation:.1f} %)"
        )
    client.set_registered_model_alias(name, CHAMPION, made.version)
    beaten = "" if champion is None else f", in place of version {champion.version} with {100 * before:.1f} %"
    return f"{line}, the {CHAMPION} ({100 * validation:.1f} % on the validation part{beaten})"


def _needed_code(folder: Path) -> str:
    """Copy the modules that serving needs, so that the model loads where asc-ray is not installed."""
    here, package = Path(__file__).parents[1], folder / "asc_ray"
    shutil.copytree(here / "runtime", package / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "errors.py", "files.py", "shown.py"):
        shutil.copy(here / file, package)
    return str(package)
