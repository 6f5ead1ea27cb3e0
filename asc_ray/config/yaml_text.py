"""YAML from untrusted files: only plain values, no key twice, and not more than a person writes."""

from typing import Any

import yaml

from asc_ray.errors import ConfigError
from asc_ray.shown import printable

MOST_BYTES = 1 << 20  # of a file
_MOST_DEPTH = 32
_MOST_NODES = 20_000  # with every alias written out
_TOO_MANY = f"more than {_MOST_NODES:,} values, with its aliases written out"
_LONGEST_NUMBER = 40  # characters


def read_yaml(text: str, name: str) -> Any:
    """Return the value of a YAML document. `name` says in messages where it is from.

    Raises ConfigError for text that is not YAML, a key that occurs twice, a value that contains itself, and aliases
    that expand to more values than a configuration has. Messages quote only keys of the text, because it may be any
    file, by mistake or not.
    """
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        if node is None:
            return None
        _size(node, name, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = (error.problem or "").partition("'")[0].partition('"')[0].strip(" ,(")
        raise ConfigError(f"{name}{place}: not valid YAML ({problem or 'not understood'})") from None
    except yaml.YAMLError:  # characters that YAML does not allow
        raise ConfigError(f"{name}: not valid YAML (characters that are no text)") from None
    # PyYAML's constructors do not check values such as 2026-13-45, a whole number of 5,000 digits or `!!bool perhaps`.
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError):
        raise ConfigError(f"{name}: a date, a number or another value in it is none") from None


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self._source, self._depth, self._nodes = name, 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._nodes += 1
        if self._depth > _MOST_DEPTH or self._nodes > _MOST_NODES:
            what = f"deeper than {_MOST_DEPTH} levels" if self._depth > _MOST_DEPTH else _TOO_MANY
            raise ConfigError(f"{self._source} line {self.peek_event().start_mark.line + 1}: {what}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_whole_number(self, node: Any) -> int:
        if len(node.value) > _LONGEST_NUMBER:
            raise ValueError
        value = self.construct_yaml_int(node)
        if abs(value) >= 1 << 64:
            raise ValueError
        return value

    def construct_text(self, node: Any) -> str:
        value = self.construct_yaml_str(node)
        if any(not c.isprintable() and c not in "\n\t" for c in value):
            line = node.start_mark.line + 1
            raise ConfigError(f"{self._source} line {line}: a text with control characters, which no value has")
        return value


_Loader.add_constructor("tag:yaml.org,2002:str", _Loader.construct_text)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)


def _size(node: Any, name: str, known: dict[int, int]) -> int:
    """Return how many values a node has, with every alias written out. Raises ConfigError if they are too many."""
    if id(node) in known:
        if not known[id(node)]:
            raise ConfigError(f"{name} line {node.start_mark.line + 1}: a value that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, name)
    below = [] if isinstance(node, yaml.ScalarNode) else node.value
    parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
    size = 1 + sum(_size(part, name, known) for part in parts)
    if size > _MOST_NODES:
        raise ConfigError(f"{name} line {node.start_mark.line + 1}: {_TOO_MANY}")
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode, name: str) -> None:
    """Raise ConfigError for a key that is not a word, or that occurs twice."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
            raise ConfigError(f"{name} line {line}: a key that is no word; write words, or put it in quotes")
        if key.value in lines:
            raise ConfigError(
                f"{name}: the key {printable(key.value)} is there twice, in line {lines[key.value]} and line {line}; "
                "keep one"
            )
        lines[key.value] = line
