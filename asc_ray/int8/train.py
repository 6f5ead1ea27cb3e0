"""The training of an int8 student, from artifacts to an artifact.

The functions import the scheme themselves: torchao takes seconds, and the driver, which names them, does without.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from asc_ray.artifacts import Artifact, read_manifest, stored_file
from asc_ray.audio.frontend import LogMel
from asc_ray.int8.config import ONNX_MODEL, QATConfig, check_int8
from asc_ray.models.complexity import peak_activations
from asc_ray.models.registry import build
from asc_ray.students.config import StudentConfig
from asc_ray.students.cost import input_shape
from asc_ray.students.targets import SoftTargets, TargetFiles, read_soft_targets, student_clips
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Dataset, Source
from asc_ray.training.folder import SCRATCH, Metrics, OnEpoch, noted
from asc_ray.training.loop import fit
from asc_ray.training.validation import predict, validate
from asc_ray.training.weights import about, load_model, save_weights

FAKE_QUANTIZED = "fake-quantized.safetensors"


def train_int8(
    artifact: Artifact,
    source: Source,
    targets: TargetFiles | None,
    student: Path,
    config: StudentConfig,
    qat: QATConfig,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Train the finished `student` for int8, or quantize it without training, and write the int8 model.

    Raises ConfigError for a network that has no int8 form, which a search may have chosen.
    """
    check_int8(config.model.name)
    from asc_ray.int8.conversion import bytes_by_dtype, convert, round_biases
    from asc_ray.int8.onnx_form import export_onnx
    from asc_ray.int8.preparation import observing, prepare

    folder = artifact.open_partial()
    data = source.open()
    network = load_model(student, config, len(data.store.labels))
    peak = peak_activations(network, input_shape(config))["int8"]
    prepared = prepare(network, _example(config))
    history: list[Metrics] = []
    if qat.epochs:
        soft = read_soft_targets(data, targets)
        history = _fit_int8(prepared, folder, data, soft, student, config, qat, gpus, on_epoch)
    else:
        clips = student_clips(data)
        some = np.random.default_rng(config.seed).choice(clips, min(qat.calibration_clips, len(clips)), replace=False)
        with observing(prepared):
            predict(prepared, LogMel(config.frontend), data.store, some, torch.device("cpu"))
    # For channels-last weights torch makes a graph that copies by strides, which no engine joins with anything.
    prepared.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    round_biases(prepared)
    int8 = convert(prepared)
    save_weights(prepared, folder / FAKE_QUANTIZED, about(config, data.store.labels))
    export_onnx(int8, folder / ONNX_MODEL)
    artifact.finish(
        {
            "history": history,
            "bytes": bytes_by_dtype(int8),
            "peak_activations": peak,
            "validation": validate(int8, LogMel(config.frontend), data, torch.device("cpu")),
            "validation_clips": len(data.parts["validation"]),
        },
        SCRATCH,
    )


def _fit_int8(
    prepared: nn.Module,
    folder: Path,
    data: Dataset,
    soft: SoftTargets | None,
    student: Path,
    config: StudentConfig,
    qat: QATConfig,
    gpus: float,
    on_epoch: OnEpoch,
) -> list[Metrics]:
    from asc_ray.int8.preparation import freeze, set_training

    settings = config.optimizer.scaled_to(qat.epochs).model_copy(
        update={"learning_rate": qat.learning_rate, "weight_decay": qat.weight_decay, "average_epochs": 1}
    )
    # The last weights are taken, because the best may come from before the observers were frozen. Not bf16, because its
    # steps are coarser than those of fake quantization. Not compiled, because the graph's form changes twice an epoch.
    precision = "fp32" if config.precision == "bf16" else config.precision
    own = {"optimizer": settings, "select": "last", "precision": precision, "compile": False}
    recipe = config.model_copy(update=own)

    def set_mode(module: nn.Module, epoch: int | None) -> None:
        set_training(module, epoch is not None)
        if epoch is not None and epoch >= qat.epochs - qat.frozen_epochs:
            freeze(module)

    distillation = None if soft is None else config.distillation
    trained = read_manifest(student)["facts"]["history"]
    if distillation and trained:  # lambda keeps its value from the student's last epoch
        distillation = distillation.model_copy(update={"label_weight": trained[-1]["label_weight"]})
    return fit(
        prepared,
        recipe,
        data,
        student_clips(data),
        folder / "checkpoints",
        distillation=distillation,
        soft_targets=soft,
        gpus=gpus,
        on_epoch=noted(folder, qat.epochs, on_epoch),
        set_mode=set_mode,
    )


def load_fake_quantized(folder: Path, recipe: Recipe, scenes: int) -> nn.Module:
    """Return the network that the finished int8 training in `folder` trained and converted, in evaluation form."""
    from asc_ray.int8.preparation import prepare, set_training

    prepared = prepare(build(recipe.model, scenes, recipe.seed), _example(recipe))
    prepared.load_state_dict(load_file(stored_file(folder, FAKE_QUANTIZED)))
    set_training(prepared, False)
    return prepared


def load_int8(folder: Path, recipe: Recipe, scenes: int) -> nn.Module:
    """Return the int8 model, in torch, of a finished int8 training in `folder`: converted anew, equal to the bit.

    Reading torch's own file of such a model would execute what is in it; reading weights and a recipe does not.
    """
    from asc_ray.int8.conversion import convert

    return convert(load_fake_quantized(folder, recipe, scenes))


def _example(recipe: Recipe) -> torch.Tensor:
    return torch.zeros(input_shape(recipe, batch=2))
