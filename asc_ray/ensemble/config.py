"""The sections of an ensemble: its systems, their logits, and the fusion."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from asc_ray.artifacts import file_sha256
from asc_ray.data.config import FusionData
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.config import NETWORK_NAMES
from asc_ray.resources import Resources, TrainerResources
from asc_ray.section import Section, absolute
from asc_ray.training.config import Recipe

FUSION_FORM = 2  # part of the artifact's key: raise it when the same logits give another fusion
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a folder
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
LogitsPrecision = Literal["fp32", "bf16"]
Ridge = Annotated[float, Field(ge=0.0)] | Literal["auto"]
ScenePrior = Literal["empirical", "uniform"] | dict[str, Annotated[float, Field(gt=0.0)]]


class ImportedConfig(Section):
    """Where a system's logits are, and what its file does not say itself."""

    logits: Path = Field(
        description="file with every clip's logits: .arrow, .feather, .parquet, .csv, .tsv, .npz, .pt or .pth"
    )
    ids: Path | None = Field(
        None, description="table with a column `filename` that names the clips in the order of a file without names"
    )
    labels: tuple[str, ...] | None = Field(
        None, description="the scenes in the order of the logits, for a file that does not name its columns"
    )

    @field_validator("logits", "ids")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return absolute(value) if value else None


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


class LogitsConfig(Section):
    """How the teachers' logits are computed."""

    batch_size: int = Field(64, ge=1, description="clips that go through a network together")
    precision: LogitsPrecision = Field(
        "fp32", description="arithmetic of the networks; with bf16 the largest difference to fp32 is recorded"
    )
    resources: Resources = Resources()


class FusionConfig(Section):
    """How eq. 4 is learned.

    `data`: what it is learned on. holdout: the part `fusion`, on which no teacher is trained. crossfit: all of
    the training split but the validation part; every system is trained `folds` times, and a clip's logits are those of
    the teacher that did not see it. train: the clips that the teachers were trained on.

    `ridge: auto` goes by the number of places, unless repeated cross-validation over places shows that another
    strength has less log loss, by more than a standard error. `scene_prior`: every clip weighs the same (empirical), or
    every scene does (uniform), or scenes weigh as given.
    """

    gone: ClassVar[Mapping[str, Any]] = {"tasks": 1}
    renamed: ClassVar[Mapping[str, str]] = {"scene_prior": "class_prior"}
    data: FusionData = Field("holdout", description="clips that the fusion is learned on")
    folds: int = Field(4, ge=2, description="folds of crossfit")
    ridge: Ridge = Field("auto", description="strength of the pull towards what the systems deserve by their noise")
    scene_prior: ScenePrior = Field("empirical", description="how much each scene weighs")
    nonnegative: bool = Field(False, description="no system has a negative weight")


def imported_identity(name: str, config: ImportedConfig) -> dict[str, Any]:
    """Return what the key of a system's logits is made of. Raises ConfigError where a file is not there."""
    found: dict[str, Any] = {"labels": config.labels}
    for key, file in (("logits", config.logits), ("ids", config.ids)):
        if file is not None and not file.is_file():
            raise ConfigError(f"teachers.imported.{name}.{key}: {file}: no such file")
        found[key] = file and file_sha256(file)
    return found


def published(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return each system's checkpoint in `folder`, if it has one, by the published names: NAME.ckpt, NAME.pt, ...

    Raises ConfigError if `folder` is no folder, or holds no system's file or several of one system.
    """
    if not folder.is_dir():
        raise ConfigError(f"teachers.checkpoints: {folder} is no folder; name one with the published files, or null")
    found: dict[str, Path] = {}
    names = list(names)
    for file in sorted(folder.absolute().iterdir()):
        if file.suffix in SUFFIXES and file.stem in names:
            if file.stem in found:
                raise ConfigError(
                    f"teachers.checkpoints: {found[file.stem]} and {file.name} are of one system; keep one"
                )
            found[file.stem] = file
    if not found:
        raise ConfigError(
            f"teachers.checkpoints: {folder} holds no file of a configured system; expected {names[0]}.ckpt and the "
            f"like, with one of the endings {' '.join(SUFFIXES)}"
        )
    return found


def check_prior(scene_prior: ScenePrior, labels: Sequence[str]) -> None:
    """Raise UserError unless every scene has a share above 0, and all of them together are 1."""
    if scene_prior in ("empirical", "uniform"):
        return
    shares = scene_prior if isinstance(scene_prior, Mapping) else {}
    if shares.keys() != set(labels) or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(
            f"fusion.scene_prior: found {scene_prior}; give each of {', '.join(labels)} its share, above 0 and "
            "together 1, or choose empirical or uniform"
        )
