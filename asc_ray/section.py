"""The base of every typed configuration section."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and closed: an unknown key is an error, so a misspelled option never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def absolute(path: Path) -> Path:
    """The path from the root, ~ read as a shell does. Raises ValueError for the home of nobody."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} is nobody's home; write the whole path") from None
