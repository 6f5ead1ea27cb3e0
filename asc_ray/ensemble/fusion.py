"""Fusion of systems by multi-class linear logistic regression, eq. 4: z(k, x) = sum_s w_s z_s(k, x) + b_k.

    J(w, b) = sum_n a_n CE(softmax z(., x_n), y_n) + ridge / 2 (sum_s sigma_s^2 (w_s - c_s)^2 + |b|^2),
    sum_n a_n = 1

is convex and has S + K unknowns, so Newton's method with the exact Hessian finds its minimum in a few passes over the
clips. The ridge pulls towards the centre c (`ensemble/center.py`), which is also where the search starts; sigma_s is
the deviation of a system's noise. So the fusion is the same for a system whose logits all are twice as large.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from asc_ray.ensemble.center import center
from asc_ray.ensemble.checks import check_inputs, notes_on, refuse_broken, scene_counts
from asc_ray.ensemble.choice import KNOWN_PLACES, Candidate, Choice, chosen, cross_validate, sample
from asc_ray.ensemble.config import Ridge, ScenePrior, check_prior
from asc_ray.ensemble.newton import BLOCK, TOLERANCE, Problem, Shard, minimize, no_pull
from asc_ray.errors import UserError

FEW_PLACES = 30
CLIPS_A_SHARD = 65_536  # for logits that are in memory anyway


@dataclass(frozen=True, eq=False)
class Fusion:
    """A fitted fusion.

    `objective_before` is the mean cross-entropy of the systems' average, without a penalty; `objective_after` is J of
    these weights and biases.
    """

    weights: np.ndarray  # (S,) float64, in the order of `systems`
    biases: np.ndarray  # (K,) float64 of sum 0, in the order of `labels`
    systems: tuple[str, ...]
    labels: tuple[str, ...]
    center: np.ndarray  # (S,) c, and
    noise: np.ndarray  # (S,) sigma, of the ridge
    ridge: float
    choice: Choice  # empty where the ridge was given
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
        by_system = {name: getattr(self, name).tolist() for name in ("weights", "center", "noise")}
        document = asdict(self) | {key: dict(zip(self.systems, own, strict=True)) for key, own in by_system.items()}
        document["biases"] = dict(zip(self.labels, self.biases.tolist(), strict=True))
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
                center=np.array(list(document.pop("center").values()), dtype=np.float64),
                noise=np.array(list(document.pop("noise").values()), dtype=np.float64),
                choice=tuple(Candidate(**one) for one in document.pop("choice")),
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

    weights_of = partial(_clip_weights, scene_prior=scene_prior, labels=labels)
    average = np.concatenate([np.full(len(systems), 1 / len(systems)), np.zeros(len(labels))])
    with np.errstate(invalid="ignore", over="ignore"):
        at_average = Problem(shards, weights_of(shards), no_pull(len(systems))).evaluate(average, hessian=False)
    if not (np.isfinite(at_average.value) and np.isfinite(at_average.gradient).all()):
        refuse_broken(shards, systems)
    few, place_of_few = sample(shards, place)
    places = int(place.max()) + 1
    by_places = KNOWN_PLACES / places
    choice = cross_validate(few, place_of_few, weights_of, nonnegative) if ridge == "auto" else ()
    multiple = chosen(choice)
    ridge = multiple * by_places if ridge == "auto" else float(ridge)
    pull = replace(center([few], weights_of([few])), ridge=ridge)
    problem = Problem(shards, weights_of(shards), pull, nonnegative)
    iterations, start, curvature = 0, problem.start, None
    if len(few.scene) < count:  # most of the way on the sample, the rest on all clips
        of_few = Problem([few], weights_of([few]), replace(pull, ridge=max(ridge, 1e-6)), nonnegative)
        near = minimize(of_few, start, 1e-3)
        start, iterations, curvature = near.theta, near.iterations, near.sums.hessian
    found = minimize(problem, start, TOLERANCE * max(1.0, ridge), curvature)
    weights, biases = np.split(found.theta, [len(systems)])
    return Fusion(
        weights=weights,
        biases=biases - biases.mean(),
        systems=tuple(systems),
        labels=tuple(labels),
        center=pull.center,
        noise=pull.unit,
        ridge=ridge,
        choice=choice,
        scene_prior=scene_prior,
        nonnegative=nonnegative,
        clips=count,
        objective_before=at_average.value,
        objective_after=found.sums.value,
        iterations=iterations + found.iterations,
        notes=notes_on([few], systems) + _notes_on_places(places, choice, multiple),
    )


def objectives(
    shards: Sequence[Shard],
    *,
    systems: Sequence[str],
    labels: Sequence[str],
    scene_prior: ScenePrior = "empirical",
) -> dict[str, float]:
    """Return J of each system by itself, with weight 1 and no bias; without a ridge."""
    problem = Problem(shards, _clip_weights(shards, scene_prior, labels), no_pull(len(systems)))
    alone = np.eye(len(systems), len(systems) + len(labels))
    return {name: problem.evaluate(theta, hessian=False).value for name, theta in zip(systems, alone, strict=True)}


def _notes_on_places(places: int, choice: Choice, multiple: float) -> tuple[str, ...]:
    notes = []
    if places < FEW_PLACES:
        notes.append(
            f"eq. 4 is learned on {places} places: so few tell a weak system from a good one, but not good ones from "
            "each other; hold out more (partition.fusion), or take fusion.data: crossfit"
        )
    if choice and multiple == choice[0].multiple:
        notes.append("the strongest ridge was chosen: the clips support nothing beside the centre")
    if choice and multiple == choice[-1].multiple:
        notes.append("the weakest ridge offered was chosen; a weaker one may be better, give fusion.ridge as a number")
    return tuple(notes)


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
