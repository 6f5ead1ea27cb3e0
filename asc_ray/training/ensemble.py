"""The ensemble as stored logits: fusing it into soft targets, and scoring everything that the pipeline made."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from asc_ray.artifacts import Artifact, stored_file, stored_files, write_atomically
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, Logits, read_logits, write_logits
from asc_ray.fusion import Fusion, FusionConfig, Ridge, fit_shards, objectives
from asc_ray.fusion.newton import Mapper, Shard
from asc_ray.training.dataset import Source
from asc_ray.training.evaluation import Evaluation, Scores, device_groups, evaluate, gain
from asc_ray.training.loop import predict, training_device
from asc_ray.training.systems import ONNX_MODEL, StudentConfig, load_fake_quantized, load_model

FUSION = "fusion.json"
EVALUATION = "evaluation.json"
SHARD_CLIPS = 65_536


def fuse_systems(
    artifact: Artifact, source: Source, logits: Mapping[str, Path], config: FusionConfig, mapper: Mapper = map
) -> None:
    """Learn eq. 4 on the part `fusion`, and write soft targets of the training split.

    `targets/fused` and `targets/average` hold logits free of temperature. The scores beside them are for the part
    `validation`, which neither the teachers nor the fusion have seen. Of the test split nothing is read: neither its
    logits' files are opened nor its clips' labels.

    Raises UserError for damaged files of logits, and for what `fit` and `Ensemble` refuse.
    """
    folder = artifact.open_partial()
    data = source.open()
    store, learn, held_out = data.store, data.parts["fusion"], data.parts["validation"]
    systems = {name: read_logits(stored_files(path, "train-*")) for name, path in logits.items()}

    def learned(some: Mapping[str, Logits], ridge: Ridge) -> Fusion:
        return fit_shards(
            shards(some, store, learn),
            systems=tuple(some),
            classes=store.labels,
            groups=store.location[learn],
            ridge=ridge,
            class_prior=config.class_prior,
            nonnegative=config.nonnegative,
            mapper=mapper,
        )

    fusion = learned(systems, config.ridge)
    fusion.save(folder / FUSION)
    _write_targets(folder / "targets", systems, store, fusion, artifact.key)

    values = Ensemble(list(systems.values()), store.ids[held_out]).read()
    scores = score_ensemble(store, held_out, values, tuple(systems), fusion)
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    without = {}
    for position, name in enumerate(systems) if len(systems) > 1 else ():
        others = learned({other: value for other, value in systems.items() if other != name}, fusion.ridge)
        rest = score(store, held_out, others.apply(np.delete(values, position, axis=0)))
        without[name] = _figures(rest) | {"objective": others.objective_after}
    artifact.finish(
        {
            "data": config.data,
            "clips": fusion.clips,
            "ridge": fusion.ridge,
            "objective_before": fusion.objective_before,
            "objective_after": fusion.objective_after,
            "iterations": fusion.iterations,
            "notes": fusion.notes,
            "weights": dict(zip(systems, fusion.weights.tolist(), strict=True)),
            "biases": dict(zip(store.labels, fusion.biases.tolist(), strict=True)),
            "objectives": objectives(
                shards(systems, store, learn),
                systems=tuple(systems),
                classes=store.labels,
                class_prior=config.class_prior,
                mapper=mapper,
            ),
            "validation": {name: _figures(e) for name, e in scores.systems.items()},
            "validation_gain": scores.gain.model_dump(),
            "validation_without": without,
        }
    )


def shards(systems: Mapping[str, Logits], store: ClipStore, rows: np.ndarray) -> list[Shard]:
    """The store's clips `rows`, to be read in pieces."""
    ensemble, scene = Ensemble(list(systems.values()), store.ids[rows]), store.scene[rows]
    some = [slice(start, start + SHARD_CLIPS) for start in range(0, len(rows), SHARD_CLIPS)]
    return [Shard(ensemble.piece(piece), scene[piece]) for piece in some]


