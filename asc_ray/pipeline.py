"""The stage graph: what each stage makes, from what, under which key; skipping, resuming, tracking."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from asc_ray.artifacts import Artifact, content_key, exclusive, write_atomically
from asc_ray.config import Config
from asc_ray.data.corpus import Corpus, read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import UserError
from asc_ray.progress import Progress
from asc_ray.training.systems import StudentConfig

BEST_STUDENT = "best.yaml"
REPORT = "report.html"


class Plan:
    """Every artifact of a configuration, found without building anything.

    Raises CorpusError when the corpus cannot be used.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        corpus = config.corpus
        self.source: Corpus | None = None
        self.demo: Artifact | None = None
        if corpus.path is None:
            self.demo = self._artifact("corpus", "demo", corpus.demo, {})
            inputs = {"corpus": self.demo.key}
        else:
            self.source = read_corpus(corpus.path, corpus.on_bad_clip)
            inputs = {"corpus": self.source.fingerprint}
        ingest = {"on_bad_clip": corpus.on_bad_clip, "impulse_responses": self._impulse_responses_identity()}
        self.clips = self._artifact("clips", "demo" if corpus.path is None else corpus.path.name, ingest, inputs)
        base = {"clips": self.clips.key}
        self.teachers = {
            name: self._artifact(
                "teachers", name, {"recipe": _dump(recipe), "partition": _dump(config.partition)}, base
            )
            for name, recipe in config.teachers.recipes.items()
        }
        self.logits = {
            name: self._artifact("logits", name, {}, {**base, "teacher": teacher.key})
            for name, teacher in self.teachers.items()
        }
        systems = {name: logits.key for name, logits in self.logits.items()}
        fusion = {"fusion": _dump(config.fusion), "partition": _dump(config.partition)}
        self.fusion = self._artifact("fusion", "fusion", fusion, {**base, **systems})
        soft = config.student.distillation.soft_target
        learned = {**base, "soft_target": "none"} if soft == "none" else {**base, "soft_target": self.fusion.key}
        student = {"student": _dump(config.student), "partition": _dump(config.partition)}
        self.sweep: Artifact | None = None
        if config.sweep:
            self.sweep = self._artifact("sweep", "sweep", {**student, "sweep": _dump(config.sweep)}, learned)
            learned = {**learned, "sweep": self.sweep.key}
        self.student = self._artifact("students", "student", student, learned)
        self.int8 = self._artifact("int8", "student", {"qat": _dump(config.qat)}, {"student": self.student.key})
        self.evaluation = self._artifact(
            "evaluation", "test", {}, {**systems, "fusion": self.fusion.key, "int8": self.int8.key}
        )
        self.report = self._artifact("report", config.name, {}, {"evaluation": self.evaluation.key})

    @property
    def key(self) -> str:
        """The configuration's own key: that of its last artifact."""
        return self.report.key

    def by_stage(self) -> dict[str, list[Artifact]]:
        return {
            "corpus": [self.demo] if self.demo else [],
            "ingest": [self.clips],
            "teachers": list(self.teachers.values()),
            "logits": list(self.logits.values()),
            "fuse": [self.fusion],
            "sweep": [self.sweep] if self.sweep else [],
            "student": [self.student],
            "qat": [self.int8],
            "evaluate": [self.evaluation],
            "report": [self.report],
        }

    def trial(self, number: int) -> Artifact:
        """A trial as MLflow sees it; its result is a file of the sweep's artifact."""
        assert self.sweep is not None
        return Artifact(self.config.storage, "sweep", "trial", f"{self.sweep.key}-{number}", {}, {})

    def complete_keys(self) -> set[str]:
        """Keys of all that is finished: artifacts, and trials of a half-done sweep."""
        keys = {artifact.key for artifacts in self.by_stage().values() for artifact in artifacts if artifact.complete}
        if self.sweep is not None:
            keys |= {self.trial(int(file.stem)).key for file in self.sweep.partial.glob("trials/*.json")}
        return keys

    def corpus_root(self) -> Path:
        return self.demo.path if self.demo else self.config.corpus.path  # type: ignore[return-value]

    def impulse_responses(self) -> Path | None:
        """The folder configured, else the corpus' own `dirs`, else none: the built-in bank."""
        if self.config.corpus.impulse_responses:
            return self.config.corpus.impulse_responses
        own = self.corpus_root() / "dirs"
        return own if own.is_dir() else None

    def soft_targets(self) -> Path | None:
        """The folder of the student's soft targets; None for labels alone."""
        target = self.config.student.distillation.soft_target
        if target == "none":
            return None
        return self.logits[target].path if target in self.logits else self.fusion.path / "targets" / target

    def student_config(self) -> StudentConfig:
        """The student's configuration: the sweep's best, where there is a sweep."""
        if self.sweep is None:
            return self.config.student
        best = yaml.safe_load((self.sweep.path / BEST_STUDENT).read_text())
        return StudentConfig.model_validate(best["student"])

    def _artifact(self, stage: str, name: str, config: Any, inputs: Mapping[str, str]) -> Artifact:
        section = config if isinstance(config, dict) else _dump(config)
        key = content_key(stage=stage, config=section, inputs=dict(inputs))
        return Artifact(self.config.storage, stage, name, key, section, dict(inputs))

    def _impulse_responses_identity(self) -> Any:
        if self.demo:
            return str(self.config.corpus.impulse_responses or "the demo corpus' own")
        folder = self.impulse_responses()
        if folder is None:
            return "built-in"
        return sorted((file.name, file.stat().st_size) for file in folder.glob("*.wav"))


