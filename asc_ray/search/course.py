"""The course of one search: which trials run, what they reported, and how they ended. It lives in the driver."""

import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from asc_ray import remote
from asc_ray.artifacts import Artifact, read_record, write_record
from asc_ray.errors import ConfigError
from asc_ray.models.complexity import Complexity
from asc_ray.search import proposals
from asc_ray.search.config import METRIC, TRIALS, SweepConfig
from asc_ray.search.halving import should_stop
from asc_ray.search.order import may_start, planned, repeated, within_budget
from asc_ray.search.trials import TrialResult, trial_name
from asc_ray.students.config import Limits, StudentConfig
from asc_ray.students.cost import student_cost

OnEvent = Callable[[str, dict[str, Any]], None]
_OF_A_WORKER = ("parameters", "seed", "parent")  # what a worker needs to know of a trial beside its number


def ended_trials(artifact: Artifact) -> list[TrialResult]:
    """Return a search's trials that have ended; one whose result is not as it was written runs again."""
    remote.pull(artifact.partial, f"{TRIALS}/[0-9]*.json")
    results = []
    for file in sorted((artifact.partial / TRIALS).glob("[0-9]*.json")):
        with suppress(ValidationError):
            result = TrialResult.model_validate(read_record(file) or {})
            if file.name == result_of(result.number):
                results.append(result)
    return results


@dataclass
class _Running:
    """A trial under way: what it is, and what it has reported."""

    parameters: dict[str, Any]
    repeats: int | None
    seed: int
    parent: int | None
    cost: float | None
    curve: list[float] = field(default_factory=list)
    state: Literal["complete", "stopped", "diverged", "failed"] = "complete"
    error: str = ""


class Course:
    """The state of one search, shared by the searcher and the scheduler, in the driver."""

    def __init__(
        self,
        sweep: SweepConfig,
        student: StudentConfig,
        limits: Limits,
        scenes: int,
        folder: Path,
        ended: list[TrialResult],
        on_event: OnEvent,
    ) -> None:
        self._whole, self._student, self._limits, self._scenes = sweep, student, limits, scenes
        self._folder, self.ended, self._on_event = folder, ended, on_event
        self._running: dict[int, _Running] = {}
        self._lost: set[int] = set()
        self._costs: dict[str, Complexity] = {}

    @property
    def sweep(self) -> SweepConfig:
        """Return the search, as far as its budget goes."""
        return within_budget(self._whole, self.ended)

    def left(self) -> list[int]:
        """Return the trials that have not ended, of those that are known so far."""
        return sorted(set(range(planned(self.sweep, self.ended))) - {result.number for result in self.ended})

    def __getstate__(self) -> dict[str, Any]:
        """Return nothing: Tune pickles its parts for a restore of its own, which is not used here."""
        return {}

    def start(self) -> dict[str, Any] | None:
        """Return what the worker of the next trial needs; None while no trial may start."""
        while True:
            waiting = [number for number in self.left() if number not in self._running]
            if not waiting or not may_start(self.sweep, waiting[0], self.ended):
                return None
            number = waiting[0]
            if self._begun(number):
                return {"number": number, **{key: getattr(self._running[number], key) for key in _OF_A_WORKER}}

    def _begun(self, number: int) -> bool:
        """Propose the trial and note that it runs; False where it fails at once, because its network is impossible."""
        sweep = self.sweep
        parameters = proposals.propose(sweep, number, self.ended)
        repeats, seed = repeated(sweep, number, self.ended)
        parent = None
        if sweep.scheduler == "pbt":
            parent = proposals.parent(sweep, number, self.ended)
            # No trial goes on from the generation before the last any more; each member removes one trial of it.
            self._remove(checkpoints_of(number - 2 * sweep.trials))
        trial = self._running[number] = _Running(parameters, repeats, seed, parent, cost=None)
        self._on_event(trial_name(number), {"started": True, **vars(trial)})
        try:
            student = proposals.trial_config(self._student, sweep, parameters)
            trial.cost = proposals.cost_of(sweep, self._counted(student))
        except ValidationError as error:  # each value is valid, but not all together
            trial.error = "; ".join(finding["msg"].removeprefix("Value error, ") for finding in error.errors())
        except ConfigError as error:
            trial.error = str(error)
        if trial.error:
            self.close(number, failed=True)
            return False
        return True

    def _counted(self, student: StudentConfig) -> Complexity:
        """Return the student's cost, counted once a network: in most searches once for all trials."""
        network = student.model_dump_json(include={"model", "frontend"})
        if network not in self._costs:
            self._costs[network] = student_cost(student, self._limits, self._scenes)
        return self._costs[network]

    @property
    def stuck(self) -> bool:
        """Whether nothing runs, and nothing can start before the same command is given again."""
        return self._running.keys() <= {result.number for result in self.ended} | self._lost

    def hear(self, number: int, metrics: Mapping[str, Any]) -> bool:
        """Note an epoch of a trial, and return whether the trial must stop."""
        trial, start = self._running[number], self.sweep.span(number)[0]
        if metrics.get("diverged"):
            trial.state, trial.error = "diverged", metrics["message"]
            return False
        if metrics["epoch"] != start + len(trial.curve) + 1:  # was heard before, and then the trial's worker died
            return False
        trial.curve.append(metrics[METRIC])
        self._on_event(trial_name(number), {"epochs": self.sweep.epochs, **_numbers(metrics)})
        if should_stop(self.sweep, number, trial.curve, self.ended, trial.cost):
            trial.state = "stopped"
            return True
        return False

    def give_up(self, number: int) -> None:
        """Give up a trial whose last attempt failed, by an error of its own or because its worker died."""
        if note := read_record(remote.refreshed(self._folder / error_of(number))):
            self._running[number].error = note["error"]
            self.close(number, failed=True)
        else:  # a worker's death says nothing of the parameters: the trial is left for another time
            self._lost.add(number)

    def close(self, number: int, failed: bool) -> None:
        trial, sweep = self._running[number], self.sweep
        start, end = sweep.span(number)
        if failed:
            trial.state = "failed"
        elif trial.state == "complete" and len(trial.curve) < end - start:
            trial.state, trial.error = "failed", f"it ended after {len(trial.curve)} of {end - start} epochs"
        result = TrialResult(number=number, **vars(trial))
        write_record(self._folder / result_of(number), result.model_dump(mode="json"))
        if sweep.scheduler != "pbt":
            self._remove(checkpoints_of(number))
        self.ended.append(result)
        self._on_event(trial_name(number), {"finished": True, **vars(result), "value": result.value})

    def _remove(self, checkpoints: str) -> None:
        shutil.rmtree(self._folder / checkpoints, ignore_errors=True)
        remote.forget(self._folder / checkpoints)


def checkpoints_of(number: int) -> str:
    return f"{number:04d}.checkpoints"


def result_of(number: int) -> str:
    return f"{number:04d}.json"


def error_of(number: int) -> str:
    return f"{number:04d}.error"


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    own = {"epoch", "loss", "train_accuracy", "seconds", METRIC}
    own |= {name for name in metrics if name.startswith("validation_")}
    return {name: metrics[name] for name in metrics if name in own}
