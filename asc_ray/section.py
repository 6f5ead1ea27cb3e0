"""The base of every typed configuration section."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Frozen, and closed: an unknown key is an error, so a misspelled option never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
