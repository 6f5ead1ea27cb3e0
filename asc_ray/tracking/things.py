"""What runs are about, in MLflow's terms; it does not import mlflow."""

import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asc_ray.evaluation.scores import Evaluation
from asc_ray.section import Section
from asc_ray.shown import masked
from asc_ray.tracking.config import database_of
from asc_ray.training.folder import Metrics

Value = str | int | float | bool
# What a sqlite store's errors ask for, by words in their messages.
_MOVE_AWAY = "; where nothing else uses the file now, move it away: the next run begins another"
_REMEDIES = {
    "malformed": _MOVE_AWAY,
    "not a database": _MOVE_AWAY,
    "locked": "; end the program that holds the file, such as `mlflow ui`",
    "readonly": "; make the file and its folder writable",
    "unable to open": "; make the file and its folder readable and writable",
    "disk is full": "; make room there",
}
# Tags of runs.
RUN_TAG, KEY_TAG, KIND_TAG, STORAGE_TAG, ERROR_TAG = (
    f"asc_ray.{name}" for name in ("run", "key", "kind", "storage", "error")
)


@dataclass(frozen=True)
class Thing:
    """What one run is about: a pipeline, a teacher, a trial, the fusion, a student, an int8 form, a table.

    A storage has one run of a thing with this name and key; `below` is the key of the parent that it belongs to alone.
    """

    name: str
    key: str
    kind: str
    parameters: Mapping[str, Value] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    corpus: Mapping[str, str] | None = None  # the fields of an MLflow dataset
    below: str = ""

    @property
    def run(self) -> str:
        """The name of the run that stays the same in every command."""
        return f"{self.below}/{self.name}-{self.key}" if self.below else f"{self.name}-{self.key}"


def parameters(section: Section, prefix: str = "") -> dict[str, Value]:
    """Return a section's values by dotted name, without those that are null, and without logins.

    A parameter is a number or a word in all runs: where a field takes both, a word is the parameter NAME.word.
    """
    return dict(_parameters(section, prefix))


def _parameters(section: Section, prefix: str) -> Iterator[tuple[str, Value]]:
    for name, about in type(section).model_fields.items():
        value, own = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            yield from _parameters(value, f"{own}.")
        elif isinstance(value, int | float):
            yield own, value
        elif value is not None:
            word = masked(value if isinstance(value, str | Path) else json.dumps(value, default=str))
            yield f"{own}.word" if _takes_number(about.annotation) else own, word


def _takes_number(annotation: Any) -> bool:
    if inner := typing.get_args(annotation):
        literal = typing.get_origin(annotation) is typing.Literal
        return not literal and any(part in (int, float) or (_is_union(part) and _takes_number(part)) for part in inner)
    return annotation in (int, float)


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, type(int | str), typing.Annotated)


def curve(epoch: Metrics) -> dict[str, float]:
    """Return an epoch's metrics under the names that all trainings have: `train/loss`, `validation/accuracy`, ..."""
    named = {}
    for name, value in epoch.items():
        part, _, rest = name.partition("_")
        if name == "objective":  # of a search
            named[name] = value
        elif name not in ("epoch", "epochs", "minutes_left") and isinstance(value, int | float):
            named[f"{part}/{rest}" if part in ("train", "validation") else f"train/{name}"] = value
    return named


def curves(history: Sequence[Metrics]) -> list[tuple[int, dict[str, float]]]:
    return [(int(epoch["epoch"]), curve(epoch)) for epoch in history]


def figures(scores: Evaluation, part: str = "test") -> dict[str, float]:
    """Return an evaluation under the names that every scored thing has."""
    named = {
        "accuracy": scores.accuracy,
        "macro_accuracy": scores.macro_accuracy,
        "log_loss": scores.log_loss,
        "calibration_error": scores.calibration_error,
        **{str(group): share for group, share in scores.groups.items()},
        **{f"device/{name}": own.accuracy for name, own in scores.per_device.items()},
        **{f"scene/{name}": recall for name, recall in scores.per_scene.items()},
    }
    own = {f"{part}/{name}": value for name, value in named.items()}
    return own | (figures(scores.by_recording, f"{part}/by_recording") if scores.by_recording else {})


def first_line(error: BaseException, uri: str) -> str:
    """Return the first line of an error's message, without the logins of the URI; for sqlite with what to do."""
    lines = [line for line in str(error).splitlines() if not line.startswith("(raised as a result of")]  # SQLAlchemy's
    line = masked(next(iter(lines), type(error).__name__), uri)
    if database_of(uri) is None:
        return line
    remedy = next((do for words, do in _REMEDIES.items() if words in line), "")
    return re.sub(r"^\(sqlite3\.\w+\) ", "", line) + remedy
