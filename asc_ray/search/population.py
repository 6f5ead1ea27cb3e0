"""Population-based training (Jaderberg et al., 2017), in generations: who ends first does not decide who wins.

A population of P trains for `every` epochs; then the worst go on from the weights of the best, with their parameters
changed a little. Member i in generation g is trial g x P + i: the trials of a generation follow from the results of the
one before, like every other decision of a search.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asc_ray.search.config import Parameter, PopulationConfig
from asc_ray.search.space import Space


def ancestor(
    config: PopulationConfig, member: int, values: Sequence[float | None], rng: np.random.Generator
) -> int | None:
    """Return the member of the last generation that this one goes on from: itself, or for one of the worst a best one.

    `values` has one value a member, the higher the better, None for a member without weights. The result is None where
    no member has weights.
    """
    alive = sorted((m for m, value in enumerate(values) if value is not None), key=lambda m: (-values[m], m))  # type: ignore[operator]
    if not alive:
        return None
    number = max(1, round(config.replaced * len(values)))
    worst = alive[max(number, len(alive) - number) :]
    if values[member] is not None and member not in worst:
        return member
    return alive[int(rng.integers(min(number, len(alive))))]


def explored(
    config: PopulationConfig, space: Space, parameters: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Change the parameters: ranges by a factor of 0.8 or 1.25, choices to a neighbor; draw some anew."""
    return {name: _changed(config, space[name], value, rng) for name, value in parameters.items()}


def _changed(config: PopulationConfig, parameter: Parameter, value: Any, rng: np.random.Generator) -> Any:
    anew = rng.random() < config.resample
    if parameter.choice is not None:
        here = parameter.choice.index(value)
        to = (
            rng.integers(len(parameter.choice))
            if anew
            else np.clip(here + rng.choice((-1, 1)), 0, len(parameter.choice) - 1)
        )
        return parameter.choice[int(to)]
    low, high = parameter.uniform or parameter.loguniform or parameter.int or (0, 0)
    if anew:
        if parameter.int:
            return int(rng.integers(parameter.int[0], parameter.int[1] + 1))
        if parameter.loguniform:
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))
        return float(rng.uniform(low, high))
    factor = float(rng.choice((0.8, 1.25)))
    if parameter.int:
        step = round(value * factor)
        return int(np.clip(step if step != value else value + (1 if factor > 1 else -1), low, high))
    return float(np.clip(value * factor, low, high))
