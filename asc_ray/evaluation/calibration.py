"""Calibration: how often answers of a given confidence are right."""

from collections.abc import Sequence

import numpy as np

from asc_ray.section import Section

CALIBRATION_BINS = 15


class ReliabilityBin(Section):
    """Clips whose answers are about equally confident."""

    clips: int
    confidence: float  # mean
    accuracy: float


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[ReliabilityBin, ...]:
    """Sort clips (N,) by the confidence of their answers into bins (i/15, (i+1)/15] (Guo et al., 2017)."""
    index = _bin_of(confidence)
    members = [index == i for i in np.unique(index)]
    return tuple(
        ReliabilityBin(clips=own.sum(), confidence=confidence[own].mean(), accuracy=right[own].mean())
        for own in members
    )


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    return np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)


def pooled_bins(bins: Sequence[ReliabilityBin]) -> tuple[ReliabilityBin, ...]:
    """Join the bins of several evaluations into those of all their clips together."""
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


def expected_calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """Return the mean of |accuracy - confidence| over the bins, weighted by their clips."""
    clips = sum(b.clips for b in bins)
    return sum(b.clips * abs(b.accuracy - b.confidence) for b in bins) / clips
