"""The bundle: what a device, `asc_ray.runtime` and a registry need of a finished int8 student."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from asc_ray.artifacts import file_sha256, stored_file
from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import CLIP_SAMPLES, ClipStore
from asc_ray.files import write_atomically
from asc_ray.int8.config import ONNX_MODEL
from asc_ray.int8.conversion import operators
from asc_ray.runtime import CHECKSUMS, FRONTEND, LABELS, MODEL, PRODUCER, Bundle
from asc_ray.runtime.agreement import differing
from asc_ray.runtime.frontend import Frontend
from asc_ray.training.validation import predict

CARD = "card.md"
_BATCH = 64


def write_bundle(folder: Path, int8: Path, labels: Sequence[str], config: FrontendConfig) -> None:
    """Write model, front end and labels of the finished int8 training in `int8`, and checksums, to an empty folder."""
    about = {FRONTEND: asdict(frontend_of(config)), LABELS: list(labels)}
    for file, value in about.items():
        write_atomically(folder / file, json.dumps(value, indent=1) + "\n")
    model = onnx.load(stored_file(int8, ONNX_MODEL))
    onnx.helper.set_model_props(
        model, {"producer": PRODUCER, **{file: json.dumps(value) for file, value in about.items()}}
    )
    write_atomically(folder / MODEL, model.SerializeToString())
    seal(folder)


def frontend_of(config: FrontendConfig) -> Frontend:
    """Return the front end of a bundle: without what only training uses."""
    return Frontend(samples=CLIP_SAMPLES, **config.model_dump(exclude={"fmax_jitter"}))


def seal(folder: Path) -> None:
    """Write the checksums of the folder's own files, in the form of `sha256sum --check`."""
    files = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS and path.is_file())
    write_atomically(folder / CHECKSUMS, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files))


def compare(folder: Path, int8: nn.Module, store: ClipStore, rows: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Return the bundle's logits (N, K) for the store's clips `rows`, and how those of `int8`, in torch, differ.

    Raises UserError as `differing` does.
    """
    bundle = Bundle(folder)
    logits = np.concatenate(
        [bundle.logits(store.pcm(rows[start : start + _BATCH])) for start in range(0, len(rows), _BATCH)]
    )
    other = predict(int8, LogMel(_config(bundle.frontend)), store, rows, torch.device("cpu")).numpy()
    differ = differing(
        logits, other, f"{folder}: onnxruntime and torch", "Train the int8 form again, or report this with the bundle"
    )
    return logits, {"clips": len(rows), "differ": differ, "largest_difference": float(abs(logits - other).max())}


def _config(frontend: Frontend) -> FrontendConfig:
    return FrontendConfig(**{name: value for name, value in asdict(frontend).items() if name != "samples"})


def operator_counts(int8: nn.Module) -> list[tuple[str, str, int]]:
    """Return (operator, dtype, count) of all that the int8 model computes, in the order of first occurrence."""
    counts: dict[tuple[str, str], int] = {}
    for _, operator, dtype in operators(int8):
        counts[operator, dtype] = counts.get((operator, dtype), 0) + 1
    return [(operator, dtype, count) for (operator, dtype), count in counts.items()]
