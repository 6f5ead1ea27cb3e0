"""The paper's tables and figures: students on one corpus that differ in a few lines of configuration."""

import difflib
import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from asc_ray import remote
from asc_ray.artifacts import Artifact, content_key
from asc_ray.config.composition import checked, load_config, preset
from asc_ray.config.configuration import Config
from asc_ray.config.fitting import check_limits
from asc_ray.errors import ConfigError
from asc_ray.evaluation.artifact import read_answers, read_evaluation
from asc_ray.evaluation.gains import Gain, gain
from asc_ray.files import write_atomically
from asc_ray.int8.config import check_int8
from asc_ray.plan import STAGES, Plan, dump
from asc_ray.preview import Step, preview
from asc_ray.progress import Progress
from asc_ray.report import figures as drawings
from asc_ray.report import table
from asc_ray.report.table import ComparedRow, Comparison
from asc_ray.run import at_work, run
from asc_ray.section import Section
from asc_ray.stages.evaluate import evaluation_jobs
from asc_ray.stages.qat import int8_jobs
from asc_ray.stages.specialize import specialize_jobs
from asc_ray.stages.student import student_jobs
from asc_ray.stages.tracked import pipeline_thing, student_thing
from asc_ray.stages.work import Job, Work, source_of
from asc_ray.tracking.things import curves, figures

FIGURE = "figure.svg"
TAU22_DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")  # the paper gives figures for these


class RowConfig(Section):
    """A row of a table. `set`: what it changes, by dotted key. `paper`: the paper's figures, see ComparedRow.

    With `student.specialize` it has the figures of the specialized students.
    """

    later = frozenset({"against"})
    name: str = Field(pattern=r"^[^'\"\\]+$", description="name of the row, and of its runs in MLflow")
    set: dict[str, Any] = Field({})
    paper: dict[str, float] = Field({})
    against: str | None = Field(None, description="the row that this one's difference is to; null: the first row")


class TableConfig(Section):
    """A file in `configs/tables/` or `configs/figures/`. `set` holds for all rows; the command's `--set` changes it."""

    title: str
    note: str = Field("", description="remark on the paper's figures, shown with the table")
    int8: bool = Field(False, description="whether to quantize every student")
    set: dict[str, Any] = Field({})
    rows: tuple[RowConfig, ...] = Field(min_length=1)

    @field_validator("rows")
    @classmethod
    def _distinct(cls, rows: tuple[RowConfig, ...]) -> tuple[RowConfig, ...]:
        names = [row.name for row in rows]
        if len(set(names)) < len(names):
            raise ValueError("two rows have the same name")
        for row in rows:
            if row.against is not None and (row.against not in names or row.against == row.name):
                others = ", ".join(name for name in names if name != row.name)
                raise ValueError(f"row {row.name}: against: found {row.against!r}; allowed: another row, of {others}")
        return rows


def run_table(
    kind: str, number: str, config: str | Path, overrides: Sequence[str], progress: Progress
) -> tuple[Artifact, Comparison]:
    """Train, evaluate and compare the rows of `kind` (tables or figures) `number`, or of a YAML file.

    Complete artifacts are skipped, unfinished ones are resumed. Raises UserError for a user's mistake, before any work.
    """
    spec, name, configs, plans = _planned(kind, number, config, overrides, progress)
    artifact = _artifact(kind, name, spec, plans)
    made = [artifact, *(part for plan in plans.values() for part in _parts(plan, spec.int8))]
    if all(part.complete for part in made):
        progress.note(f"{spec.title}: nothing to do, it is done")
        return artifact, _comparison(spec, plans)
    for own in plans.values():
        if any(own.missing(stage) for stage in _shared(own)):
            run(own.config, _shared(own), progress)
    plans = _plans(configs)  # anew, because systems that failed are now left out
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
    spec, _, _, plans = _planned(kind, number, config, overrides, progress)
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


def _planned(
    kind: str, number: str, config: str | Path, overrides: Sequence[str], progress: Progress
) -> tuple[TableConfig, str, dict[str, Config], dict[str, Plan]]:
    """Return a table's description and short name, and the configurations and plans of its rows. Raises ConfigError."""
    spec, name = read_table(kind, number)
    configs = {}
    for row in spec.rows:
        given = [*_lines(spec.set), *overrides, *_lines(row.set), "sweep=null"]
        try:
            configs[row.name] = load_config(config, given)
        except ConfigError as error:
            raise ConfigError(f"row {row.name}: {error}") from None
        for key in sorted({text.partition("=")[0] for text in overrides} & row.set.keys()):
            progress.note(
                f"row {row.name}: sets {key} itself, to {json.dumps(row.set[key])}; --set does not change that"
            )
    plans = _plans(configs)
    for name_of_row, plan in plans.items():
        try:
            check_limits(plan.config, plan.scenes)
            if spec.int8:
                check_int8(plan.config.student.model.name)
        except ConfigError as error:
            raise ConfigError(f"row {name_of_row}: {error}") from None
    _refuse_unknown_columns(spec, next(iter(plans.values())))
    return spec, name, configs, plans


def _plans(configs: Mapping[str, Config]) -> dict[str, Plan]:
    """Return the plans of all rows. Raises ConfigError if the rows do not share one corpus and one storage."""
    plans: dict[str, Plan] = {}
    for row, config in configs.items():
        lead = next(iter(plans.values()), None)
        # Reading a large corpus takes seconds, so the rows share it.
        same = lead is not None and config.corpus == lead.config.corpus
        plans[row] = Plan(config, lead.source if lead and same else None)
        if lead and config.storage != lead.config.storage:
            raise ConfigError(f"row {row}: storage: a table has one, {lead.config.storage}; give it by --set")
        if lead and plans[row].clips.key != lead.clips.key:
            raise ConfigError(
                f"row {row}: corpus: differs from that of row {next(iter(plans))}; a table is of one corpus"
            )
    return plans


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


def read_table(kind: str, number: str) -> tuple[TableConfig, str]:
    """Return the description of a table or figure, and its short name. Raises ConfigError."""
    raw = preset(kind.removesuffix("s"), number, (kind,))
    return checked(TableConfig, raw, number if Path(number).is_file() else f"{kind}/{number}.yaml"), Path(number).stem


def _refuse_unknown_columns(spec: TableConfig, plan: Plan) -> None:
    """Raise ConfigError if `paper` of a row names a column that no table has."""
    devices = plan.source.devices if plan.source else ()
    known = {*table.SIZES, "seen", "unseen", "all", "int8", "log loss", *TAU22_DEVICES, *devices}
    for row in spec.rows:
        for column in row.paper.keys() - known:
            close = difflib.get_close_matches(column, known, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ConfigError(
                f"row {row.name}: paper.{column}: no such column; {hint}known: {', '.join(sorted(known))}"
            )


def _lines(values: Mapping[str, Any]) -> list[str]:
    """Return the values in the form of `--set`, which reads JSON as YAML."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


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
        training_clips=int((store.split == "train").sum()),
        unseen_devices=unseen,
        rows=rows,
    )
