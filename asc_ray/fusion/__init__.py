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
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import Field

from asc_ray.errors import UserError
from asc_ray.fusion.newton import BLOCK, SAMPLE, TOLERANCE, Mapper, NoMinimum, Problem, Shard, average, minimize
from asc_ray.section import Section

RIDGES = tuple(float(10**e) for e in np.arange(-4.0, 1.1, 0.5))
FOLDS = 5
CROSS_VALIDATED = 16_384  # clips, for the choice of a ridge
CLIPS_A_SHARD = 65_536  # of logits that are in memory anyway
CHANCE = 3.0  # standard deviations that agreement must be above chance for a system to know anything

Ridge = Annotated[float, Field(ge=0.0)] | Literal["auto"]
ClassPrior = Literal["empirical", "uniform"] | dict[str, Annotated[float, Field(gt=0.0)]]


class FusionConfig(Section):
    """How eq. 4 is learned.

    `data`: what it is learned on. holdout: the part `fusion`, on which no teacher is trained. crossfit: all of
    the training split but the validation part; every teacher is trained `folds` times, and a clip's logits are those of
    the model that did not see it. train: the clips that the teachers were trained on.

    `ridge: auto` takes the one with the least log loss in cross-validation over places. `class_prior`: every clip
    weighs the same (empirical), or every class does (uniform), or classes weigh as given, label by label.
    """

    data: Literal["holdout", "crossfit", "train"] = Field("holdout", description="clips that it is learned on")
    folds: int = Field(4, ge=2, description="of crossfit")
    ridge: Ridge = Field("auto", description="strength of the pull towards the average of the systems")
    class_prior: ClassPrior = Field("empirical", description="how much each scene weighs")
    nonnegative: bool = Field(False, description="no system has a negative weight")
    tasks: int = Field(1, ge=1, description="so many tasks of the cluster share each pass over the clips; in no key")


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fitted fusion; `objective_before` is J of the average, `objective_after` is J of these weights and biases."""

    weights: np.ndarray  # (S,) float64, in the order of `systems`
    biases: np.ndarray  # (K,) float64 of sum 0, in the order of `labels`
    systems: tuple[str, ...]
    labels: tuple[str, ...]
    ridge: float
    class_prior: ClassPrior
    nonnegative: bool
    clips: int
    objective_before: float
    objective_after: float
    iterations: int
    notes: tuple[str, ...] = ()  # systems that say nothing, or the same as another; labels that none agrees with

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Fused logits (N, K) float32 of (S, N, K) logits whose systems and classes are in the order of the fit.

        Raises UserError for another number of systems or classes.
        """
        if logits.ndim != 3 or (logits.shape[0], logits.shape[2]) != (len(self.weights), len(self.biases)):
            raise UserError(
                f"fusion: logits of shape {logits.shape} (systems, clips, classes); this fusion is of "
                f"{len(self.weights)} systems ({', '.join(self.systems)}) and {len(self.biases)} classes"
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
        """Raises UserError when `path` is not a fusion's JSON."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            weights, biases = document.pop("weights"), document.pop("biases")
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
    labels: ArrayLike,
    *,
    systems: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    groups: ArrayLike | None = None,
    ridge: Ridge = "auto",
    class_prior: ClassPrior = "empirical",
    nonnegative: bool = False,
) -> Fusion:
    """The minimum of J for logits (S, N, K) and class indices `labels` (N,), on clips no system was trained on.

    `groups` (N,) are the clips' places: clips of one group are never on both sides of the cross-validation that chooses
    the ridge. Without them every clip is a group. `class_prior` and `nonnegative` are those of FusionConfig.

    Memory beyond the inputs does not grow with N; memory-mapped logits are read in blocks. What the result's `notes`
    say is a warning, too: above all where no system knows the labels, as where the clips are in another order. Raises
    UserError for shapes that do not agree, logits that are not finite, classes without a clip, and a search that does
    not converge (only without a ridge, when the systems separate the classes and no finite minimum exists).

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(30_000) % 3
    >>> good = 2.0 * np.eye(3)[labels] + rng.standard_normal((30_000, 3))
    >>> noise = rng.standard_normal((30_000, 3))
    >>> fusion = fit(np.stack([good, noise]), labels, systems=["good", "noise"])
    >>> fusion.weights.round(1).tolist()
    [2.0, 0.0]
    >>> fusion.objective_after < fusion.objective_before
    True
    >>> fusion.apply(np.stack([good, noise])).shape
    (30000, 3)
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 3 or not all(logits.shape) or labels.shape != logits.shape[1:2]:
        raise UserError(
            f"fusion: logits of shape {logits.shape} and labels of shape {labels.shape}; expected (systems, clips, "
            "classes) and (clips,), none of them empty"
        )
    count_s, count_n, count_k = logits.shape
    systems = systems if systems is not None else [f"system {s}" for s in range(count_s)]
    classes = classes if classes is not None else [f"class {k}" for k in range(count_k)]
    if (len(systems), len(classes)) != (count_s, count_k):
        raise UserError(
            f"fusion: {len(systems)} names of systems and {len(classes)} of classes for logits of {count_s} systems "
            f"and {count_k} classes"
        )
    fusion = fit_shards(
        [Shard(partial(_view, logits, rows), labels[rows]) for rows in _slices(count_n, CLIPS_A_SHARD)],
        systems=systems,
        classes=classes,
        groups=groups,
        ridge=ridge,
        class_prior=class_prior,
        nonnegative=nonnegative,
    )
    for note in fusion.notes:
        warnings.warn(note, stacklevel=2)
    return fusion


def fit_shards(
    shards: Sequence[Shard],
    *,
    systems: Sequence[str],
    classes: Sequence[str],
    groups: ArrayLike | None = None,
    ridge: Ridge = "auto",
    class_prior: ClassPrior = "empirical",
    nonnegative: bool = False,
    mapper: Mapper = map,
) -> Fusion:
    """`fit` for clips that are read shard by shard in every pass; `groups` (N,) are of all shards' clips in order.

    `mapper` evaluates the shards; the result does not depend on it, and on the sharding only by rounding.
    """
    _check(shards, systems, classes, ridge)
    count = sum(len(shard.labels) for shard in shards)
    group = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(group) != count:
        raise UserError(f"fusion: {len(group)} groups for {count} clips; expected one for each")

    def problem(some: Sequence[Shard], ridge: float, mapper: Mapper = map) -> Problem:
        return Problem(some, _clip_weights(some, class_prior, classes), ridge, nonnegative, mapper)

    start = average(len(systems), len(classes))
    with np.errstate(invalid="ignore", over="ignore"):
        at_average = problem(shards, 0.0, mapper).evaluate(start, hessian=False)
    if not (np.isfinite(at_average.value) and np.isfinite(at_average.gradient).all()):
        _refuse_broken(shards, systems)
    if at_average.value > np.log(len(classes)):  # so sure and wrong that it is worse than no system: start there
        start = np.zeros(len(start))
    scale = max(1.0, float(np.abs(at_average.gradient).max()))
    if ridge == "auto":
        ridge = _choose_ridge(shards, group, start, scale, problem)
    iterations, few = 0, shards
    if count > 4 * SAMPLE:  # most of the way on a sample, the rest on all clips
        rng = np.random.default_rng(0)
        few = [_loaded(shards, [rng.random(len(shard.labels)) < SAMPLE / count for shard in shards])]
        near = minimize(problem(few, max(ridge, 1e-6)), start, 1e-3 * scale)
        start, iterations = near.theta, near.iterations
    curvature = problem(few, ridge).evaluate(start).hessian
    found = minimize(problem(shards, ridge, mapper), start, TOLERANCE * max(scale, ridge), curvature)
    weights, biases = np.split(found.theta, [len(systems)])
    return Fusion(
        weights=weights,
        biases=biases - biases.mean(),
        systems=tuple(systems),
        labels=tuple(classes),
        ridge=ridge,
        class_prior=class_prior,
        nonnegative=nonnegative,
        clips=count,
        objective_before=at_average.value,  # the average is where the ridge pulls to
        objective_after=found.sums.value,
        iterations=iterations + found.iterations,
        notes=_notes(few, systems),
    )


def objectives(
    shards: Sequence[Shard],
    *,
    systems: Sequence[str],
    classes: Sequence[str],
    class_prior: ClassPrior = "empirical",
    mapper: Mapper = map,
) -> dict[str, float]:
    """J of each system by itself, with weight 1 and no bias; without a ridge."""
    problem = Problem(shards, _clip_weights(shards, class_prior, classes), ridge=0.0, map=mapper)
    alone = np.eye(len(systems), len(systems) + len(classes))
    return {name: problem.evaluate(theta, hessian=False).value for name, theta in zip(systems, alone, strict=True)}


def _choose_ridge(
    shards: Sequence[Shard],
    group: np.ndarray,
    start: np.ndarray,
    scale: float,
    problem: Callable[[Sequence[Shard], float], Problem],
) -> float:
    """The one of RIDGES with the least log loss on the groups left out, over FOLDS folds of whole groups.

    Of many clips as many groups are taken as hold CROSS_VALIDATED of them. The ridge counts for the mean over clips, so
    to have the same strength beside the sum over all of them it is made smaller by the share that was taken.
    """
    count = int(group.max()) + 1
    if count == 1:  # nothing can be left out
        return RIDGES[-1]
    order = np.random.default_rng(0).permutation(count)
    enough = np.searchsorted(np.cumsum(np.bincount(group)[order]), CROSS_VALIDATED) + 1
    taken = order[: max(enough, FOLDS)]
    fold_of = np.full(count, -1, dtype=np.int8)
    fold_of[taken] = np.arange(len(taken)) % FOLDS
    of_shard = np.split(fold_of[group], np.cumsum([len(shard.labels) for shard in shards])[:-1])
    losses = np.zeros(len(RIDGES))
    folds = [_loaded(shards, [own == fold for own in of_shard]) for fold in range(min(FOLDS, len(taken)))]
    for left_out in folds:
        theta = start
        for index in reversed(range(len(RIDGES))):  # each from the minimum under the next stronger one
            training = problem([fold for fold in folds if fold is not left_out], RIDGES[index])
            try:
                theta = minimize(training, theta, 1e-4 * max(scale, RIDGES[index])).theta
                losses[index] += replace(training, shards=[left_out], ridge=0.0).evaluate(theta, hessian=False).value
            except NoMinimum:  # too weak for logits like these
                losses[index] = np.inf
    share = sum(len(fold.labels) for fold in folds) / len(group)
    return RIDGES[int(losses.argmin())] * share


def _notes(shards: Sequence[Shard], systems: Sequence[str]) -> tuple[str, ...]:
    """What a user should know: that no system knows the labels, or that the clips do not determine a weight."""
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
    notes = [f"{systems[s]}: its logits do not differ between the classes; its weight means nothing" for s in constant]
    notes += [f"{systems[t]} and {systems[s]}: the same logits; they share one weight evenly" for t, s in equal]
    right, certainty = _agreement(shards)
    if certainty < CHANCE:
        notes.insert(
            0,
            f"no system agrees with the labels on more clips than chance has it ({100 * right:.0f} % at most): check "
            "that logits and labels have their clips, and their classes, in the same order",
        )
    return tuple(notes)


def _agreement(shards: Sequence[Shard]) -> tuple[float, float]:
    """The largest share of clips that a system is right on, and how many standard deviations above chance the most
    certain one is: above the share on which its answers and labels of other clips would agree."""
    answers = np.concatenate([shard.read().argmax(axis=2) for shard in shards], axis=1)  # (S, N)
    labels = np.concatenate([shard.labels for shard in shards])
    right = (answers == labels).mean(axis=1)
    chance = np.zeros(len(answers))
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        chance += (answers == label).mean(axis=1) * count / len(labels)
    certainty = (right - chance) / np.sqrt(np.maximum(chance * (1 - chance), 1e-12) / len(labels))
    return float(right.max()), float(certainty.max())


def _loaded(shards: Sequence[Shard], chosen: Sequence[np.ndarray]) -> Shard:
    """The chosen clips, a mask for each shard, read into memory."""
    logits = [shard.read()[:, mask] for shard, mask in zip(shards, chosen, strict=True) if mask.any()]
    labels = [shard.labels[mask] for shard, mask in zip(shards, chosen, strict=True)]
    return Shard(partial(np.asarray, np.concatenate(logits, axis=1)), np.concatenate(labels))


def _view(logits: np.ndarray, rows: slice) -> np.ndarray:
    return logits[:, rows]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _clip_weights(shards: Sequence[Shard], class_prior: ClassPrior, classes: Sequence[str]) -> np.ndarray:
    """(K,) a_n of the clips of each class. Raises UserError."""
    counts = _counts(shards, classes)
    if class_prior == "empirical":
        return np.full(len(classes), 1.0 / counts.sum())
    counts = np.maximum(counts, 1)  # a fold of the cross-validation may lack a class; its weight then meets no clip
    if class_prior == "uniform":
        return 1.0 / (len(classes) * counts)
    check_prior(class_prior, classes)
    assert isinstance(class_prior, Mapping)
    return np.array([class_prior[name] for name in classes]) / counts


def check_prior(class_prior: ClassPrior, classes: Sequence[str]) -> None:
    """Raises UserError where the classes' shares are not one for each, above 0, together 1."""
    if class_prior in ("empirical", "uniform"):
        return
    shares = class_prior if isinstance(class_prior, Mapping) else {}
    if shares.keys() != set(classes) or min(shares.values()) <= 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise UserError(
            f"fusion.class_prior: found {class_prior}; give each of {', '.join(classes)} its share, above 0 and "
            "together 1, or choose empirical or uniform"
        )


def _counts(shards: Sequence[Shard], classes: Sequence[str]) -> np.ndarray:
    return sum((np.bincount(shard.labels, minlength=len(classes)) for shard in shards), np.zeros(len(classes), int))


def _check(shards: Sequence[Shard], systems: Sequence[str], classes: Sequence[str], ridge: Ridge) -> None:
    """Refuse names that are not different, labels that are no class indices, classes without a clip, no ridge."""
    if ridge != "auto" and not (isinstance(ridge, int | float) and 0 <= ridge < np.inf):
        raise UserError(f"fusion.ridge: found {ridge!r}; expected auto, or a number from 0")
    for kind, names in (("system", systems), ("class", classes)):
        if len(set(names)) != len(names):
            raise UserError(f"fusion: {kind} names {', '.join(names)}; expected {len(names)} different ones")
    for labels in (shard.labels for shard in shards):
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(classes):
            raise UserError(f"fusion: labels of type {labels.dtype}, expected class indices 0 to {len(classes) - 1}")
    counts = _counts(shards, classes)
    if not counts.all():
        found = ", ".join(f"{name} {n}" for name, n in zip(classes, counts, strict=True))
        raise UserError(
            f"fusion: a class has no clip to learn its bias from (clips: {found}); give clips of each class, or leave "
            "it out"
        )


def _refuse_broken(shards: Sequence[Shard], systems: Sequence[str]) -> None:
    """Raise UserError with the systems whose logits are not finite, and of how many clips."""
    broken, total = np.zeros(len(systems), dtype=np.int64), 0
    for shard in shards:
        broken += (~np.isfinite(shard.read()).all(axis=2)).sum(axis=1)
        total += len(shard.labels)
    found = ", ".join(f"{name}: {n} of {total} clips" for name, n in zip(systems, broken, strict=True) if n)
    raise UserError(f"fusion: logits that are not finite: {found}; compute them again, or leave these systems out")
