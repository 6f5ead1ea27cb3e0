"""What a training leaves in its artifact's folder: weights, and notes of its progress."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from asc_ray.artifacts import file_sha256, read_manifest, stored_file, write_record
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.config import PasstConfig
from asc_ray.models.pretrained import metadata, start_from
from asc_ray.models.registry import build, head_of
from asc_ray.training.config import Recipe
from asc_ray.training.loop import OnEpoch
from asc_ray.training.validation import Metrics

WEIGHTS = "model.safetensors"
PROGRESS = "progress.json"
SCRATCH = ("checkpoints", PROGRESS)


def about(recipe: Recipe, labels: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a file of weights, which must agree with the recipe that uses them again."""
    return {"labels": list(labels), "frontend": recipe.frontend.model_dump(exclude={"fmax_jitter"})}


def started(model: nn.Module, recipe: Recipe, labels: Sequence[str]) -> list[str] | None:
    """Load the network that the recipe starts from, and return what was done to make it fit; None for none.

    Raises ConfigError where it does not fit: `init` must also have the recipe's front end.
    """
    if recipe.init:
        file, also = weights_file(recipe.init), {"frontend": about(recipe, labels)["frontend"]}
    elif isinstance(recipe.model, PasstConfig) and recipe.model.pretrained:
        file, also = recipe.model.pretrained, {}
    else:
        return None
    return start_from(model, file, labels, head_of(recipe.model, len(labels)), also)


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


def load_model(folder: Path, recipe: Recipe, scenes: int) -> nn.Module:
    """Return the recipe's network, in evaluation form, with the weights of the finished training in `folder`."""
    model = build(recipe.model, scenes, recipe.seed)
    model.load_state_dict(load_file(stored_file(folder, WEIGHTS)))
    return model.eval()


def save_weights(model: nn.Module, file: Path, about: Mapping[str, Any], only: Container[str] | None = None) -> None:
    """Write the network's weights, or `only` those with these names."""
    state = {name: value for name, value in model.state_dict().items() if only is None or name in only}
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    save_file(tensors, file, metadata(about))


def noted(folder: Path, epochs: int, on_epoch: OnEpoch) -> OnEpoch:
    """Return an `on_epoch` that also writes its metrics to the folder, for `asc-ray status` in another shell."""

    def note(metrics: Metrics) -> None:
        write_record(folder / PROGRESS, {**metrics, "epochs": epochs})
        on_epoch(metrics)

    return note
