"""The report: one HTML page about one run of the pipeline, which loads nothing from elsewhere."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from asc_ray.ensemble.choice import chosen
from asc_ray.ensemble.fusion import Fusion
from asc_ray.evaluation.artifact import Scores
from asc_ray.evaluation.gains import Gain
from asc_ray.evaluation.scores import Evaluation
from asc_ray.evaluation.seeds import Deviation
from asc_ray.report import figures, search_figures
from asc_ray.report.forms import FormRow
from asc_ray.search.trials import TrialResult, Tried, pareto, tried, with_value
from asc_ray.section import Section
from asc_ray.shown import in_markdown

COLORS = {  # by kind, in the order of the systems
    "teacher": ("#9b6fc8",),
    "fusion": ("#37a8bd", "#e0832f"),
    "student": ("#3f7fc4", "#3aa676", "#d0566b", "#b0903a"),
}
TRIALS_SHOWN = 15
CONTENTS = {  # what a reader asks, and the sections that answer, by id
    "What came out": {
        "results": "Results on the test split",
        "devices": "By device",
        "scenes": "By scene",
        "confusions": "Confusions",
    },
    "How sure": {"certainty": "How sure the figures are"},
    "What it costs": {"cost": "What the student costs"},
    "How it was made": {
        "fusion": "Fusion",
        "sweep": "Search for the student",
        "training": "Training",
        "corpus": "Corpus",
        "provenance": "Provenance",
    },
}
COSTS = {"bytes": "bytes of the int8 weights", "macs": "multiply-accumulates of a clip"}


class CorpusSummary(Section):
    name: str
    clips: dict[str, int]  # by part: train, fusion, validation, test
    places: dict[str, int]  # by part
    labels: tuple[str, ...]
    devices: tuple[str, ...]
    unseen_devices: tuple[str, ...]
    bad_clips: int = 0  # left out with corpus.on_bad_clip=skip
    notes: tuple[str, ...] = ()


class SystemResult(Section):
    """A teacher's, a fusion's or a student's results; `kind` sets their position and color.

    `evaluation` is the mean of several seeds if there is a `deviation`.
    """

    name: str
    kind: Literal["teacher", "fusion", "student"]
    evaluation: Evaluation
    deviation: Deviation | None = None


class ComplexityRow(Section):
    model: str
    parameters: int
    macs: int
    bytes_fp32: int
    bytes_int8: int
    peak_activations: int | None = None  # bytes as int8; None where an earlier version has not counted them


class StageTime(Section):
    """When a stage's artifacts were finished, and how long they were worked on; None where that is not known."""

    stage: str
    artifacts: int
    finished: str | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class FusionSection:
    fusion: Fusion
    data: str  # what it was learned on: FusionConfig.data
    objectives: Mapping[str, float]  # J of each system alone, on the clips that the fusion was learned on
    held_out: Scores  # on clips unknown to the systems and the fusion
    test: Scores
    without: Mapping[str, float]  # log loss on the held-out clips of the fusion learned without this system
    without_half: Mapping[str, Gain]  # gain on those clips without the weakest half, by the names of that half; or none
    disagreement: Sequence[Sequence[float]]  # (S, S) share of the held-out clips that two systems answer differently
    far_below: tuple[str, ...] = ()  # a sentence for each system far below the others
    imported: Mapping[str, str] = field(default_factory=dict)  # the file of each system whose logits come from one


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a page shows; it has no section for a field that is empty or None."""

    title: str
    corpus: CorpusSummary
    systems: Sequence[SystemResult]  # on the test split, in the order of the tables; the last is the deliverable
    complexity: Sequence[ComplexityRow] = ()  # the student's first
    forms: Sequence[FormRow] = ()  # of the student
    residual_lambda: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # student -> layer -> learned
    lambda_start: float = 0.5
    fusion: FusionSection | None = None
    energies: np.ndarray | None = None  # (N,) of the training clips
    energy_threshold: float | None = None  # of ADIR, None without it
    curves: figures.Curves = field(default_factory=dict)  # run -> metrics of every epoch
    trials: Sequence[TrialResult] = ()
    importances: Mapping[str, float] = field(default_factory=dict)  # of the search's parameters
    cost: str | None = None  # what the search minimized besides its objective, if anything
    student_config: str = ""  # YAML
    config: str = ""  # YAML
    times: Sequence[StageTime] = ()  # in the order of the stages
    programs: Sequence[str] = ()  # the versions of asc-ray that made the artifacts
    machines: Sequence[str] = ()  # that made them
    versions: Mapping[str, str] = field(default_factory=dict)
    lineage: Mapping[str, str] = field(default_factory=dict)  # artifact -> key


def environment() -> Environment:
    """Return the environment of the templates beside this file: HTML pages, and the card in Markdown."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: not str(name).endswith(".md.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.2f}"
    made.filters["metric"] = _metric
    made.filters["plain"] = figures.plain
    made.filters["duration"] = _duration
    made.filters["md"] = in_markdown
    return made


