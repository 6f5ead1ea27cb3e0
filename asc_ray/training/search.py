"""The search for the student's configuration: space, proposals and early stopping, all reproducible.

Parallel searches usually depend on which trial ends first. Here a decision about trial n uses the results of trials
0 .. n - lookback alone, all of which have ended by then; so the same configuration gives the same search on any number
of workers, and a search that was killed goes on as if it had not been.
"""

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np
import optuna
from pydantic import Field, ValidationError, field_validator, model_validator

from asc_ray.errors import UserError
from asc_ray.models.complexity import Complexity
from asc_ray.section import Section
from asc_ray.training.explain import explain
from asc_ray.training.population import PopulationConfig, ancestor, explored
from asc_ray.training.space import KINDS, Parameter, Space, distributions, grid, suggested, values_of
from asc_ray.training.systems import StudentConfig

METRIC = "objective"
ENDED_WELL = ("complete", "stopped")
FEWEST_FOR_IMPORTANCE = 8
COLUMNS = ("number", "state", "value", "cost", "repeats", "seed", "parent", "error", "epochs", "pareto")
# Of the student: what a population may change between generations, for the weights fit whatever it is.
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
# Of the student: what trials cannot tell the worth of, and why.
NOT_JUDGED = {
    "checkpoint": "with it nothing is trained",
    "optimizer.epochs": "trials train for sweep.epochs",
    "seed": "a good seed is luck",
    "seeds": "a trial has one",
    "select": "a trial's value is that of its last epoch",
}
optuna.logging.set_verbosity(optuna.logging.WARNING)  # a line for every study tells a user nothing


class ObjectiveConfig(Section):
    """What trials are judged by: macro accuracy on the validation part.

    `devices` are left out of the trials' training to stand for unseen ones; the objective is then
    `weight` x the macro accuracy on their validation clips + (1 - weight) x that on the others'.
    """

    devices: tuple[str, ...] = Field((), description="held-out devices")
    weight: float = Field(0.5, ge=0.0, le=1.0, description="their share of the objective")

    def value(self, metrics: Mapping[str, float]) -> float:
        if not self.devices:
            return metrics["validation_macro_accuracy"]
        return self.weight * metrics["validation_unseen"] + (1 - self.weight) * metrics["validation_seen"]


class BudgetConfig(Section):
    """What ends a search before its last trial; trials under way run on to their ends."""

    epochs: int | None = Field(None, ge=1, description="of all trials together")
    minutes: float | None = Field(None, gt=0.0, description="of the search, added up over its restarts")


