"""What MLflow is told about a plan's artifacts."""

import getpass
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any

from asc_ray.artifacts import Artifact
from asc_ray.config.composition import PRESETS, load_config
from asc_ray.config.configuration import Config
from asc_ray.evaluation.artifact import read_evaluation, read_scores
from asc_ray.plan import Plan, scores_over_seeds
from asc_ray.provenance import commit
from asc_ray.search.config import METRIC
from asc_ray.search.proposals import trial_config
from asc_ray.search.trials import ENDED_WELL, TrialResult, trial_name
from asc_ray.shown import masked
from asc_ray.students.config import StudentConfig
from asc_ray.tracking.runs import Tracker
from asc_ray.tracking.things import ERROR_TAG, Thing, Value, curves, figures, parameters
from asc_ray.training.config import Recipe


def pipeline_thing(plan: Plan, name: str, key: str, kind: str = "pipeline") -> Thing:
    """Return the parent run of a plan's configuration; its parameters are those that differ from the nearest preset."""
    return _thing(plan, name, key, kind, differences(plan.config))


def teacher_thing(plan: Plan, name: str) -> Thing:
    """Return the run of a system's training; `name` ends in its fold in cross-fitting."""
    system = next(system for system, own in plan.trainings.items() if name in own)
    return _of_recipe(plan, name, plan.teachers[name], "teacher", plan.config.teachers.recipes[system])


def student_thing(plan: Plan, name: str, called: str = "", below: str = "") -> Thing:
    """Return the run of a student or of a form of one."""
    kind, own = next((kind, own) for kind, own in plan.forms.items() if name in own)
    recipe = dict(zip(own, plan.student_configs().values(), strict=True))[name]
    thing = _of_recipe(plan, called or name, own[name], kind, recipe)
    quantized = parameters(plan.config.qat, "qat.") if kind == "int8" else {}
    return replace(thing, parameters={**thing.parameters, **quantized}, below=below)


def fusion_thing(plan: Plan) -> Thing:
    own = {**parameters(plan.config.fusion, "fusion."), **parameters(plan.config.partition, "partition.")}
    own["systems"] = len(plan.logits)
    return _thing(plan, "fusion", plan.fusion.key, "fusion", own)


def trial_thing(plan: Plan, trial: Mapping[str, Any]) -> Thing:
    """Return the run of a trial, by its number, parameters and seed (a `TrialResult`'s or an event's)."""
    config, sweep = plan.config, plan.config.sweep
    assert sweep is not None
    artifact = plan.trial(trial["number"])
    try:
        student = trial_config(config.student, sweep, trial["parameters"])
    except ValueError:  # each value is valid, but not all together, and the trial fails
        student = config.student
    optimizer, seed = student.optimizer.scaled_to(sweep.epochs), student.seed + trial["seed"]
    student = student.model_copy(update={"optimizer": optimizer, "seed": seed})
    about = {f"asc_ray.{key}": str(trial[key]) for key in ("repeats", "parent") if trial[key] is not None}
    thing = _of_recipe(plan, trial_name(trial["number"]), artifact, "trial", student)
    return replace(thing, tags={**thing.tags, **about})


def tell_made(plan: Plan, tracker: Tracker, stages: Iterable[str]) -> None:
    """Tell what the stages have made, where the server does not know it: runs, curves, and the figures of each."""
    for stage in stages:
        if stage in _TELLERS:
            _TELLERS[stage](plan, tracker)


def _tell_teachers(plan: Plan, tracker: Tracker) -> None:
    for name, artifact in plan.teachers.items():
        if artifact.complete:
            tracker.whole(teacher_thing(plan, name), curves(artifact.facts()["history"]))


def _tell_fusion(plan: Plan, tracker: Tracker) -> None:
    if not plan.fusion.complete:
        return
    thing, facts = fusion_thing(plan), plan.fusion.facts()
    tracker.whole(thing)
    told = {f"weight/{name}": weight for name, weight in facts["weights"].items()}
    told |= {f"bias/{name}": bias for name, bias in facts["biases"].items()}
    tracker.log(thing, told | {f"validation/{key}": v for key, v in facts["validation"]["fusion"].items()})


def _tell_trials(plan: Plan, tracker: Tracker) -> None:
    if plan.sweep is not None and plan.sweep.complete:
        for trial in plan.sweep.facts()["trials"]:
            tell_trial(plan, tracker, TrialResult.model_validate(trial))


def tell_trial(plan: Plan, tracker: Tracker, result: TrialResult) -> None:
    """Tell how a trial ended."""
    assert plan.config.sweep is not None
    thing, (start, _) = trial_thing(plan, vars(result)), plan.config.sweep.span(result.number)
    curve = [(start + epoch, {METRIC: value}) for epoch, value in enumerate(result.curve, 1)]
    tracker.whole(thing, curve, "FINISHED" if result.state in ENDED_WELL else "FAILED")
    tracker.tag(thing, {"asc_ray.state": result.state, ERROR_TAG: result.error or None})
    final = {"final_objective": result.value} if result.has_value else {}
    tracker.log(thing, final | ({} if result.cost is None else {"cost": result.cost}), plan.config.sweep.epochs)


def _tell_students(plan: Plan, tracker: Tracker) -> None:
    _tell_networks(plan, tracker, plan.students)


