"""The search for the student's configuration: space, proposals and early stopping, all reproducible.

Parallel searches usually depend on which trial ends first. Here a decision about trial n uses the results of trials
0 .. n - lookback alone, all of which have ended by then; so the same configuration gives the same search on any number
of workers, and a search that was killed goes on as if it had not been.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna
from pydantic import Field, ValidationError, field_validator

from asc_ray.errors import UserError
from asc_ray.section import Section
from asc_ray.training.space import KINDS, Parameter, distributions, grid, suggested, values_of
from asc_ray.training.systems import StudentConfig

METRIC = "objective"
optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study tells a user nothing


class ObjectiveConfig(Section):
    """What trials are judged by: macro accuracy on the validation part.

    `devices` are left out of the trials' training to stand for unseen ones; the objective is then
    `weight` x the macro accuracy on their validation clips + (1 - weight) x that on the others'.
    """

    devices: tuple[str, ...] = ()
    weight: float = Field(0.5, ge=0.0, le=1.0)

    def value(self, metrics: Mapping[str, float]) -> float:
        if not self.devices:
            return metrics["validation_macro_accuracy"]
        return self.weight * metrics["validation_unseen"] + (1 - self.weight) * metrics["validation_seen"]


class SweepConfig(Section):
    """Optuna search over `space` (keys of `student`) with successive halving; scored on the validation part only.

    `sampler: grid` takes the points of the space in their order.
    """

    trials: int = Field(40, ge=1)
    epochs: int = Field(30, ge=1, description="epochs of a trial that is not stopped; the schedule is scaled to them")
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    startup_trials: int = Field(10, ge=1, description="random proposals before the search learns from results")
    lookback: int = Field(4, ge=1, description="trial n learns from trials 0 .. n - lookback; bounds concurrency")
    grace_epochs: int = Field(5, ge=1, description="no trial is stopped before")
    reduction: int = Field(3, ge=2, description="one trial in so many passes a rung")
    finalists: int = Field(1, ge=1, description="best trials that are run again with other seeds")
    seeds: int = Field(1, ge=1, description="of each finalist; the winner has the best mean over them")
    validation: ObjectiveConfig = ObjectiveConfig()
    seed: int = Field(0, ge=0)
    space: dict[str, Parameter] = Field(min_length=1)

    @property
    def most(self) -> int:
        """How many trials there can be, with the finalists' other seeds."""
        return self.trials + self.finalists * (self.seeds - 1)

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, raw: Any) -> Any:
        """Keys by dots or by mappings, as `--set sweep.space.optimizer.learning_rate={...}` makes them."""
        if not isinstance(raw, dict):
            return raw
        flat: dict[str, Any] = {}
        for key, value in raw.items():
            if isinstance(value, dict) and value and not set(value) & set(KINDS):
                flat |= {f"{key}.{inner}": own for inner, own in cls._flat(value).items()}
            else:
                flat[key] = value
        return flat

    def check(self, student: StudentConfig) -> None:
        """Raise ValueError when a key is unknown, an end of its range is not allowed, or a grid is too small."""
        if self.sampler == "grid" and self.trials > (points := len(grid(self.space))):
            raise ValueError(f"sweep.trials: {self.trials}, but the grid of sweep.space has {points} points")
        for key, parameter in self.space.items():
            for value in parameter.ends():
                try:
                    changed(student, {key: value})
                except ValidationError as error:
                    finding = error.errors()[0]
                    raise ValueError(f"sweep.space.{key}: student.{key}={value!r}: {finding['msg']}") from None
                except KeyError as error:
                    raise ValueError(f"sweep.space.{key}: student has no key {error.args[0]!r}") from None


class TrialResult(Section):
    """How a trial ended: `curve` holds the metric after each epoch; a diverged or failed one has what came before."""

    number: int
    parameters: dict[str, Any]
    curve: tuple[float, ...]
    state: Literal["complete", "stopped", "diverged", "failed"]
    error: str = ""
    repeats: int | None = Field(None, description="of a finalist's other seeds: the trial whose parameters it has")
    seed: int = Field(0, description="added to the student's")

    @property
    def value(self) -> float:
        return self.curve[-1] if self.curve and self.state in {"complete", "stopped"} else 0.0


