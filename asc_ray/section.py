"""The base of every typed configuration section."""

from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializationInfo, SerializerFunctionWrapHandler, model_serializer


class Section(BaseModel):
    """Frozen, and closed: an unknown key is an error, so a misspelled option never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    # Fields that came when artifacts were there already. With their default, which does what was done before, they are
    # in no key, and what was made before is recognized.
    later: ClassVar[frozenset[str]] = frozenset()

    def for_key(self) -> dict[str, Any]:
        """What a key is made of."""
        return self.model_dump(mode="json", context=_KEY)

    @model_serializer(mode="wrap")
    def _without_later(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values = handler(self)
        if info.context is _KEY:
            fields = type(self).model_fields
            return {k: v for k, v in values.items() if k not in self.later or getattr(self, k) != fields[k].default}
        return values


_KEY: dict[str, Any] = {}


def absolute(path: Path) -> Path:
    """The path from the root, ~ read as a shell does. Raises ValueError for the home of nobody."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} is nobody's home; write the whole path") from None
