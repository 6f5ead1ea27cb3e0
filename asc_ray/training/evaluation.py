"""Figures of merit of one system on one set of clips, overall and by device, group of devices and scene."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from asc_ray.errors import UserError
from asc_ray.section import Section

Group = Literal["seen", "unseen", "real"]
CALIBRATION_BINS = 15
RESAMPLES = 2_000
SIMULATED = re.compile(r"s\d+")  # TAU22's names of simulated devices; any other name is a real one


class DeviceFigures(Section):
    clips: int
    accuracy: float
    log_loss: float
    calibration_error: float


class ReliabilityBin(Section):
    """Clips whose answers are about equally confident."""

    clips: int
    confidence: float  # mean
    accuracy: float


class Evaluation(Section):
    """Accuracies are shares in [0, 1]. Devices, groups and labels without a clip are left out of the mappings."""

    clips: int
    accuracy: float
    macro_accuracy: float  # mean over the labels that occur
    log_loss: float  # nats a clip
    calibration_error: float  # expected calibration error, 15 equal bins of confidence
    reliability: tuple[ReliabilityBin, ...]  # of those bins; without the empty ones
    per_device: dict[str, DeviceFigures]  # sorted by name
    groups: dict[Group, float]  # over the groups' clips; seen = in training, a real device is also seen or unseen
    per_class: dict[str, float]  # recall, in the order of the labels
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]  # (K, K) clips; row: the true label, column: the answer

    def accuracies(self) -> dict[str, float]:
        """Of `all` clips, of each group of devices and of each device."""
        devices = {name: figures.accuracy for name, figures in self.per_device.items()}
        return {"all": self.accuracy, **{str(group): share for group, share in self.groups.items()}, **devices}


class Deviation(Section):
    """Sample standard deviations over `runs` trainings that differ in their seeds."""

    runs: int
    accuracy: float
    macro_accuracy: float
    log_loss: float
    calibration_error: float
    per_device: dict[str, float]  # of the accuracy
    groups: dict[Group, float]

    def accuracies(self) -> dict[str, float]:
        """As Evaluation has them."""
        return {"all": self.accuracy, **{str(group): d for group, d in self.groups.items()}, **self.per_device}


class Interval(Section):
    """An estimate and the middle 95 % of its resamples."""

    value: float
    low: float
    high: float


class Gain(Section):
    """What one system has over another on the same clips; more is better in both."""

    log_loss: Interval  # nats a clip that it loses less
    accuracy: Interval  # share of the clips that it has more right
    places: int


class Scores(Section):
    """Every single system, their average and the fusion (and students), on the same clips."""

    systems: dict[str, Evaluation]
    gain: Gain  # of the fusion over the average


def device_groups(train_devices: Iterable[str], test_devices: Iterable[str]) -> dict[Group, tuple[str, ...]]:
    """The test devices that occur in training, that do not, and that are not simulated (named s1, s2, ...).

    >>> device_groups(["a", "s1"], ["a", "s1", "s4"])
    {'seen': ('a', 's1'), 'unseen': ('s4',), 'real': ('a',)}
    """
    trained, tested = set(train_devices), sorted(set(test_devices))
    return {
        "seen": tuple(d for d in tested if d in trained),
        "unseen": tuple(d for d in tested if d not in trained),
        "real": tuple(d for d in tested if not SIMULATED.fullmatch(d)),
    }


def evaluate(
    logits: np.ndarray,
    scene: ArrayLike,
    device: Sequence[str] | np.ndarray,
    labels: Sequence[str],
    unseen: Iterable[str],
    *,
    real: Iterable[str] | None = None,
) -> Evaluation:
    """Evaluate logits (N, K) against class indices `scene` (N,) of clips recorded with `device` (N,).

    `unseen` are the devices that training did not have; `real` without a value follows from the devices' names.
    Raises UserError for no clips, shapes that do not agree, class indices out of range and logits that are not finite.
    """
    scene, device = np.asarray(scene), np.asarray(device, dtype=str)
    count = len(labels)
    if not len(scene) or logits.shape != (len(scene), count) or device.shape != scene.shape:
        raise UserError(
            f"evaluation: logits of shape {logits.shape}, {len(scene)} scenes, {len(device)} devices, {count} labels; "
            "expected (clips, labels), as many scenes and devices as clips, and at least one clip"
        )
    if scene.dtype.kind not in "iu" or scene.min() < 0 or scene.max() >= count:
        raise UserError(f"evaluation: scenes of type {scene.dtype}, expected class indices 0 to {count - 1}")
    if broken := int((~np.isfinite(logits).all(axis=1)).sum()):
        raise UserError(f"evaluation: logits of {broken} of {len(scene)} clips are not finite")

    log_p = log_posteriors(logits)
    answer = log_p.argmax(axis=1)
    right = answer == scene
    confusion = np.bincount(scene * count + answer, minlength=count**2).reshape(count, count)
    of_class = confusion.sum(axis=1)
    per_class = {label: float(confusion[k, k] / of_class[k]) for k, label in enumerate(labels) if of_class[k]}
    losses = -log_p[np.arange(len(scene)), scene]
    confidence = np.exp(log_p.max(axis=1))
    per_device = {}
    for name in np.unique(device):
        own = device == name
        per_device[str(name)] = DeviceFigures(
            clips=int(own.sum()),
            accuracy=float(right[own].mean()),
            log_loss=float(losses[own].mean()),
            calibration_error=_calibration_error(reliability(confidence[own], right[own])),
        )
    bins = reliability(confidence, right)
    unseen = set(unseen)
    groups = device_groups(set(per_device) - unseen, per_device)
    if real is not None:
        groups["real"] = tuple(real)
    members = {group: np.isin(device, names) for group, names in groups.items()}
    return Evaluation(
        clips=len(scene),
        accuracy=float(right.mean()),
        macro_accuracy=float(np.mean(list(per_class.values()))),
        log_loss=float(losses.mean()),
        calibration_error=_calibration_error(bins),
        reliability=bins,
        per_device=per_device,
        groups={group: float(right[member].mean()) for group, member in members.items() if member.any()},
        per_class=per_class,
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


OverSeeds = tuple[Evaluation, Deviation | None]


def over_seeds(runs: Sequence[Evaluation]) -> OverSeeds:
    """The mean of several evaluations on the same clips, with confusions summed, and what they vary; None for one."""
    first = runs[0]
    if len(runs) == 1:
        return first, None

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def deviation(values: Iterable[float]) -> float:
        return float(np.std(list(values), ddof=1))

    figures = ("accuracy", "macro_accuracy", "log_loss", "calibration_error")
    shared = {name: [getattr(run, name) for run in runs] for name in figures}
    devices = {
        name: DeviceFigures(
            clips=figures.clips,
            accuracy=mean(run.per_device[name].accuracy for run in runs),
            log_loss=mean(run.per_device[name].log_loss for run in runs),
            calibration_error=mean(run.per_device[name].calibration_error for run in runs),
        )
        for name, figures in first.per_device.items()
    }
    pooled = first.model_copy(
        update={name: mean(values) for name, values in shared.items()}
        | {
            "reliability": _pooled_bins([own for run in runs for own in run.reliability]),
            "per_device": devices,
            "groups": {group: mean(run.groups[group] for run in runs) for group in first.groups},
            "per_class": {label: mean(run.per_class[label] for run in runs) for label in first.per_class},
            "confusion": tuple(map(tuple, np.sum([run.confusion for run in runs], axis=0).tolist())),
        }
    )
    spread = Deviation(
        runs=len(runs),
        accuracy=deviation(shared["accuracy"]),
        macro_accuracy=deviation(shared["macro_accuracy"]),
        log_loss=deviation(shared["log_loss"]),
        calibration_error=deviation(shared["calibration_error"]),
        per_device={name: deviation(run.per_device[name].accuracy for run in runs) for name in devices},
        groups={group: deviation(run.groups[group] for run in runs) for group in first.groups},
    )
    return pooled, spread


def log_posteriors(logits: np.ndarray) -> np.ndarray:
    """Log of the softmax of logits (N, K), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def gain(before: np.ndarray, after: np.ndarray, scene: np.ndarray, places: np.ndarray) -> Gain:
    """Of logits `after` (N, K) over `before`, by bootstrap over `places` (N,).

    Clips of one place are alike, so whole places are drawn with replacement.
    """
    names, place = np.unique(places, return_inverse=True)
    at_label = np.arange(len(scene)), scene
    old, new = log_posteriors(before), log_posteriors(after)
    right = (new.argmax(axis=1) == scene).astype(float) - (old.argmax(axis=1) == scene)
    gained = np.stack([new[at_label] - old[at_label], right, np.ones(len(scene))])
    sums = np.stack([np.bincount(place, weights=each) for each in gained], axis=1)  # (places, 3)
    rng, even = np.random.default_rng(0), np.full(len(names), 1 / len(names))
    draws = [rng.multinomial(len(names), even).astype(float) @ sums for _ in range(RESAMPLES)]
    means = np.array([(loss / clips, accuracy / clips) for loss, accuracy, clips in draws])
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    loss, accuracy = (
        Interval(value=float(each.mean()), low=float(a), high=float(b))
        for each, a, b in zip(gained[:2], low, high, strict=True)
    )
    return Gain(log_loss=loss, accuracy=accuracy, places=len(names))


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Guo et al., 2017: the clips (N,) by the confidence of their answer, in bins (i/15, (i+1)/15]."""
    index = _bin_of(confidence)
    members = [index == i for i in np.unique(index)]
    return tuple(
        ReliabilityBin(clips=own.sum(), confidence=confidence[own].mean(), accuracy=right[own].mean())
        for own in members
    )


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def _pooled_bins(bins: Sequence[ReliabilityBin]) -> tuple[ReliabilityBin, ...]:
    """Bins of several evaluations as of all their clips together."""
    index = _bin_of(np.array([own.confidence for own in bins]))
    pooled = []
    for number in np.unique(index):
        own = [b for b, i in zip(bins, index, strict=True) if i == number]
        clips = sum(b.clips for b in own)
        pooled.append(
            ReliabilityBin(
                clips=clips,
                confidence=sum(b.clips * b.confidence for b in own) / clips,
                accuracy=sum(b.clips * b.accuracy for b in own) / clips,
            )
        )
    return tuple(pooled)


def _calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Mean of |accuracy - confidence| over the bins, weighted by their clips."""
    clips = sum(b.clips for b in bins)
    return sum(b.clips * abs(b.accuracy - b.confidence) for b in bins) / clips
