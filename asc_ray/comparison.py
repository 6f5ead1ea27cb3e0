"""The paper's tables and figures: students on one corpus that differ in a few lines of configuration."""

import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from asc_ray import remote
from asc_ray.artifacts import Artifact, content_key
from asc_ray.config.configuration import Config
from asc_ray.evaluation.artifact import read_answers, read_evaluation
from asc_ray.evaluation.gains import Gain, gain
from asc_ray.files import write_atomically
from asc_ray.plan import STAGES, Plan, dump
from asc_ray.preview import Step, preview
from asc_ray.progress import Progress
from asc_ray.report import figures as drawings
from asc_ray.report import table
from asc_ray.report.table import ComparedRow, Comparison
from asc_ray.run import at_work, run
from asc_ray.stages.evaluate import evaluation_jobs
from asc_ray.stages.qat import int8_jobs
from asc_ray.stages.specialize import specialize_jobs
from asc_ray.stages.student import student_jobs
from asc_ray.stages.tracked import pipeline_thing, student_thing
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.tables import TableConfig, planned, plans_of
from asc_ray.tracking.things import curves, figures

FIGURE = "figure.svg"


def run_table(
    kind: str, number: str, config: str | Path, overrides: Sequence[str], progress: Progress
) -> tuple[Artifact, Comparison]:
    """Train, evaluate and compare the rows of `kind` (tables or figures) `number`, or of a YAML file.

    Complete artifacts are skipped, unfinished ones are resumed. Raises UserError for a user's mistake, before any work.
    """
    spec, name, configs, plans = planned(kind, number, config, overrides, progress)
    artifact = _artifact(kind, name, spec, plans)
    made = [artifact, *(part for plan in plans.values() for part in _parts(plan, spec.int8))]
    if all(part.complete for part in made):
        progress.note(f"{spec.title}: nothing to do, it is done")
        return artifact, _comparison(spec, plans)
    for own in plans.values():
        if any(own.missing(stage) for stage in _shared(own)):
            run(own.config, _shared(own), progress)
    plans = plans_of(configs)  # anew, because systems that failed are now left out
    artifact = _artifact(kind, name, spec, plans)
    remote.forget(artifact.path)
    shutil.rmtree(artifact.path, ignore_errors=True)  # it may be left from before students were deleted
    lead = next(iter(plans.values()))
    title = f"{lead.config.name} {kind.removesuffix('s')} {name}"
    complete = {artifact.key}.union(*(plan.complete_keys() for plan in plans.values()))
    parent = pipeline_thing(lead, title, artifact.key, kind.removesuffix("s"))
    about = {"table": dump(spec), "overrides": list(overrides)}
    with at_work(lead, parent, about, complete, progress) as work:
        comparison = _compare(work, kind, spec, plans, artifact)
    return artifact, comparison


def preview_table(
    kind: str, number: str, config: str | Path, overrides: Sequence[str], progress: Progress
) -> tuple[Plan, list[Step]]:
    """Return a plan, for its storage, and what `run_table` would do: what rows share is there once."""
    spec, _, _, plans = planned(kind, number, config, overrides, progress)
    steps: dict[str | None, Step] = {}
    for row, plan in plans.items():
        own = {part.key for part in _parts(plan, spec.int8)}
        for step in preview(plan, STAGES):
            if step.state.key in own:
                named = replace(step, state=replace(step.state, name=f"{row}: {step.state.name}"))
                steps.setdefault(step.state.key, named)
            elif step.state.stage in _shared(plan):
                steps.setdefault(step.state.key or step.state.name, step)
    return next(iter(plans.values())), sorted(steps.values(), key=lambda step: STAGES.index(step.state.stage))


def _shared(plan: Plan) -> tuple[str, ...]:
    """Return the stages before the students, which rows have in common; none where all students are trained."""
    if all(student.complete for student in plan.students.values()):
        return ()
    return STAGES[: STAGES.index("fuse" if plan.config.taught else "ingest") + 1]


