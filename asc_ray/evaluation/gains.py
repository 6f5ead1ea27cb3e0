"""What one system gains over another on the same clips, with an interval over places and over seeds."""

import numpy as np

from asc_ray.evaluation.scores import log_posteriors
from asc_ray.section import Section

RESAMPLES = 2_000


class Interval(Section):
    """An estimate and the middle 95 % of its resamples."""

    value: float
    low: float
    high: float

    @property
    def told(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0


class Gain(Section):
    """How much better one system is than another on the same clips; in both figures more is better."""

    log_loss: Interval  # decrease, in nats a clip
    accuracy: Interval  # increase, as a share of the clips
    places: int
    runs: int = 1  # trainings of each, or of the one with fewer


def gain(before: np.ndarray, after: np.ndarray, scene: np.ndarray, places: np.ndarray) -> Gain:
    """Return the gain of logits `after` over `before`, by bootstrap over `places` (N,) and trainings.

    Logits are (N, K), or (S, N, K) of S trainings that differ in their seeds. Clips of one place are alike, so whole
    places are drawn with replacement. Of S trainings S - 1 are drawn, so that the resamples' variance is the mean's
    and not (S - 1) / S of it; with as many on both sides, a training and its partner are drawn together.
    """
    names, place = np.unique(places, return_inverse=True)
    clips = np.bincount(place).astype(float)

    def by_place(logits: np.ndarray) -> np.ndarray:
        """Return the sums of the scene's log posterior and of right answers, (S, places, 2)."""
        sums = []
        for run in logits.reshape(-1, *logits.shape[-2:]):
            log_p = log_posteriors(run)
            each = log_p[np.arange(len(scene)), scene], (log_p.argmax(axis=1) == scene).astype(float)
            sums.append(np.stack([np.bincount(place, weights=values) for values in each], axis=1))
        return np.stack(sums)

    old, new = by_place(before), by_place(after)
    sides = [new - old] if len(old) == len(new) else [new, -old]
    rng = np.random.default_rng(0)
    drawn = _draws(rng, len(names), len(names))
    total = sum(np.einsum("rs,rp,spk->rk", _draws(rng, len(s), len(s) - 1), drawn, s, optimize=True) for s in sides)
    low, high = np.quantile(total / (drawn @ clips)[:, None], (0.025, 0.975), axis=0)
    value = sum(side.mean(axis=0).sum(axis=0) for side in sides) / clips.sum()
    loss, accuracy = (
        Interval(value=float(each), low=float(a), high=float(b)) for each, a, b in zip(value, low, high, strict=True)
    )
    return Gain(log_loss=loss, accuracy=accuracy, places=len(names), runs=min(len(old), len(new)))


def _draws(rng: np.random.Generator, count: int, times: int) -> np.ndarray:
    """Return the shares (RESAMPLES, count) of as many things in `times` draws with replacement."""
    if count == 1:
        return np.ones((RESAMPLES, 1))
    return rng.multinomial(times, np.full(count, 1 / count), size=RESAMPLES) / times
