"""The whole pipeline as a user runs it: what it leaves behind, twice the same, killed and started again."""

import importlib.util
import json
import re
import shutil
import subprocess
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, TINY, command, environment, joined, processes, relabel_test_clips
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from typer.testing import CliRunner

from asc_ray.artifacts import Artifact, damaged_files, read_manifest
from asc_ray.audio.frontend import LogMel
from asc_ray.cli import app
from asc_ray.config.composition import load_config
from asc_ray.data.clips import ClipStore
from asc_ray.data.logits import Ensemble, read_logits
from asc_ray.data.pieces import piece_file
from asc_ray.ensemble.fusion import Fusion
from asc_ray.ensemble.inference import Inference, infer
from asc_ray.ensemble.stored import StoredEnsemble
from asc_ray.ensemble.teachers import train_teacher
from asc_ray.errors import ConfigError, UserError
from asc_ray.evaluation.artifact import read_evaluation, read_scores
from asc_ray.int8.train import load_int8
from asc_ray.models.config import CPMobileConfig
from asc_ray.models.registry import build
from asc_ray.plan import Plan
from asc_ray.search.order import finalists
from asc_ray.search.proposals import propose, trial_config
from asc_ray.search.trials import TrialResult
from asc_ray.search.trials import best as best_of
from asc_ray.stages.fuse import fusion_warning
from asc_ray.students.train import train_student
from asc_ray.training.dataset import Source
from asc_ray.training.validation import predict
from asc_ray.training.weights import load_model

_spec = importlib.util.spec_from_file_location("screenshots", ROOT / "docs" / "screenshots.py")
assert _spec is not None
assert _spec.loader is not None
screenshots: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(screenshots)


def plan_of(run):
    return Plan(load_config(TINY, [f"storage={run.storage}"]))


@pytest.fixture(scope="module")
def plan(finished):
    return plan_of(finished)


def values(artifact):
    stored = read_logits(artifact.path)
    return stored.take(np.arange(len(stored)))


def artifacts(plan):
    return [artifact for group in plan.by_stage().values() for artifact in group]


def test_every_stage_ends_as_a_sound_artifact_with_its_lineage(plan):
    keys = {artifact.key for artifact in artifacts(plan)}
    for artifact in artifacts(plan):
        assert artifact.complete, artifact
        assert damaged_files(artifact.path) == []
        inputs = read_manifest(artifact.path)["inputs"]
        assert set(inputs.values()) <= keys
    assert not list(plan.config.storage.rglob("*.partial"))
    assert not list(plan.config.storage.rglob("*.tmp"))


def test_verify_reads_every_file_again(plan, tmp_path):
    folders = [artifact.path for artifact in artifacts(plan)]
    sound = subprocess.run(command("verify", *folders), capture_output=True, text=True, check=False)
    assert sound.returncode == 0, sound.stderr
    assert f"{plan.clips.path}: 7 of 7 files as written" in sound.stdout
    copy = tmp_path / "clips"
    shutil.copytree(plan.clips.path, copy)
    shard = copy / "shard-000000100.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    (copy / "impulse_responses.safetensors").unlink()
    both = command("verify", copy, plan.fusion.path)
    rotten = subprocess.run(both, capture_output=True, text=True, check=False)
    assert rotten.returncode == 1
    assert f"{plan.fusion.path}: " in rotten.stdout, "one that is damaged does not end it"
    assert f"{shard}: checksum differs" in rotten.stderr
    assert f"{copy}/impulse_responses.safetensors: missing" in rotten.stderr
    assert "2 damaged file(s)" in rotten.stderr
    none = subprocess.run(command("verify", tmp_path), capture_output=True, text=True, check=False)
    assert none.returncode == 1
    assert "no manifest.json" in none.stderr


