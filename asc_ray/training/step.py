"""One step of a training: augmentation, front end, network, objective and optimizer."""

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from asc_ray.audio.augment import Augment, Draw
from asc_ray.audio.frontends import FrontEnd, laid_out
from asc_ray.data.batches import moved, waveform
from asc_ray.data.clips import CLIP_SAMPLES, ClipStore
from asc_ray.models.own import OwnNetwork, drawn_from
from asc_ray.training import parallel
from asc_ray.training.config import Precision
from asc_ray.training.folder import Metrics
from asc_ray.training.gpu import Replayed
from asc_ray.training.objective import Objective


class Rows(Protocol):
    """An array, or what is read like one: an index gives the rows (n, K) of some clips."""

    def __getitem__(self, clips: np.ndarray, /) -> np.ndarray: ...


class Trainer:
    """The update of one step. Its profiled parts have the names that bench/train.py reports."""

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        front_end: FrontEnd,
        augment: Augment,
        store: ClipStore,
        soft: Rows | None,
        objective: Objective,
        label_smoothing: float,
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
        scenes = len(store.labels)
        self._labels = torch.lerp(torch.eye(scenes), torch.full((scenes, scenes), 1 / scenes), label_smoothing)
        self._labels = self._labels.to(self._device)
        self._draw: Draw | None = None  # what the columns of a plan mean, the same in every step
        self._replayed: Replayed | None = None

    def compile(self, batch_size: int) -> None:
        """Compile the network and try it on a batch of zeros; where that fails, warn and train without it."""
        state = copy.deepcopy(self.model.state_dict())
        forward = torch.compile(self._forward, dynamic=False)  # dynamic shapes would depend on which batch came first
        mel = self.front_end(torch.zeros(batch_size, 1, CLIP_SAMPLES, device=self._device))
        choices = [moved(value, self._device) for value in self._choices(torch.Generator())]
        try:
            self._logits(forward, mel, choices).sum().backward()
        except Exception as error:  # a compiler can fail in any way, e.g. without a C++ compiler
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.compiled = False
            warnings.warn(f"torch.compile failed, training goes on without it: {reason}", stacklevel=2)
        else:
            self._forward, self.compiled = forward, True
        self.model.load_state_dict(state)
        self.optimizer.zero_grad(set_to_none=True)

    def begin_epoch(self, progress: float, learning_rate: float, changes: bool) -> None:
        """Set the learning rate, and discard the recorded step where it no longer holds.

        `progress` is 0 in the first epoch and 1 in the last. `changes`: the network now computes something else.
        """
        self.progress = progress
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if isinstance(self.model, OwnNetwork):  # what foreign code draws or chooses on the host would be replayed, too
            return
        stale = self._replayed is None or changes or self.objective.scheduled
        if self._device.type == "cuda" and self.world == 1 and stale:
            self._replayed = Replayed()

    @torch.no_grad()
    def notes(self) -> Metrics:
        """Return an epoch's metrics of the training itself: whether it is compiled, and lambda."""
        notes = {} if self.compiled is None else {"compiled": float(self.compiled)}
        if self.soft is not None:
            notes["label_weight"] = float(self.objective.label_weight(self.progress))
        return notes

    def step(self, pcm: Tensor, clips: np.ndarray, generator: torch.Generator) -> Tensor:
        """Make one update on the store's `clips`; return (summed loss, clips, right answers), not waiting for the GPU.

        The clips and their samples, (B, 32000) int16 or to be cropped (B, 64000), are the whole batch. It goes through
        the network in pieces, first by rank and then by `accumulate`. The gradient is that of the batch's mean loss.
        """
        with record_function("augmentation"):
            energies, devices = torch.from_numpy(self.store.energy[clips]), self.store.device[clips].tolist()
            draw = self.augment.draw(energies, devices, generator)
            # A recorded step relies on this: the configuration alone determines what a column means.
            assert self._draw is None or self._draw.width == draw.width
            self._draw = draw
            columns = [draw.packed(), torch.from_numpy(self.store.scene[clips])[:, None].double()]
            if self.soft is not None:
                columns.append(torch.from_numpy(self.soft[clips]).double())
            choices = [values for _ in range(self._parts(len(clips))) for values in self._choices(generator)]
            plan = torch.cat(columns, dim=1)
            inputs = [moved(value, pcm.device) for value in (plan, *choices)]
        if isinstance(self.model, OwnNetwork):
            with drawn_from(int(torch.randint(2**62, (1,), generator=generator)) + self.rank):
                return self._compute(pcm, *inputs)
        return self._replayed(self._compute, pcm, *inputs) if self._replayed else self._compute(pcm, *inputs)

    def _compute(self, pcm: Tensor, plan: Tensor, *choices: Tensor) -> Tensor:
        """Compute a step without reading any value back to the host.

        `plan` (B, ...) has each clip's draw, scene and soft target; `choices` are the network's own draws, piece by
        piece.
        """
        assert self._draw is not None
        with record_function("augmentation"):
            drawn, scene, soft = plan.split([self._draw.width, 1, plan.shape[1] - self._draw.width - 1], dim=1)
            draw, scene = self._draw.unpacked(drawn), scene[:, 0].long()
            wave = self.augment.wave(waveform(pcm), draw)
        with record_function("front end"):
            mel = self.front_end(wave[:, None], draw.fmax_shift)
        with record_function("augmentation"):
            mel = self.augment.mel(mel, draw)
            target = self._labels[scene]
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
                    # DistributedDataParallel averages over the ranks; times `world` that is the sum.
                    (loss.sum() * (self.world / len(pcm))).backward()
            right = (logits.detach().argmax(1) == scene[own]).float()
            result += torch.stack([loss.detach().sum(), torch.ones_like(right).sum(), right.sum()])
        with record_function("optimizer"):
            for parameter in self.objective.parameters():  # a learned lambda is not in DistributedDataParallel
                if parameter.grad is not None:
                    parallel.summed(parameter.grad).div_(self.world)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        return parallel.summed(result)

    def _parts(self, clips: int) -> int:
        return min(self.accumulate, clips // self.world)

    def _choices(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return what the network draws for itself in training, on the host."""
        draw = getattr(self.model, "choices", None)
        return draw(self.front_end.config.frames(CLIP_SAMPLES), generator) if draw else ()

    def _logits(self, forward: Callable[..., Tensor], mel: Tensor, choices: Sequence[Tensor]) -> Tensor:
        with torch.autocast(mel.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits = forward(laid_out(mel), *choices)
        return logits.float()
