"""The tiny configuration, run once for all tests that look at what it leaves behind."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# As the workers of the presets: sums split over threads can differ in the last bit from one call to the next.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "tiny.yaml"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "asc_ray.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """Of a user without a cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


@dataclass(frozen=True)
class Run:
    storage: Path
    output: str

    @property
    def arguments(self) -> tuple[object, ...]:
        return "--config", TINY, "--set", f"storage={self.storage}"


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Run:
    """A pipeline that ran from the corpus to the report without a break."""
    run = Run(tmp_path_factory.mktemp("whole") / "storage", "")
    done = subprocess.run(
        command("pipeline", *run.arguments), capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(run.storage, done.stdout)
