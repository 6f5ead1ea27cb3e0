"""Systems whose logits come from a file: every form that is read, and what no form may hold."""

import json
import shutil
import subprocess

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from conftest import clip_store, command, joined
from test_tracking import all_runs
from typer.testing import CliRunner

from asc_ray.cli import app
from asc_ray.config.composition import load_config
from asc_ray.config.origins import shown
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.data.config import DemoConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.logits import read_logits
from asc_ray.ensemble.config import ImportedConfig
from asc_ray.ensemble.imported import aligned
from asc_ray.ensemble.stored import StoredEnsemble
from asc_ray.errors import ConfigError, UserError
from asc_ray.evaluation.artifact import read_scores
from asc_ray.plan import Plan
from asc_ray.tracking.config import default_uri


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> ClipStore:
    folder = tmp_path_factory.mktemp("corpus")
    config = DemoConfig(train_clips_per_scene=4, train_places_per_scene=4, test_seconds_per_scene=1)
    make_demo_corpus(folder / "corpus", config)
    return open_clips(clip_store(folder, read_corpus(folder / "corpus")))


@pytest.fixture(scope="module")
def logits(store) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(store), len(store.labels))).astype(np.float32)


class Elsewhere:
    """The store's clips and scenes in another order, as a file from elsewhere has them."""

    def __init__(self, store: ClipStore, logits: np.ndarray) -> None:
        rng = np.random.default_rng(1)
        rows, columns = rng.permutation(len(store)), rng.permutation(len(store.labels))
        self.ids = store.ids[rows].tolist()
        self.labels = [store.labels[column] for column in columns]
        self.values = logits[rows][:, columns]


@pytest.fixture
def elsewhere(store, logits) -> Elsewhere:
    return Elsewhere(store, logits)


def by_scene(own: Elsewhere) -> pa.Table:
    return pa.table({"filename": own.ids} | dict(zip(own.labels, own.values.T, strict=True)))


def lists(own: Elsewhere) -> pa.Table:
    table = pa.table({"clip_id": own.ids, "logits": own.values.tolist()})
    return table.replace_schema_metadata({"labels": json.dumps(own.labels)})


def tabbed(own: Elsewhere, file) -> None:
    pyarrow.csv.write_csv(by_scene(own), file, pyarrow.csv.WriteOptions(delimiter="\t"))


