"""The stage `logits`: every system's logits of every clip."""

from asc_ray.cluster.inference import store_logits
from asc_ray.stages.work import Work


def make(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    store_logits(
        {
            name: (
                artifact,
                tuple(teacher.path for teacher in plan.trainings[name].values()),
                config.teachers.recipes[name],
            )
            for name, artifact in plan.logits.items()
            if not artifact.complete
        },
        work.source,
        config.corpus.shard_clips,
        config.logits.batch_size,
        config.logits.precision,
        config.logits.resources,
        config.cluster.retries,
        work.progress.event,
    )
