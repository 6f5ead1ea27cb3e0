"""Gathering of what the report shows from the artifacts of a finished configuration."""

import json
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import yaml

from asc_ray.artifacts import Artifact, stored_file
from asc_ray.ensemble.fuse import FUSION
from asc_ray.ensemble.fusion import Fusion
from asc_ray.ensemble.weak import Standing, far_below
from asc_ray.evaluation.artifact import Scores, read_scores
from asc_ray.evaluation.gains import Gain
from asc_ray.evaluation.seeds import OverSeeds
from asc_ray.int8.bundle import frontend_of
from asc_ray.int8.config import ONNX_MODEL
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.report.forms import report_rows
from asc_ray.report.page import (
    ComplexityRow,
    CorpusSummary,
    FusionSection,
    ReportData,
    StageTime,
    SystemResult,
    render,
)
from asc_ray.search.config import SweepConfig
from asc_ray.search.trials import TrialResult, importances
from asc_ray.students.config import StudentConfig
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.folder import Metrics

LIBRARIES = ("asc-ray", "torch", "torchao", "ray", "mlflow", "pyarrow", "numpy", "optuna")


def write_report(
    out: Path,
    *,
    title: str,
    source: Source,
    student_config: StudentConfig,
    config: Mapping[str, object],
    stages: Mapping[str, Sequence[Artifact]],
    clips: Artifact,
    systems: Mapping[str, Recipe],
    teachers: Mapping[str, Artifact],
    fusion: Artifact,
    sweep: Artifact | None,
    search: SweepConfig | None,
    students: Mapping[str, Artifact],
    int8: Mapping[str, Artifact],
    evaluation: Artifact,
    student_scores: Mapping[str, OverSeeds],
) -> None:
    """Gather everything that the report shows and write the page to `out`. `stages` are all that came before it."""
    data = source.open(test=True)
    store, facts = data.store, clips.facts()
    trained, cost = next(iter(students.values())).facts(), next(iter(int8.values())).facts()
    threshold = student_config.augment.dir.threshold
    tested = read_scores(evaluation.path)
    train = store.split == "train"
    histories = {name: artifact.facts()["history"] for name, artifact in teachers.items()}
    trials = [] if sweep is None else [TrialResult.model_validate(t) for t in sweep.facts()["trials"]]
    model = student_config.model
    size = getattr(model, "size", None)
    fused = fusion.facts()
    half = fused["validation_without_half"]
    held_out = read_scores(fusion.path)
    lineage = {f"{a.stage}/{a.name}": a.key for a in (clips, *teachers.values(), fusion, evaluation)}
    lineage |= {f"{a.stage}/{name}": a.key for name, a in {**students, **int8}.items()}
    made = [artifact.made() for artifacts in stages.values() for artifact in artifacts]
    forms = {name: artifact.facts()["history"] for name, artifact in {**students, **int8}.items()}
    render(
        ReportData(
            title=title,
            corpus=CorpusSummary(
                name=facts["corpus"],
                clips={part: len(rows) for part, rows in data.parts.items()},
                places={part: len(store.place.among(rows)) for part, rows in data.parts.items()},
                labels=store.labels,
                devices=store.devices,
                unseen_devices=store.unseen_devices,
                bad_clips=len(facts["skipped"]),
                notes=(
                    *facts["corpus_notes"],
                    *(f"{note}: {count} clips" for note, count in sorted(facts["notes"].items())),
                ),
            ),
            systems=[
                *(SystemResult(name=name, kind=_kind(name), evaluation=e) for name, e in tested.systems.items()),
                *(
                    SystemResult(name=name, kind="student", evaluation=mean, deviation=deviation)
                    for name, (mean, deviation) in student_scores.items()
                ),
            ],
            complexity=[
                ComplexityRow(
                    model=f"{model.name} {size}" if size else model.name,
                    parameters=trained["parameters"],
                    macs=trained["macs"],
                    bytes_fp32=trained["bytes"]["float32"],
                    bytes_int8=cost["bytes"].get("int8", trained["bytes"]["int8"]),
                    peak_activations=cost.get("peak_activations"),
                )
            ],
            forms=report_rows(
                trained["bytes"]["float32"],
                cost.get("peak_activations"),
                stored_file(next(iter(int8.values())).path, ONNX_MODEL).read_bytes(),
                frontend_of(student_config.frontend),
            ),
            residual_lambda={name: artifact.facts()["residual_lambda"] for name, artifact in students.items()},
            lambda_start=model.normalization.lambda_start if isinstance(model, DSFlexiNetConfig) else 0.0,
            fusion=FusionSection(
                fusion=Fusion.load(stored_file(fusion.path, FUSION)),
                data=fused["data"],
                objectives=fused["objectives"],
                held_out=held_out,
                test=tested,
                without={name: figures["log_loss"] for name, figures in fused["validation_without"].items()},
                without_half={", ".join(half["left_out"]): Gain.model_validate(half["gain"])} if half else {},
                disagreement=fused["validation_disagreement"],
                far_below=_far_below(systems, histories, held_out),
                imported={a.name: a.facts()["imported"] for a in stages["logits"] if "imported" in a.facts()},
            ),
            energies=np.asarray(store.energy[train]),
            energy_threshold=data.mean_energy if threshold == "auto" else threshold,
            curves=histories | forms,
            trials=trials,
            importances=importances(search.space, trials) if search else {},
            cost=search.cost if search else None,
            student_config=yaml.safe_dump(student_config.model_dump(mode="json"), sort_keys=False),
            config=yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False),
            times=[stage_time(stage, artifacts) for stage, artifacts in stages.items() if artifacts],
            programs=sorted({one["program"] for one in made if one}),
            machines=sorted({one["machine"] for one in made if one}),
            versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
            lineage=lineage,
        ),
        out,
    )


def stage_time(stage: str, artifacts: Sequence[Artifact]) -> StageTime:
    """Return when a stage was finished, and how long work on its artifacts went on; what overlaps counts once.

    Artifacts may have been made at different times, by different configurations, so what lies between is left out.
    """
    made = [artifact.made() for artifact in artifacts]
    if not all("began" in one for one in made):
        return StageTime(stage=stage, artifacts=len(made), finished=None, seconds=None)
    seconds, until = 0.0, float("-inf")
    for began, ended in sorted(
        tuple(datetime.fromisoformat(one[at]).timestamp() for at in ("began", "ended")) for one in made
    ):
        seconds += max(0.0, ended - max(began, until))
        until = max(until, ended)
    finished = max(one["ended"] for one in made)
    return StageTime(
        stage=stage, artifacts=len(made), finished=f"{finished[:16].replace('T', ' ')} UTC", seconds=seconds
    )


def _far_below(
    systems: Mapping[str, Recipe], histories: Mapping[str, Sequence[Metrics]], held_out: Scores
) -> tuple[str, ...]:
    """Return a sentence for each system far below the others.

    With cross-fitting, the training of its first fold says what it learned.
    """
    standing = {}
    for name, recipe in systems.items():
        own = next((histories[one] for one in (name, f"{name}-fold0") if histories.get(one)), None)
        learned = own[-1]["train_accuracy"] if own else None
        standing[name] = Standing(recipe, held_out.systems[name].macro_accuracy, learned)
    return tuple(far_below(standing, held_out.gain.places).values())


def _kind(name: str) -> Literal["fusion", "teacher"]:
    return "fusion" if name in {"average", "fusion"} else "teacher"