def draw_energies(config: Config, progress: Progress) -> Artifact:
    """Draw Fig. 2: the distribution of the training clips' energy with the student's ADIR threshold, else `auto`."""
    plan = Plan(config)
    if plan.missing("ingest"):
        plan = run(config, ("corpus", "ingest"), progress)
    threshold = config.student.augment.dir.threshold
    threshold = "auto" if threshold is None else threshold
    section = {"threshold": threshold}
    key = content_key(stage="figures", config=section, inputs={"clips": plan.clips.key})
    artifact = Artifact(config.folder, "figures", "figure-2", key, section, {"clips": plan.clips.key})
    if not artifact.complete:
        data = source_of(plan).open()
        energies = data.store.energy[data.store.split == "train"]
        line = data.mean_energy if threshold == "auto" else threshold
        drawn = drawings.standalone(drawings.energy_histogram(energies, line))
        write_atomically(artifact.open_partial() / FIGURE, drawn)
        artifact.finish({"threshold": line, "mean_energy": data.mean_energy})
    return artifact


def _artifact(kind: str, name: str, spec: TableConfig, plans: Mapping[str, Plan]) -> Artifact:
    inputs = {
        f"{row}: {model}": plan.evaluations[model].key
        for row, plan in plans.items()
        for model in _compared(plan, spec.int8)
    }
    section = spec.for_key()
    key = content_key(stage=kind, config=section, inputs=inputs)
    lead = next(iter(plans.values()))
    return Artifact(lead.config.folder, kind, f"{kind.removesuffix('s')}-{name}", key, section, inputs)


def _compared(plan: Plan, int8: bool) -> list[str]:
    return [*plan.students, *plan.specialized, *(plan.int8 if int8 else ())]


def _shown(plan: Plan) -> Mapping[str, Artifact]:
    """Return the students whose figures a row has."""
    return plan.specialized or plan.students


def _parts(plan: Plan, int8: bool) -> list[Artifact]:
    names = _compared(plan, int8)
    models = plan.models
    return [models[name] for name in names] + [plan.evaluations[name] for name in names]


def _compare(work: Work, kind: str, spec: TableConfig, plans: Mapping[str, Plan], artifact: Artifact) -> Comparison:
    work.progress.note(
        f"{spec.title}: {len(plans)} rows, {sum(len(plan.students) for plan in plans.values())} students"
    )
    with work.progress.stage("students"):
        work.together(_jobs(plans, student_jobs, work.tracker.top.key))
    if any(plan.specialized for plan in plans.values()):
        with work.progress.stage("specialize"):
            work.together(_jobs(plans, specialize_jobs, work.tracker.top.key))
    if spec.int8:
        with work.progress.stage("int8"):
            work.together(_jobs(plans, int8_jobs, work.tracker.top.key))
    with work.progress.stage("evaluate"):
        work.together(_jobs(plans, lambda plan: evaluation_jobs(plan, _compared(plan, spec.int8))))
    comparison = _comparison(spec, plans)
    folder = artifact.open_partial()
    table.write(comparison, folder)
    write_atomically(folder / "runs.csv", table.runs_separated(_runs(plans)))
    if kind == "figures":
        shown = {row.name: row.scores[0] for row in comparison.rows}
        drawn = drawings.confusion(shown, dict(zip(shown, itertools.cycle(drawings.PALETTE), strict=False)))
        write_atomically(folder / FIGURE, drawings.standalone(drawn))
    _track(work, spec, plans, comparison)
    artifact.finish({row.name: {"accuracy": row.scores[0].accuracy} for row in comparison.rows})
    for name in artifact.manifest()["files"]:
        work.tracker.log_file(work.tracker.top, artifact.path / name)
    return comparison


