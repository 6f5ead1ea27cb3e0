"""What a device needs to name scenes with an exported bundle: NumPy and onnxruntime alone.

from asc_ray.runtime import Bundle

bundle = Bundle("bundle")
probabilities = bundle.probabilities(waves)  # (seconds, 32000) in +-1 -> (seconds, labels)
print(bundle.labels[probabilities.mean(axis=0).argmax()])
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from asc_ray.errors import UserError
from asc_ray.files import read_plain
from asc_ray.runtime.frontend import Frontend, LogMel
from asc_ray.runtime.onnx_file import MOST_BYTES, read_model
from asc_ray.runtime.protobuf import NotOurs
from asc_ray.shown import printable

MODEL, FRONTEND, LABELS, CHECKSUMS = "model.onnx", "frontend.json", "labels.json", "SHA256SUMS"
C_FORM = "c"  # a folder in a bundle, for microcontrollers; `asc_ray.embedded` writes and checks it
NEEDED = (MODEL, FRONTEND, LABELS)
EXAMPLE = Path(__file__).parent / "example"  # a bundle that the package brings
PRODUCER = "asc-ray"  # in the ONNX file's metadata, beside the same labels and front end as in the JSON files
_MOST_TEXT = 1 << 20  # bytes of a list of checksums, a front end or a list of labels
_MOST_OTHER = 1 << 24  # of a file that is only compared, such as the card
_MOST_FILES = 32
_MOST_LABELS, _LONGEST_LABEL = 1000, 200
_SUM = re.compile(r"([0-9a-f]{64})  ([^/\\]{1,200})")

# Floating-point samples beyond it have another scale, as 16-bit values do; 32-bit recorders go some dB above 1.
LOUDEST = 8.0


class Bundle:
    """An exported model. Every file is compared with its checksum, and the files with each other.

    `threads`: onnxruntime's; 1 suits an embedded core. Raises UserError for a bundle that is not as it was exported.
    """

    def __init__(self, folder: str | Path, threads: int = 1) -> None:
        folder = Path(folder)
        content = _read(folder)
        self.files = {name: len(own) for name, own in sorted(content.items())}  # bytes of each file in SHA256SUMS
        self.labels: tuple[str, ...] = _labels(folder / LABELS, content[LABELS])
        self.frontend = _frontend(folder / FRONTEND, content[FRONTEND])
        self._check(folder, content)
        import onnxruntime  # here, because training takes its mel bank from this package and needs no engine

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # it logs nothing, because it raises what it cannot read
        try:
            self._session = onnxruntime.InferenceSession(content[MODEL], options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has a class for each of its kinds, all below Exception
            raise UserError(f"{folder / MODEL}: onnxruntime cannot read it ({printable(str(error).strip())})") from None
        self._log_mel = LogMel(self.frontend)

    def logits(self, waves: np.ndarray) -> np.ndarray:
        """Map (N, samples) float in +-1, or int16, at `frontend.sample_rate` to logits (N, labels) float32.

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
        try:
            logits = self._session.run(["logits"], {"mel": self._log_mel(waves)})[0]
        except Exception as error:
            raise UserError(f"{MODEL}: onnxruntime cannot run it ({printable(str(error).strip())})") from None
        if logits.shape != (len(waves), len(self.labels)):
            raise UserError(f"{MODEL}: gives {logits.shape} for {len(waves)} waves and {len(self.labels)} labels")
        if broken := int((~np.isfinite(logits).all(axis=1)).sum()):
            raise UserError(f"{MODEL}: its logits of {broken} of {len(logits)} waves are not finite; export it again")
        return logits

    def probabilities(self, waves: np.ndarray) -> np.ndarray:
        """Return the softmax of `logits`: (N, labels) float32."""
        logits = self.logits(waves)
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def _check(self, folder: Path, content: Mapping[str, bytes]) -> None:
        """Raise UserError unless the model is one of ours, and it, front end and labels belong together."""
        try:
            model = read_model(content[MODEL])
        except NotOurs as error:
            raise UserError(
                f"{folder / MODEL}: holds {printable(error)}, which `asc-ray export` does not write; export it again"
            ) from None
        if model.metadata.get("producer") != PRODUCER:
            raise UserError(f"{folder / MODEL}: not a model of `asc-ray export`; export it again")
        if model.input != ("mel", made := (1, self.frontend.mels, self.frontend.frames)):
            raise UserError(
                f"{folder}: {MODEL} takes {_named(model.input)}, but {FRONTEND} makes mel {made}; export the bundle "
                "again"
            )
        if model.output != ("logits", (len(self.labels),)):
            raise UserError(
                f"{folder}: {MODEL} gives {_named(model.output)}, but {LABELS} has {len(self.labels)} labels; export "
                "the bundle again"
            )
        for file in (FRONTEND, LABELS):
            if _json(folder / MODEL, model.metadata.get(file, "null")) != _json(folder / file, content[file]):
                raise UserError(f"{folder}: {file} is not what {MODEL} was exported with; export the bundle again")


def is_bundle(folder: Path) -> bool:
    """Whether the folder is meant as a bundle: it has one of its files, sound or not."""
    return any((folder / name).exists() for name in (CHECKSUMS, *NEEDED))