FORMS = {
    "own.csv": lambda own, file: pyarrow.csv.write_csv(by_scene(own), file),
    "own.tsv": tabbed,
    "own.parquet": lambda own, file: pyarrow.parquet.write_table(by_scene(own), file),
    "lists.parquet": lambda own, file: pyarrow.parquet.write_table(lists(own), file),
    "own.feather": lambda own, file: pyarrow.feather.write_feather(by_scene(own), str(file)),
    "lists.arrow": lambda own, file: pyarrow.feather.write_feather(lists(own), str(file)),
    "own.npz": lambda own, file: np.savez(file, filename=own.ids, logits=own.values, labels=own.labels),
    "own.pt": lambda own, file: torch.save(
        {"filename": own.ids, "logits": torch.from_numpy(own.values), "labels": own.labels}, file
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_in_the_stores_order_of_clips_and_scenes(store, logits, elsewhere, tmp_path, form):
    FORMS[form](elsewhere, tmp_path / form)
    found, unused = aligned(ImportedConfig(logits=tmp_path / form), store)
    assert unused == 0
    assert found.dtype == np.float32
    assert np.array_equal(found, logits)


def test_one_tensor_in_the_order_of_a_table_of_its_own(store, logits, elsewhere, tmp_path):
    torch.save(torch.from_numpy(elsewhere.values), tmp_path / "ensemble.pt")
    names = pa.table({"filename": elsewhere.ids, "scene_label": ["?"] * len(elsewhere.ids)})
    pyarrow.csv.write_csv(names, tmp_path / "meta.csv", pyarrow.csv.WriteOptions(delimiter="\t"))
    config = {"logits": tmp_path / "ensemble.pt", "ids": tmp_path / "meta.csv", "labels": elsewhere.labels}
    assert np.array_equal(aligned(ImportedConfig.model_validate(config), store)[0], logits)


def test_clips_are_found_by_their_files_names_where_no_whole_name_is_the_same(store, logits, elsewhere, tmp_path):
    elsewhere.ids = [name.removeprefix("audio/").removesuffix(".wav") for name in elsewhere.ids]
    FORMS["own.csv"](elsewhere, tmp_path / "own.csv")
    assert np.array_equal(aligned(ImportedConfig(logits=tmp_path / "own.csv"), store)[0], logits)


def test_clips_that_the_corpus_lacks_are_counted_and_left_out(store, logits, elsewhere, tmp_path):
    elsewhere.ids = [elsewhere.ids[0].replace("audio/", "other/"), *elsewhere.ids]  # another clip of the same name
    elsewhere.values = np.concatenate([elsewhere.values[:1], elsewhere.values])
    FORMS["own.npz"](elsewhere, tmp_path / "own.npz")
    found, unused = aligned(ImportedConfig(logits=tmp_path / "own.npz"), store)
    assert unused == 1
    assert np.array_equal(found, logits)


def swapped(own):
    own.labels[0] = "quarry"


def twice(own):
    own.ids[0] = own.ids[1]


def without_some(own):
    own.ids, own.values = own.ids[5:], own.values[5:]


def not_finite(own):
    own.values[3, 1] = np.inf


def probabilities(own):
    own.values = torch.from_numpy(own.values).softmax(1).numpy()


def strangers(own):
    own.ids = [f"other/{number}.wav" for number in range(len(own.ids))]


WRONG = {
    "is of the scenes": swapped,
    "1 clips occur more than once": twice,
    r"lacks 5 of \d+ clips \(.*split\)": without_some,
    "1 clips have values that are not finite": not_finite,
    "holds probabilities, which add up to 1; save their logarithms": probabilities,
    r"lacks (\d+) of \1 clips .* it names other/0.wav": strangers,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_the_corpus_is_one_line(store, elsewhere, tmp_path, message):
    WRONG[message](elsewhere)
    FORMS["own.npz"](elsewhere, tmp_path / "own.npz")
    with pytest.raises(UserError, match=message) as error:
        aligned(ImportedConfig(logits=tmp_path / "own.npz"), store)
    assert str(tmp_path / "own.npz") in str(error.value)
    assert len(str(error.value).splitlines()) == 1


UNREADABLE = {
    "own.xlsx": (b"", "unknown kind of file; allowed are .arrow"),
    "own.csv": (b"filename\n", "expected one of numbers for each scene"),
    "own.parquet": (b"PAR1 cut", "cannot be read"),
    "own.npz": (b"PK\x03\x04", "cannot be read"),
    "own.pt": (b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00trueR.", "refused: its pickle holds more than plain tensors"),
    "own.feather": (b"ARROW1", "cannot be read"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_hold_something_else_are_named(store, tmp_path, name):
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises((UserError, ConfigError), match=message) as error:
        aligned(ImportedConfig(logits=tmp_path / name, labels=store.labels), store)
    assert str(tmp_path / name) in str(error.value)


def test_objects_are_not_unpickled(store, elsewhere, tmp_path):
    elsewhere.ids = np.array(elsewhere.ids, dtype=object)
    FORMS["own.npz"](elsewhere, tmp_path / "own.npz")
    with pytest.raises(UserError, match=r"reading these could run code; save names as text, by names\.astype\(str\)"):
        aligned(ImportedConfig(logits=tmp_path / "own.npz"), store)


def test_a_matrix_alone_says_what_else_is_needed(store, logits, elsewhere, tmp_path):
    np.savez(tmp_path / "own.npz", logits=elsewhere.values)
    with pytest.raises(UserError, match="does not name its clips; give `ids`"):
        aligned(ImportedConfig(logits=tmp_path / "own.npz"), store)
    np.savez(tmp_path / "own.npz", logits=elsewhere.values, filename=elsewhere.ids)
    with pytest.raises(UserError, match="does not name its 10 columns; give `labels`"):
        aligned(ImportedConfig(logits=tmp_path / "own.npz"), store)


def test_what_a_file_says_itself_and_the_configuration_says_otherwise_is_refused(store, logits, elsewhere, tmp_path):
    file, names = tmp_path / "own.npz", tmp_path / "meta.csv"
    FORMS["own.npz"](elsewhere, file)
    pyarrow.csv.write_csv(pa.table({"filename": elsewhere.ids}), names)
    same = ImportedConfig(logits=file, ids=names, labels=tuple(elsewhere.labels))
    assert np.array_equal(aligned(same, store)[0], logits)
    with pytest.raises(UserError, match="`labels` has others or another order; leave `labels` out"):
        aligned(ImportedConfig(logits=file, labels=store.labels), store)
    pyarrow.csv.write_csv(pa.table({"filename": elsewhere.ids[::-1]}), names)
    with pytest.raises(UserError, match="`ids` has others or another order; leave `ids` out"):
        aligned(ImportedConfig(logits=file, ids=names), store)


def test_counts_that_do_not_agree_are_refused(store, elsewhere, tmp_path):
    file, names = tmp_path / "own.npz", tmp_path / "meta.csv"
    pyarrow.csv.write_csv(pa.table({"filename": [*elsewhere.ids, "another.wav"]}), names)
    np.savez(file, logits=elsewhere.values, labels=elsewhere.labels)
    with pytest.raises(UserError, match=rf"logits of {len(store)} clips, and {len(store) + 1} names in .*meta.csv"):
        aligned(ImportedConfig(logits=file, ids=names), store)
    np.savez(file, logits=elsewhere.values[:, :9], labels=elsewhere.labels, filename=elsewhere.ids)
    with pytest.raises(UserError, match="9 columns, and 10 labels"):
        aligned(ImportedConfig(logits=file), store)
    np.savez(file, logits=elsewhere.values[:, 0], labels=elsewhere.labels, filename=elsewhere.ids)
    with pytest.raises(UserError, match=r"logits of shape \(\d+,\); expected \(clips, scenes\)"):
        aligned(ImportedConfig(logits=file), store)


CONFIG = """
base: {base}
teachers: {{systems: [cpr_128k_fms_1, {{name: beats_1, logits: {file}}}]}}
"""


def test_systems_may_be_files_of_logits(tmp_path):
    file, config = tmp_path / "beats.npz", tmp_path / "own.yaml"
    config.write_text(CONFIG.format(base="demo", file=file))
    teachers = load_config(config).teachers
    assert teachers.systems == ("cpr_128k_fms_1", "beats_1")
    assert teachers.imported["beats_1"].logits == file
    with pytest.raises(ConfigError, match=r"teachers.imported.beats_1.logits: .*beats.npz: no such file"):
        Plan(load_config(config, [f"storage={tmp_path}"]))
    file.write_bytes(b"one")
    one = Plan(load_config(config, [f"storage={tmp_path}"]))
    assert set(one.logits) == {"cpr_128k_fms_1", "beats_1"}
    assert set(one.teachers) == {"cpr_128k_fms_1"}
    file.write_bytes(b"two")
    two = Plan(load_config(config, [f"storage={tmp_path}"]))
    assert one.logits["beats_1"].key != two.logits["beats_1"].key
    assert one.logits["cpr_128k_fms_1"].key == two.logits["cpr_128k_fms_1"].key
    labelled = Plan(load_config(config, [f"storage={tmp_path}", "teachers.imported.beats_1.labels=[a, b]"]))
    assert labelled.logits["beats_1"].key != two.logits["beats_1"].key
    with pytest.raises(ConfigError, match="beats_1 come from files; choose holdout"):
        Plan(load_config(config, [f"storage={tmp_path}", "fusion.data=crossfit"]))
    config.write_text(CONFIG.format(base="demo", file=file).replace("beats_1", "cpr_128k_fms_1"))
    with pytest.raises(ConfigError, match="a name occurs twice"):
        load_config(config)
    config.write_text("base: demo\nteachers: {systems: []}\n")
    with pytest.raises(ConfigError, match="no system; give one at least"):
        load_config(config)


def test_an_imported_system_takes_part_as_any_other(finished, tmp_path):
    """A teacher's own logits, written to a file in another order, give the same fusion, bit for bit; and the whole
    pipeline, report and MLflow take the system as any other. It alone cannot be asked about other sounds."""
    storage, file = tmp_path / "storage", tmp_path / "own.npz"
    shutil.copytree(finished.storage, storage)
    plan = Plan(load_config(finished.arguments[1], [f"storage={storage}"]))
    replaced, name = "cpr_128k_fms_1", "elsewhere"
    stored = read_logits(plan.logits[replaced].path)
    order = np.random.default_rng(0).permutation(len(stored))
    np.savez(file, filename=stored.ids[order].astype(str), logits=stored.take(order), labels=stored.labels)
    systems = [one for one in plan.config.teachers.recipes if one != replaced]
    config = tmp_path / "own.yaml"
    config.write_text(
        f"base: {finished.arguments[1]}\n"
        f"teachers: {{systems: [{', '.join(systems)}, {{name: {name}, logits: {file}}}]}}\n"
        f"sweep: null\nstudent: {{distillation: {{soft_target: none}}}}\nstorage: {storage}\n"
    )
    done = subprocess.run(
        command("pipeline", "--config", config), capture_output=True, text=True, env=joined(), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: {len(stored)} clips from own.npz, right on" in done.stdout
    assert "warning: the logits of 1 systems come from elsewhere" in done.stdout
    mixed = Plan(load_config(config))
    assert mixed.fusion.key != plan.fusion.key
    ours, theirs = mixed.fusion.facts(), plan.fusion.facts()
    assert ours["biases"] == theirs["biases"]
    assert list(ours["weights"].values()) == list(theirs["weights"].values())
    assert ours["weights"].keys() == {*systems, name}
    assert ours["validation"]["fusion"] == theirs["validation"]["fusion"]

    scores, before = (read_scores(one.evaluation.path).systems for one in (mixed, plan))
    assert scores[name] == before[replaced]
    page = (mixed.report.path / "report.html").read_text()
    assert f"<li>{name}: its logits come from own.npz. It cannot be asked about other sounds" in page
    assert "its logits come from" not in (plan.report.path / "report.html").read_text()
    run = {one.data.tags["asc_ray.run"]: one for one in all_runs(default_uri(storage))}[
        f"{name}-{mixed.logits[name].key}"
    ]
    assert run.data.tags["asc_ray.kind"] == "teacher"
    assert run.data.metrics["test/accuracy"] == pytest.approx(scores[name].accuracy)

    with pytest.raises(UserError, match=f"the logits of {name} come from a file, so the ensemble cannot be asked"):
        StoredEnsemble(mixed.fusion.path)
    sound = mixed.demo.path / stored.ids[0]
    said = CliRunner().invoke(app, ["predict", "--with", "ensemble", str(mixed.fusion.path), str(sound)])
    assert said.exit_code == 1
    assert "come from a file, so the ensemble cannot be asked about others" in str(said.exception)


def test_a_file_that_does_not_fit_is_told_of_before_anything_is_trained(finished, tmp_path):
    storage, file, config = tmp_path / "storage", tmp_path / "own.csv", tmp_path / "own.yaml"
    for stage in ("corpus", "clips"):
        shutil.copytree(finished.storage / stage, storage / stage)
    file.write_text("filename,airport\nother.wav,1.0\n")
    config.write_text(
        f"base: {finished.arguments[1]}\nstorage: {storage}\n"
        f"teachers: {{systems: [cpr_128k_fms_1, {{name: own, logits: {file}}}]}}\n"
    )
    done = subprocess.run(
        command("teachers", "--config", config), capture_output=True, text=True, env=joined(), check=False
    )
    assert done.returncode == 1
    assert f"{file}: is of the scenes airport; the corpus has" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (storage / "teachers").exists()


def test_config_show_names_the_file_of_an_imported_system(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text(CONFIG.format(base="demo", file=tmp_path / "beats.npz"))
    text = shown(config, [], "teachers")
    assert f"logits: {tmp_path / 'beats.npz'}" in text
