"""One frozen configuration from YAML files and dotted overrides.

A file may begin with `base: other.yaml` (relative to itself, or a preset's name), or several in a list: it is merged
over them, mapping by mapping.
`student.preset: NAME` takes a network and its front end from `students/NAME.yaml`, `student.recipe: NAME` augmentation,
optimizer and distillation from `recipes/NAME.yaml`, in place of what was below but for the soft target; what else is
given changes them. So does `sweep.preset: NAME` with the space of the search, from `sweep/NAME.yaml`.
`teachers.systems` names recipe files `teachers/NAME.yaml` beside the configuration or among the packaged presets.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, field_serializer, field_validator, model_validator

from asc_ray.cluster.resources import ClusterConfig, Resources, TrainerResources
from asc_ray.data.batches import DataConfig
from asc_ray.data.corpus import CorpusConfig
from asc_ray.errors import ConfigError
from asc_ray.files import read_plain
from asc_ray.fusion import FusionConfig
from asc_ray.models.complexity import Limits
from asc_ray.models.registry import NETWORKS
from asc_ray.section import Section, absolute
from asc_ray.shown import masked, printable
from asc_ray.training.dataset import PartitionConfig
from asc_ray.training.explain import explain
from asc_ray.training.loop import Recipe
from asc_ray.training.search import SweepConfig, apply_overrides, changed
from asc_ray.training.space import KINDS
from asc_ray.training.systems import Precision, QATConfig, StudentConfig
from asc_ray.yaml_text import MOST_BYTES, read_yaml

SOFT_TARGET = "distillation.soft_target"
MOST_LAYERS = 64  # files that a configuration is made of
_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the presets inside the package; a checkout has them beside it.
PRESETS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


class TeachersConfig(Section):
    """The ensemble's systems, and what their trainings ask of the cluster."""

    checkpoints: Path | None = Field(
        None,
        description="folder with published checkpoints NAME.ckpt, .pt, .pth, .safetensors; those are not trained",
    )
    recipes: dict[str, Recipe] = Field(min_length=1, description="of the systems, by their names")
    resources: TrainerResources = TrainerResources()
    resources_for: dict[str, TrainerResources] = Field({}, description="in place of `resources`, by the model's name")
    allow_missing: int = Field(
        0, ge=0, description="so many systems may fail for good, and the ensemble goes on without them"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TeachersConfig":
        if unknown := sorted(set(self.resources_for) - set(NETWORKS)):
            raise ValueError(f"resources_for: unknown model {unknown[0]!r}; allowed: {', '.join(NETWORKS)}")
        if self.allow_missing >= len(self.recipes):
            raise ValueError(
                f"allow_missing: {self.allow_missing} of {len(self.recipes)} systems; one at least must be left"
            )
        return self

    def resources_of(self, recipe: Recipe) -> TrainerResources:
        return self.resources_for.get(recipe.model.name, self.resources)

    def requests(self) -> dict[str, TrainerResources]:
        """What the systems ask for, by the key that says so."""
        models = {recipe.model.name for recipe in self.recipes.values()}
        asked = {
            f"teachers.resources_for.{model}": self.resources_for[model] for model in models & {*self.resources_for}
        }
        return asked if len(asked) == len(models) else asked | {"teachers.resources": self.resources}


class LogitsConfig(Section):
    """How the teachers' logits are computed."""

    batch_size: int = Field(64, ge=1, description="clips that go through a network together")
    precision: Precision = Field("fp32", description="of the networks; bf16 notes its largest difference to fp32")
    resources: Resources = Resources()


class TrackingConfig(Section):
    """Where runs are noted.

    A login in `uri` goes to MLflow alone: what is written or shown of a configuration has *** in its place.
    """

    uri: str | None = Field(None, description="any MLflow tracking URI; null: a sqlite database in the storage")
    experiment: str = Field("asc-ray", min_length=1, description="name of the experiment in MLflow")

    @field_validator("uri")
    @classmethod
    def _with_its_login(cls, value: str | None) -> str | None:
        if value and "***" in value:
            raise ValueError("its login was taken out when it was written; give the whole URI, or leave it out")
        return value

    @field_serializer("uri")
    def _without_login(self, value: str | None) -> str | None:
        return value and masked(value)


S = TypeVar("S", bound=Section)


class Config(Section):
    name: str = Field("asc", pattern=r"^[A-Za-z0-9._-]+$", description="of the report, and of the run in MLflow")
    storage: Path = Field(description="folder below which all is made; every node of a cluster must reach it")
    corpus: CorpusConfig = CorpusConfig()
    data: DataConfig = DataConfig()
    partition: PartitionConfig = PartitionConfig()
    teachers: TeachersConfig
    logits: LogitsConfig = LogitsConfig()
    fusion: FusionConfig = FusionConfig()
    sweep: SweepConfig | None = None
    student: StudentConfig
    limits: Limits = Limits()
    student_resources: Resources = Resources()
    qat: QATConfig = QATConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("storage")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        if "://" in str(value) or str(value).startswith(("s3:", "gs:")):
            raise ValueError("is a URI; allowed is a folder that every node of the cluster can reach")
        if not value.is_absolute() and str(value)[:1] != "~" and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
            raise ValueError("in a Ray job it must be absolute: the working directory is a temporary copy")
        return absolute(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.sweep:
            self.sweep.check(self.student)
        allowed = ("none", "average", "fused", *self.teachers.recipes)
        for soft in self.soft_targets:
            if soft not in allowed:
                raise ValueError(f"student.{SOFT_TARGET}: {soft!r} is unknown; allowed: {', '.join(allowed)}")
        return self

    @property
    def soft_targets(self) -> tuple[str, ...]:
        """The student's soft target, and those that the search may choose."""
        found = {self.student.distillation.soft_target: None}
        for key, parameter in self.sweep.space.items() if self.sweep else ():
            if key in (SOFT_TARGET, "distillation"):
                found |= {changed(self.student, {key: end}).distillation.soft_target: None for end in parameter.ends()}
        return tuple(found)

    @property
    def taught(self) -> bool:
        """Whether students may have soft targets."""
        return set(self.soft_targets) != {"none"}


# A `base:` may name any file by mistake: what no configuration has is not read out.
_KNOWN_KEYS = {"base"}.union(*(section.model_fields for section in (Config, Recipe, StudentConfig, SweepConfig)))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, or a packaged preset by its name, and apply `key.path=value` overrides.

    Raises ConfigError naming the file or the key's path, what was found and what is allowed.
    """
    path = _find(source)
    raw = _compose(path)
    # Presets first: what else is given changes them.
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in _PRESET_KEYS):
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: expected KEY.PATH=VALUE, as in --set student.optimizer.epochs=20")
        value = read_yaml(text, f"--set {key}")
        if key in _PRESET_KEYS:
            section, _, name = key.partition(".")
            raw = _laid_over(raw, {section: {name: value}}, path)
        else:
            apply_overrides(raw, {key: value})
    _resolve_teachers(raw, path)
    return checked(Config, raw, str(path))


def checked(section: type[S], raw: Any, name: str) -> S:
    """The section that these values make. Raises ConfigError, beginning with `name`, for all that is wrong in them."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, section)}") from None


def _find(source: str | Path, given: str = "--config", folder: Path = Path()) -> Path:
    """A file, by its path from `folder`, or a preset, by its name."""
    for path in (folder / source, PRESETS / f"{source}.yaml"):
        if _is_there(path):
            return path.resolve()
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"{given} {str(source)[:200]}: no such file; give a YAML file, or one of the presets {names}")


