"""What a training leaves in its artifact's folder: weights, and notes of its progress."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from asc_ray.artifacts import stored_file, write_record
from asc_ray.models.pretrained import metadata
from asc_ray.models.registry import build
from asc_ray.training.loop import OnEpoch
from asc_ray.training.recipe import Recipe
from asc_ray.training.validation import Metrics

WEIGHTS = "model.safetensors"
PROGRESS = "progress.json"
SCRATCH = ("checkpoints", PROGRESS)


def about(recipe: Recipe, labels: Sequence[str]) -> dict[str, Any]:
    """Return the metadata of a file of weights, which must agree with the recipe that uses them again."""
    return {"labels": list(labels), "frontend": recipe.frontend.model_dump(exclude={"fmax_jitter"})}


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
