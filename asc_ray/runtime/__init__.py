"""What a device needs: waveforms to scenes with an exported bundle, by NumPy and onnxruntime alone.

from asc_ray.runtime import Bundle

bundle = Bundle("bundle")
probabilities = bundle.probabilities(waves)  # (seconds, 32000) in +-1 -> (seconds, labels)
print(bundle.labels[probabilities.mean(axis=0).argmax()])
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from asc_ray.errors import UserError
from asc_ray.runtime.frontend import Frontend, LogMel

MODEL, FRONTEND, LABELS, CHECKSUMS = "model.onnx", "frontend.json", "labels.json", "SHA256SUMS"
PRODUCER = "asc-ray"  # in the ONNX file's metadata, beside the same labels and front end as in the JSON files


# Floating-point samples beyond it are of another scale, as 16-bit values are; 32-bit recorders go some dB above 1.
LOUDEST = 8.0


class Bundle:
    """An exported model. Every file is compared with its checksum, and the files with each other.

    `threads`: of onnxruntime; on an embedded core, 1. Raises UserError for a bundle that is not as it was exported.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        folder = Path(folder)
        if damaged := damaged_files(folder):
            raise UserError(f"{folder}: {'; '.join(damaged)}. Export the bundle again, or copy it again")
        self.labels: tuple[str, ...] = tuple(_json(folder / LABELS, list))
        self.frontend = _frontend(folder / FRONTEND)
        import onnxruntime  # training takes its mel bank from this package, and needs no engine

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            model = (folder / MODEL).read_bytes()
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each of its kinds, all below Exception
            raise UserError(f"{folder / MODEL}: onnxruntime cannot read it ({str(error).strip()})") from None
        self._check(folder)
        self._log_mel = LogMel(self.frontend)

    def logits(self, waves: np.ndarray) -> np.ndarray:
        """(N, samples) float in +-1, or int16, at `frontend.sample_rate` -> (N, labels) float32.

        Raises UserError for another type or shape, for no wave, for samples that are not finite or of another scale,
        and where the model gives logits that are not finite.
        """
        waves = np.asarray(waves)
        if waves.dtype != np.int16 and waves.dtype.kind != "f":
            raise UserError(f"waves of type {waves.dtype}: expected int16, or floating point in +-1")
        if waves.dtype != np.int16 and (fault := scale_fault(waves)):
            raise UserError(f"waves: {fault}")
        waves = waves / np.float32(32768) if waves.dtype == np.int16 else waves.astype(np.float32, copy=False)
        if waves.ndim != 2 or not len(waves) or waves.shape[1] != self.frontend.samples:
            raise UserError(
                f"waves of shape {waves.shape}: expected (N, {self.frontend.samples}), one row a clip, at "
                f"{self.frontend.sample_rate} Hz"
            )
        logits = self._session.run(["logits"], {"mel": self._log_mel(waves)})[0]
        if broken := int((~np.isfinite(logits).all(axis=1)).sum()):
            raise UserError(f"{MODEL}: its logits of {broken} of {len(logits)} waves are not finite; export it again")
        return logits

    def probabilities(self, waves: np.ndarray) -> np.ndarray:
        """As `logits`, with their softmax: (N, labels) float32."""
        logits = self.logits(waves)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def _check(self, folder: Path) -> None:
        """That model, front end and labels belong together."""
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("producer") != PRODUCER:
            raise UserError(f"{folder / MODEL}: not a model of `asc-ray export`; export it again")
        taken, given = (
            {value.name: value.shape[1:] for value in values}
            for values in (self._session.get_inputs(), self._session.get_outputs())
        )
        made = [1, self.frontend.mels, self.frontend.frames]
        if taken != {"mel": made}:
            raise UserError(
                f"{folder}: {MODEL} takes {taken}, but {FRONTEND} makes mel: {made}; export the bundle again"
            )
        if given != {"logits": [len(self.labels)]}:
            raise UserError(
                f"{folder}: {MODEL} gives {given}, but {LABELS} has {len(self.labels)} labels; export the bundle again"
            )
        for file in (FRONTEND, LABELS):
            if json.loads(metadata.get(file, "null")) != json.loads((folder / file).read_text()):
                raise UserError(f"{folder}: {file} is not what {MODEL} was exported with; export the bundle again")


def scale_fault(samples: np.ndarray) -> str:
    """Why floating-point samples are no sound within about +-1; empty where they may be."""
    peak = float(max(samples.max(initial=0.0), -samples.min(initial=0.0)))
    if not np.isfinite(peak):
        return f"{int((~np.isfinite(samples)).sum())} samples are not finite"
    if peak > LOUDEST or (peak >= 2 and not (samples % 1).any()):
        return f"samples up to {peak:g}: floating-point sound is expected within +-1; divide 16-bit values by 32768"
    return ""


def damaged_files(folder: Path) -> list[str]:
    """Files of a bundle that are missing or differ from SHA256SUMS. Raises UserError where there is no such list."""
    try:
        lines = (folder / CHECKSUMS).read_text().splitlines()
        expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except OSError:
        raise UserError(f"{folder}: no {CHECKSUMS}, so this is no bundle of `asc-ray export`") from None
    except ValueError:
        raise UserError(f"{folder / CHECKSUMS}: not a list of checksums; export the bundle again") from None
    needed = {MODEL, FRONTEND, LABELS} - expected.keys()
    damaged = [f"{name}: not in {CHECKSUMS}" for name in sorted(needed)]
    for name, digest in expected.items():
        file = folder / name
        if not file.is_file():
            damaged.append(f"{name}: missing")
        elif hashlib.sha256(file.read_bytes()).hexdigest() != digest:
            damaged.append(f"{name}: checksum differs")
    return damaged


def _json(file: Path, kind: type) -> Any:
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); export the bundle again") from None
    if not isinstance(value, kind):
        raise UserError(f"{file}: {type(value).__name__} found, {kind.__name__} expected; export the bundle again")
    return value


def _frontend(file: Path) -> Frontend:
    found, expected = _json(file, dict), {field.name for field in fields(Frontend)}
    if found.keys() != expected:
        raise UserError(
            f"{file}: keys {', '.join(sorted(found))}; expected {', '.join(sorted(expected))}; export the bundle again"
        )
    try:
        return Frontend(**found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}; export the bundle again") from None
