"""Write docs/configuration.md: every key of a configuration and every preset, from `asc_ray.config.reference`.

python docs/configuration.py
"""

import re
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from asc_ray.config.reference import COMPOSING, KINDS, Key, Sections, presets

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """# Configuration

<!-- `make docs` writes this page (docs/configuration.py). Change the sections' descriptions in asc_ray/ instead. -->

A configuration is YAML, or `--set KEY=VALUE` on the command line. The tables have every key with what it may be and its
default, which holds where neither your file nor a preset below it has the key. A key without a default must be given.
In a key, `NAME` stands for a name of your choice and `N` for a position in a list. `asc-ray config keys` prints them,
and `asc-ray config show` every value of a configuration and where it comes from.

## Files that build on others

These keys are read before all others, and take parts of the configuration from other files.

| key | allowed | meaning |
|---|---|---|
"""


def page() -> str:
    return HEAD + "".join(composing()) + "".join(sections()) + "".join(lists_of_presets())


def composing() -> Iterator[str]:
    for key in COMPOSING:
        allowed = re.sub(r"presets?\b(?!')", r"[\g<0>](#presets)", key.allowed)
        yield f"| `{key.key}` | {allowed} | {key.meaning} |\n"


class Page(Sections):
    """The sections by their class, with the key under which the page describes each."""

    def __init__(self) -> None:
        super().__init__()
        # The shortest key that leads to a class is where it is described; others refer to it.
        self.home: dict[str, str] = {}
        queue = deque(self.below("", self.root))
        while queue:
            key, name = queue.popleft()
            if name not in self.home:
                self.home[name] = key
                queue.extend(self.below(key, self.classes[name]))

    def larger(self, name: str) -> str | None:
        """Return another class that has all fields of this one and more."""
        own = self.classes[name]["properties"].items()
        return next((other for other, schema in self.classes.items() if own < schema["properties"].items()), None)

    def heading(self, name: str) -> str:
        """Return the key of a section; of several that it may be, with what tells them apart."""
        key = self.home[name]
        if sum(home == key for home in self.home.values()) == 1:
            return f"`{key}`"
        return f"`{key}` with {self.kind(name)}"

    def link(self, name: str) -> str:
        """Return a link to where the keys of a class are described."""
        if (larger := self.larger(name)) is None:
            heading = self.heading(name)
            anchor = re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
            return f"[{self.kind(name) if ' with ' in heading else 'keys'}](#{anchor})"
        fewer = [f for f in self.classes[larger]["properties"] if f not in self.classes[name]["properties"]]
        return f"{self.link(larger)}, without {', '.join(f'`{field}`' for field in fewer)}"


def sections() -> Iterator[str]:
    all_of = Page()
    yield "\n## All sections\n" + _table(all_of.keys("", all_of.root, all_of.link))
    for key, name in all_of.below("", all_of.root):
        yield from _section(all_of, key, name)


def _section(all_of: Page, key: str, name: str) -> Iterator[str]:
    if all_of.home[name] != key or all_of.larger(name):
        return
    section = all_of.classes[name]
    level = "#" * (3 if "." in key else 2)
    table = _table(all_of.keys(key, section, all_of.link))
    yield f"\n{level} {all_of.heading(name)}\n\n{section.get('description', '')}\n{table}"
    for below, other in all_of.below(key, section):
        yield from _section(all_of, below, other)


def _table(keys: Iterable[Key]) -> str:
    lines = ["", "| key | allowed | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        cells = (f"`{key.key}`", key.allowed, key.default, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def lists_of_presets() -> Iterator[str]:
    yield "\n## Presets\n"
    for folder, title in KINDS.items():
        yield f"\n{title}:\n\n" + "".join(f"* `{name}`: {about}\n" for name, about in presets(folder).items())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
