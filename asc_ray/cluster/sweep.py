"""The search for the student's configuration on Ray Tune; asc_ray.search proposes and stops trials."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from asc_ray import remote
from asc_ray.artifacts import Artifact, write_record
from asc_ray.cluster.tasks import OnEvent, rays_storage, settle, slots
from asc_ray.disk import disk_error
from asc_ray.errors import UserError
from asc_ray.models.registry import build
from asc_ray.places import ready
from asc_ray.resources import RAYS_FOLDER, Resources
from asc_ray.search.config import METRIC, TRIALS, SweepConfig
from asc_ray.search.course import Course, checkpoints_of, ended_trials, error_of
from asc_ray.search.order import planned
from asc_ray.search.proposals import trial_config
from asc_ray.search.trials import TrialResult
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.students.targets import TargetFiles, read_soft_targets
from asc_ray.students.train import fit_student
from asc_ray.training.dataset import Source
from asc_ray.training.folder import Metrics
from asc_ray.training.loop import Diverged
from asc_ray.training.weights import started

# Tune reads these from the environment when it starts.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the loggers would write every trial's curve three more times
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C must end the pipeline, not the search alone
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a heading even with verbose=0
}
# Tune would print a traceback for each attempt; the summary at the end says how the trials ended.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
SCRATCH = ("trials/*.checkpoints", "trials/*.error", "trials/*.tmp")


def run_sweep(
    artifact: Artifact,
    source: Source,
    targets: Mapping[str, TargetFiles | None],
    student: StudentConfig,
    sweep: SweepConfig,
    limits: Limits,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> list[TrialResult]:
    """Run the trials that have not ended yet, and return all results by number. `targets`: soft targets by name.

    A trial fails without training if its network exceeds the `limits` or cannot process a clip. A trial that raises an
    error is tried again up to `retries` times. A trial's result is a file of the artifact, its checkpoints lie beside
    it, and its proposal follows from the results before it. So the search can go on after the driver died, without
    Tune's own state.
    """
    source = replace(source, held_out_devices=sweep.validation.devices)
    data = source.open()
    folder = artifact.open_partial() / TRIALS
    folder.mkdir(exist_ok=True)
    course = Course(sweep, student, limits, len(data.store.labels), folder, ended_trials(artifact), on_event)
    if course.left():
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                work={
                    "folder": folder,
                    "storage": artifact.storage,
                    "source": source,
                    # Files that each node maps; which row is which clip's is in Ray's shared memory, once a node.
                    "soft": {name: read_soft_targets(data, path) for name, path in targets.items()},
                    "student": student,
                    "sweep": sweep,
                    "resources": resources,
                },
            ),
            resources.per_worker(),
        )
        try:
            grid = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    search_alg=_Proposals(course),
                    scheduler=_Halving(course),
                    num_samples=sweep.most - len(course.ended),
                    max_concurrent_trials=concurrent(sweep, resources),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    **rays_storage(artifact.storage / RAYS_FOLDER),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=retries),
                ),
            ).fit()
        finally:
            settle()
    if left := course.left():
        for error in grid.errors:
            if failure := disk_error(error, artifact.storage):
                raise failure
        raise UserError(
            f"sweep: {len(left)} of {planned(course.sweep, course.ended)} trials did not end, because their workers "
            "died too often or there was no room for them; the same command goes on"
        )
    return sorted(course.ended, key=lambda result: result.number)


def concurrent(sweep: SweepConfig, resources: Resources) -> int:
    """Return how many trials run at once: the number of slots, but no more than the search can propose."""
    return min(sweep.most_at_once[1], slots(resources))


class _Proposals(Searcher):
    """Gives Tune the trials that the course proposes."""

    def __init__(self, course: Course) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._course = course
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._course.start()
        if trial is None:  # running trials may still become finalists
            return Searcher.FINISHED if self._course.stuck else None
        self._numbers[trial_id] = trial["number"]
        return trial

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        if error:
            self._course.give_up(number)
        else:
            self._course.close(number, failed=False)

    def get_state(self) -> dict:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, because the results of ended trials are files of the artifact."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from the results of its trials")


class _Halving(FIFOScheduler):
    """Tells Tune which trials the course stops."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        stop = self._course.hear(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE


class _SpanEnds(Exception):
    """Raised when a trial has trained its own span of epochs."""


def _trial(config: dict[str, Any], work: dict[str, Any]) -> None:
    """Run one trial on a worker.

    An error is also written to a file, because Tune does not tell an error from a worker's death.
    """
    note = ready(work["folder"]) / error_of(config["number"])
    note.unlink(missing_ok=True)
    remote.forget(note)
    try:
        _train(config, work)
    except Exception as error:
        if disk_error(error, work["storage"]):  # which says nothing of the trial
            raise
        write_record(note, {"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise


def _train(config: dict[str, Any], work: dict[str, Any]) -> None:
    torch.set_num_threads(work["resources"].threads)
    sweep, number = work["sweep"], config["number"]
    student = trial_config(work["student"], sweep, config["parameters"])
    optimizer, seed = student.optimizer.scaled_to(sweep.epochs), student.seed + config["seed"]
    student = student.model_copy(update={"optimizer": optimizer, "seed": seed})
    data = work["source"].open()
    model = build(student.model, len(data.store.labels), student.seed)
    started(model, student, data.store.labels)
    checkpoints = work["folder"] / checkpoints_of(number)
    remote.pull(checkpoints)
    if config["parent"] is not None and not checkpoints.is_dir():
        copied = checkpoints.with_suffix(f".{os.getpid()}.tmp")
        parents = work["folder"] / checkpoints_of(config["parent"])
        remote.pull(parents)
        shutil.copytree(parents, copied)
        copied.rename(checkpoints)
    start, end = sweep.span(number)

    def report(metrics: Metrics) -> None:
        if metrics["epoch"] > start:  # earlier epochs are the parent's
            tune.report(metrics | {METRIC: sweep.validation.value(metrics)})
        if metrics["epoch"] == end < sweep.epochs:
            raise _SpanEnds

    try:
        soft, gpus = work["soft"][student.distillation.soft_target], work["resources"].gpus
        fit_student(model, student, data, soft, checkpoints, gpus, report)
    except Diverged as error:
        tune.report({"diverged": True, METRIC: 0.0, "message": str(error)})
    except _SpanEnds:
        pass
