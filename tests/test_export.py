"""`asc-ray export` of a finished pipeline: the folder, its card, the registry, and what is refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, command, environment, joined
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from asc_ray.artifacts import read_manifest
from asc_ray.data.clips import ClipStore
from asc_ray.embedded.program import HOST_TOOLS, missing
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import read_evaluation
from asc_ray.models.complexity import peak_activations
from asc_ray.models.config import DSFlexiNetConfig
from asc_ray.models.registry import build
from asc_ray.runtime import Bundle
from asc_ray.tracking.config import default_uri
from asc_ray.tracking.registry import register


@pytest.fixture(scope="module")
def storage(finished, tmp_path_factory):
    """A copy, for the registry is written to."""
    copy = tmp_path_factory.mktemp("export") / "storage"
    shutil.copytree(finished.storage, copy, ignore=shutil.ignore_patterns("mlartifacts"))
    return copy


def run(*arguments):
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=joined(), check=False)


@pytest.fixture(scope="module")
def exported(storage):
    (int8,) = (storage / "int8").iterdir()
    out = storage.parent / "bundle"
    done = run("export", int8, out)
    assert done.returncode == 0, done.stderr
    # Three epochs are no better than guessing, so a person makes it the champion.
    MlflowClient(default_uri(storage)).set_registered_model_alias("asc-ray", "champion", "1")
    return out, done.stdout


def test_the_folder_is_whole_and_says_so(exported):
    out, output = exported
    names = {"SHA256SUMS", "card.md", "frontend.json", "labels.json", "model.onnx"}
    assert {path.name for path in out.iterdir()} == names
    done = run("verify", out)
    assert done.returncode == 0, done.stderr
    assert "as exported; 10 labels" in done.stdout
    assert "90 test clips" in output
    assert "registered as asc-ray version 1; it does not become the champion" in output
    assert "no more than guessing may reach there" in output


def test_the_bundle_answers_what_the_evaluation_scored(exported, storage):
    out, _ = exported
    (clips,) = (storage / "clips").iterdir()
    store = ClipStore(clips)
    test = np.flatnonzero(store.split == "test")
    right = Bundle(out).logits(store.pcm(test)).argmax(1) == store.scene[test]
    (evaluation,) = (storage / "evaluation").glob("int8-*")
    assert abs(right.mean() - read_evaluation(evaluation).accuracy) <= 1 / len(test)


def test_the_card_has_sizes_devices_operators_and_lineage(exported, storage):
    out, _ = exported
    card = (out / "card.md").read_text()
    (int8,), (student,) = ((storage / stage).iterdir() for stage in ("int8", "students"))
    facts, cost = read_manifest(int8)["facts"], read_manifest(student)["facts"]
    assert f"| int8 weights, bytes | {facts['bytes']['int8']:,} |" in card
    assert f"| parameters, before batch norms were folded | {cost['parameters']:,} |" in card
    used = yaml.safe_load(card.partition("```yaml")[2].partition("```")[0])
    assert used == read_manifest(student)["facts"]["recipe"]
    for device in ("| a | 10 |", "| (s6) | 10 |", "| all | 90 |"):
        assert device in card
    assert re.search(r"\| `aten.conv2d.default` \| int8 \| \d+ \|", card)
    assert re.search(r"\| `aten.rsqrt.default` \| float32 \| \d+ \|", card)
    assert not re.search(r"`aten.(conv2d|linear).default` \| float32", card)
    for key in (read_manifest(int8)["key"], read_manifest(student)["key"]):
        assert f"`{key}`" in card
    ids = re.findall(r"\| MLflow run of the \w+ \| `(\w{32})` \|", card)
    client = MlflowClient(default_uri(storage))
    assert {client.get_run(own).data.tags["asc_ray.key"] for own in ids} == {
        read_manifest(folder)["key"] for folder in (int8, student)
    }
    assert f"int8, bytes | {facts['peak_activations']:,} |" in card
    assert facts["peak_activations"] == peak_activations(build(DSFlexiNetConfig(size="sm1"), 10), cost["input"])["int8"]
    assert "Not stated." in card
    assert re.search(r"\| torch \| [\d,]+ \(weights and scales\) \|.* [01] of 90, by at most ", card)
    assert "| C |" not in card
    for line in ("| train | 120 clips, 60 places |", "| test | 90 clips, 10 places |", "alone | s4, s5, s6 |"):
        assert line in card
    assert "&" not in card, "Markdown and not HTML"


@pytest.mark.skipif(bool(missing(*HOST_TOOLS)), reason=f"not here: {missing(*HOST_TOOLS)}")
def test_a_bundle_gets_its_c_form_with_figures_in_the_card(exported, storage, tmp_path):
    out = tmp_path / "bundle"
    shutil.copytree(exported[0], out)
    (int8,) = (storage / "int8").iterdir()
    done = run("export", int8, out, "--target", "c")
    assert done.returncode == 0, done.stderr
    assert re.search(r"the C form names [01] of them differently", done.stdout)
    card = (out / "card.md").read_text()
    assert "| clips compared with onnxruntime | 90 |" in card
    forms = {row.split(" | ")[0]: row for row in card.partition("## Forms")[2].partition("##")[0].splitlines() if row}
    assert f" {(out / 'model.onnx').stat().st_size:,} (file) " in forms["| ONNX"]
    assert re.search(r" [01] of 90, by at most 0\.\d+ \|$", forms["| C"])
    before = (out / "SHA256SUMS").read_text()
    done = run("export", int8, out, "--target", "c")
    assert done.returncode == 0, "an equal one stays"
    assert (out / "SHA256SUMS").read_text() == before
    done = run("verify", out)
    assert done.returncode == 0, done.stderr
    assert "of 20 clips of noise get another scene than onnxruntime's" in done.stdout


TFLITE_IS_HERE = find_spec("litert_torch") is not None and find_spec("ai_edge_litert") is not None


@pytest.mark.skipif(TFLITE_IS_HERE, reason="the extra tflite is here")
def test_without_its_extra_tflite_is_refused_before_anything_is_written(exported, storage, tmp_path):
    (int8,) = (storage / "int8").iterdir()
    done = run("export", int8, tmp_path / "bundle", "--target", "tflite")
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "--target tflite needs litert-torch" in said
    assert "pip install 'asc-ray[tflite]'" in said
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(not TFLITE_IS_HERE, reason="the extra tflite is not here")
def test_a_bundle_gets_its_tflite_form(exported, storage, tmp_path):
    out = tmp_path / "bundle"
    shutil.copytree(exported[0], out)
    (int8,) = (storage / "int8").iterdir()
    done = run("export", int8, out, "--target", "tflite")
    assert done.returncode == 0, done.stderr
    assert re.search(r"TensorFlow Lite names [01] of them differently", done.stdout)
    assert run("verify", out).returncode == 0
    assert "model.tflite" in (out / "SHA256SUMS").read_text()
    assert re.search(r"\| TFLite, float32 \| .* [01] of 90 than from float32 in torch", (out / "card.md").read_text())


def test_mlflow_serves_the_champion(exported, storage, tmp_path):
    """By the line of docs/delivery.md as it stands, from any folder."""
    out, _ = exported
    waves = 0.1 * np.random.default_rng(0).standard_normal((2, 32_000), dtype=np.float32)
    (tmp_path / "waves.json").write_text(json.dumps({"inputs": waves.tolist()}))
    page = (ROOT / "docs" / "delivery.md").read_text()
    (line,) = re.findall(r"^mlflow models predict .*$", page, re.M)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path, check=False,
        env=environment() | {"MLFLOW_TRACKING_URI": default_uri(storage), "PATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["predictions"]
    assert {path.name for path in tmp_path.iterdir()} == {"waves.json"}, "no stray database"
    bundle = Bundle(out)
    for row, expected in zip(rows, bundle.probabilities(waves), strict=True):
        assert row.pop("scene_label") == bundle.labels[expected.argmax()]
        assert list(row) == list(bundle.labels)
        np.testing.assert_allclose(list(row.values()), expected, atol=1e-5)


def test_the_run_keeps_its_end_and_has_the_model(exported, storage, finished):
    client = MlflowClient(default_uri(storage))
    version = client.get_model_version_by_alias("asc-ray", "champion")
    run = client.get_run(version.run_id)
    assert run.info.end_time == MlflowClient(default_uri(finished.storage)).get_run(version.run_id).info.end_time
    (int8,) = (storage / "int8").iterdir()
    assert run.data.tags["asc_ray.key"] == read_manifest(int8)["key"]
    assert run.info.status == "FINISHED"
    mlflow.set_tracking_uri(default_uri(storage))
    model = mlflow.models.get_model_info("models:/asc-ray@champion")
    assert model.signature.inputs.inputs[0].shape == (-1, 32_000)
    assert model.saved_input_example_info is not None


def test_a_copy_s_model_lies_in_the_copy(exported, storage, finished):
    """The storage of these tests is one."""
    assert list((storage / "mlartifacts").rglob("model.onnx"))
    assert not list((finished.storage / "mlartifacts").rglob("SHA256SUMS"))


def test_the_better_one_becomes_champion(exported, storage):
    out, _ = exported
    uri, client = default_uri(storage), MlflowClient(default_uri(storage))
    run_id = client.get_model_version_by_alias("asc-ray", "champion").run_id

    def champion():
        return int(client.get_model_version_by_alias("contest", "champion").version)

    assert "version 1, the champion (50.0 %" in register(uri, run_id, out, "contest", 0.5, "clips")
    assert "version 1 stays the champion (50.0 %" in register(uri, run_id, out, "contest", 0.5, "clips")
    assert champion() == 1
    assert "in place of version 1 with 50.0 %" in register(uri, run_id, out, "contest", 0.6, "clips")
    assert champion() == 3
    assert "does not become the champion" in register(uri, run_id, out, "contest", 0.7, "clips", guessing=0.8)
    assert champion() == 3
    line = register(uri, run_id, out, "contest", 0.9, "other clips")
    assert "version 3 stays the champion: it was validated on other clips" in line
    assert champion() == 3


def test_a_server_that_refuses_leaves_the_bundle_and_the_run(exported, storage, tmp_path, monkeypatch):
    """And the same command registers what is there."""
    out, _ = exported
    (int8,) = (storage / "int8").iterdir()
    uri = default_uri(storage)
    client = MlflowClient(uri)
    run_id = client.get_model_version_by_alias("asc-ray", "champion").run_id

    def refuse(*_, **__):
        raise MlflowException("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(mlflow, "register_model", refuse)
        with pytest.raises(UserError, match=r"is whole, but MLflow .* did not register it .*the disk is full"):
            register(uri, run_id, out, "unlucky", 0.5, "clips")
    with monkeypatch.context() as broken:  # it is not known whether there is a champion
        broken.setattr(MlflowClient, "get_model_version_by_alias", refuse)
        with pytest.raises(UserError, match="the disk is full"):
            register(uri, run_id, out, "unlucky", 0.5, "clips")
    assert client.get_run(run_id).info.status == "FINISHED"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    done = run("export", int8, out, "--name", "lucky")
    assert done.returncode == 0, done.stderr
    assert "registered as lucky version 1" in done.stdout
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(out.parent.glob(".*partial"))


def test_a_link_or_a_path_with_dots_is_followed(exported, storage, tmp_path):
    (int8,) = (storage / "int8").iterdir()
    (tmp_path / "latest").symlink_to(int8)
    done = subprocess.run(
        command("export", tmp_path / "latest" / ".." / int8.name, tmp_path / "out"),
        capture_output=True, text=True, env=environment(), check=False, cwd=int8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_run_may_be_named_by_its_id(exported, storage, tmp_path):
    """Of the int8 training, and of the pipeline."""
    out, _ = exported
    client = MlflowClient(default_uri(storage))
    # The copied database still says where the storage was: names it as a moved storage's would.
    version = client.get_model_version_by_alias("asc-ray", "champion")
    tags = client.get_run(version.run_id).data.tags
    for name, run_id in (("int8", version.run_id), ("pipeline", tags["mlflow.parentRunId"])):
        done = run("export", run_id, tmp_path / name, "--name", name, "--set", f"storage={storage}")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / name / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def refused(*arguments, message, code=1):
    done = run("export", *arguments)
    assert done.returncode == code, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_what_cannot_be_exported_is_refused(exported, storage, tmp_path):
    (int8,), (student,) = ((storage / stage).iterdir() for stage in ("int8", "students"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("all of it")
    refused(int8, full, message="full: exists, and is not this bundle")
    refused(int8, full / "thesis.txt" / "out", message="cannot be made (Not a directory)")
    refused(int8, tmp_path / "out", "--name", "a/b", message="a registered model's name", code=2)
    refused("/", tmp_path / "out", message="no manifest.json")
    assert (full / "thesis.txt").exists()
    refused(student, tmp_path / "out", message="of the stage students, and not an int8 student")
    refused("no-such-run", tmp_path / "out", "--set", f"storage={storage}", message="no-such-run: no folder, and not")
    refused(full, tmp_path / "out", message="no manifest.json, so this is not a finished artifact")
    damaged = tmp_path / "storage" / "int8" / int8.name
    shutil.copytree(int8, damaged)
    (damaged / "model.onnx").write_bytes(b"")
    refused(damaged, tmp_path / "out", message="model.onnx: checksum differs")
    alone = tmp_path / "alone" / "int8" / int8.name
    shutil.copytree(int8, alone)
    refused(alone, tmp_path / "out", message="nothing with the key")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*partial"))


def test_without_a_run_nothing_is_registered(exported, storage, tmp_path):
    out, _ = exported
    moved = tmp_path / "moved"
    shutil.copytree(storage, moved, ignore=shutil.ignore_patterns("mlflow.db*", "mlartifacts"))
    (int8,) = (moved / "int8").iterdir()
    done = run("export", int8 / "model.onnx", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "not registered: no run in" in done.stdout
    assert not (moved / "mlflow.db").exists()
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()


@pytest.mark.campaign
def test_post_training_quantization_is_exported_like_any(exported, storage, tmp_path):
    """Another int8 form of the same student, from ranges alone."""
    arguments = ("--config", TINY, "--set", f"storage={storage}", "--set", "qat.epochs=0")
    done = run("qat", *arguments, "--set", "qat.calibration_clips=8")
    assert done.returncode == 0, done.stderr
    made = [folder for folder in (storage / "int8").iterdir() if not read_manifest(folder)["facts"]["history"]]
    assert len(made) == 1
    done = run("export", made[0], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    trained = Bundle(exported[0]), Bundle(tmp_path / "out")
    waves = 0.1 * np.random.default_rng(0).standard_normal((4, 32_000), dtype=np.float32)
    one, other = (bundle.logits(waves) for bundle in trained)
    assert not np.array_equal(one, other)
    np.testing.assert_allclose(one, other, atol=0.5)
