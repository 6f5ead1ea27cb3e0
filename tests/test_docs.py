"""The pages say what is so: links, keys, presets, commands and modules exist, and the reference is current."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from asc_ray.cli import app
from asc_ray.config.composition import PRESETS
from asc_ray.config.reference import KINDS, Sections, references

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# What the commands, keys and presets of today are read from; a changelog and a journal tell of those of their day.
CURRENT = [page for page in PAGES if page.name not in ("CHANGELOG.md", "journal.md", "configuration.md")]
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.M | re.S)
FILES = ("json", "yaml", "csv", "onnx", "py", "md", "db", "html")

_spec = importlib.util.spec_from_file_location("docs_configuration", ROOT / "docs" / "configuration.py")
assert _spec is not None
assert _spec.loader is not None
reference: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

REFERENCE = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
KEYS = set(re.findall(r"^\| `([\w.]+)`", REFERENCE, re.M))


def code_of(page: Path) -> str:
    """Its fenced blocks but those of Python, and what it has between backticks, each on lines of its own."""
    found = CODE.findall(page.read_text(encoding="utf-8"))
    return "\n".join(code.strip("`") for code in found if not code.startswith("```python"))


def anchors(page: Path) -> set[str]:
    """Of the page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """The targets of the page's relative links that are no file, or no heading of one."""
    broken = []
    for target in re.findall(r"\]\(\s*([^)\s]+)\s*\)", CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def is_key(key: str) -> bool:
    """Whether a configuration has it. Keys of recipes and of resources are described at one of their places alone."""
    key = re.sub(r"^teachers\.(override|recipes)\.\w+\.", "student.", key)
    key = re.sub(r"^teachers\.resources_for\.\w+", "teachers.resources", key)
    return key in KEYS or key in ("teachers.override", "teachers.override.NAME") or key.startswith("sweep.space.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A title, with `code`\n```sh\n# no heading\n```\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-title-with-code) [c](https://x.org/y) `[d](no.md)`\n"
        "[e](missing.md) [f](other.md#no-heading) [g](#nowhere)\n"
    )
    assert broken_links(page) == ["missing.md", "other.md#no-heading", "#nowhere"]


def test_the_reference_is_current():
    assert reference.page() == REFERENCE, "docs/configuration.md is old: run python docs/configuration.py"


def test_every_key_is_described():
    """By a description of its own, or in its section's docstring; a key that holds a section, by that one's."""
    sections = Sections()
    assert len(sections.classes) > 20
    missing = []
    for name, section in {"Config": sections.root, **sections.classes}.items():
        docstring = section.get("description", "")
        for field, schema in section["properties"].items():
            held = [other for _, other in references(schema, field)]
            if not (
                schema.get("description")
                or "const" in schema
                or re.search(rf"`[^`]*\b{field}\b[^`]*`", docstring)
                or (held and all(sections.classes[other].get("description") for other in held))
            ):
                missing.append(f"{name}.{field}")
    assert missing == []


def test_the_reference_has_every_kind_of_preset():
    folders = {str(file.parent.relative_to(PRESETS)) for file in PRESETS.rglob("*.yaml")}
    assert folders == set(KINDS)


@pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.name)
def test_keys_presets_and_commands_exist(page):
    code = code_of(page)
    sections = "|".join(sorted({key.partition(".")[0] for key in KEYS}))
    keys = re.findall(rf"(?:^|--set )((?:{sections})(?:\.\w+)+)", code, re.M)
    assert [key for key in keys if not is_key(key) and not key.endswith(FILES)] == []

    named = re.findall(r"(?:--config |CONFIG=|^base: )([a-z][\w-]*)(?![\w./-])", code, re.M)
    assert [name for name in named if not (PRESETS / f"{name}.yaml").is_file()] == []
    for key, folder in (("student.preset", "students"), ("student.recipe", "recipes"), ("sweep.preset", "sweep")):
        named = re.findall(rf"{re.escape(key)}[=:] ?(\w+)", code)
        assert [name for name in named if not (PRESETS / folder / f"{name}.yaml").is_file()] == []

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    used = re.findall(r"(?:^|[/|] ?)asc-ray ([a-z]\w*)", code, re.M)
    assert [name for name in used if name not in commands] == []


def test_the_python_api_is_there():
    paths = re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(paths) > 5
    for path in paths:
        module, _, name = path.rpartition(".")
        assert getattr(importlib.import_module(module), name).__doc__, f"{path} has no docstring"
