"""The inference package of DCASE 2025 task 1: as the challenge's scripts call it, without asc-ray, on real files."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import clip_store, command

from asc_ray.artifacts import Artifact
from asc_ray.challenge.package import cost, submission_of
from asc_ray.challenge.submission import compact, load_inputs, load_model
from asc_ray.data.clips import open_clips
from asc_ray.data.config import DemoConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import read_answers
from asc_ray.models.registry import build, folded
from asc_ray.progress import Progress
from asc_ray.stages.challenge import export_challenge
from asc_ray.stages.evaluate import evaluate_specialized, evaluate_student
from asc_ray.students.config import StudentConfig
from asc_ray.students.specialize import specialize_student
from asc_ray.students.train import train_student
from asc_ray.training.dataset import Source

PARTS = PartitionConfig(fusion=0.25, validation=0.25)
CONFIG = StudentConfig.model_validate(
    {
        "model": {"name": "ds_flexinet", "size": "sm1"},
        "frontend": {"n_fft": 1024, "window": 800, "hop": 1000, "mels": 64},
        "optimizer": {"epochs": 3, "batch_size": 8},
        "specialize": {"epochs": 2, "learning_rate": 0.01},
    }
)
# What the challenge's test_complexity.py and evaluate_submission.py do with a package, and nothing of theirs.
SCRIPT = """
import importlib, json, sys
label, files, devices = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
api = importlib.import_module(f"{label}.{label}_1")
import torch
model = api.load_model()
inputs = api.load_inputs(files, devices, model)
submodels = [api.get_model_for_device(model, device) for device in devices]
with torch.no_grad():
    own = [network(mel)[0].float().tolist() for network, mel in zip(submodels, inputs)]
logits, labels = api.predict(file_paths=files, device_ids=devices, model_file_path=None)
size = {device: sum(p.numel() * p.element_size() for p in network.parameters())
        for device, network in zip(devices, submodels)}
print(json.dumps({"own": own, "logits": [each.tolist() for each in logits], "labels": labels, "size": size,
                  "shape": list(inputs[0].shape), "ours": [m for m in sys.modules if m.split(".")[0] == "asc_ray"]}))
"""


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A corpus of files, its store, a student and its specialized form, and the scores of both."""
    folder = tmp_path_factory.mktemp("storage")
    make_demo_corpus(folder / "corpus", DemoConfig(train_clips_per_scene=6, train_places_per_scene=4,
                                                   test_seconds_per_scene=1))  # fmt: skip
    clips = clip_store(folder, read_corpus(folder / "corpus"))
    source = Source(clips, PARTS)
    about = {"student": CONFIG.for_key()}
    student = Artifact(folder, "students", "student", "a" * 16, about, {"clips": "0123456789abcdef"})
    train_student(student, source, None, CONFIG)
    special = Artifact(folder, "specialized", "student", "b" * 16, {}, {"student": student.key})
    specialize_student(special, source, None, student.path, CONFIG)
    scores = [Artifact(folder, "evaluation", name, name[0] * 16, {}, {}) for name in ("general", "specialized")]
    evaluate_student(scores[0], source, student.path, CONFIG)
    evaluate_specialized(scores[1], source, special.path, student.path, CONFIG)
    return folder


