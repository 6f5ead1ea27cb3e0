"""Dotted keys, as in `--set` and in the space of a search."""

from collections.abc import Mapping
from typing import Any


def apply_overrides(raw: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys of nested mappings in place, and add the mappings that are missing."""
    for path, value in values.items():
        *parents, leaf = path.split(".")
        target = raw
        for part in parents:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[leaf] = value
