"""The stage `logits`: every system's logits of every clip."""

from collections.abc import Mapping
from typing import Any

from asc_ray.cluster.inference import store_logits
from asc_ray.ensemble.imported import import_logits
from asc_ray.resources import Resources
from asc_ray.stages.work import Job, Work


def make(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    import_files(work)
    store_logits(
        {
            name: (
                artifact,
                tuple(teacher.path for teacher in plan.trainings[name].values()),
                config.teachers.recipes[name],
            )
            for name, artifact in plan.logits.items()
            if not artifact.complete and name not in config.teachers.imported
        },
        work.source,
        config.corpus.shard_clips,
        config.logits.batch_size,
        config.logits.precision,
        config.logits.resources,
        config.cluster.retries,
        work.progress.event,
    )


def import_files(work: Work) -> None:
    """Read the systems whose logits come from files, and say what was found. Raises UserError for what does not fit."""
    plan, config = work.plan, work.plan.config
    cpus = Resources(cpus=config.logits.resources.cpus)
    jobs = {
        name: Job(plan.logits[name], import_logits, (name, own, work.source), cpus)
        for name, own in config.teachers.imported.items()
        if not plan.logits[name].complete
    }
    work.together(jobs)
    for name in jobs:
        work.progress.note(imported_summary(name, plan.logits[name].facts()))


def imported_summary(name: str, facts: Mapping[str, Any]) -> str:
    """Return a line on a system whose logits come from a file."""
    agrees = ", ".join(f"{100 * share:.1f} % of the {split} split" for split, share in facts["agrees"].items())
    unused = f"; {facts['unused']} clips of the file are not in the corpus" if facts["unused"] else ""
    return f"{name}: {facts['clips']} clips from {facts['imported']}, right on {agrees}{unused}"
