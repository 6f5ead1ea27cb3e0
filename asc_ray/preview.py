"""What a command would do, for `--dry-run`: nothing is written, and neither Ray nor MLflow is started."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from asc_ray.artifacts import Artifact, artifacts_in, read_record
from asc_ray.errors import UserError
from asc_ray.plan import Plan
from asc_ray.resources import Resources, TrainerResources
from asc_ray.search.config import TRIALS
from asc_ray.status import State, states
from asc_ray.training.folder import PROGRESS

DOES = {"done": "skip", "missing": "run", "interrupted": "resume", "running": "resume", "failed": "run again"}
DOES |= {"left out": "leave out"}


@dataclass(frozen=True)
class Step:
    """What would become of one artifact: `does` is a value of DOES. `seconds`: how long it would take by itself, at the
    speed that was seen in this storage; None where nothing like it was trained."""

    state: State
    resources: str
    seconds: float | None

    @property
    def does(self) -> str:
        return DOES[self.state.state]


def preview(plan: Plan, stages: Sequence[str]) -> Iterator[Step]:
    """Yield what would become of each artifact of these stages."""
    known = {artifact.key: artifact for artifacts in plan.by_stage().values() for artifact in artifacts}
    speeds = _speeds(plan, known)
    for state in states(plan):
        if state.stage in stages:
            waits = state.state not in ("done", "left out")
            artifact = known[state.key] if waits and state.key else None
            seconds = _seconds(plan, artifact, known, speeds) if artifact else None
            yield Step(state, _resources(plan, state) if waits else "", seconds)


def duration(seconds: float | None) -> str:
    """Return a time as a person says it; `?` where it is not known."""
    if seconds is None:
        return "?"
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _resources(plan: Plan, state: State) -> str:
    config = plan.config
    if state.stage == "teachers":
        system = next(name for name, own in plan.trainings.items() if state.name in own)
        return _asked(config.teachers.resources_of(config.teachers.recipes[system]))
    asked = {
        "ingest": Resources(),
        "logits": config.logits.resources,
        "fuse": Resources(cpus=config.logits.resources.cpus),
        **dict.fromkeys(("sweep", "student", "specialize", "qat", "evaluate"), config.student_resources),
    }
    return _asked(asked[state.stage]) if state.stage in asked else "this process"


def _asked(request: Resources) -> str:
    text = f"{request.cpus:g} CPU" + (f", {request.gpus:g} GPU" if request.gpus else "")
    workers = request.workers if isinstance(request, TrainerResources) else 1
    return f"{workers} x ({text})" if workers > 1 else text


def _seconds(
    plan: Plan, artifact: Artifact, known: Mapping[str, Artifact], speeds: Mapping[str, list[float]]
) -> float | None:
    """Return how long an unfinished training or search would take by itself."""
    if note := read_record(artifact.partial / PROGRESS):
        return 60 * note["minutes_left"]
    if artifact.stage == "sweep" and plan.config.sweep:
        student = next(iter(plan.students.values()))
        left = plan.config.sweep.most - len(list((artifact.partial / TRIALS).glob("[0-9]*.json")))
        return _epochs_take(_family(student, known), left * plan.config.sweep.epochs, speeds)
    recipe = _recipe(artifact)
    if artifact.stage == "int8":
        return _epochs_take(_family(artifact, known), artifact.config["qat"]["epochs"], speeds)
    if recipe is None or "optimizer" not in recipe or recipe.get("checkpoint"):  # not trained, but taken from elsewhere
        return None
    return _epochs_take(_family(artifact, known), recipe["optimizer"]["epochs"], speeds)


def _epochs_take(family: str, epochs: int, speeds: Mapping[str, list[float]]) -> float | None:
    return epochs * median(speeds[family]) if family in speeds else None


def _speeds(plan: Plan, known: Mapping[str, Artifact]) -> dict[str, list[float]]:
    """Return the seconds of each epoch that was trained in the storage, by the family of the training."""
    found: dict[str, list[float]] = {}
    manifests = []
    for artifact in artifacts_in(plan.config.folder):
        if artifact.stage in ("teachers", "students", "int8"):
            try:
                manifests.append(artifact.manifest())
            except UserError:  # it is damaged, which `verify` says
                continue
    done = {
        one["key"]: Artifact(plan.config.folder, one["stage"], one["name"], one["key"], one["config"], one["inputs"])
        for one in manifests
    }
    for one in manifests:
        seconds = [epoch["seconds"] for epoch in one["facts"].get("history", ()) if "seconds" in epoch]
        found.setdefault(_family(done[one["key"]], {**known, **done}), []).extend(seconds)
    for artifact in known.values():
        if not artifact.complete and (note := read_record(artifact.partial / PROGRESS)) and "seconds" in note:
            found.setdefault(_family(artifact, known), []).append(note["seconds"])
    return {family: seconds for family, seconds in found.items() if seconds}


def _family(artifact: Artifact, known: Mapping[str, Artifact]) -> str:
    """Return what an epoch's time depends on: the kind of training, the network, and the clips."""
    of = known.get(artifact.inputs.get("student", ""), artifact)  # of an int8 form, its student
    recipe = _recipe(of) or {}
    parts = [artifact.stage, recipe.get("model"), recipe.get("frontend"), of.config.get("partition")]
    return json.dumps([*parts, of.inputs.get("clips")], sort_keys=True)


def _recipe(artifact: Artifact) -> Mapping[str, Any] | None:
    return artifact.config.get("recipe") or artifact.config.get("student")
