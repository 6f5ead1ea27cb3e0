"""Write docs/configuration.md: every key of a configuration, from the sections' own JSON schema, and every preset.

python docs/configuration.py
"""

import json
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from asc_ray.config.configuration import Config

PAGE = Path(__file__).with_name("configuration.md")
PRESETS = Path(__file__).parents[1] / "configs"
Schema = dict[str, Any]

HEAD = """# Configuration

<!-- `make docs` writes this page (docs/configuration.py). Change the sections' descriptions in asc_ray/ instead. -->

A configuration is YAML, or `--set KEY=VALUE` on the command line. The tables have every key with what it may be and its
default, which holds where neither your file nor a preset below it has the key. A key without a default must be given.
In a key, `NAME` stands for a name of your choice and `N` for a position in a list.

## Files that build on others

These keys are read before all others, and take parts of the configuration from other files.

| key | allowed | meaning |
|---|---|---|
| `base` | a preset's name, a file, or a list of them | The file is laid over these, mapping by mapping. |
| `teachers.systems` | list of teachers' [presets](#presets), or names of files `teachers/NAME.yaml` beside the file | \
These recipes become `teachers.recipes`. |
| `teachers.override.MODEL` | keys of a recipe | They change the recipes of all systems with this `model.name`. |
| `student.preset` | a student's [preset](#presets), or a file | It gives `student.model` and `student.frontend`. |
| `student.recipe` | a recipe's [preset](#presets), or a file | It gives `student.augment`, `student.optimizer`, \
`student.balance` and `student.distillation` without the soft target. |
| `sweep.preset` | a search's [preset](#presets), or a file | It gives `sweep.space`. |
"""

# Folders of presets, and what is said above each list.
KINDS = {
    ".": "Whole configurations, for `--config` and `base`",
    "students": "Students' networks, for `student.preset`",
    "recipes": "Recipes, for `student.recipe`",
    "teachers": "Teachers, for `teachers.systems`",
    "sweep": "Spaces of a search, for `sweep.preset`",
    "tables": "Tables, for `asc-ray table`",
    "figures": "Figures, for `asc-ray figure`",
}


def page() -> str:
    return HEAD + "".join(sections()) + presets()


class Sections:
    """The sections of the configuration by their class, and the key under which each is described."""

    def __init__(self) -> None:
        self.root = Config.model_json_schema()
        self.classes: dict[str, Schema] = self.root.pop("$defs")
        # The shortest key that leads to a class is where it is described; others refer to it.
        self.home: dict[str, str] = {}
        queue = deque(self.below("", self.root))
        while queue:
            key, name = queue.popleft()
            if name not in self.home:
                self.home[name] = key
                queue.extend(self.below(key, self.classes[name]))

    def below(self, key: str, section: Schema) -> Iterator[tuple[str, str]]:
        """(key, class) of the sections that this one holds."""
        for field, schema in section["properties"].items():
            yield from references(schema, f"{key}.{field}".lstrip("."))

    def larger(self, name: str) -> str | None:
        """Another class that has all fields of this one and more."""
        own = self.classes[name]["properties"].items()
        return next((other for other, schema in self.classes.items() if own < schema["properties"].items()), None)

    def heading(self, name: str) -> str:
        """The key of a section; of several that it may be, with what tells them apart."""
        key = self.home[name]
        if sum(home == key for home in self.home.values()) == 1:
            return f"`{key}`"
        return f"`{key}` with {self.kind(name)}"

    def kind(self, name: str) -> str:
        """What tells a section from the others that its key may be."""
        fields = self.classes[name]["properties"]
        constant = [f"{field}: {schema['const']}" for field, schema in fields.items() if "const" in schema]
        return constant[0] if constant else ", ".join(fields)

    def link(self, name: str) -> str:
        """To where the keys of a class are described."""
        if (larger := self.larger(name)) is None:
            heading = self.heading(name)
            anchor = re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            return f"[{self.kind(name) if ' with ' in heading else 'keys'}](#{anchor})"
        fewer = [f for f in self.classes[larger]["properties"] if f not in self.classes[name]["properties"]]
        return f"{self.link(larger)}, without {', '.join(f'`{field}`' for field in fewer)}"


