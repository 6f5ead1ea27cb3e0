"""Texts about the state of a configuration's artifacts on disk."""

import time

from asc_ray.artifacts import Artifact, read_record
from asc_ray.lock import is_locked
from asc_ray.plan import failure
from asc_ray.training.folder import PROGRESS


def state_of(artifact: Artifact) -> tuple[str, str]:
    """Return (state, folder): done, running, interrupted, failed or missing, with its progress if known."""
    if artifact.complete:
        return "done", str(artifact.path)
    if not artifact.partial.is_dir():
        return "missing", ""
    if (error := failure(artifact)) is not None:
        return f"failed: {error}", str(artifact.partial)
    state = "running" if is_locked(artifact.storage) else "interrupted"
    return state + _progress(artifact), str(artifact.partial)


def _progress(artifact: Artifact) -> str:
    note = artifact.partial / PROGRESS
    if entry := read_record(note):
        text = f", epoch {entry['epoch']}/{entry['epochs']}, loss {entry['loss']:.3f}"
        text += f", validation {100 * entry['validation_accuracy']:.1f} %, {entry['clips_per_second']:.0f} clips/s"
        noted = note.stat().st_mtime
        text += time.strftime(", ends about %a %H:%M", time.localtime(noted + 60 * entry["minutes_left"]))
        ago = time.time() - noted
        return text + (f", {ago:.0f} s ago" if ago < 3600 else f", {ago / 3600:.1f} h ago")
    if shards := list(artifact.partial.glob("shard-*.json")) or list(artifact.partial.glob("*-*.arrow")):
        return f", {len(shards)} shards"
    if trials := list(artifact.partial.glob("trials/*.json")):
        return f", {len(trials)} trials"
    return ""
