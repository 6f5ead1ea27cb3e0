"""Tables and figures of the paper: what a command leaves behind, and its figures against what they are made of."""

import csv
import io
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, command, joined
from mlflow.tracking import MlflowClient

from asc_ray.config.composition import load_config
from asc_ray.data.config import DemoConfig
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import ConfigError
from asc_ray.evaluation.artifact import read_evaluation
from asc_ray.evaluation.gains import Gain, Interval
from asc_ray.evaluation.scores import evaluate
from asc_ray.evaluation.seeds import over_seeds
from asc_ray.plan import Plan
from asc_ray.progress import Progress
from asc_ray.report import table
from asc_ray.report.table import ComparedRow, Comparison
from asc_ray.tables import planned, read_table

LABELS = ("bus", "park", "tram")
PAPER = Path(__file__).resolve().parents[2] / "shared" / "paper" / "ds-flexinet.txt"


def made_up(seed: int):
    rng = np.random.default_rng(seed)
    scene, device = np.arange(60) % 3, np.array(["a", "b", "s4", "s5"])[np.arange(60) % 4]
    return evaluate(2 * np.eye(3)[scene] + rng.normal(0, 1.5, (60, 3)), scene, device, LABELS, ["s4", "s5"])


def compared(*runs, paper=None, int8=None) -> ComparedRow:
    scores = over_seeds([made_up(seed) for seed in runs])
    return ComparedRow(
        name=f"row | {runs[0]}", parameters=12_345, macs=6_789_000, scores=scores, int8=int8, paper=paper or {}
    )


def comparison(*rows) -> Comparison:
    return Comparison(
        title="A <title>", corpus="made & up", training_clips=[1_234], unseen_devices=("s4", "s5"), rows=rows
    )


def test_the_mean_over_seeds_is_the_mean_and_the_deviation_the_sample_s():
    runs = [made_up(seed) for seed in range(4)]
    mean, deviation = over_seeds(runs)
    assert deviation.runs == 4
    for name, share in mean.accuracies().items():
        own = [run.accuracies()[name] for run in runs]
        assert share == pytest.approx(np.mean(own))
        assert deviation.accuracies()[name] == pytest.approx(np.std(own, ddof=1))
    assert mean.log_loss == pytest.approx(np.mean([run.log_loss for run in runs]))
    assert np.array_equal(mean.confusion, sum(np.array(run.confusion) for run in runs))
    assert sum(own.clips for own in mean.reliability) == 4 * 60
    right = sum(own.clips * own.accuracy for own in mean.reliability) / 240
    assert right == pytest.approx(mean.accuracy)
    assert len({round(own.confidence * 15 - 0.5) for own in mean.reliability}) == len(mean.reliability)
    assert over_seeds(runs[:1]) == (runs[0], None)


def test_a_table_has_ours_and_the_paper_s_in_one_order(tmp_path):
    one, three = compared(0, paper={"a": 71.34, "all": 60.1, "macs": 3.88, "int8 kB": 13.5}), compared(1, 2, 3)
    three = ComparedRow(**{**vars(three), "int8": three.scores})
    table.write(comparison(one, three), tmp_path)
    head, _, *rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    sizes = "parameters, K | MACs, M | float32 kB | int8 kB"
    assert head == f"|  | {sizes} | a | b | s4 | s5 | seen | unseen | all | all, int8 | log loss |"
    assert len(rows) == 3
    first, paper, second = ([text.strip() for text in row.replace("\\|", "/").split("|")[1:-1]] for row in rows)
    assert first[:5] == ["row / 0", "12.35", "6.79", "49.38", "12.35"]
    assert first[11:13] == [f"{100 * made_up(0).accuracy:.1f}", ""]
    assert paper == ["the paper, TAU22", "", "3.88", "", "13.50", "71.34", "", "", "", "", "", "60.10", "", ""]
    mean, deviation = three.scores
    assert second[11] == second[12] == f"{100 * mean.accuracy:.1f} ± {100 * deviation.accuracy:.1f}"
    assert second[13] == f"{mean.log_loss:.3f} ± {deviation.log_loss:.3f}"
    read = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [(line["row"], line["source"], line["seeds"]) for line in read] == [
        ("row | 0", "ours", "1"), ("row | 0", "paper", ""), ("row | 1", "ours", "3"),
    ]  # fmt: skip
    assert float(read[2]["s4_deviation"]) == pytest.approx(100 * deviation.per_device["s4"], rel=1e-5)
    html = (tmp_path / "table.html").read_text()
    assert "A &lt;title&gt;" in html
    assert "made &amp; up" in html
    assert html.count("<tr") == 4


