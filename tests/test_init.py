"""Trainings that start from a finished network: of other scenes, with a head made anew, and by its contents in keys."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY, clip_store
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from asc_ray.artifacts import Artifact
from asc_ray.config.composition import load_config
from asc_ray.data.config import DemoConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import make_demo_corpus
from asc_ray.errors import ConfigError, UserError
from asc_ray.models.pretrained import metadata
from asc_ray.models.registry import build, head_of
from asc_ray.plan import Plan
from asc_ray.students.config import StudentConfig
from asc_ray.students.train import train_student
from asc_ray.training.config import Recipe
from asc_ray.training.dataset import Source
from asc_ray.training.folder import WEIGHTS
from asc_ray.training.weights import about, save_weights, started

OTHER = ["bark", "rain", "siren"]
NO_SWEEP = "sweep=null"
LABELS = [f"scene {number}" for number in range(10)]
PASST = {"name": "passt", "width": 24, "depth": 2, "heads": 2, "mels": 64, "stride": 10, "patchout_freq": 2}
NETWORKS = {
    "ds_flexinet": {"name": "ds_flexinet", "size": "sm1"},
    "sm2": {"name": "ds_flexinet", "size": "sm2"},
    "cp_mobile": {"name": "cp_mobile", "width": 8},
    "cp_resnet": {"name": "cp_resnet", "width": 8},
    "bsconv_cnn": {"name": "bsconv_cnn", "stem": 8, "channels": [8, 16]},
    "passt": PASST,
}
SHORT = {"n_fft": 1024, "window": 800, "hop": 1000, "mels": 64}


def recipe(model: str = "ds_flexinet", **changes) -> Recipe:
    return Recipe.model_validate({"model": NETWORKS[model], "frontend": SHORT} | changes)


def finished(storage: Path, own: Recipe, labels=OTHER, stage: str = "students", seed: int = 7) -> Path:
    """The folder of a finished training, of random weights."""
    artifact = Artifact(storage, stage, "student", "0123456789abcdef", {}, {})
    model = build(own.model, len(labels), seed)
    save_weights(model, artifact.open_partial() / WEIGHTS, about(own, labels))
    artifact.finish({})
    return artifact.path


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "sm2"])
def test_a_network_of_other_scenes_comes_with_a_fresh_head(tmp_path, name):
    folder = finished(tmp_path, recipe(name))
    own = recipe(name, init=str(folder))
    model, fresh = build(own.model, len(LABELS), 1), build(own.model, len(LABELS), 1).state_dict()
    assert started(model, own, LABELS) == ["a fresh head"]
    old = load_file(folder / WEIGHTS)
    head = {*head_of(own.model, len(LABELS)), *(n for n in fresh if n.startswith("head"))}
    assert 2 <= len(head) < len(fresh) / 2
    for tensor, value in model.state_dict().items():
        assert torch.equal(value, (fresh if tensor in head else old)[tensor]), tensor


def test_a_network_of_the_same_scenes_keeps_its_head_and_of_as_many_others_does_not(tmp_path):
    for labels, changes in ((LABELS, []), (LABELS[::-1], ["a fresh head"])):
        folder = finished(tmp_path / str(changes), recipe(), labels)
        own = recipe(init=str(folder / WEIGHTS))
        model = build(own.model, len(LABELS), 1)
        assert started(model, own, LABELS) == changes
        head = model.state_dict()["classifier.2.weight"]
        assert torch.equal(head, load_file(folder / WEIGHTS)["classifier.2.weight"]) == (not changes)


def test_without_init_nothing_is_loaded():
    model, fresh = build(recipe().model, 10, 1), build(recipe().model, 10, 1).state_dict()
    assert started(model, recipe(), LABELS) is None
    assert all(torch.equal(value, fresh[name]) for name, value in model.state_dict().items())


DOES_NOT_FIT = {
    "another size": ({"model": "sm2"}, "does not fit DSFlexiNet as configured: .* of another shape"),
    "another network": ({"model": "cp_mobile"}, "does not fit CPMobile as configured"),
    "another front end": (
        {"frontend": SHORT | {"hop": 500}}, r'was trained with frontend .*"hop": 1000.* and here .*"hop": 500'
    ),
}  # fmt: skip
OF_TWO = [
    (StudentConfig, {"init": "a", "checkpoint": "b"}, "init: a student from a checkpoint"),
    (Recipe, {"init": "a", "model": PASST | {"pretrained": "b"}}, "init: model.pretrained"),
]


@pytest.mark.parametrize("what", DOES_NOT_FIT)
def test_what_does_not_fit_is_refused(tmp_path, what):
    changes, message = DOES_NOT_FIT[what]
    own = recipe(**({"init": str(finished(tmp_path, recipe()))} | changes))
    with pytest.raises(ConfigError, match=message):
        started(build(own.model, 10), own, LABELS)


def settings(storage: Path, *more: str) -> list[str]:
    return [f"storage={storage}", NO_SWEEP, *more]


def no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def damaged(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def of_another_stage(folder: Path) -> None:
    shutil.rmtree(folder)
    artifact = Artifact(folder.parents[1], "students", "student", "0123456789abcdef", {}, {})
    (artifact.open_partial() / "model.onnx").write_bytes(b"x")
    artifact.finish({})


REFUSED = {
    "not there": (no_folder, "no such file"),
    "not finished": (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json, so this is not a fin"),
    "no weights": (of_another_stage, f"without {WEIGHTS}; give a student's or a teacher's folder"),
    "damaged": (damaged, "model.safetensors: checksum differs"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("key", ["student", "teachers.recipes.cpr_128k_fms_1"])
def test_a_run_that_cannot_be_started_from_is_named_with_its_key(tmp_path, what, key):
    change, message = REFUSED[what]
    folder = finished(tmp_path / "elsewhere", recipe())
    change(folder)
    with pytest.raises(UserError, match=f"{key}.init: .*{message}"):
        Plan(load_config(TINY, settings(tmp_path, f"{key}.init={folder}")))


def test_init_is_in_the_key_by_its_contents(tmp_path):
    config = load_config(TINY, settings(tmp_path))
    files = {}
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        files[name] = finished(tmp_path / name, config.student, seed=seed)

    def keys(key: str, name: str | None) -> tuple[str, str]:
        plan = Plan(load_config(TINY, settings(tmp_path, *([f"{key}.init={files[name]}"] if name else []))))
        return plan.students["student"].key, plan.teachers["cpr_128k_fms_1"].key

    none = keys("student", None)
    one, same, other = (keys("student", name) for name in files)
    assert one == same
    assert one[1] == none[1]
    assert len({none[0], one[0], other[0]}) == 3
    save_file(load_file(files["one"] / WEIGHTS), tmp_path / "x.safetensors", metadata(about(config.student, OTHER)))
    files["as a file"] = tmp_path / "x.safetensors"
    assert keys("student", "as a file") == one
    of_teacher = keys("teachers.recipes.cpr_128k_fms_1", "one")
    assert of_teacher[1] not in (none[1], keys("teachers.recipes.cpr_128k_fms_1", "other")[1])
    assert keys("teachers.recipes.cpr_128k_fms_1", "same") == of_teacher


@pytest.mark.parametrize(("section", "keys", "message"), OF_TWO)
def test_two_networks_to_start_from_are_refused(section, keys, message):
    with pytest.raises(ValidationError, match=message):
        section.model_validate({"model": NETWORKS["cp_mobile"], "frontend": SHORT} | keys)


@pytest.mark.parametrize("key", ["init", "model.pretrained"])
def test_what_a_training_starts_from_is_not_searched(key):
    with pytest.raises(UserError, match=rf"sweep.space.{key}: is not searched"):
        load_config(TINY, [f"sweep.space={{{key}: {{choice: [null, x]}}}}"])


def test_a_student_goes_on_from_where_it_starts(tmp_path):
    """With a learning rate of nearly nothing the network stays the one that it starts from."""
    make_demo_corpus(tmp_path / "corpus", DemoConfig(train_clips_per_scene=6, train_places_per_scene=6,
                     test_seconds_per_scene=1, test_places_per_scene=1, impulse_responses=2))  # fmt: skip
    store = clip_store(tmp_path, read_corpus(tmp_path / "corpus"))
    for model in ("cp_mobile", "passt"):
        folder = finished(tmp_path / model, recipe(model))
        own = StudentConfig.model_validate(
            {
                "model": NETWORKS[model],
                "frontend": SHORT,
                "init": str(folder),
                "optimizer": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-9},
                "distillation": {"soft_target": "none"},
            }
        )
        artifact = Artifact(tmp_path, "students", model, "0" * 16, {}, {})
        train_student(artifact, Source(store, PartitionConfig()), None, own)
        assert artifact.facts()["started_from"] == ["a fresh head"]
        trained, old = load_file(artifact.path / WEIGHTS), load_file(folder / WEIGHTS)
        head = {*head_of(own.model, len(OTHER)), *(name for name in old if name.startswith("head"))}
        for name in old.keys() - head:
            if "running" not in name and "batches" not in name:
                torch.testing.assert_close(trained[name], old[name], atol=1e-5, rtol=0)