def _write_targets(folder: Path, systems: Mapping[str, Logits], store: ClipStore, fusion: Fusion, key: str) -> None:
    train = np.flatnonzero(store.split == "train")
    for index, shard in enumerate(shards(systems, store, train)):
        values, ids = shard.read(), store.ids[train[index * SHARD_CLIPS :][: len(shard.labels)]]
        for name, soft in {"fused": fusion.apply(values), "average": values.mean(axis=0)}.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            metadata = {"system": name, "labels": json.dumps(store.labels), "corpus": store.corpus}
            metadata |= {"config": key, "split": "train"}
            write_logits(folder / name / f"train-{index:05d}.arrow", ids, soft, metadata)


def score_ensemble(
    store: ClipStore, rows: np.ndarray, logits: np.ndarray, systems: tuple[str, ...], fusion: Fusion
) -> Scores:
    """Every single system, their average, and the fusion, on the same clips; logits (S, N, K)."""
    outputs = dict(zip(systems, logits, strict=True)) | {"average": logits.mean(axis=0), "fusion": fusion.apply(logits)}
    return Scores(
        systems={name: score(store, rows, values) for name, values in outputs.items()},
        gain=gain(outputs["average"], outputs["fusion"], store.scene[rows], store.location[rows]),
    )


def score(store: ClipStore, rows: np.ndarray, logits: np.ndarray) -> Evaluation:
    """Logits (N, K) of the store's clips `rows` against their scenes, by device group."""
    groups = device_groups(store.device[store.split == "train"], store.device[rows])
    return evaluate(
        logits, store.scene[rows], store.device[rows], store.labels, unseen=groups["unseen"], real=groups["real"]
    )


def evaluate_ensemble(artifact: Artifact, source: Source, logits: Mapping[str, Path], fusion: Path) -> None:
    """Score teachers, average and fusion on the test split; no stage before looks there.

    Raises UserError for damaged files of logits.
    """
    folder = artifact.open_partial()
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    systems = [read_logits(stored_files(path, "test-*")) for path in logits.values()]
    values = Ensemble(systems, store.ids[test]).read()
    scores = score_ensemble(store, test, values, tuple(logits), Fusion.load(stored_file(fusion, FUSION)))
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    artifact.finish({name: _figures(e) for name, e in scores.systems.items()})


def evaluate_student(
    artifact: Artifact, source: Source, student: Path, config: StudentConfig, gpus: float = 0.0
) -> None:
    """Score a finished student, or with a folder that holds one its int8 form, on the test split."""
    folder = artifact.open_partial()
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    int8 = (student / ONNX_MODEL).is_file()
    device = torch.device("cpu") if int8 else training_device(gpus)
    if int8:
        # What was trained is what computes: the same clips with fake quantization, and in onnxruntime's 8-bit kernels.
        from asc_ray.training import quantization
        from asc_ray.training.onnx_model import OnnxModel

        trained = load_fake_quantized(student, config, len(store.labels))
        model = quantization.convert(trained)
        others = {"fake_quantization": trained, "onnxruntime": OnnxModel(stored_file(student, ONNX_MODEL))}
    else:
        model, others = load_model(student, config, len(store.labels)).to(device), {}
    front_end = LogMel(config.frontend).to(device)
    outputs = predict(model, front_end, store, test, device)
    scores = score(store, test, outputs.numpy())
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    facts = _figures(scores)
    for name, other in others.items():
        own = predict(other, front_end, store, test, device)
        facts[f"agreement_with_{name}"] = float((own.argmax(1) == outputs.argmax(1)).float().mean())
        facts[f"difference_to_{name}"] = float((own - outputs).abs().max())
    artifact.finish(facts)


def read_scores(folder: Path) -> Scores:
    return Scores.model_validate_json(stored_file(folder, EVALUATION).read_text())


def read_evaluation(folder: Path) -> Evaluation:
    return Evaluation.model_validate_json(stored_file(folder, EVALUATION).read_text())


def _figures(e: Evaluation) -> dict[str, float]:
    return {"accuracy": e.accuracy, "log_loss": e.log_loss, "calibration_error": e.calibration_error}
