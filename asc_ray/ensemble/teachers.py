"""The systems of an ensemble: their trainings, and those that come from published checkpoints."""

from collections.abc import Sequence
from pathlib import Path

from asc_ray.artifacts import Artifact
from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.errors import UserError
from asc_ray.models.own import OwnNetwork, try_out
from asc_ray.models.pretrained import load_published
from asc_ray.models.registry import build
from asc_ray.training import parallel
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.folder import SCRATCH, WEIGHTS, OnEpoch, noted
from asc_ray.training.loop import fit
from asc_ray.training.weights import about, save_weights, started


def train_teacher(
    artifact: Artifact,
    source: Source,
    recipe: Recipe,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Train one system of the ensemble on the part `train`, on all ranks of a torch.distributed group together."""
    folder = artifact.open_partial()
    data = source.open()
    model = build(recipe.model, len(data.store.labels), recipe.seed)
    if isinstance(model, OwnNetwork):
        try_out(model, recipe.frontend.shape(CLIP_SAMPLES))
    start = started(model, recipe, data.store.labels)
    history = fit(
        model,
        recipe,
        data,
        data.parts["train"],
        folder / "checkpoints",
        gpus=gpus,
        on_epoch=noted(folder, recipe.optimizer.epochs, on_epoch),
    )
    if parallel.rank() == 0:
        save_weights(model, folder / WEIGHTS, about(recipe, data.store.labels))
        parameters = sum(p.numel() for p in model.parameters())
        artifact.finish({"history": history, "parameters": parameters, "started_from": start}, SCRATCH)


def import_teacher(artifact: Artifact, file: Path, recipe: Recipe, labels: Sequence[str]) -> None:
    """Make a system from a published checkpoint instead of a training. Raises UserError where it does not fit."""
    model = build(recipe.model, len(labels), recipe.seed)
    if isinstance(model, OwnNetwork):
        raise UserError(
            f"teachers.checkpoints: {file} is of your own code, {model.function}; let that load the weights"
        )
    known = load_published(model, file, about(recipe, labels))
    save_weights(model, artifact.open_partial() / WEIGHTS, about(recipe, labels))
    parameters = sum(p.numel() for p in model.parameters())
    artifact.finish({"history": [], "parameters": parameters, "imported": file.name, "on_trust": not known})
