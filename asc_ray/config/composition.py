"""One frozen configuration from YAML files and dotted overrides.

A file may begin with `base: other.yaml` (relative to itself, or a preset's name), or with a list of several. It is
merged over them, mapping by mapping.

Three keys take sections from presets, which replace those of the files below; other keys beside them change the preset:

* `student.preset: NAME` takes a network and its front end from `students/NAME.yaml`.
* `student.recipe: NAME` takes augmentation, optimizer, balance and distillation without the soft target from
  `recipes/NAME.yaml`.
* `sweep.preset: NAME` takes the space of the search from `sweep/NAME.yaml`.

`teachers.systems` names recipe files `teachers/NAME.yaml` beside the configuration or among the packaged presets.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from asc_ray.config.configuration import Config
from asc_ray.config.explain import explain
from asc_ray.config.overrides import apply_overrides
from asc_ray.config.yaml_text import MOST_BYTES, read_yaml
from asc_ray.errors import ConfigError
from asc_ray.files import read_plain
from asc_ray.models.config import NETWORK_NAMES
from asc_ray.search.config import KINDS, SweepConfig
from asc_ray.section import Section
from asc_ray.shown import printable
from asc_ray.students.config import StudentConfig
from asc_ray.training.config import Recipe

MOST_LAYERS = 64  # files that a configuration is made of
_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has the presets inside the package, a checkout beside it.
PRESETS = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"


S = TypeVar("S", bound=Section)


# A `base:` may name any file by mistake; no message may show what such a file holds.
_KNOWN_KEYS = {"base"}.union(*(section.model_fields for section in (Config, Recipe, StudentConfig, SweepConfig)))


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, or a packaged preset by its name, and apply `key.path=value` overrides.

    Raises ConfigError naming the file or the key's path, what was found and what is allowed.
    """
    path = find(source)
    raw: dict[str, Any] = {}
    for _, _, raw in steps(path, overrides):  # noqa: B007
        pass
    _resolve_teachers(raw, path)
    return checked(Config, raw, str(path))


def steps(path: Path, overrides: Sequence[str]) -> Iterator[tuple[Path | None, dict[str, Any], dict[str, Any]]]:
    """Yield for each file of a configuration, the lowest first, and then for each override: the file, or None; its own
    values; and the configuration up to there, before the recipes of `teachers.systems` are read."""
    raw: dict[str, Any] = {}
    for file, of_file in layers(path):
        raw = _laid_over(raw, of_file, file)
        yield file, of_file, raw
    # Presets come first, because the other overrides change them.
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in _PRESET_KEYS):
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {override}: expected KEY.PATH=VALUE, as in --set student.optimizer.epochs=20")
        value = read_yaml(text, f"--set {key}")
        own: dict[str, Any] = {}
        apply_overrides(own, {key: value})
        if key in _PRESET_KEYS:
            raw = _laid_over(raw, own, path)
        else:
            apply_overrides(raw, {key: value})
        yield None, own, raw


def checked(section: type[S], raw: Any, name: str) -> S:
    """Return the section with these values. Raises ConfigError that begins with `name` and lists every mistake."""
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{name}: {explain(error, section)}") from None


def find(source: str | Path, given: str = "--config", folder: Path = Path()) -> Path:
    """Return the path of a file, relative to `folder`, or of the preset with this name. Raises ConfigError."""
    for path in (folder / source, PRESETS / f"{source}.yaml"):
        if _is_there(path):
            return path.resolve()
    names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
    raise ConfigError(f"{given} {str(source)[:200]}: no such file; give a YAML file, or one of the presets {names}")


def _is_there(path: Path) -> bool:
    """Whether the path exists and is not a folder; reading refuses other kinds of files."""
    try:
        return path.exists() and not path.is_dir()
    except OSError:  # the name is too long for a path
        return False


def _compose(path: Path, named: bool = False) -> dict[str, Any]:
    """Return the file's mapping laid over its bases'. `named`: a configuration names the file, not the user."""
    whole: dict[str, Any] = {}
    for file, raw in layers(path, named=named):
        whole = _laid_over(whole, raw, file)
    return whole


def layers(path: Path, above: tuple[Path, ...] = (), named: bool = False) -> list[tuple[Path, dict[str, Any]]]:
    """Return the mappings that make up a configuration, the lowest first, each with its file."""
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
    below: list[tuple[Path, dict[str, Any]]] = []
    for name in bases:
        below += layers(find(name, f"{path}: base:", path.parent), (*above, path))
        if len(below) > MOST_LAYERS:
            raise ConfigError(f"{path}: base: leads to more than {MOST_LAYERS} files")
    return [*below, (path, raw)]


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `above` laid over `below`, mapping by mapping; every other value replaces the one below.

    A search's parameter and a label weight replace as a whole, because keys of two kinds do not go together.
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
    """Return the model and front end of a student's or a teacher's preset, or of a YAML file. Raises ConfigError."""
    raw = preset("network", name, ("students", "teachers"), beside)
    raw = _mapping(raw.get("student", raw), f"{name}: student")  # a whole configuration, such as a search's best.yaml
    return {key: raw[key] for key in _NETWORK if key in raw}


