"""The one training loop: teachers, students, search trials and quantization-aware training run through it."""

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from asc_ray.audio.augment import Augment
from asc_ray.audio.frontends import FrontEnd, front_end
from asc_ray.data.batches import device_shares, epoch_batches, step_generator
from asc_ray.data.clips import ClipStore
from asc_ray.errors import UserError
from asc_ray.training import parallel
from asc_ray.training.checkpoints import best_epoch, load_checkpoint, restore_optimizer, save_checkpoint
from asc_ray.training.config import DistillationConfig, OptimizerConfig, Recipe
from asc_ray.training.dataset import Dataset
from asc_ray.training.folder import Metrics, OnEpoch
from asc_ray.training.gpu import on_gpu, training_device
from asc_ray.training.objective import Objective
from asc_ray.training.optimizer import average_weights, learning_rate_factor, optimizer_of
from asc_ray.training.step import Rows, Trainer
from asc_ray.training.validation import NotFinite, validate

# Within an epoch too, because on a large corpus an epoch can last an hour.
CHECKPOINT_SECONDS = 300.0
SetMode = Callable[[nn.Module, int | None], object]


def train_mode(model: nn.Module, epoch: int | None) -> None:
    """Put `model` into training form for the zero-based `epoch`, or into evaluation form for None."""
    model.train(epoch is not None)


class Diverged(NotFinite):
    """A training led to a loss or to logits that are infinite or not a number."""