def _dump(section: Any) -> dict[str, Any]:
    return section.model_dump(mode="json")


# What each stage needs before it can run, by stage name.
NEEDS: dict[str, tuple[str, ...]] = {
    "corpus": (),
    "ingest": ("corpus",),
    "teachers": ("ingest",),
    "logits": ("teachers",),
    "fuse": ("logits",),
    "sweep": ("fuse",),
    "student": ("fuse", "sweep"),
    "qat": ("student",),
    "evaluate": ("fuse", "qat"),
    "report": ("evaluate",),
}
STAGES = tuple(NEEDS)


def missing(plan: Plan, stage: str) -> list[Artifact]:
    """The stage's artifacts that are not complete."""
    return [artifact for artifact in plan.by_stage()[stage] if not artifact.complete]


def run(config: Config, stages: Sequence[str], progress: Progress) -> Plan:
    """Bring the stages' artifacts into being, skipping what is complete and resuming what is half-done.

    Raises UserError for a user's mistake, ConfigError before any work starts when the cluster cannot run it.
    """
    plan = Plan(config)
    todo = [stage for stage in stages if missing(plan, stage)]
    for stage in stages:
        if stage not in todo and plan.by_stage()[stage]:
            progress.skipped(stage, plan.by_stage()[stage])
    if not todo:
        progress.nothing_to_do()
        return plan
    for stage in todo:
        for need in NEEDS[stage]:
            if need not in todo and missing(plan, need):
                raise UserError(
                    f"{stage}: needs the stage `{need}`, which is not done; run `asc-ray {need}` with the same "
                    "configuration first, or `asc-ray pipeline` for all stages"
                )
    # Heavy imports wait until there is work: `asc-ray status` and a finished configuration answer at once.
    from asc_ray import tracking
    from asc_ray.cluster import runtime

    with exclusive(config.storage):
        progress.note(f"storage {config.storage}")
        tracker = tracking.Tracker(
            config.tracking.uri, config.tracking.experiment, config.storage, config.name, plan.key
        )
        with runtime.connected(config.cluster):
            runtime.check_feasible(
                {
                    "teachers.resources": config.teachers.resources,
                    "logits.resources": config.logits.resources,
                    "student_resources": config.student_resources,
                }
            )
            with tracker.parent(_dump(config), plan.complete_keys()):
                for stage in todo:
                    with progress.stage(stage):
                        _BUILDERS[stage](_Work(plan, tracker, progress))
    return plan