def references(schema: Schema, key: str) -> Iterator[tuple[str, str]]:
    if "$ref" in schema:
        yield key, schema["$ref"].rpartition("/")[2]
    for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from references(each, key)
    if isinstance(each := schema.get("additionalProperties"), dict):
        yield from references(each, f"{key}.NAME")
    if isinstance(each := schema.get("items"), dict):
        yield from references(each, f"{key}.N")


def sections() -> Iterator[str]:
    all_of = Sections()
    yield "\n## All sections\n" + _table(all_of, "", all_of.root)
    for key, name in all_of.below("", all_of.root):
        yield from _section(all_of, key, name)


def _section(all_of: Sections, key: str, name: str) -> Iterator[str]:
    if all_of.home[name] != key or all_of.larger(name):
        return
    section = all_of.classes[name]
    level = "#" * (3 if "." in key else 2)
    yield f"\n{level} {all_of.heading(name)}\n\n{section.get('description', '')}\n{_table(all_of, key, section)}"
    for below, other in all_of.below(key, section):
        yield from _section(all_of, below, other)


def _table(all_of: Sections, key: str, section: Schema) -> str:
    lines = ["", "| key | allowed | default | meaning |", "|---|---|---|---|"]
    for field, schema in section["properties"].items():
        default = _default(schema["default"]) if "default" in schema else ""
        meaning = _sentence(schema.get("description") or _first_sentence(all_of, schema))
        cells = (f"`{key}.{field}`".replace("`.", "`"), _allowed(all_of, schema), default, meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    if re.match(r"[a-z-]+[ ,;:]", text):
        text = text[0].upper() + text[1:]
    return f"{text}." if text and not text.endswith(".") else text


def _default(value: Any) -> str:
    """As YAML has it; a section's default is that of its keys."""
    if isinstance(value, dict):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _first_sentence(all_of: Sections, schema: Schema) -> str:
    """Of the section that this key holds, if it is one."""
    names = [name for _, name in references(schema, "")]
    if len(names) != 1:
        return ""
    return _until_full_stop(all_of.classes[names[0]].get("description", ""))


def _until_full_stop(text: str) -> str:
    return re.split(r"(?<=\.)\s+(?=[A-Z`])|\n\n", text)[0].replace("\n", " ")


def _allowed(all_of: Sections, schema: Schema) -> str:
    if "$ref" in schema:
        return all_of.link(schema["$ref"].rpartition("/")[2])
    if union := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_allowed(all_of, each) for each in union)
    if "prefixItems" in schema:
        return f"[{', '.join(_allowed(all_of, each) for each in schema['prefixItems'])}]"
    if "items" in schema:
        return f"list of {_allowed(all_of, schema['items'])}{_bounds(schema)}"
    if isinstance(values := schema.get("additionalProperties"), dict):
        return f"names, each with {_allowed(all_of, values)}"
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


def presets() -> str:
    lines = ["", "## Presets", ""]
    for folder, title in KINDS.items():
        lines += [f"{title}:", ""]
        lines += [f"* `{file.stem}`{_about(file)}" for file in sorted((PRESETS / folder).glob("*.yaml"))]
        lines.append("")
    return "\n".join(lines)


def _about(file: Path) -> str:
    """Its title, or the first sentence of its comment, or what it is laid over and how it differs."""
    text = file.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    if "title" in content:
        return f": {content['title']}."
    if comment := re.match(r"(#.*\n)+", text):
        return ": " + _until_full_stop(re.sub(r"^# ?", "", comment[0], flags=re.M).strip())
    below = content.pop("base").removesuffix(".yaml")
    return f": `{below}` with `{yaml.safe_dump(content, default_flow_style=True, width=1000).strip()}`."


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
