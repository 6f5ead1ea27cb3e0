"""Every key of a configuration, read from the sections' own JSON schema, and every preset with what it is."""

import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from asc_ray.config.composition import PRESETS
from asc_ray.config.configuration import Config
from asc_ray.config.yaml_text import read_yaml
from asc_ray.errors import ConfigError

Schema = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """A key, what it may be, its default as YAML has it, and its meaning; as Markdown.

    `default` is empty for a key that must be given, and for a section. `of` tells the sections apart that a key may be,
    as in `name: passt`.
    """

    key: str
    allowed: str
    default: str
    meaning: str
    required: bool = False
    of: str = ""


# These are read before all others, and take parts of the configuration from other files.
COMPOSING = (
    Key("base", "a preset's name, a file, or a list of them", "", "The file is laid over these, mapping by mapping."),
    Key(
        "teachers.systems",
        "list of teachers' presets, of names of files `teachers/NAME.yaml` beside the file, of files of logits, and of "
        "networks of your own code",
        "",
        "Recipes become `teachers.recipes`; `{name: NAME, logits: FILE}` becomes `teachers.imported.NAME`; in "
        "`{name: NAME, module: PACKAGE.MODULE:FUNCTION}` the other keys are a recipe's.",
    ),
    Key(
        "teachers.override.MODEL",
        "keys of a recipe",
        "",
        "They change the recipes of all systems with this `model.name`.",
    ),
    Key("student.preset", "a student's preset, or a file", "", "It gives `student.model` and `student.frontend`."),
    Key(
        "student.recipe",
        "a recipe's preset, or a file",
        "",
        "It gives `student.augment`, `student.optimizer`, `student.balance` and `student.distillation` without the "
        "soft target.",
    ),
    Key("sweep.preset", "a search's preset, or a file", "", "It gives `sweep.space`."),
)


class Sections:
    """The JSON schemas of the whole configuration (`root`) and of its sections, by their class."""

    def __init__(self) -> None:
        self.root = Config.model_json_schema()
        self.classes: dict[str, Schema] = self.root.pop("$defs")

    def below(self, key: str, section: Schema) -> Iterator[tuple[str, str]]:
        """Yield (key, class) of the sections that this one holds."""
        for field, schema in section["properties"].items():
            yield from references(schema, f"{key}.{field}".lstrip("."))

    def kind(self, name: str) -> str:
        """Return what tells a section from the others that its key may be."""
        fields = self.classes[name]["properties"]
        constant = [f"{field}: {schema['const']}" for field, schema in fields.items() if "const" in schema]
        return constant[0] if constant else ", ".join(fields)

    def keys(self, key: str, section: Schema, refer: Callable[[str], str], of: str = "") -> Iterator[Key]:
        """Yield the keys of one section; `refer` says of a class that a key holds such a section."""
        for field, schema in section["properties"].items():
            yield Key(
                f"{key}.{field}".lstrip("."),
                _allowed(schema, refer),
                _default(schema["default"]) if "default" in schema else "",
                _sentence(schema.get("description") or self._first_sentence(schema)),
                field in section.get("required", ()),
                of,
            )

    def all_keys(self) -> Iterator[Key]:
        """Yield every key, each section behind the key that holds it, and first those that compose a configuration."""
        yield from COMPOSING
        yield from self._all("", self.root, "")

    def _all(self, key: str, section: Schema, of: str) -> Iterator[Key]:
        for own, schema in zip(
            self.keys(key, section, lambda name: "section", of), section["properties"].values(), strict=True
        ):
            yield own
            held = list(references(schema, own.key))
            for where, name in held:
                several = sum(other == where for other, _ in held) > 1
                yield from self._all(where, self.classes[name], self.kind(name) if several else of)

    def _first_sentence(self, schema: Schema) -> str:
        """Return that of the section that this key holds, if it is one."""
        names = [name for _, name in references(schema, "")]
        return _until_full_stop(self.classes[names[0]].get("description", "")) if len(names) == 1 else ""