def test_a_difference_to_the_first_row_says_whether_it_is_told_from_none(tmp_path):
    better = Interval(value=0.021, low=0.004, high=0.04)
    gains = {"unseen": Gain(log_loss=better, accuracy=Interval(value=-0.01, low=-0.03, high=0.015), places=7, runs=3)}
    gains["all"] = Gain(log_loss=better, accuracy=better, places=9, runs=3)
    first, second = compared(0, 1, 2), ComparedRow(**{**vars(compared(3, 4, 5)), "gains": gains, "over": "row | 0"})
    table.write(comparison(first, second), tmp_path)
    *_, head, _, row = (tmp_path / "table.md").read_text().splitlines()
    assert head == "|  | against | unseen | all | log loss |"
    figures = "-1.0 (-3.0 to +1.5), not told from 0 | +2.1 (+0.4 to +4.0) | -0.021 (-0.040 to -0.004)"
    assert row == f"| row \\| 3 | row \\| 0 | {figures} |"
    assert "resampling 9 places and 3 seeds" in (tmp_path / "table.html").read_text()


@pytest.mark.parametrize("number", ["2", "3", "4", "5"])
def test_the_paper_s_tables_load_and_their_rows_differ(number):
    spec, _ = read_table("tables", number)
    students = []
    for row in spec.rows:
        values = {**spec.set, **row.set}
        students.append(
            load_config(
                "small", ["sweep=null", *(f"{k}={'null' if v is None else v}" for k, v in values.items())]
            ).student
        )
        assert students[-1].seeds == 3
        assert 40 < row.paper["all"] < 70
    assert len(set(map(repr, students))) == len(students)


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not here")
@pytest.mark.parametrize("number", ["2", "3", "4", "5"])
def test_the_paper_s_figures_are_those_of_the_paper(number):
    lines = [line.split("|") for line in PAPER.read_text().splitlines() if line.startswith("|")]
    cells = [[float(cell) for cell in line if cell.strip().replace(".", "").isdigit()] for line in lines]

    def has_in_order(line: list[float], figures: list[float]) -> bool:
        left = iter(line)
        return all(figure in left for figure in figures)

    for row in read_table("tables", number)[0].rows:
        assert any(has_in_order(line, list(row.paper.values())) for line in cells), row.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "6"], "6: no such table; known: 2, 3, 4, 5"),
        (["figure", "4"], "4: no such figure; known: 2, 3"),
        (["table", "rows.yaml"], "rows: is required"),
        (["table", "against.yaml"], "row first: against: found 'frist'; allowed: another row, of second"),
        (["table", "wrong.yaml"], "student.optimizer.epoch: unknown key"),
        (["table", "column.yaml"], "row first: paper.al: no such column; did you mean all?"),
        (["table", "large.yaml"], "row second: student.model: cp_resnet is too large for the device"),
        (
            ["table", "gru.yaml"],
            "row second: student.model: cnn_gru has no int8 form, because a GRU feeds its state back",
        ),
        (["table", "elsewhere.yaml"], "row second: storage: a table has one"),
        (["table", "apart.yaml"], "row second: corpus: differs from that of row first; a table is of one corpus"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, arguments, message):
    (tmp_path / "rows.yaml").write_text("title: none\n")
    (tmp_path / "wrong.yaml").write_text("title: x\nrows: [{name: first, set: {student.optimizer.epoch: 3}}]\n")
    (tmp_path / "against.yaml").write_text("title: x\nrows: [{name: first, against: frist}, {name: second}]\n")
    elsewhere = "{name: second, set: {storage: other}}"
    (tmp_path / "elsewhere.yaml").write_text(f"title: x\nrows: [{{name: first}}, {elsewhere}]\n")
    apart = "{name: second, set: {corpus.demo.seed: 7}}"
    (tmp_path / "apart.yaml").write_text(f"title: x\nrows: [{{name: first}}, {apart}]\n")
    (tmp_path / "column.yaml").write_text("title: x\nrows: [{name: first, paper: {al: 60}}]\n")
    large = "{name: second, set: {student.model: {name: cp_resnet, width: 64}}}"
    (tmp_path / "large.yaml").write_text(f"title: x\nrows: [{{name: first}}, {large}]\n")
    gru = "{name: second, set: {student.preset: cnn_gru}}"
    (tmp_path / "gru.yaml").write_text(f"title: x\nint8: true\nrows: [{{name: first}}, {gru}]\n")
    done = subprocess.run(
        command(*arguments, "--config", TINY, "--set", f"storage={tmp_path}/s"),
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


TABLE = """title: Labels and soft targets
set: {student.seeds: 2, student.optimizer.epochs: 1}
rows:
  - name: fused
    paper: {all: 65.26}
  - name: none
    set: {student.distillation.soft_target: none}
  - name: fused again
  - name: other fusion
    set: {fusion.ridge: 0.5, student.seeds: 1}
    against: none
  - name: specialized
    set: {student.specialize: {epochs: 1}, student.seeds: 1}
    against: fused
"""


def test_a_table_from_its_command_to_mlflow(finished, tmp_path):  # noqa: PLR0915, each step needs those before
    """Two seeds of three rows, two of them equal; and a picture that needs no training."""
    storage, file = tmp_path / "storage", tmp_path / "labels.yaml"
    shutil.copytree(finished.storage, storage)
    file.write_text(TABLE + f"  - name: broken\n    set: {{student.checkpoint: {TINY}, student.seeds: 1}}\n")

    def run(*arguments):
        whole = command(*arguments, "--config", TINY, "--set", f"storage={storage}")
        return subprocess.run(whole, capture_output=True, text=True, env=joined(), check=False)

    failed = run("table", file)
    assert failed.returncode == 1
    assert f"1 of 6 failed (broken: student: {TINY}: cannot be read as a checkpoint" in failed.stderr
    assert failed.stdout.count(": finished (") == 5
    file.write_text(TABLE)
    done = run("table", file)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (storage / "tables").iterdir()
    assert f"table   {folder / 'table.html'}" in done.stdout
    assert (folder / "table.md").read_text() in done.stdout
    assert ": finished (" not in done.stdout
    plan = Plan(
        load_config(TINY, [f"storage={storage}", "sweep=null", "student.seeds=2", "student.optimizer.epochs=1"])
    )
    assert list(plan.students) == ["student-seed0", "student-seed1"]
    scores = [read_evaluation(plan.evaluations[name].path) for name in plan.students]
    rows = {line["row"]: line for line in csv.DictReader((folder / "table.csv").open()) if line["source"] == "ours"}
    assert float(rows["fused"]["all"]) == pytest.approx(100 * np.mean([s.accuracy for s in scores]), rel=1e-5)
    assert {**rows["fused again"], "row": ""} == {**rows["fused"], "row": ""}
    gains = {(line["row"], line["what"]): line for line in csv.DictReader((folder / "gains.csv").open())}
    assert {row for row, _ in gains} == {"none", "fused again", "other fusion", "specialized"}
    for column in ("unseen", "all", "log_loss"):
        over = float(rows["none"][column]) - float(rows["fused"][column])
        assert float(gains["none", column]["value"]) == pytest.approx(over, rel=1e-3, abs=1e-4)
        assert {gains["fused again", column][end] for end in ("value", "low", "high")} <= {"0", "-0"}
        assert gains["none", column]["seeds"] == "2"
        over = float(rows["other fusion"][column]) - float(rows["none"][column])
        assert float(gains["other fusion", column]["value"]) == pytest.approx(over, rel=1e-3, abs=1e-4)
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("asc-ray").experiment_id])
    tables = {run.info.status: run for run in runs if run.info.run_name == "tiny table labels"}
    assert set(tables) == {"FAILED", "FINISHED"}  # with the broken row it was another table
    parent = tables["FINISHED"]
    children = {r.info.run_name: r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id}
    single = {"other fusion", "specialized"}
    expected = {f"{row}: student-seed{seed}" for row in rows.keys() - single for seed in (0, 1)}
    expected |= {"other fusion: student", "specialized: student", "specialized: specialized"}
    assert set(children) == expected
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    for seed, score in enumerate(scores):
        found = children[f"fused again: student-seed{seed}"].data.metrics
        assert found["test/accuracy"] == pytest.approx(score.accuracy)
    found = children["specialized: specialized"].data.metrics
    assert float(rows["specialized"]["all"]) == pytest.approx(100 * found["test/accuracy"], rel=1e-5)
    assert len(client.get_metric_history(children["none: student-seed1"].info.run_id, "train/loss")) == 1
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"table.md", "table.csv", "table.html"}

    before = {path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file()}
    again = run("table", file)
    assert again.returncode == 0, again.stderr
    assert "Labels and soft targets: nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in storage.rglob("*") if path.is_file()} == before
    # Deleted, a student is trained again; the others, and what all share, are not.
    shutil.rmtree(plan.students["student-seed1"].path)
    mended = run("table", file)
    assert mended.returncode == 0, mended.stderr
    assert mended.stdout.count(": finished (") <= 1
    assert (folder / "table.md").read_text() in mended.stdout
    assert plan.students["student-seed1"].complete
    for figure, name, shown in ((file, "labels", list(rows)), ("2", "2", ["energy"])):
        drawn = run("figure", figure)
        assert drawn.returncode == 0, drawn.stderr
        (picture,) = (storage / "figures").glob(f"figure-{name}-*/figure.svg")
        assert str(picture) in drawn.stdout
        svg = picture.read_text()
        assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
        assert [text for text in shown if text not in svg] == []


