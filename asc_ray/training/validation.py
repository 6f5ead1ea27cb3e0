"""A network's answers on stored clips, and its figures on the validation part."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.audio.frontends import FrontEnd, laid_out
from asc_ray.data.batches import Waves, eval_batches, waveform
from asc_ray.data.clips import ClipStore
from asc_ray.errors import UserError
from asc_ray.training.dataset import Dataset
from asc_ray.training.folder import Metrics
from asc_ray.training.gpu import on_gpu


class NotFinite(UserError):
    """A network answers with values that are infinite or not a number."""


def validate(model: nn.Module, front_end: FrontEnd, data: Dataset, device: torch.device) -> Metrics:
    """Return accuracy, macro accuracy (mean over scenes) and log loss on the validation part.

    With held-out devices, also the macro accuracy on their clips (`validation_unseen`) and on the others
    (`validation_seen`).
    """
    clips = data.parts["validation"]
    log_p = torch.log_softmax(predict(model, front_end, data.store, clips, device), dim=1)
    scene = torch.from_numpy(data.store.scene[clips])
    right = (log_p.argmax(1) == scene).double()

    def macro(some: Tensor) -> float:
        return float(np.mean([float(right[some & (scene == k)].mean()) for k in scene[some].unique().tolist()]))

    metrics = {
        "validation_accuracy": float(right.mean()),
        "validation_macro_accuracy": macro(torch.ones_like(scene, dtype=torch.bool)),
        "validation_log_loss": float(F.nll_loss(log_p, scene)),
    }
    if data.held_out_devices:
        held_out = torch.from_numpy(np.isin(data.store.device[clips], data.held_out_devices))
        metrics |= {"validation_seen": macro(~held_out), "validation_unseen": macro(held_out)}
    return metrics


def predict(
    model: nn.Module,
    front_end: FrontEnd,
    store: ClipStore,
    clips: np.ndarray,
    device: torch.device,
    batch_size: int = 64,
) -> Tensor:
    """Return logits (N, K) float32 on the host for the store's `clips`, not augmented.

    `model` must be in evaluation form. Raises NotFinite where a logit is infinite or not a number.
    """
    logits = predict_all([model], front_end, store, clips, device, batch_size)[0]
    refuse_not_finite(logits, store, clips)
    return logits


def refuse_not_finite(logits: Tensor, store: ClipStore, clips: np.ndarray) -> None:
    """Raise NotFinite with the ids of those of the store's `clips` (N,) whose logits (N, K) are not finite."""
    broken = ~logits.isfinite().all(dim=1).numpy()
    if broken.any():
        names = ", ".join(store.ids[clips[broken][:3]]) + (", ..." if broken.sum() > 3 else "")
        raise NotFinite(f"the logits of {broken.sum()} of {len(clips)} clips are not finite ({names})")


@torch.no_grad()
def predict_all(
    models: Sequence[nn.Module],
    front_end: FrontEnd,
    store: ClipStore,
    clips: np.ndarray,
    device: torch.device,
    batch_size: int = 64,
    bf16: bool = False,
) -> Tensor:
    """Return the logits (S, N, K) of several networks behind one front end, finite or not.

    `bf16` runs the networks in mixed precision.
    """
    outputs = []
    with on_gpu(device):
        for pcm in Waves(store, clips, device).batches(eval_batches(len(clips), batch_size)):
            mel = laid_out(front_end(waveform(pcm)[:, None]))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                outputs.append(torch.stack([model(mel).float() for model in models]))
        return torch.cat(outputs, dim=1).cpu()