@dataclass
class _Work:
    """What a stage's builder needs: the plan, the tracker, the progress shown."""

    plan: Plan
    tracker: Any
    progress: Progress
    _started: set[str] = field(default_factory=set)

    @contextmanager
    def tracked(self, artifacts: Mapping[str, Artifact]) -> Iterator[Callable[[str, dict[str, Any]], None]]:
        """A listener that opens a child run for each named artifact at its first event and logs every epoch.

        What finished is FINISHED, what did not when the stage raises is FAILED or KILLED.
        """
        status = "FAILED"

        def on_event(name: str, event: dict[str, Any]) -> None:
            artifact = artifacts.get(name)
            if artifact is not None:
                self.tracker.start(name, artifact.key, artifact.config)
                if "epoch" in event:
                    self.tracker.log(name, event, int(event["epoch"]))
                if event.get("finished"):
                    self.tracker.end(name)
            self.progress.event(name, event)

        try:
            yield on_event
            status = "FINISHED"
        except (KeyboardInterrupt, SystemExit):
            status = "KILLED"
            raise
        finally:
            for name, artifact in artifacts.items():
                self.tracker.end(name, "FINISHED" if artifact.complete else status)

    def alone(self, name: str, artifact: Artifact, function: Callable[..., None], *arguments: Any) -> None:
        """Run one function as a tracked task on the cluster; it reports epochs when it takes `on_epoch`."""
        from asc_ray.cluster.runtime import Task, run_tasks

        config = self.plan.config
        reports = "on_epoch" in function.__annotations__
        with self.tracked({name: artifact}) as on_event:
            on_event(name, {"started": True})
            task = Task(name, function, (artifact, *arguments), config.student_resources, reports)
            run_tasks([task], config.cluster.retries, on_event, lambda name, result: None)
            self.tracker.log_file(name, artifact.path / "manifest.json")


def _build_corpus(work: _Work) -> None:
    artifact = work.plan.demo
    assert artifact is not None
    shutil.rmtree(artifact.partial, ignore_errors=True)
    demo = work.plan.config.corpus.demo
    make_demo_corpus(artifact.partial, demo)
    artifact.finish({})


def _build_clips(work: _Work) -> None:
    from asc_ray.cluster.ingest import ingest

    plan, config = work.plan, work.plan.config
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


def _build_teachers(work: _Work) -> None:
    from asc_ray.cluster.teachers import Teacher, train_teachers

    plan, config = work.plan, work.plan.config
    todo = {name: artifact for name, artifact in plan.teachers.items() if not artifact.complete}
    recipes = config.teachers.recipes
    work.progress.expect("teachers", {name: recipes[name].optimizer.epochs for name in todo})
    with work.tracked(todo) as on_event:
        train_teachers(
            {name: Teacher(artifact, recipes[name]) for name, artifact in todo.items()},
            plan.clips.path,
            config.partition,
            config.teachers.resources,
            config.cluster.retries,
            on_event,
        )


def _build_logits(work: _Work) -> None:
    from asc_ray.cluster.ingest import store_logits

    plan, config = work.plan, work.plan.config
    store_logits(
        {
            name: (artifact, plan.teachers[name].path, config.teachers.recipes[name])
            for name, artifact in plan.logits.items()
            if not artifact.complete
        },
        plan.clips.path,
        config.corpus.shard_clips,
        config.logits.batch_size,
        config.logits.resources,
        config.cluster.retries,
        work.progress.event,
    )


def _build_fusion(work: _Work) -> None:
    from asc_ray.training.ensemble import fuse_systems

    plan, config = work.plan, work.plan.config
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    work.alone("fusion", plan.fusion, fuse_systems, plan.clips.path, logits, config.fusion, config.partition)
    facts = plan.fusion.facts()
    figures = facts["validation"]
    single = min(plan.logits, key=lambda name: figures[name]["log_loss"])
    for label, name in {"best single": single, "average": "average", "fusion": "fusion"}.items():
        title = f"{label} ({single})" if name == single else label
        work.progress.note(
            f"{title}: log loss {figures[name]['log_loss']:.3f}, accuracy {100 * figures[name]['accuracy']:.1f} % "
            "on held-out locations"
        )


