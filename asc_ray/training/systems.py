"""The trainings of the pipeline: a teacher, a student, an int8 student, each from artifacts to an artifact.

Nothing here knows where it runs. Every function resumes from what its artifact's partial folder holds, and finishes
the artifact itself, so that finished work survives the driver.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import nn

from asc_ray.artifacts import Artifact, read_manifest, stored_file, write_record
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import CLIP_SAMPLES
from asc_ray.data.logits import write_logits
from asc_ray.data.parts import note_part
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.complexity import Complexity, Limits, complexity
from asc_ray.models.normalization import ResidualNorm
from asc_ray.models.passt import PasstConfig
from asc_ray.models.pretrained import load_published, metadata, start_from
from asc_ray.models.registry import build, folded
from asc_ray.section import Section
from asc_ray.training import parallel
from asc_ray.training.dataset import Dataset, SoftTargets, Source
from asc_ray.training.distillation import DistillationConfig
from asc_ray.training.loop import (
    Metrics,
    NotFinite,
    OnEpoch,
    Recipe,
    fit,
    predict,
    predict_all,
    refuse_not_finite,
    training_device,
    validate,
)

WEIGHTS = "model.safetensors"
INT8_FORM = 2  # part of its key: raise it when what an int8 training leaves is another thing
FAKE_QUANTIZED = "fake-quantized.safetensors"
ONNX_MODEL = "model.onnx"
PROGRESS = "progress.json"
SCRATCH = ("checkpoints", PROGRESS)

Precision = Literal["fp32", "bf16"]


class StudentConfig(Recipe):
    """A recipe and its soft targets."""

    checkpoint: Path | None = Field(None, description="a published checkpoint of the model, taken instead of training")
    seeds: int = Field(1, ge=1, le=100, description="so many students are trained, with `seed` and those after it")
    distillation: DistillationConfig = DistillationConfig()

    @model_validator(mode="after")
    def _one_checkpoint(self) -> Self:
        if self.checkpoint and self.seeds > 1:
            raise ValueError(f"seeds: {self.seeds}, but a student from a checkpoint is not trained; allowed is 1")
        return self


class QATConfig(Section):
    """Quantization-aware training from the trained student; augmentation and objective stay the student's."""

    epochs: int = Field(20, ge=0, description="0: post-training quantization, weights as they are")
    calibration_clips: int = Field(512, ge=1, description="training clips that give the ranges with `epochs: 0`")
    frozen_epochs: int = Field(4, ge=0, description="last epochs with observers and batch-norm statistics frozen")
    learning_rate: float = Field(5e-5, gt=0.0, le=1.0, description="instead of the student's; its schedule stays")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0, description="instead of the student's")

    @model_validator(mode="after")
    def _observes_first(self) -> Self:
        if 0 < self.epochs <= self.frozen_epochs:
            raise ValueError(f"frozen_epochs: {self.frozen_epochs} of {self.epochs} epochs leaves none to observe in")
        return self


def network_cost(recipe: Recipe, classes: int) -> Complexity:
    """What the recipe's network costs on its front end. Raises ConfigError where it does not work."""
    shape = input_shape(recipe)
    try:
        return complexity(build(recipe.model, classes), shape)
    except (RuntimeError, ValueError):
        mels, frames = shape[2:]
        raise ConfigError(
            f"{recipe.model.name} does not work on the {mels} mels x {frames} frames of a clip; change the network, "
            "frontend.mels or frontend.hop"
        ) from None


def student_cost(student: Recipe, limits: Limits, classes: int) -> Complexity:
    """`network_cost` of a student. Raises ConfigError also where it is over the device's limits."""
    cost = network_cost(student, classes)
    if over := limits.exceeded(cost):
        raise ConfigError(
            f"{student.model.name} is too large for the device ({'; '.join(over)}); choose a smaller one, or raise the "
            "limits"
        )
    return cost


def input_shape(recipe: Recipe, batch: int = 1) -> tuple[int, int, int, int]:
    """Shape (batch, 1, mels, frames) of what the recipe's model sees."""
    return (batch, 1, recipe.frontend.mels, recipe.frontend.frames(CLIP_SAMPLES))


