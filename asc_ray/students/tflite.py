"""The float32 student as a TensorFlow Lite file, for phones and Edge Impulse; needs the extra `tflite`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from asc_ray.audio.config import FrontendConfig
from asc_ray.audio.frontend import LogMel
from asc_ray.data.batches import waveform
from asc_ray.data.clips import ClipStore
from asc_ray.errors import UserError
from asc_ray.models.registry import folded
from asc_ray.runtime.agreement import differing

TFLITE = "model.tflite"
_PACKAGES = ("litert_torch", "ai_edge_litert")
_BATCH = 64


@dataclass(frozen=True)
class TFLiteForm:
    """A file of `bytes` that was compared with torch on `clips`, of which `differ` got another scene."""

    bytes: int
    clips: int
    differ: int
    largest_difference: float


def check_tflite() -> None:
    """Raise UserError where the extra is not installed."""
    if gone := [name.replace("_", "-") for name in _PACKAGES if find_spec(name) is None]:
        raise UserError(
            f"--target tflite needs {' and '.join(gone)}, not installed here: pip install 'asc-ray[tflite]', which "
            "takes pydantic and typing-extensions back to older versions"
        )


def write_tflite(
    model: nn.Module, frontend: FrontendConfig, shape: Sequence[int], store: ClipStore, rows: np.ndarray, out: Path
) -> TFLiteForm:
    """Write the network as the file `out`, and compare it with torch on the store's clips `rows`.

    shape: of an input, (1, 1, mel bins, frames). Raises UserError as `differing` does.
    """
    import litert_torch
    from ai_edge_litert.interpreter import Interpreter

    model = folded(model)
    litert_torch.convert(model, (torch.zeros(*shape),)).export(str(out))
    interpreter = Interpreter(str(out))
    interpreter.allocate_tensors()
    (input,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
    log_mel = LogMel(frontend)
    own, other = [], []
    with torch.inference_mode():
        for start in range(0, len(rows), _BATCH):
            pcm = torch.from_numpy(store.pcm(rows[start : start + _BATCH]))
            mels = log_mel(waveform(pcm))[:, None]
            other.append(model(mels).numpy())
            for mel in mels.numpy():
                interpreter.set_tensor(input["index"], mel[None])
                interpreter.invoke()
                own.append(interpreter.get_tensor(output["index"]))
    logits, expected = np.concatenate(own), np.concatenate(other)
    differ = differing(
        logits, expected, f"{out}: LiteRT's interpreter and torch", "Export without --target tflite, or report this"
    )
    return TFLiteForm(out.stat().st_size, len(rows), differ, float(abs(logits - expected).max()))
