"""The stage `student`: the students."""

from asc_ray.plan import Plan
from asc_ray.stages.tracked import student_thing
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.students.train import train_student


def make(work: Work) -> None:
    plan = work.plan
    work.together(student_jobs(plan))
    work.say_on_trust({name: artifact.facts() for name, artifact in plan.students.items()})
    for number, (name, artifact) in enumerate(plan.students.items()):
        facts = artifact.facts()
        if number == 0:
            work.progress.note(f"{facts['parameters']:,} parameters, {facts['macs'] / 1e6:.2f} M MACs")
        if learned := facts["residual_lambda"]:
            values = ", ".join(f"{layer.split('.')[-1]} {value:.3f}" for layer, value in learned.items())
            work.progress.note(f"{name}: residual normalization learned lambda: {values}")


def student_jobs(plan: Plan) -> dict[str, Job]:
    """Return the trainings of the plan's students."""
    configs = plan.student_configs()
    targets = plan.target_files(next(iter(configs.values())).distillation.soft_target)
    source, resources = source_of(plan), plan.config.student_resources
    return {
        name: Job(
            artifact,
            train_student,
            (source, targets, configs[name], resources.gpus),
            resources,
            configs[name].optimizer.epochs,
            student_thing(plan, name),
        )
        for name, artifact in plan.students.items()
    }
