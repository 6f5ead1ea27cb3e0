"""The state of a configuration's artifacts on disk, for people and for programs."""

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from asc_ray.artifacts import Artifact, read_record
from asc_ray.lock import is_locked
from asc_ray.places import named
from asc_ray.plan import Plan, failure
from asc_ray.search.config import TRIALS
from asc_ray.training.folder import PROGRESS

_OF_EPOCH = ("epoch", "epochs", "loss", "validation_accuracy", "clips_per_second")


@dataclass(frozen=True)
class State:
    """One artifact: `state` is done, running, interrupted, failed, missing or left out; `path` is where it lies, or
    what there is of it, None for nothing.

    `progress` has `shards` or `trials`, or of a training its figures at the last epoch, when that was `noted` and, if
    it runs, `ends`: both as ISO 8601.
    """

    stage: str
    name: str
    key: str | None
    state: str
    path: Path | None = None
    error: str = ""
    progress: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": named(self.path) if self.path else None, "error": self.error or None}

    def text(self) -> str:
        """Return the state in words, with its error or progress."""
        if self.error:
            return f"{self.state}: {self.error}"
        at = self.progress
        if "epoch" not in at:
            return ", ".join([self.state, *(f"{count} {what}" for what, count in at.items())])
        parts = [self.state, f"epoch {at['epoch']}/{at['epochs']}", f"loss {at['loss']:.3f}"]
        parts += [f"validation {100 * at['validation_accuracy']:.1f} %", f"{at['clips_per_second']:.0f} clips/s"]
        if "ends" in at:
            parts.append(f"ends about {datetime.fromisoformat(at['ends']):%a %H:%M}")
        ago = time.time() - datetime.fromisoformat(at["noted"]).timestamp()
        return ", ".join([*parts, f"{ago:.0f} s ago" if ago < 3600 else f"{ago / 3600:.1f} h ago"])


def states(plan: Plan) -> Iterator[State]:
    """Yield the state of every artifact, in the order of the stages, and of the systems that are left out."""
    for stage, artifacts in plan.by_stage().items():
        for artifact in artifacts:
            yield state_of(artifact, stage)
        if stage == "teachers":
            yield from (State(stage, name, None, "left out", error=error) for name, error in plan.left_out.items())


def state_of(artifact: Artifact, stage: str) -> State:
    """Return the state of an artifact; `stage` is the command that makes it."""
    own = stage, artifact.name, artifact.key
    if artifact.complete:
        return State(*own, "done", artifact.path)
    folder = artifact.begun()
    if folder is None:
        return State(*own, "missing")
    if (error := failure(artifact)) is not None:
        return State(*own, "failed", folder, error)
    runs = is_locked(artifact.storage)
    return State(*own, "running" if runs else "interrupted", folder, progress=_progress(folder, runs))


def _progress(folder: Path, runs: bool) -> dict[str, Any]:
    if entry := read_record(folder / PROGRESS):
        noted = (folder / PROGRESS).stat().st_mtime
        ends = noted + 60 * entry["minutes_left"]
        # A training that waits for its turn, or hangs, has not ended when it was expected to.
        expected = {"ends": _iso(ends)} if runs and ends > time.time() else {}
        return {name: entry[name] for name in _OF_EPOCH} | {"noted": _iso(noted)} | expected
    if shards := list(folder.glob("*-*.json")):
        return {"shards": len(shards)}
    if trials := list(folder.glob(f"{TRIALS}/*.json")):
        return {"trials": len(trials)}
    return {}


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")