def _jobs(plans: Mapping[str, Plan], of: Callable[[Plan], Mapping[str, Job]], table: str = "") -> dict[str, Job]:
    """Return the jobs of all rows, with runs below the table's; rows with the same student share one training."""
    jobs: dict[str, Job] = {}
    for row, plan in plans.items():
        known = {job.artifact.key for job in jobs.values()}
        for name, job in of(plan).items():
            if job.artifact.key not in known:
                thing = job.thing and replace(job.thing, name=f"{row}: {name}", below=table)
                jobs[f"{row}: {name}"] = replace(job, thing=thing)
    return jobs


def _track(work: Work, spec: TableConfig, plans: Mapping[str, Plan], comparison: Comparison) -> None:
    """Tell of every student of the table below one parent run, with its test figures, whichever command trained it."""
    for row, plan in plans.items():
        for name in _compared(plan, spec.int8):
            model = plan.models[name]
            thing = student_thing(plan, name, f"{row}: {name}", work.tracker.top.key)
            work.tracker.whole(thing, curves(model.facts()["history"]))
            work.tracker.log(thing, figures(read_evaluation(plan.evaluations[name].path)))
    for compared in comparison.rows:
        mean, deviation = compared.scores
        spread = {f"{compared.name}/deviation": deviation.accuracy} if deviation else {}
        work.tracker.log(work.tracker.top, {f"{compared.name}/accuracy": mean.accuracy, **spread})


def _runs(plans: Mapping[str, Plan]) -> Iterator[table.TrainedRun]:
    """Yield every training of the table's students, whichever command ran it."""
    for row, plan in plans.items():
        clips = _training_clips(plan)
        for kind, own in plan.forms.items():
            for name, seed in zip(own, plan.seeds.values(), strict=False):
                if own[name].complete:
                    history = own[name].facts()["history"]
                    yield table.TrainedRun(
                        row=row,
                        kind=kind,
                        seed=seed,
                        key=own[name].key,
                        training_clips=clips,
                        epochs=len(history),
                        seconds=sum(epoch.get("seconds", 0.0) for epoch in history),
                        scores=read_evaluation(plan.evaluations[name].path)
                        if plan.evaluations[name].complete
                        else None,
                    )


def _training_clips(plan: Plan) -> int:
    return int((source_of(plan).store().split == "train").sum())


def _comparison(spec: TableConfig, plans: Mapping[str, Plan]) -> Comparison:
    lead = next(iter(plans.values()))
    store = source_of(lead).store()
    test = np.flatnonzero(store.split == "test")
    unseen = store.unseen_devices
    answers = {
        name: read_answers([plan.evaluations[student].path for student in _shown(plan)], store.ids[test])
        for name, plan in plans.items()
    }

    among = {"unseen": np.isin(store.device[test], unseen), "all": np.ones(len(test), dtype=bool)}

    def gained(row: str, over: str) -> dict[str, Gain]:
        """Return the row's gain over another on each group of the test split's clips that has some."""
        before, after = answers[over], answers[row]
        return {
            group: gain(before[:, own], after[:, own], store.scene[test[own]], store.place[test[own]])
            for group, own in among.items()
            if own.any()
        }

    rows = []
    for row in spec.rows:
        plan = plans[row.name]
        facts = next(iter(_shown(plan).values())).facts()
        over = row.against or (None if row is spec.rows[0] else spec.rows[0].name)
        rows.append(
            ComparedRow(
                name=row.name,
                parameters=facts["parameters"],
                macs=facts["macs"],
                scores=plan.scores(_shown(plan)),
                int8=plan.scores(plan.int8) if spec.int8 else None,
                paper=row.paper,
                over=over,
                gains=gained(row.name, over) if over else {},
            )
        )
    return Comparison(
        title=spec.title,
        corpus=lead.clips.facts()["corpus"],
        remark=spec.note,
        training_clips=sorted({_training_clips(plan) for plan in plans.values()}),
        unseen_devices=unseen,
        rows=rows,
    )