def find_keys(below: str) -> list[Key]:
    """Return this key and those below it, all for an empty text; a name or a number stands for NAME or N.

    Raises ConfigError where there is no such key.
    """
    asked, everything = below.split(".") if below else [], list(Sections().all_keys())

    def matches(key: str) -> bool:
        own = key.split(".")
        return len(own) >= len(asked) and all(
            word == part or part in ("NAME", "N", "MODEL") for word, part in zip(asked, own, strict=False)
        )

    if found := [key for key in everything if matches(key.key)]:
        return found
    close = difflib.get_close_matches(below, [key.key for key in everything], 1)
    raise ConfigError(
        f"{below}: no such key; " + (f"did you mean {close[0]}?" if close else "see `asc-ray config keys`")
    )


def references(schema: Schema, key: str) -> Iterator[tuple[str, str]]:
    """Yield (key, class) of the sections that a key may hold, in lists and mappings, too."""
    if "$ref" in schema:
        yield key, schema["$ref"].rpartition("/")[2]
    for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from references(each, key)
    if isinstance(each := schema.get("additionalProperties"), dict):
        yield from references(each, f"{key}.NAME")
    if isinstance(each := schema.get("items"), dict):
        yield from references(each, f"{key}.N")


def _sentence(text: str) -> str:
    """Return the text with a capital letter and a full stop."""
    if re.match(r"[a-z-]+[ ,;:]", text):
        text = text[0].upper() + text[1:]
    return f"{text}." if text and not text.endswith(".") else text


def _default(value: Any) -> str:
    """Return the value as YAML has it; a section's default is that of its keys."""
    if isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _until_full_stop(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", text)[0].replace("\n", " ")


def _allowed(schema: Schema, refer: Callable[[str], str]) -> str:
    if "$ref" in schema:
        return refer(schema["$ref"].rpartition("/")[2])
    if union := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(_allowed(each, refer) for each in union))
    if "prefixItems" in schema:
        return f"[{', '.join(_allowed(each, refer) for each in schema['prefixItems'])}]"
    if "items" in schema:
        return f"list of {_allowed(schema['items'], refer)}{_bounds(schema)}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"names, each with {_allowed(values, refer)}"
    return _one_value(schema)


def _one_value(schema: Schema) -> str:
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    if "pattern" in schema:
        return f"text of the form `{schema['pattern']}`"
    kinds = {"integer": "whole number", "boolean": "`true` or `false`", "null": "`null`", "object": "mapping"}
    kinds |= {"number": "number", "string": schema.get("format", "text").replace("path", "file or folder")}
    return kinds[schema["type"]] + _bounds(schema)


BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
BOUNDS |= {"minItems": "at least", "maxItems": "at most"}


def _bounds(schema: Schema) -> str:
    found = [f"{word} {schema[bound]:g}" for bound, word in BOUNDS.items() if bound in schema]
    return f" ({', '.join(found)})" if found else ""


# Folders of presets, and what is said above each list.
KINDS = {
    ".": "Whole configurations, for `--config` and `base`",
    "corpora": "Public corpora, for `--config corpora/NAME` and `base`",
    "students": "Students' networks, for `student.preset`",
    "recipes": "Recipes, for `student.recipe`",
    "teachers": "Teachers, for `teachers.systems`",
    "sweep": "Spaces of a search, for `sweep.preset`",
    "tables": "Tables, for `asc-ray table`",
    "figures": "Figures, for `asc-ray figure`",
}


def presets(folder: str) -> dict[str, str]:
    """Return what each preset in a folder of KINDS is, by its name: its title, or the first sentence of its comment, or
    what it is laid over and how it differs."""
    return {file.stem: _about(file) for file in sorted((PRESETS / folder).glob("*.yaml"))}


def _about(file: Path) -> str:
    text = file.read_text(encoding="utf-8")
    content = read_yaml(text, str(file))
    if "title" in content:
        return f"{content['title']}."
    if comment := re.match(r"(#.*\n)+", text):
        return _until_full_stop(re.sub(r"^# ?", "", comment[0], flags=re.M).strip())
    below = content.pop("base").removesuffix(".yaml")
    return f"`{below}` with `{yaml.safe_dump(content, default_flow_style=True, width=1000).strip()}`."
