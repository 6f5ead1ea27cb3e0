"""Which trials a search has, and when each of them may start."""

from collections.abc import Sequence

from asc_ray.search.config import SweepConfig
from asc_ray.search.trials import TrialResult


def within_budget(config: SweepConfig, ended: Sequence[TrialResult]) -> SweepConfig:
    """Return the search as far as its budget goes: no trial starts when those it learns from have used that up."""
    if config.budget.epochs is None:
        return config
    epochs = {result.number: len(result.curve) for result in ended}
    spent = 0
    for number in range(config.trials):
        spent += epochs.get(number - config.lookback, 0)  # each trial sees one more than the trial before
        if spent >= config.budget.epochs:
            return config.model_copy(update={"trials": number})
    return config


def finalists(config: SweepConfig, ended: Sequence[TrialResult]) -> list[int]:
    """Return the best trials that ran to their end, the first of equals first; none before all trials have ended."""
    searched = [r for r in ended if r.number < config.searched]
    if len(searched) < config.searched:
        return []
    complete = sorted((r for r in searched if r.state == "complete"), key=lambda r: (-r.value, r.number))
    return [r.number for r in complete[: config.finalists]]


def planned(config: SweepConfig, ended: Sequence[TrialResult]) -> int:
    """Return how many trials are known so far: those of the search, then the finalists' other seeds."""
    return config.searched + len(finalists(config, ended)) * (config.seeds - 1)


def repeated(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> tuple[int | None, int]:
    """Return the trial that this one repeats, and what is added to its seed; (None, 0) before the finalists' trials."""
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
    return len(visible(config, number, ended)) == max(0, number - config.lookback + 1)


def visible(config: SweepConfig, number: int, ended: Sequence[TrialResult]) -> list[TrialResult]:
    """Return the trials among `ended` that trial `number` may learn from, in order."""
    return sorted((r for r in ended if r.number <= number - config.lookback), key=lambda r: r.number)
