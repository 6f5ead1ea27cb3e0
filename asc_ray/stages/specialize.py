"""The stage `specialize`: the students, fine-tuned for each device."""

from asc_ray.plan import Plan
from asc_ray.stages.tracked import student_thing
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.students.specialize import specialize_student


def make(work: Work) -> None:
    work.together(specialize_jobs(work.plan))
    for name, artifact in work.plan.specialized.items():
        facts = artifact.facts()
        clips = ", ".join(f"{device} {own['clips']}" for device, own in facts["devices"].items())
        work.progress.note(f"{name}: {facts['parameters']:,} parameters are kept; clips by device: {clips}")


def specialize_jobs(plan: Plan) -> dict[str, Job]:
    configs = plan.student_configs()
    config = next(iter(configs.values()))
    targets = plan.target_files(config.distillation.soft_target)
    source, resources = source_of(plan), plan.config.student_resources
    students = [(artifact.path, configs[name]) for name, artifact in plan.students.items()]
    return {
        name: Job(
            artifact,
            specialize_student,
            (source, targets, *student, resources.gpus),
            resources,
            config.specialize.epochs if config.specialize else 0,
            student_thing(plan, name),
        )
        for (name, artifact), student in zip(plan.specialized.items(), students, strict=False)
    }
