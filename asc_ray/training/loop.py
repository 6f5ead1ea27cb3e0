"""The one training loop: teachers, students, search trials and quantization-aware training run through it."""

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from asc_ray.audio.augment import Augment, AugmentConfig, Draw, check_masks
from asc_ray.audio.frontend import FrontendConfig, LogMel
from asc_ray.data.batches import Waves, device_shares, epoch_batches, eval_batches, moved, step_generator, waveform
from asc_ray.data.clips import CLIP_SAMPLES, ClipStore
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.dcase22_baseline import FRAMES, MELS, DCASE22BaselineConfig
from asc_ray.models.passt import PasstConfig
from asc_ray.models.registry import ModelConfig
from asc_ray.section import Section
from asc_ray.training import parallel
from asc_ray.training.checkpoints import best_epoch, load_checkpoint, restore_optimizer, save_checkpoint
from asc_ray.training.dataset import Dataset
from asc_ray.training.distillation import DistillationConfig, Objective
from asc_ray.training.gpu import Replayed, on_gpu
from asc_ray.training.schedules import ScheduleConfig, learning_rate_factor

# Within an epoch too, for on a large corpus it can last an hour.
CHECKPOINT_SECONDS = 300.0

Precision = Literal["bf16", "tf32", "fp32"]
Metrics = dict[str, float]
OnEpoch = Callable[[Metrics], None]


class OptimizerConfig(Section):
    """One optimizer over the whole network, one learning-rate schedule, lengths in epochs."""

    kind: Literal["adamw", "adam"] = Field(
        "adamw", description="adam adds the weight decay to the gradient (L2), adamw takes it from the weights"
    )
    epochs: int = Field(30, ge=1, description="passes over the training clips")
    batch_size: int = Field(64, ge=2, description="clips of a step")
    learning_rate: float = Field(1e-3, gt=0.0, le=1.0, description="its largest value, which the schedule scales")
    weight_decay: float = Field(1e-3, ge=0.0, le=1.0, description="as `kind` has it")
    schedule: ScheduleConfig = ScheduleConfig()
    clip_norm: float = Field(5.0, gt=0.0, description="largest norm of the gradient over all weights")
    accumulate: int = Field(1, ge=1, description="parts in which a batch goes through the network, for less memory")
    average_epochs: int = Field(
        1, ge=1, description="the result is the mean of the weights after so many of the last epochs"
    )

    @model_validator(mode="after")
    def _no_more_than_there_are(self) -> "OptimizerConfig":
        if self.average_epochs > self.epochs:
            raise ValueError(f"average_epochs: {self.average_epochs} of {self.epochs} epochs")
        return self

    def scaled_to(self, epochs: int) -> "OptimizerConfig":
        """The same recipe compressed or stretched to `epochs`, its schedule with it."""
        ratio = epochs / self.epochs
        schedule = ScheduleConfig(
            warm_up=round(self.schedule.warm_up * ratio),
            ramp_down_start=round(self.schedule.ramp_down_start * ratio),
            ramp_down_length=max(1, round(self.schedule.ramp_down_length * ratio)),
            last_factor=self.schedule.last_factor,
        )
        average = max(1, round(self.average_epochs * ratio))
        return self.model_copy(update={"epochs": epochs, "schedule": schedule, "average_epochs": average})


class Recipe(Section):
    """All that defines one training but its data."""

    later = frozenset({"precision", "deterministic"})
    model: ModelConfig = Field(discriminator="name", description="the network, and its settings")
    frontend: FrontendConfig = FrontendConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    balance: float = Field(
        0.0, ge=0.0, le=1.0, description="0: an epoch has every clip once; 1: as many clips of every device"
    )
    compile: bool = Field(False, description="torch.compile the network; where that fails, it trains without")
    precision: Precision = Field("bf16", description="of the network's training on a GPU; on a CPU it is fp32")
    deterministic: bool = Field(False, description="the same bits in every run on a GPU, slower; on a CPU they are")
    select: Literal["last", "best"] = Field(
        "last", description="which weights are the result: the last epoch's, or those best on the validation part"
    )
    seed: int = Field(0, ge=0, description="of the first weights and of all that is drawn")

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        try:
            check_masks(self.augment, self.frontend)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        if self.select == "best" and self.optimizer.average_epochs > 1:
            raise ValueError(
                "select: best, and optimizer.average_epochs > 1 averages the last ones; choose one of them"
            )
        mels, frames = self.frontend.mels, self.frontend.frames(self.frontend.sample_rate)
        if isinstance(self.model, DCASE22BaselineConfig) and (mels, frames) != (MELS, FRAMES):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, dcase22_baseline takes {MELS} x {FRAMES}; "
                "use student.preset: dcase22_baseline, or change frontend.mels and frontend.hop"
            )
        if isinstance(self.model, PasstConfig) and (self.model.mels != mels or self.model.frames < frames):
            raise ValueError(
                f"frontend makes {mels} mels x {frames} frames of a clip, model takes {self.model.mels} x at most "
                f"{self.model.frames}; change frontend.mels, frontend.hop, model.mels or model.frames"
            )
        return self


