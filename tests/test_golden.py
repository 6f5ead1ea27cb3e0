"""Loss curves and keys of today: whoever changes one has to say so, by `make golden`."""

import json

import pytest
from conftest import ROOT
from tiny import curves, keys

FILE = ROOT / "tests" / "golden" / "curves.json"
KEYS = ROOT / "tests" / "golden" / "keys.json"
RENEW = "if this was meant, renew the golden files with `make golden` and say why in the changelog"


def test_tiny_recipes_have_the_losses_that_they_had():
    """Another CPU or another torch rounds otherwise; on the machine that made the file the numbers are equal."""
    before, now = json.loads(FILE.read_text()), curves()
    assert before.keys() == now.keys()
    for kind, losses in before.items():
        assert now[kind] == pytest.approx(losses, rel=1e-3), f"{kind}: {RENEW}"


def test_artifacts_of_earlier_versions_are_recognized(tmp_path):
    before, now = json.loads(KEYS.read_text()), keys(tmp_path)
    assert before.keys() == now.keys()
    for name, places in before.items():
        assert now[name] == places, f"{name}: {RENEW}"


if __name__ == "__main__":
    from pathlib import Path

    FILE.write_text(json.dumps(curves(), indent=1) + "\n")
    KEYS.write_text(json.dumps(keys(Path("/storage")), indent=1) + "\n")
