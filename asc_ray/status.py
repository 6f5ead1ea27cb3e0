"""Texts about the state of a configuration's artifacts on disk."""

import time

from asc_ray.artifacts import Artifact, read_record
from asc_ray.lock import is_locked
from asc_ray.plan import REPORT, Plan, failure, scores_over_seeds
from asc_ray.shown import masked
from asc_ray.tracking.config import default_uri
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


def where_things_are(plan: Plan) -> list[str]:
    """Return lines for the end of a run: the results that exist, and how to open them."""
    lines = []
    if not plan.missing("evaluate"):
        lines.append(
            f"  {'fusion':<13} {100 * plan.evaluation.facts()['fusion']['accuracy']:5.1f} % of the test clips right"
        )
        for name, (mean, deviation) in scores_over_seeds(plan).items():
            spread = f" ± {100 * deviation.accuracy:.1f} over {deviation.runs} seeds" if deviation else ""
            lines.append(f"  {name:<13} {100 * mean.accuracy:5.1f} %{spread}")
    if plan.report.complete:
        lines.append(f"report  {plan.report.path / REPORT}   (open it in a browser)")
    if not plan.missing("qat"):
        best = max(plan.int8.values(), key=lambda int8: int8.facts()["validation"]["validation_macro_accuracy"])
        seeds = "" if len(plan.int8) == 1 else ", the best of the seeds on the validation part"
        lines.append(f"model   {best.path}   (asc-ray export makes a bundle of it{seeds})")
    uri = plan.config.tracking.uri or default_uri(plan.config.storage)
    shown = masked(uri)
    lines.append(f"runs    {shown}   (mlflow ui --backend-store-uri {shown})")
    return lines
