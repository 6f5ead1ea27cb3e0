"""Specialized students: what is trained and kept for each device, what unknown devices get, resuming."""

import json

import numpy as np
import pytest
import torch
from conftest import clip_store, noise
from safetensors.torch import load_file

from asc_ray.artifacts import Artifact
from asc_ray.audio.frontend import LogMel
from asc_ray.data.clips import Clip, open_clips, write_clips
from asc_ray.data.config import DemoConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.logits import write_logits
from asc_ray.evaluation.artifact import read_answers
from asc_ray.models.complexity import complexity
from asc_ray.models.registry import build
from asc_ray.stages.evaluate import evaluate_specialized
from asc_ray.students.config import SpecializeConfig, StudentConfig
from asc_ray.students.specialize import adapted, load_specialized, specialize_student
from asc_ray.students.targets import TargetFiles, student_clips
from asc_ray.students.train import train_student
from asc_ray.training import loop
from asc_ray.training.dataset import Source
from asc_ray.training.validation import predict
from asc_ray.training.weights import load_model

PARTS = PartitionConfig(fusion=0.25, validation=0.25)
DEVICES = {"a": "a", "b": "b/../b", "c": "c c"}  # names that no file could have


def configured(weights="all", epochs=2, **changes):
    raw = {
        "model": {"name": "ds_flexinet", "size": "sm1"},
        "frontend": {"n_fft": 1024, "window": 800, "hop": 1000, "mels": 64},
        "augment": {"dir": {"p": 1.0}, "freq_mixstyle": {"p": 1.0}},
        "optimizer": {"epochs": 2, "batch_size": 8},
        "specialize": {"epochs": epochs, "learning_rate": 0.01, "weights": weights},
    }
    return StudentConfig.model_validate(raw | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    """The demo's clips of devices a, b, c and, in the test split alone, s4; with odd names."""
    folder = tmp_path_factory.mktemp("corpus")
    make_demo_corpus(folder / "corpus", DemoConfig(train_clips_per_scene=6, train_places_per_scene=4,
                                                   test_seconds_per_scene=1))  # fmt: skip
    whole = open_clips(clip_store(folder, read_corpus(folder / "corpus")))
    train = whole.split == "train"
    device = np.where(train, np.array(list("aabc"))[np.arange(len(whole)) % 4], whole.device[:])
    rows = np.flatnonzero(np.isin(device, [*DEVICES, "s4"]))
    artifact = Artifact(folder, "clips", "named", "0", {}, {})
    partial = artifact.open_partial()
    names = [DEVICES.get(str(name), str(name)) for name in device[rows]]
    clips = [
        Clip(str(whole.ids[row]), whole.labels[whole.scene[row]], name, str(whole.place[[row]][0]),
             str(whole.split[[row]][0]))
        for row, name in zip(rows, names, strict=True)
    ]  # fmt: skip
    write_clips(partial / "shard-000000000.arrow", clips, whole.pcm(rows), whole.labels, tuple(sorted(set(names))), "f")
    (partial / "impulse_responses.safetensors").write_bytes(
        (whole.folder / "impulse_responses.safetensors").read_bytes()
    )
    artifact.finish({})
    return Source(artifact.path, PARTS)


@pytest.fixture(scope="module")
def student(source, tmp_path_factory) -> Artifact:
    artifact = Artifact(tmp_path_factory.mktemp("student"), "students", "student", "0", {}, {})
    train_student(artifact, source, None, configured())
    return artifact


def specialized(source, student, config, folder) -> Artifact:
    artifact = Artifact(folder, "specialized", "student", "0", {}, {})
    specialize_student(artifact, source, None, student.path, config)
    return artifact


def test_each_device_has_its_own_copy_and_the_whole_is_counted(source, student, tmp_path):
    seen = []
    config = configured()
    artifact = Artifact(tmp_path, "specialized", "student", "0", {}, {})
    specialize_student(artifact, source, None, student.path, config, on_epoch=seen.append)
    facts, data = artifact.facts(), source.open()
    heard = data.store.device[student_clips(data)]
    assert {name: own["clips"] for name, own in facts["devices"].items()} == {
        name: int((heard == name).sum()) for name in DEVICES.values()
    }
    assert [own["epoch"] for own in facts["history"]] == [1, 2, 3, 4, 5, 6] == [own["epoch"] for own in seen]
    assert {own["epochs"] for own in seen} == {6}  # of all devices
    parameters = student.facts()["parameters"]
    assert facts["parameters"] == (1 + 3) * parameters
    networks = load_specialized(artifact.path, student.path, config, 10)
    assert set(networks) == set(DEVICES.values())
    states = [load_model(student.path, config, 10).state_dict(), *(own.state_dict() for own in networks.values())]
    firsts = [state["classifier.2.weight"] for state in states]
    assert len({own.numpy().tobytes() for own in firsts}) == 4
    assert not list(artifact.path.rglob("checkpoints"))


def test_heads_and_normalizations_alone(source, student, tmp_path):
    config = configured("head_and_normalizations")
    artifact = specialized(source, student, config, tmp_path)
    general = load_model(student.path, config, 10)
    names = adapted(general, config.specialize)
    of_layers = sum(
        layer.parameters
        for layer in complexity(general, (1, 1, 64, 32)).layers
        if layer.kind in ("BatchNorm2d", "ResidualNorm", "Linear")
    )
    assert artifact.facts()["parameters"] == student.facts()["parameters"] + 3 * of_layers
    for own in artifact.facts()["devices"].values():
        assert set(load_file(artifact.path / own["file"])) == names
    before = general.state_dict()
    for network in load_specialized(artifact.path, student.path, config, 10).values():
        changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
        assert changed <= names
        assert {"classifier.2.weight", "features.stem.1.running_mean", "features.norm1.lambda_"} <= changed
    for name in ("cp_mobile", "tf_sepnet", "cnn_gru", "bsconv_cnn"):  # the head is what makes the logits
        model = build(StudentConfig.model_validate({"model": {"name": name}}).model, 7)
        own = adapted(model, config.specialize)
        heads = [value for key, value in model.named_parameters() if key in own and value.ndim > 1]
        assert [len(value) for value in heads] == [7], name


def test_a_known_device_is_heard_by_its_network_and_an_unknown_one_by_the_general_student(source, student, tmp_path):
    config = configured()
    artifact = specialized(source, student, config, tmp_path)
    scored = Artifact(tmp_path, "evaluation", "specialized", "0", {}, {})
    evaluate_specialized(scored, source, artifact.path, student.path, config)
    data = source.open(test=True)
    store, test = data.store, data.parts["test"]
    found = read_answers([scored.path], store.ids[test])[0]
    networks = load_specialized(artifact.path, student.path, config, 10)
    general = load_model(student.path, config, 10)
    assert "s4" in store.device[test]
    for row, clip in enumerate(test):
        device = str(store.device[[clip]][0])
        network = networks.get(device, general)
        own = predict(network, LogMel(config.frontend), store, np.array([clip]), torch.device("cpu"))
        np.testing.assert_allclose(found[row], own[0], rtol=1e-4, atol=1e-5)
    assert scored.facts()["clips_of_unknown_devices"] == int((store.device[test] == "s4").sum())


@pytest.mark.parametrize("weights", ["all", "head_and_normalizations"])
def test_what_is_kept_is_the_network_whose_figures_are_told(source, student, tmp_path, weights):
    config = configured(weights)
    artifact = specialized(source, student, config, tmp_path)
    data = source.open()
    held_out = data.parts["validation"]
    history = artifact.facts()["history"]
    for number, (device, network) in enumerate(load_specialized(artifact.path, student.path, config, 10).items()):
        own = held_out[data.store.device[held_out] == device]
        logits = predict(network, LogMel(config.frontend), data.store, own, torch.device("cpu"))
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.store.scene[own])).item()
        assert history[2 * number + 1]["validation_log_loss"] == pytest.approx(loss, rel=1e-4), device