def verify(folder: Path) -> dict[str, Any]:
    """Open a bundle, look for files that its checksums do not name, and run the model on noise.

    Return the number of labels and the files' sizes. Raises UserError naming what is wrong.
    """
    bundle = Bundle(folder)
    if added := sorted({file.name for file in folder.iterdir()} - {CHECKSUMS, C_FORM, *bundle.files}):
        names = ", ".join(map(printable, added[:5]))
        raise UserError(f"{folder}: not in {CHECKSUMS}: {names}. Take away what is not the bundle's own")
    noise = 0.1 * np.random.default_rng(0).standard_normal((2, bundle.frontend.samples), dtype=np.float32)
    bundle.logits(noise)
    return {"labels": len(bundle.labels), "files": bundle.files}


def scale_fault(samples: np.ndarray) -> str:
    """Return why floating-point samples cannot be sound within about +-1; empty where they can."""
    peak = float(max(samples.max(initial=0.0), -samples.min(initial=0.0)))
    if not np.isfinite(peak):
        return f"{int((~np.isfinite(samples)).sum())} samples are not finite"
    if peak > LOUDEST or (peak >= 2 and not (samples % 1).any()):
        return f"samples up to {peak:g}: floating-point sound is expected within +-1; divide 16-bit values by 32768"
    return ""


def _read(folder: Path) -> dict[str, bytes]:
    """Read the bundle's files, each once, and compare their checksums. Raises UserError, with all that is wrong."""
    try:
        lines = read_plain(folder / CHECKSUMS, _MOST_TEXT, follow=False).decode().splitlines()
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError)
        reason = "" if gone else f" that can be read ({error.strerror})"
        raise UserError(f"{folder}: no {CHECKSUMS}{reason}, so this is no bundle of `asc-ray export`") from None
    except ValueError:
        lines = [""]
    sums = [_SUM.fullmatch(line) for line in lines]
    expected = {name: digest for digest, name in (found.groups() for found in sums if found)}
    odd = [name for name in expected if not name.isprintable() or name in (".", "..", CHECKSUMS)]
    if not all(sums) or odd or len(expected) < len(sums) or len(sums) > _MOST_FILES:
        raise UserError(
            f"{folder / CHECKSUMS}: not a list of checksums of up to {_MOST_FILES} files of this folder, as sha256sum "
            "writes it; export the bundle again"
        )
    damaged = [f"{name}: not in {CHECKSUMS}" for name in NEEDED if name not in expected]
    content = {}
    for name, digest in expected.items():
        try:
            content[name] = read_plain(folder / name, MOST_BYTES if name == MODEL else _MOST_OTHER, follow=False)
        except FileNotFoundError:
            damaged.append(f"{name}: missing")
        except OSError as error:
            damaged.append(f"{name}: {error.strerror}")
        else:
            if hashlib.sha256(content[name]).hexdigest() != digest:
                damaged.append(f"{name}: checksum differs")
    if damaged:
        raise UserError(f"{folder}: {'; '.join(damaged)}. Export the bundle again, or copy it again")
    return content


def _json(file: Path, content: bytes | str) -> Any:
    """Parse JSON. Raises UserError for what is none, and for a key that occurs twice, because readers would differ."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return found

    try:
        return json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({printable(error)}); export the bundle again") from None


def _labels(file: Path, content: bytes) -> tuple[str, ...]:
    found = _json(file, content)
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise UserError(f"{file}: a list of scenes is expected; export the bundle again")
    odd = [label for label in found if not fit_label(label)]
    if odd or not 0 < len(found) <= _MOST_LABELS or len(set(found)) < len(found):
        what = repr(odd[0][:_LONGEST_LABEL]) if odd else f"{len(found)} labels, {len(set(found))} different"
        raise UserError(
            f"{file}: {what}; allowed are up to {_MOST_LABELS} different labels of 1 to {_LONGEST_LABEL} printable "
            "characters, without blanks around them. Export the bundle again"
        )
    return tuple(found)


def fit_label(label: str) -> bool:
    """Whether a name of a scene can be shown: not empty, no longer than a line, no control characters."""
    return 0 < len(label) <= _LONGEST_LABEL and label.isprintable() and label == label.strip()


def _frontend(file: Path, content: bytes) -> Frontend:
    found, expected = _json(file, content), {field.name for field in fields(Frontend)}
    if not isinstance(found, dict) or found.keys() != expected:
        keys = printable(", ".join(sorted(found))[:_LONGEST_LABEL]) if isinstance(found, dict) else "none"
        raise UserError(f"{file}: keys {keys}; expected {', '.join(sorted(expected))}; export the bundle again")
    try:
        frontend = Frontend(**found)
        if not 1000 <= frontend.sample_rate <= 1_000_000 or frontend.samples < frontend.sample_rate / 10:
            raise ValueError(
                f"{frontend.samples} samples at {frontend.sample_rate} Hz; allowed are 1 kHz to 1 MHz, and a "
                "tenth of a second at least"
            )
        return frontend
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {printable(error)}; export the bundle again") from None


def _named(value: tuple[str, tuple[int, ...]]) -> str:
    return f"{printable(value[0])} {value[1]}"
