"""Logits of every system as Ray tasks over pieces of the clips."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from asc_ray import remote
from asc_ray.artifacts import Artifact
from asc_ray.cluster.tasks import OnEvent, Task, run_tasks
from asc_ray.data.clips import SPLITS
from asc_ray.data.logits import read_logits
from asc_ray.data.pieces import finished_pieces, known_files, missing_pieces, piece_file
from asc_ray.ensemble.config import LogitsPrecision
from asc_ray.ensemble.inference import Inference, infer
from asc_ray.errors import UserError
from asc_ray.resources import Resources
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source


def store_logits(
    systems: Mapping[str, tuple[Artifact, tuple[Path, ...], Recipe]],
    source: Source,
    part_clips: int,
    batch_size: int,
    precision: LogitsPrecision,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> None:
    """Store the logits of every system over every clip.

    `systems` maps a name to (logit artifact, teacher folders, recipe). A task covers some clips of one split and all
    systems with one front end that lack these clips' logits.
    """
    store = source.store()
    rows = {split: np.flatnonzero(store.split == split) for split in SPLITS}
    reports: dict[str, list[dict[str, Any]]] = {}
    shares: dict[tuple[str, str, int, int], list[Inference]] = {}  # by front end, split, first clip, end
    for name, (artifact, teachers, recipe) in systems.items():
        folder, reports[name] = artifact.open_partial(), []
        for split in SPLITS:
            finished = finished_pieces(folder, split, store.ids[rows[split]])
            reports[name] += finished
            metadata = {"system": name, "config": artifact.key, "split": split}
            for some in missing_pieces(len(rows[split]), finished, part_clips):
                key = recipe.frontend.model_dump_json(), split, some.start, some.stop
                file = piece_file(folder, split, some.start)
                shares.setdefault(key, []).append(Inference(name, teachers, recipe, file, metadata))
    tasks = {}
    for (_, split, first, end), share in shares.items():
        title = f"{share[0].system}-{split}-{first:09d}"
        clips = rows[split][first:end]
        tasks[title] = Task(title, infer, (share, source, clips, batch_size, precision, resources.gpus), resources)
    done = sum(map(len, reports.values()))
    total = done + sum(map(len, shares.values()))
    counts = {title: len(task.arguments[0]) for title, task in tasks.items()}
    on_event("logits", {"done": done, "total": total})
    results = run_tasks(
        list(tasks.values()),
        retries,
        on_event,
        lambda name, _: on_event("logits", {"advance": counts[name], "total": total}),
    )
    for result in results:
        for name, report in result.items():
            reports[name].append(report)
    for name, (artifact, _, _) in systems.items():
        remote.pull(artifact.partial, "*.arrow")  # from the nodes that made them
        for split in SPLITS:
            if not read_logits(artifact.partial, split).holds(store, rows[split]):
                raise UserError(f"{artifact.partial}: not the {split} clips in order; delete the folder and try again")
        facts: dict[str, Any] = {"clips": len(store), "parts": len(reports[name])}
        if found := [report["bf16_difference"] for report in reports[name] if "bf16_difference" in report]:
            facts["bf16_difference"] = max(found)
        artifact.finish(facts, scratch=("*.json",), known=known_files(reports[name]))
