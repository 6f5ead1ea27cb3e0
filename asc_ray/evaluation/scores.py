"""Figures of merit of one system on one set of clips, overall and by device, group of devices and scene."""

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from asc_ray.errors import UserError
from asc_ray.evaluation.calibration import ReliabilityBin, expected_calibration_error, reliability
from asc_ray.evaluation.groups import Group, device_groups
from asc_ray.section import Section


class DeviceFigures(Section):
    clips: int
    accuracy: float
    log_loss: float
    calibration_error: float


class Evaluation(Section):
    """Figures of one system. Accuracies are in [0, 1]. Devices, groups and scenes without a clip are left out."""

    renamed: ClassVar[Mapping[str, str]] = {"per_scene": "per_class"}
    clips: int
    accuracy: float
    macro_accuracy: float  # mean over the scenes that occur
    log_loss: float  # nats a clip
    calibration_error: float  # expected calibration error, 15 equal bins of confidence
    reliability: tuple[ReliabilityBin, ...]  # those bins, without the empty ones
    per_device: dict[str, DeviceFigures]  # sorted by name
    groups: dict[Group, float]  # accuracy over the group's clips; a real device is also seen or unseen
    per_scene: dict[str, float]  # recall, in the order of the labels
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]  # (K, K) clips; row: the scene, column: the answer
    by_recording: "Evaluation | None" = None  # of whole recordings, where the clips are seconds of longer ones

    def accuracies(self) -> dict[str, float]:
        """Return the accuracy on `all` clips, on each group of devices and on each device."""
        devices = {name: figures.accuracy for name, figures in self.per_device.items()}
        return {"all": self.accuracy, **{str(group): share for group, share in self.groups.items()}, **devices}


def evaluate(
    logits: np.ndarray,
    scene: ArrayLike,
    device: Sequence[str] | np.ndarray,
    labels: Sequence[str],
    unseen: Iterable[str],
    *,
    real: Iterable[str] | None = None,
) -> Evaluation:
    """Evaluate logits (N, K) against indices `scene` (N,) of clips recorded with `device` (N,).

    `unseen` are the devices that training did not have; without `real`, the devices' names tell the real ones.
    Raises UserError for no clips, shapes that do not agree, indices out of range and logits that are not finite.
    """
    scene, device = np.asarray(scene), np.asarray(device, dtype=str)
    count = len(labels)
    if not len(scene) or logits.shape != (len(scene), count) or device.shape != scene.shape:
        raise UserError(
            f"evaluation: logits of shape {logits.shape}, {len(scene)} scenes, {len(device)} devices, {count} labels; "
            "expected (clips, labels), as many scenes and devices as clips, and at least one clip"
        )
    if scene.dtype.kind not in "iu" or scene.min() < 0 or scene.max() >= count:
        raise UserError(f"evaluation: scenes of type {scene.dtype}, expected indices 0 to {count - 1}")
    if broken := int((~np.isfinite(logits).all(axis=1)).sum()):
        raise UserError(f"evaluation: logits of {broken} of {len(scene)} clips are not finite")

    log_p = log_posteriors(logits)
    answer = log_p.argmax(axis=1)
    right = answer == scene
    confusion = np.bincount(scene * count + answer, minlength=count**2).reshape(count, count)
    of_scene = confusion.sum(axis=1)
    per_scene = {label: float(confusion[k, k] / of_scene[k]) for k, label in enumerate(labels) if of_scene[k]}
    losses = -log_p[np.arange(len(scene)), scene]
    confidence = np.exp(log_p.max(axis=1))
    per_device = {}
    for name in np.unique(device):
        own = device == name
        per_device[str(name)] = DeviceFigures(
            clips=int(own.sum()),
            accuracy=float(right[own].mean()),
            log_loss=float(losses[own].mean()),
            calibration_error=expected_calibration_error(reliability(confidence[own], right[own])),
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
        macro_accuracy=float(np.mean(list(per_scene.values()))),
        log_loss=float(losses.mean()),
        calibration_error=expected_calibration_error(bins),
        reliability=bins,
        per_device=per_device,
        groups={group: float(right[member].mean()) for group, member in members.items() if member.any()},
        per_scene=per_scene,
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
    )


def log_posteriors(logits: np.ndarray) -> np.ndarray:
    """Return the log of the softmax of logits (N, K), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def of_recordings(logits: np.ndarray, recording: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the logits (R, K) of the recordings whose seconds have `logits` (N, K), and a second (R,) of each.

    `recording` (N,) are numbers. The mean of the log posteriors of a recording's seconds s = 1 ... S,

        l_k = 1/S sum_s log p_k(x_s),    p(k | x_1 ... x_S) = exp(l_k) / sum_j exp(l_j),

    is the normalized geometric mean of their posteriors.
    """
    _, first, of, seconds = np.unique(recording, return_index=True, return_inverse=True, return_counts=True)
    total = np.zeros((len(first), logits.shape[1]))
    np.add.at(total, of, log_posteriors(logits))
    return total / seconds[:, None], first


def guessed(scenes: int, clips: int) -> float:
    """Return the accuracy that guessing seldom exceeds: its mean, 1 / scenes, and two standard deviations."""
    return 1 / scenes + 2 * (1 / scenes * (1 - 1 / scenes) / clips) ** 0.5
