"""Loss curves and keys of today: whoever changes one has to say so, by `make golden`."""

import pytest
from reference import RENEW, golden
from tiny import curves, keys


def test_tiny_recipes_have_the_losses_that_they_had():
    """On the machine that made the file the numbers are equal.

    On a CPU with other instructions losses differ by up to 2e-7; those of int8 by more, because it rounds in steps.
    """
    before, now = golden("curves"), curves()
    assert before.keys() == now.keys()
    for kind, losses in before.items():
        assert now[kind] == pytest.approx(losses, rel=1e-3 if kind.startswith("int8") else 1e-5), f"{kind}: {RENEW}"


def test_artifacts_of_earlier_versions_are_recognized(tmp_path):
    before, now = golden("keys"), keys(tmp_path)
    assert before.keys() == now.keys()
    for name, places in before.items():
        assert now[name] == places, f"{name}: {RENEW}"
