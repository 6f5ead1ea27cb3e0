"""The training of a student, from artifacts to an artifact."""

from pathlib import Path

from torch import nn

from asc_ray.artifacts import Artifact
from asc_ray.models.complexity import complexity
from asc_ray.models.normalization import ResidualNorm
from asc_ray.models.pretrained import load_published
from asc_ray.models.registry import build
from asc_ray.students.config import StudentConfig
from asc_ray.students.cost import input_shape
from asc_ray.students.targets import SoftTargets, TargetFiles, read_soft_targets, student_clips
from asc_ray.training.dataset import Dataset, Source
from asc_ray.training.folder import SCRATCH, WEIGHTS, Metrics, OnEpoch, noted
from asc_ray.training.loop import fit
from asc_ray.training.weights import about, save_weights, started


def train_student(
    artifact: Artifact,
    source: Source,
    targets: TargetFiles | None,
    config: StudentConfig,
    gpus: float = 0.0,
    on_epoch: OnEpoch = lambda metrics: None,
) -> None:
    """Train a student on all training clips outside the validation part, with the soft `targets`.

    With `config.checkpoint` it takes that file's weights instead. Raises UserError where they do not fit.
    """
    folder = artifact.open_partial()
    data = source.open()
    model, known, start = build(config.model, len(data.store.labels), config.seed), True, None
    if config.checkpoint:
        known = load_published(model, config.checkpoint, about(config, data.store.labels))
        history = []
    else:
        start = started(model, config, data.store.labels)
        soft = read_soft_targets(data, targets)
        note = noted(folder, config.optimizer.epochs, on_epoch)
        history = fit_student(model, config, data, soft, folder / "checkpoints", gpus, note)
    save_weights(model, folder / WEIGHTS, about(config, data.store.labels))
    shape = input_shape(config)
    cost = complexity(model.cpu(), shape)
    learned = {name: layer.lambda_.item() for name, layer in model.named_modules() if isinstance(layer, ResidualNorm)}
    artifact.finish(
        {
            "recipe": config.model_dump(mode="json"),  # a search's best, where the artifact's key has what was searched
            "history": history,
            "parameters": cost.parameters,
            "macs": cost.macs,
            "bytes": cost.bytes,
            "input": shape,
            "residual_lambda": learned,
            "on_trust": not known,
            "started_from": start,
        },
        SCRATCH,
    )


def fit_student(
    model: nn.Module,
    config: StudentConfig,
    data: Dataset,
    soft: SoftTargets | None,
    checkpoints: Path,
    gpus: float,
    on_epoch: OnEpoch,
) -> list[Metrics]:
    """Run `fit` on the student's clips with what `read_soft_targets` gave; a search trial does only this."""
    return fit(
        model,
        config,
        data,
        student_clips(data),
        checkpoints,
        distillation=None if soft is None else config.distillation,
        soft_targets=soft,
        gpus=gpus,
        on_epoch=on_epoch,
    )
