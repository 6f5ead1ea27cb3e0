"""The stage `ingest`: the clip store from a corpus."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from asc_ray.artifacts import stored_files
from asc_ray.cluster.ingest import SPLIT, ingest
from asc_ray.data.corpus import read_corpus
from asc_ray.places import named
from asc_ray.stages.work import Work


def make(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    if plan.demo:
        stored_files(plan.demo.path)
    read = plan.source and plan.source.corpus
    corpus = read or read_corpus(plan.corpus_root(), config.corpus)
    ingest(
        plan.clips,
        corpus,
        plan.impulse_responses(),
        skip_bad=config.corpus.on_bad_clip == "skip",
        shard_clips=config.corpus.shard_clips,
        retries=config.cluster.retries,
        on_event=work.progress.event,
    )
    plan.keep_reading()
    if config.sweep:  # check the held-out devices: the demo's corpus did not exist before
        replace(work.source, held_out_devices=config.sweep.validation.devices).open()
    if corpus.made_split:
        work.progress.note(f"test split {named(plan.clips.path / SPLIT)}")
    facts = plan.clips.facts()
    for line in ingest_summary(facts):
        work.progress.note(line)


def ingest_summary(facts: Mapping[str, Any]) -> list[str]:
    """Return lines on the clips, on what was changed while decoding, and on the clips left out."""
    lines = [f"{facts['clips']} clips, {len(facts['labels'])} scenes, {len(facts['devices'])} devices"]
    if facts["notes"]:
        lines.append("clips " + ", ".join(f"{note}: {count}" for note, count in sorted(facts["notes"].items())))
    if facts["skipped"]:
        names = ", ".join(f"{clip['clip_id']} ({clip['reason']})" for clip in facts["skipped"][:5])
        more = f" and {len(facts['skipped']) - 5} more, all in the manifest" if len(facts["skipped"]) > 5 else ""
        lines.append(f"{len(facts['skipped'])} bad clips left out: {names}{more}")
    return lines