def answers_of(package, label, files, devices):
    """In a clean interpreter, which finds the package and what is installed, and not this checkout."""
    words = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(package)!r})\n{SCRIPT}", label]
    done = subprocess.run(
        [*words, json.dumps([str(file) for file in files]), json.dumps(devices)],
        capture_output=True, text=True, cwd="/", check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("stage", ["specialized", "students"])
def test_the_package_answers_as_we_do(storage, tmp_path, stage):
    (made,) = (storage / stage).iterdir()
    out = tmp_path / "Mueller_UNI_task1"
    done = subprocess.run(
        command("export", made, out, "--target", "dcase2025"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "float16: at most " in done.stdout
    store = open_clips(next((storage / "clips").iterdir()))
    test = np.flatnonzero(store.split == "test")
    files, devices = [storage / "corpus" / name for name in store.ids[test]], store.device[test].tolist()
    found = answers_of(out, out.name, files, devices)
    assert found["ours"] == []
    assert found["labels"] == list(store.labels)
    assert found["shape"] == [1, 1, 64, 32]
    name = {"specialized": "specialized", "students": "general"}[stage]
    expected = read_answers([storage / "evaluation" / f"{name}-{name[0] * 16}"], store.ids[test])[0]
    logits = np.array(found["logits"])
    np.testing.assert_allclose(logits, found["own"], rtol=0, atol=0.02)  # float16 in batches and alone
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.03 * expected.std())
    other = read_answers([storage / "evaluation" / ("general-" + "g" * 16)], store.ids[test])[0]
    known = np.isin(devices, ["a", "b", "c", "s1", "s2", "s3"])
    assert (abs(expected - other).max(1) > 1e-3).tolist() == (known if stage == "specialized" else 0 * known).tolist()
    said = json.loads((out / "predictions" / f"{out.name}_1" / "complexity.json").read_text())
    assert said["max_Params"] == max(found["size"].values()) < 128_000
    assert set(said["per_device"]) == {
        "general",
        *(["a", "b", "c", "s1", "s2", "s3"] if stage == "specialized" else []),
    }
    with open(out / "predictions" / f"{out.name}_1" / "test_output.csv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [row["filename"] for row in rows] == store.ids[test].tolist()
    assert list(rows[0]) == ["filename", "scene_label", *store.labels]
    shares = torch.softmax(torch.from_numpy(expected), 1).numpy()
    np.testing.assert_allclose([[float(row[name]) for name in store.labels] for row in rows], shares, atol=0.02)
    assert all(row["scene_label"] == max(store.labels, key=lambda name: float(row[name])) for row in rows)


def test_the_module_writes_the_challenge_s_output_csv(storage, tmp_path):
    (made,) = (storage / "specialized").iterdir()
    export_challenge(str(made), tmp_path / "A_B_task1", "CC-BY-4.0", Progress())
    assert "License: CC-BY-4.0." in (tmp_path / "A_B_task1" / "README.md").read_text()
    store = open_clips(next((storage / "clips").iterdir()))
    test = np.flatnonzero(store.split == "test")[:4]
    folder = tmp_path / "evaluation"
    (folder / "evaluation_setup").mkdir(parents=True)
    (folder / "audio").symlink_to(storage / "corpus" / "audio")
    lines = [f"{name}\t{device}\n" for name, device in zip(store.ids[test], ["a", "s9", "unknown", "s1"], strict=True)]
    (folder / "evaluation_setup" / "fold1_test.csv").write_text("filename\tdevice_id\n" + "".join(lines))
    words = [sys.executable, "-m", "A_B_task1.A_B_task1_1", str(folder)]
    subprocess.run(words, cwd=tmp_path / "A_B_task1", check=True, env={"PATH": "/usr/bin"})
    with open(tmp_path / "A_B_task1" / "output.csv", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    assert rows[0] == ["filename", "scene_label", *store.labels]
    assert [row[0] for row in rows[1:]] == store.ids[test].tolist()
    assert all(sum(map(float, row[2:])) == pytest.approx(1, abs=1e-4) for row in rows[1:])
    (file,) = (tmp_path / "A_B_task1").glob("A_B_task1/ckpts/*.ckpt")
    sf.write(tmp_path / "two.wav", np.zeros(64_000), 32_000)
    with pytest.raises(ValueError, match=r"two\.wav: 2\.00 s long; one second is expected"):
        load_inputs([tmp_path / "two.wav"], ["a"], load_model(file))
    with pytest.raises(ValueError, match="1 files and 2 device ids"):
        load_inputs([tmp_path / "two.wav"], ["a", "b"], load_model(file))


@pytest.mark.parametrize("name", ["sm4", "tf_sepnet", "cnn_gru"])
def test_it_takes_int8_weights_where_float16_is_over_the_limit(name):
    from asc_ray.config.composition import network_preset

    config = StudentConfig.model_validate(network_preset(name))
    network = build(config.model, 10)
    x = torch.randn(2, 1, config.frontend.mels, config.frontend.frames(32_000))
    with torch.no_grad():
        network.train()(x)  # statistics of the batch norms
        expected = network.eval()(x)
    model, about = submission_of(network, {}, config, [str(k) for k in range(10)])
    assert about["int8"] == (name != "cnn_gru")
    with torch.no_grad():
        found = model.for_device("any")(x.half()).float()
    assert (found - expected).abs().mean() < 0.1 * expected.std()
    counted = cost(model, config)["general"]
    whole = sum(parameter.numel() for parameter in network.parameters())
    if about["int8"]:
        weights = [own for own in model.parameters() if own.dtype == torch.int8]
        rest = [own for own in model.parameters() if own.dtype != torch.int8]
        assert counted["Params"] == sum(own.numel() for own in weights) + 2 * sum(own.numel() for own in rest)
        assert sum(own.numel() for own in weights) > 0.9 * whole
    assert counted["Params"] <= 128_000
    assert counted["MACs"] <= 30_000_000


def test_an_int8_weight_is_within_half_a_step_of_its_channel():
    network = build(CONFIG.model, 10)
    reference = {name: layer.weight for name, layer in folded(network).named_modules() if hasattr(layer, "weight")}
    layers = {name: layer for name, layer in compact(network, int8=True).named_modules() if hasattr(layer, "scale")}
    assert layers
    for name, layer in layers.items():
        expected, found = reference[name], layer.weight.float() * layer.scale.float()
        step = expected.abs().flatten(1).amax(1).reshape(layer.scale.shape) / 127
        # A step is stored as float16: by at most one in 2,048 another, which 127 steps sum up.
        assert ((found - expected).abs() <= step * (0.5 + 127 / 2048) + 1e-9).all()


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("clips", "A_B_task1", "of the stage clips; --target dcase2025 takes a folder of `students`"),
        ("students", "A-B", "the folder's name is the submission's label, and found is 'A-B'"),
        ("students", "there", "exists; choose another folder"),
    ],
)
def test_mistakes_are_one_line(storage, tmp_path, stage, name, message):
    (tmp_path / "there").mkdir()
    made = next((storage / stage).iterdir())
    with pytest.raises(UserError, match=message):
        export_challenge(str(made), tmp_path / name, "", Progress())
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


def test_a_student_over_the_challenge_s_limits_is_refused():
    config = StudentConfig.model_validate({"model": {"name": "cp_resnet", "width": 64}})
    with pytest.raises(UserError, match=r"cp_resnet is too large for DCASE 2025 task 1: .* bytes with int8 weights"):
        submission_of(build(config.model, 10), {}, config, [str(k) for k in range(10)])
