"""A network's weights: those that a training starts from, those of a finished one, and what their file says of it."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from asc_ray.artifacts import stored_file
from asc_ray.models.config import PasstConfig
from asc_ray.models.pretrained import metadata, start_from
from asc_ray.models.registry import build, head_of
from asc_ray.training.config import Recipe
from asc_ray.training.folder import WEIGHTS, weights_file


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
