"""Fusion of systems by multi-class linear logistic regression, eq. 4: z(k, x) = sum_s w_s z_s(k, x) + b_k.

    J(w, b) = sum_n a_n CE(softmax z(., x_n), y_n) + ridge / 2 (|w - 1/S|^2 + |b|^2),    sum_n a_n = 1

is convex and has S + K unknowns, so Newton's method with the exact Hessian finds its minimum in a few passes over the
clips. The ridge pulls towards the plain average of the systems, which is also where the search starts.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from asc_ray.data.division import FusionData
from asc_ray.ensemble.checks import Ridge, ScenePrior, check_inputs, check_prior, notes_on, refuse_broken, scene_counts
from asc_ray.ensemble.newton import BLOCK, SAMPLE, TOLERANCE, NoMinimum, Problem, Shard, average, minimize
from asc_ray.errors import UserError
from asc_ray.section import Section

RIDGES = tuple(float(10**e) for e in np.arange(-4.0, 1.1, 0.5))
FOLDS = 5
CROSS_VALIDATED = 16_384  # clips that a ridge is chosen on
CLIPS_A_SHARD = 65_536  # for logits that are in memory anyway


class FusionConfig(Section):
    """How eq. 4 is learned.

    `data`: what it is learned on. holdout: the part `fusion`, on which no teacher is trained. crossfit: all of
    the training split but the validation part; every system is trained `folds` times, and a clip's logits are those of
    the teacher that did not see it. train: the clips that the teachers were trained on.

    `ridge: auto` takes the one with the least log loss in cross-validation over places. `scene_prior`: every clip
    weighs the same (empirical), or every scene does (uniform), or scenes weigh as given.
    """

    gone: ClassVar[Mapping[str, Any]] = {"tasks": 1}
    renamed: ClassVar[Mapping[str, str]] = {"scene_prior": "class_prior"}
    data: FusionData = Field("holdout", description="clips that the fusion is learned on")
    folds: int = Field(4, ge=2, description="folds of crossfit")
    ridge: Ridge = Field("auto", description="strength of the pull towards the average of the systems")
    scene_prior: ScenePrior = Field("empirical", description="how much each scene weighs")
    nonnegative: bool = Field(False, description="no system has a negative weight")


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fitted fusion; `objective_before` is J of the average, `objective_after` is J of these weights and biases."""

    weights: np.ndarray  # (S,) float64, in the order of `systems`
    biases: np.ndarray  # (K,) float64 of sum 0, in the order of `labels`
    systems: tuple[str, ...]
    labels: tuple[str, ...]
    ridge: float
    scene_prior: ScenePrior
    nonnegative: bool
    clips: int
    objective_before: float
    objective_after: float
    iterations: int
    notes: tuple[str, ...] = ()  # see `notes_on`

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Return fused logits (N, K) float32 of `logits` (S, N, K), whose systems and scenes have the fit's order.

        Raises UserError for another number of systems or scenes.
        """
        if logits.ndim != 3 or (logits.shape[0], logits.shape[2]) != (len(self.weights), len(self.biases)):
            raise UserError(
                f"fusion: logits of shape {logits.shape} (systems, clips, scenes); this fusion is of "
                f"{len(self.weights)} systems ({', '.join(self.systems)}) and {len(self.biases)} scenes"
            )
        fused = np.empty(logits.shape[1:], dtype=np.float32)
        for rows in _slices(logits.shape[1], BLOCK):
            fused[rows] = np.tensordot(self.weights, logits[:, rows].astype(np.float64), axes=1) + self.biases
        return fused

    def save(self, path: Path) -> None:
        """Write JSON from which `load` restores every number exactly."""
        document = asdict(self) | {
            "weights": dict(zip(self.systems, self.weights.tolist(), strict=True)),
            "biases": dict(zip(self.labels, self.biases.tolist(), strict=True)),
        }
        del document["systems"], document["labels"]
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Fusion":
        """Read what `save` wrote. Raises UserError when `path` is not a fusion's JSON."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            weights, biases = document.pop("weights"), document.pop("biases")
            if "class_prior" in document:  # as earlier versions wrote it
                document["scene_prior"] = document.pop("class_prior")
            return Fusion(
                weights=np.array(list(weights.values()), dtype=np.float64),
                biases=np.array(list(biases.values()), dtype=np.float64),
                systems=tuple(weights),
                labels=tuple(biases),
                notes=tuple(document.pop("notes")),
                **document,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: cannot be read as a fusion ({error}); run the fusion stage again") from None


def fit(
    logits: np.ndarray,
    scene: ArrayLike,
    *,
    systems: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    places: ArrayLike | None = None,
    ridge: Ridge = "auto",
    scene_prior: ScenePrior = "empirical",
    nonnegative: bool = False,
) -> Fusion:
    """Return the fusion that minimizes J for `logits` (S, N, K) of clips with the scenes `scene` (N,).

    `scene` has indices into `labels`. No system may have been trained on these clips.

    `places` (N,) are the clips' places: clips of one place are never on both sides of the cross-validation that chooses
    the ridge. Without them every clip is a place. `scene_prior` and `nonnegative` are those of FusionConfig.

    Memory beyond the inputs does not grow with N; memory-mapped logits are read in blocks. The result's `notes` are
    warnings too, e.g. that no system knows the scenes, perhaps because the clips are in another order. Raises UserError
    for shapes that do not agree, logits that are not finite, scenes without a clip, and a search that does not converge
    (only without a ridge, when the systems separate the scenes and no finite minimum exists).

    >>> rng = np.random.default_rng(0)
    >>> scene = np.arange(30_000) % 3
    >>> good = 2.0 * np.eye(3)[scene] + rng.standard_normal((30_000, 3))
    >>> noise = rng.standard_normal((30_000, 3))
    >>> fusion = fit(np.stack([good, noise]), scene, systems=["good", "noise"])
    >>> fusion.weights.round(1).tolist()
    [2.0, 0.0]
    >>> fusion.objective_after < fusion.objective_before
    True
    >>> fusion.apply(np.stack([good, noise])).shape
    (30000, 3)
    """
    logits, scene = np.asarray(logits), np.asarray(scene)
    if logits.ndim != 3 or not all(logits.shape) or scene.shape != logits.shape[1:2]:
        raise UserError(
            f"fusion: logits of shape {logits.shape} and scenes of shape {scene.shape}; expected (systems, clips, "
            "scenes) and (clips,), none of them empty"
        )
    count_s, count_n, count_k = logits.shape
    systems = systems if systems is not None else [f"system {s}" for s in range(count_s)]
    labels = labels if labels is not None else [f"scene {k}" for k in range(count_k)]
    if (len(systems), len(labels)) != (count_s, count_k):
        raise UserError(
            f"fusion: {len(systems)} names of systems and {len(labels)} of labels for logits of {count_s} systems "
            f"and {count_k} scenes"
        )
    fusion = fit_shards(
        [Shard(partial(_view, logits, rows), scene[rows]) for rows in _slices(count_n, CLIPS_A_SHARD)],
        systems=systems,
        labels=labels,
        places=places,
        ridge=ridge,
        scene_prior=scene_prior,
        nonnegative=nonnegative,
    )
    for note in fusion.notes:
        warnings.warn(note, stacklevel=2)
    return fusion


def fit_shards(
    shards: Sequence[Shard],
    *,
    systems: Sequence[str],
    labels: Sequence[str],
    places: ArrayLike | None = None,
    ridge: Ridge = "auto",
    scene_prior: ScenePrior = "empirical",
    nonnegative: bool = False,
) -> Fusion:
    """Do the work of `fit` for clips that are read shard by shard in every pass.

    `places` (N,) are those of all shards' clips in order. Another division into shards changes only the rounding.
    """
    check_inputs(shards, systems, labels, ridge)
    count = sum(len(shard.scene) for shard in shards)
    place = np.arange(count) if places is None else np.unique(places, return_inverse=True)[1]
    if len(place) != count:
        raise UserError(f"fusion: {len(place)} places for {count} clips; expected one for each")

    def problem(some: Sequence[Shard], ridge: float) -> Problem:
        return Problem(some, _clip_weights(some, scene_prior, labels), ridge, nonnegative)

    start = average(len(systems), len(labels))
    with np.errstate(invalid="ignore", over="ignore"):
        at_average = problem(shards, 0.0).evaluate(start, hessian=False)
    if not (np.isfinite(at_average.value) and np.isfinite(at_average.gradient).all()):
        refuse_broken(shards, systems)
    if at_average.value > np.log(len(labels)):  # the average is worse than no system: start from none
        start = np.zeros(len(start))
    scale = max(1.0, float(np.abs(at_average.gradient).max()))
    if ridge == "auto":
        ridge = _choose_ridge(shards, place, start, scale, problem)
    iterations, few = 0, shards
    if count > 4 * SAMPLE:  # most of the way on a sample, the rest on all clips
        rng = np.random.default_rng(0)
        few = [_loaded(shards, [rng.random(len(shard.scene)) < SAMPLE / count for shard in shards])]
        near = minimize(problem(few, max(ridge, 1e-6)), start, 1e-3 * scale)
        start, iterations = near.theta, near.iterations
    curvature = problem(few, ridge).evaluate(start).hessian
    found = minimize(problem(shards, ridge), start, TOLERANCE * max(scale, ridge), curvature)
    weights, biases = np.split(found.theta, [len(systems)])
    return Fusion(
        weights=weights,
        biases=biases - biases.mean(),
        systems=tuple(systems),
        labels=tuple(labels),
        ridge=ridge,
        scene_prior=scene_prior,
        nonnegative=nonnegative,
        clips=count,
        objective_before=at_average.value,  # at the average the ridge adds nothing
        objective_after=found.sums.value,
        iterations=iterations + found.iterations,
        notes=notes_on(few, systems),
    )


def objectives(
    shards: Sequence[Shard],
    *,
    systems: Sequence[str],
    labels: Sequence[str],
    scene_prior: ScenePrior = "empirical",
) -> dict[str, float]:
    """Return J of each system by itself, with weight 1 and no bias; without a ridge."""
    problem = Problem(shards, _clip_weights(shards, scene_prior, labels), ridge=0.0)
    alone = np.eye(len(systems), len(systems) + len(labels))
    return {name: problem.evaluate(theta, hessian=False).value for name, theta in zip(systems, alone, strict=True)}


def _choose_ridge(
    shards: Sequence[Shard],
    place: np.ndarray,
    start: np.ndarray,
    scale: float,
    problem: Callable[[Sequence[Shard], float], Problem],
) -> float:
    """Return the ridge with the least log loss on the places left out, over FOLDS folds of whole places.

    The candidates are RIDGES. With many clips, only as many places are taken as hold CROSS_VALIDATED of them. J weighs
    the ridge against the mean over clips. To keep its strength against the sum over all clips, the ridge is multiplied
    by the share of clips that was taken.
    """
    count = int(place.max()) + 1
    if count == 1:  # nothing can be left out
        return RIDGES[-1]
    order = np.random.default_rng(0).permutation(count)
    enough = np.searchsorted(np.cumsum(np.bincount(place)[order]), CROSS_VALIDATED) + 1
    taken = order[: max(enough, FOLDS)]
    fold_of = np.full(count, -1, dtype=np.int8)
    fold_of[taken] = np.arange(len(taken)) % FOLDS
    of_shard = np.split(fold_of[place], np.cumsum([len(shard.scene) for shard in shards])[:-1])
    losses = np.zeros(len(RIDGES))
    folds = [_loaded(shards, [own == fold for own in of_shard]) for fold in range(min(FOLDS, len(taken)))]
    for left_out in folds:
        theta = start
        for index in reversed(range(len(RIDGES))):  # each starts from the minimum of the next stronger one
            training = problem([fold for fold in folds if fold is not left_out], RIDGES[index])
            try:
                theta = minimize(training, theta, 1e-4 * max(scale, RIDGES[index])).theta
                losses[index] += replace(training, shards=[left_out], ridge=0.0).evaluate(theta, hessian=False).value
            except NoMinimum:  # this ridge is too weak for these logits
                losses[index] = np.inf
    share = sum(len(fold.scene) for fold in folds) / len(place)
    return RIDGES[int(losses.argmin())] * share


def _loaded(shards: Sequence[Shard], chosen: Sequence[np.ndarray]) -> Shard:
    """Read the chosen clips, a mask for each shard, into memory."""
    logits = [shard.read()[:, mask] for shard, mask in zip(shards, chosen, strict=True) if mask.any()]
    scene = [shard.scene[mask] for shard, mask in zip(shards, chosen, strict=True)]
    return Shard(partial(np.asarray, np.concatenate(logits, axis=1)), np.concatenate(scene))


def _view(logits: np.ndarray, rows: slice) -> np.ndarray:
    return logits[:, rows]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _clip_weights(shards: Sequence[Shard], scene_prior: ScenePrior, labels: Sequence[str]) -> np.ndarray:
    """Return a_n (K,) for the clips of each scene. Raises UserError where `scene_prior` does not fit `labels`."""
    counts = scene_counts(shards, labels)
    if scene_prior == "empirical":
        return np.full(len(labels), 1.0 / counts.sum())
    counts = np.maximum(counts, 1)  # a fold of the cross-validation may lack a scene, whose weight is then not used
    if scene_prior == "uniform":
        return 1.0 / (len(labels) * counts)
    check_prior(scene_prior, labels)
    assert isinstance(scene_prior, Mapping)
    return np.array([scene_prior[name] for name in labels]) / counts
