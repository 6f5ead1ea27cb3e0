"""Messages for people from pydantic's errors: the key, the value, what is allowed, and what was probably meant."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from asc_ray.audio.config import FRONT_END_KINDS
from asc_ray.models.config import NETWORK_NAMES
from asc_ray.section import Section
from asc_ray.shown import masked


def explain(error: ValidationError, root: type[Section]) -> str:
    """Return all findings on one line, each with the key's path below `root`, the value, and what is allowed."""
    lines = []
    found_at = [finding["loc"] for finding in error.errors()]
    for finding in error.errors():
        own = finding["loc"]
        # pydantic drops wrong items and then finds the list too short, which the user's list was not.
        if finding["type"] == "too_short" and any(own == other[: len(own)] for other in found_at if other != own):
            continue
        path = ".".join(str(part) for part in finding["loc"] if not _is_union_tag(part))
        message = finding["msg"].removeprefix("Value error, ")
        found = finding["input"]
        if finding["type"] == "extra_forbidden":
            allowed = [name for name in _allowed_keys(own[:-1], root) if name != own[-1]]
            close = difflib.get_close_matches(str(finding["loc"][-1]), allowed, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            lines.append(f"{path}: unknown key; allowed here: {', '.join(allowed)}{hint}")
        elif finding["type"] == "missing":
            lines.append(f"{path}: is required")
        elif finding["type"] == "too_short" and not found:
            lines.append(f"{path}: is empty; give at least {finding['ctx']['min_length']}")
        elif isinstance(found, str | int | float | bool | None):
            lines.append(f"{path}: found {masked(repr(found))}: {message[0].lower()}{message[1:]}")
        else:
            lines.append(f"{path}: {message}" if path else message)
    return "; ".join(lines)


def _is_union_tag(part: Any) -> bool:
    return (
        part in NETWORK_NAMES
        or part in FRONT_END_KINDS
        or bool(re.match(r"\(|constrained-|literal\[|function-|dict\[", str(part)))
    )


def _allowed_keys(loc: tuple[Any, ...], root: type[Section]) -> list[str]:
    """Return the field names of the section at `loc`, found by walking the annotations."""
    types: list[Any] = [root]
    for part in loc:
        if _is_union_tag(part):
            types = [t for t in types if _tag(t) == part] or types
            continue
        found: list[Any] = []
        for candidate in types:
            if part in candidate.model_fields:
                found += _sections(candidate.model_fields[part].annotation)
            else:  # a free name, such as a teacher's
                found.append(candidate)
        types = found
    return sorted({name for t in types if hasattr(t, "model_fields") for name in t.model_fields})


def _tag(section: Any) -> Any:
    field = section.model_fields.get("name") or section.model_fields.get("kind")
    return next(iter(get_args(field.annotation)), None) if field else None


def _sections(annotation: Any) -> list[Any]:
    """Return the section classes inside an annotation such as `A | B | None` or `dict[str, A]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [s for argument in getattr(annotation, "__args__", ()) for s in _sections(argument)]
