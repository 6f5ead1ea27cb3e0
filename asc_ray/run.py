"""Running the stages of a plan: complete artifacts are skipped, unfinished ones are resumed."""

import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asc_ray import remote
from asc_ray.artifacts import stored_file
from asc_ray.config.configuration import Config
from asc_ray.disk import disk_error
from asc_ray.errors import ConfigError, UserError
from asc_ray.int8.config import check_int8
from asc_ray.lock import exclusive
from asc_ray.places import is_kept, named
from asc_ray.plan import REPORT, STAGES, Plan, dump, scores_over_seeds
from asc_ray.progress import Progress
from asc_ray.resources import RAYS_FOLDER
from asc_ray.shown import masked
from asc_ray.tracking.config import default_uri

if TYPE_CHECKING:
    from asc_ray.stages.work import Work
    from asc_ray.tracking.things import Thing


def where_things_are(plan: Plan) -> list[str]:
    """Return lines for the end of a run: the results that exist, and how to open them."""
    lines = []
    if not plan.missing("evaluate"):
        fused = plan.evaluation.facts()["fusion"]
        whole = fused.get("accuracy_by_recording")
        of_recordings = "" if whole is None else f", {100 * whole:.1f} % of the recordings"
        lines.append(f"  {'fusion':<13} {100 * fused['accuracy']:5.1f} % of the test clips right{of_recordings}")
        for name, (mean, deviation) in scores_over_seeds(plan).items():
            spread = f" ± {100 * deviation.accuracy:.1f} over {deviation.runs} seeds" if deviation else ""
            whole = f", {100 * mean.by_recording.accuracy:.1f} % of the recordings" if mean.by_recording else ""
            lines.append(f"  {name:<13} {100 * mean.accuracy:5.1f} %{spread}{whole}")
    if plan.report.complete:
        page = plan.report.path / REPORT
        here = f"; here: {stored_file(plan.report.path, REPORT)}" if is_kept(page) else ""
        lines.append(f"report  {named(page)}   (open it in a browser{here})")
    if not plan.missing("qat"):
        best = max(plan.int8.values(), key=lambda int8: int8.facts()["validation"]["validation_macro_accuracy"])
        seeds = "" if len(plan.int8) == 1 else ", the best of the seeds on the validation part"
        lines.append(f"model   {named(best.path)}   (asc-ray export makes a bundle of it{seeds})")
    uri = plan.config.tracking.uri or default_uri(plan.config.folder)
    shown = masked(uri)
    lines.append(f"runs    {shown}   (mlflow ui --backend-store-uri {shlex.quote(shown)})")
    return lines


def refuse(plan: Plan, todo: Sequence[str]) -> None:
    """Raise UserError where a stage of `todo` needs one that is neither done nor in `todo`, and ConfigError where a
    student would be over the limits, or has no int8 form."""
    for stage in todo:
        for need in plan.needs(stage):
            if need not in todo and plan.missing(need):
                raise UserError(
                    f"{stage}: needs the stage `{need}`, which is not done; run `asc-ray {need}` with the same "
                    "configuration first, or `asc-ray pipeline` for all stages"
                )
    if {"sweep", "student"} & set(todo):
        from asc_ray.config.fitting import check_limits  # here, because counting what a network costs takes torch

        check_limits(plan.config, plan.scenes)
    if "qat" in todo:
        check_int8(plan.config.student.model.name)


def run(config: Config, stages: Sequence[str], progress: Progress) -> Plan:
    """Make the stages' artifacts: skip complete ones, resume unfinished ones. Return the plan, without failed systems.

    Raises UserError for a user's mistake, and ConfigError before any work starts if the cluster cannot run it.
    """
    plan = Plan(config, anew=tuple(stages) == ("ingest",))
    for name, error in plan.left_out.items():
        progress.left_out(name, error)
    todo = [stage for stage in stages if plan.missing(stage)]
    for stage in stages:
        if stage not in todo and plan.by_stage()[stage]:
            progress.skipped(stage, plan.by_stage()[stage])
    if not todo:
        if plan.source and plan.source.corpus:
            with suppress(UserError, OSError), exclusive(config.folder):  # another run may hold it, or nobody may write
                plan.keep_reading()
        progress.nothing_to_do()
        return plan
    refuse(plan, todo)
    from asc_ray.stages.tracked import pipeline_thing, tell_made  # here, because only work takes optuna

    if "ingest" in todo and plan.source and plan.source.corpus:
        for note in plan.source.corpus.notes:
            progress.note(note)
    parent = pipeline_thing(plan, config.name, plan.key)
    with at_work(plan, parent, dump(config), plan.complete_keys(), progress) as work:
        tell_made(plan, work.tracker, STAGES)
        for stage in todo:
            if not work.plan.missing(stage):  # an earlier run made it without the systems that failed again now
                continue
            with progress.stage(stage):
                import_module(f"asc_ray.stages.{stage}").make(work)
            tell_made(work.plan, work.tracker, [stage])
    return work.plan


@contextmanager
def at_work(
    plan: Plan, parent: "Thing", configuration: Mapping[str, Any], complete: Iterable[str], progress: Progress
) -> Iterator["Work"]:
    """Hold the plan's storage, a connection to the cluster that can run it, and a parent run in MLflow."""
    # Import these only when there is work, so that `asc-ray status` and a finished configuration answer at once.
    from asc_ray.cluster.connection import connected
    from asc_ray.cluster.tasks import check_feasible
    from asc_ray.stages.work import Work
    from asc_ray.tracking.runs import Tracker

    config = plan.config
    with _told_apart(config.folder), exclusive(config.folder, progress.note), _without_scratch(config.folder):
        progress.note(f"storage {config.storage}")
        plan.keep_reading()
        # MLflow starts beside Ray: both take equally long, and Ray mostly waits.
        tracker = Tracker(config.tracking, config.folder, progress.note)
        address = config.cluster.joined
        progress.note("starting Ray ..." if address == "local" else f"joining the Ray cluster {address} ...")
        with closing(tracker), connected(config.cluster, progress.note):
            tracker.greet()
            check_feasible(
                {
                    **config.teachers.requests(),
                    "logits.resources": config.logits.resources,
                    "student_resources": config.student_resources,
                }
            )
            text = yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True)
            with tracker.parent(parent, text, complete):
                yield Work(plan, tracker, progress)


@contextmanager
def _without_scratch(storage: Path) -> Iterator[None]:
    """Leave nothing of Ray's own in the storage, nor what a killed driver has left."""

    def remove() -> None:
        shutil.rmtree(storage / RAYS_FOLDER, ignore_errors=True)
        remote.forget(storage / RAYS_FOLDER)

    remove()
    try:
        yield
    finally:
        remove()


@contextmanager
def _told_apart(storage: Path) -> Iterator[None]:
    """Raise DiskError for errors that came of the storage's disk, whoever met them."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if failure := disk_error(error, storage):
            raise failure from None
        raise
