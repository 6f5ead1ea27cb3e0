"""How strongly the ridge of eq. 4 pulls: by the number of places, unless places left out show otherwise.

What is known of weights and biases before any clip is worth the clips of KNOWN_PLACES places, so the ridge beside the
mean over clips is KNOWN_PLACES / places. With few places cross-validation cannot tell good ridges from bad. It is
repeated, each multiple of that ridge is compared with it, and one is taken only if it has less log loss on the places
left out by more than the standard error of the difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from asc_ray.ensemble.center import center
from asc_ray.ensemble.newton import NoMinimum, Problem, Shard, minimize
from asc_ray.evaluation.scores import log_posteriors

KNOWN_PLACES = 20.0  # found on the made-up ensembles of bench/fusion_small.py, for 10 to 200 places
MULTIPLES = (100.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.001)
FOLDS, REPEATS = 5, 5
SAMPLE = 16_384  # clips, of whole places, that the centre and the ridge come from
TOLERANCE = 1e-4  # of a minimum that is only compared with others


@dataclass(frozen=True)
class Candidate:
    """A multiple of KNOWN_PLACES / places, with its log loss on the places left out.

    `standard_error` is that of the difference to the candidate 1, over places.
    """

    multiple: float
    log_loss: float
    standard_error: float


Choice = tuple[Candidate, ...]


def cross_validate(
    clips: Shard, place: np.ndarray, clip_weights: Callable[[Sequence[Shard]], np.ndarray], nonnegative: bool
) -> Choice:
    """Return every candidate's log loss on places left out, the strongest first; empty where there is one place alone.

    `place` (N,) are indices. `clip_weights` gives a_n (K,) of some shards' clips.
    """
    places = int(place.max()) + 1
    if places == 1:
        return ()
    logits, count = clips.read(), len(clips.scene)
    repeats = max(1, min(REPEATS, SAMPLE // count))
    losses = np.zeros((len(MULTIPLES), count))
    for repeat in range(repeats):
        fold_of = np.random.default_rng(repeat).permutation(places)[place] % FOLDS
        for fold in range(min(FOLDS, places)):
            left_out = fold_of == fold
            rest = [Shard(partial(np.asarray, logits[:, ~left_out]), clips.scene[~left_out])]
            ridge = KNOWN_PLACES / (places - len(np.unique(place[left_out])))
            weights = clip_weights(rest)
            pull = center(rest, weights)
            own, right = logits[:, left_out].astype(np.float64), clips.scene[left_out]
            theta = Problem(rest, weights, pull).start
            for index, multiple in enumerate(MULTIPLES):  # each starts from the minimum of the next stronger one
                problem = Problem(rest, weights, replace(pull, ridge=multiple * ridge), nonnegative)
                try:
                    theta = minimize(problem, theta, TOLERANCE * max(1.0, multiple * ridge)).theta
                except NoMinimum:  # this ridge is too weak for these logits
                    losses[index, left_out] = np.inf
                    continue
                w, b = np.split(theta, [len(logits)])
                z = np.tensordot(w, own, axes=1) + b
                losses[index, left_out] -= log_posteriors(z)[np.arange(len(right)), right] / repeats
    return _compared(losses, clip_weights([clips])[clips.scene], place)


def _compared(losses: np.ndarray, a: np.ndarray, place: np.ndarray) -> Choice:
    """Return the candidates of `losses` (candidates, N) of clips with the weights a_n (N,) and places (N,)."""
    at_place, of_place = np.bincount(place, a), int(place.max()) + 1
    found = []
    for multiple, own in zip(MULTIPLES, losses, strict=True):
        error = np.inf
        if np.isfinite(own).all():
            difference = own - losses[MULTIPLES.index(1.0)]
            apart = np.bincount(place, a * difference) - at_place * (a @ difference)
            error = float(np.sqrt(of_place / (of_place - 1) * (apart @ apart)))
        found.append(Candidate(multiple, float(a @ own), error))
    return tuple(found)


def chosen(choice: Choice) -> float:
    """Return the multiple to take: 1, or the best one if it is better by more than the standard error."""
    if not choice:
        return 1.0
    best = min(choice, key=lambda one: one.log_loss)
    plain = next(one for one in choice if one.multiple == 1.0)
    return best.multiple if plain.log_loss - best.log_loss > best.standard_error else 1.0


def sample(shards: Sequence[Shard], place: np.ndarray) -> tuple[Shard, np.ndarray]:
    """Read the clips of so many whole places that they are SAMPLE or a few more; return them, and their places.

    The places, drawn from `place` (N,) of all clips, are numbered anew.
    """
    order = np.random.default_rng(0).permutation(int(place.max()) + 1)
    enough = np.searchsorted(np.cumsum(np.bincount(place)[order]), SAMPLE) + 1
    taken = np.zeros(len(order), dtype=bool)
    taken[order[: max(enough, FOLDS)]] = True
    of_shard = np.split(taken[place], np.cumsum([len(shard.scene) for shard in shards])[:-1])
    logits = [shard.read()[:, mask] for shard, mask in zip(shards, of_shard, strict=True) if mask.any()]
    scene = [shard.scene[mask] for shard, mask in zip(shards, of_shard, strict=True)]
    clips = Shard(partial(np.asarray, np.concatenate(logits, axis=1)), np.concatenate(scene))
    return clips, np.unique(place[taken[place]], return_inverse=True)[1]
