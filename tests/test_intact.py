"""Nothing is believed because it is there: finished files, and what a killed run left."""

import json
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, command, joined

from asc_ray import artifacts, files
from asc_ray.artifacts import Artifact, file_sha256, read_record, stored_file, stored_files, write_record
from asc_ray.config.composition import load_config
from asc_ray.data.clips import ClipStore
from asc_ray.data.pieces import finished_pieces, missing_pieces, note_piece, piece_file
from asc_ray.ensemble.fuse import fuse_systems
from asc_ray.errors import UserError
from asc_ray.evaluation.artifact import read_answers, read_evaluation, read_scores
from asc_ray.plan import Plan, failure
from asc_ray.search.course import ended_trials
from asc_ray.search.trials import TrialResult
from asc_ray.stages.evaluate import evaluate_ensemble, evaluate_student
from asc_ray.stages.work import source_of
from asc_ray.status import state_of
from asc_ray.students.targets import read_soft_targets
from asc_ray.training.checkpoints import load_checkpoint, save_checkpoint
from asc_ray.training.weights import load_model

# --- finished files ---------------------------------------------------------------------------------------------------


def flip(file: Path, place: float = 0.5) -> None:
    """One bit of a file."""
    content = bytearray(file.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)


def elsewhere(plan: Plan, stage: str) -> Artifact:
    artifact = Artifact(plan.config.storage / "other", stage, "new", "0123456789abcdef", {}, {})
    shutil.rmtree(artifact.path, ignore_errors=True)
    shutil.rmtree(artifact.partial, ignore_errors=True)
    return artifact


def logits_of(plan: Plan) -> dict[str, Path]:
    return {name: artifact.path for name, artifact in plan.logits.items()}


def evaluate_all(plan: Plan) -> None:
    evaluate_ensemble(elsewhere(plan, "evaluation"), source_of(plan), logits_of(plan), plan.fusion.path)


def evaluate_models(plan: Plan) -> None:
    config = next(iter(plan.student_configs().values()))
    for model in (*plan.int8.values(), *plan.students.values()):
        evaluate_student(elsewhere(plan, f"evaluation-{model.stage}"), source_of(plan), model.path, config)


def load_teachers(plan: Plan) -> None:
    for name, teacher in plan.teachers.items():
        load_model(teacher.path, plan.config.teachers.recipes[name], 10)


def ids_of_test(plan):
    store = source_of(plan).store()
    return store.ids[store.split == "test"]


# What reads each file of a finished run, below the storage.
READERS = {
    "clips/*.arrow": lambda plan: source_of(plan).store().pcm(np.arange(1)),
    "clips/*": lambda plan: source_of(plan).open(),
    "teachers/*": load_teachers,
    "logits/*/train-*": lambda plan: fuse_systems(
        elsewhere(plan, "fusion"), source_of(plan), logits_of(plan), plan.config.fusion
    ),
    "logits/*/test-*": evaluate_all,
    "fusion/*/fusion.json": evaluate_all,
    "fusion/*/evaluation.json": lambda plan: read_scores(plan.fusion.path),
    "fusion/*/targets/fused/*": lambda plan: read_soft_targets(source_of(plan).open(), plan.target_files("fused")),
    "fusion/*/targets/average/*": lambda plan: read_soft_targets(source_of(plan).open(), plan.target_files("average")),
    "sweep/*/best.yaml": lambda plan: plan.student_configs(),
    "students/*": evaluate_models,
    "int8/*": evaluate_models,
    "evaluation/ensemble-*": lambda plan: read_scores(plan.evaluation.path),
    "evaluation/*/test-*": lambda plan: read_answers(
        [artifact.path for artifact in plan.evaluations.values()], ids_of_test(plan)
    ),
    "evaluation/*": lambda plan: [read_evaluation(artifact.path) for artifact in plan.evaluations.values()],
}
# What people read and no stage does; the corpus has a test of its own.
FOR_PEOPLE = ("sweep/*/trials.csv", "sweep/*/trials/*", "report/*", "corpus/*")


@pytest.fixture(scope="module")
def storage(finished, tmp_path_factory) -> Path:
    copy = tmp_path_factory.mktemp("copy") / "storage"
    shutil.copytree(finished.storage, copy)
    return copy


