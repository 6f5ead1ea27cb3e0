"""How trials ended: their results, the best of them, and what they say about the space."""

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import optuna
from pydantic import Field

from asc_ray.errors import UserError
from asc_ray.search.config import SweepConfig
from asc_ray.search.space import Space, distributions
from asc_ray.section import Section
from asc_ray.shown import in_csv

ENDED_WELL = ("complete", "stopped")
FEWEST_FOR_IMPORTANCE = 8
COLUMNS = ("number", "state", "value", "cost", "repeats", "seed", "parent", "error", "epochs", "pareto")


class TrialResult(Section):
    """How a trial ended: `curve` holds the metric after each epoch, up to where the trial diverged or failed."""

    number: int
    parameters: dict[str, Any]
    curve: tuple[float, ...]
    state: Literal["complete", "stopped", "diverged", "failed"]
    error: str = ""
    cost: float | None = None
    parent: int | None = Field(None, description="with `pbt`: the trial whose weights it went on from")
    repeats: int | None = Field(None, description="for a finalist's other seed: the trial whose parameters it has")
    seed: int = Field(0, description="number added to the student's seed")

    @property
    def has_value(self) -> bool:
        return bool(self.curve) and self.state in ENDED_WELL

    @property
    def value(self) -> float:
        return self.curve[-1] if self.has_value else 0.0


@dataclass(frozen=True)
class Tried:
    """A trial of the search, its value as the mean over its seeds, and their sample deviation; None for one seed."""

    result: TrialResult
    value: float
    deviation: float | None


def tried(ended: Sequence[TrialResult]) -> list[Tried]:
    """Return each trial of the search once: what repeats it with another seed is no trial, and is in its mean."""
    found = []
    for result in ended:
        if result.repeats is None:
            values = values_over_seeds(ended, result.number) or [0.0]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
            found.append(Tried(result, float(np.mean(values)), deviation))
    return found


def pareto(ended: Sequence[TrialResult]) -> list[Tried]:
    """Return the trials that ran to their ends and are better than all that cost less, the cheapest first."""
    front: list[Tried] = []
    complete = [one for one in tried(ended) if one.result.state == "complete" and one.result.cost is not None]
    for one in sorted(complete, key=lambda one: (one.result.cost, -one.value, one.result.number)):
        if not front or one.value > front[-1].value:
            front.append(one)
    return front


def best(config: SweepConfig, ended: Sequence[TrialResult]) -> TrialResult:
    """Return the trial with the best last value of those that ran to the end, the cheapest of equals, then the first.

    Where there are finalists with several seeds, only they can win, by the mean over their seeds.
    Raises UserError when no trial ran to its end.
    """
    last = config.searched - config.trials  # the last generation of a population; otherwise the first trial
    complete = [one for one in tried(ended) if one.result.state == "complete" and one.result.number >= last]
    if not complete:
        states = "; ".join(f"trial {r.number} {r.state} {r.error}".strip() for r in ended)
        raise UserError(f"sweep: no trial ran to its end ({states}); make the space smaller")
    several = [one for one in complete if one.deviation is not None]
    return max(several or complete, key=lambda one: (one.value, -(one.result.cost or 0.0), -one.result.number)).result


def values_over_seeds(ended: Sequence[TrialResult], number: int) -> list[float]:
    """Return the last values of a trial and of its repetitions with other seeds, except failed ones."""
    return [r.value for r in ended if number in (r.number, r.repeats) and r.state != "failed"]


def with_value(ended: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials of the search that have a value, without the repetitions: what `importances` rests on."""
    return [result for result in ended if result.has_value and result.repeats is None]


def importances(space: Space, ended: Sequence[TrialResult]) -> dict[str, float]:
    """Return how far each parameter's values in the best quarter of trials differ from those in all trials.

    PED-ANOVA (Watanabe et al., 2023), as shares of 1, over the trials that have a value; empty for fewer than eight.
    """
    known = with_value(ended)
    if len(known) < FEWEST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        found = {}
        for name in sorted({name for result in known for name in result.parameters}):
            study = optuna.create_study(direction="maximize")
            for result in known:
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
    """Return all trials as CSV: how each ended, its value and cost, whether it is on the Pareto front, parameters."""
    names = sorted({name for result in ended for name in result.parameters})
    front = {one.result.number for one in pareto(ended)}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *names], lineterminator="\n")
    writer.writeheader()
    for result in ended:
        own = {column: getattr(result, column) for column in COLUMNS[:-2]}
        writer.writerow(
            {
                **own,
                "error": in_csv(result.error),
                "epochs": len(result.curve),
                "pareto": result.number in front,
                **result.parameters,
            }
        )
    return text.getvalue()
