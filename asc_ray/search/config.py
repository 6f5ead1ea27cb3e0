"""The configuration of a search, and the kinds of parameters that its space has."""

import builtins
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from asc_ray.section import Section

METRIC = "objective"
TRIALS = "trials"  # the folder of an unfinished search that holds their results
# Keys of the student that a population may change between generations, because the weights fit any value of theirs.
CHANGES_WHILE_TRAINING = (
    "augment.",
    "balance",
    "distillation.label_weight",
    "distillation.temperature",
    "optimizer.batch_size",
    "optimizer.clip_norm",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
)
# Keys of the student whose values trials cannot compare, and why.
NOT_JUDGED = {
    "checkpoint": "with it nothing is trained",
    "init": "a trial's key has no contents of files",
    "model.pretrained": "a trial's key has no contents of files",
    "optimizer.epochs": "trials train for sweep.epochs",
    "seed": "a good seed is luck",
    "seeds": "a trial has one",
    "specialize": "it follows the search",
    "select": "a trial's value is that of its last epoch",
}


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


def _ends(value: Any) -> Iterator[Any]:
    if isinstance(value, Parameter):
        yield from value.ends()
    elif isinstance(value, dict):
        for ends in itertools.product(*(list(_ends(own)) for own in value.values())):
            yield dict(zip(value, ends, strict=True))
    else:
        yield value


class PopulationConfig(Section):
    """Settings of `scheduler: pbt`, where `trials` is the size of the population."""

    every: int = Field(5, ge=1, description="epochs of a generation")
    replaced: float = Field(
        0.25, gt=0.0, le=0.5, description="share of the worst, which take the weights of as many best ones"
    )
    resample: float = Field(0.25, ge=0.0, le=1.0, description="chance that a parameter is drawn anew, not changed")


class ObjectiveConfig(Section):
    """What trials are judged by: macro accuracy on the validation part.

    `devices` are left out of the trials' training to stand for unseen ones; the objective is then
    `weight` x the macro accuracy on their validation clips + (1 - weight) x that on the others'.
    """

    devices: tuple[str, ...] = Field((), description="held-out devices")
    weight: float = Field(0.5, ge=0.0, le=1.0, description="share of the held-out devices in the objective")

    def value(self, metrics: Mapping[str, float]) -> float:
        if not self.devices:
            return metrics["validation_macro_accuracy"]
        return self.weight * metrics["validation_unseen"] + (1 - self.weight) * metrics["validation_seen"]


class BudgetConfig(Section):
    """What ends a search before its last trial; trials that are under way run to their ends."""

    gone: ClassVar[Mapping[str, Any]] = {"minutes": None}
    epochs: int | None = Field(None, ge=1, description="epochs of all trials together")


class SweepConfig(Section):
    """Optuna search over `space` (keys of `student`), scored on the validation part only.

    `scheduler: asha` is successive halving; with `pbt`, `trials` is the size of a population that is drawn at random
    and changes as it trains.
    """

    trials: int = Field(40, ge=1, description="number of trials; with `pbt`, members of the population")
    scheduler: Literal["asha", "pbt", "none"] = Field("asha", description="what stops or changes a trial on its way")
    population: PopulationConfig = PopulationConfig()
    budget: BudgetConfig = BudgetConfig()
    cost: Literal["bytes", "macs"] | None = Field(
        None, description="second objective, to be low: bytes of the int8 weights, or multiply-accumulates"
    )
    epochs: int = Field(30, ge=1, description="epochs of a trial that is not stopped; the schedule is scaled to them")
    sampler: Literal["tpe", "random"] = Field("tpe", description="what proposes parameters")
    startup_trials: int = Field(10, ge=1, description="random proposals before the search learns from results")
    lookback: int = Field(4, ge=1, description="trial n learns from trials 0 .. n - lookback; bounds concurrency")
    grace_epochs: int = Field(5, ge=1, description="epochs before which no trial is stopped")
    reduction: int = Field(3, ge=2, description="one trial in so many passes a rung")
    finalists: int = Field(1, ge=1, description="best trials that are run again with other seeds")
    seeds: int = Field(1, ge=1, description="seeds of a finalist; the winner has the best mean over them")
    validation: ObjectiveConfig = ObjectiveConfig()
    seed: int = Field(0, ge=0, description="seed of the proposals")
    space: dict[str, Parameter] = Field(min_length=1, description="what is searched, by keys of `student`")

    @property
    def searched(self) -> int:
        """Return the number of trials before the finalists'; a population has one a member and generation."""
        generations = -(-self.epochs // self.population.every) if self.scheduler == "pbt" else 1
        return self.trials * generations

    @property
    def most(self) -> int:
        """Return the largest possible number of trials, with the finalists' other seeds."""
        return self.searched + self.finalists * (self.seeds - 1)

    @property
    def most_at_once(self) -> tuple[str, int]:
        """Return the key that bounds how many trials run at once, and its value."""
        return ("sweep.trials", self.trials) if self.scheduler == "pbt" else ("sweep.lookback", self.lookback)

    def span(self, number: int) -> tuple[int, int]:
        """Return the epochs that this trial trains: after the first number, up to the second."""
        if self.scheduler != "pbt":
            return 0, self.epochs
        start = number // self.trials * self.population.every
        return start, min(self.epochs, start + self.population.every)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.finalists > 1 and self.seeds == 1 and self.scheduler != "pbt":
            raise ValueError(f"finalists: {self.finalists}, each with one seed, which they had; give seeds: 2 or more")
        if self.scheduler != "pbt":
            return self
        for key, found, allowed in (
            ("seeds", self.seeds > 1, "1: its winner is a course of parameters, not one configuration"),
            ("cost", self.cost is not None, "null: a network cannot change its size"),
            ("budget", self.budget != BudgetConfig(), "none: a population takes trials x epochs"),
            ("trials", self.trials < 2, "2 or more members of the population"),
        ):
            if found:
                raise ValueError(f"{key}: with scheduler pbt allowed is {allowed}")
        for key, parameter in self.space.items():
            if not key.startswith(CHANGES_WHILE_TRAINING) or parameter.one_of is not None:
                raise ValueError(
                    f"space.{key}: with scheduler pbt allowed are ranges and choices that a training can change on its "
                    f"way: of {', '.join(CHANGES_WHILE_TRAINING)}"
                )
        return self

    @field_validator("space", mode="before")
    @classmethod
    def _flat(cls, raw: Any) -> Any:
        """Join nested keys by dots, because `--set sweep.space.optimizer.learning_rate={...}` makes mappings."""
        if not isinstance(raw, dict):
            return raw
        flat: dict[str, Any] = {}
        for key, value in raw.items():
            if isinstance(value, dict) and value and not set(value) & set(KINDS):
                flat |= {f"{key}.{inner}": own for inner, own in cls._flat(value).items()}
            else:
                flat[key] = value
        return dict(sorted(flat.items()))  # a search, like its key, does not depend on the order of the file