def test_one_flipped_bit_of_any_file_that_a_stage_reads_is_named(storage):
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    found = 0
    for stage in plan.by_stage().values():
        for artifact in stage:
            for name in artifact.manifest()["files"]:
                file = artifact.path / name
                path = str(file.relative_to(storage))
                if any(fnmatch(path, pattern) for pattern in FOR_PEOPLE):
                    continue
                reader = next((own for pattern, own in READERS.items() if fnmatch(path, pattern)), None)
                assert reader, f"{path}: name in READERS what reads it"
                whole = file.read_bytes()
                flip(file)
                with pytest.raises(UserError) as refused:
                    reader(plan)
                assert f"{name}: checksum differs" in str(refused.value), (path, refused.value)
                assert str(artifact.path) in str(refused.value)
                file.write_bytes(whole)
                found += 1
    assert found > 20


def test_every_reader_works_on_whole_files(storage):
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    for reader in dict.fromkeys(READERS.values()):
        reader(plan)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_one_flipped_bit_of_a_manifest_is_named(storage, place):
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    manifest = plan.fusion.path / "manifest.json"
    whole = manifest.read_bytes()
    flip(manifest, place)
    with pytest.raises(UserError, match=r"manifest\.json: is not as it was written; delete the folder"):
        plan.missing("fuse")
    manifest.write_bytes(whole)
    assert not plan.missing("fuse")


def test_an_artifact_under_another_s_name_is_named(storage):
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    one, other = plan.teachers.values()
    moved = one.path.with_name("moved")
    one.path.rename(moved)
    shutil.copytree(other.path, one.path)
    with pytest.raises(UserError, match=rf"is that of teachers/{other.name}-{other.key}; delete the folder"):
        plan.missing("teachers")
    shutil.rmtree(one.path)
    moved.rename(one.path)


def test_a_changed_recording_of_the_demo_corpus_is_named(finished, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    recording = sorted(plan.demo.path.glob("audio/*.wav"))[3]
    flip(recording)
    shutil.rmtree(plan.clips.path)
    words = command("ingest", "--config", TINY, "--set", f"storage={storage}")
    done = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 1
    assert f"audio/{recording.name}: checksum differs" in done.stderr
    assert "Traceback" not in done.stderr


def artifact(tmp_path: Path, **files: bytes) -> Artifact:
    made = Artifact(tmp_path, "stage", "name", "0123456789abcdef", {}, {})
    for name, content in files.items():
        (made.open_partial() / name).write_bytes(content)
    made.finish({})
    return made


def test_a_large_file_is_read_once_a_node_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = artifact(tmp_path, large=bytes(artifacts.SMALL_BYTES + 1), small=b"1").path
    read = []
    monkeypatch.setattr(artifacts, "file_sha256", lambda file: (read.append(file.name), file_sha256(file))[1])
    for _ in range(3):
        assert stored_files(folder) == [folder / "large", folder / "small"]
    assert read.count("large") == 1
    assert read.count("small") == 3
    flip(folder / "large")  # another time of change, and then another file of the same time
    with pytest.raises(UserError, match="large: checksum differs"):
        stored_file(folder, "large")
    flip(folder / "large")
    stored_file(folder, "large")
    (folder / "large").write_bytes((folder / "large").read_bytes()[:-1])
    with pytest.raises(UserError, match="large: checksum differs"):
        stored_file(folder, "large")


def test_what_a_node_remembers_is_parsed_once_and_not_for_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = artifact(tmp_path, **{f"large-{number}": bytes(artifacts.SMALL_BYTES + 1) for number in range(4)}).path
    stored_files(folder)
    read, read_record = [], artifacts.read_record
    monkeypatch.setattr(artifacts, "read_record", lambda path: read.append(path) or read_record(path))
    for number in range(4):
        stored_file(folder, f"large-{number}")
    assert len(read) == 1
    flip(folder / "large-2")
    with pytest.raises(UserError, match="large-2: checksum differs"):
        stored_file(folder, "large-2")


def test_a_memory_that_is_damaged_or_others_can_write_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = artifact(tmp_path, large=bytes(artifacts.SMALL_BYTES + 1)).path
    stored_file(folder, "large")
    memory = next(tmp_path.glob("asc-ray-*"))
    note = next(memory.glob("*.json"))
    status = (folder / "large").stat()
    flip(folder / "large")
    changed = (folder / "large").stat()
    text = note.read_text().replace(str(status.st_mtime_ns), str(changed.st_mtime_ns))
    note.write_text(text)  # somebody says that it was compared as it is now
    with pytest.raises(UserError, match="large: checksum differs"):
        stored_file(folder, "large")
    record = json.loads(text)
    del record["checksum"]
    write_record(note, record)
    memory.chmod(0o777)
    with pytest.raises(UserError, match="large: checksum differs"):
        stored_file(folder, "large")


def test_a_file_that_the_manifest_does_not_know_is_not_handed_out(tmp_path):
    folder = artifact(tmp_path, known=b"1").path
    (folder / "added").write_bytes(b"1")
    assert stored_files(folder) == [folder / "known"]
    with pytest.raises(UserError, match="added: missing"):
        stored_file(folder, "added")


# --- what a killed run left -------------------------------------------------------------------------------------------

ODD = {
    "empty": b"",
    "cut": None,
    "flipped": None,
    "an empty object": b"{}",
    "a list": b"[]",
    "null": b"null",
    "a number": b"7",
    "no checksum": None,
    "another checksum": None,
    "binary": bytes(range(256)),
    "nested": b"[" * 100_000,
}


def spoil(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:-3])
    elif how == "flipped":
        flip(file, 0.4)
    elif how in ("no checksum", "another checksum"):
        document = json.loads(content)
        document["checksum"] = "0" * 64
        if how == "no checksum":
            del document["checksum"]
        file.write_text(json.dumps(document))
    else:
        file.write_bytes(ODD[how] or b"")