def test_rows_may_have_training_splits_of_their_own(tmp_path):
    """As DCASE 2024's subsets: another clip store each, one test split; not with other devices to be trained on."""
    corpus = tmp_path / "corpus"
    make_demo_corpus(corpus, DemoConfig(train_clips_per_scene=20, train_places_per_scene=10, test_seconds_per_scene=1))
    setup = corpus / "evaluation_setup"
    head, *lines = (setup / "fold1_train.csv").read_text().splitlines(keepends=True)
    for percent, every in ((50, 2), (25, 3), (10, 4), (5, 5)):
        (setup / f"split{percent}.csv").write_text(head + "".join(lines[::every]))
    given = [f"corpus.path={corpus}", f"storage={tmp_path}/s", "student.distillation.soft_target=none"]
    _, name, _, plans = planned("tables", "subsets", TINY, given, Progress())
    assert name == "subsets"
    assert list(plans) == ["100 %", "50 %", "25 %", "10 %", "5 %"]
    assert len({plan.clips.key for plan in plans.values()}) == 5
    counts = [sum(clips for _, _, clips in plan.source.groups) for plan in plans.values()]
    assert counts == [len(lines), *(len(lines[::every]) for every in (2, 3, 4, 5))]
    (setup / "split5.csv").write_text(head + "".join(line for line in lines if "-s3.wav" not in line))
    with pytest.raises(ConfigError, match=r"row 5 %: corpus\.train_split: only one of .* is trained on device s3"):
        planned("tables", "subsets", TINY, given, Progress())
    (setup / "split10.csv").unlink()
    with pytest.raises(ConfigError, match=r"split10\.csv: no such file"):
        planned("tables", "subsets", TINY, given, Progress())


def test_the_log_of_runs_has_every_training():
    runs = [
        table.TrainedRun(row="=5 %", kind="student", seed=seed, key=f"{seed:016x}", training_clips=70, epochs=3,
                         seconds=1.25, scores=scores)
        for seed, scores in enumerate([made_up(0), None])
    ]  # fmt: skip
    first, second = csv.DictReader(io.StringIO(table.runs_separated(runs)))
    assert first == {
        "row": "'=5 %", "kind": "student", "seed": "0", "key": "0" * 16, "training_clips": "70", "epochs": "3",
        "seconds": "1.2", "accuracy": f"{made_up(0).accuracy:.6g}", "log_loss": f"{made_up(0).log_loss:.6g}",
    }  # fmt: skip
    assert (second["seed"], second["accuracy"]) == ("1", "")
    both = comparison(compared(0))
    assert "(1,234 training clips)" in both.note
    assert "(70 to 1,234 training clips)" in replace(both, training_clips=[70, 300, 1_234]).note