def fit(
    model: nn.Module,
    recipe: Recipe,
    data: Dataset,
    train: np.ndarray,
    folder: Path,
    *,
    distillation: DistillationConfig | None = None,
    soft_targets: Rows | None = None,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
    set_mode: SetMode = train_mode,
) -> list[Metrics]:
    """Train `model` in place on the store's clips `train`, and return the metrics of every epoch.

    A checkpoint goes to `folder` after every epoch, and every CHECKPOINT_SECONDS within one. Training resumes from the
    newest intact one, and ends with the same weights as an uninterrupted run. `on_epoch` is called for restored epochs
    too, so a listener needs no memory of its own. `soft_targets` (clips of the store, K) are the teachers' logits,
    needed where `distillation` is given. `gpus` are those that this process may use, less than 1 for a part of one.
    `set_mode` replaces `train_mode` for a network that changes its form in another way.

    In a torch.distributed group all ranks call this alike. Only the first rank has the result, writes checkpoints and
    calls `on_epoch`.

    Raises Diverged with epoch, step and clip ids when the loss is not finite.
    """
    device = training_device(gpus)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = recipe.optimizer
    objective = Objective(distillation).to(device)
    trained = _trained(model, objective, settings)
    optimizer = optimizer_of(model, objective, settings, device)
    rank, world = parallel.rank(), parallel.world()
    history, steps = _resumed(folder, trained, optimizer)
    if rank == 0:
        for metrics in history:
            on_epoch(metrics)
    trainer = Trainer(
        model=model,
        optimizer=optimizer,
        front_end=front_end(recipe.frontend).to(device),
        augment=Augment(recipe.augment, recipe.frontend, data.bank, data.mean_energy),
        store=data.store,
        soft=soft_targets,
        objective=objective,
        label_smoothing=recipe.label_smoothing,
        clip_norm=settings.clip_norm,
        accumulate=settings.accumulate,
        precision="fp32" if device.type == "cpu" else recipe.precision,
    )
    with on_gpu(device, recipe.precision == "tf32", recipe.deterministic):
        if recipe.compile and len(history) < settings.epochs:
            set_mode(model, len(history))
            trainer.compile(-(-settings.batch_size // (world * settings.accumulate)))
        waves = data.waves(train, device, gpus, crop=recipe.augment.crop)
        shares = device_shares(data.store.device.codes[train], recipe.balance)

        for epoch in range(len(history), settings.epochs):
            start = saved = time.perf_counter()
            rate = settings.learning_rate * learning_rate_factor(epoch, settings.schedule)
            trainer.begin_epoch(epoch / max(1, settings.epochs - 1), rate, changes=set_mode is not train_mode)
            set_mode(model, epoch)
            batches = epoch_batches(
                len(train), settings.batch_size, seed=recipe.seed, epoch=epoch, world=world, shares=shares
            )
            first = len(steps)
            results = [torch.tensor(values, device=device) for values in steps]
            steps = []
            delivered = waves.batches(batch[rank::world] for batch in batches[first:])
            for step in range(first, len(batches)):
                clips = train[batches[step]]
                with record_function("data"):
                    pcm = parallel.gathered(next(delivered), len(clips))
                results.append(trainer.step(pcm, clips, step_generator(recipe.seed, epoch, step)))
                if rank == 0 and time.perf_counter() - saved > CHECKPOINT_SECONDS and step + 1 < len(batches):
                    sums = _finite(results, epoch, data.store, train, batches)
                    save_checkpoint(folder, trained, optimizer, history, sums.tolist())
                    saved = time.perf_counter()
            sums = _finite(results, epoch, data.store, train, batches)
            seconds = time.perf_counter() - start
            set_mode(model, None)
            average_weights(trained, settings, epoch)
            metrics = {
                "epoch": epoch + 1,
                "learning_rate": rate,
                "loss": float(sums[:, 0].sum() / sums[:, 1].sum()),
                "train_accuracy": float(sums[:, 2].sum() / sums[:, 1].sum()),
                **_validated(model, trainer.front_end, data, device, epoch),
                **trainer.notes(),
                "clips_per_second": sum(map(len, batches[first:])) / seconds,
            }
            metrics |= _times(
                time.perf_counter() - start, len(batches) - first, len(batches), settings.epochs - epoch - 1
            )
            history.append(metrics)
            if rank == 0:
                save_checkpoint(folder, trained, optimizer, history)
                on_epoch(metrics)
    if rank == 0 and recipe.select == "best":
        _restore_best(folder, trained, history)
    set_mode(model, None)
    return history


def _times(seconds: float, steps: int, of: int, epochs_left: int) -> Metrics:
    """Return an epoch's seconds and the minutes left, where this process took `steps` of the epoch's `of` steps."""
    return {"seconds": seconds, "minutes_left": seconds * of / max(1, steps) * epochs_left / 60}


def _trained(model: nn.Module, objective: Objective, settings: OptimizerConfig) -> nn.ModuleDict:
    """Return the modules that checkpoints hold."""
    trained = nn.ModuleDict({"network": model, "objective": objective})
    if settings.average_epochs > 1:
        trained["average"] = copy.deepcopy(model)
    return trained


def _resumed(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[Metrics], list[list[float]]]:
    """Restore the newest intact checkpoint; return the finished epochs' metrics and the next epoch's step results."""
    checkpoint = load_checkpoint(folder)
    if checkpoint is None:
        return [], []
    model.load_state_dict(checkpoint.model)
    restore_optimizer(optimizer, checkpoint.optimizer)
    return checkpoint.history, checkpoint.steps


def _restore_best(folder: Path, model: nn.Module, history: Sequence[Metrics]) -> None:
    checkpoint = load_checkpoint(folder, best_epoch(history))
    if checkpoint is None:
        raise UserError(
            f"{folder}: the checkpoint of the best epoch, {best_epoch(history)}, is damaged; delete the folder and "
            "train again, or choose select: last"
        )
    model.load_state_dict(checkpoint.model)


def _finite(
    results: list[Tensor], epoch: int, store: ClipStore, train: np.ndarray, batches: list[np.ndarray]
) -> Tensor:
    """Copy the steps' results to the host, the one synchronization of an epoch. Raises Diverged."""
    sums = torch.stack(results).cpu()
    bad = torch.nonzero(~sums[:, 0].isfinite())
    if len(bad):
        step = int(bad[0])
        ids = store.ids[train[batches[step]]]
        names = ", ".join(str(name) for name in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise Diverged(
            f"the loss became {float(sums[step, 0])} in epoch {epoch + 1}, step {step + 1}; clips {names}. "
            "Lower optimizer.learning_rate or optimizer.clip_norm, or look at these clips"
        )
    return sums


def _validated(model: nn.Module, front_end: FrontEnd, data: Dataset, device: torch.device, epoch: int) -> Metrics:
    try:
        return validate(model, front_end, data, device)
    except NotFinite as error:
        raise Diverged(
            f"after epoch {epoch + 1} {error}. Lower optimizer.learning_rate or optimizer.clip_norm"
        ) from None