class SweepConfig(Section):
    """Optuna search over `space` (keys of `student`), scored on the validation part only.

    `sampler: grid` takes the points of the space in their order. `scheduler: asha` is successive halving; with `pbt`,
    `trials` is the size of a population that is drawn at random and changes as it trains.
    """

    trials: int = Field(40, ge=1, description="how many; with `pbt` members of the population")
    scheduler: Literal["asha", "pbt", "none"] = Field("asha", description="what ends or changes a trial on its way")
    population: PopulationConfig = PopulationConfig()
    budget: BudgetConfig = BudgetConfig()
    cost: Literal["bytes", "macs"] | None = Field(
        None, description="to be low while the objective is high: bytes of the int8 weights, or multiply-accumulates"
    )
    epochs: int = Field(30, ge=1, description="epochs of a trial that is not stopped; the schedule is scaled to them")
    sampler: Literal["tpe", "random", "grid"] = Field("tpe", description="what proposes parameters")
    startup_trials: int = Field(10, ge=1, description="random proposals before the search learns from results")
    lookback: int = Field(4, ge=1, description="trial n learns from trials 0 .. n - lookback; bounds concurrency")
    grace_epochs: int = Field(5, ge=1, description="no trial is stopped before")
    reduction: int = Field(3, ge=2, description="one trial in so many passes a rung")
    finalists: int = Field(1, ge=1, description="best trials that are run again with other seeds")
    seeds: int = Field(1, ge=1, description="of each finalist; the winner has the best mean over them")
    validation: ObjectiveConfig = ObjectiveConfig()
    seed: int = Field(0, ge=0, description="of the proposals")
    space: dict[str, Parameter] = Field(min_length=1, description="what is searched, by keys of `student`")

    @property
    def searched(self) -> int:
        """How many trials there are before those of the finalists; of a population, one a member and generation."""
        generations = -(-self.epochs // self.population.every) if self.scheduler == "pbt" else 1
        return self.trials * generations

    @property
    def most(self) -> int:
        """How many trials there can be, with the finalists' other seeds."""
        return self.searched + self.finalists * (self.seeds - 1)

    def span(self, number: int) -> tuple[int, int]:
        """The epochs that this trial trains: after the first, up to the second."""
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
            ("sampler", self.sampler == "grid", "tpe or random, which a population is drawn by"),
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
        """Keys by dots or by mappings, as `--set sweep.space.optimizer.learning_rate={...}` makes them."""
        if not isinstance(raw, dict):
            return raw
        flat: dict[str, Any] = {}
        for key, value in raw.items():
            if isinstance(value, dict) and value and not set(value) & set(KINDS):
                flat |= {f"{key}.{inner}": own for inner, own in cls._flat(value).items()}
            else:
                flat[key] = value
        return dict(sorted(flat.items()))  # a search, like its key, does not depend on the order of the file

    def check(self, student: StudentConfig) -> None:
        """Raise ValueError when a key is unknown, an end of its range is not allowed, or a grid is too small."""
        if self.sampler == "grid" and self.trials > (points := len(grid(self.space))):
            raise ValueError(f"sweep.trials: {self.trials}, but the grid of sweep.space has {points} points")
        for key, parameter in self.space.items():
            if key in NOT_JUDGED:
                raise ValueError(f"sweep.space.{key}: is not searched, for {NOT_JUDGED[key]}; give it in student.{key}")
            for value in parameter.ends():
                try:
                    changed(student, {key: value})
                except ValidationError as error:
                    raise ValueError(f"sweep.space.{key}: {value!r}: student.{explain(error, StudentConfig)}") from None
                except KeyError as error:
                    raise ValueError(f"sweep.space.{key}: student has no key {error.args[0]!r}") from None


class TrialResult(Section):
    """How a trial ended: `curve` holds the metric after each epoch; a diverged or failed one has what came before."""

    number: int
    parameters: dict[str, Any]
    curve: tuple[float, ...]
    state: Literal["complete", "stopped", "diverged", "failed"]
    error: str = ""
    cost: float | None = None
    parent: int | None = Field(None, description="of a population: the trial whose weights it went on from")
    repeats: int | None = Field(None, description="of a finalist's other seeds: the trial whose parameters it has")
    seed: int = Field(0, description="added to the student's")

    @property
    def has_value(self) -> bool:
        return bool(self.curve) and self.state in ENDED_WELL

    @property
    def value(self) -> float:
        return self.curve[-1] if self.has_value else 0.0


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


def cost_of(config: SweepConfig, counted: Complexity) -> float | None:
    """What a trial's network costs, where the search minds."""
    if config.cost is None:
        return None
    return float(counted.macs if config.cost == "macs" else counted.bytes["int8"])


def propose(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> dict[str, Any]:
    """Parameters of trial `number`, from the trials among `ended` that it may learn from."""
    if config.scheduler == "pbt" and (origin := parent(config, number, ended)) is not None:
        own = next(r.parameters for r in ended if r.number == origin)
        if origin % config.trials == number % config.trials:
            return own
        return explored(config.population, config.space, own, _generator(config, number, 1))
    if number >= config.searched:
        return next(r.parameters for r in ended if r.number == repeated(config, number, ended)[0])
    if config.sampler == "grid":
        return grid(config.space)[number]
    known = _visible(config, number, ended)
    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if config.sampler == "random" or config.scheduler == "pbt" or number < config.startup_trials
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, multivariate=True, group=True)
        )
        directions: list[Literal["maximize", "minimize"]] = ["maximize", "minimize"] if config.cost else ["maximize"]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for result in known:
            if config.cost and result.cost is None:  # it failed before it was a network
                continue
            study.add_trial(
                optuna.trial.create_trial(
                    params=result.parameters,
                    distributions=distributions(config.space, result.parameters),
                    values=[result.value, *([] if result.cost is None else [result.cost])],
                    intermediate_values=dict(enumerate(result.curve)),
                    # Optuna knows no pruned trials of two objectives; there the last value stands.
                    state=optuna.trial.TrialState.PRUNED
                    if result.state == "stopped" and not config.cost
                    else optuna.trial.TrialState.COMPLETE,
                )
            )
        trial = study.ask()
        suggested(config.space, trial)
        return trial.params


