"""The base of every typed configuration section."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Section(BaseModel):
    """A frozen section, in which an unknown key is an error, so a misspelled option never passes silently."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    # Fields that were added when artifacts existed already. Their default does what was done before, and with it they
    # are in no key, so that older artifacts are still found.
    later: ClassVar[frozenset[str]] = frozenset()
    # Fields that were removed, with the value that did what is done now. Keys still hold them, and a configuration that
    # has this value is still read.
    gone: ClassVar[Mapping[str, Any]] = {}
    # Fields that were renamed: the present name and the old one. Keys have the old name, which is still read.
    renamed: ClassVar[Mapping[str, str]] = {}

    def for_key(self) -> dict[str, Any]:
        """Return the values that a key is made of."""
        return self.model_dump(mode="json", context=_KEY)

    @model_serializer(mode="wrap")
    def _for_key(self, handler: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values = handler(self)
        if info.context is _KEY:
            fields = type(self).model_fields
            values = {k: v for k, v in values.items() if k not in self.later or getattr(self, k) != fields[k].default}
            return {self.renamed.get(k, k): v for k, v in values.items()} | dict(self.gone)
        return values

    @model_validator(mode="before")
    @classmethod
    def _as_of_today(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        kept = {k: v for k, v in raw.items() if k not in cls.gone or v != cls.gone[k]}
        for name, old in cls.renamed.items():
            if old in kept and name not in kept:
                kept[name] = kept.pop(old)
        return kept


_KEY: dict[str, Any] = {}


def absolute(path: Path) -> Path:
    """Return the path from the root, with ~ read as a shell does. Raises ValueError for the home of an unknown user."""
    try:
        return path.expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{path.parts[0]} is nobody's home; write the whole path") from None
