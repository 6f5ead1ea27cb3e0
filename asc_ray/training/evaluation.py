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
SIMULATED = re.compile(r"s\d+")  # TAU22's names of simulated devices; any other name is a real one


class DeviceAccuracy(Section):
    clips: int
    accuracy: float


class Evaluation(Section):
    """Accuracies are shares in [0, 1]. Devices, groups and labels without a clip are left out of the mappings."""

    clips: int
    accuracy: float
    macro_accuracy: float  # mean over the labels that occur
    log_loss: float  # nats a clip
    calibration_error: float  # expected calibration error, 15 equal bins of confidence
    per_device: dict[str, DeviceAccuracy]  # sorted by name
    groups: dict[Group, float]  # over the groups' clips; seen = in training, a real device is also seen or unseen
    per_class: dict[str, float]  # recall, in the order of the labels
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]  # (K, K) clips; row: the true label, column: the answer


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

    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    answer = z.argmax(axis=1)
    right = answer == scene
    confusion = np.bincount(scene * count + answer, minlength=count**2).reshape(count, count)
    of_class = confusion.sum(axis=1)
    per_class = {label: float(confusion[k, k] / of_class[k]) for k, label in enumerate(labels) if of_class[k]}
    per_device = {
        str(name): DeviceAccuracy(clips=int((device == name).sum()), accuracy=float(right[device == name].mean()))
        for name in np.unique(device)
    }
    unseen = set(unseen)
    groups = device_groups(set(per_device) - unseen, per_device)
    if real is not None:
        groups["real"] = tuple(real)
    members = {group: np.isin(device, names) for group, names in groups.items()}
    return Evaluation(
        clips=len(scene),
        accuracy=float(right.mean()),
        macro_accuracy=float(np.mean(list(per_class.values()))),
        log_loss=float(-log_p[np.arange(len(scene)), scene].mean()),
        calibration_error=_calibration_error(np.exp(log_p.max(axis=1)), right),
        per_device=per_device,
        groups={group: float(right[member].mean()) for group, member in members.items() if member.any()},
        per_class=per_class,
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def _calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Guo et al., 2017: mean of |accuracy - confidence| over bins (i/15, (i+1)/15], weighted by their clips."""
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gap = np.bincount(bins, weights=right - confidence, minlength=CALIBRATION_BINS)
    return float(np.abs(gap).sum() / len(right))
