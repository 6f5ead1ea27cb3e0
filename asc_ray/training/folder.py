"""What a training leaves in its artifact's folder: weights, and notes of its progress."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from asc_ray.artifacts import file_sha256, read_manifest, stored_file, write_record
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.config import PasstConfig
from asc_ray.training.config import Recipe

Metrics = dict[str, float]  # by name, of an epoch
OnEpoch = Callable[[Metrics], None]
WEIGHTS = "model.safetensors"
PROGRESS = "progress.json"
SCRATCH = ("checkpoints", PROGRESS)


def weights_file(path: Path) -> Path:
    """Return a file of weights, or that of the finished training in a folder. Raises ConfigError and UserError."""
    if not path.is_dir():
        return path
    manifest = read_manifest(path)
    if WEIGHTS not in manifest["files"]:
        raise ConfigError(
            f"{path}: of the stage {manifest['stage']}, and without {WEIGHTS}; give a student's or a teacher's folder"
        )
    return stored_file(path, WEIGHTS)


def start_in_key(key: str, recipe: Recipe) -> dict[str, Any]:
    """Return the recipe for a key: a network to start from is in it by its contents. Raises ConfigError for no file."""
    section = recipe.for_key()
    if recipe.init:
        section["init"] = _contents(f"{key}.init", recipe.init)
    if isinstance(recipe.model, PasstConfig) and recipe.model.pretrained:
        section["model"]["pretrained"] = _contents(f"{key}.model.pretrained", recipe.model.pretrained)
    return section


def _contents(key: str, path: Path) -> str:
    if not path.exists():
        raise ConfigError(f"{key}: {path}: no such file")
    try:
        return file_sha256(weights_file(path))
    except UserError as error:
        raise ConfigError(f"{key}: {error}") from None


def noted(folder: Path, epochs: int, on_epoch: OnEpoch) -> OnEpoch:
    """Return an `on_epoch` that is told the number of `epochs`, too, and also writes its metrics to the folder, for
    `asc-ray status` in another shell."""

    def note(metrics: Metrics) -> None:
        told = {**metrics, "epochs": epochs}
        write_record(folder / PROGRESS, told)
        on_epoch(told)

    return note
