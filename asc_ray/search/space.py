"""What a trial takes of a search's space: a value for each key of the student's configuration."""

from collections.abc import Mapping
from typing import Any, Protocol

from optuna.trial import FixedTrial

from asc_ray.search.config import Parameter


class Suggests(Protocol):
    """The methods of an optuna trial that are used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


Space = Mapping[str, Parameter]


def suggested(space: Space, trial: Suggests) -> dict[str, Any]:
    """Return the values that the trial takes, by key of the student's configuration."""
    return {key: _suggest(parameter, trial, key) for key, parameter in space.items()}


def values_of(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by key of the student's configuration, from a trial's parameters as optuna knows them."""
    return suggested(space, FixedTrial(dict(parameters)))


def distributions(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the distribution that each of a trial's parameters was drawn from."""
    trial = FixedTrial(dict(parameters))
    suggested(space, trial)
    return trial.distributions


def _suggest(value: Any, trial: Suggests, name: str) -> Any:
    """Return the value that the trial takes for a parameter, or for a mapping with parameters in it."""
    if isinstance(value, dict):
        return {key: _suggest(own, trial, f"{name}.{key}") for key, own in value.items()}
    return _drawn(value, trial, name) if isinstance(value, Parameter) else value


def _drawn(parameter: Parameter, trial: Suggests, name: str) -> Any:
    if parameter.uniform:
        return trial.suggest_float(name, *parameter.uniform)
    if parameter.loguniform:
        return trial.suggest_float(name, *parameter.loguniform, log=True)
    if parameter.int:
        return trial.suggest_int(name, *parameter.int)
    if parameter.choice is not None:
        return trial.suggest_categorical(name, parameter.choice)
    assert parameter.one_of is not None
    chosen = trial.suggest_categorical(name, tuple(parameter.one_of))
    return _suggest(parameter.one_of[chosen], trial, f"{name}.{chosen}")
