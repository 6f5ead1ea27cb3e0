"""Scores in artifacts: what a stage writes of them, and how they are read back."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from asc_ray.artifacts import stored_file
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.evaluation.gains import Gain, gain
from asc_ray.evaluation.groups import device_groups
from asc_ray.evaluation.scores import Evaluation, evaluate, of_recordings
from asc_ray.section import Section

EVALUATION = "evaluation.json"
ANSWERS = "test-00000.arrow"  # a student's logits of the test split
EVALUATION_FORM = 2  # part of the key of a student's scores: raise it when something else is written


class Scores(Section):
    """The evaluations of every system, their average and the fusion (and students), on the same clips."""

    systems: dict[str, Evaluation]
    gain: Gain  # of the fusion over the average


def score_ensemble(store: ClipStore, rows: np.ndarray, systems: Mapping[str, np.ndarray], fused: np.ndarray) -> Scores:
    """Score every system, their average and the fusion, by logits (N, K) of the store's clips `rows`."""
    outputs = {**systems, "average": np.mean(list(systems.values()), axis=0), "fusion": fused}
    return Scores(
        systems={name: score(store, rows, values) for name, values in outputs.items()},
        gain=gain(outputs["average"], outputs["fusion"], store.scene[rows], store.place[rows]),
    )


def score(store: ClipStore, rows: np.ndarray, logits: np.ndarray) -> Evaluation:
    """Evaluate logits (N, K) of the store's clips `rows` against their scenes, by device group.

    Where the clips are seconds of longer recordings, the recordings are scored, too, by `of_recordings`.
    """
    groups = device_groups(store.device.among(store.split == "train"), store.device.among(rows))

    def of(rows: np.ndarray, logits: np.ndarray) -> Evaluation:
        return evaluate(
            logits, store.scene[rows], store.device[rows], store.labels, unseen=groups["unseen"], real=groups["real"]
        )

    by_second = of(rows, logits)
    if store.recording is None:
        return by_second
    values, first = of_recordings(logits, store.recording.codes[rows])
    return by_second.model_copy(update={"by_recording": of(rows[first], values)})


def read_scores(folder: Path) -> Scores:
    return Scores.model_validate_json(stored_file(folder, EVALUATION).read_text())


def read_evaluation(folder: Path) -> Evaluation:
    return Evaluation.model_validate_json(stored_file(folder, EVALUATION).read_text())


def read_answers(folders: Iterable[Path], ids: np.ndarray) -> np.ndarray:
    """Return the logits (S, N, K) of S scored students on the clips `ids` of the test split."""
    return Ensemble([read_logits([stored_file(folder, ANSWERS)]) for folder in folders], ids).read()


def headline(e: Evaluation | None) -> dict[str, float]:
    """Return the figures that are told first; of cut recordings also theirs, as `accuracy_by_recording` and so on."""
    if e is None:
        return {}
    own = {"accuracy": e.accuracy, "log_loss": e.log_loss, "calibration_error": e.calibration_error}
    return own | {f"{name}_by_recording": figure for name, figure in headline(e.by_recording).items()}