def test_lambda_keeps_its_value_from_the_students_last_epoch(source, tmp_path):
    config = configured(distillation={"label_weight": {"start": 0.2, "end": 0.6}})
    data = source.open()
    artifact = Artifact(tmp_path, "fusion", "fusion", "0123456789abcdef", {}, {})
    rows = np.flatnonzero(data.store.split == "train")
    about = {"system": "fused", "labels": json.dumps(data.store.labels), "corpus": data.store.corpus}
    write_logits(artifact.open_partial() / "train.arrow", data.store.ids[rows], noise(len(rows), 10), about)
    artifact.finish({})
    targets = TargetFiles(artifact.path, "train*")
    student = Artifact(tmp_path, "students", "student", "0", {}, {})
    train_student(student, source, targets, config)
    assert [own["label_weight"] for own in student.facts()["history"]] == pytest.approx([0.2, 0.6])
    tuned = Artifact(tmp_path, "specialized", "student", "0", {}, {})
    specialize_student(tuned, source, targets, student.path, config)
    assert [own["label_weight"] for own in tuned.facts()["history"]] == pytest.approx([0.6] * 6)


class Killed(Exception):
    pass


def test_one_that_was_killed_goes_on_and_ends_with_the_same_bits(source, student, tmp_path, monkeypatch):
    config = configured(epochs=3)
    whole = specialized(source, student, config, tmp_path / "whole")
    artifact = Artifact(tmp_path / "resumed", "specialized", "student", "0", {}, {})

    def kill(metrics):
        if metrics["epoch"] == 5:  # the second device's second epoch
            raise Killed

    with pytest.raises(Killed):
        specialize_student(artifact, source, None, student.path, config, on_epoch=kill)
    trained, seen = [], []
    real = loop.Trainer.begin_epoch

    def counted(self, *given, **more):
        trained.append(1)
        return real(self, *given, **more)

    monkeypatch.setattr(loop.Trainer, "begin_epoch", counted)
    specialize_student(artifact, source, None, student.path, config, on_epoch=seen.append)
    assert len(trained) == 3 * 3 - 5
    assert [own["epoch"] for own in seen] == list(range(1, 10))
    for own in whole.facts()["devices"].values():
        assert (whole.path / own["file"]).read_bytes() == (artifact.path / own["file"]).read_bytes()


def test_it_learns_by_the_students_recipe_without_other_devices_sounds(source, student, tmp_path, monkeypatch):
    recipes = []

    def noted(model, recipe, data, train, *given, **more):
        recipes.append((recipe, set(data.store.device[train])))
        return real(model, recipe, data, train, *given, **more)

    real = loop.fit
    monkeypatch.setattr("asc_ray.students.specialize.fit", noted)
    config = configured(balance=1.0)
    specialized(source, student, config, tmp_path)
    assert [devices for _, devices in recipes] == [{name} for name in sorted(DEVICES.values())]
    recipe = recipes[0][0]
    assert (recipe.augment.dir.p, recipe.augment.freq_mixstyle.p, recipe.balance) == (0, 0, 0)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.epochs, recipe.seed) == (0.01, 2, config.seed)


def test_the_fields_are_checked():
    assert SpecializeConfig().by == "device"
    for wrong in ({"epochs": 0}, {"by": "city"}, {"weights": "heads"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpecializeConfig.model_validate(wrong)