def render(data: ReportData, out: Path) -> None:
    """Write the page to `out`; equal data gives equal bytes."""
    best_teacher = max(_of_kind(data, "teacher"), key=lambda s: s.evaluation.accuracy, default=None)
    devices = sorted(
        {device for system in data.systems for device in system.evaluation.per_device},
        key=lambda device: (device in data.corpus.unseen_devices, device),
    )
    html = (
        environment()
        .get_template("template.html.j2")
        .render(
            data=data,
            students=_of_kind(data, "student"),
            others=[system for system in data.systems if system.kind != "student"],
            compared=_compared(data, best_teacher),
            best_teacher=best_teacher,
            devices=devices,
            scenes=_scenes(data.systems[-1]),
            deliverable=data.systems[-1],
            cut=any(system.evaluation.by_recording for system in data.systems),
            finished=max((time.finished for time in data.times if time.finished), default=None),
            contents=_contents(data),
            titles={id: title for sections in CONTENTS.values() for id, title in sections.items()},
            trials=_best_trials(data.trials),
            searched=len(tried(data.trials)),
            front=pareto(data.trials),
            chosen_multiple=chosen(data.fusion.fusion.choice) if data.fusion else 1.0,
            parameters=sorted({name for trial in data.trials for name in trial.parameters}),
            figures={name: Markup(svg) for name, svg in _figures(data, best_teacher).items()},
        )
    )
    out.write_text(html, encoding="utf-8")


def _contents(data: ReportData) -> dict[str, dict[str, str]]:
    """Return the sections of the page by what they answer: those that have data."""
    there = {
        "certainty": data.fusion or _of_kind(data, "student"),
        "cost": data.complexity,
        "fusion": data.fusion,
        "sweep": data.trials,
        "training": data.curves or data.student_config,
        "provenance": data.versions or data.lineage or data.config or data.times,
    }
    shown = {
        question: {id: title for id, title in sections.items() if there.get(id, True)}
        for question, sections in CONTENTS.items()
    }
    return {question: sections for question, sections in shown.items() if sections}


def _scenes(system: SystemResult) -> list[tuple[str, int, tuple[str, float] | None]]:
    """Return each scene, the number of its test clips, and the most frequent wrong answer with its share, or None."""
    e, runs, found = system.evaluation, system.deviation.runs if system.deviation else 1, []
    for scene, row in zip(e.labels, e.confusion, strict=True):
        wrong = {label: count for label, count in zip(e.labels, row, strict=True) if label != scene and count}
        most = max(wrong, key=wrong.__getitem__, default=None)
        found.append((scene, sum(row) // runs, (most, wrong[most] / sum(row)) if most else None))
    return found


def _best_trials(trials: Sequence[TrialResult]) -> list[Tried]:
    """Return the best trials, finalists first, because a mean over seeds is worth more than one lucky training."""
    return sorted(
        tried(trials),
        key=lambda one: (one.deviation is None, one.result.state != "complete", -one.value, one.result.number),
    )[:TRIALS_SHOWN]


def _of_kind(data: ReportData, kind: str) -> list[SystemResult]:
    return [system for system in data.systems if system.kind == kind]


def _compared(data: ReportData, best_teacher: SystemResult | None) -> list[SystemResult]:
    """Return the systems of the headline and the bars: of the teachers only the best, and all others."""
    return [system for system in data.systems if system.kind != "teacher" or system is best_teacher]


def _figures(data: ReportData, best_teacher: SystemResult | None) -> dict[str, str]:
    """Return the <svg> elements of the sections that have data."""
    colors = {
        system.name: COLORS[kind][i % len(COLORS[kind])]
        for kind in COLORS
        for i, system in enumerate(_of_kind(data, kind))
    }
    drawn = {
        "device_accuracy": figures.device_accuracy(
            {s.name: s.evaluation for s in _compared(data, best_teacher)}, colors, data.corpus.unseen_devices
        )
    }
    if data.fusion:
        fusion = data.fusion.fusion
        drawn["fusion_weights"] = figures.fusion_weights(
            dict(zip(fusion.systems, fusion.weights.tolist(), strict=True)),
            fusion.center.tolist(),
            dict(zip(fusion.labels, fusion.biases.tolist(), strict=True)),
        )
        if len(fusion.systems) > 1:
            drawn["disagreement"] = figures.disagreement(fusion.systems, data.fusion.disagreement)
        students = {system.name: system.evaluation for system in _of_kind(data, "student")}
        drawn["reliability"] = figures.reliability(
            {"test split": {**data.fusion.test.systems, **students}, "held-out clips": data.fusion.held_out.systems}
        )
    if data.energies is not None:
        drawn["energy_histogram"] = figures.energy_histogram(data.energies, data.energy_threshold)
    if data.curves:
        teachers = {system.name for system in _of_kind(data, "teacher")}
        panels = {
            "teachers": {run: own for run, own in data.curves.items() if run.split("-fold")[0] in teachers},
            "student": {run: own for run, own in data.curves.items() if run.split("-fold")[0] not in teachers},
        }
        drawn["training_curves"] = figures.training_curves({title: runs for title, runs in panels.items() if runs})
    if trials := tried(data.trials):
        drawn["sweep"] = search_figures.sweep(trials)
        drawn["parallel_coordinates"] = search_figures.parallel_coordinates(trials)
    if data.importances:
        known = Counter(name for trial in with_value(data.trials) for name in trial.parameters)
        drawn["importance"] = search_figures.importance(data.importances, known)
    if data.cost:
        drawn["pareto_front"] = search_figures.pareto_front(trials, pareto(data.trials), COSTS[data.cost])
    return drawn


def _metric(value: float) -> str:
    """Return a count with a decimal prefix and four digits: 13760 is 13.76 K."""
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:g}"


def _duration(seconds: float | None) -> str:
    """Return seconds as a person says them: 12 s, 3 min 20 s, 2 h 05 min."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
