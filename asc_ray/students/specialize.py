"""Specialized students: a finished student, fine-tuned for each device that it was trained on (DCASE 2025 task 1).

The device of a clip is known when the clip is heard. A device without a fine-tuned copy has the general student.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from asc_ray.artifacts import Artifact, read_manifest, stored_file
from asc_ray.models.cp_mobile import GlobalResponseNorm
from asc_ray.models.normalization import InstanceNorm
from asc_ray.students.config import SpecializeConfig, StudentConfig
from asc_ray.students.targets import TargetFiles, read_soft_targets, student_clips
from asc_ray.training.dataset import Dataset, Source
from asc_ray.training.folder import SCRATCH, Metrics, OnEpoch, noted
from asc_ray.training.loop import fit
from asc_ray.training.weights import about, load_model, save_weights

NORMALIZATIONS = (nn.BatchNorm2d, nn.LayerNorm, InstanceNorm, GlobalResponseNorm)


def specialize_student(
    artifact: Artifact,
    source: Source,
    targets: TargetFiles | None,
    student: Path,
    config: StudentConfig,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Fine-tune the finished `student` for each device of its clips, one after the other.

    Each begins with the student's weights and learns from that device's clips alone, by the student's recipe with
    `config.specialize`; of the augmentation, DIR and Freq-MixStyle are off, because they imitate other devices.
    """
    assert config.specialize is not None
    folder = artifact.open_partial()
    data = source.open()
    soft = read_soft_targets(data, targets)
    clips = student_clips(data)
    devices = data.store.device[clips]
    counts = {str(name): int(count) for name, count in zip(*np.unique(devices, return_counts=True), strict=True)}
    recipe, scenes = _recipe(config, config.specialize), len(data.store.labels)
    distillation = None if soft is None else config.distillation
    trained = read_manifest(student)["facts"]["history"]
    if distillation and trained:  # lambda keeps its value from the student's last epoch
        distillation = distillation.model_copy(update={"label_weight": trained[-1]["label_weight"]})
    epochs = config.specialize.epochs
    note = noted(folder, epochs * len(counts), on_epoch)
    history: list[Metrics] = []
    facts, kept = {}, 0
    for number, (device, count) in enumerate(counts.items()):
        model = load_model(student, config, scenes)
        own = adapted(model, config.specialize)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in own)

        def told(metrics: Metrics, number: int = number, device: str = device) -> None:
            later = sum(list(counts.values())[number + 1 :]) / counts[device]
            left = metrics["minutes_left"] + metrics["seconds"] / 60 * epochs * later
            history.append({**metrics, "epoch": number * epochs + metrics["epoch"], "minutes_left": left})
            note(history[-1])

        heard = _heard(data, device)
        fit(
            model,
            recipe,
            heard,
            clips[devices == device],
            folder / "checkpoints" / f"{number:03d}",
            distillation=distillation,
            soft_targets=soft,
            gpus=gpus,
            on_epoch=told,
        )
        # Numbered, because a device's name need not be a file's.
        file = f"device-{number:03d}.safetensors"
        save_weights(model, folder / file, about(config, data.store.labels), only=own)
        kept += sum(parameter.numel() for name, parameter in model.named_parameters() if name in own)
        facts[device] = {"file": file, "clips": count, "validation_clips": len(heard.parts["validation"])}
    general = read_manifest(student)["facts"]
    artifact.finish(
        {
            "history": history,
            "devices": facts,
            "parameters": general["parameters"] + kept,  # of all that is kept: the general student, and each device's
            "macs": general["macs"],  # of one clip, by whichever of them hears it
        },
        SCRATCH,
    )


def load_specialized(folder: Path, student: Path, config: StudentConfig, scenes: int) -> dict[str, nn.Module]:
    """Return the networks by device, in evaluation form, of the finished specialization of `student` in `folder`."""
    networks = {}
    for device, facts in read_manifest(folder)["facts"]["devices"].items():
        networks[device] = load_model(student, config, scenes)
        networks[device].load_state_dict(
            {**networks[device].state_dict(), **load_file(stored_file(folder, facts["file"]))}
        )
    return networks


def adapted(model: nn.Module, config: SpecializeConfig) -> set[str]:
    """Return the names, in the state dict, of what is fine-tuned and kept for each device."""
    if config.weights == "all":
        return set(model.state_dict())
    modules = dict(model.named_modules())
    head = [name for name, module in modules.items() if isinstance(module, nn.Conv2d | nn.Linear)][-1]
    chosen = [head, *(name for name, module in modules.items() if isinstance(module, NORMALIZATIONS))]
    return {f"{name}.{own}" for name in chosen for own in modules[name].state_dict()}


def of_devices(networks: Mapping[str, nn.Module], devices: np.ndarray) -> dict[str | None, np.ndarray]:
    """Return which of the clips, recorded with `devices` (N,), each network hears; None stands for the general one."""
    rows: dict[str | None, np.ndarray] = {name: np.flatnonzero(devices == name) for name in networks}
    rows[None] = np.flatnonzero(~np.isin(devices, list(networks)))
    return {name: own for name, own in rows.items() if len(own)}


def _recipe(config: StudentConfig, specialize: SpecializeConfig) -> StudentConfig:
    optimizer = config.optimizer.scaled_to(specialize.epochs)
    augment = config.augment
    off = {name: getattr(augment, name).model_copy(update={"p": 0.0}) for name in ("dir", "freq_mixstyle")}
    return config.model_copy(
        update={
            "optimizer": optimizer.model_copy(update={"learning_rate": specialize.learning_rate, "average_epochs": 1}),
            "augment": augment.model_copy(update=off),
            "balance": 0.0,  # there is one device
            "select": "last",  # of a device's few validation clips the best epoch would be luck
        }
    )


def _heard(data: Dataset, device: str) -> Dataset:
    """Return the dataset with the device's own clips to validate on; with all, where it has none."""
    validation = data.parts["validation"]
    own = validation[data.store.device[validation] == device]
    return replace(data, parts={**data.parts, "validation": own if len(own) else validation})