@pytest.mark.parametrize("how", ODD)
def test_a_record_that_is_not_whole_is_none(tmp_path, how):
    file = tmp_path / "record.json"
    content = {"a": 1, "b": [0.1, None, "é"], "c": {"d": True}, 10: "ten", 9: (1, 2)}
    write_record(file, content)
    assert read_record(file) == json.loads(json.dumps(content))
    spoil(file, how)
    assert read_record(file) is None


@pytest.fixture
def network() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("how", [*ODD, "no table of checksums"])
def test_a_checkpoint_whose_metadata_is_odd_is_passed_over(tmp_path, network, how):
    history = [{"validation_macro_accuracy": 0.5}]
    save_checkpoint(tmp_path, *network, history)
    save_checkpoint(tmp_path, *network, history * 2)
    assert load_checkpoint(tmp_path).epoch == 2
    meta = tmp_path / "epoch-00002" / "meta.json"
    if how == "no table of checksums":
        record = read_record(meta)
        write_record(meta, record | {"sha256": {}})
    else:
        spoil(meta, how)
    assert load_checkpoint(tmp_path).epoch == 1


@pytest.mark.parametrize("how", ODD)
def test_a_trial_a_progress_and_a_failure_that_are_odd_are_told_from_whole_ones(tmp_path, how):
    sweep = Artifact(tmp_path, "sweep", "sweep", "0123456789abcdef", {}, {})
    trials = sweep.open_partial() / "trials"
    trials.mkdir()
    for number in range(3):
        result = TrialResult(number=number, parameters={"augment.freq_mask": 3}, curve=(0.5,), state="complete")
        write_record(trials / f"{number:04d}.json", result.model_dump(mode="json"))
    assert [result.number for result in ended_trials(sweep)] == [0, 1, 2]
    shutil.copy(trials / "0000.json", trials / "0002.json")  # one that stands for another
    assert [result.number for result in ended_trials(sweep)] == [0, 1]
    spoil(trials / "0001.json", how)
    assert [result.number for result in ended_trials(sweep)] == [0]

    teacher = Artifact(tmp_path, "teachers", "one", "0123456789abcdef", {}, {})
    folder = teacher.open_partial()
    keys = ("epoch", "epochs", "loss", "validation_accuracy", "clips_per_second", "minutes_left")
    write_record(folder / "progress.json", dict.fromkeys(keys, 1))
    assert "epoch 1/1" in state_of(teacher, "teachers").text()
    spoil(folder / "progress.json", how)
    assert state_of(teacher, "teachers").text() == "interrupted"
    write_record(folder / "failed.json", {"error": "no luck"})
    assert failure(teacher) == "no luck"
    spoil(folder / "failed.json", how)
    assert failure(teacher) is None


IDS = [f"audio/{number}.wav" for number in range(10)]


def make_parts(folder: Path, spans: list[tuple[int, int]], ids=IDS) -> None:
    for first, end in spans:
        file = piece_file(folder, "shard", first)
        file.write_text(" ".join(ids[first:end]))
        note_piece(file, ids[first:end], {"bad": []})


def spans(records) -> list[tuple[int, int]]:
    return [(record["first"], record["first"] + record["clips"]) for record in records]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 10, 100])