def preset(kind: str, name: str, folders: Sequence[str], beside: Path | None = None) -> dict[str, Any]:
    """Return the mapping of a YAML file, or of the preset with this name.

    Presets are looked for in the `folders` beside the configuration (`beside`), then among the packaged ones.
    """
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
# The sections that each preset replaces. Distillation is merged instead, so that the soft target stays.
_PRESET_KEYS = {
    "student.preset": _NETWORK,
    "student.recipe": ("augment", "optimizer", "balance"),
    "sweep.preset": ("space",),
}


def _laid_over(below: Mapping[str, Any], above: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return `merged`, with the presets that `above` names in place of their sections in `below`.

    A search's space replaces the one below as a whole, because a mix of two spaces would be a third one.
    """
    if (
        isinstance(searched := above.get("sweep"), Mapping)
        and "space" in searched
        and isinstance(below.get("sweep"), Mapping)
    ):
        below = {**below, "sweep": {key: own for key, own in below["sweep"].items() if key != "space"}}
    result = merged(below, above)
    for place, taken in presets_of(above, path).items():
        section, _, key = place.partition(".")
        replaced = _PRESET_KEYS[place]
        kept = {k: value for k, value in result[section].items() if k != key and k not in replaced}
        own = {k: value for k, value in above[section].items() if k in (*taken, *replaced)}
        result[section] = merged(merged(kept, taken), own)
    return result


def presets_of(values: Mapping[str, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Return what the presets have that `values`, of the file `path`, name, by the key that names each."""
    found = {}
    for place in _PRESET_KEYS:
        section, _, key = place.partition(".")
        if not isinstance(own := values.get(section), Mapping) or (name := own.get(key)) is None:
            continue
        if place == "student.preset":
            found[place] = network_preset(str(name), path.parent)
        elif place == "student.recipe":
            found[place] = preset("recipe", str(name), ("recipes",), path.parent)
        else:
            found[place] = preset("search", str(name), ("sweep",), path.parent)
    return found


def _resolve_teachers(raw: dict[str, Any], path: Path) -> None:
    """Replace `systems` (names of recipe files, files of logits, modules) and `override` by `recipes`, `imported`."""
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
    if not isinstance(systems, list) or not all(isinstance(_system(one), str) for one in systems):
        raise ConfigError(
            f"{path}: teachers.systems: expected a list of names, of {{name: NAME, logits: FILE}} or of {{name: NAME, "
            f"module: PACKAGE.MODULE:FUNCTION}}, found {systems!r}"
        )
    names = [_system(one) for one in systems]
    if len(set(names)) < len(names):
        raise ConfigError(f"{path}: teachers.systems: a name occurs twice: {', '.join(sorted(names))}")
    given = {_system(one): {k: v for k, v in one.items() if k != "name"} for one in systems if isinstance(one, dict)}
    own = {name: _own_recipe(values) for name, values in given.items() if "module" in values}
    files = {name: values for name, values in given.items() if name not in own}
    teachers["imported"] = merged(files, _mapping(teachers.get("imported", {}), f"{path}: teachers.imported"))
    recipes = {}
    for name in [name for name in names if name not in files]:
        file = path if name in own else teacher_file(name, path)
        recipe = own[name] if name in own else _compose(file)
        model = str(_mapping(recipe.get("model", {}), f"{file}: model").get("name"))
        recipes[name] = merged(recipe, override.get(model, {}))
    if unknown := sorted(set(override) - set(NETWORK_NAMES)):
        raise ConfigError(f"{path}: teachers.override.{unknown[0]}: unknown model; allowed: {', '.join(NETWORK_NAMES)}")
    teachers["recipes"] = merged(recipes, _mapping(teachers.get("recipes", {}), f"{path}: teachers.recipes"))


def _system(one: Any) -> Any:
    """Return the name of an entry of `teachers.systems`."""
    return one.get("name") if isinstance(one, dict) else one


def _own_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of an entry of `teachers.systems` that names a module."""
    recipe = {key: value for key, value in values.items() if key != "module"}
    return recipe | {"model": {"name": "module", "function": values["module"]}}


def _mapping(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: expected a mapping of keys to values, found {type(value).__name__}")
    return value


def teacher_file(name: str, path: Path) -> Path:
    """Return the recipe's file of a system that the configuration `path` names. Raises ConfigError."""
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
