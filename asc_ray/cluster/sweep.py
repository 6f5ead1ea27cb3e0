"""The search for the student's configuration on Ray Tune; training.search decides what to propose and stop."""

import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from asc_ray.artifacts import Artifact, read_record, write_record
from asc_ray.cluster.resources import Resources
from asc_ray.cluster.runtime import OnEvent, settle, slots
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.complexity import Complexity, Limits
from asc_ray.models.registry import build
from asc_ray.training import search
from asc_ray.training.dataset import SoftTargets, Source
from asc_ray.training.loop import Diverged, Metrics
from asc_ray.training.search import SweepConfig, TrialResult
from asc_ray.training.systems import StudentConfig, fit_student, soft_targets, student_cost

TRIALS = "trials"
CLOCK = "clock.json"
_OF_A_WORKER = ("parameters", "seed", "parent")  # what it needs to know of a trial beside its number
# How Tune is to behave, read when it starts.
SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # they would write every trial's curve three more times
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the pipeline; Tune would end the search alone
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a heading however silent it is asked to be
}
# It would print a traceback for each attempt; how trials ended is told at the end.
logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
SCRATCH = ("trials/*.checkpoints", "trials/*.error", "trials/*.tmp", CLOCK)


def run_sweep(
    artifact: Artifact,
    source: Source,
    targets: Mapping[str, SoftTargets | None],
    student: StudentConfig,
    sweep: SweepConfig,
    limits: Limits,
    resources: Resources,
    retries: int,
    on_event: OnEvent,
) -> list[TrialResult]:
    """Run the trials that have not ended yet; returns all, by number. `targets`: soft targets, by name.

    A trial whose network is over the `limits`, or works on no clip, fails without a training; one that raises an error
    is tried again `retries` times, and has then failed with it. A trial's result is a file of the artifact, its
    checkpoints lie beside it, and its proposal follows from the results before it: nothing of Tune's own state is
    needed to go on after the driver died.
    """
    source = replace(source, strangers=sweep.validation.devices)
    data = source.open()
    folder = artifact.open_partial() / TRIALS
    folder.mkdir(exist_ok=True)
    scratch = artifact.storage / ".ray-tune"
    shutil.rmtree(scratch, ignore_errors=True)  # of a driver that was killed
    course = _Course(sweep, student, limits, len(data.store.labels), folder, ended_trials(artifact), on_event)
    if course.left():
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        trainable = tune.with_resources(
            tune.with_parameters(
                _trial,
                work={
                    "folder": folder,
                    "source": source,
                    # One copy a node, in Ray's shared memory, as the clips are one mapped file.
                    "soft": {name: soft_targets(data, path) for name, path in targets.items()},
                    "student": student,
                    "sweep": sweep,
                    "resources": resources,
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
                    max_concurrent_trials=concurrent(sweep, resources),
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
            f"sweep: {len(left)} of {search.planned(course.sweep, course.ended)} trials did not end, for their workers "
            "died too often or there was no room for them; the same command goes on"
        )
    return sorted(course.ended, key=lambda result: result.number)


def ended_trials(artifact: Artifact) -> list[TrialResult]:
    """Of a search under way, those that have ended; one whose result is not as it was written runs again."""
    results = []
    for file in sorted((artifact.partial / TRIALS).glob("[0-9]*.json")):
        with suppress(ValidationError):
            result = TrialResult.model_validate(read_record(file) or {})
            if file.name == _result(result.number):
                results.append(result)
    return results


def concurrent(sweep: SweepConfig, resources: Resources) -> int:
    """How many trials run at once: as many as there are slots, but no more than the search can propose."""
    return min(sweep.trials if sweep.scheduler == "pbt" else sweep.lookback, slots(resources))


class _Clock:
    """How long a search has run, over all its drivers, and which trial its time did not last for: in a file."""

    def __init__(self, file: Path) -> None:
        stored = read_record(file) or {"seconds": 0.0, "closed": None}
        self.closed: int | None = stored["closed"]
        self._file, self._before, self._start = file, stored["seconds"], time.monotonic()

    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def save(self) -> None:
        write_record(self._file, {"seconds": self.seconds(), "closed": self.closed})


@dataclass
class _Running:
    """A trial under way: what it is, and what was heard of it."""

    parameters: dict[str, Any]
    repeats: int | None
    seed: int
    parent: int | None
    cost: float | None
    curve: list[float] = field(default_factory=list)
    state: Literal["complete", "stopped", "diverged", "failed"] = "complete"
    error: str = ""


class _Course:
    """The state of one search, shared by the searcher and the scheduler, in the driver."""

    def __init__(
        self,
        sweep: SweepConfig,
        student: StudentConfig,
        limits: Limits,
        classes: int,
        folder: Path,
        ended: list[TrialResult],
        on_event: OnEvent,
    ) -> None:
        self._whole, self._student, self._limits, self._classes = sweep, student, limits, classes
        self._folder, self.ended, self._on_event = folder, ended, on_event
        self._clock = _Clock(folder.parent / CLOCK)
        self._running: dict[int, _Running] = {}
        self._lost: set[int] = set()
        self._costs: dict[str, Complexity] = {}

    @property
    def sweep(self) -> SweepConfig:
        """The search, no longer than its budgets."""
        within = search.within_budget(self._whole, self.ended)
        if self._clock.closed is None:
            return within
        return within.model_copy(update={"trials": min(within.trials, self._clock.closed)})

    def left(self) -> list[int]:
        """Trials that have not ended, as far as is known which there are."""
        return sorted(set(range(search.planned(self.sweep, self.ended))) - {result.number for result in self.ended})

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its parts for a restore of its own, which is not used here."""
        return {}

    def start(self) -> dict[str, Any] | None:
        """What the worker of the next trial needs; None while that has to wait for others."""
        while True:
            waiting = [number for number in self.left() if number not in self._running]
            if not waiting or not search.may_start(self.sweep, waiting[0], self.ended):
                return None
            number = waiting[0]
            if self._out_of_time(number):
                self._clock.closed = number
                self._clock.save()
            elif self._begun(number):
                return {"number": number, **{key: getattr(self._running[number], key) for key in _OF_A_WORKER}}

    def _out_of_time(self, number: int) -> bool:
        """Whether a trial of the search may not start any more; what a killed driver had under way goes on."""
        minutes = self._whole.budget.minutes
        if not minutes or number == 0 or number >= self.sweep.searched:
            return False
        begun = {result.number for result in self.ended} | {int(f.stem) for f in self._folder.glob("*.checkpoints")}
        return number > max(begun, default=-1) and self._clock.seconds() > 60 * minutes

    def _begun(self, number: int) -> bool:
        """Propose the trial and note that it runs; False where it has failed already, for there is no such network."""
        sweep = self.sweep
        parameters = search.propose(sweep, number, self.ended)
        repeats, seed = search.repeated(sweep, number, self.ended)
        parent = search.parent(sweep, number, self.ended) if sweep.scheduler == "pbt" else None
        trial = self._running[number] = _Running(parameters, repeats, seed, parent, cost=None)
        self._on_event(search.trial_name(number), {"started": True, **vars(trial)})
        try:
            trial.cost = search.cost_of(sweep, self._counted(search.trial_config(self._student, sweep, parameters)))
        except ValidationError as error:  # values that are right each for itself
            trial.error = "; ".join(finding["msg"].removeprefix("Value error, ") for finding in error.errors())
        except ConfigError as error:
            trial.error = str(error)
        if trial.error:
            self.close(number, failed=True)
            return False
        for old in range(number // sweep.trials * sweep.trials - sweep.trials):  # nobody goes on from these any more
            shutil.rmtree(self._folder / _checkpoints(old), ignore_errors=True)
        return True

    def _counted(self, student: StudentConfig) -> Complexity:
        """Of most searches, once for all trials."""
        network = student.model_dump_json(include={"model", "frontend"})
        if network not in self._costs:
            self._costs[network] = student_cost(student, self._limits, self._classes)
        return self._costs[network]

    @property
    def stuck(self) -> bool:
        """Whether nothing runs, and nothing can start before the same command is given again."""
        return self._running.keys() <= {result.number for result in self.ended} | self._lost

    def hear(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Note an epoch of a trial; returns whether the trial is to stop."""
        trial, start = self._running[number], self.sweep.span(number)[0]
        if metrics.get("diverged"):
            trial.state, trial.error = "diverged", metrics["message"]
            return False
        if metrics["epoch"] != start + len(trial.curve) + 1:  # heard before the trial's worker died
            return False
        trial.curve.append(metrics[search.METRIC])
        self._clock.save()
        self._on_event(search.trial_name(number), {"epochs": self.sweep.epochs, **_numbers(metrics)})
        if search.should_stop(self.sweep, number, trial.curve, self.ended, trial.cost):
            trial.state = "stopped"
            return True
        return False

    def give_up(self, number: int) -> None:
        """Of a trial whose last attempt failed, with an error of its own or with its worker."""
        if note := read_record(self._folder / _error(number)):
            self._running[number].error = note["error"]
            self.close(number, failed=True)
        else:  # says nothing of its parameters: it is left for another time
            self._lost.add(number)

    def close(self, number: int, failed: bool) -> None:
        trial, sweep = self._running[number], self.sweep
        start, end = sweep.span(number)
        if failed:
            trial.state = "failed"
        elif trial.state == "complete" and len(trial.curve) < end - start:
            trial.state, trial.error = "failed", f"it ended after {len(trial.curve)} of {end - start} epochs"
        result = TrialResult(number=number, **vars(trial))
        write_record(self._folder / _result(number), result.model_dump(mode="json"))
        if sweep.scheduler != "pbt":
            shutil.rmtree(self._folder / _checkpoints(number), ignore_errors=True)
        self.ended.append(result)
        self._on_event(search.trial_name(number), {"finished": True, **vars(result), "value": result.value})


class _Proposals(Searcher):
    """Tune's view of the trials to come."""

    def __init__(self, course: _Course) -> None:
        super().__init__(metric=search.METRIC, mode="max")
        self._course = course
        self._numbers: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        trial = self._course.start()
        if trial is None:  # while some still run, they may become finalists
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


class _SpanEnds(Exception):
    """A trial has trained the epochs that are its own."""


def _trial(config: dict[str, Any], work: dict[str, Any]) -> None:
    """One trial on a worker. What it raises is also left in a file: Tune does not tell it from a worker's death."""
    note = work["folder"] / _error(config["number"])
    note.unlink(missing_ok=True)
    try:
        _train(config, work)
    except Exception as error:
        write_record(note, {"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise


def _train(config: dict[str, Any], work: dict[str, Any]) -> None:
    torch.set_num_threads(work["resources"].threads)
    sweep, number = work["sweep"], config["number"]
    student = search.trial_config(work["student"], sweep, config["parameters"])
    optimizer, seed = student.optimizer.scaled_to(sweep.epochs), student.seed + config["seed"]
    student = student.model_copy(update={"optimizer": optimizer, "seed": seed})
    data = work["source"].open()
    model = build(student.model, len(data.store.labels), student.seed)
    checkpoints = work["folder"] / _checkpoints(number)
    if config["parent"] is not None and not checkpoints.is_dir():
        copied = checkpoints.with_suffix(f".{os.getpid()}.tmp")
        shutil.copytree(work["folder"] / _checkpoints(config["parent"]), copied)
        copied.rename(checkpoints)
    start, end = sweep.span(number)

    def report(metrics: Metrics) -> None:
        if metrics["epoch"] > start:  # what came before is the parent's
            tune.report(metrics | {search.METRIC: sweep.validation.value(metrics)})
        if metrics["epoch"] == end < sweep.epochs:
            raise _SpanEnds

    try:
        soft, gpus = work["soft"][student.distillation.soft_target], work["resources"].gpus
        fit_student(model, student, data, soft, checkpoints, gpus, report)
    except Diverged as error:
        tune.report({"diverged": True, search.METRIC: 0.0, "message": str(error)})
    except _SpanEnds:
        pass


def _checkpoints(number: int) -> str:
    return f"{number:04d}.checkpoints"


def _result(number: int) -> str:
    return f"{number:04d}.json"


def _error(number: int) -> str:
    return f"{number:04d}.error"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    own = {"epoch", "loss", "train_accuracy", "seconds", search.METRIC}
    own |= {name for name in metrics if name.startswith("validation_")}
    return {name: metrics[name] for name in metrics if name in own}