def train_teacher(
    artifact: Artifact,
    source: Source,
    recipe: Recipe,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Train one system of the ensemble on the part `train`, on all ranks of a torch.distributed group together."""
    folder = artifact.open_partial()
    data = source.open()
    model, started = build(recipe.model, len(data.store.labels), recipe.seed), None
    if isinstance(recipe.model, PasstConfig) and recipe.model.pretrained:
        started = start_from(model, recipe.model.pretrained, data.store.labels)
    history = fit(
        model,
        recipe,
        data,
        data.parts["train"],
        folder / "checkpoints",
        gpus=gpus,
        on_epoch=_noted(folder, recipe, on_epoch),
    )
    if parallel.rank() == 0:
        _save_weights(model, folder / WEIGHTS, about(recipe, data.store.labels))
        parameters = sum(p.numel() for p in model.parameters())
        artifact.finish({"history": history, "parameters": parameters, "started_from": started}, SCRATCH)


def import_teacher(artifact: Artifact, file: Path, recipe: Recipe, labels: Sequence[str]) -> None:
    """A system from a published checkpoint instead of a training. Raises UserError where it does not fit."""
    model = build(recipe.model, len(labels), recipe.seed)
    known = load_published(model, file, about(recipe, labels))
    _save_weights(model, artifact.open_partial() / WEIGHTS, about(recipe, labels))
    parameters = sum(p.numel() for p in model.parameters())
    artifact.finish({"history": [], "parameters": parameters, "imported": file.name, "on_trust": not known})


def about(recipe: Recipe, labels: Sequence[str]) -> dict[str, Any]:
    """What a file of weights says of them, and what must agree where they are used again."""
    return {"labels": list(labels), "frontend": recipe.frontend.model_dump(exclude={"fmax_jitter"})}


def train_student(
    artifact: Artifact,
    source: Source,
    targets: SoftTargets | None,
    config: StudentConfig,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Train a student on all clips but the validation part, from the soft `targets`.

    With `config.checkpoint` it has that file's weights instead. Raises UserError where they do not fit.
    """
    folder = artifact.open_partial()
    data = source.open()
    model, known = build(config.model, len(data.store.labels), config.seed), True
    if config.checkpoint:
        known = load_published(model, config.checkpoint, about(config, data.store.labels))
        history = []
    else:
        soft = soft_targets(data, targets)
        history = fit_student(model, config, data, soft, folder / "checkpoints", gpus, _noted(folder, config, on_epoch))
    _save_weights(model, folder / WEIGHTS, about(config, data.store.labels))
    shape = input_shape(config)
    cost = complexity(model.cpu(), shape)
    learned = {name: layer.lambda_.item() for name, layer in model.named_modules() if isinstance(layer, ResidualNorm)}
    artifact.finish(
        {
            "history": history,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "input": shape,
            "residual_lambda": learned,
            "on_trust": not known,
        },
        SCRATCH,
    )


def fit_student(
    model: nn.Module,
    config: StudentConfig,
    data: Dataset,
    soft: np.ndarray | None,
    checkpoints: Path,
    gpus: float,
    on_epoch: OnEpoch,
) -> list[Metrics]:
    """`fit` with the student's clips and what `soft_targets` gave; a search trial is this and no more."""
    return fit(
        model,
        config,
        data,
        student_clips(data),
        checkpoints,
        distillation=None if soft is None else config.distillation,
        soft_logits=soft,
        gpus=gpus,
        on_epoch=on_epoch,
    )


def train_int8(
    artifact: Artifact,
    source: Source,
    targets: SoftTargets | None,
    student: Path,
    config: StudentConfig,
    qat: QATConfig,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Quantization-aware training of the finished `student`, or post-training quantization, and the int8 model."""
    from asc_ray.training import quantization  # torchao takes seconds to import, and only this needs it
    from asc_ray.training.onnx_model import export_onnx

    folder = artifact.open_partial()
    data = source.open()
    prepared = quantization.prepare(load_model(student, config, len(data.store.labels)), _example(config))
    history: list[Metrics] = []
    if qat.epochs:
        history = _fit_int8(prepared, folder, data, soft_targets(data, targets), student, config, qat, gpus, on_epoch)
    else:
        clips = student_clips(data)
        some = np.random.default_rng(config.seed).choice(clips, min(qat.calibration_clips, len(clips)), replace=False)
        with quantization.observing(prepared):
            predict(prepared, LogMel(config.frontend), data.store, some, torch.device("cpu"))
    # Of weights that lie channels last torch makes a graph that copies by strides, which no engine joins with anything.
    prepared.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    quantization.round_biases(prepared)
    int8 = quantization.convert(prepared)
    _save_weights(prepared, folder / FAKE_QUANTIZED, about(config, data.store.labels))
    export_onnx(int8, folder / ONNX_MODEL)
    artifact.finish(
        {
            "history": history,
            "bytes": quantization.bytes_by_dtype(int8),
            "validation": validate(int8, LogMel(config.frontend), data, torch.device("cpu")),
        },
        SCRATCH,
    )


def _fit_int8(
    prepared: nn.Module,
    folder: Path,
    data: Dataset,
    soft: np.ndarray | None,
    student: Path,
    config: StudentConfig,
    qat: QATConfig,
    gpus: float,
    on_epoch: OnEpoch,
) -> list[Metrics]:
    from asc_ray.training import quantization

    settings = config.optimizer.scaled_to(qat.epochs).model_copy(
        update={"learning_rate": qat.learning_rate, "weight_decay": qat.weight_decay, "average_epochs": 1}
    )
    # The last weights, whatever the student's: the best may be of an epoch before the observers were frozen. The steps
    # of fake quantization are finer than those of bf16. And a graph whose form changes twice an epoch is not compiled.
    precision = "fp32" if config.precision == "bf16" else config.precision
    own = {"optimizer": settings, "select": "last", "precision": precision, "compile": False}
    recipe = config.model_copy(update=own)

    def freeze_at_the_end(module: nn.Module, epoch: int) -> None:
        if epoch >= qat.epochs - qat.frozen_epochs:
            quantization.freeze(module)

    distillation = None if soft is None else config.distillation
    trained = read_manifest(student)["facts"]["history"]
    if distillation and trained:  # lambda stays what it was in the student's last epoch
        distillation = distillation.model_copy(update={"label_weight": trained[-1]["label_weight"]})
    return fit(
        prepared,
        recipe,
        data,
        student_clips(data),
        folder / "checkpoints",
        distillation=distillation,
        soft_logits=soft,
        gpus=gpus,
        on_epoch=_noted(folder, recipe, on_epoch),
        set_training=quantization.set_training,
        before_epoch=freeze_at_the_end,
    )


@dataclass(frozen=True)
class Inference:
    """One system's share of an inference: its weights, and the file that takes its logits.

    `teachers`: one, or with cross-fitting that of every fold.
    """

    system: str
    teachers: tuple[Path, ...]
    recipe: Recipe
    file: Path
    metadata: Mapping[str, str]


def infer(
    systems: Sequence[Inference], source: Source, rows: np.ndarray, batch: int, precision: Precision, gpus: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Write the logits of finished teachers that share a front end for the store's clips `rows`, all splits alike.

    With cross-fitting a clip's logits are those of the teacher that did not see it, and the mean of all folds' teachers
    where none did. The clips are read and transformed once for all systems, and batch norms are folded into the
    convolutions. Returns the record of each system's part, for `bf16` with the largest difference to fp32 in a first
    batch. Raises UserError for logits that are not finite.
    """
    store, fold = source.store(), np.full(len(rows), -1)
    if len(systems[0].teachers) > 1:
        for number, unseen in enumerate(source.open().folds):
            fold[np.isin(rows, unseen)] = number
    device = training_device(gpus)
    front_end = LogMel(systems[0].recipe.frontend).to(device)
    models = [[folded(load_model(path, s.recipe, len(store.labels))) for path in s.teachers] for s in systems]
    for model in chain(*models):
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    logits = torch.empty(len(systems), len(rows), len(store.labels))
    differences = torch.zeros(len(systems))
    for number in np.unique(fold).tolist():
        here = np.flatnonzero(fold == number)
        asked = [own if number < 0 else own[number : number + 1] for own in models]

        def predicted(clips: np.ndarray, bf16: bool, asked: list[list[nn.Module]] = asked) -> torch.Tensor:
            each = predict_all(list(chain(*asked)), front_end, store, rows[clips], device, batch, bf16)
            return torch.stack([own.mean(dim=0) for own in each.split([len(own) for own in asked])])

        logits[:, here] = predicted(here, precision == "bf16")
        if precision == "bf16":
            first = here[:batch]
            worst = (predicted(first, False) - logits[:, first]).abs().amax(dim=(1, 2))
            differences = torch.maximum(differences, worst)
    records = {}
    for system, values, difference in zip(systems, logits, differences.tolist(), strict=True):
        try:
            refuse_not_finite(values, store.ids[rows])
        except NotFinite as error:
            raise UserError(f"system {system.system}: {error}; look at its weights, or train it again") from None
        weights = [read_manifest(path)["files"][WEIGHTS]["sha256"] for path in system.teachers]
        metadata = {"labels": json.dumps(store.labels), "corpus": store.corpus, "checkpoint": " ".join(weights)}
        write_logits(system.file, store.ids[rows], values.numpy(), {**system.metadata, **metadata})
        facts = {"bf16_difference": difference} if precision == "bf16" else {}
        records[system.system] = note_part(system.file, store.ids[rows], facts)
    return records


def load_model(folder: Path, recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's network with the weights that a finished training left in `folder`, in evaluation form."""
    model = build(recipe.model, classes, recipe.seed)
    model.load_state_dict(load_file(stored_file(folder, WEIGHTS)))
    return model.eval()


def load_fake_quantized(folder: Path, recipe: Recipe, classes: int) -> nn.Module:
    """What the finished int8 training in `folder` trained and converted, in evaluation form."""
    from asc_ray.training import quantization

    prepared = quantization.prepare(build(recipe.model, classes, recipe.seed), _example(recipe))
    prepared.load_state_dict(load_file(stored_file(folder, FAKE_QUANTIZED)))
    quantization.set_training(prepared, False)
    return prepared


def load_int8(folder: Path, recipe: Recipe, classes: int) -> nn.Module:
    """The int8 model in torch, of a finished int8 training in `folder`: converted anew, equal to the bit.

    torch's own file of such a model is read by executing what is in it; weights and a recipe are not.
    """
    from asc_ray.training import quantization

    return quantization.convert(load_fake_quantized(folder, recipe, classes))


def _example(recipe: Recipe) -> torch.Tensor:
    return torch.zeros(input_shape(recipe, batch=2))


def student_clips(data: Dataset) -> np.ndarray:
    """What students learn from: every training clip outside the validation part."""
    return np.union1d(data.parts["train"], data.parts["fusion"])


def soft_targets(data: Dataset, targets: SoftTargets | None) -> np.ndarray | None:
    """Logits (clips of the store, K) from `targets`, one row at least for each of the student's clips.

    None for labels alone. Raises UserError where a clip has none.
    """
    if targets is None:
        return None
    soft, clips = data.soft_logits(targets), student_clips(data)
    missing = np.isnan(soft[clips]).any(axis=1)
    if missing.any():
        first = ", ".join(str(name) for name in data.store.ids[clips[missing]][:5])
        raise UserError(
            f"{targets.artifact}: {missing.sum()} training clips have no soft target, first {first}; fuse again"
        )
    return soft


def _save_weights(model: nn.Module, file: Path, about: Mapping[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(tensors, file, metadata(about))


def _noted(folder: Path, recipe: Recipe, on_epoch: OnEpoch) -> OnEpoch:
    """`on_epoch` that also leaves a note in the folder, for `asc-ray status` from another shell."""

    def note(metrics: Metrics) -> None:
        write_record(folder / PROGRESS, {**metrics, "epochs": recipe.optimizer.epochs})
        on_epoch(metrics)

    return note
