"""The one training loop: teachers, students, search trials and quantization-aware training run through it."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from asc_ray.audio.augment import Augment, AugmentConfig, check_masks
from asc_ray.audio.frontend import FrontendConfig, LogMel
from asc_ray.data.batches import epoch_batches, eval_batches, step_generator, waves
from asc_ray.data.clips import ClipStore
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.passt import PasstConfig
from asc_ray.models.registry import ModelConfig
from asc_ray.section import Section
from asc_ray.training.checkpoints import load_checkpoint, restore_optimizer, save_checkpoint
from asc_ray.training.dataset import Dataset
from asc_ray.training.distillation import DistillationConfig, objective
from asc_ray.training.schedules import ScheduleConfig, learning_rate_factor

Metrics = dict[str, float]
OnEpoch = Callable[[Metrics], None]


class OptimizerConfig(Section):
    """AdamW over the whole network, one learning-rate schedule, lengths in epochs."""

    epochs: int = Field(30, ge=1)
    batch_size: int = Field(64, ge=2)
    learning_rate: float = Field(1e-3, gt=0.0, le=1.0)
    weight_decay: float = Field(1e-3, ge=0.0, le=1.0)
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: float = Field(5.0, gt=0.0, description="largest norm of the gradient over all weights")

    def scaled_to(self, epochs: int) -> "OptimizerConfig":
        """The same recipe compressed or stretched to `epochs`, its schedule with it."""
        ratio = epochs / self.epochs
        schedule = ScheduleConfig(
            warm_up=round(self.schedule.warm_up * ratio),
            ramp_down_start=round(self.schedule.ramp_down_start * ratio),
            ramp_down_length=max(1, round(self.schedule.ramp_down_length * ratio)),
            last_factor=self.schedule.last_factor,
        )
        return self.model_copy(update={"epochs": epochs, "schedule": schedule})


class Recipe(Section):
    """All that defines one training but its data."""

    model: ModelConfig = Field(discriminator="name")
    frontend: FrontendConfig = FrontendConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        try:
            check_masks(self.augment, self.frontend)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if isinstance(self.model, PasstConfig):
            mels, frames = self.frontend.mels, self.frontend.frames(self.frontend.sample_rate)
            if self.model.mels != mels or self.model.frames < frames:
                raise ValueError(
                    f"frontend makes {mels} mels x {frames} frames of a clip, model takes {self.model.mels} x at most "
                    f"{self.model.frames}; change frontend.mels, frontend.hop, model.mels or model.frames"
                )
        return self


class Diverged(UserError):
    """The loss became infinite or not a number."""


def training_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    model: nn.Module,
    recipe: Recipe,
    data: Dataset,
    train: np.ndarray,
    folder: Path,
    *,
    distillation: DistillationConfig | None = None,
    soft_logits: np.ndarray | None = None,
    on_epoch: OnEpoch = lambda metrics: None,
    set_training: Callable[[nn.Module, bool], object] = nn.Module.train,
    before_epoch: Callable[[nn.Module, int], None] = lambda model, epoch: None,
    mixed_precision: bool = True,
) -> list[Metrics]:
    """Train `model` in place on the store's clips `train`; returns the metrics of every epoch.

    `folder` takes a checkpoint an epoch; training goes on from the newest intact one, and ends with the weights that
    an uninterrupted run has. `on_epoch` hears of restored epochs too, so a listener needs no memory of its own.
    `soft_logits` (clips of the store, K) are the teachers' logits, needed where `distillation` is given.
    `mixed_precision` is bf16 on CUDA, and nothing elsewhere.

    Raises Diverged with epoch, step and clip ids when the loss is not finite.
    """
    device = training_device()
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    front_end = LogMel(recipe.frontend).to(device)
    augment = Augment(recipe.augment, recipe.frontend, data.bank, data.mean_energy)
    soft = None if soft_logits is None else torch.from_numpy(soft_logits)
    settings = recipe.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=device.type == "cuda"
    )
    history: list[Metrics] = []
    if checkpoint := load_checkpoint(folder):
        model.load_state_dict(checkpoint.model)
        restore_optimizer(optimizer, checkpoint.optimizer)
        for metrics in checkpoint.history:
            history.append(metrics)
            on_epoch(metrics)

    for epoch in range(len(history), settings.epochs):
        start = time.perf_counter()
        factor = learning_rate_factor(epoch, settings.schedule)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        set_training(model, True)
        before_epoch(model, epoch)
        batches = epoch_batches(len(train), settings.batch_size, seed=recipe.seed, epoch=epoch)
        losses = []
        for step, batch in enumerate(batches):
            losses.append(
                _step(
                    model, optimizer, front_end, augment, data.store, train[batch], soft, distillation,
                    step_generator(recipe.seed, epoch, step, 0), settings.clip_norm,
                    mixed_precision and device.type == "cuda",
                )
            )  # fmt: skip
        sums = torch.stack(losses).cpu()  # the one synchronization of the epoch
        _check_finite(sums[:, 0], epoch, [data.store.ids[train[batch]] for batch in batches])
        seconds = time.perf_counter() - start
        set_training(model, False)
        metrics = {
            "epoch": epoch + 1,
            "learning_rate": settings.learning_rate * factor,
            "loss": float(sums[:, 0].sum() / sums[:, 1].sum()),
            "train_accuracy": float(sums[:, 2].sum() / sums[:, 1].sum()),
            **validate(model, front_end, data, device),
            "clips_per_second": len(train) / seconds,
        }
        history.append(metrics)
        save_checkpoint(folder, model, optimizer, history)
        on_epoch(metrics)
    set_training(model, False)
    return history


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    front_end: LogMel,
    augment: Augment,
    store: ClipStore,
    clips: np.ndarray,
    soft: Tensor | None,
    distillation: DistillationConfig | None,
    generator: torch.Generator,
    clip_norm: float,
    autocast: bool,
) -> Tensor:
    """One update on the store's `clips`; returns (summed loss, clips, right answers) without waiting for the device."""
    device = next(model.parameters()).device
    draw = augment.draw(torch.from_numpy(store.energy[clips]), store.device[clips].tolist(), generator).to(device)
    wave = augment.wave(waves(store, clips, device), draw)
    mel = augment.mel(front_end(wave, draw.fmax_shift), draw)
    scene = torch.from_numpy(store.scene[clips]).to(device, non_blocking=True)
    target = F.one_hot(scene, len(store.labels)).float()
    teacher = None if soft is None else soft[torch.from_numpy(clips)].to(device, non_blocking=True)
    if draw.lam is not None:
        lam, partner = draw.lam[:, None], draw.partner
        target = lam * target + (1 - lam) * target[partner]
        teacher = None if teacher is None else lam * teacher + (1 - lam) * teacher[partner]
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
        mel = mel.contiguous(memory_format=torch.channels_last)
        logits = model(mel, generator) if getattr(model, "stochastic", False) else model(mel)
    losses = objective(logits.float(), target, teacher, distillation)
    optimizer.zero_grad(set_to_none=True)
    losses["total"].mean().backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    right = (logits.detach().argmax(1) == scene).sum()
    return torch.stack([losses["total"].detach().sum(), right.new_tensor(len(clips)).float(), right.float()])


