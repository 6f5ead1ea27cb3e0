"""The scores of the ensemble and of all students on the test split."""

from collections.abc import Iterable

from asc_ray.evaluation.on_test import evaluate_ensemble, evaluate_student
from asc_ray.plan import Plan, scores_over_seeds
from asc_ray.resources import Resources
from asc_ray.stages.work import Job, Work, source_of


def make(work: Work) -> None:
    plan = work.plan
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    resources = Resources(cpus=plan.config.logits.resources.cpus)
    ensemble = Job(plan.evaluation, evaluate_ensemble, (work.source, logits, plan.fusion.path), resources)
    work.together({"ensemble": ensemble} | evaluation_jobs(plan, plan.evaluations), tracked=False)
    figures = dict(plan.evaluation.facts())
    for form, (mean, deviation) in scores_over_seeds(plan).items():
        figures[form] = {name: getattr(mean, name) for name in next(iter(figures.values()))}
        if deviation:
            figures[form] |= {f"{name}_deviation": getattr(deviation, name) for name in figures[form]}
    for name, own in figures.items():
        work.tracker.log_summary({f"test/{name}/{key}".replace(" ", "_"): value for key, value in own.items()})


def evaluation_jobs(plan: Plan, names: Iterable[str]) -> dict[str, Job]:
    """Return the jobs that score the students and int8 forms with these names on the test split."""
    models, config = plan.students | plan.int8, next(iter(plan.student_configs().values()))
    source, resources = source_of(plan), plan.config.student_resources
    return {
        name: Job(
            plan.evaluations[name], evaluate_student, (source, models[name].path, config, resources.gpus), resources
        )
        for name in names
    }