def _build_sweep(work: _Work) -> None:
    from asc_ray.cluster.sweep import best_student, run_sweep

    plan, config = work.plan, work.plan.config
    assert plan.sweep is not None
    assert config.sweep is not None
    work.progress.expect("sweep", {f"trial-{n:03d}": config.sweep.epochs for n in range(config.sweep.trials)})
    trials = {f"trial-{n:03d}": plan.trial(n) for n in range(config.sweep.trials)}

    def listener(name: str, event: dict[str, Any]) -> None:
        if "parameters" in event:
            work.tracker.start(name, trials[name].key, event["parameters"])
        on_event(name, event)

    with work.tracked(trials) as on_event:
        results = run_sweep(
            plan.sweep,
            plan.clips.path,
            plan.soft_targets(),
            config.student,
            config.sweep,
            config.partition,
            config.student_resources,
            config.cluster.retries,
            listener,
        )
    best = best_student(results, config.student)
    write_atomically(
        plan.sweep.partial / BEST_STUDENT,
        "# The best configuration of the sweep; lay it over another with `base:`.\n"
        + yaml.safe_dump({"student": best}, sort_keys=False),
    )
    plan.sweep.finish({"trials": [json.loads(r.model_dump_json()) for r in results]}, scratch=("trials/*.checkpoints",))
    work.tracker.log_file("", plan.sweep.path / BEST_STUDENT)


def _build_student(work: _Work) -> None:
    from asc_ray.training.systems import train_student

    plan = work.plan
    config = plan.student_config()
    work.progress.expect("student", {"student": config.optimizer.epochs})
    work.alone(
        "student", plan.student, train_student, plan.clips.path, plan.soft_targets(), config, plan.config.partition
    )
    facts = plan.student.facts()
    work.progress.note(f"{facts['parameters']:,} parameters, {facts['macs'] / 1e6:.2f} M MACs")


def _build_int8(work: _Work) -> None:
    from asc_ray.training.systems import train_int8

    plan = work.plan
    work.progress.expect("qat", {"int8": plan.config.qat.epochs})
    work.alone(
        "int8",
        plan.int8,
        train_int8,
        plan.clips.path,
        plan.soft_targets(),
        plan.student.path,
        plan.student_config(),
        plan.config.qat,
        plan.config.partition,
    )


def _build_evaluation(work: _Work) -> None:
    from asc_ray.training.ensemble import evaluate_systems

    plan = work.plan
    logits = {name: artifact.path for name, artifact in plan.logits.items()}
    work.alone(
        "evaluation",
        plan.evaluation,
        evaluate_systems,
        plan.clips.path,
        logits,
        plan.fusion.path,
        plan.student.path,
        plan.student_config(),
        plan.int8.path,
        plan.config.partition,
    )
    for name, figures in plan.evaluation.facts().items():
        work.tracker.log_summary({f"test/{name}/{key}".replace(" ", "_"): v for key, v in figures.items()})


def _build_report(work: _Work) -> None:
    from asc_ray.report.collect import write_report

    artifact = work.plan.report
    folder = artifact.open_partial()
    plan = work.plan
    write_report(
        folder / REPORT,
        title=plan.config.name,
        parts=plan.config.partition,
        student_config=plan.student_config(),
        config=_dump(plan.config),
        clips=plan.clips,
        teachers=plan.teachers,
        fusion=plan.fusion,
        sweep=plan.sweep,
        student=plan.student,
        int8=plan.int8,
        evaluation=plan.evaluation,
    )
    artifact.finish({})
    work.tracker.log_file("", artifact.path / REPORT)
    work.tracker.log_file("", work.plan.int8.path / "model.pt2", "int8")


_BUILDERS: dict[str, Callable[[_Work], None]] = {
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
