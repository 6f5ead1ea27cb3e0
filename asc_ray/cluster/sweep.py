"""The search for the student's configuration on Ray Tune; training.search decides what to propose and stop."""

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from asc_ray.artifacts import Artifact, write_atomically
from asc_ray.cluster.resources import Resources
from asc_ray.cluster.runtime import OnEvent, settle, slots
from asc_ray.errors import UserError
from asc_ray.models.registry import build
from asc_ray.training import search
from asc_ray.training.dataset import Source
from asc_ray.training.loop import Diverged, Metrics
from asc_ray.training.search import SweepConfig, TrialResult
from asc_ray.training.systems import StudentConfig, fit_student

TRIALS = "trials"


def run_sweep(
    artifact: Artifact,
    source: Source,
    targets: Mapping[str, Path | None],
    student: StudentConfig,
    sweep: SweepConfig,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> list[TrialResult]:
    """Run the trials that have not ended yet; returns all, by number. `targets`: folders of soft targets, by name.

    A trial's result is a file of the artifact, its checkpoints lie beside it, and its proposal follows from the
    results before it: nothing of Tune's own state is needed to go on after the driver died.
    """
    source = replace(source, strangers=sweep.validation.devices)
    source.open()  # refuses devices that are none, before a trial starts
    folder = artifact.open_partial() / TRIALS
    folder.mkdir(exist_ok=True)
    ended = [TrialResult.model_validate_json(file.read_text()) for file in sorted(folder.glob("*.json"))]
    course = _Course(sweep, folder, ended, on_event)
    if course.left():
        scratch = artifact.storage / ".ray-tune" / uuid.uuid4().hex
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                work={
                    "folder": folder,
                    "source": source,
                    "targets": targets,
                    "student": student,
                    "sweep": sweep,
                    "threads": resources.threads,
                },
            ),
            resources.per_worker(),
        )
        try:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    metric=search.METRIC,
                    mode="max",
                    search_alg=_Proposals(course),
                    scheduler=_Halving(course),
                    num_samples=sweep.most - len(course.ended),
                    max_concurrent_trials=min(sweep.lookback, slots(resources)),
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    name="sweep",
                    storage_path=str(scratch),
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=retries),
                ),
            ).fit()
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            settle()
    if left := course.left():
        raise UserError(
            f"sweep: {len(left)} of {search.planned(sweep, course.ended)} trials did not end; the same command goes on"
        )
    return sorted(course.ended, key=lambda result: result.number)


class _Course:
    """The state of one search, shared by the searcher and the scheduler, in the driver."""

    def __init__(self, sweep: SweepConfig, folder: Path, ended: list[TrialResult], on_event: OnEvent) -> None:
        self.sweep, self.folder, self.ended, self.on_event = sweep, folder, ended, on_event
        self.parameters: dict[int, dict[str, Any]] = {}
        self.repeats: dict[int, tuple[int | None, int]] = {}
        self.curves: dict[int, list[float]] = {}
        self.states: dict[int, str] = {}
        self.errors: dict[int, str] = {}

    def left(self) -> list[int]:
        """Trials that have not ended, as far as is known which there are."""
        return sorted(set(range(search.planned(self.sweep, self.ended))) - {result.number for result in self.ended})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which is not used here."""
        return {}

    def hear(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Note an epoch of a trial; returns whether the trial is to stop."""
        if metrics.get("diverged"):
            self.states[number] = "diverged"
            return False
        curve = self.curves.setdefault(number, [])
        if metrics["epoch"] != len(curve) + 1:  # heard before the trial's worker died
            return False
        curve.append(metrics[search.METRIC])
        self.on_event(f"trial-{number:03d}", {"epochs": self.sweep.epochs, **_numbers(metrics)})
        if search.should_stop(self.sweep, number, curve, self.ended):
            self.states[number] = "stopped"
            return True
        return False

    def close(self, number: int, failed: bool) -> None:
        result = TrialResult(
            number=number,
            parameters=self.parameters[number],
            curve=tuple(self.curves.get(number, ())),
            state="failed" if failed else self.states.get(number, "complete"),
            error=self.errors.get(number, "its worker died every time") if failed else "",
            repeats=self.repeats[number][0],
            seed=self.repeats[number][1],
        )
        write_atomically(self.folder / f"{number:04d}.json", result.model_dump_json())
        shutil.rmtree(self.folder / f"{number:04d}.checkpoints", ignore_errors=True)
        self.ended.append(result)
        event = {"finished": True, "state": result.state, "value": result.value, "parameters": result.parameters}
        self.on_event(f"trial-{number:03d}", event)


class _Proposals(Searcher):
    """Tune's view of `search.propose`."""

    def __init__(self, course: _Course) -> None:
        super().__init__(metric=search.METRIC, mode="max")
        self._course = course
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        course = self._course
        waiting = [number for number in course.left() if number not in self._numbers.values()]
        if not waiting:  # while some still run, they may become finalists
            return None if course.left() else Searcher.FINISHED
        number = waiting[0]
        if not search.may_start(course.sweep, number, course.ended):
            return None
        self._numbers[trial_id] = number
        course.parameters[number] = search.propose(course.sweep, number, course.ended)
        course.repeats[number] = search.repeated(course.sweep, number, course.ended)
        event = {"started": True, "parameters": course.parameters[number]}
        course.on_event(f"trial-{number:03d}", event)
        return {"number": number, "parameters": course.parameters[number], "seed": course.repeats[number][1]}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        self._course.close(number, failed=error)

    def get_state(self) -> dict:
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the results of ended trials are files of the artifact."""

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a sweep goes on from the results of its trials")


class _Halving(FIFOScheduler):
    """Tune's view of `search.should_stop`."""

    def __init__(self, course: _Course) -> None:
        super().__init__()
        self._course = course

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        stop = self._course.hear(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        lines = str(trial.get_error() or "").strip().splitlines()
        if lines:
            self._course.errors[trial.config["number"]] = lines[-1]


def _trial(config: dict[str, Any], work: dict[str, Any]) -> None:
    """One trial on a worker."""
    torch.set_num_threads(work["threads"])
    student = search.trial_config(work["student"], work["sweep"], config["parameters"])
    optimizer, seed = student.optimizer.scaled_to(work["sweep"].epochs), student.seed + config["seed"]
    student = student.model_copy(update={"optimizer": optimizer, "seed": seed})
    data = work["source"].open()
    model = build(student.model, len(data.store.labels), student.seed)
    checkpoints = work["folder"] / f"{config['number']:04d}.checkpoints"
    try:
        targets = work["targets"][student.distillation.soft_target]

        def report(metrics: Metrics) -> None:
            tune.report(metrics | {search.METRIC: work["sweep"].validation.value(metrics)})

        fit_student(model, student, data, targets, checkpoints, report)
    except Diverged as error:
        tune.report({"diverged": True, search.METRIC: 0.0, "message": str(error)})


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    own = {"epoch", "loss", "train_accuracy", search.METRIC}
    own |= {name for name in metrics if name.startswith("validation_")}
    return {name: metrics[name] for name in metrics if name in own}


def best_student(results: list[TrialResult], student: StudentConfig, sweep: SweepConfig) -> dict[str, Any]:
    """The student's section with the best trial's parameters, ready to be written as YAML."""
    return json.loads(search.trial_config(student, sweep, search.best(results).parameters).model_dump_json())
