"""Running the stages of a plan: skipping, resuming, showing, tracking."""

import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import yaml

from asc_ray.artifacts import Artifact, exclusive, stored_file, stored_files, write_atomically, write_record
from asc_ray.cluster.resources import Resources
from asc_ray.config import Config
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import SCENES, make_demo_corpus
from asc_ray.errors import ConfigError, UserError
from asc_ray.fusion import check_prior
from asc_ray.plan import BEST_STUDENT, FAILED, REPORT, STAGES, TRIALS_TABLE, Plan, dump, scores_over_seeds
from asc_ray.progress import Progress
from asc_ray.training.dataset import Source
from asc_ray.training.evaluation import Gain
from asc_ray.training.search import (
    ENDED_WELL,
    SweepConfig,
    TrialResult,
    best,
    changed,
    trial_config,
    trial_name,
    trials_table,
    values_over_seeds,
)
from asc_ray.training.systems import ONNX_MODEL, import_teacher, student_cost


def run(config: Config, stages: Sequence[str], progress: Progress) -> Plan:
    """Bring the stages' artifacts into being, skipping what is complete and resuming what is half-done.

    Raises UserError for a user's mistake, ConfigError before any work starts when the cluster cannot run it.
    """
    plan = Plan(config)
    for name, error in plan.left_out.items():
        progress.note(_left_out(name, error))
    todo = [stage for stage in stages if plan.missing(stage)]
    for stage in stages:
        if stage not in todo and plan.by_stage()[stage]:
            progress.skipped(stage, plan.by_stage()[stage])
    if not todo:
        progress.nothing_to_do()
        return plan
    for stage in todo:
        for need in plan.needs(stage):
            if need not in todo and plan.missing(need):
                raise UserError(
                    f"{stage}: needs the stage `{need}`, which is not done; run `asc-ray {need}` with the same "
                    "configuration first, or `asc-ray pipeline` for all stages"
                )
    if {"sweep", "student"} & set(todo):
        refuse_large(plan)
    if "ingest" in todo and plan.source:
        for note in plan.source.notes:
            progress.note(note)
    with at_work(plan, config.name, plan.key, dump(config), plan.complete_keys(), progress) as work:
        for stage in todo:
            if not work.plan.missing(stage):  # done earlier, without the systems that have just failed again
                continue
            with progress.stage(stage):
                _BUILDERS[stage](work)
    return work.plan


@contextmanager
def at_work(
    plan: Plan, name: str, key: str, parameters: Mapping[str, Any], complete: Container[str], progress: Progress
) -> Iterator["Work"]:
    """Hold the plan's storage, a connection to the cluster that can run it, and a parent run in MLflow."""
    # Heavy imports wait until there is work: `asc-ray status` and a finished configuration answer at once.
    from asc_ray.cluster import runtime

    config = plan.config

    def connected_tracker() -> Any:
        from asc_ray import tracking

        return tracking.Tracker(config.tracking.uri, config.tracking.experiment, config.storage, name, key)

    with exclusive(config.storage), ThreadPoolExecutor(1) as beside:
        progress.note(f"storage {config.storage}")
        # MLflow and its database take as long as a cluster of one machine, which mostly waits: both at once.
        made = beside.submit(connected_tracker)
        with runtime.connected(config.cluster):
            tracker = made.result()
            runtime.check_feasible(
                {
                    **config.teachers.requests(),
                    "logits.resources": config.logits.resources,
                    "student_resources": config.student_resources,
                }
            )
            with tracker.parent(parameters, complete):
                yield Work(plan, tracker, progress)


def refuse_large(plan: Plan) -> None:
    """Raises ConfigError where a student that the configuration may train is over the limits: before teachers train.

    Of a search, for each end of each parameter; its trials count what several together come to.
    """
    config, classes = plan.config, len(plan.source.labels if plan.source else SCENES)
    students = {"student.model": config.student}
    if config.sweep:
        for key, parameter in config.sweep.space.items():
            if key.partition(".")[0] in ("model", "frontend"):
                for end in parameter.ends():
                    students[f"sweep.space.{key}: {end}: student.model"] = changed(config.student, {key: end})
    for key, student in students.items():
        try:
            student_cost(student, config.limits, classes)
        except ConfigError as error:
            raise ConfigError(f"{key}: {error}") from None