def _is_there(path: Path) -> bool:
    """Whether it is no folder: what kind of file it is, reading it tells."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # a name too long to be one
        return False


def _compose(path: Path, named: bool = False) -> dict[str, Any]:
    """The file's mapping laid over its bases'. `named`: by a configuration, and not by the user."""
    whole: dict[str, Any] = {}
    for file, raw in _layers(path, named=named):
        whole = _laid_over(whole, raw, file)
    return whole


def _layers(path: Path, above: tuple[Path, ...] = (), named: bool = False) -> list[tuple[Path, dict[str, Any]]]:
    """The mappings that make up a configuration, the lowest first, and the files that they are from."""
    if path in above:
        raise ConfigError(f"{path}: `base` lines lead back to the file itself: {' -> '.join(map(str, above))}")
    if len(above) > MOST_LAYERS:
        raise ConfigError(f"{path}: base: leads to more than {MOST_LAYERS} files")
    try:
        raw = read_yaml(read_plain(path, MOST_BYTES).decode(), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {type(raw).__name__}")
    if (above or named) and len(strange := raw.keys() - _KNOWN_KEYS) > len(raw) / 2:
        raise ConfigError(
            f"{above[-1] if above else 'configuration'}: {path} is no configuration: {len(strange)} of its {len(raw)} "
            "keys are none of one"
        )
    base = raw.pop("base", None)
    bases = base if isinstance(base, list) else [] if base is None else [base]
    if not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{path}: base: expected a file's or a preset's name, or a list of them")
    layers: list[tuple[Path, dict[str, Any]]] = []
    for name in bases:
        layers += _layers(_find(name, f"{path}: base:", path.parent), (*above, path))
        if len(layers) > MOST_LAYERS:
            raise ConfigError(f"{path}: base: leads to more than {MOST_LAYERS} files")
    return [*layers, (path, raw)]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, mapping by mapping; every other value replaces.

    So does a parameter of a search, and a label weight: half of one kind and half of another would be none.
    """
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if (
            isinstance(old, Mapping)
            and isinstance(value, Mapping)
            and key != "label_weight"
            and not set(value) & set(KINDS)
        ):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def network_preset(name: str, beside: Path | None = None) -> dict[str, Any]:
    """Model and front end of a student's or a teacher's preset, or of a YAML file. Raises ConfigError."""
    raw = preset("network", name, ("students", "teachers"), beside)
    raw = _mapping(raw.get("student", raw), f"{name}: student")  # of a whole configuration, as a search's best
    return {key: raw[key] for key in _NETWORK if key in raw}


