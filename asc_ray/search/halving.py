"""Successive halving: which trials stop early."""

from collections.abc import Sequence

import numpy as np

from asc_ray.search.config import SweepConfig
from asc_ray.search.order import visible
from asc_ray.search.trials import TrialResult


def should_stop(
    config: SweepConfig,
    number: int,
    curve: Sequence[float],
    ended: Sequence[TrialResult],
    cost: float | None = None,
) -> bool:
    """Whether trial `number` stops now, by asynchronous successive halving (Li et al., 2020).

    At a rung (grace_epochs x reduction^k epochs) it goes on when it is among the best 1/reduction of the trials that it
    may learn from; with `cost`, of those among them that cost no more.
    """
    if number >= config.searched or config.scheduler != "asha":
        return False
    epoch, rung = len(curve), config.grace_epochs
    while rung < epoch:
        rung *= config.reduction
    if epoch != rung or epoch >= config.epochs:
        return False
    rivals = [r for r in visible(config, number, ended) if cost is None or r.cost is None or r.cost <= cost]
    others = [r.curve[epoch - 1] for r in rivals if len(r.curve) >= epoch]
    if not others:
        return False
    return curve[-1] < float(np.quantile(others, 1.0 - 1.0 / config.reduction))
