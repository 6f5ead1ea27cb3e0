"""The stage `qat`: the students' int8 forms."""

from asc_ray.int8.train import train_int8
from asc_ray.plan import Plan
from asc_ray.stages.tracked import student_thing
from asc_ray.stages.work import Job, Work, source_of


def make(work: Work) -> None:
    work.together(int8_jobs(work.plan))


def int8_jobs(plan: Plan) -> dict[str, Job]:
    configs = plan.student_configs()
    targets = plan.target_files(next(iter(configs.values())).distillation.soft_target)
    source, qat, resources = source_of(plan), plan.config.qat, plan.config.student_resources
    students = [(artifact.path, configs[name]) for name, artifact in plan.students.items()]
    return {
        name: Job(
            artifact,
            train_int8,
            (source, targets, *student, qat, resources.gpus),
            resources,
            qat.epochs,
            student_thing(plan, name),
        )
        for (name, artifact), student in zip(plan.int8.items(), students, strict=True)
    }
