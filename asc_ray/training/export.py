"""The bundle: what a device, `asc_ray.runtime` and a registry take of a finished int8 student."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from asc_ray.artifacts import file_sha256, stored_file, write_atomically
from asc_ray.audio.frontend import FrontendConfig, LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.data.decode import CLIP_SAMPLES
from asc_ray.errors import UserError
from asc_ray.runtime import CHECKSUMS, FRONTEND, LABELS, MODEL, PRODUCER, Bundle
from asc_ray.runtime.frontend import Frontend
from asc_ray.training import quantization
from asc_ray.training.loop import predict
from asc_ray.training.systems import INT8_MODEL, ONNX_MODEL, load_int8

CARD = "card.md"
LEAST_AGREEMENT = 0.995  # share of the clips that both forms of the model name alike
_BATCH = 64


def write_bundle(folder: Path, int8: Path, labels: Sequence[str], config: FrontendConfig) -> None:
    """Models, front end and labels of the finished int8 training in `int8`, and checksums, into an empty folder."""
    settings = config.model_dump(exclude={"fmax_jitter"})  # of the training alone
    about = {FRONTEND: asdict(Frontend(samples=CLIP_SAMPLES, **settings)), LABELS: list(labels)}
    for file, value in about.items():
        write_atomically(folder / file, json.dumps(value, indent=1) + "\n")
    shutil.copyfile(stored_file(int8, INT8_MODEL), folder / INT8_MODEL)
    model = onnx.load(stored_file(int8, ONNX_MODEL))
    onnx.helper.set_model_props(
        model, {"producer": PRODUCER, **{file: json.dumps(value) for file, value in about.items()}}
    )
    write_atomically(folder / MODEL, model.SerializeToString())
    seal(folder)


def seal(folder: Path) -> None:
    """Write the checksums, in the form of `sha256sum --check`."""
    files = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)
    write_atomically(folder / CHECKSUMS, "".join(f"{file_sha256(folder / name)}  {name}\n" for name in files))


def compare(folder: Path, store: ClipStore, rows: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """The bundle's logits (N, K) for the store's clips `rows`, and how torch's with the same clips differ.

    Raises UserError where they name more than one clip, and more than 0.5 % of the clips, differently.
    """
    bundle = Bundle(folder)
    logits = np.concatenate(
        [bundle.logits(store.pcm(rows[start : start + _BATCH])) for start in range(0, len(rows), _BATCH)]
    )
    front_end = LogMel(_config(bundle.frontend))
    other = predict(quantization.load(folder / INT8_MODEL), front_end, store, rows, torch.device("cpu")).numpy()
    differ = int((logits.argmax(1) != other.argmax(1)).sum())
    if differ > max(1, (1 - LEAST_AGREEMENT) * len(rows)):
        raise UserError(
            f"{folder}: onnxruntime and torch name {differ} of {len(rows)} clips differently; allowed are 0.5 %. "
            "Train the int8 form again, or report this with the bundle"
        )
    return logits, {"clips": len(rows), "differ": differ, "largest_difference": float(abs(logits - other).max())}


def verify_bundle(folder: Path) -> dict[str, Any]:
    """Check files, checksums, that they belong together, and that both models compute the same from noise.

    Raises UserError naming what is wrong; returns what was found.
    """
    bundle = Bundle(folder)
    listed = {line.split("  ", 1)[1] for line in (folder / CHECKSUMS).read_text().splitlines()}
    found = {file.name for file in folder.iterdir()} - {CHECKSUMS}
    if found != listed or not {INT8_MODEL, CARD} <= found:
        missing, added = sorted({INT8_MODEL, CARD} - found), sorted(found - listed)
        what = [*(f"{name}: missing" for name in missing), *(f"{name}: not in {CHECKSUMS}" for name in added)]
        raise UserError(f"{folder}: {'; '.join(what)}. Export the bundle again, or take away what is not its own")
    model = quantization.load(folder / INT8_MODEL)
    noise = 0.1 * np.random.default_rng(0).standard_normal((8, bundle.frontend.samples), dtype=np.float32)
    logits = bundle.logits(noise)
    other = _logits(model, noise, bundle.frontend)
    if other.shape != logits.shape:
        raise UserError(f"{folder}: {INT8_MODEL} gives {other.shape[1]} labels, {LABELS} has {len(bundle.labels)}")
    # Roundings in another order move a value by a step of its grid, another network's logits by their own size.
    if abs(other - logits).mean() > 0.1 * logits.std():
        raise UserError(
            f"{folder}: {INT8_MODEL} and {MODEL} compute differently (noise: logits differ by "
            f"{abs(other - logits).mean():.3f} on average); export the bundle again"
        )
    return {
        "labels": len(bundle.labels),
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "largest_difference": float(abs(other - logits).max()),
    }


def _logits(model: nn.Module, waves: np.ndarray, frontend: Frontend) -> np.ndarray:
    mel = LogMel(_config(frontend))(torch.from_numpy(waves))
    try:
        return model(mel).detach().numpy()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"{INT8_MODEL} does not take mels of shape {tuple(mel.shape[1:])} ({str(error).splitlines()[0]}); "
            "export the bundle again"
        ) from None


def _config(frontend: Frontend) -> FrontendConfig:
    return FrontendConfig(**{name: value for name, value in asdict(frontend).items() if name != "samples"})


def operator_counts(int8: Path) -> list[tuple[str, str, int]]:
    """(operator, dtype, how many) of all that the int8 model in `int8` computes, in the order of their first."""
    counts: dict[tuple[str, str], int] = {}
    for _, operator, dtype in quantization.operators(load_int8(int8)):
        counts[operator, dtype] = counts.get((operator, dtype), 0) + 1
    return [(operator, dtype, count) for (operator, dtype), count in counts.items()]
