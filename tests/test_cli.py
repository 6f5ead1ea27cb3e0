"""The command line as a user sees it: what it lists, shows, checks and would do."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections import Counter

import pytest
import yaml
from conftest import TINY, command
from test_docs import KEYS
from typer.testing import CliRunner

from asc_ray.artifacts import Artifact, write_record
from asc_ray.cli import app
from asc_ray.comparison import preview_table
from asc_ray.config.composition import PRESETS, load_config
from asc_ray.config.origins import origins, shown
from asc_ray.config.reference import KINDS, find_keys, presets
from asc_ray.errors import ConfigError, UserError
from asc_ray.lock import exclusive
from asc_ray.plan import STAGES, Plan
from asc_ray.preview import duration, preview
from asc_ray.progress import Progress
from asc_ray.status import states

EPOCH = {"epoch": 1, "epochs": 3, "loss": 2.0, "validation_accuracy": 0.5, "clips_per_second": 9.0}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned(storage, *overrides):
    return Plan(load_config(TINY, [f"storage={storage}", *overrides]))


def test_help_lists_the_commands_in_the_order_of_the_work():
    lines = [line.strip("│ ") for line in run("-h").stdout.splitlines()]
    named = [line.split()[0] for line in lines if line and line.split()[0].isalpha() and "  " in line]
    stages = [*STAGES, "pipeline", "table", "figure", "status", "verify", "complexity", "config", "export", "predict"]
    assert [name for name in named if name in stages] == stages
    assert "--config" in run("student", "-h").stdout
    assert run("--version").stdout.startswith("asc-ray 0.")


MINE = """\
base: demo
name: mine
corpus: {demo: {train_locations_per_scene: 4}}
student: {recipe: cpjku_short, optimizer: {epochs: 7}}
teachers: {override: {passt: {optimizer: {epochs: 2}}}, recipes: {passt_fms_1: {seed: 77}}}
"""


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ("demo", []),
        ("tau22", ["corpus.path=x"]),
        ("small-tables", ["student.distillation.label_weight={start: 0.5, end: 0.1}", "student.preset=cp_mobile"]),
        ("small", ["sweep.preset=full", "sweep.trials=3"]),
        (None, ["fusion.class_prior=uniform", "teachers.resources_for={passt: {cpus: 2}}"]),
    ],
)
def test_a_shown_configuration_is_the_same_configuration(tmp_path, source, overrides):
    if source is None:
        (tmp_path / "mine.yaml").write_text(MINE)
        source = tmp_path / "mine.yaml"
    (tmp_path / "shown.yaml").write_text(shown(source, overrides))
    assert load_config(tmp_path / "shown.yaml") == load_config(source, overrides)


def test_each_value_says_where_it_comes_from(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    overrides = ["sweep.preset=kd", "student.augment.freq_mask=9", "fusion.class_prior=uniform"]
    found = {}
    for line in shown(file, overrides).splitlines():
        text, _, origin = line.partition("  # ")
        depth = (len(text) - len(text.lstrip())) // 2
        path = [*(path[:depth] if depth else []), text.strip().partition(":")[0]]  # noqa: F821
        found[".".join(path)] = origin
    assert {key: found[key] for key in found if key.startswith(("name", "fusion.", "corpus.demo.t"))} == {
        "name": str(file),
        "corpus.demo.train_clips_per_scene": "default",
        "corpus.demo.train_places_per_scene": str(file),  # by its old name
        "corpus.demo.test_seconds_per_scene": "default",
        "corpus.demo.test_places_per_scene": "default",
        "fusion.data": "default",
        "fusion.folds": "default",
        "fusion.ridge": "default",
        "fusion.scene_prior": "--set",
        "fusion.nonnegative": "default",
    }
    recipe = "teachers.recipes.passt_fms_1"
    assert found[f"{recipe}.model.name"] == "preset teachers/passt"
    assert found[f"{recipe}.model.width"] == "preset demo"
    assert found[f"{recipe}.optimizer.epochs"] == found[f"{recipe}.seed"] == str(file)
    assert found["teachers.recipes.passt_fms_2.seed"] == "preset teachers/passt_fms_2"
    assert found["student.optimizer.epochs"] == str(file)
    assert found["student.optimizer.batch_size"] == "student.recipe cpjku_short"
    assert found["student.augment.freq_mask"] == "--set"
    assert found["sweep.space.distillation.soft_target.choice"] == "sweep.preset kd"
    # The demo's own schedule is gone with the recipe that stood in its place.
    assert "preset demo" not in {found[key] for key in found if key.startswith("student.optimizer")}
    # A value of one file alone is said to be that file's.
    below = yaml.safe_load((PRESETS / "demo.yaml").read_text())
    assert origins("demo", [])["qat", "epochs"] == "preset demo"
    assert load_config("demo").qat.epochs == below["qat"]["epochs"]


def test_a_part_of_a_configuration():
    assert run("config", "show", "student.optimizer.epochs").stdout.split() == [
        "student:", "optimizer:", "epochs:", "16", "#", "preset", "demo",
    ]  # fmt: skip
    assert isinstance(run("config", "show", "student.optimizer.epoch").exception, ConfigError)
    assert "hunter2" not in run("config", "show", "--set", "tracking.uri=https://me:hunter2@host/x").stdout


def test_keys_are_those_of_the_reference():
    everything = find_keys("")
    assert {key.key for key in everything} >= KEYS
    (epochs,) = find_keys("teachers.recipes.mine.optimizer.epochs")
    assert (epochs.allowed, epochs.default) == ("whole number (≥ 1)", "`30`")
    with pytest.raises(ConfigError, match=r"did you mean student\.optimizer\.epochs"):
        find_keys("student.optimizer.epoch")
    printed = run("config", "keys", "storage").stdout
    assert printed.startswith("storage  file or folder or text; must be given\n    Where all artifacts are: a folder")


def test_presets_are_all_listed():
    printed = run("config", "presets").stdout
    for folder in KINDS:
        assert {file.stem for file in (PRESETS / folder).glob("*.yaml")} == set(presets(folder))
        assert all(f"  {name}  {about[:20]}".replace("`", "") in printed for name, about in presets(folder).items())


def test_a_dead_training_has_no_expected_end(tmp_path):
    teacher = planned(tmp_path).teachers["passt_dirfms_1"]
    write_record(teacher.open_partial() / "progress.json", EPOCH | {"minutes_left": 60.0})

    def found():
        return next(state for state in states(planned(tmp_path)) if state.key == teacher.key)

    dead = found()
    assert (dead.state, "ends" in dead.progress) == ("interrupted", False)
    assert dead.text().startswith("interrupted, epoch 1/3, loss 2.000, validation 50.0 %, 9 clips/s, ")
    with exclusive(tmp_path):
        alive = found()
        assert (alive.state, "ends" in alive.progress) == ("running", True)
        assert ", ends about " in alive.text()
        os.utime(teacher.partial / "progress.json", (time.time() - 7200,) * 2)
        assert "ends" not in found().progress  # because it should have ended an hour ago


def test_status_for_programs(tmp_path):
    plan = planned(tmp_path)
    plan.demo.open_partial()
    plan.demo.finish({})
    given = json.loads(run("status", "--json", "--config", TINY, "--set", f"storage={tmp_path}").stdout)
    assert given["storage"] == str(tmp_path)
    expected = [(stage, artifact.name, artifact.key) for stage, own in plan.by_stage().items() for artifact in own]
    assert [(each["stage"], each["name"], each["key"]) for each in given["artifacts"]] == expected
    assert [(each["state"], each["path"]) for each in given["artifacts"][:2]] == [
        ("done", str(plan.demo.path)),
        ("missing", None),
    ]


@pytest.mark.parametrize("columns", [60, 300])
def test_a_terminal_shows_whole_keys_or_whole_paths(tmp_path, columns):
    plan = planned(tmp_path)
    for artifact in (plan.demo, *plan.teachers.values()):
        artifact.open_partial()
    own, other = pty.openpty()
    words = command("status", "--config", TINY, "--set", f"storage={tmp_path}")
    subprocess.run(words, stdout=other, env=os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}, check=True)
    os.close(other)
    written = b""
    while piece := _read(own):
        written += piece
    os.close(own)
    text = re.sub(r"\x1b\[[0-9;]*m", "", written.decode())
    assert max(map(len, text.splitlines())) <= columns
    assert "…" not in text
    for artifact in plan.teachers.values():
        assert (artifact.key if columns == 60 else str(artifact.partial)) in text


def _read(terminal):
    try:
        return os.read(terminal, 65_536)
    except OSError:  # its other end is closed
        return b""


def made(storage, stage, name, key):
    artifact = Artifact(storage, stage, name, key * 16, {}, {})
    (artifact.open_partial() / "content").write_text(name)
    artifact.finish({})
    return artifact.path


def test_verify_checks_all_of_a_storage(tmp_path):
    folders = [made(tmp_path, *each) for each in (("clips", "one", "1"), ("logits", "a", "2"), ("logits", "b", "3"))]
    sound = run("verify", tmp_path)
    assert sound.exit_code == 0
    assert all(f"{folder}: 1 of 1 files as written" in sound.stdout for folder in folders)
    assert f"{tmp_path}: 3 artifacts checked (1 clips, 2 logits), 0 damaged" in sound.stdout
    (folders[1] / "content").write_text("b")
    (folders[0] / "manifest.json").unlink()
    folders[2].rename(folders[2].with_name("b-" + "4" * 16))
    Artifact(tmp_path, "teachers", "half", "5" * 16, {}, {}).open_partial()
    damaged = run("verify", tmp_path)
    assert "3 artifacts checked (1 clips, 2 logits), 3 damaged" in damaged.stdout
    assert "1 unfinished, not checked" in damaged.stdout
    assert isinstance(damaged.exception, UserError)
    for part in ("clips/one-1111", "no manifest.json", "logits/a-2222", "1 damaged file", "is that of logits/b-3333"):
        assert part in str(damaged.exception)


def test_a_dry_run_writes_nothing_and_starts_nothing(tmp_path):
    code = "import sys; sys.modules |= {'ray': None, 'mlflow': None}\nfrom asc_ray.cli import main; main()"
    words = [sys.executable, "-c", code, "pipeline", "--dry-run", "--config", TINY, "--set"]
    done = subprocess.run([*words, f"storage={tmp_path / 'storage'}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "would run 14; nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []
    lacking = run("fuse", "--dry-run", "--config", TINY, "--set", f"storage={tmp_path / 'storage'}").exception
    assert "fuse: needs the stage `logits`" in str(lacking)


def test_a_dry_run_of_a_table_has_once_what_rows_share(tmp_path):
    _, steps = preview_table("tables", "4", TINY, [f"storage={tmp_path / 'storage'}"], Progress())
    found = Counter(step.state.stage for step in steps)
    assert found == {"corpus": 1, "ingest": 1, "teachers": 2, "logits": 2, "fuse": 1, "student": 9, "evaluate": 9}
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_says_what_a_run_would_do_and_for_how_long(tmp_path):
    name = "cpr_128k_fms_1"
    plan = planned(tmp_path)
    finished = plan.teachers[name]
    finished.open_partial()
    finished.finish({"history": [{"seconds": seconds} for seconds in (2.0, 9.0, 4.0)]})
    write_record(plan.teachers["passt_dirfms_1"].open_partial() / "progress.json", EPOCH | {"minutes_left": 5.0})
    steps = {step.state.name: step for step in preview(plan, ["teachers"])}
    assert (steps[name].does, steps[name].seconds) == ("skip", None)
    assert (steps["passt_dirfms_1"].does, steps["passt_dirfms_1"].seconds) == ("resume", 300.0)
    longer = planned(
        tmp_path, f"teachers.recipes.{name}.seed=9", f"teachers.recipes.{name}.optimizer.epochs=100",
        "teachers.resources={cpus: 4, workers: 2}",
    )  # fmt: skip
    steps = {step.state.name: step for step in preview(longer, ["teachers", "student"])}
    assert (steps[name].does, steps[name].resources, steps[name].seconds) == ("run", "2 x (4 CPU)", 400.0)
    assert steps["student"].seconds is None
    wider = planned(tmp_path, f"teachers.recipes.{name}.model.width=16")
    assert [step.seconds for step in preview(wider, ["teachers"]) if step.state.name == name] == [None]
    assert [duration(seconds) for seconds in (None, 90, 150, 5400, 90_000, 500_000)] == [
        "?", "90 s", "2.5 min", "90 min", "25 h", "5.8 d",
    ]  # fmt: skip
