"""The systems of the ensemble: trained here, or taken from published checkpoints."""

from dataclasses import replace
from typing import Any

from asc_ray import remote
from asc_ray.artifacts import write_record
from asc_ray.cluster.tasks import OnEvent, Task, run_tasks
from asc_ray.cluster.teachers import Teacher, train_teachers
from asc_ray.disk import disk_error
from asc_ray.ensemble.config import check_prior
from asc_ray.ensemble.teachers import import_teacher
from asc_ray.ensemble.weak import Standing, far_below
from asc_ray.errors import UserError
from asc_ray.plan import FAILED, Plan
from asc_ray.stages.logits import import_files
from asc_ray.stages.tracked import teacher_thing
from asc_ray.stages.work import Work
from asc_ray.training.dataset import Dataset


def make(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    import_files(work)  # a file that does not fit is told of before days of training
    _import_teachers(work)
    todo = {name: artifact for name, artifact in plan.teachers.items() if not artifact.complete}
    if not todo:
        return
    # Check this here, once, and not in every teacher.
    data = work.source.open()
    check_prior(config.fusion.scene_prior, data.store.labels)
    waiting = {}
    for system, own in plan.trainings.items():
        recipe = config.teachers.recipes[system]
        for fold, (name, artifact) in enumerate(own.items()):
            if name in todo:
                sees = work.source if len(own) == 1 else replace(work.source, fold=fold)
                waiting[name] = Teacher(artifact, recipe, sees, config.teachers.resources_of(recipe))
    work.progress.expect("teachers", {name: t.recipe.optimizer.epochs for name, t in waiting.items()})
    for artifact in todo.values():
        (artifact.partial / FAILED).unlink(missing_ok=True)
        remote.forget(artifact.partial / FAILED)
    with work.tracked(todo, {name: teacher_thing(plan, name) for name in todo}) as on_event:
        errors = train_teachers(waiting, config.cluster.retries, watched(work, data, on_event))
    for name, error in errors.items():
        if failure := disk_error(error, config.folder):  # which says nothing of the system
            raise failure
        write_record(todo[name].open_partial() / FAILED, {"error": error})
    if untried := [name for name, artifact in todo.items() if not artifact.complete and name not in errors]:
        raise UserError(
            f"{len(untried)} of {len(todo)} teachers were not finished ({', '.join(untried)}): no node had room for "
            "them, or Ray Train's controllers died too often. The others are kept; the same command goes on"
        )
    failed = [system for system, own in plan.trainings.items() if own.keys() & errors.keys()]
    if len(failed) + len(plan.left_out) > config.teachers.allow_missing:
        reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise UserError(
            f"{len(errors)} of {len(todo)} teachers failed ({reasons}). The others are kept; the same command goes on "
            "with those that failed, and --set teachers.allow_missing=N goes on without so many"
        )
    for name, error in errors.items():
        work.progress.left_out(name, error)
    if errors:
        work.plan = Plan(config, work.plan.source)


def watched(work: Work, data: Dataset, on_event: OnEvent) -> OnEvent:
    """Return a listener that passes events on, and names a finished system that is far below the others so far."""
    recipes = {
        name: work.plan.config.teachers.recipes[own] for own, some in work.plan.trainings.items() for name in some
    }
    histories = {name: a.facts()["history"] for name, a in work.plan.teachers.items() if a.complete}
    last = {name: history[-1] for name, history in histories.items() if history}  # imported systems have none
    finished, named = set(last), set[str]()
    places = len(data.store.place.among(data.parts["validation"]))

    def listen(name: str, event: dict[str, Any]) -> None:
        on_event(name, event)
        if "epoch" in event:
            last[name] = event
        if event.get("finished") and name in last:
            finished.add(name)
            standing = {
                one: Standing(recipes[one], last[one]["validation_macro_accuracy"], last[one]["train_accuracy"])
                for one in sorted(finished)
            }
            for one, sentence in far_below(standing, places).items():
                if one not in named:
                    work.progress.note(f"warning: {sentence}")
                named.add(one)

    return listen


def _import_teachers(work: Work) -> None:
    plan, config = work.plan, work.plan.config
    labels = plan.clips.facts()["labels"]
    todo = {name: plan.teachers[name] for name in plan.imported if not plan.teachers[name].complete}
    with work.tracked(todo, {name: teacher_thing(plan, name) for name in todo}) as on_event:
        tasks = []
        for name, artifact in todo.items():
            on_event(name, {"started": True})
            arguments = (artifact, plan.imported[name], config.teachers.recipes[name], labels)
            tasks.append(Task(name, import_teacher, arguments, config.logits.resources))
        run_tasks(tasks, config.cluster.retries, on_event, lambda name, _: on_event(name, {"finished": True}))
    if todo:
        work.progress.note(f"{len(todo)} of {len(plan.teachers)} systems from {config.teachers.checkpoints}")
        work.say_on_trust({name: artifact.facts() for name, artifact in todo.items()})