class NotFinite(UserError):
    """A network answers with values that are infinite or not a number."""


class Diverged(NotFinite):
    """A training led to a loss or to logits that are infinite or not a number."""


def training_device(gpus: float) -> torch.device:
    """Where to compute with so many GPUs, or such a part of one: without any on the CPU, whatever the machine has.

    Raises UserError where a GPU was asked for and torch sees none.
    """
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"gpus: {gpus:g} was asked for, and torch {torch.__version__} sees no GPU here; install a CUDA build of "
            "torch on every node, or ask for gpus: 0"
        )
    return torch.device("cuda")


def fit(
    model: nn.Module,
    recipe: Recipe,
    data: Dataset,
    train: np.ndarray,
    folder: Path,
    *,
    distillation: DistillationConfig | None = None,
    soft_logits: np.ndarray | None = None,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
    set_training: Callable[[nn.Module, bool], object] = nn.Module.train,
    before_epoch: Callable[[nn.Module, int], None] | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> list[Metrics]:
    """Train `model` in place on the store's clips `train`; returns the metrics of every epoch.

    `folder` takes a checkpoint an epoch, and within an epoch one every `checkpoint_seconds`; training goes on from the
    newest intact one, and ends with the weights that an uninterrupted run has. `on_epoch` hears of restored epochs too,
    so a listener needs no memory of its own. `soft_logits` (clips of the store, K) are the teachers' logits, needed
    where `distillation` is given. `gpus`: what this process may compute on, a part of one GPU for less than 1.

    In a torch.distributed group all ranks call this alike. The first one alone has the result, and writes
    checkpoints and is heard by `on_epoch`.

    Raises Diverged with epoch, step and clip ids when the loss is not finite.
    """
    device = training_device(gpus)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = recipe.optimizer
    objective = Objective(distillation).to(device)
    trained = _trained(model, objective, settings)
    optimizer = _optimizer(model, objective, settings, device)
    rank, world = parallel.rank(), parallel.world()
    history, steps = _resumed(folder, trained, optimizer)
    if rank == 0:
        for metrics in history:
            on_epoch(metrics)
    trainer = _Trainer(
        model=model,
        optimizer=optimizer,
        front_end=LogMel(recipe.frontend).to(device),
        augment=Augment(recipe.augment, recipe.frontend, data.bank, data.mean_energy),
        store=data.store,
        soft=None if soft_logits is None else torch.from_numpy(soft_logits),
        objective=objective,
        clip_norm=settings.clip_norm,
        accumulate=settings.accumulate,
        precision="fp32" if device.type == "cpu" else recipe.precision,
    )
    with on_gpu(device, recipe.precision == "tf32", recipe.deterministic):
        if recipe.compile and len(history) < settings.epochs:
            set_training(model, True)
            trainer.compile(-(-settings.batch_size // (world * settings.accumulate)))
        waves = data.waves(train, device, gpus)
        shares = device_shares(data.store.device[train], recipe.balance)

        for epoch in range(len(history), settings.epochs):
            start = saved = time.perf_counter()
            rate = settings.learning_rate * learning_rate_factor(epoch, settings.schedule)
            trainer.begin_epoch(epoch / max(1, settings.epochs - 1), rate, changes=before_epoch is not None)
            set_training(model, True)
            if before_epoch:
                before_epoch(model, epoch)
            batches = epoch_batches(
                len(train), settings.batch_size, seed=recipe.seed, epoch=epoch, world=world, shares=shares
            )
            clips = [train[batch] for batch in batches]
            first = len(steps)
            results = [torch.tensor(values, device=device) for values in steps]
            steps = []
            delivered = waves.batches([batch[rank::world] for batch in batches[first:]])
            for step in range(first, len(batches)):
                with record_function("data"):
                    pcm = parallel.gathered(next(delivered), len(clips[step]))
                results.append(trainer.step(pcm, clips[step], step_generator(recipe.seed, epoch, step)))
                if rank == 0 and time.perf_counter() - saved > checkpoint_seconds and step + 1 < len(batches):
                    sums = _finite(results, epoch, data.store, clips)
                    save_checkpoint(folder, trained, optimizer, history, sums.tolist())
                    saved = time.perf_counter()
            sums = _finite(results, epoch, data.store, clips)
            seconds = time.perf_counter() - start
            set_training(model, False)
            _average(trained, settings, epoch)
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
    set_training(model, False)
    return history


def _times(seconds: float, steps: int, of: int, epochs_left: int) -> Metrics:
    """Of an epoch of which so many `steps` were taken in this process."""
    return {"seconds": seconds, "minutes_left": seconds * of / max(1, steps) * epochs_left / 60}


def _trained(model: nn.Module, objective: Objective, settings: OptimizerConfig) -> nn.ModuleDict:
    """What checkpoints hold."""
    trained = nn.ModuleDict({"network": model, "objective": objective})
    if settings.average_epochs > 1:
        trained["average"] = copy.deepcopy(model)
    return trained


def _optimizer(
    model: nn.Module, objective: Objective, settings: OptimizerConfig, device: torch.device
) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if own := list(objective.parameters()):  # decay would draw a learned lambda to the middle of its bounds
        groups.append({"params": own, "weight_decay": 0.0})
    kind = torch.optim.AdamW if settings.kind == "adamw" else torch.optim.Adam
    gpu = device.type != "cpu"
    rate = torch.tensor(settings.learning_rate, device=device) if gpu else settings.learning_rate
    return kind(groups, lr=rate, weight_decay=settings.weight_decay, fused=gpu, capturable=gpu)


def _resumed(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[list[Metrics], list[list[float]]]:
    """Metrics of the finished epochs and results of the next one's steps, from the newest intact checkpoint."""
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


@torch.no_grad()
def _average(trained: nn.ModuleDict, settings: OptimizerConfig, epoch: int) -> None:
    """After each of the last epochs take the weights, and the batch norms' statistics, into the mean; in the last one
    the mean becomes the network."""
    number = epoch + 1 - (settings.epochs - settings.average_epochs)
    if settings.average_epochs == 1 or number < 1:
        return
    mean, network = trained["average"].state_dict(), trained["network"].state_dict()
    for own, value in zip(mean.values(), network.values(), strict=True):
        if number == 1 or not own.is_floating_point():
            own.copy_(value)
        else:
            own.lerp_(value, 1 / number)
    if epoch + 1 == settings.epochs:
        trained["network"].load_state_dict(mean)


class _Trainer:
    """The update of one step. Its parts carry the names that bench/train.py reports."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        front_end: LogMel,
        augment: Augment,
        store: ClipStore,
        soft: Tensor | None,
        objective: Objective,
        clip_norm: float,
        accumulate: int,
        precision: Precision,
    ) -> None:
        self.model, self.optimizer, self.front_end, self.augment = model, optimizer, front_end, augment
        self.store, self.soft, self.objective, self.progress = store, soft, objective, 0.0
        self.clip_norm, self.accumulate, self.precision = clip_norm, accumulate, precision
        self.compiled: bool | None = None  # None: it was not asked for
        self.rank, self.world = parallel.rank(), parallel.world()
        self._distributed: Any = parallel.distributed(model)
        self._forward: Callable[..., Tensor] = self._distributed
        self._device = next(model.parameters()).device
        self._one_hot = torch.eye(len(store.labels), device=self._device)
        self._draw: Draw | None = None  # what the columns of a plan mean, the same in every step
        self._replayed: Replayed | None = None

    def compile(self, batch_size: int) -> None:
        """torch.compile the network, tried on a batch of zeros; what does not compile trains as it is, and says so."""
        state = copy.deepcopy(self.model.state_dict())
        forward = torch.compile(self._forward, dynamic=False)  # dynamic shapes would depend on which batch came first
        mel = self.front_end(torch.zeros(batch_size, CLIP_SAMPLES, device=self._device))
        choices = [moved(value, self._device) for value in self._choices(torch.Generator())]
        try:
            self._logits(forward, mel, choices).sum().backward()
        except Exception as error:  # compilers fail in their own ways, for lack of a C++ compiler to begin with
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.compiled = False
            warnings.warn(f"torch.compile failed, training goes on without it: {reason}", stacklevel=2)
        else:
            self._forward, self.compiled = forward, True
        self.model.load_state_dict(state)
        self.optimizer.zero_grad(set_to_none=True)

    def begin_epoch(self, progress: float, learning_rate: float, changes: bool) -> None:
        """`progress`: 0 in the first epoch and 1 in the last; `changes`: whether the network computes otherwise now."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        stale = self._replayed is None or changes or self.objective.scheduled
        if self._device.type == "cuda" and self.world == 1 and stale:
            self._replayed = Replayed()
        self.progress = progress

    @torch.no_grad()
    def notes(self) -> Metrics:
        """What an epoch's metrics say of the training itself."""
        notes = {} if self.compiled is None else {"compiled": float(self.compiled)}
        if self.soft is not None:
            notes["label_weight"] = float(self.objective.label_weight(self.progress))
        return notes

    def step(self, pcm: Tensor, clips: np.ndarray, generator: torch.Generator) -> Tensor:
        """One update on the store's `clips`; (summed loss, clips, right answers), without waiting for the device.

        The clips and their samples (B, 32000) int16 are of the whole batch. It goes through the network in parts: first
        by rank, and then by `accumulate`; the gradient is that of its mean loss.
        """
        with record_function("augmentation"):
            energies, devices = torch.from_numpy(self.store.energy[clips]), self.store.device[clips].tolist()
            draw = self.augment.draw(energies, devices, generator)
            # What a column means follows from the configuration alone: a recorded step relies on it.
            assert self._draw is None or self._draw.width == draw.width
            self._draw = draw
            columns = [draw.packed(), torch.from_numpy(self.store.scene[clips])[:, None].double()]
            if self.soft is not None:
                columns.append(self.soft[torch.from_numpy(clips)].double())
            choices = [values for _ in range(self._parts(len(clips))) for values in self._choices(generator)]
            plan = torch.cat(columns, dim=1)
            inputs = [moved(value, pcm.device) for value in (plan, *choices)]
        return self._replayed(self._compute, pcm, *inputs) if self._replayed else self._compute(pcm, *inputs)

    def _compute(self, pcm: Tensor, plan: Tensor, *choices: Tensor) -> Tensor:
        """What a step does on the device, without a look at any value there. `plan` (B, ...) is what `step` put there:
        the draw, scene and soft logits of each clip; `choices` are the network's own for each part."""
        assert self._draw is not None
        with record_function("augmentation"):
            drawn, scene, soft = plan.split([self._draw.width, 1, plan.shape[1] - self._draw.width - 1], dim=1)
            draw, scene = self._draw.unpacked(drawn), scene[:, 0].long()
            wave = self.augment.wave(waveform(pcm), draw)
        with record_function("front end"):
            mel = self.front_end(wave, draw.fmax_shift)
        with record_function("augmentation"):
            mel = self.augment.mel(mel, draw)
            target = self._one_hot[scene]
            teacher = None if self.soft is None else soft.float()
            if draw.lam is not None:
                lam, partner = draw.lam[:, None], draw.partner
                target = lam * target + (1 - lam) * target[partner]
                teacher = None if teacher is None else self.objective.mixed(teacher, lam, partner)
        self.optimizer.zero_grad(set_to_none=True)
        result = torch.zeros(3, device=pcm.device)
        parts = self._parts(len(pcm))
        for part in range(parts):
            own = slice(self.rank + part * self.world, None, parts * self.world)
            some = choices[part * len(choices) // parts : (part + 1) * len(choices) // parts]
            with nullcontext() if part == parts - 1 or self.world == 1 else self._distributed.no_sync():
                with record_function("forward"):
                    logits = self._logits(self._forward, mel[own], some)
                    loss = self.objective(
                        logits, target[own], None if teacher is None else teacher[own], self.progress
                    )["total"]
                with record_function("backward"):
                    # DistributedDataParallel averages over the ranks what is a sum.
                    (loss.sum() * (self.world / len(pcm))).backward()
            right = (logits.detach().argmax(1) == scene[own]).float()
            result += torch.stack([loss.detach().sum(), torch.ones_like(right).sum(), right.sum()])
        with record_function("optimizer"):
            for parameter in self.objective.parameters():  # a learned lambda, in no DistributedDataParallel
                if parameter.grad is not None:
                    parallel.summed(parameter.grad).div_(self.world)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        return parallel.summed(result)

    def _parts(self, clips: int) -> int:
        return min(self.accumulate, clips // self.world)

    def _choices(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """What the network draws for itself in training, on the host."""
        draw = getattr(self.model, "choices", None)
        return draw(self.front_end.config.frames(CLIP_SAMPLES), generator) if draw else ()

    def _logits(self, forward: Callable[..., Tensor], mel: Tensor, choices: Sequence[Tensor]) -> Tensor:
        with torch.autocast(mel.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits = forward(mel.contiguous(memory_format=torch.channels_last), *choices)
        return logits.float()


def _finite(results: list[Tensor], epoch: int, store: ClipStore, clips: list[np.ndarray]) -> Tensor:
    """What the steps returned, on the host: the one synchronization of an epoch. Raises Diverged."""
    sums = torch.stack(results).cpu()
    bad = torch.nonzero(~sums[:, 0].isfinite())
    if len(bad):
        step = int(bad[0])
        ids = store.ids[clips[step]]
        names = ", ".join(str(name) for name in ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")
        raise Diverged(
            f"the loss became {float(sums[step, 0])} in epoch {epoch + 1}, step {step + 1}; clips {names}. "
            "Lower optimizer.learning_rate or optimizer.clip_norm, or look at these clips"
        )
    return sums


def _validated(model: nn.Module, front_end: LogMel, data: Dataset, device: torch.device, epoch: int) -> Metrics:
    try:
        return validate(model, front_end, data, device)
    except NotFinite as error:
        raise Diverged(
            f"after epoch {epoch + 1} {error}. Lower optimizer.learning_rate or optimizer.clip_norm"
        ) from None


def validate(model: nn.Module, front_end: LogMel, data: Dataset, device: torch.device) -> Metrics:
    """Accuracy, macro accuracy (mean over scenes) and log loss on the validation part.

    Where devices are left out of the training, also the macro accuracy on theirs (`unseen`) and the others' (`seen`).
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
    if data.strangers:
        strange = torch.from_numpy(np.isin(data.store.device[clips], data.strangers))
        metrics |= {"validation_seen": macro(~strange), "validation_unseen": macro(strange)}
    return metrics


def predict(
    model: nn.Module, front_end: LogMel, store: ClipStore, clips: np.ndarray, device: torch.device, batch_size: int = 64
) -> Tensor:
    """Logits (N, K) float32 on the host of the store's `clips`, not augmented; `model` is in evaluation form.

    Raises NotFinite where a logit is infinite or not a number.
    """
    logits = predict_all([model], front_end, store, clips, device, batch_size)[0]
    refuse_not_finite(logits, store.ids[clips])
    return logits


def refuse_not_finite(logits: Tensor, ids: np.ndarray) -> None:
    """Raises NotFinite with the clips `ids` (N,) whose logits (N, K) hold something else than numbers."""
    broken = ~logits.isfinite().all(dim=1).numpy()
    if broken.any():
        names = ", ".join(map(str, ids[broken][:3])) + (", ..." if broken.sum() > 3 else "")
        raise NotFinite(f"the logits of {broken.sum()} of {len(ids)} clips are not finite ({names})")


@torch.no_grad()
def predict_all(
    models: Sequence[nn.Module],
    front_end: LogMel,
    store: ClipStore,
    clips: np.ndarray,
    device: torch.device,
    batch_size: int = 64,
    bf16: bool = False,
) -> Tensor:
    """`predict` of several networks behind one front end: (S, N, K). `bf16` runs the networks in mixed precision."""
    outputs = []
    with on_gpu(device):
        for pcm in Waves(store, clips, device).batches(eval_batches(len(clips), batch_size)):
            mel = front_end(waveform(pcm)).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                outputs.append(torch.stack([model(mel).float() for model in models]))
        return torch.cat(outputs, dim=1).cpu()
