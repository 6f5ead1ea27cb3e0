"""What a fusion refuses in its inputs, and what it notes about them."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from asc_ray.ensemble.config import Ridge
from asc_ray.ensemble.newton import Shard
from asc_ray.errors import UserError

CHANCE = 3.0  # a system knows something if its agreement is so many standard deviations above chance


def notes_on(shards: Sequence[Shard], systems: Sequence[str]) -> tuple[str, ...]:
    """Return what a user should know: no system knows the scenes, or the clips do not determine a weight."""
    products, squares = np.zeros((len(systems), len(systems))), np.zeros(len(systems))
    for shard in shards:
        logits = shard.read().astype(np.float64)
        squares += (logits**2).sum(axis=(1, 2))
        logits -= logits.mean(axis=2, keepdims=True)
        flat = logits.reshape(len(systems), -1)
        products += flat @ flat.T
    spread = products.diagonal()
    constant = [s for s in range(len(systems)) if spread[s] <= 1e-10 * squares[s]]
    equal = [
        (t, s)
        for t, s in combinations([s for s in range(len(systems)) if s not in constant], 2)
        if spread[t] + spread[s] - 2 * products[t, s] <= 1e-10 * max(spread[t], spread[s])
    ]
    notes = [f"{systems[s]}: its logits do not differ between the scenes; its weight means nothing" for s in constant]
    notes += [f"{systems[t]} and {systems[s]}: the same logits; they share one weight evenly" for t, s in equal]
    right, certainty = _agreement(shards)
    if certainty < CHANCE:
        notes.insert(
            0,
            f"no system agrees with the scenes on more clips than chance has it ({100 * right:.0f} % at most): check "
            "that the logits are of the same clips in the same order, and that their columns are in that of the labels",
        )
    return tuple(notes)


def _agreement(shards: Sequence[Shard]) -> tuple[float, float]:
    """Return the largest share of clips that a system is right on, and the largest certainty of a system.

    The certainty is how many standard deviations its share is above chance: above the share of clips for which its
    answers would agree with the scenes of other clips.
    """
    answers = np.concatenate([shard.read().argmax(axis=2) for shard in shards], axis=1)  # (S, N)
    scene = np.concatenate([shard.scene for shard in shards])
    right = (answers == scene).mean(axis=1)
    chance = np.zeros(len(answers))
    for one, count in zip(*np.unique(scene, return_counts=True), strict=True):
        chance += (answers == one).mean(axis=1) * count / len(scene)
    certainty = (right - chance) / np.sqrt(np.maximum(chance * (1 - chance), 1e-12) / len(scene))
    return float(right.max()), float(certainty.max())


def scene_counts(shards: Sequence[Shard], labels: Sequence[str]) -> np.ndarray:
    return sum((np.bincount(shard.scene, minlength=len(labels)) for shard in shards), np.zeros(len(labels), int))


def check_inputs(shards: Sequence[Shard], systems: Sequence[str], labels: Sequence[str], ridge: Ridge) -> None:
    """Raise UserError for an invalid ridge, equal names, one scene, and scenes that are no indices or have no clip."""
    if ridge != "auto" and not (isinstance(ridge, int | float) and 0 <= ridge < np.inf):
        raise UserError(f"fusion.ridge: found {ridge!r}; expected auto, or a number from 0")
    for kind, names in (("system", systems), ("label", labels)):
        if len(set(names)) != len(names):
            raise UserError(f"fusion: {kind} names {', '.join(names)}; expected {len(names)} different ones")
    if len(labels) < 2:
        raise UserError(f"fusion: one scene alone ({', '.join(labels)}); there is nothing to learn")
    for scene in (shard.scene for shard in shards):
        if scene.dtype.kind not in "iu" or scene.min() < 0 or scene.max() >= len(labels):
            raise UserError(f"fusion: scenes of type {scene.dtype}, expected indices 0 to {len(labels) - 1}")
    counts = scene_counts(shards, labels)
    if not counts.all():
        found = ", ".join(f"{name} {n}" for name, n in zip(labels, counts, strict=True))
        raise UserError(
            f"fusion: a scene has no clip to learn its bias from (clips: {found}); give clips of each scene, or leave "
            "it out"
        )


def refuse_broken(shards: Sequence[Shard], systems: Sequence[str]) -> None:
    """Raise UserError with the systems whose logits are not finite, and for how many clips."""
    broken, total = np.zeros(len(systems), dtype=np.int64), 0
    for shard in shards:
        broken += (~np.isfinite(shard.read()).all(axis=2)).sum(axis=1)
        total += len(shard.scene)
    found = ", ".join(f"{name}: {n} of {total} clips" for name, n in zip(systems, broken, strict=True) if n)
    raise UserError(f"fusion: logits that are not finite: {found}; compute them again, or leave these systems out")
