"""The stage `report`: one page about everything that was made."""

from asc_ray.artifacts import stored_file
from asc_ray.int8.config import ONNX_MODEL
from asc_ray.plan import REPORT, dump, scores_over_seeds
from asc_ray.report.collect import write_report
from asc_ray.stages.tracked import student_thing
from asc_ray.stages.work import Work


def make(work: Work) -> None:
    artifact = work.plan.report
    folder = artifact.open_partial()
    plan = work.plan
    write_report(
        folder / REPORT,
        title=plan.config.name,
        source=work.source,
        student_config=next(iter(plan.student_configs().values())),
        config=dump(plan.config),
        stages={stage: artifacts for stage, artifacts in plan.by_stage().items() if stage != "report"},
        clips=plan.clips,
        systems={name: plan.config.teachers.recipes[name] for name in plan.trainings},
        teachers=plan.teachers,
        fusion=plan.fusion,
        sweep=plan.sweep,
        search=plan.config.sweep,
        students=plan.students,
        int8=plan.int8,
        evaluation=plan.evaluation,
        student_scores=scores_over_seeds(plan),
    )
    artifact.finish({})
    work.tracker.log_file(work.tracker.top, artifact.path / REPORT)
    for name, int8 in plan.int8.items():
        work.tracker.log_file(student_thing(plan, name), stored_file(int8.path, ONNX_MODEL))
