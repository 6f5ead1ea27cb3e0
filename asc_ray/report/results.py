"""A storage's contents as a table for notebooks: one row a finished artifact, with its scores."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from asc_ray.artifacts import MANIFEST, Artifact, artifacts_in
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import read_evaluation, read_scores
from asc_ray.places import is_uri, named, opened

COLUMNS = {
    "stage": "str",
    "name": "str",
    "key": "str",
    "model": "str",  # the key of the evaluated model
    "path": "str",
    "finished": "datetime64[ns, UTC]",
    "parameters": "Int64",
    "macs": "Int64",
    "bytes": "Int64",
    "accuracy": "float64",
    "seen": "float64",
    "unseen": "float64",
    "log_loss": "float64",
    "accuracy_by_recording": "float64",
    "log_loss_by_recording": "float64",
    "problem": "str",
}


def results(storage: str | Path) -> pd.DataFrame:
    """Return a row for each finished artifact of `storage`, the earliest first.

    `finished` is when its manifest was written; `parameters` and `macs` (of one clip) are a network's, `bytes` those of
    its weights as int8. The rows of the stage `evaluation` have scores on the test split: `accuracy`, those on `seen`
    and `unseen` devices (shares in [0, 1]), and `log_loss` (nats a clip). Where clips are seconds of longer recordings,
    `accuracy_by_recording` and `log_loss_by_recording` are those of the recordings. Their `model` is the `key` of the
    student or int8 model that they judge; the row `ensemble` judges the fusion.

    An artifact that is damaged, or that this version cannot read, has its row, too: `problem` says what is wrong, and
    is empty otherwise. Only manifests and evaluations are read; `asc-ray verify` compares the other files.
    Raises UserError where `storage`, a path or a URI, is not there.
    """
    known, storage = is_uri(storage), opened(storage)
    if not known and not storage.is_dir():
        raise UserError(f"{storage}: no such folder; give the `storage` of a configuration")
    rows = [_row(artifact) for artifact in artifacts_in(storage)]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return table.sort_values(["finished", "path"], ignore_index=True)


def _row(artifact: Artifact) -> dict[str, Any]:
    folder = artifact.path
    row: dict[str, Any] = {"stage": artifact.stage, "name": artifact.name, "key": artifact.key, "path": named(folder)}
    row |= {"model": "", "problem": ""}
    try:
        manifest = artifact.manifest()
        row["finished"] = pd.Timestamp((folder / MANIFEST).stat().st_mtime, unit="s", tz="UTC")
        if artifact.stage == "evaluation":
            row |= _scores(folder, manifest["inputs"])
        elif artifact.stage in ("teachers", "students", "int8"):
            facts = manifest["facts"]
            row |= {"parameters": facts.get("parameters"), "macs": facts.get("macs")}
            row["bytes"] = facts.get("bytes", {}).get("int8")
    except UserError as error:
        row["problem"] = str(error)
    except (ValidationError, KeyError):
        row["problem"] = f"{folder}: not as this version of asc-ray writes it; delete the folder or leave it alone"
    return row


def _scores(folder: Path, inputs: Mapping[str, str]) -> dict[str, Any]:
    fused = "fusion" in inputs
    scores = read_scores(folder).systems["fusion"] if fused else read_evaluation(folder)
    return {
        "model": inputs["fusion" if fused else "model"],
        "accuracy": scores.accuracy,
        "seen": scores.groups.get("seen"),
        "unseen": scores.groups.get("unseen"),
        "log_loss": scores.log_loss,
        "accuracy_by_recording": scores.by_recording and scores.by_recording.accuracy,
        "log_loss_by_recording": scores.by_recording and scores.by_recording.log_loss,
    }
