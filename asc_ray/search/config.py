"""The configuration of a search."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from asc_ray.search.population import PopulationConfig
from asc_ray.search.space import KINDS, Parameter
from asc_ray.section import Section

METRIC = "objective"
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
