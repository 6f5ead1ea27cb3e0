"""Where each value of a configuration comes from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from asc_ray.config.composition import PRESETS, find, layers, load_config, presets_of, steps, teacher_file
from asc_ray.errors import ConfigError
from asc_ray.search.config import Parameter
from asc_ray.section import Section
from asc_ray.shown import masked

Keys = tuple[str, ...]
DEFAULT = "default"
OVERRIDE = "--set"
SHORTEST, LONGEST = 40, 70  # columns of a value, where its origin stands beside it


def shown(source: str | Path, overrides: Sequence[str], below: str = "") -> str:
    """Return the configuration as YAML, with the origin of each value behind it; only what lies at the key `below`, and
    the keys that lead there, if that is given.

    The whole text is a configuration of the same values; only passwords in it are masked. Raises ConfigError.
    """
    config = load_config(source, overrides)
    found = origins(source, overrides)
    lines = [
        ("  " * (len(keys) - 1) + text, _origin_of(keys, olds, found) if leaf else "")
        for keys, olds, text, leaf in _lines(config, (), ())
        if f"{'.'.join(keys)}.".startswith(f"{below}." if below else "")
        or (not leaf and below.startswith(f"{'.'.join(keys)}."))
    ]
    if not any(origin for _, origin in lines):
        raise ConfigError(f"{below}: this configuration has no such key; `asc-ray config show` lists all of them")
    width = min(LONGEST, max(SHORTEST, *(len(line) for line, origin in lines if origin)))
    return "".join(f"{line:<{width}}  # {origin}\n" if origin else f"{line}\n" for line, origin in lines)


def origins(source: str | Path, overrides: Sequence[str]) -> dict[Keys, str]:
    """Return what gives each value that is not a default, by the value's keys from the root.

    That is a file, a preset, or `--set`. Lists are values, and so are empty mappings.
    """
    path = find(source)
    found: dict[Keys, str] = {}
    whole: dict[str, Any] = {}
    for file, own, whole in steps(path, overrides):
        new: dict[Keys, str] = {}
        for place, taken in presets_of(own, file or path).items():
            section, _, key = place.partition(".")
            new |= {(section, *keys): f"{place} {own[section][key]}" for keys in _leaves(taken)}
        new |= dict.fromkeys(_leaves(own), _named(file) if file else OVERRIDE)
        # What another preset or `sweep.space` has replaced is not in the whole any more.
        found = {keys: new.get(keys) or found[keys] for keys in _leaves(whole)}
    return _of_recipes(whole.get("teachers", {}), path, found) | found


def _of_recipes(teachers: Mapping[str, Any], path: Path, found: Mapping[Keys, str]) -> dict[Keys, str]:
    """Return the origins of what `teachers.systems` and `teachers.override` give to the recipes."""
    given: dict[Keys, str] = {}
    for name in teachers.get("systems", ()):
        if isinstance(name, dict):  # `found` has where it stands
            continue
        recipe: dict[Keys, str] = {}
        model = ""
        for file, own in layers(teacher_file(name, path)):
            recipe |= dict.fromkeys(_leaves(own), _named(file))
            model = own.get("model", {}).get("name", model)
        changes = ("teachers", "override", model)
        recipe |= {keys[3:]: origin for keys, origin in found.items() if keys[:3] == changes}
        given |= {("teachers", "recipes", name, *keys): origin for keys, origin in recipe.items()}
    return given


def _leaves(values: Any, above: Keys = ()) -> Iterator[Keys]:
    if isinstance(values, Mapping) and values:
        for key, value in values.items():
            yield from _leaves(value, (*above, key))
    else:
        yield above


def _named(file: Path) -> str:
    """Return a preset's name, or a file's path, as short as it leads there from here."""
    if file.is_relative_to(PRESETS):
        return f"preset {file.relative_to(PRESETS).with_suffix('')}"
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _lines(value: Any, keys: Keys, olds: Keys) -> Iterator[tuple[Keys, Keys, str, bool]]:
    """Yield (keys, keys as they were called before, text, whether it is a value) of each line of YAML below `keys`."""
    renamed: Mapping[str, str]
    if isinstance(value, Parameter):  # of its kinds, only the one that it is
        renamed, entries = {}, value.model_dump(mode="json", exclude_none=True)
    elif isinstance(value, Section):
        renamed = value.renamed
        plain = value.model_dump(mode="json")
        entries = {key: _within(getattr(value, key), plain[key]) for key in type(value).model_fields}
    else:
        renamed, entries = {}, value
    for key, entry in entries.items():
        own, old = (*keys, key), (*olds, renamed.get(key, key))
        name = yaml.safe_dump(key).splitlines()[0]
        if isinstance(entry, Section | Mapping) and (isinstance(entry, Section) or entry):
            yield own, old, f"{name}:", False
            yield from _lines(entry, own, old)
        else:
            text = yaml.safe_dump(entry, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
            yield own, old, f"{name}: {masked(text)}", True


def _within(value: Any, plain: Any) -> Any:
    """Return a section, or a mapping of sections, as it is, and anything else in its JSON form."""
    if isinstance(value, Section):
        return value
    if isinstance(value, Mapping):
        return {key: _within(own, plain[key]) for key, own in value.items()}
    return plain


def _origin_of(keys: Keys, olds: Keys, found: Mapping[Keys, str]) -> str:
    """Return the origin of the value, or of the one that holds it."""
    for length in range(len(keys), 0, -1):
        for own in (keys[:length], olds[:length]):
            if own in found:
                return found[own]
    return DEFAULT