def _tell_specialized(plan: Plan, tracker: Tracker) -> None:
    _tell_networks(plan, tracker, plan.specialized)


def _tell_networks(plan: Plan, tracker: Tracker, networks: Mapping[str, Artifact]) -> None:
    for name, artifact in networks.items():
        if artifact.complete:
            thing, facts = student_thing(plan, name), artifact.facts()
            tracker.whole(thing, curves(facts["history"]))
            tracker.log(thing, {"parameters": facts["parameters"], "macs": facts["macs"]})


def _tell_int8(plan: Plan, tracker: Tracker) -> None:
    for name, artifact in plan.int8.items():
        if artifact.complete:
            tracker.whole(student_thing(plan, name), curves(artifact.facts()["history"]))


def _tell_scores(plan: Plan, tracker: Tracker) -> None:
    """Tell the figures of the test split, each to the run of its thing, and those of the int8 students to the parent.

    The average, and a system of several trainings or of none, have no run of a training, so they get one.
    """
    if plan.missing("evaluate"):
        return
    for name, scores in read_scores(plan.evaluation.path).systems.items():
        if name == "fusion":
            thing = fusion_thing(plan)
        elif name in plan.teachers:
            thing = teacher_thing(plan, name)
        else:
            key = plan.logits[name].key if name in plan.logits else plan.evaluation.key
            kind = "teacher" if name in plan.config.teachers.imported else "average"
            thing = _thing(plan, name, key, kind, {})
            tracker.whole(thing)
        tracker.log(thing, figures(scores))
    for name, artifact in plan.evaluations.items():
        tracker.log(student_thing(plan, name), figures(read_evaluation(artifact.path)))
    mean, deviation = scores_over_seeds(plan)["student int8"]
    spread = {"test/accuracy_deviation": deviation.accuracy} if deviation else {}
    tracker.log(tracker.top, figures(mean) | spread)


_TELLERS = {
    "teachers": _tell_teachers,
    "fuse": _tell_fusion,
    "sweep": _tell_trials,
    "student": _tell_students,
    "specialize": _tell_specialized,
    "qat": _tell_int8,
    "evaluate": _tell_scores,
}


def _of_recipe(plan: Plan, name: str, artifact: Artifact, kind: str, recipe: Recipe) -> Thing:
    own = parameters(recipe) | parameters(plan.config.partition, "partition.")
    tags: dict[str, str] = {"asc_ray.network": recipe.model.name}
    if size := getattr(recipe.model, "size", None):
        tags["asc_ray.size"] = size
    if isinstance(recipe, StudentConfig):
        tags["asc_ray.soft_target"] = recipe.distillation.soft_target
    config = plan.config
    resources = config.teachers.resources_of(recipe) if kind == "teacher" else config.student_resources
    tags["asc_ray.device"] = "gpu" if resources.gpus else "cpu"
    thing = _thing(plan, name, artifact.key, kind, own)
    return replace(thing, tags={**thing.tags, **tags})


def _thing(plan: Plan, name: str, key: str, kind: str, own: Mapping[str, Value]) -> Thing:
    """Return a run with the tags and the corpus that all runs of a plan have."""
    return Thing(name, key, kind, own, {**_origin(), "asc_ray.corpus": plan.clips.name}, _dataset(plan))


def differences(config: Config) -> dict[str, Value]:
    """Return the values that differ from those of the packaged preset to which the configuration is nearest.

    Recipes and a search's space are left out, because the runs of teachers and trials have theirs.
    """
    own = _whole(config)
    own_storage = [f"storage={json.dumps(str(config.folder))}"]  # a preset's own is relative, which a Ray job refuses
    presets = {file.stem: _whole(load_config(file, own_storage)) for file in sorted(PRESETS.glob("*.yaml"))}
    differing = {
        name: {key: value for key, value in own.items() if values.get(key) != value} for name, values in presets.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    return {"preset": nearest, "teachers": len(config.teachers.systems), **differing[nearest]}


def _whole(config: Config) -> dict[str, Value]:
    left_out = ("storage", "teachers.recipes", "sweep.space")
    return {key: value for key, value in parameters(config).items() if not key.startswith(left_out)}


def _dataset(plan: Plan) -> dict[str, str] | None:
    """Return the corpus as an MLflow dataset, once it is read."""
    if not plan.clips.complete:
        return None
    root = "demo" if plan.demo else str(plan.config.corpus.path)
    return {"name": plan.clips.facts()["corpus"], "digest": plan.clips.key, "source_type": "local", "source": root}


@cache
def _origin() -> Mapping[str, str]:
    """Return where a run comes from: command, version, commit, user, host; in MLflow's names where it has them."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    tags = {
        "mlflow.source.name": " ".join(takewhile(lambda word: not word.startswith("-"), words)),  # MLflow cuts at a /
        "asc_ray.command": masked(" ".join(words)),
        "mlflow.source.type": "JOB" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else "LOCAL",
        "mlflow.user": getpass.getuser(),
        "asc_ray.host": os.uname().nodename,
        "asc_ray.version": version("asc-ray"),
    }
    if known := commit():
        tags |= {"mlflow.source.git.commit": known.removesuffix("-dirty"), "asc_ray.dirty": str("-dirty" in known)}
    return tags
