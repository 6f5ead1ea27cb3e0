"""The mean and the spread of several trainings that differ in their seeds."""

from collections.abc import Iterable, Sequence

import numpy as np

from asc_ray.evaluation.calibration import pooled_bins
from asc_ray.evaluation.groups import Group
from asc_ray.evaluation.scores import DeviceFigures, Evaluation
from asc_ray.section import Section


class Deviation(Section):
    """Sample standard deviations over `runs` trainings that differ in their seeds."""

    runs: int
    accuracy: float
    macro_accuracy: float
    log_loss: float
    calibration_error: float
    per_device: dict[str, float]  # deviation of the accuracy
    per_scene: dict[str, float]  # deviation of the recall
    groups: dict[Group, float]
    by_recording: "Deviation | None" = None

    def accuracies(self) -> dict[str, float]:
        """Return the deviations under the names that `Evaluation.accuracies` gives."""
        return {"all": self.accuracy, **{str(group): d for group, d in self.groups.items()}, **self.per_device}


OverSeeds = tuple[Evaluation, Deviation | None]


def over_seeds(runs: Sequence[Evaluation]) -> OverSeeds:
    """Return the mean of evaluations on the same clips, with summed confusions, and their deviation (None for one)."""
    first = runs[0]
    if len(runs) == 1:
        return first, None

    def mean(values: Iterable[float]) -> float:
        return float(np.mean(list(values)))

    def deviation(values: Iterable[float]) -> float:
        return float(np.std(list(values), ddof=1))

    whole = [run.by_recording for run in runs if run.by_recording]
    recordings, deviation_of_recordings = over_seeds(whole) if whole else (None, None)
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
            "reliability": pooled_bins([own for run in runs for own in run.reliability]),
            "per_device": devices,
            "by_recording": recordings,
            "groups": {group: mean(run.groups[group] for run in runs) for group in first.groups},
            "per_scene": {label: mean(run.per_scene[label] for run in runs) for label in first.per_scene},
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
        per_scene={label: deviation(run.per_scene[label] for run in runs) for label in first.per_scene},
        groups={group: deviation(run.groups[group] for run in runs) for group in first.groups},
        by_recording=deviation_of_recordings,
    )
    return pooled, spread