def apply_overrides(raw: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Set dotted keys of nested mappings in place, making mappings on the way."""
    for path, value in values.items():
        *parents, leaf = path.split(".")
        target = raw
        for part in parents:
            if not isinstance(target.get(part), dict):
                target[part] = {}
            target = target[part]
        target[leaf] = value


def changed(student: StudentConfig, values: Mapping[str, Any]) -> StudentConfig:
    """The student's configuration with these values, by key, laid over it."""
    raw = student.model_dump()
    apply_overrides(raw, values)
    return StudentConfig.model_validate(raw)


def trial_config(student: StudentConfig, sweep: SweepConfig, parameters: Mapping[str, Any]) -> StudentConfig:
    """The configuration of the trial with these parameters."""
    return changed(student, values_of(sweep.space, parameters))


def propose(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> dict[str, Any]:
    """Parameters of trial `number`, from the trials among `ended` that it may learn from."""
    if number >= config.trials:
        return next(r.parameters for r in ended if r.number == repeated(config, number, ended)[0])
    if config.sampler == "grid":
        return grid(config.space)[number]
    known = _visible(config, number, ended)
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if config.sampler == "random" or number < config.startup_trials
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for result in known:
            study.add_trial(
                optuna.trial.create_trial(
                    params=result.parameters,
                    distributions=distributions(config.space, result.parameters),
                    value=result.value,
                    intermediate_values=dict(enumerate(result.curve)),
                    state=optuna.trial.TrialState.PRUNED
                    if result.state == "stopped"
                    else optuna.trial.TrialState.COMPLETE,
                )
            )
        trial = study.ask()
        suggested(config.space, trial)
        return trial.params


def finalists(config: SweepConfig, ended: Sequence[TrialResult]) -> list[int]:
    """The best trials that ran to their end, once all of the search have ended; the first of equals first."""
    searched = [r for r in ended if r.number < config.trials]
    if len(searched) < config.trials:
        return []
    complete = sorted((r for r in searched if r.state == "complete"), key=lambda r: (-r.value, r.number))
    return [r.number for r in complete[: config.finalists]]


def planned(config: SweepConfig, ended: Sequence[TrialResult]) -> int:
    """How many trials there are as far as is known: those of the search, then the finalists' other seeds."""
    return config.trials + len(finalists(config, ended)) * (config.seeds - 1)


def repeated(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> tuple[int | None, int]:
    """Of a trial after those of the search: which one it repeats, and with what added to its seed."""
    if number < config.trials:
        return None, 0
    finalist, seed = divmod(number - config.trials, config.seeds - 1)
    return finalists(config, ended)[finalist], seed + 1


def may_start(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> bool:
    """Whether every trial that trial `number` learns from has ended."""
    if number >= config.trials:
        return number < planned(config, ended)
    return len(_visible(config, number, ended)) == max(0, number - config.lookback + 1)


def should_stop(config: SweepConfig, number: int, curve: Sequence[float], ended: Sequence[TrialResult]) -> bool:
    """Asynchronous successive halving (Li et al., 2020) over the trials that trial `number` may learn from.

    At a rung (grace_epochs x reduction^k epochs) a trial goes on when it is among the best 1/reduction there.
    """
    if number >= config.trials:
        return False
    epoch, rung = len(curve), config.grace_epochs
    while rung < epoch:
        rung *= config.reduction
    if epoch != rung or epoch >= config.epochs:
        return False
    others = [r.curve[epoch - 1] for r in _visible(config, number, ended) if len(r.curve) >= epoch]
    if not others:
        return False
    return curve[-1] < float(np.quantile(others, 1.0 - 1.0 / config.reduction))


def best(ended: Sequence[TrialResult]) -> TrialResult:
    """The trial with the best last value among those that ran to the end, the first of equals.

    Of finalists with several seeds the mean counts, and trials that are no finalist's do not win.
    Raises UserError when no trial ran to its end.
    """
    complete = [r for r in ended if r.state == "complete" and r.repeats is None]
    if not complete:
        states = "; ".join(f"trial {r.number} {r.state} {r.error}".strip() for r in ended)
        raise UserError(f"sweep: no trial ran to its end ({states}); make the space smaller")
    several = [r for r in complete if len(values_over_seeds(ended, r.number)) > 1]
    return max(several or complete, key=lambda r: (np.mean(values_over_seeds(ended, r.number)), -r.number))


def values_over_seeds(ended: Sequence[TrialResult], number: int) -> list[float]:
    """The last values of a trial and of its repetitions with other seeds."""
    return [r.value for r in ended if number in (r.number, r.repeats)]


def _visible(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> list[TrialResult]:
    return sorted((r for r in ended if r.number <= number - config.lookback), key=lambda r: r.number)
