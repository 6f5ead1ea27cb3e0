"""From finished systems to stored logits."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asc_ray.artifacts import read_manifest
from asc_ray.audio.frontends import front_end
from asc_ray.data.logits import write_logits
from asc_ray.data.pieces import note_piece
from asc_ray.ensemble.config import LogitsPrecision
from asc_ray.errors import UserError
from asc_ray.models.registry import folded
from asc_ray.places import ready
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.folder import WEIGHTS
from asc_ray.training.gpu import training_device
from asc_ray.training.validation import NotFinite, predict_all, refuse_not_finite
from asc_ray.training.weights import load_model


@dataclass(frozen=True)
class Inference:
    """One system's share of an inference: its weights, and the file that takes its logits.

    `teachers` is one artifact, or with cross-fitting one for every fold.
    """

    system: str
    teachers: tuple[Path, ...]
    recipe: Recipe
    file: Path
    metadata: Mapping[str, str]


def infer(
    systems: Sequence[Inference],
    source: Source,
    rows: np.ndarray,
    batch: int,
    precision: LogitsPrecision,
    gpus: float = 0.0,
) -> dict[str, dict[str, Any]]:
    """Write the logits of finished teachers for the store's clips `rows`, of any split.

    With cross-fitting a clip's logits are those of the teacher that did not see it. A clip that no teacher saw gets the
    mean of all folds' teachers. All systems share a front end, so the clips are read and transformed once. Batch norms
    are folded into the convolutions. Returns the record of each system's file, for `bf16` with the largest difference
    to fp32 in a first batch. Raises UserError for logits that are not finite.
    """
    store, fold = source.store(), np.full(len(rows), -1)
    if len(systems[0].teachers) > 1:
        for number, unseen in enumerate(source.open().folds):
            fold[np.isin(rows, unseen)] = number
    device = training_device(gpus)
    features = front_end(systems[0].recipe.frontend).to(device)
    models = [[folded(load_model(path, s.recipe, len(store.labels))) for path in s.teachers] for s in systems]
    for model in chain(*models):
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits = torch.empty(len(systems), len(rows), len(store.labels))
    differences = torch.zeros(len(systems))
    for number in np.unique(fold).tolist():
        here = np.flatnonzero(fold == number)
        asked = [own if number < 0 else own[number : number + 1] for own in models]

        def predicted(clips: np.ndarray, bf16: bool, asked: list[list[nn.Module]] = asked) -> torch.Tensor:
            each = predict_all(list(chain(*asked)), features, store, rows[clips], device, batch, bf16)
            return torch.stack([own.mean(dim=0) for own in each.split([len(own) for own in asked])])

        logits[:, here] = predicted(here, precision == "bf16")
        if precision == "bf16":
            first = here[:batch]
            worst = (predicted(first, False) - logits[:, first]).abs().amax(dim=(1, 2))
            differences = torch.maximum(differences, worst)
    records = {}
    for system, values, difference in zip(systems, logits, differences.tolist(), strict=True):
        try:
            refuse_not_finite(values, store, rows)
        except NotFinite as error:
            raise UserError(f"system {system.system}: {error}; look at its weights, or train it again") from None
        weights = [read_manifest(path)["files"][WEIGHTS]["sha256"] for path in system.teachers]
        metadata = {"labels": json.dumps(store.labels), "corpus": store.corpus, "checkpoint": " ".join(weights)}
        ready(system.file.parent)
        write_logits(system.file, store.ids[rows], values.numpy(), {**system.metadata, **metadata})
        facts = {"bf16_difference": difference} if precision == "bf16" else {}
        records[system.system] = note_piece(system.file, store.ids[rows], facts)
    return records