def _check_finite(losses: Tensor, epoch: int, clip_ids: Sequence[np.ndarray]) -> None:
    bad = torch.nonzero(~torch.isfinite(losses))
    if len(bad):
        step = int(bad[0])
        names = ", ".join(str(name) for name in clip_ids[step][:8])
        more = f" and {len(clip_ids[step]) - 8} more" if len(clip_ids[step]) > 8 else ""
        raise Diverged(
            f"the loss became {float(losses[step])} in epoch {epoch + 1}, step {step + 1}; clips {names}{more}. "
            "Lower optimizer.learning_rate or optimizer.clip_norm, or look at these clips"
        )


def validate(model: nn.Module, front_end: LogMel, data: Dataset, device: torch.device) -> Metrics:
    """Accuracy, macro accuracy (mean over scenes) and log loss on the validation part."""
    clips = data.parts["validation"]
    log_p = torch.log_softmax(predict(model, front_end, data.store, clips, device), dim=1)
    scene = torch.from_numpy(data.store.scene[clips])
    right = (log_p.argmax(1) == scene).double()
    per_scene = [float(right[scene == k].mean()) for k in range(len(data.store.labels))]
    return {
        "validation_accuracy": float(right.mean()),
        "validation_macro_accuracy": float(np.mean(per_scene)),
        "validation_log_loss": float(F.nll_loss(log_p, scene)),
    }


@torch.no_grad()
def predict(
    model: nn.Module, front_end: LogMel, store: ClipStore, clips: np.ndarray, device: torch.device, batch_size: int = 64
) -> Tensor:
    """Logits (N, K) float32 on the host of the store's `clips`, not augmented; `model` is in evaluation form."""
    outputs = []
    for batch in eval_batches(len(clips), batch_size):
        mel = front_end(waves(store, clips[batch], device)).contiguous(memory_format=torch.channels_last)
        outputs.append(model(mel).float().cpu())
    return torch.cat(outputs)
