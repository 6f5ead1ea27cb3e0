"""The ensemble as stored logits: fusing it into soft targets, and scoring everything that the pipeline made."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from asc_ray.artifacts import Artifact, write_atomically
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import join, read_logits, write_logits
from asc_ray.fusion import Fusion, FusionConfig, fit
from asc_ray.training.dataset import Source
from asc_ray.training.evaluation import Evaluation, device_groups, evaluate
from asc_ray.training.loop import predict, training_device
from asc_ray.training.systems import StudentConfig, load_int8, load_model

FUSION = "fusion.json"
EVALUATION = "evaluation.json"


def read_systems(logits: Mapping[str, Path], ids: np.ndarray) -> np.ndarray:
    """Logits (S, N, K) of the systems, in the mapping's order, for the clips `ids`."""
    return join([read_logits(folder) for folder in logits.values()], ids)


def fuse_systems(artifact: Artifact, source: Source, logits: Mapping[str, Path], config: FusionConfig) -> None:
    """Learn eq. 4 on the part `fusion`, which trained no teacher, and write soft targets of the training split.

    `targets/fused` and `targets/average` hold logits free of temperature. The figures beside them are for the part
    `validation`, which neither the teachers nor the fusion have seen. The test split is not read.
    """
    folder = artifact.open_partial()
    data = source.open()
    store, systems = data.store, tuple(logits)
    learn, held_out = data.parts["fusion"], data.parts["validation"]
    fusion = fit(
        read_systems(logits, store.ids[learn]),
        store.scene[learn],
        systems=systems,
        classes=store.labels,
        groups=store.location[learn],
        ridge=config.ridge,
        class_prior=config.class_prior,
        nonnegative=config.nonnegative,
    )
    fusion.save(folder / FUSION)
    train = np.flatnonzero(store.split == "train")
    values = read_systems(logits, store.ids[train])
    for name, soft in {"fused": fusion.apply(values), "average": values.mean(axis=0)}.items():
        (folder / "targets" / name).mkdir(parents=True, exist_ok=True)
        metadata = {
            "system": name,
            "labels": json.dumps(store.labels),
            "corpus": store.corpus,
            "config": artifact.key,
            "split": "train",
        }
        write_logits(folder / "targets" / name / "part-00000.arrow", store.ids[train], soft, metadata)
    scores = score_ensemble(store, held_out, read_systems(logits, store.ids[held_out]), systems, fusion)
    figures = {name: {"log_loss": e.log_loss, "accuracy": e.accuracy} for name, e in scores.items()}
    artifact.finish(
        {
            "weights": dict(zip(systems, map(float, fusion.weights), strict=True)),
            "biases": dict(zip(store.labels, map(float, fusion.biases), strict=True)),
            "clips": len(learn),
            "ridge": fusion.ridge,
            "objective_before": fusion.objective_before,
            "objective_after": fusion.objective_after,
            "iterations": fusion.iterations,
            "validation": figures,
        }
    )


def score_ensemble(
    store: ClipStore, rows: np.ndarray, logits: np.ndarray, systems: tuple[str, ...], fusion: Fusion
) -> dict[str, Evaluation]:
    """Every single system, their average, and the fusion, on the same clips; logits (S, N, K)."""
    outputs = dict(zip(systems, logits, strict=True)) | {"average": logits.mean(axis=0), "fusion": fusion.apply(logits)}
    return {name: score(store, rows, values) for name, values in outputs.items()}


def score(store: ClipStore, rows: np.ndarray, logits: np.ndarray) -> Evaluation:
    """Logits (N, K) of the store's clips `rows` against their scenes, by device group."""
    train = store.split == "train"
    groups = device_groups(store.device[train], store.device[~train])
    return evaluate(
        logits, store.scene[rows], store.device[rows], store.labels, unseen=groups["unseen"], real=groups["real"]
    )


def evaluate_systems(
    artifact: Artifact,
    source: Source,
    logits: Mapping[str, Path],
    fusion: Path,
    student: Path,
    student_config: StudentConfig,
    int8: Path,
) -> None:
    """Score teachers, average, fusion and both students on the test split; the only stage that looks at it."""
    folder = artifact.open_partial()
    data = source.open()
    store, test = data.store, data.parts["test"]
    scores = score_ensemble(
        store, test, read_systems(logits, store.ids[test]), tuple(logits), Fusion.load(fusion / FUSION)
    )
    device = training_device()
    fp32 = load_model(student, student_config, len(store.labels)).to(device)
    outputs = predict(fp32, LogMel(student_config.frontend).to(device), store, test, device)
    scores["student fp32"] = score(store, test, outputs.numpy())
    quantized = predict(load_int8(int8), LogMel(student_config.frontend), store, test, torch.device("cpu"))
    scores["student int8"] = score(store, test, quantized.numpy())
    write_atomically(folder / EVALUATION, json.dumps({name: e.model_dump() for name, e in scores.items()}))
    artifact.finish({name: {"accuracy": e.accuracy, "log_loss": e.log_loss} for name, e in scores.items()})


def read_evaluation(folder: Path) -> dict[str, Evaluation]:
    return {
        name: Evaluation.model_validate(value) for name, value in json.loads((folder / EVALUATION).read_text()).items()
    }