def parent(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> int | None:
    """Of a population: the trial of the generation before whose weights this one goes on from."""
    first = (number // config.trials - 1) * config.trials
    if first < 0:
        return None
    before = {r.number - first: r for r in ended if first <= r.number < first + config.trials}
    values = [before[m].value if before[m].state == "complete" else None for m in range(config.trials)]
    chosen = ancestor(config.population, number % config.trials, values, _generator(config, number, 0))
    return None if chosen is None else first + chosen


def _generator(config: SweepConfig, number: int, use: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, number, use])


def within_budget(config: SweepConfig, ended: Sequence[TrialResult]) -> SweepConfig:
    """The search as far as its budget of epochs goes: no trial starts when those it learns from have used it up."""
    if config.budget.epochs is None:
        return config
    for number in range(config.trials):
        if sum(len(result.curve) for result in _visible(config, number, ended)) >= config.budget.epochs:
            return config.model_copy(update={"trials": number})
    return config


def finalists(config: SweepConfig, ended: Sequence[TrialResult]) -> list[int]:
    """The best trials that ran to their end, once all of the search have ended; the first of equals first."""
    searched = [r for r in ended if r.number < config.searched]
    if len(searched) < config.searched:
        return []
    complete = sorted((r for r in searched if r.state == "complete"), key=lambda r: (-r.value, r.number))
    return [r.number for r in complete[: config.finalists]]


def planned(config: SweepConfig, ended: Sequence[TrialResult]) -> int:
    """How many trials there are as far as is known: those of the search, then the finalists' other seeds."""
    return config.searched + len(finalists(config, ended)) * (config.seeds - 1)


def repeated(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> tuple[int | None, int]:
    """Of a trial after those of the search: which one it repeats, and with what added to its seed."""
    if number < config.searched:
        return None, 0
    finalist, seed = divmod(number - config.searched, config.seeds - 1)
    return finalists(config, ended)[finalist], seed + 1


def may_start(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> bool:
    """Whether every trial that trial `number` learns from has ended."""
    if number >= config.searched:
        return number < planned(config, ended)
    if config.scheduler == "pbt":
        first = number // config.trials * config.trials
        return sum(r.number < first for r in ended) == first
    return len(_visible(config, number, ended)) == max(0, number - config.lookback + 1)


def should_stop(
    config: SweepConfig,
    number: int,
    curve: Sequence[float],
    ended: Sequence[TrialResult],
    cost: float | None = None,
) -> bool:
    """Asynchronous successive halving (Li et al., 2020) over the trials that trial `number` may learn from.

    At a rung (grace_epochs x reduction^k epochs) a trial goes on when it is among the best 1/reduction there; with
    `cost`, of those that cost no more than its own `cost`.
    """
    if number >= config.searched or config.scheduler != "asha":
        return False
    epoch, rung = len(curve), config.grace_epochs
    while rung < epoch:
        rung *= config.reduction
    if epoch != rung or epoch >= config.epochs:
        return False
    rivals = [r for r in _visible(config, number, ended) if cost is None or r.cost is None or r.cost <= cost]
    others = [r.curve[epoch - 1] for r in rivals if len(r.curve) >= epoch]
    if not others:
        return False
    return curve[-1] < float(np.quantile(others, 1.0 - 1.0 / config.reduction))


def pareto(ended: Sequence[TrialResult]) -> list[TrialResult]:
    """Trials that ran to their ends and are better than all that cost less, the cheapest first."""
    front: list[TrialResult] = []
    complete = [r for r in ended if r.state == "complete" and r.repeats is None and r.cost is not None]
    for result in sorted(complete, key=lambda r: (r.cost, -r.value, r.number)):
        if not front or result.value > front[-1].value:
            front.append(result)
    return front


def best(config: SweepConfig, ended: Sequence[TrialResult]) -> TrialResult:
    """The trial with the best last value among those that ran to the end, the cheapest of equals, then the first.

    Of finalists with several seeds the mean counts, and trials that are no finalist's do not win.
    Raises UserError when no trial ran to its end.
    """
    last = config.searched - config.trials  # the last generation of a population; otherwise the first trial
    complete = [r for r in ended if r.state == "complete" and r.repeats is None and r.number >= last]
    if not complete:
        states = "; ".join(f"trial {r.number} {r.state} {r.error}".strip() for r in ended)
        raise UserError(f"sweep: no trial ran to its end ({states}); make the space smaller")
    several = [r for r in complete if len(values_over_seeds(ended, r.number)) > 1]
    return max(
        several or complete, key=lambda r: (np.mean(values_over_seeds(ended, r.number)), -(r.cost or 0.0), -r.number)
    )


def values_over_seeds(ended: Sequence[TrialResult], number: int) -> list[float]:
    """The last values of a trial and of its repetitions with other seeds; one that crashed says nothing."""
    return [r.value for r in ended if number in (r.number, r.repeats) and r.state != "failed"]


def importances(space: Space, ended: Sequence[TrialResult]) -> dict[str, float]:
    """How far the values of each parameter in the best quarter differ from all (PED-ANOVA, Watanabe et al., 2023).

    Shares of 1, over the trials that have a value; empty for fewer than eight of them.
    """
    tried = [result for result in ended if result.has_value and result.repeats is None]
    if len(tried) < FEWEST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        found = {}
        for name in sorted({name for result in tried for name in result.parameters}):
            study = optuna.create_study(direction="maximize")
            for result in tried:
                if name in result.parameters:
                    own = distributions(space, result.parameters)[name]
                    study.add_trial(
                        optuna.trial.create_trial(
                            params={name: result.parameters[name]}, distributions={name: own}, value=result.value
                        )
                    )
            if len({str(trial.params[name]) for trial in study.trials}) > 1:
                own_share = optuna.importance.get_param_importances(study, evaluator=evaluator, normalize=False)
                found[name] = own_share.get(name, 0.0)
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total else {}


def trial_name(number: int) -> str:
    return f"trial-{number:03d}"


def trials_table(ended: Sequence[TrialResult]) -> str:
    """All trials as CSV: how each ended, its value and cost, whether it is on the Pareto front, its parameters."""
    names = sorted({name for result in ended for name in result.parameters})
    front = {result.number for result in pareto(ended)}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *names], lineterminator="\n")
    writer.writeheader()
    for result in ended:
        own = {column: getattr(result, column) for column in COLUMNS[:-2]}
        writer.writerow({**own, "epochs": len(result.curve), "pareto": result.number in front, **result.parameters})
    return text.getvalue()


def _visible(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> list[TrialResult]:
    return sorted((r for r in ended if r.number <= number - config.lookback), key=lambda r: r.number)
