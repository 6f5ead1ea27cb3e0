"""The scores of the ensemble and of all students on the test split, on which no earlier stage learns or scores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asc_ray.artifacts import Artifact, read_manifest, stored_file, stored_files
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, read_logits, write_logits
from asc_ray.ensemble.fuse import FUSION
from asc_ray.ensemble.fusion import Fusion
from asc_ray.evaluation.artifact import ANSWERS, EVALUATION, headline, score, score_ensemble
from asc_ray.files import write_atomically
from asc_ray.int8.config import ONNX_MODEL
from asc_ray.int8.train import load_fake_quantized
from asc_ray.plan import Plan
from asc_ray.resources import Resources
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.students.config import StudentConfig
from asc_ray.students.specialize import load_specialized, of_devices
from asc_ray.training.dataset import Source
from asc_ray.training.gpu import training_device
from asc_ray.training.validation import predict
from asc_ray.training.weights import load_model


def make(work: Work) -> None:
    plan = work.plan
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    resources = Resources(cpus=plan.config.logits.resources.cpus)
    ensemble = Job(plan.evaluation, evaluate_ensemble, (work.source, logits, plan.fusion.path), resources)
    work.together({"ensemble": ensemble} | evaluation_jobs(plan, plan.evaluations))


def evaluation_jobs(plan: Plan, names: Iterable[str]) -> dict[str, Job]:
    """Return the jobs that score the students and forms of them with these names on the test split."""
    config = next(iter(plan.student_configs().values()))
    source, resources = source_of(plan), plan.config.student_resources
    general = dict(zip(plan.specialized, plan.students.values(), strict=False))  # by the name of what is made of it
    return {
        name: Job(
            plan.evaluations[name],
            evaluate_specialized if name in general else evaluate_student,
            (
                source,
                plan.models[name].path,
                *([general[name].path] if name in general else []),
                config,
                resources.gpus,
            ),
            resources,
        )
        for name in names
    }


def evaluate_ensemble(artifact: Artifact, source: Source, logits: Mapping[str, Path], fusion: Path) -> None:
    """Score systems, average and fusion on the test split.

    Raises UserError for damaged files of logits.
    """
    folder = artifact.open_partial()
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    systems = [read_logits(stored_files(path, "test-*")) for path in logits.values()]
    values = Ensemble(systems, store.ids[test]).read()
    fused = Fusion.load(stored_file(fusion, FUSION)).apply(values)
    scores = score_ensemble(store, test, dict(zip(logits, values, strict=True)), fused)
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    artifact.finish({name: headline(e) for name, e in scores.systems.items()})


def evaluate_student(
    artifact: Artifact, source: Source, student: Path, config: StudentConfig, gpus: float = 0.0
) -> None:
    """Score a finished student on the test split, or its int8 form if that is what the folder `student` holds.

    Its logits are kept beside the scores.
    """
    folder = artifact.open_partial()
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    int8 = ONNX_MODEL in read_manifest(student)["files"]
    device = torch.device("cpu") if int8 else training_device(gpus)
    if int8:
        from asc_ray.int8.conversion import convert  # torchao takes seconds, and the driver does without
        from asc_ray.int8.onnx_form import OnnxModel

        # Its answers are compared with those of the fake-quantized network that was trained, and of onnxruntime.
        trained = load_fake_quantized(student, config, len(store.labels))
        model = convert(trained)
        others = {"fake_quantization": trained, "onnxruntime": OnnxModel(stored_file(student, ONNX_MODEL))}
    else:
        model, others = load_model(student, config, len(store.labels)).to(device), {}
    front_end = LogMel(config.frontend).to(device)
    outputs = predict(model, front_end, store, test, device)
    facts = _scored(folder, student.name, store, test, outputs)
    for name, other in others.items():
        own = predict(other, front_end, store, test, device)
        facts[f"agreement_with_{name}"] = float((own.argmax(1) == outputs.argmax(1)).float().mean())
        facts[f"difference_to_{name}"] = float((own - outputs).abs().max())
    artifact.finish(facts)


def evaluate_specialized(
    artifact: Artifact, source: Source, specialized: Path, student: Path, config: StudentConfig, gpus: float = 0.0
) -> None:
    """Score on the test split, with each clip's device known: by its network, or for unknown ones by the `student`."""
    folder = artifact.open_partial()
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    device = training_device(gpus)
    networks = load_specialized(specialized, student, config, len(store.labels))
    general = load_model(student, config, len(store.labels))
    front_end = LogMel(config.frontend).to(device)
    outputs = torch.empty(len(test), len(store.labels))
    heard_by = of_devices(networks, store.device[test])
    for name, rows in heard_by.items():
        network = general if name is None else networks[name]
        outputs[rows] = predict(network.to(device), front_end, store, test[rows], device)
    facts = _scored(folder, specialized.name, store, test, outputs)
    artifact.finish(facts | {"clips_of_unknown_devices": len(heard_by.get(None, ()))})


def _scored(folder: Path, name: str, store: ClipStore, test: np.ndarray, outputs: torch.Tensor) -> dict[str, Any]:
    """Write the scores of the logits (N, K) of the store's clips `test`, and the logits beside them."""
    scores = score(store, test, outputs.numpy())
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    metadata = {"system": name, "labels": json.dumps(store.labels), "corpus": store.corpus, "split": "test"}
    write_logits(folder / ANSWERS, store.ids[test], outputs.numpy(), metadata)
    return dict(headline(scores))
