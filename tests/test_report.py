"""The report: self-contained, complete, escaped, reproducible, and drawn from the data."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from asc_ray.artifacts import Artifact, write_record
from asc_ray.embedded.generate import generate
from asc_ray.ensemble.fuse import disagreement
from asc_ray.ensemble.fusion import fit
from asc_ray.evaluation.artifact import Scores
from asc_ray.evaluation.gains import gain
from asc_ray.evaluation.scores import Evaluation, evaluate
from asc_ray.report import figures, search_figures
from asc_ray.report.collect import stage_time
from asc_ray.report.forms import report_rows
from asc_ray.report.page import ComplexityRow, CorpusSummary, FusionSection, ReportData, StageTime, SystemResult, render
from asc_ray.runtime import EXAMPLE, Bundle
from asc_ray.search.trials import TrialResult, tried

LABELS = (
    "airport", "bus", "metro", "metro_station", "park", "public_square", "shopping_mall", "street_pedestrian",
    "street_traffic", "tram",
)  # fmt: skip
DEVICES = ("a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6")
UNSEEN = ("s4", "s5", "s6")
FAMILIES = ("passt_fms", "passt_dirfms", "cpr_128k_fms", "cpr_128k_dirfms")
TEACHERS = tuple(f"{family}_{i}" for family in FAMILIES for i in (1, 2, 3))
VOID = {"meta", "link", "img", "br", "hr", "input", "source", "embed", "base", "area", "col", "track", "wbr"}


def example(seed: int = 0) -> ReportData:
    """A made-up run of the whole pipeline with the sizes of the real one, but fewer clips."""
    rng = np.random.default_rng(seed)
    clips = 2_700
    scene, device = np.arange(clips) % 10, np.array(DEVICES)[np.arange(clips) // 10 % 9]
    hard = np.isin(device, UNSEEN)

    shared = rng.normal(0, 1.1, (clips, 10))  # what every system gets wrong alike

    def logits(merit: float) -> np.ndarray:
        near = np.roll(np.eye(10), 1, axis=1)  # every scene has one that it is taken for
        signal = merit * (np.eye(10) + 0.45 * near)[scene] * (1 - 0.3 * hard[:, None])
        return signal + shared + rng.normal(0, 0.7, (clips, 10))

    def result(name: str, kind: str, z: np.ndarray) -> SystemResult:
        evaluation = evaluate(z, scene, device, LABELS, UNSEEN)
        return SystemResult.model_validate({"name": name, "kind": kind, "evaluation": evaluation})

    singles = np.stack([logits(1.8 + 0.07 * i) for i in range(12)])
    fusion = fit(singles, scene, systems=TEACHERS, labels=LABELS)
    systems = [result(name, "teacher", z) for name, z in zip(TEACHERS, singles, strict=True)]
    systems += [
        result("average", "fusion", singles.mean(0)),
        result("fusion", "fusion", fusion.apply(singles)),
        result("student fp32", "student", logits(2.2)),
        result("student int8", "student", logits(2.1)),
    ]
    place = np.arange(clips) // 90
    scores = Scores(
        systems={s.name: s.evaluation for s in systems},
        gain=gain(singles.mean(0), fusion.apply(singles), scene, place),
    )
    return ReportData(
        title="demo: twelve teachers, one student",
        corpus=CorpusSummary(
            name="synthetic demo corpus, seed 0",
            clips={"train": 139_620, "fusion": 16_752, "validation": 13_960, "test": 29_680},
            places={"train": 84, "fusion": 10, "validation": 9, "test": 76},
            labels=LABELS,
            devices=DEVICES,
            unseen_devices=UNSEEN,
            bad_clips=2,
            notes=("The corpus is synthetic; its figures say nothing about real places.",),
        ),
        systems=systems,
        complexity=(
            complexity("DS-FlexiNet sm1", 13_760, 3_880_000),
            complexity("cp_resnet", 127_684, 29_000_000),
        ),
        residual_lambda={"student": {"features.norm1": 0.4321, "features.norm2": -0.05}},
        fusion=FusionSection(
            fusion=fusion,
            data="holdout",
            objectives={s.name: s.evaluation.log_loss for s in systems[:12]},
            held_out=scores.model_copy(update={"systems": {s.name: s.evaluation for s in systems[:14]}}),
            test=scores,
            without=dict.fromkeys(TEACHERS, 0.9),
            without_half={", ".join(TEACHERS[:6]): gain(fusion.apply(singles), singles.mean(0), scene, place)},
            disagreement=disagreement(singles),
            far_below=("passt_fms_1 is far below the others: it is underfitted",),
        ),
        energies=np.append(rng.lognormal(4.6, 1.5, 8_000), [0.0, 0.0]),
        energy_threshold=323.0,
        curves={name: curve(rng, 25 if "passt" in name else 40) for name in TEACHERS}
        | {"student": curve(rng, 40), "QAT": curve(rng, 12, floor=0.7)},
        trials=tuple(trial(rng, number) for number in range(40)),
        importances={"optimizer.learning_rate": 0.7, "distillation.tau": 0.3},
        cost="bytes",
        student_config="model:\n  name: ds_flexinet\noptimizer:\n  learning_rate: 0.0021\n",
        config="name: demo\nstorage: runs\n",
        times=(
            StageTime(stage="teachers", artifacts=12, finished="2026-11-27 03:17 UTC", seconds=11_125.0),
            StageTime(stage="qat", artifacts=1, finished="2026-11-27 03:20 UTC", seconds=59.7),
            StageTime(stage="evaluate", artifacts=3, finished=None, seconds=None),
        ),
        programs=("0.3.0, commit 0123456789ab",),
        machines=("a processor, 2 cores, 8 GiB",),
        versions={"asc-ray": "0.1.0", "torch": "2.13.0", "ray": "2.60.0", "numpy": "2.4.1"},
        lineage={name: f"{rng.integers(2**60):015x}" for name in ("clips", "teachers", "logits", "fusion", "student")},
    )  # fmt: skip


def complexity(model: str, parameters: int, macs: int) -> ComplexityRow:
    return ComplexityRow(
        model=model,
        parameters=parameters,
        macs=macs,
        bytes_fp32=4 * parameters,
        bytes_int8=parameters,
        peak_activations=81_920,
    )


def curve(rng: np.random.Generator, epochs: int, floor: float = 0.9) -> tuple[dict[str, float], ...]:
    falling = np.exp(-np.arange(epochs) / 8)
    loss = floor + 1.3 * falling + rng.normal(0, 0.02, epochs)
    accuracy = 0.62 - 0.45 * falling + rng.normal(0, 0.01, epochs)
    return tuple(
        {"epoch": i + 1, "loss": float(a), "validation_accuracy": float(b)}
        for i, (a, b) in enumerate(zip(loss, accuracy, strict=True))
    )


def trial(rng: np.random.Generator, number: int) -> TrialResult:
    rate = float(10 ** rng.uniform(-4, -2))
    parameters = {
        "optimizer.learning_rate": rate,
        "augment.freq_mixstyle.p": float(rng.uniform(0, 0.8)),
        "augment.dir.p": float(rng.uniform(0, 0.8)),
        "distillation.tau": float(rng.uniform(1, 4)),
        "distillation.hard_label_weight": float(rng.uniform(0, 0.4)),
        "model.normalization": str(rng.choice(["residual", "frequency", "batch"])),
        "augment.roll": int(rng.integers(0, 8_000)),
    }
    epochs = 30 if number % 3 == 0 else 10
    state = "diverged" if number == 17 else "complete" if epochs == 30 else "stopped"
    value = 0.58 - 0.08 * abs(np.log10(rate / 2e-3)) - (0.05 if state == "stopped" else 0) + rng.normal(0, 0.01)
    curve = tuple(float(v) for v in value * (1 - np.exp(-np.arange(1, epochs + 1) / 4)))
    return TrialResult.model_validate(
        {"number": number, "parameters": parameters, "curve": curve, "state": state, "cost": 1e4 * (1 + number % 5)}
    )


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag was closed by its own end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture(scope="module")
def data() -> ReportData:
    return example()


@pytest.fixture(scope="module")
def html(data: ReportData, tmp_path_factory: pytest.TempPathFactory) -> str:
    out: Path = tmp_path_factory.mktemp("report") / "report.html"
    render(data, out)
    return out.read_text(encoding="utf-8")


def test_nothing_is_loaded(html):
    assert "://" not in html
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image"}
    assert "@import" not in html
    assert {ref[:1] for ref in re.findall(r"url\(([^)]*)\)", html)} <= {"#"}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "srcset", "data"}
        assert (attributes.get("xlink:href") or attributes.get("href") or "#").startswith("#")


def test_everything_is_there(html, data):
    page = Page(html)
    for system in data.systems:
        e = system.evaluation
        row = re.search(rf"<th>{system.name}</th><td>2,700</td>(.*?)</tr>", html)
        assert row
        cells = re.findall(r"<td>(?:<b>)?([\d.]+)", row[1])
        shares = [e.accuracy, e.macro_accuracy, *(e.groups[group] for group in ("seen", "unseen", "real"))]
        assert cells == [f"{100 * x:.2f}" for x in shares] + [f"{x:.3f}" for x in (e.log_loss, e.calibration_error)]
    assert [a["class"] for tag, a in page.tags if tag == "svg"] == [
        "device_accuracy", "reliability", "fusion_weights", "disagreement", "sweep", "importance",
        "parallel_coordinates", "pareto_front", "training_curves", "energy_histogram",
    ]  # fmt: skip
    assert "from 0.5: norm1 0.432, norm2 -0.050." in page.text
    for expected in ("13.76 K", "3.88 M", "81.92", "139,620 of 84 places", "2 digitally silent clips", "ds_flexinet"):
        assert expected in page.text
    for expected in (*data.lineage.values(), *data.machines, "3 h 05 min", "1 min 00 s", "commit 0123456789ab"):
        assert expected in page.text


def test_the_contents_lead_to_every_section_in_the_order_that_a_reader_asks(html):
    page = Page(html)
    sections = [a["id"] for tag, a in page.tags if tag == "section"]
    assert sections == [
        "results", "devices", "scenes", "confusions", "certainty", "cost", "fusion", "sweep", "training", "corpus",
        "provenance",
    ]  # fmt: skip
    assert re.findall(r'<a href="#(\w+)">', html) == sections


def test_configurations_and_the_teachers_confusions_are_folded(html, data):
    tags = [tag for tag, _ in Page(html).tags]
    assert tags.count("pre") == 2
    assert not re.search(r"<pre>", re.sub(r"<details>.*?</details>", "", html, flags=re.S))
    assert "<details open" not in html
    folded = "".join(re.findall(r"<details>.*?</details>", html, flags=re.S))
    for system in data.systems:
        title = f"<th>{system.name}: {100 * system.evaluation.accuracy:.2f} %</th>"
        assert html.count(title) == 1
        assert (title in folded) == (system.kind != "student")


def test_the_table_by_scene_is_the_evaluation(html, data):
    table = re.search(r'<table class="wide" id="by-scene">.*?</table>', html, re.S)
    assert table
    best = max(data.systems[:12], key=lambda system: system.evaluation.accuracy)
    for k, label in enumerate(LABELS):
        row = re.search(rf"<tr><th>{label}</th><td>270</td>(.*?)</tr>", table[0])
        assert row
        *shares, taken = re.findall(r"<td>(.*?)</td>", row[1])
        shown = [best, *data.systems[12:]]
        assert shares == [f"{100 * system.evaluation.per_scene[label]:.2f}" for system in shown]
        wrong = np.array(data.systems[-1].evaluation.confusion)[k]
        wrong[k] = -1
        assert taken == f"{LABELS[wrong.argmax()]}, {100 * wrong.max() / 270:.0f} %"


@pytest.fixture
def repeated(data) -> tuple[TrialResult, ...]:
    """A lucky trial, a finalist with three seeds, of which one failed, and one that cost less than both."""
    values = ((0, 0.9, 5, None), (1, 0.8, 3, None), (2, 0.6, 1, None), (3, 0.7, 3, 1), (4, 0.0, 3, 1))
    same = {"state": "complete", "parameters": {"x": 0.5}}
    trials = [
        data.trials[0].model_copy(update={**same, "number": n, "curve": (v,), "cost": 1e4 * cost, "repeats": of})
        for n, v, cost, of in values
    ]
    trials[4] = trials[4].model_copy(update={"state": "failed", "curve": ()})
    return tuple(trials)


def test_a_trial_has_one_value_in_tables_and_figures(data, tmp_path, repeated):
    """The mean over its seeds; repetitions are no trials of their own, and finalists stand first."""
    alone = replace(data, fusion=None, energies=None, curves={}, trials=repeated, importances={"x": 1.0})
    render(alone, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = re.findall(r"<tr><td>(\d)</td><td><b>([\d.]+)</b>(.*?)</td>", html)
    assert found == [("1", "75.00", " <small>± 7.07</small>"), ("0", "90.00", ""), ("2", "60.00", "")]
    front = re.findall(r"<tr><td>(\d)</td><td>[\d,]+</td><td>([\d.]+)", html)
    assert front == [("2", "60.00"), ("1", "75.00"), ("0", "90.00")]
    assert '<p class="soft">3 trials. ' in html
    assert "<!-- 100 %, 3 trials -->" in html
    dots = [search_figures.sweep(tried(trials)).count("<use") for trials in (repeated[:3], repeated)]
    assert dots[1] - dots[0] == 2 * 2  # the two caps of the deviation's bar, in the course and against the parameter


def test_numbers_have_no_exponent():
    for value, text in (
        (1000.0, "1000"),
        (0.00012345, "0.000123"),
        (123456.0, "123000"),
        (2.0, "2"),
        (1e-7, "0.0000001"),
    ):
        assert figures.plain(value) == text
    energies = np.geomspace(1e-3, 1e6, 50)
    ticks = re.findall(r"<!-- ([\d.]+) -->", figures.energy_histogram(energies, 323.0))
    assert {"0.01", "1", "1000000"} <= set(ticks)
    trials = tried(
        [TrialResult(number=n, parameters={"x": 10.0 ** (n - 5)}, curve=(0.5,), state="complete") for n in range(9)]
    )
    drawn = search_figures.sweep(trials) + search_figures.parallel_coordinates(trials)
    assert not re.search(r"<!-- -?[\d.]+e[+-]?\d+ -->", drawn)
    assert "<!-- 0.00001 -->" in drawn


def test_what_overlaps_counts_once_in_a_stage_s_time(tmp_path):
    """Two artifacts at once, a gap in which nothing was made, a third; and one by a version that wrote no times."""

    def artifact(name: str, **made: str) -> Artifact:
        one = Artifact(tmp_path, "teachers", name, name * 16, {}, {})
        one.open_partial()
        one.finish({})
        record = one.manifest() | {"made": made}
        write_record(one.path / "manifest.json", record)
        return one

    def at(minute: int) -> str:
        return f"2026-11-27T03:{minute:02d}:00+00:00"

    some = [artifact(name, began=at(a), ended=at(b)) for name, a, b in (("c", 50, 51), ("a", 0, 10), ("b", 5, 12))]
    assert stage_time("teachers", some) == StageTime(
        stage="teachers", artifacts=3, finished="2026-11-27 03:51 UTC", seconds=13 * 60.0
    )
    older = stage_time("teachers", [*some, artifact("d")])
    assert (older.artifacts, older.finished, older.seconds) == (4, None, None)


def test_what_failed_does_not_rule_the_scale():
    good = [TrialResult(number=n, parameters={"x": 90 + n}, curve=(0.9 + n / 100,), state="complete") for n in range(4)]
    failed = TrialResult(number=4, parameters={"x": 92}, curve=(), state="failed", error="no memory")
    few, all_ = tried(good), tried([*good, failed])
    alone, both = (re.findall(r"<!-- (\d\d?\.\d) -->", search_figures.sweep(t)) for t in (few, all_))
    assert alone
    assert min(map(float, both)) > 80
    lines = [search_figures.parallel_coordinates(t).count("<path") for t in (few, all_)]
    assert lines[0] == lines[1]


def test_ids_are_unique_and_references_lead_somewhere(html):
    ids = re.findall(r'\bid="([^"]*)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]*)"', html) + re.findall(r"url\(#([^)]*)\)", html)) <= set(ids)


def test_equal_data_gives_equal_bytes(html, tmp_path):
    render(example(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_names_are_escaped(data, tmp_path):
    evil = '<script>alert("$x^$")</script>--> & <b>'
    systems = [data.systems[0].model_copy(update={"name": evil}), data.systems[-1].model_copy(update={"name": evil})]
    render(
        ReportData(
            title=evil,
            corpus=data.corpus.model_copy(update={"name": evil, "notes": (evil,)}),
            systems=systems,
            curves={evil: data.curves["QAT"]},
            trials=[data.trials[0].model_copy(update={"parameters": {evil: evil}})],
            config=evil,
            student_config=evil,
            times=[data.times[0].model_copy(update={"stage": evil})],
            programs=[evil],
            machines=[evil],
            lineage={evil: evil},
        ),
        tmp_path / "evil.html",
    )
    html = (tmp_path / "evil.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script"} & {tag for tag, _ in page.tags}
    assert evil in page.words  # as text, just as it was given
    assert html.count("<b>") == 3 + 1 + 2 * len(systems)  # the template's own: contents, one trial, two tables


def test_parts_without_data_have_no_section(data, tmp_path):
    bare = ReportData(title="bare", corpus=data.corpus, systems=data.systems[:1])
    render(bare, tmp_path / "bare.html")
    page = Page((tmp_path / "bare.html").read_text(encoding="utf-8"))
    assert [a["id"] for tag, a in page.tags if tag == "section"] == [
        "results", "devices", "scenes", "confusions", "corpus",
    ]  # fmt: skip
    assert [a["class"] for tag, a in page.tags if tag == "svg"] == ["device_accuracy"]


def test_missing_devices_and_scenes(data, tmp_path):
    """A system tested on fewer devices, and a scene without clips."""
    full = data.systems[-1].evaluation
    one = evaluate(np.eye(10)[:9], np.arange(9), ["a"] * 9, LABELS, [])
    systems = [SystemResult(name=n, kind="student", evaluation=e) for n, e in (("full", full), ("one", one))]
    render(replace(data, systems=systems, fusion=None, trials=()), tmp_path / "page.html")
    row = re.findall(r"<th>one</th>(.*?)</tr>", (tmp_path / "page.html").read_text(encoding="utf-8"))[1]
    assert row.count("–") == 8


def bars(svg: str) -> int:
    return len(re.findall(r'<g id="[\w-]*patch_\d+">', svg))


def test_a_bar_for_every_device_of_every_system(data):
    evaluations: dict[str, Evaluation] = {s.name: s.evaluation for s in data.systems[-2:]}
    colors = dict.fromkeys(evaluations, "#123456")
    two = figures.device_accuracy(evaluations, colors, ())
    one = figures.device_accuracy({"student int8": evaluations["student int8"]}, colors, ())
    assert bars(two) - bars(one) == len(DEVICES) + 1 + 1  # devices, all clips, the legend's entry


def test_extreme_data_can_be_drawn():
    """Smoke: one silent clip, one diverged trial, one epoch, long names."""
    assert "<path" in figures.energy_histogram(np.zeros(1), 323.0)
    assert "<path" in figures.energy_histogram(np.full(5, 7.0), None)
    diverged = TrialResult(number=0, parameters={"x" * 80: True}, curve=(), state="diverged")
    for trials in map(tried, ([diverged], [diverged.model_copy(update={"state": "failed"})])):
        assert "<path" in search_figures.sweep(trials)
        assert "<path" in search_figures.parallel_coordinates(trials)
        assert "<path" in search_figures.pareto_front(trials, [], "bytes")
    assert "<path" in figures.training_curves({"student": {"s": [{"epoch": 1, "loss": 2.0}]}})
    assert "<path" in figures.fusion_weights({"only": 1.0}, [0.9], {"x": 0.5, "y": -0.5})


def test_forms_of_a_student_in_the_report(data, tmp_path):
    """As far as they are known before an export; what has no form in C is said, with the reason."""
    model, frontend = (EXAMPLE / "model.onnx").read_bytes(), Bundle(EXAMPLE).frontend
    fp32, onnx, c = report_rows(60_000, 50_000, model, frontend)
    assert (fp32.bytes, fp32.ram) == ("60,000 (parameters)", "200,000 (activations)")
    assert onnx.bytes == f"{len(model):,} (file)"
    source = generate(EXAMPLE)
    assert c.bytes == f"{source.weights:,} (weights)"
    assert c.ram == f"{source.arena + 2 * frontend.samples:,} (with a clip's samples)"
    *_, none = report_rows(60_000, None, model, replace(frontend, n_fft=3072))
    assert none.bytes.startswith("none: model.onnx: n_fft is 3072")
    render(replace(data, forms=[fp32, onnx, none]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td>60,000 (parameters)</td><td>200,000 (activations)</td>" in page
    assert "none: model.onnx: n_fft is 3072" in page
