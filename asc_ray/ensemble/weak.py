"""Systems far below the others on the validation part: which they are, the likely reason, and what to change."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from asc_ray.models.config import PasstConfig
from asc_ray.training.config import Recipe

FAR = 0.10  # of macro accuracy
FEWEST = 3  # systems that are compared


@dataclass(frozen=True)
class Standing:
    """What a system has learned: macro accuracy on the validation part, and the last epoch's on its training clips."""

    recipe: Recipe
    validation: float
    train: float | None  # None for a system that was not trained here


def far_below(systems: Mapping[str, Standing], places: int) -> dict[str, str]:
    """Return a sentence for each system that is far below the better half of the systems.

    Far is 10 points, and twice the standard error of an accuracy on as many clips as the validation part has `places`.
    """
    ranked = sorted((own.validation for own in systems.values()), reverse=True)
    if len(ranked) < FEWEST:
        return {}
    others = statistics.median(ranked[: math.ceil(len(ranked) / 2)])
    limit = others - max(FAR, 2 * math.sqrt(others * (1 - others) / places))
    return {
        name: f"{name} is far below the others ({100 * own.validation:.0f} % on the validation part, the better half "
        f"has {100 * others:.0f} %): {_reason(name, own, others)}"
        for name, own in systems.items()
        if own.validation < limit
    }


def _reason(name: str, own: Standing, others: float) -> str:
    keys = f"teachers.recipes.{name}"
    if own.train is None:
        return "it was not trained here; check that its checkpoint is of these scenes and of this front end"
    learned = f"{100 * own.train:.0f} % of its augmented training clips in the last epoch"
    if own.train >= others:
        return f"it knows {learned}, so it is overfitted; augment more ({keys}.augment), or leave it out"
    if isinstance(own.recipe.model, PasstConfig) and not (own.recipe.model.pretrained or own.recipe.init):
        return (
            f"it knows only {learned}, and did not start from AudioSet weights, without which a PaSST learns little "
            f"from few clips; give {keys}.model.pretrained, or put systems of another kind into teachers.systems"
        )
    return (
        f"it knows only {learned}, so it is underfitted; train it longer or faster ({keys}.optimizer.epochs, "
        f"{keys}.optimizer.learning_rate), or leave it out"
    )
