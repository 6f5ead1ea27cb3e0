"""How hostile input is put into place, and how it is answered."""

from collections.abc import Callable
from pathlib import Path

import pytest

from asc_ray.errors import UserError


def refused(call: Callable[[], object], *words: str, code: int = 1) -> str:
    """Have the call refused with this exit code, by a short message that has all the words; returns it."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert caught.value.exit_code == code, message
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 3000
    assert len(message.splitlines()) <= 8
    return message


def sparse(path: Path) -> None:
    """20 GB that take no room."""
    with path.open("wb") as file:
        file.truncate(20 << 30)


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A damage: what `make` makes, in place of this file of a folder."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage
