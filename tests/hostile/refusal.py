"""How hostile input is answered."""

from collections.abc import Callable

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
