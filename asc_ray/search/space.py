"""The space of a search: values and ranges by key of the student's configuration, with conditional parts."""

import builtins
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from optuna.trial import FixedTrial
from pydantic import Field, ValidationError, model_validator

from asc_ray.section import Section


class Suggests(Protocol):
    """The methods of an optuna trial that are used here."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...
    def suggest_int(self, name: str, low: int, high: int) -> int: ...
    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


class Parameter(Section):
    """Exactly one of five kinds: bounds of a uniform, log-uniform or integer range, a list of choices, or `one_of`.

    `one_of` maps names to alternatives: a parameter, a value, or a mapping with parameters and values in it, which are
    searched only where the alternative is chosen.
    """

    uniform: tuple[float, float] | None = Field(None, description="bounds of a range, uniform in the values")
    loguniform: tuple[float, float] | None = Field(None, description="bounds of a range, uniform in the logarithms")
    int: tuple[builtins.int, builtins.int] | None = Field(None, description="bounds of a range of whole numbers")
    choice: tuple[builtins.bool | builtins.int | float | str | None, ...] | None = Field(
        None, description="values to choose from"
    )
    one_of: dict[str, Any] | None = Field(None, description="named alternatives to choose from")

    @model_validator(mode="after")
    def _one_and_ordered(self) -> "Parameter":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of {', '.join(KINDS)}; found {given or 'none'}")
        for name in ("choice", "one_of"):
            if getattr(self, name) is not None:
                if not getattr(self, name):
                    raise ValueError(f"{name}: expected at least one value")
                return self
        low, high = self.uniform or self.loguniform or self.int or (0, 0)
        if low >= high:
            raise ValueError(f"{given[0]}: the lower bound {low} is not below the upper bound {high}")
        if self.loguniform and low <= 0:
            raise ValueError(f"loguniform: the lower bound {low} is not positive")
        return self

    @model_validator(mode="before")
    @classmethod
    def _parsed(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and isinstance(raw.get("one_of"), dict):
            return raw | {"one_of": {name: _parsed(value, name) for name, value in sorted(raw["one_of"].items())}}
        if not isinstance(raw, dict | Parameter):
            raise ValueError(f"expected a mapping with one of {', '.join(KINDS)}, as in {{uniform: [0.1, 0.5]}}")
        return raw

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Return the value that the trial takes here."""
        if self.uniform:
            return trial.suggest_float(name, *self.uniform)
        if self.loguniform:
            return trial.suggest_float(name, *self.loguniform, log=True)
        if self.int:
            return trial.suggest_int(name, *self.int)
        if self.choice is not None:
            return trial.suggest_categorical(name, self.choice)
        assert self.one_of is not None
        chosen = trial.suggest_categorical(name, tuple(self.one_of))
        return _suggest(self.one_of[chosen], trial, f"{name}.{chosen}")

    def ends(self) -> Iterator[Any]:
        """Yield values that must all be valid for the key: both bounds, every choice, and every alternative.

        An alternative occurs with all combinations of its own ends.
        """
        if self.one_of is not None:
            for alternative in self.one_of.values():
                yield from _ends(alternative)
        else:
            yield from self.uniform or self.loguniform or self.int or self.choice or ()


KINDS = tuple(Parameter.model_fields)
Space = Mapping[str, Parameter]


def suggested(space: Space, trial: Suggests) -> dict[str, Any]:
    """Return the values that the trial takes, by key of the student's configuration."""
    return {key: parameter.suggest(trial, key) for key, parameter in space.items()}


def values_of(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by key of the student's configuration, from a trial's parameters as optuna knows them."""
    return suggested(space, FixedTrial(dict(parameters)))


def distributions(space: Space, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the distribution that each of a trial's parameters was drawn from."""
    trial = FixedTrial(dict(parameters))
    suggested(space, trial)
    return trial.distributions


def _parsed(raw: Any, path: str) -> Any:
    """Parse the parameters inside the alternative at `path`: mappings with a kind's name as their only key."""
    if not isinstance(raw, dict):
        return raw
    if len(raw) == 1 and next(iter(raw)) in KINDS:
        try:
            return Parameter.model_validate(raw)
        except ValidationError as error:
            found = "; ".join(finding["msg"].removeprefix("Value error, ") for finding in error.errors())
            raise ValueError(f"one_of.{path}: {found}") from None
    return {name: _parsed(value, f"{path}.{name}") for name, value in sorted(raw.items())}


def _suggest(value: Any, trial: Suggests, name: str) -> Any:
    if isinstance(value, Parameter):
        return value.suggest(trial, name)
    if isinstance(value, dict):
        return {key: _suggest(own, trial, f"{name}.{key}") for key, own in value.items()}
    return value


def _ends(value: Any) -> Iterator[Any]:
    if isinstance(value, Parameter):
        yield from value.ends()
    elif isinstance(value, dict):
        for ends in itertools.product(*(list(_ends(own)) for own in value.values())):
            yield dict(zip(value, ends, strict=True))
    else:
        yield value
