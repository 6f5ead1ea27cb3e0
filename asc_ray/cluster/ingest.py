"""Ingest as Ray tasks, one a shard of clips; a shard that is done is never done again."""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from asc_ray import remote
from asc_ray.artifacts import Artifact, file_sha256, stored_files
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.cluster.tasks import OnEvent, Task, run_tasks
from asc_ray.data.clip import Clip
from asc_ray.data.clips import SHARD, ClipStore
from asc_ray.data.corpus import Corpus
from asc_ray.data.faults import BadClip, Faults
from asc_ray.data.pieces import finished_pieces, known_files, missing_pieces, note_piece, piece_file
from asc_ray.data.samples import INDEX
from asc_ray.data.shards import write_shard
from asc_ray.errors import UserError
from asc_ray.places import is_kept, ready
from asc_ray.resources import Resources
from asc_ray.training.dataset import IMPULSE_RESPONSES, save_bank

SPLIT = "split.csv"  # a test split that was made, beside the clips


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
    """Decode the corpus into the clip store. Raises CorpusError that lists every bad clip."""
    folder = artifact.open_partial()
    ids = [clip.clip_id for clip in corpus.clips]
    remote.pull(folder, f"{SHARD}-*{INDEX}")

    def accepted(report: Mapping[str, Any]) -> bool:
        index = (folder / report["file"]).with_suffix(INDEX)
        return (skip_bad or not report["bad"]) and index.is_file() and report.get("index") == file_sha256(index)

    reports = finished_pieces(folder, SHARD, ids, accepted)
    tasks = []
    for some in missing_pieces(len(ids), reports, shard_clips):
        arguments = (corpus.root, corpus.clips[some], corpus.labels, corpus.devices, corpus.fingerprint)
        file = piece_file(folder, SHARD, some.start)
        tasks.append(Task(file.stem, _ingest_shard, (*arguments, file), Resources()))
    total = len(reports) + len(tasks)
    on_event("shards", {"done": len(reports), "total": total})
    reports += run_tasks(tasks, retries, on_event, lambda name, _: on_event("shards", {"advance": 1, "total": total}))
    bad = [BadClip(**entry) for report in reports for entry in report["bad"]]
    faults = Faults()
    if not skip_bad:
        for clip in bad:
            faults.add_clip(clip)
        faults.refuse(corpus.root, len(ids), skippable=True)
    _add_lost_scenes(faults, corpus, {clip.clip_id for clip in bad})
    faults.refuse(corpus.root, len(ids), skippable=False)
    left_out = {clip.clip_id for clip in bad}
    remote.pull(folder, f"{SHARD}-*{INDEX}")  # from the nodes that made them; the shards stay where they are
    held = ClipStore(folder, sorted(folder.glob(f"{SHARD}-*{INDEX}"))).keys()
    if not held.equals(pa.chunked_array([[name for name in ids if name not in left_out]], pa.string())):
        raise UserError(f"{folder}: holds {len(held)} of {len(ids)} clips; delete the folder and ingest again")
    if corpus.made_split:
        _write_split(corpus, folder / SPLIT)
    save_bank(ImpulseBank.load(impulse_responses), folder / IMPULSE_RESPONSES)
    notes: Counter[str] = Counter()
    for report in reports:
        notes.update(report["notes"])
    splits = Counter(clip.split for clip in corpus.clips)
    artifact.finish(
        {
            "corpus": artifact.name,
            "clips": len(held),
            "listed": dict(splits),
            "labels": corpus.labels,
            "devices": corpus.devices,
            "notes": dict(notes),
            "corpus_notes": corpus.notes,
            "skipped": [asdict(clip) for clip in (*corpus.bad, *bad)],
        },
        scratch=(f"{SHARD}-*.json",),
        known=known_files(reports),
    )


def _write_split(corpus: Corpus, file: Path) -> None:
    """Write the split that was made, as a table that `corpus.table` reads."""
    recordings = {clip.file: clip for clip in corpus.clips}
    with open(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("filename", "scene", "device", "place", "split"))
        writer.writerows((name, c.scene, c.device, c.place, c.split) for name, c in sorted(recordings.items()))


def _add_lost_scenes(faults: Faults, corpus: Corpus, bad: set[str]) -> None:
    """Add the scenes and splits that have no clip left without the bad ones."""
    left = {(clip.split, clip.scene) for clip in corpus.clips if clip.clip_id not in bad}
    for label in corpus.labels:
        if ("train", label) not in left:
            faults.add(f"scene {label!r}: no usable training clip")
    if not any(split == "test" for split, _ in left):
        faults.add("no usable clip in the test split")


def _ingest_shard(
    root: Path,
    clips: tuple[Clip, ...],
    labels: tuple[str, ...],
    devices: tuple[str, ...],
    fingerprint: str,
    file: Path,
) -> dict[str, Any]:
    if is_kept(root):  # a made corpus
        stored_files(root)
    ready(file.parent)
    report = write_shard(root, clips, labels, devices, file, fingerprint=fingerprint)
    index = file.with_suffix(INDEX)
    remote.push(index)
    record = note_piece(file, [clip.clip_id for clip in clips], {**asdict(report), "index": file_sha256(index)})
    if is_kept(file):
        file.unlink()  # who reads it may be another node
    return record