def test_parts_of_any_size_are_completed_by_parts_of_any_other(tmp_path, size):
    make_parts(tmp_path, [(0, 3), (3, 6), (8, 10)])
    done = finished_pieces(tmp_path, "shard", IDS)
    assert spans(done) == [(0, 3), (3, 6), (8, 10)]
    left = missing_pieces(10, done, size)
    assert [clip for part in left for clip in range(part.start, part.stop)] == [6, 7]
    make_parts(tmp_path, [(part.start, part.stop) for part in left])
    text = " ".join(file.read_text() for file in sorted(tmp_path.glob("*.arrow")))
    assert text.split() == IDS
    assert missing_pieces(10, finished_pieces(tmp_path, "shard", IDS), size) == []


@pytest.mark.parametrize("how", [*ODD, "a changed part", "a missing part", "no record", "other clips", "another place"])
def test_a_part_that_cannot_be_trusted_is_made_again(tmp_path, how):
    make_parts(tmp_path, [(0, 3), (3, 6), (6, 10)])
    file = piece_file(tmp_path, "shard", 3)
    record = file.with_suffix(".json")
    if how == "a changed part":
        flip(file)
    elif how == "a missing part":
        file.unlink()
    elif how == "no record":
        record.unlink()
    elif how == "other clips":
        make_parts(tmp_path, [(3, 6)], [clip.replace("4", "x") for clip in IDS])
    elif how == "another place":
        file.rename(piece_file(tmp_path, "shard", 4))
        record.rename(piece_file(tmp_path, "shard", 4).with_suffix(".json"))
    else:
        spoil(record, how)
    done = finished_pieces(tmp_path, "shard", IDS)
    assert spans(done) == [(0, 3), (6, 10)]
    assert missing_pieces(10, done, 100) == [slice(3, 6)]
    assert len(list(tmp_path.iterdir())) == 4


def test_overlapping_parts_do_not_hold_a_clip_twice(tmp_path):
    make_parts(tmp_path, [(0, 4), (3, 6), (5, 10)])
    done = finished_pieces(tmp_path, "shard", IDS)
    assert spans(done) == [(0, 4), (5, 10)]
    assert missing_pieces(10, done, 100) == [slice(4, 5)]


# --- killed and taken up with another size of parts -------------------------------------------------------------------


def test_an_ingest_taken_up_with_another_shard_size_holds_every_clip(finished, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    whole = ClipStore(plan.clips.path)
    expected = list(whole.ids), whole.pcm(np.arange(len(whole))).sum(dtype=np.int64)
    ids = expected[0]
    # As a run left it that was killed after the second shard of 100.
    partial = plan.clips.partial
    plan.clips.path.rename(partial)
    (partial / "manifest.json").unlink()
    (partial / "impulse_responses.safetensors").unlink()
    for first in (0, 100, 200):
        file = piece_file(partial, "shard", first)
        if first == 200:
            file.unlink(missing_ok=True)
        else:
            index = file_sha256(file.with_suffix(".index"))
            note_piece(file, ids[first : first + 100], {"notes": {}, "bad": [], "index": index})
    kept = {path: path.stat().st_mtime_ns for path in partial.glob("*.arrow")}
    words = command("ingest", "--config", TINY, "--set", f"storage={storage}", "--set", "corpus.shard_clips=37")
    done = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    again = ClipStore(plan.clips.path)
    assert (list(again.ids), again.pcm(np.arange(len(again))).sum(dtype=np.int64)) == expected
    assert plan.clips.facts()["clips"] == len(expected[0])
    assert all((plan.clips.path / path.name).stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_logits_taken_up_with_another_shard_size_hold_every_clip(finished, tmp_path):
    storage = tmp_path / "storage"
    shutil.copytree(finished.storage, storage)
    plan = Plan(load_config(TINY, [f"storage={storage}"]))
    name, logits = next(iter(plan.logits.items()))
    store = ClipStore(plan.clips.path)
    expected = {file.name: file.read_bytes() for file in logits.path.glob("*.arrow")}
    logits.path.rename(logits.partial)
    (logits.partial / "manifest.json").unlink()
    train = store.ids[store.split == "train"]
    for file in sorted(logits.partial.glob("*.arrow")):
        if file.name == "train-000000000.arrow":
            note_piece(file, train[:100], {})
        else:
            file.unlink()
    words = command("logits", "--config", TINY, "--set", f"storage={storage}", "--set", "corpus.shard_clips=9")
    done = subprocess.run(words, capture_output=True, text=True, env=joined(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    from asc_ray.data.logits import read_logits

    for split in ("train", "test"):
        assert read_logits(logits.path, split).ids.tolist() == store.ids[store.split == split].tolist()
    assert (logits.path / "train-000000000.arrow").read_bytes() == expected["train-000000000.arrow"]
    assert name in plan.logits
