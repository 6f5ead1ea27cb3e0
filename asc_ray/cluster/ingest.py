"""Ingest and inference as Ray tasks over shards; a shard that is done is never done again."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from asc_ray.artifacts import Artifact, write_atomically
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.cluster.resources import Resources
from asc_ray.cluster.runtime import OnEvent, Task, run_tasks
from asc_ray.data.clips import SPLITS, plan_shards, shard_file, write_shard
from asc_ray.data.corpus import BadClip, Clip, Corpus, refuse
from asc_ray.training.dataset import IMPULSE_RESPONSES, Source, save_bank
from asc_ray.training.loop import Recipe
from asc_ray.training.systems import Inference, Precision, infer


def ingest(
    artifact: Artifact,
    corpus: Corpus,
    impulse_responses: Path | None,
    *,
    skip_bad: bool,
    shard_clips: int,
    retries: int,
    on_event: OnEvent,
) -> None:
    """Decode the corpus into the clip store, one task a shard. Raises CorpusError listing every bad clip."""
    folder = artifact.open_partial()
    shards = plan_shards(corpus, shard_clips)
    reports: dict[int, dict[str, Any]] = {}
    tasks = []
    for index, clips in enumerate(shards):
        done = _report_file(folder, index)
        if done.is_file() and (skip_bad or not json.loads(done.read_text())["bad"]):
            reports[index] = json.loads(done.read_text())
        else:
            arguments = (corpus.root, clips, corpus.labels, corpus.devices, folder, index, corpus.fingerprint)
            tasks.append(Task(f"shard-{index:05d}", _ingest_shard, arguments, Resources()))
    on_event("shards", {"done": len(reports), "total": len(shards)})
    finished = run_tasks(
        tasks, retries, on_event, lambda name, report: on_event("shards", {"advance": 1, "total": len(shards)})
    )
    reports |= {report["index"]: report for report in finished}
    bad = [BadClip(**entry) for report in reports.values() for entry in report["bad"]]
    if bad and not skip_bad:
        refuse(corpus.root, list(map(str, bad)), skippable=True)
    refuse(corpus.root, _lost_scenes(corpus, {clip.clip_id for clip in bad}), skippable=False)
    save_bank(ImpulseBank.load(impulse_responses), folder / IMPULSE_RESPONSES)
    notes: Counter[str] = Counter()
    for report in reports.values():
        notes.update(report["notes"])
    splits = Counter(clip.split for clip in corpus.clips)
    artifact.finish(
        {
            "corpus": artifact.name,
            "clips": sum(report["rows"] for report in reports.values()),
            "listed": dict(splits),
            "labels": corpus.labels,
            "devices": corpus.devices,
            "notes": dict(notes),
            "skipped": [asdict(clip) for clip in (*corpus.bad, *bad)],
        },
        scratch=("shard-*.json",),
        checksums={report["file"]: report["sha256"] for report in reports.values()},
    )


def _lost_scenes(corpus: Corpus, bad: set[str]) -> list[str]:
    """What the corpus lacks without its bad clips."""
    left = {(clip.split, clip.scene) for clip in corpus.clips if clip.clip_id not in bad}
    lost = [f"scene {label!r}: no usable training clip" for label in corpus.labels if ("train", label) not in left]
    return lost if any(split == "test" for split, _ in left) else [*lost, "no usable clip in the test split"]


def _ingest_shard(
    root: Path,
    clips: list[Clip],
    labels: tuple[str, ...],
    devices: tuple[str, ...],
    folder: Path,
    index: int,
    fingerprint: str,
) -> dict[str, Any]:
    report = {
        **asdict(write_shard(root, clips, labels, devices, shard_file(folder, index), fingerprint=fingerprint)),
        "index": index,
    }
    write_atomically(_report_file(folder, index), json.dumps(report))
    return report


def _report_file(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.json"


def store_logits(
    systems: Mapping[str, tuple[Artifact, tuple[Path, ...], Recipe]],
    source: Source,
    shard_clips: int,
    batch_size: int,
    precision: Precision,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> None:
    """Logits of every system over every clip; `systems` maps a name to (logit artifact, teacher folders, recipe).

    A task is a shard of clips of one split and all systems of one front end; a system's part that is there already is
    left out.
    """
    store = source.store()
    shards = [
        (split, index, rows[start : start + shard_clips])
        for split in SPLITS
        for rows in [np.flatnonzero(store.split == split)]
        for index, start in enumerate(range(0, len(rows), shard_clips))
    ]
    families: dict[str, list[str]] = {}
    for name, (_, _, recipe) in systems.items():
        families.setdefault(recipe.frontend.model_dump_json(), []).append(name)
    tasks, shares, total = [], {}, len(shards) * len(systems)
    for names in families.values():
        for split, index, shard in shards:
            share = []
            for name in names:
                artifact, teachers, recipe = systems[name]
                file = artifact.open_partial() / f"{split}-{index:05d}.arrow"
                if not file.is_file():
                    metadata = {"system": name, "config": artifact.key, "split": split}
                    share.append(Inference(teachers, recipe, file, metadata))
            if share:
                title = f"{names[0]}-{split}-{index:05d}"
                task = Task(title, infer, (share, source, shard, batch_size, precision), resources)
                tasks.append(task)
                shares[task.name] = len(share)
    on_event("logits", {"done": total - sum(shares.values()), "total": total})
    results = run_tasks(
        tasks,
        retries,
        on_event,
        lambda name, result: on_event("logits", {"advance": shares[name], "total": total}),
    )
    for artifact, _, _ in systems.values():
        facts: dict[str, Any] = {"clips": len(store), "parts": len(shards)}
        found = [worst for result in results for file, worst in result.items() if Path(file).parent == artifact.partial]
        if found:
            facts["bf16_difference"] = max(found)
        artifact.finish(facts)
