"""How trials ended: their results, the best of them, and what they say about the space."""

import csv
import io
import warnings
from collections.abc import Sequence
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