def preset(kind: str, name: str, folders: Sequence[str], beside: Path | None = None) -> dict[str, Any]:
    """The mapping of a YAML file, or of the one with this name in a folder `beside` or among the packaged presets."""
    if Path(name).suffix:
        if not _is_there(Path(name)):
            raise ConfigError(f"{name}: no such file")
        return _compose(Path(name).resolve(), named=kind in ("network", "recipe", "search"))
    places = [parent / folder for parent in (beside, PRESETS) if parent is not None for folder in folders]
    known = {file.stem: file for place in reversed(places) for file in place.glob("*.yaml")}
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"{name}: no such {kind}; {hint}known: {', '.join(sorted(known))}")
    return _compose(known[name])


_NETWORK = ("model", "frontend")
# What a preset takes the place of; of the distillation the soft target stays.
_PRESET_KEYS = {
    "student.preset": _NETWORK,
    "student.recipe": ("augment", "optimizer", "balance"),
    "sweep.preset": ("space",),
}


def _laid_over(below: Mapping[str, Any], above: dict[str, Any], path: Path) -> dict[str, Any]:
    """`merged`, with the presets named above in place of those sections below.

    A search's space replaces that below, as a whole: half of two spaces would be a third one.
    """
    if (
        isinstance(searched := above.get("sweep"), Mapping)
        and "space" in searched
        and isinstance(below.get("sweep"), Mapping)
    ):
        below = {**below, "sweep": {key: own for key, own in below["sweep"].items() if key != "space"}}
    result = merged(below, above)
    for place, sections in _PRESET_KEYS.items():
        section, _, key = place.partition(".")
        if not isinstance(new := above.get(section), Mapping) or (name := new.get(key)) is None:
            continue
        if place == "student.preset":
            taken = network_preset(str(name), path.parent)
        elif place == "student.recipe":
            taken = preset("recipe", str(name), ("recipes",), path.parent)
        else:
            taken = preset("search", str(name), ("sweep",), path.parent)
        kept = {k: value for k, value in result[section].items() if k != key and k not in sections}
        own = {k: value for k, value in new.items() if k in (*taken, *sections)}
        result[section] = merged(merged(kept, taken), own)
    return result


def _resolve_teachers(raw: dict[str, Any], path: Path) -> None:
    """Replace `systems` (names of recipe files) and `override` (changes by the model's name) by the recipes."""
    teachers = raw.get("teachers")
    if not isinstance(teachers, dict):
        return
    systems = teachers.pop("systems", None)
    override = teachers.pop("override", None)
    override = {} if override is None else _mapping(override, f"{path}: teachers.override")
    for name, changes in override.items():
        _mapping(changes, f"{path}: teachers.override.{name}")
    if systems is None:
        return
    if not isinstance(systems, list) or not all(isinstance(name, str) for name in systems):
        raise ConfigError(f"{path}: teachers.systems: expected a list of names, found {systems!r}")
    if len(set(systems)) < len(systems):
        raise ConfigError(f"{path}: teachers.systems: a name occurs twice: {', '.join(sorted(systems))}")
    recipes = {}
    for name in systems:
        file = _teacher_file(name, path)
        recipe = _compose(file)
        model = str(_mapping(recipe.get("model", {}), f"{file}: model").get("name"))
        recipes[name] = merged(recipe, override.get(model, {}))
    if unknown := sorted(set(override) - set(NETWORKS)):
        raise ConfigError(f"{path}: teachers.override.{unknown[0]}: unknown model; allowed: {', '.join(NETWORKS)}")
    teachers["recipes"] = merged(recipes, _mapping(teachers.get("recipes", {}), f"{path}: teachers.recipes"))


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a mapping of keys to values, found {type(value).__name__}")
    return value


def _teacher_file(name: str, path: Path) -> Path:
    if Path(name).name != name:
        raise ConfigError(f"{path}: teachers.systems: {printable(name)[:100]}: expected names, and no paths")
    folders = (path.parent / "teachers", PRESETS / "teachers")
    for folder in folders:
        if _is_there(folder / f"{name}.yaml"):
            return folder / f"{name}.yaml"
    known = sorted({file.stem for folder in folders for file in folder.glob("*_*.yaml")} - {"cp_resnet"})
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise ConfigError(f"{path}: teachers.systems: unknown teacher {name!r}; {hint}known: {', '.join(known)}")
