"""The scores of the ensemble and of all students on the test split, on which no earlier stage learns or scores."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from asc_ray.artifacts import Artifact, read_manifest, stored_file, stored_files, write_atomically
from asc_ray.audio.frontend import LogMel
from asc_ray.data.logits import Ensemble, read_logits, write_logits
from asc_ray.ensemble.fuse import FUSION
from asc_ray.ensemble.fusion import Fusion
from asc_ray.evaluation.artifact import ANSWERS, EVALUATION, headline, score, score_ensemble
from asc_ray.int8.config import ONNX_MODEL
from asc_ray.int8.train import load_fake_quantized
from asc_ray.plan import Plan
from asc_ray.resources import Resources
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.students.config import StudentConfig
from asc_ray.training.dataset import Source
from asc_ray.training.folder import load_model
from asc_ray.training.gpu import training_device
from asc_ray.training.validation import predict


def make(work: Work) -> None:
    plan = work.plan
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    resources = Resources(cpus=plan.config.logits.resources.cpus)
    ensemble = Job(plan.evaluation, evaluate_ensemble, (work.source, logits, plan.fusion.path), resources)
    work.together({"ensemble": ensemble} | evaluation_jobs(plan, plan.evaluations))


def evaluation_jobs(plan: Plan, names: Iterable[str]) -> dict[str, Job]:
    """Return the jobs that score the students and int8 forms with these names on the test split."""
    models, config = plan.students | plan.int8, next(iter(plan.student_configs().values()))
    source, resources = source_of(plan), plan.config.student_resources
    return {
        name: Job(
            plan.evaluations[name], evaluate_student, (source, models[name].path, config, resources.gpus), resources
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
    scores = score(store, test, outputs.numpy())
    write_atomically(folder / EVALUATION, scores.model_dump_json())
    metadata = {"system": student.name, "labels": json.dumps(store.labels), "corpus": store.corpus, "split": "test"}
    write_logits(folder / ANSWERS, store.ids[test], outputs.numpy(), metadata)
    facts = headline(scores)
    for name, other in others.items():
        own = predict(other, front_end, store, test, device)
        facts[f"agreement_with_{name}"] = float((own.argmax(1) == outputs.argmax(1)).float().mean())
        facts[f"difference_to_{name}"] = float((own - outputs).abs().max())
    artifact.finish(facts)
