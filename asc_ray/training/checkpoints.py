"""Checkpoints: safetensors and a readable meta.json, written aside and renamed; the last few and the best are kept."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asc_ray import remote
from asc_ray.artifacts import file_sha256, read_record, write_record

KEPT = 2
TENSORS, META = ("model.safetensors", "optimizer.safetensors"), "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """State after `epoch` finished epochs and `steps` of the next one.

    `history` is one flat dict of metrics per epoch, `steps` what each step returned.
    """

    epoch: int
    steps: list[list[float]]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    history: list[dict[str, float]]


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict],
    steps: Sequence[list[float]] = (),
) -> None:
    """Write `folder/epoch-NNNNN/` or `epoch-NNNNN-step-NNNNNN/`, then remove all but the last two and the best."""
    epoch = len(history)
    name = _name(epoch) + (f"-step-{len(steps):06d}" if steps else "")
    final, temporary = folder / name, folder / f".{name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        save_file(_plain(model.state_dict()), temporary / "model.safetensors")
        save_file(_optimizer_tensors(optimizer), temporary / "optimizer.safetensors")
        checksums = {name: file_sha256(temporary / name) for name in TENSORS}
        meta = {"epoch": epoch, "steps": list(steps), "history": history, "sha256": checksums}
        write_record(temporary / META, meta)
        if final.exists():  # a damaged one that resuming passed over
            shutil.rmtree(final)
        os.rename(temporary, final)
        remote.push(*(final / name for name in TENSORS))
        remote.push(final / META)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # The best of the earlier ones stays too: if this one is damaged, it is the best again.
    best = {_name(best_epoch(past)) for past in (history, history[:-1]) if past}
    there = sorted(folder.glob("epoch-*"))
    later = [path for path in there if path.name > name]  # damaged ones that resuming passed over
    earlier = there[: len(there) - len(later)]
    for path in [*later, *(old for old in earlier[:-KEPT] if old.name not in best)]:
        shutil.rmtree(path)
        remote.forget(path)


def best_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """Return the epoch, counted from 1, with the highest macro accuracy on the validation part; the first of equals."""
    return 1 + max(range(len(history)), key=lambda epoch: history[epoch]["validation_macro_accuracy"])


def load_checkpoint(folder: Path, epoch: int | None = None) -> Checkpoint | None:
    """Return the newest checkpoint whose checksums hold, or None; damaged ones are passed over.

    With `epoch`, return the checkpoint of that epoch's end, if it is there and intact.
    """
    remote.pull(folder)
    for candidate in sorted(folder.glob("epoch-*" if epoch is None else _name(epoch)), reverse=True):
        meta = _read_meta(candidate)
        if meta is None:
            continue
        return Checkpoint(
            epoch=meta["epoch"],
            steps=meta["steps"],
            model=load_file(candidate / "model.safetensors"),
            optimizer=load_file(candidate / "optimizer.safetensors"),
            history=meta["history"],
        )
    return None


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `save_checkpoint` stored into an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, field = name.split(".", 1)
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, fields in optimizer.state.items():  # fused optimizers want the parameter's own layout
        for name, value in fields.items():
            if value.shape == parameter.shape:
                fields[name] = torch.empty_like(parameter).copy_(value)


def _name(epoch: int) -> str:
    return f"epoch-{epoch:05d}"


def _read_meta(folder: Path) -> dict[str, Any] | None:
    meta = read_record(folder / META)
    try:
        intact = meta is not None and all(file_sha256(folder / name) == meta["sha256"].get(name) for name in TENSORS)
    except OSError:
        return None
    return meta if intact else None


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{field}": value for index, fields in state.items() for field, value in _plain(fields).items()}


def _plain(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Copy every tensor to contiguous memory of its own on the host, because safetensors needs that."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