@dataclass(frozen=True)
class Job:
    """`function(artifact, *arguments)` on the cluster; it counts epochs where it reports them."""

    artifact: Artifact
    function: Callable[..., None]
    arguments: tuple[Any, ...]
    resources: Resources
    epochs: int = 0


@dataclass
class Work:
    """What a stage's builder needs: the plan, which changes when systems are left out, the tracker, the progress."""

    plan: Plan
    tracker: Any
    progress: Progress

    @property
    def source(self) -> Source:
        return source_of(self.plan)

    @contextmanager
    def tracked(self, artifacts: Mapping[str, Artifact]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
        """A listener that opens a child run for each named artifact at its first event and logs every epoch.

        What finished is FINISHED, what did not is FAILED, or KILLED by an interrupt.
        """
        status = "FAILED"

        def on_event(name: str, event: dict[str, Any]) -> None:
            artifact = artifacts.get(name)
            if artifact is not None:
                self.tracker.start(name, artifact.key, artifact.config)
                if "epoch" in event:
                    self.tracker.log(name, event, int(event["epoch"]))
                if event.get("finished") and "state" not in event:  # what has a state is ended by who knows it
                    self.tracker.end(name)
            self.progress.event(name, event)

        try:
            yield on_event
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            for name, artifact in artifacts.items():
                self.tracker.end(name, "FINISHED" if artifact.complete else status)

    def together(self, jobs: Mapping[str, Job], tracked: bool = True) -> None:
        """Run what is not complete as tasks on the cluster, as many at once as fit, each in a child run of its name."""
        from asc_ray.cluster.runtime import Task, run_tasks

        config = self.plan.config
        todo = {name: job for name, job in jobs.items() if not job.artifact.complete}
        self.progress.expect("all", {name: job.epochs for name, job in todo.items() if job.epochs})
        with self.tracked({name: job.artifact for name, job in todo.items()} if tracked else {}) as on_event:
            tasks = []
            for name, job in todo.items():
                if not job.epochs:
                    on_event(name, {"started": True})
                tasks.append(Task(name, job.function, (job.artifact, *job.arguments), job.resources, bool(job.epochs)))

            def on_done(name: str, result: Any) -> None:
                if tracked:
                    on_event(name, {"started": True})
                    self.tracker.log_file(name, todo[name].artifact.path / "manifest.json")
                if len(todo) > 1 and todo[name].epochs:
                    on_event(name, {"finished": True})

            run_tasks(tasks, config.cluster.retries, on_event, on_done, patient=True)


def source_of(plan: Plan) -> Source:
    """The clips of a plan's trainings."""
    from asc_ray.cluster.stream import stream

    config = plan.config
    return Source(plan.clips.path, config.partition, config.data, stream, config.fusion)


def _build_corpus(work: Work) -> None:
    artifact = work.plan.demo
    assert artifact is not None
    shutil.rmtree(artifact.partial, ignore_errors=True)
    demo = work.plan.config.corpus.demo
    make_demo_corpus(artifact.partial, demo)
    artifact.finish({})


def _build_clips(work: Work) -> None:
    from asc_ray.cluster.ingest import ingest

    plan, config = work.plan, work.plan.config
    if plan.demo:
        stored_files(plan.demo.path)
    corpus = plan.source or read_corpus(plan.corpus_root(), config.corpus.on_bad_clip)
    ingest(
        plan.clips,
        corpus,
        plan.impulse_responses(),
        skip_bad=config.corpus.on_bad_clip == "skip",
        shard_clips=config.corpus.shard_clips,
        retries=config.cluster.retries,
        on_event=work.progress.event,
    )
    if config.sweep:  # of a corpus that was not there before
        replace(work.source, strangers=config.sweep.validation.devices).open()
    facts = plan.clips.facts()
    for line in ingest_summary(facts):
        work.progress.note(line)


def ingest_summary(facts: Mapping[str, Any]) -> list[str]:
    """One line on the clips, one on what was changed while decoding, one on what was left out."""
    lines = [f"{facts['clips']} clips, {len(facts['labels'])} scenes, {len(facts['devices'])} devices"]
    if facts["notes"]:
        lines.append("clips " + ", ".join(f"{note}: {count}" for note, count in sorted(facts["notes"].items())))
    if facts["skipped"]:
        names = ", ".join(f"{clip['clip_id']} ({clip['reason']})" for clip in facts["skipped"][:5])
        more = f" and {len(facts['skipped']) - 5} more, all in the manifest" if len(facts["skipped"]) > 5 else ""
        lines.append(f"{len(facts['skipped'])} bad clips left out: {names}{more}")
    return lines


def _build_teachers(work: Work) -> None:
    from asc_ray.cluster.teachers import Teacher, train_teachers

    plan, config = work.plan, work.plan.config
    _import_teachers(work)
    todo = {name: artifact for name, artifact in plan.teachers.items() if not artifact.complete}
    if not todo:
        return
    # What the configuration asks of the clips is refused here, and not by each teacher.
    check_prior(config.fusion.class_prior, work.source.open().store.labels)
    waiting = {}
    for system, own in plan.trainings.items():
        recipe = config.teachers.recipes[system]
        for fold, (name, artifact) in enumerate(own.items()):
            if name in todo:
                sees = work.source if len(own) == 1 else replace(work.source, fold=fold)
                waiting[name] = Teacher(artifact, recipe, sees, config.teachers.resources_of(recipe))
    work.progress.expect("teachers", {name: t.recipe.optimizer.epochs for name, t in waiting.items()})
    for artifact in todo.values():
        (artifact.partial / FAILED).unlink(missing_ok=True)
    with work.tracked(todo) as on_event:
        errors = train_teachers(waiting, config.cluster.retries, on_event)
    for name, error in errors.items():
        write_record(todo[name].open_partial() / FAILED, {"error": error})
    if untried := [name for name, artifact in todo.items() if not artifact.complete and name not in errors]:
        raise UserError(
            f"{len(untried)} of {len(todo)} teachers were not finished ({', '.join(untried)}): no node had room for "
            "them, or Ray Train's controllers died too often. The others are kept; the same command goes on"
        )
    failed = [system for system, own in plan.trainings.items() if own.keys() & errors.keys()]
    if len(failed) + len(plan.left_out) > config.teachers.allow_missing:
        reasons = "; ".join(f"{name}: {error}" for name, error in errors.items())
        raise UserError(
            f"{len(errors)} of {len(todo)} teachers failed ({reasons}). The others are kept; the same command goes on "
            "with those that failed, and --set teachers.allow_missing=N goes on without so many"
        )
    for name, error in errors.items():
        work.progress.note(_left_out(name, error))
    if errors:
        work.plan = Plan(config)


def _left_out(name: str, error: str) -> str:
    return f"left out: {name} failed ({error}); --set teachers.allow_missing=0 tries it again"


def _import_teachers(work: Work) -> None:
    from asc_ray.cluster.runtime import Task, run_tasks

    plan, config = work.plan, work.plan.config
    labels = plan.clips.facts()["labels"]
    todo = {name: plan.teachers[name] for name in plan.imported if not plan.teachers[name].complete}
    with work.tracked(todo) as on_event:
        tasks = []
        for name, artifact in todo.items():
            on_event(name, {"started": True})
            arguments = (artifact, plan.imported[name], config.teachers.recipes[name], labels)
            tasks.append(Task(name, import_teacher, arguments, config.logits.resources))
        run_tasks(tasks, config.cluster.retries, on_event, lambda name, _: on_event(name, {"finished": True}))
    if todo:
        work.progress.note(f"{len(todo)} of {len(plan.teachers)} systems from {config.teachers.checkpoints}")
        _on_trust(work, {name: artifact.facts() for name, artifact in todo.items()})


def _on_trust(work: Work, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Say which networks are from files that do not say which output is which scene."""
    if names := [name for name, own in facts.items() if own["on_trust"]]:
        order = ", ".join(work.plan.clips.facts()["labels"])
        work.progress.note(
            f"warning: the weights of {', '.join(names)} do not say in which order they name the scenes; this is taken "
            f"on trust: {order}"
        )


def _build_logits(work: Work) -> None:
    from asc_ray.cluster.ingest import store_logits

    plan, config = work.plan, work.plan.config
    store_logits(
        {
            name: (
                artifact,
                tuple(teacher.path for teacher in plan.trainings[name].values()),
                config.teachers.recipes[name],
            )
            for name, artifact in plan.logits.items()
            if not artifact.complete
        },
        work.source,
        config.corpus.shard_clips,
        config.logits.batch_size,
        config.logits.precision,
        config.logits.resources,
        config.cluster.retries,
        work.progress.event,
    )


def _build_fusion(work: Work) -> None:
    from asc_ray.cluster.fusion import Tasks
    from asc_ray.training.ensemble import fuse_systems

    plan, config = work.plan, work.plan.config
    if warning := fusion_warning(config, len(plan.imported)):
        work.progress.note(warning)
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    # No GPU: a task that waits for others keeps its own, and they would wait for it.
    cpus = Resources(cpus=config.logits.resources.cpus)
    mapper = [Tasks(config.fusion.tasks, cpus, config.cluster.retries)] if config.fusion.tasks > 1 else []
    fusion = Job(plan.fusion, fuse_systems, (work.source, logits, config.fusion, *mapper), cpus)
    work.together({"fusion": fusion})
    facts = plan.fusion.facts()
    for line in fusion_summary(facts):
        work.progress.note(line)
    figures = {f"held_out/{name}/{key}": v for name, own in facts["validation"].items() for key, v in own.items()}
    figures |= {f"fusion/weight/{name}": weight for name, weight in facts["weights"].items()}
    figures |= {f"fusion/bias/{name}": bias for name, bias in facts["biases"].items()}
    work.tracker.log_summary({key.replace(" ", "_"): value for key, value in figures.items()})


def fusion_warning(config: Config, imported: int) -> str | None:
    """That the clips for eq. 4 are known to the teachers, `imported` of which were trained elsewhere."""
    if config.fusion.data == "train":
        return (
            "warning: fusion.data is train: eq. 4 is learned on clips that the teachers were trained on, and favors "
            "those that overfit; holdout and crossfit do not"
        )
    if imported:
        return (
            f"warning: {imported} systems come from teachers.checkpoints; where they were trained on the whole "
            "training split, eq. 4 is learned on clips that they know"
        )
    return None


def fusion_summary(facts: Mapping[str, Any]) -> list[str]:
    """A table of the systems on held-out places, the fusion's gain over the average, and what the fit noticed."""
    figures, weights, without = facts["validation"], facts["weights"], facts["validation_without"]
    width = max(map(len, figures))
    lines = [f"{'held-out places':{width}}  weight  log loss  accuracy  log loss without it"]
    for name, own in figures.items():
        weight = f"{weights[name]:6.3f}" if name in weights else " " * 6
        line = f"{name:{width}}  {weight}  {own['log_loss']:8.3f}  {100 * own['accuracy']:6.1f} %"
        if name in without:
            line += f"  {without[name]['log_loss'] - figures['fusion']['log_loss']:+.4f}"
        lines.append(line)
    gain = Gain.model_validate(facts["validation_gain"])
    loss, accuracy = gain.log_loss, gain.accuracy
    lines.append(
        f"fusion over the average: log loss {-loss.value:+.3f} ({-loss.high:+.3f} to {-loss.low:+.3f}), accuracy "
        f"{100 * accuracy.value:+.1f} points ({100 * accuracy.low:+.1f} to {100 * accuracy.high:+.1f}); 95 % by "
        f"resampling {gain.places} places"
    )
    return [*lines, *facts["notes"]]


STATE_TAG = "asc_ray.state"  # of a trial's run in MLflow: how it ended


def _build_sweep(work: Work) -> None:
    from asc_ray.cluster.runtime import slots
    from asc_ray.cluster.sweep import SCRATCH, concurrent, ended_trials, run_sweep

    plan, config, sweep = work.plan, work.plan.config, work.plan.config.sweep
    assert plan.sweep is not None
    assert sweep is not None
    trials = {trial_name(n): plan.trial(n) for n in range(sweep.most)}
    ended = ended_trials(plan.sweep)
    work.progress.expect("sweep", dict.fromkeys(trials, sweep.epochs), len(ended))
    room, running = slots(config.student_resources), concurrent(sweep, config.student_resources)
    idle = f"; sweep.lookback {sweep.lookback} leaves {room - running} slots idle" if running < room else ""
    work.progress.note(f"{running} of at most {sweep.most} trials at a time, in {room} slots{idle}")
    work.progress.note(f"searched: {', '.join(sweep.space)}")
    if sweep.scheduler == "asha" and sweep.grace_epochs >= sweep.epochs:
        work.progress.note(f"no trial is stopped early: they end before sweep.grace_epochs, {sweep.grace_epochs}")
    if sweep.validation.devices and config.taught:
        work.progress.note(
            f"{', '.join(sweep.validation.devices)}: left out of the trials, but the teachers were trained on them; "
            "with soft_target: none the trials are judged by devices that nothing has heard"
        )

    def listener(name: str, event: dict[str, Any]) -> None:
        if event.get("started"):
            own = {key: event[key] for key in ("seed", "repeats", "parent") if event[key] is not None}
            work.tracker.start(name, trials[name].key, event["parameters"] | own)
        on_event(name, event)
        if event.get("finished"):
            work.tracker.log(name, {key: event[key] for key in ("value", "cost")}, sweep.epochs)
            work.tracker.tag(name, trials[name].key, STATE_TAG, event["state"])
            work.tracker.end(name, "FINISHED" if event["state"] in ENDED_WELL else "FAILED")

    with work.tracked(trials) as on_event:
        for result in ended:  # the driver may have been killed between a trial's end and MLflow's hearing of it
            name, told = trial_name(result.number), vars(result) | {"value": result.value}
            if not work.tracker.ended_with(STATE_TAG, name, trials[name].key):
                listener(name, {"started": True, **told})
                listener(name, {"finished": True, **told})
        results = run_sweep(
            plan.sweep,
            work.source,
            {target: plan.soft_targets(target) for target in config.soft_targets},
            config.student,
            sweep,
            config.limits,
            config.student_resources,
            config.cluster.retries,
            listener,
        )
    winner = best(sweep, results)
    student = trial_config(config.student, sweep, winner.parameters)
    files = {
        BEST_STUDENT: "# The search's configuration with its best student: `asc-ray student --config` takes it.\n"
        + yaml.safe_dump({**dump(config), "sweep": None, "student": dump(student)}, sort_keys=False),
        TRIALS_TABLE: trials_table(results),
    }
    for file, text in files.items():
        write_atomically(plan.sweep.partial / file, text)
        work.tracker.log_file("", plan.sweep.partial / file)
    work.tracker.tag(trial_name(winner.number), trials[trial_name(winner.number)].key, "asc_ray.winner", "true")
    for line in sweep_summary(sweep, results, winner):
        work.progress.note(line)
    plan.sweep.finish({"trials": [dump(result) for result in results]}, SCRATCH)


def sweep_summary(sweep: SweepConfig, results: Sequence[TrialResult], winner: TrialResult) -> list[str]:
    """How the trials ended, the winner, and what failed."""
    ended = ", ".join(f"{count} {state}" for state, count in sorted(Counter(r.state for r in results).items()))
    searched = sum(result.repeats is None for result in results)
    early = f"; the budget was used up before {sweep.searched}" if searched < sweep.searched else ""
    values = values_over_seeds(results, winner.number)
    over = f", mean of {len(values)} seeds" if len(values) > 1 else ""
    found = ", ".join(f"{key} {_short(value)}" for key, value in winner.parameters.items())
    lines = [
        f"{len(results)} trials: {ended}{early}",
        f"winner: trial {winner.number}, objective {100 * sum(values) / len(values):.1f} %{over}: {found}",
    ]
    lines += [f"trial {r.number} {r.state}: {r.error}" for r in results if r.state in ("failed", "diverged")]
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def student_jobs(plan: Plan) -> dict[str, Job]:
    """The trainings of the plan's students."""
    from asc_ray.training.systems import train_student

    configs = plan.student_configs()
    targets = plan.soft_targets(next(iter(configs.values())).distillation.soft_target)
    source, resources = source_of(plan), plan.config.student_resources
    return {
        name: Job(
            artifact,
            train_student,
            (source, targets, configs[name], resources.gpus),
            resources,
            configs[name].optimizer.epochs,
        )
        for name, artifact in plan.students.items()
    }


def int8_jobs(plan: Plan) -> dict[str, Job]:
    from asc_ray.training.systems import train_int8

    configs = plan.student_configs()
    targets = plan.soft_targets(next(iter(configs.values())).distillation.soft_target)
    source, qat, resources = source_of(plan), plan.config.qat, plan.config.student_resources
    students = [(artifact.path, configs[name]) for name, artifact in plan.students.items()]
    return {
        name: Job(artifact, train_int8, (source, targets, *student, qat, resources.gpus), resources, qat.epochs)
        for (name, artifact), student in zip(plan.int8.items(), students, strict=True)
    }


def evaluation_jobs(plan: Plan, names: Iterable[str]) -> dict[str, Job]:
    """Scores on the test split of the plan's students and int8 forms with these names."""
    from asc_ray.training.ensemble import evaluate_student

    models, config = plan.students | plan.int8, next(iter(plan.student_configs().values()))
    source, resources = source_of(plan), plan.config.student_resources
    return {
        name: Job(
            plan.evaluations[name], evaluate_student, (source, models[name].path, config, resources.gpus), resources
        )
        for name in names
    }


def _build_student(work: Work) -> None:
    plan = work.plan
    work.together(student_jobs(plan))
    _on_trust(work, {name: artifact.facts() for name, artifact in plan.students.items()})
    for number, (name, artifact) in enumerate(plan.students.items()):
        facts = artifact.facts()
        if number == 0:
            work.progress.note(f"{facts['parameters']:,} parameters, {facts['macs'] / 1e6:.2f} M MACs")
        if learned := facts["residual_lambda"]:
            values = ", ".join(f"{layer.split('.')[-1]} {value:.3f}" for layer, value in learned.items())
            work.progress.note(f"{name}: residual normalization learned lambda: {values}")


def _build_int8(work: Work) -> None:
    work.together(int8_jobs(work.plan))


def _build_evaluation(work: Work) -> None:
    from asc_ray.training.ensemble import evaluate_ensemble

    plan = work.plan
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    resources = Resources(cpus=plan.config.logits.resources.cpus)
    ensemble = Job(plan.evaluation, evaluate_ensemble, (work.source, logits, plan.fusion.path), resources)
    work.together({"ensemble": ensemble} | evaluation_jobs(plan, plan.evaluations), tracked=False)
    figures = dict(plan.evaluation.facts())
    for form, (mean, deviation) in scores_over_seeds(plan).items():
        figures[form] = {name: getattr(mean, name) for name in next(iter(figures.values()))}
        if deviation:
            figures[form] |= {f"{name}_deviation": getattr(deviation, name) for name in figures[form]}
    for name, own in figures.items():
        work.tracker.log_summary({f"test/{name}/{key}".replace(" ", "_"): value for key, value in own.items()})


def _build_report(work: Work) -> None:
    from asc_ray.report.collect import write_report

    artifact = work.plan.report
    folder = artifact.open_partial()
    plan = work.plan
    write_report(
        folder / REPORT,
        title=plan.config.name,
        source=work.source,
        student_config=next(iter(plan.student_configs().values())),
        config=dump(plan.config),
        clips=plan.clips,
        teachers=plan.teachers,
        fusion=plan.fusion,
        sweep=plan.sweep,
        search=plan.config.sweep,
        students=plan.students,
        int8=plan.int8,
        evaluation=plan.evaluation,
        student_scores=scores_over_seeds(plan),
    )
    artifact.finish({})
    work.tracker.log_file("", artifact.path / REPORT)
    for name, int8 in plan.int8.items():
        work.tracker.log_file("", stored_file(int8.path, ONNX_MODEL), name)


_BUILDERS: dict[str, Callable[[Work], None]] = {
    "corpus": _build_corpus,
    "ingest": _build_clips,
    "teachers": _build_teachers,
    "logits": _build_logits,
    "fuse": _build_fusion,
    "sweep": _build_sweep,
    "student": _build_student,
    "qat": _build_int8,
    "evaluate": _build_evaluation,
    "report": _build_report,
}
assert tuple(_BUILDERS) == STAGES
