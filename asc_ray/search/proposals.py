"""What a trial tries: its parameters follow from the results of earlier trials, and from nothing else.

Parallel searches usually depend on which trial ends first. Here a decision about trial n uses the results of trials
0 .. n - lookback alone, all of which have ended by then; so the same configuration gives the same search on any number
of workers, and a search that was killed goes on as if nothing had happened.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import optuna

from asc_ray.models.complexity import Complexity
from asc_ray.search.config import SweepConfig
from asc_ray.search.order import repeated, visible
from asc_ray.search.population import ancestor, explored
from asc_ray.search.space import distributions, suggested, values_of
from asc_ray.search.trials import TrialResult
from asc_ray.students.config import StudentConfig, changed

optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study tells a user nothing


def trial_config(student: StudentConfig, sweep: SweepConfig, parameters: Mapping[str, Any]) -> StudentConfig:
    """Return the configuration of the trial with these parameters."""
    return changed(student, values_of(sweep.space, parameters))


def cost_of(config: SweepConfig, counted: Complexity) -> float | None:
    """Return what a trial's network costs, or None where the search has no `cost`."""
    if config.cost is None:
        return None
    return float(counted.macs if config.cost == "macs" else counted.bytes["int8"])


def propose(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> dict[str, Any]:
    """Return the parameters of trial `number`, from the trials among `ended` that it may learn from."""
    if config.scheduler == "pbt" and (origin := parent(config, number, ended)) is not None:
        own = next(r.parameters for r in ended if r.number == origin)
        if origin % config.trials == number % config.trials:
            return own
        return explored(config.population, config.space, own, _generator(config, number, 1))
    if number >= config.searched:
        return next(r.parameters for r in ended if r.number == repeated(config, number, ended)[0])
    drawn = config.sampler == "random" or config.scheduler == "pbt" or number < config.startup_trials
    # A random draw looks at no result, and Optuna copies each that it is given.
    known = [] if drawn else visible(config, number, ended)
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if drawn
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        )
        directions: list[Literal["maximize", "minimize"]] = ["maximize", "minimize"] if config.cost else ["maximize"]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for result in known:
            if config.cost and result.cost is None:  # it failed before its network was counted
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    params=result.parameters,
                    distributions=distributions(config.space, result.parameters),
                    values=[result.value, *([] if result.cost is None else [result.cost])],
                    intermediate_values=dict(enumerate(result.curve)),
                    # Optuna has no pruned trials with two objectives; there the last value counts.
                    state=optuna.trial.TrialState.PRUNED
                    if result.state == "stopped" and not config.cost
                    else optuna.trial.TrialState.COMPLETE,
                )
            )
        trial = study.ask()
        suggested(config.space, trial)
        return trial.params


def parent(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> int | None:
    """Return the trial of a population's last generation whose weights trial `number` goes on from, if any."""
    first = (number // config.trials - 1) * config.trials
    if first < 0:
        return None
    before = {r.number - first: r for r in ended if first <= r.number < first + config.trials}
    values = [before[m].value if before[m].state == "complete" else None for m in range(config.trials)]
    chosen = ancestor(config.population, number % config.trials, values, _generator(config, number, 0))
    return None if chosen is None else first + chosen


def _generator(config: SweepConfig, number: int, use: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, number, use])
