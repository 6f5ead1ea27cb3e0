"""Groups of devices: seen and unseen in training, and real."""

import re
from collections.abc import Iterable
from typing import Literal

Group = Literal["seen", "unseen", "real"]
SIMULATED = re.compile(r"s\d+")  # TAU22's names of simulated devices; any other name is a real one


def device_groups(train_devices: Iterable[str], test_devices: Iterable[str]) -> dict[Group, tuple[str, ...]]:
    """Return the test devices that occur in training, that do not, and that are not simulated (named s1, s2, ...).

    >>> device_groups(["a", "s1"], ["a", "s1", "s4"])
    {'seen': ('a', 's1'), 'unseen': ('s4',), 'real': ('a',)}
    """
    trained, tested = set(train_devices), sorted(set(test_devices))
    return {
        "seen": tuple(d for d in tested if d in trained),
        "unseen": tuple(d for d in tested if d not in trained),
        "real": tuple(d for d in tested if not SIMULATED.fullmatch(d)),
    }