def test_two_workers_train_one_teacher(finished, plan, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    teacher = plan.teachers["cpr_128k_fms_1"]
    copy = storage / teacher.path.relative_to(finished.storage)
    shutil.rmtree(copy)
    workers = "teachers.resources_for.cp_resnet.workers=2"
    words = command("teachers", "--config", TINY, "--set", f"storage={storage}", "--set", workers)
    driver = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=joined())
    most = 0
    while driver.poll() is None:
        most = max(most, len(processes("RayTrainWorker")))
        time.sleep(0.2)
    assert driver.returncode == 0, driver.communicate()[0]
    assert most == 2
    for ours, theirs in zip(read_manifest(copy)["facts"]["history"], teacher.facts()["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)


@pytest.mark.campaign
def test_how_clips_are_delivered_is_in_no_key_and_changes_no_bit(finished, plan, tmp_path):
    """A student trained from a stream, logits from a node's own copy of the clips."""
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    student, logits = plan.students["student"].path, next(iter(plan.logits.values())).path
    for stage, made, delivery in (
        ("student", student / "model.safetensors", "data.mode=stream"),
        ("logits", logits / "train-000000000.arrow", f"data.cache={tmp_path / 'cache'}"),
    ):
        copy = storage / made.relative_to(finished.storage)
        shutil.rmtree(copy.parent)
        done = subprocess.run(
            command(stage, "--config", TINY, "--set", f"storage={storage}", "--set", delivery),
            capture_output=True, text=True, env=joined(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert copy.read_bytes() == made.read_bytes()
    assert (tmp_path / "cache" / plan.clips.path.name / "manifest.json").is_file()


def test_published_checkpoints_are_imported_and_the_rest_is_trained(finished, plan, tmp_path):
    """One system has a file, as Lightning writes it: it is not trained, and its logits are the trained twin's."""
    storage, folder = tmp_path / "storage", tmp_path / "published"
    folder.mkdir()
    shutil.copytree(finished.storage, storage)
    name = "cpr_128k_fms_1"
    weights = load_file(plan.teachers[name].path / "model.safetensors")
    torch.save({"state_dict": {f"net.{key}": value for key, value in weights.items()}}, folder / f"{name}.ckpt")
    overrides = [f"storage={storage}", f"teachers.checkpoints={folder}"]
    for stage in ("teachers", "logits"):
        done = subprocess.run(
            command(stage, "--config", TINY, *(word for override in overrides for word in ("--set", override))),
            capture_output=True, text=True, env=joined(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        said = (
            f"warning: the weights of {name} do not say in which order they name the scenes; this is taken on trust: "
        )
        assert (said + ", ".join(plan.clips.facts()["labels"]) in done.stdout) == (stage == "teachers")
    ours = Plan(load_config(TINY, overrides))
    assert ours.teachers[name].facts()["imported"] == f"{name}.ckpt"
    assert ours.teachers["passt_dirfms_1"].key == plan.teachers["passt_dirfms_1"].key
    assert ours.teachers[name].key != plan.teachers[name].key
    assert (values(ours.logits[name]) == values(plan.logits[name])).all()


def test_a_student_from_a_published_checkpoint_is_not_trained(plan, tmp_path):
    """CP-Mobile's file as Lightning writes it; its key follows the file's content, not its name."""
    network = build(CPMobileConfig(), 10, seed=5)
    stored = {f"net.{key}": value for key, value in network.state_dict().items()}
    torch.save({"state_dict": stored}, tmp_path / "one.ckpt")
    shutil.copy(tmp_path / "one.ckpt", tmp_path / "two.ckpt")
    given = ["student.preset=cp_mobile", "student.distillation.soft_target=none", f"storage={tmp_path / 'storage'}"]
    files = [f"student.checkpoint={tmp_path / name}.ckpt" for name in ("one", "two")]
    configs = [load_config(TINY, [*given, "sweep=null", file]) for file in files]
    ours = Plan(configs[0])
    artifact = ours.students["student"]
    assert artifact.key == Plan(configs[1]).students["student"].key
    train_student(artifact, Source(plan.clips.path, plan.config.partition), None, configs[0].student)
    weights = load_file(artifact.path / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    facts = artifact.facts()
    assert (facts["parameters"], facts["history"], facts["on_trust"]) == (126_952, [], True)
    with pytest.raises(ConfigError, match=r"student\.checkpoint: there is nothing to search for"):
        Plan(load_config(TINY, [*given, f"student.checkpoint={tmp_path / 'one.ckpt'}"]))
    with pytest.raises(ConfigError, match="a student from a checkpoint is not trained; allowed is 1"):
        load_config(TINY, [*given, "student.checkpoint=one.ckpt", "student.seeds=3"])


def test_the_output_tells_every_stage_and_where_things_are(finished, plan):
    for stage, artifacts in plan.by_stage().items():
        assert (f"{stage} done in" in finished.output) == bool(artifacts)
    for path in (
        plan.report.path / "report.html",
        plan.int8["int8"].path,
        finished.storage / "mlflow.db",
    ):
        assert str(path) in finished.output
        assert path.exists()


def test_the_clip_store_keeps_its_contract(plan):
    files = sorted(plan.clips.path.glob("shard-*.arrow"))
    assert len(files) == 3  # 120 + 90 clips in shards of 100
    schema = pa.ipc.open_file(pa.memory_map(str(files[0]))).schema
    assert schema.names == ["clip_id", "scene", "device", "location", "split", "energy", "pcm"]
    assert schema.field("pcm").type == pa.list_(pa.int16(), 32000)
    assert all(pa.types.is_dictionary(schema.field(name).type) for name in ("scene", "device", "location", "split"))
    store = ClipStore(plan.clips.path)
    assert len(store) == 210
    assert set(store.device[store.split == "train"]) < set(store.device[store.split == "test"])
    assert plan.clips.facts()["notes"]["resampled 44100 Hz"] == 210


def test_logits_cover_every_clip_and_fit_their_teachers(plan):
    store = ClipStore(plan.clips.path)
    systems = [read_logits(artifact.path) for artifact in plan.logits.values()]
    assert Ensemble(systems, store.keys()).read().shape == (2, 210, 10)
    for system, teacher in zip(systems, plan.teachers.values(), strict=True):
        weights = read_manifest(teacher.path)["files"]["model.safetensors"]["sha256"]
        assert system.metadata["checkpoint"] == weights
        assert system.metadata["corpus"] == store.corpus


def test_logits_are_the_network_s_own_whichever_others_shared_the_front_end(plan):
    store = ClipStore(plan.clips.path)
    for name, artifact in plan.logits.items():
        recipe = plan.config.teachers.recipes[name]
        model = load_model(plan.teachers[name].path, recipe, 10)
        expected = predict(model, LogMel(recipe.frontend), store, np.arange(len(store)), torch.device("cpu")).numpy()
        stored = Ensemble([read_logits(artifact.path)], store.keys()).read()[0]
        np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-4)


def test_logits_in_bf16_say_how_far_they_are_off(plan, tmp_path):
    for name, artifact in plan.logits.items():
        recipe, folder = plan.config.teachers.recipes[name], tmp_path / name
        folder.mkdir()
        file = piece_file(folder, "all", 0)
        share = Inference(name, (plan.teachers[name].path,), recipe, file, {"system": name})
        found = infer([share], Source(plan.clips.path, plan.config.partition), np.arange(210), 64, "bf16")
        loose = read_logits(folder)
        exact = Ensemble([read_logits(artifact.path)], loose.ids).read()[0]
        worst = np.abs(loose.take(np.arange(210)) - exact).max()
        assert 0 < found[name]["bf16_difference"] <= worst + 1e-3
        assert worst < 0.1 * np.abs(exact).max()


def test_soft_targets_are_eq_4_of_the_training_clips_alone(plan):
    store = ClipStore(plan.clips.path)
    soft = read_logits(plan.fusion.path / "targets" / "fused")
    assert set(soft.ids) == set(store.ids[store.split == "train"])
    fusion = Fusion.load(plan.fusion.path / "fusion.json")
    logits = Ensemble([read_logits(a.path) for a in plan.logits.values()], soft.ids).read().astype(np.float64)
    expected = np.einsum("s,snk->nk", fusion.weights, logits) + fusion.biases
    np.testing.assert_allclose(soft.take(np.arange(len(soft))), expected, rtol=1e-4, atol=1e-5)
    assert abs(fusion.biases.sum()) < 1e-9


def test_the_fusion_learned_on_places_that_no_teacher_saw(plan):
    data = Source(plan.clips.path, plan.config.partition).open()
    assert plan.fusion.facts()["clips"] == len(data.parts["fusion"])
    places = data.store.place
    assert not set(places[data.parts["fusion"]]) & set(places[data.parts["train"]])


def fuse(storage, *overrides):
    return subprocess.run(
        command("fuse", "--config", TINY, *(w for o in (f"storage={storage}", *overrides) for w in ("--set", o))),
        capture_output=True, text=True, env=joined(), check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("data", "imported", "warned"),
    [("holdout", 0, False), ("crossfit", 0, False), ("train", 0, True), ("train", 2, True), ("holdout", 2, True)],
)
def test_a_fusion_on_clips_that_the_teachers_know_is_warned_of(data, imported, warned):
    warning = fusion_warning(load_config(TINY, [f"fusion.data={data}"]), imported)
    assert (warning or "").startswith("warning: ") == warned
    assert ("fusion.data is train" in (warning or "")) == (data == "train")


def test_the_fusion_cannot_reach_the_test_split(finished, plan, tmp_path):
    """Without the test clips' logits, and with other scenes for them, not one bit of its artifact differs."""
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    for file in storage.glob("logits/*/test-*.arrow"):
        file.unlink()
    relabel_test_clips(storage)
    assert set(ClipStore(storage / plan.clips.path.relative_to(finished.storage)).scene) == set(range(10))
    ours = storage / plan.fusion.path.relative_to(finished.storage)
    shutil.rmtree(ours)
    done = fuse(storage)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fusion over the average" in done.stdout
    assert read_manifest(ours) | {"made": plan.fusion.made()} == plan.fusion.manifest()
    evaluated = subprocess.run(
        command("evaluate", "--config", TINY, "--set", f"storage={storage}"), capture_output=True, text=True,
        env=joined(), check=False,
    )  # fmt: skip
    assert "evaluate is done" in evaluated.stdout


def test_a_changed_byte_of_a_system_s_logits_is_named(finished, plan, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    artifact = next(iter(plan.logits.values()))
    file = storage / artifact.path.relative_to(finished.storage) / "train-000000100.arrow"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    shutil.rmtree(storage / plan.fusion.path.relative_to(finished.storage))
    done = fuse(storage)
    assert done.returncode == 1
    assert f"{file.parent}: train-000000100.arrow: checksum differs" in done.stderr
    assert "run its stage again" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_the_clips_cannot_give_is_refused_before_a_teacher_trains(finished, plan, tmp_path):
    for override, message in (
        (
            "fusion.scene_prior={airport: 0.5, buss: 0.5}",
            "fusion.scene_prior: found {'airport': 0.5, 'buss': 0.5};",
        ),
        ("fusion.data=crossfit", "has every scene in every part"),
    ):
        storage = tmp_path / str(len(message))
        shutil.copytree(finished.storage, storage, ignore=shutil.ignore_patterns("teachers", "mlflow.db"))
        done = subprocess.run(
            command("teachers", "--config", TINY, "--set", f"storage={storage}", "--set", override,
                    "--set", "fusion.folds=9"),
            capture_output=True, text=True, env=joined(), check=False,
        )  # fmt: skip
        assert done.returncode != 0
        assert message in done.stderr
        assert done.stderr.count("every part") <= 1
        assert not list(storage.glob("teachers/*"))


@pytest.mark.campaign
def test_cross_fitting_gives_every_clip_the_logits_of_a_model_that_did_not_see_it(finished, plan, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage, ignore=shutil.ignore_patterns("mlflow.db"))
    overrides = (f"storage={storage}", "fusion.data=crossfit", "fusion.folds=2")
    for stage in ("teachers", "logits", "fuse"):
        done = subprocess.run(
            command(stage, "--config", TINY, *(w for o in overrides for w in ("--set", o))),
            capture_output=True, text=True, env=joined(), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    ours = Plan(load_config(TINY, overrides))
    source = Source(ours.clips.path, ours.config.partition, fusion_data="crossfit", folds=ours.config.fusion.folds)
    store = source.store()
    folds = [replace(source, fold=fold).open().parts for fold in range(2)]
    whole = source.open().parts
    assert ours.fusion.facts()["clips"] == len(whole["fusion"]) == sum(len(fold["fusion"]) for fold in folds)
    # A teacher of fold 0 trained here, on what fold 0 leaves, is the artifact's to the bit.
    name = "cpr_128k_fms_1"
    again = Artifact(tmp_path / "again", "teachers", name, "0", {}, {})
    train_teacher(again, replace(source, fold=0), ours.config.teachers.recipes[name])
    mine, theirs = (load_file(a.path / "model.safetensors") for a in (again, ours.trainings[name][f"{name}-fold0"]))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    for fold in folds:
        assert not set(store.place[fold["train"]]) & set(store.place[fold["fusion"]])
        assert sorted([*fold["train"], *fold["fusion"]]) == sorted(whole["train"])
    assert sorted(ours.teachers) == [f"{name}-fold{fold}" for name in sorted(plan.teachers) for fold in range(2)]
    for name, artifact in ours.logits.items():
        recipe = ours.config.teachers.recipes[name]
        every = np.arange(len(store))
        each = [
            predict(load_model(teacher.path, recipe, 10), LogMel(recipe.frontend), store, every, torch.device("cpu"))
            for teacher in ours.trainings[name].values()
        ]
        expected = np.stack(each).mean(0)
        for fold, logits in zip(folds, each, strict=True):
            expected[fold["fusion"]] = logits[fold["fusion"]]
        stored = Ensemble([read_logits(artifact.path)], store.keys()).read()[0]
        np.testing.assert_allclose(stored, expected, rtol=1e-4, atol=1e-4)
    published = tmp_path / "published" / "cpr_128k_fms_1.safetensors"
    published.parent.mkdir()
    shutil.copy(plan.teachers["cpr_128k_fms_1"].path / "model.safetensors", published)
    config = load_config(TINY, [*overrides, f"teachers.checkpoints={published.parent}"])
    with pytest.raises(ConfigError, match=r"crossfit trains every system 2 times, but cpr_128k_fms_1 come from"):
        Plan(config)


def test_the_sweep_s_best_is_a_student_s_configuration(plan):
    trials = [TrialResult.model_validate(t) for t in plan.sweep.facts()["trials"]]
    assert [(t.number, t.seed) for t in trials] == [(0, 0), (1, 0), (2, 0), (3, 1)]
    assert trials[3].repeats == finalists(plan.config.sweep, trials)[0]
    for trial in trials:
        assert trial.parameters == propose(plan.config.sweep, trial.number, trials)
    best = plan.student_configs()["student"]
    assert best.model == plan.config.student.model
    winner = best_of(plan.config.sweep, trials)
    assert best == trial_config(plan.config.student, plan.config.sweep, winner.parameters)
    assert best.distillation.soft_target == winner.parameters["distillation.soft_target"]
    # The file is a configuration of its own: its student needs nothing but what the search had.
    again = Plan(load_config(plan.sweep.path / "best.yaml"))
    assert again.config.student == best
    assert again.config.sweep is None
    assert again.missing("fuse") == []
    assert [student.complete for student in again.students.values()] == [False]


def test_the_int8_model_is_int8_and_scores_what_the_evaluation_says(plan):
    assert plan.int8["int8"].facts()["bytes"]["int8"] == pytest.approx(
        plan.students["student"].facts()["parameters"], rel=0.1
    )
    for other in ("fake_quantization", "onnxruntime"):
        assert plan.evaluations["int8"].facts()[f"agreement_with_{other}"] >= 0.9  # of 20 clips
        assert plan.evaluations["int8"].facts()[f"difference_to_{other}"] < 0.5
    model = load_int8(plan.int8["int8"].path, plan.config.student, 10)
    assert model(torch.zeros(3, 1, 256, 64)).shape == (3, 10)
    scores = read_scores(plan.evaluation.path).systems
    assert list(scores) == [*plan.teachers, "average", "fusion"]
    students = [read_evaluation(plan.evaluations[name].path) for name in ("student", "int8")]
    store = ClipStore(plan.clips.path)
    test = np.flatnonzero(store.split == "test")
    mel = LogMel(plan.config.student.frontend)
    for found, forms in zip(
        students, (load_model(plan.students["student"].path, plan.config.student, 10), model), strict=True
    ):
        logits = predict(forms, mel, store, test, torch.device("cpu"))
        assert found.accuracy == (logits.argmax(1).numpy() == store.scene[test]).mean()
    for result in [*scores.values(), *students]:
        assert result.clips == 90
        assert set(result.per_device) == {"a", "b", "c", "s1", "s2", "s3", "s4", "s5", "s6"}
        total = sum(d.clips * d.accuracy for d in result.per_device.values())
        assert total == pytest.approx(90 * result.accuracy)


def test_the_ensemble_predicts_what_the_evaluation_scored(finished, plan):
    """Recordings of the test split through the command, and all of its stored clips: to the stored logits' fusion."""
    store = ClipStore(plan.clips.path)
    test = np.flatnonzero(store.split == "test")
    fusion = Fusion.load(plan.fusion.path / "fusion.json")
    logits = fusion.apply(Ensemble([read_logits(a.path) for a in plan.logits.values()], store.ids[test]).read())
    ensemble = StoredEnsemble(finished.storage)
    ours = ensemble.logits(store.pcm(test))
    np.testing.assert_allclose(ours, logits, rtol=1e-4, atol=1e-4)
    right = (ours.argmax(1) == store.scene[test]).mean()
    assert right == pytest.approx(read_scores(plan.evaluation.path).systems["fusion"].accuracy)

    some = range(0, len(test), 30)
    files = [str(plan.demo.path / store.ids[test[i]]) for i in some]
    words = ["predict", "--with", "ensemble", str(finished.storage), *files, "--format", "jsonl"]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0, said.exception
    for line, file, fused in zip(said.stdout.splitlines(), files, logits[some], strict=True):
        entry = json.loads(line)
        assert (entry["filename"], entry["seconds"]) == (file, 1)
        assert list(entry["probabilities"]) == list(plan.clips.facts()["labels"])
        expected = torch.from_numpy(fused).softmax(0).numpy()
        np.testing.assert_allclose(list(entry["probabilities"].values()), expected, atol=1e-4)


def test_an_ensemble_that_is_not_whole_is_refused(finished, plan, tmp_path):
    storage = tmp_path / "storage"
    for stage in ("fusion", "logits", "teachers"):
        shutil.copytree(finished.storage / stage, storage / stage)
    with pytest.raises(UserError, match="no finished fusion, and no storage with one"):
        StoredEnsemble(finished.storage / "clips" / plan.clips.path.name)
    copy = storage / "fusion" / ("fusion-" + "0" * 16)
    shutil.copytree(storage / "fusion" / plan.fusion.path.name, copy)
    with pytest.raises(UserError, match=f"has 2 fusions; give the folder of one:\n  {copy}"):
        StoredEnsemble(storage)
    shutil.rmtree(copy)
    teacher = plan.teachers["cpr_128k_fms_1"]
    shutil.rmtree(storage / "teachers" / teacher.path.name)
    with pytest.raises(UserError, match=f"teachers: nothing with the key {teacher.key}, .* was it deleted"):
        StoredEnsemble(storage / "fusion" / plan.fusion.path.name)


def test_the_student_tells_what_its_normalizations_learned(finished, plan):
    weights = load_file(plan.students["student"].path / "model.safetensors")
    learned = plan.students["student"].facts()["residual_lambda"]
    assert learned == {name: float(weights[f"{name}.lambda_"]) for name in ("features.norm1", "features.norm2")}
    assert f"learned lambda: norm1 {learned['features.norm1']:.3f}, norm2" in finished.output


def test_the_report_is_one_file_that_shows_every_system(plan):
    html = (plan.report.path / "report.html").read_text()
    shown = dict(re.findall(r"<th>([^<]+)</th><td>90</td><td><b>([\d.]+)</b>", html))
    assert shown == screenshots.accuracies(plan.report.path)
    assert shown.keys() == {*plan.teachers, "average", "fusion", "student fp32", "student int8"}
    for stage, artifacts in plan.by_stage().items():
        if stage != "report" and artifacts:
            assert re.search(
                rf"<tr><th>{stage}</th><td>{len(artifacts)}</td><td>[\d :-]+ UTC</td><td>[\w ]+</td>", html
            )
    for made in ("program", "machine"):
        assert plan.fusion.made()[made] in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert html.count("<svg") >= 6


def test_a_browser_shows_the_report_on_a_desk_and_on_a_phone(plan):
    try:
        screenshots.main(plan.report.path, None)
    except screenshots.NoBrowser as reason:
        pytest.skip(str(reason))


def test_mlflow_has_one_parent_and_a_finished_child_for_everything_trained(finished, plan):
    client = MlflowClient(f"sqlite:///{finished.storage}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("asc-ray").experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_name for run in parents] == ["tiny"]
    children = {run.info.run_name: run for run in runs if run not in parents}
    trained = {*plan.teachers, "student", "int8"}
    assert set(children) == {*trained, "average", "fusion", "trial-000", "trial-001", "trial-002", "trial-003"}
    for name in trained:
        history = client.get_metric_history(children[name].info.run_id, "validation/accuracy")
        assert [metric.step for metric in history] == list(range(1, 3 if name == "int8" else 4))
    assert {f.path for f in client.list_artifacts(parents[0].info.run_id)} >= {"report.html", "best.yaml"}
    # Every scored thing has its figures under the same names, and they are those of its evaluation.
    scored = dict(read_scores(plan.evaluation.path).systems)
    scored |= {name: read_evaluation(artifact.path) for name, artifact in plan.evaluations.items()}
    for name, scores in scored.items():
        metrics = children[name].data.metrics
        assert metrics["test/accuracy"] == pytest.approx(scores.accuracy)
        assert metrics["test/unseen"] == pytest.approx(scores.groups["unseen"])
        assert metrics["test/device/s4"] == pytest.approx(scores.per_device["s4"].accuracy)
        assert {key for key in metrics if key.startswith("test/scene/")} == {
            f"test/scene/{label}" for label in scores.per_scene
        }
    assert parents[0].data.metrics == {
        key: pytest.approx(value) for key, value in children["int8"].data.metrics.items() if key.startswith("test/")
    }
    # A run says what was trained: after a search, its best configuration.
    best = plan.student_configs()["student"].distillation.temperature
    assert best != plan.config.student.distillation.temperature
    assert plan.students["student"].facts()["recipe"]["distillation"]["temperature"] == best
    for name in ("student", "int8"):
        assert float(children[name].data.params["distillation.temperature"]) == best
    kinds = {name: child.data.tags["asc_ray.kind"] for name, child in children.items()}
    assert kinds == {
        **dict.fromkeys(plan.teachers, "teacher"),
        **{name: "trial" for name in children if name.startswith("trial-")},
        **{name: name for name in ("average", "fusion", "student", "int8")},
    }
    assert parents[0].data.params["preset"] == "demo"
    assert len(parents[0].data.params) < 60
    assert {run.inputs.dataset_inputs[0].dataset.digest for run in children.values()} == {plan.clips.key}


def test_a_second_run_does_nothing_and_says_so(finished, plan):
    def times():
        # Copies of the storage, which other tests work on meanwhile, log their files where the copied database says.
        files = (path for path in finished.storage.rglob("*") if path.is_file() and "mlartifacts" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    done = subprocess.run(
        command("pipeline", *finished.arguments), capture_output=True, text=True, env=environment(), check=True
    )
    assert "Nothing to do" in done.stdout
    assert times() == before


def test_status_names_every_artifact(finished, plan):
    done = subprocess.run(
        command("status", *finished.arguments), capture_output=True, text=True, env=environment(), check=True
    )
    for artifact in artifacts(plan):
        assert f"{artifact.path}" in done.stdout
    assert "missing" not in done.stdout


def test_more_resources_than_the_cluster_has_are_refused_before_any_work(tmp_path):
    arguments = ("--config", TINY, "--set", f"storage={tmp_path}/s", "--set", "teachers.resources.gpus=64")
    done = subprocess.run(command("pipeline", *arguments), capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 2
    assert "teachers.resources: asks for 1 CPUs and 64 GPUs" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "s").glob("clips/*"))
