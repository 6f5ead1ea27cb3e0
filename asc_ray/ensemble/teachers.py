"""The systems of an ensemble: their configuration, their trainings, and those that come from published checkpoints."""

import re
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from asc_ray.artifacts import Artifact
from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.ensemble.imported import ImportedConfig
from asc_ray.errors import UserError
from asc_ray.models.config import NETWORK_NAMES
from asc_ray.models.own import OwnNetwork, try_out
from asc_ray.models.pretrained import load_published
from asc_ray.models.registry import build
from asc_ray.resources import TrainerResources
from asc_ray.section import Section
from asc_ray.training import parallel
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.folder import SCRATCH, WEIGHTS, about, noted, save_weights, started
from asc_ray.training.loop import OnEpoch, fit

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a folder


class TeachersConfig(Section):
    """The ensemble's systems, and what their trainings ask of the cluster."""

    checkpoints: Path | None = Field(
        None,
        description="folder with published checkpoints NAME.ckpt, .pt, .pth, .safetensors; "
        "the systems of these names are not trained",
    )
    recipes: dict[str, Recipe] = Field({}, description="recipes of the systems that are trained, by name")
    imported: dict[str, ImportedConfig] = Field({}, description="systems whose logits come from files, by name")
    resources: TrainerResources = TrainerResources()
    resources_for: dict[str, TrainerResources] = Field({}, description="replaces `resources`, by the model's name")
    allow_missing: int = Field(
        0, ge=0, description="how many systems may fail for good; the ensemble goes on without them"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TeachersConfig":
        if unknown := sorted(set(self.resources_for) - set(NETWORK_NAMES)):
            raise ValueError(f"resources_for: unknown model {unknown[0]!r}; allowed: {', '.join(NETWORK_NAMES)}")
        if not self.systems:
            raise ValueError("recipes, imported: no system; give one at least, by teachers.systems")
        if both := sorted(self.recipes.keys() & self.imported.keys()):
            raise ValueError(f"imported.{both[0]}: a recipe has this name, too; names must differ")
        if strange := [name for name in self.systems if not NAME.fullmatch(name)]:
            raise ValueError(f"system {strange[0]!r}: allowed are letters, digits, '.', '_' and '-'")
        if self.recipes and self.allow_missing >= len(self.recipes):
            raise ValueError(
                f"allow_missing: {self.allow_missing} of {len(self.recipes)} systems; one at least must be left"
            )
        return self

    @property
    def systems(self) -> tuple[str, ...]:
        """The names of all systems, in the order in which eq. 4 takes them."""
        return (*self.recipes, *self.imported)

    def resources_of(self, recipe: Recipe) -> TrainerResources:
        return self.resources_for.get(recipe.model.name, self.resources)

    def requests(self) -> dict[str, TrainerResources]:
        """Return the resources that the systems ask for, by the configuration's key that sets them."""
        models = {recipe.model.name for recipe in self.recipes.values()}
        asked = {
            f"teachers.resources_for.{model}": self.resources_for[model] for model in models & {*self.resources_for}
        }
        return asked if len(asked) == len(models) else asked | {"teachers.resources": self.resources}


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
