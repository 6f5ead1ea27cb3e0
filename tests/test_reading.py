"""A corpus' reading that is kept in the storage: the same as a new one, and never that of another corpus."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import TINY

from asc_ray.artifacts import read_record, write_record
from asc_ray.config.composition import load_config
from asc_ray.data import reading
from asc_ray.data.config import CorpusConfig
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.reading import READINGS, TICK, Reading, keep, kept_reading, new_reading
from asc_ray.errors import CorpusError
from asc_ray.plan import Plan

CLIPS = [("a", "train"), ("b", "train"), ("c", "test"), ("d", "test")]


def make_corpus(root: Path, clips=CLIPS, folder: str = "audio") -> Path:
    (root / folder).mkdir(parents=True)
    (root / "evaluation_setup").mkdir()
    meta = "filename\tscene_label\tidentifier\tsource_label\n"
    splits = {"train": "filename\tscene_label\n", "test": "filename\tscene_label\n"}
    for name, split in clips:
        (root / folder / f"{name}.wav").write_bytes(b"not decoded here")
        meta += f"{folder}/{name}.wav\tpark\trome-{name}\ts1\n"
        splits[split] += f"{folder}/{name}.wav\tpark\n"
    (root / "meta.csv").write_text(meta)
    (root / "evaluation_setup/fold1_train.csv").write_text(splits["train"])
    (root / "evaluation_setup/fold1_test.csv").write_text(splits["test"])
    return root


def edit(path: Path, before: str, after: str) -> None:
    """Overwrite in place."""
    text = path.read_text()
    assert before in text
    with path.open("r+") as file:
        file.write(text.replace(before, after))


def edit_with_the_old_time(path: Path, before: str, after: str) -> None:
    times = path.stat()
    edit(path, before, after)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def replace(path: Path, before: str, after: str) -> None:
    """Put another file of the same size and times in the place of this one."""
    other = path.with_name("other")
    other.write_text(path.read_text().replace(before, after))
    shutil.copystat(path, other)
    other.replace(path)


def swap(root: Path) -> None:
    """Put another corpus, whose folders and files have the same names, sizes and times, in the place of this one."""
    other = root.with_name(f"{root.name}-other")
    shutil.copytree(root, other)
    edit_with_the_old_time(other / "meta.csv", "rome-b", "rome-x")
    root.rename(root.with_name(f"{root.name}-old"))
    other.rename(root)


CHANGES = {
    "metadata edited in place": lambda root: edit(root / "meta.csv", "rome-b", "rome-x"),
    "metadata edited, with the old time": lambda root: edit_with_the_old_time(root / "meta.csv", "rome-b", "rome-x"),
    "metadata replaced": lambda root: replace(root / "meta.csv", "rome-b", "rome-x"),
    "metadata longer": lambda root: (root / "meta.csv").write_text((root / "meta.csv").read_text() + "\n"),
    "metadata gone": lambda root: (root / "meta.csv").unlink(),
    "a training clip less": lambda root: edit(
        root / "evaluation_setup/fold1_train.csv", "audio/b.wav\tpark\n", "\n" * len("audio/b.wav\tpark\n")
    ),
    "test clips replaced": lambda root: replace(root / "evaluation_setup/fold1_test.csv", "d.wav", "c.wav"),
    "an evaluate list that comes first": lambda root: shutil.copy(
        root / "evaluation_setup/fold1_train.csv", root / "evaluation_setup/fold1_evaluate.csv"
    ),
    "a clip gone": lambda root: (root / "audio/b.wav").unlink(),
    "a clip replaced": lambda root: replace(root / "audio/b.wav", "not", "but"),
    "clips overwritten": lambda root: edit_with_the_old_time(root / "audio/b.wav", "not", "but"),
    "a clip renamed": lambda root: (root / "audio/b.wav").rename(root / "audio/x.wav"),
    "another audio folder": lambda root: [
        (root / "audio").rename(root / "old"),
        shutil.copytree(root / "old", root / "audio"),
    ],
    "another corpus in its place": swap,
    "gone": shutil.rmtree,
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """A folder with a corpus for each change, and a storage with the reading of each."""
    folder = tmp_path_factory.mktemp("kept")
    for name in [*CHANGES, "unchanged"]:
        make_corpus(folder / name)
    time.sleep(TICK + 0.1)
    (folder / "storage").mkdir()
    for name in [*CHANGES, "unchanged"]:
        config = CorpusConfig(path=folder / name)
        keep(folder / "storage", config, new_reading(config))
    return folder


def found(folder: Path, name: str) -> Reading | None:
    return kept_reading(folder / "storage", CorpusConfig(path=folder / name))


def test_a_kept_reading_is_the_new_one_without_its_clips(kept):
    new, old = new_reading(CorpusConfig(path=kept / "unchanged")), found(kept, "unchanged")
    assert new.corpus is not None
    assert old.corpus is None
    for field in ("fingerprint", "labels", "devices", "groups", "heard", "followed", "first", "stamps"):
        assert getattr(old, field) == getattr(new, field)
    assert (new.groups, new.heard) == (((0, 0, 1), (0, 1, 1)), (1, 1))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_corpus_has_no_kept_reading(kept, change):
    assert found(kept, change) is not None
    CHANGES[change](kept / change)
    assert found(kept, change) is None


def test_another_path_list_rule_or_version_has_another_reading(kept, tmp_path, monkeypatch):
    config = CorpusConfig(path=kept / "unchanged")
    others = [
        CorpusConfig(path=kept),
        CorpusConfig(path=config.path, train_split=Path("fold1_train.csv")),
        CorpusConfig(path=config.path, on_bad_clip="skip"),
    ]
    assert all(kept_reading(kept / "storage", other) is None for other in others)
    assert kept_reading(tmp_path, config) is None
    for name, other in (("READER", reading.READER + 1), ("version", lambda name: "99.0")):
        with monkeypatch.context() as patch:
            patch.setattr(reading, name, other)
            assert kept_reading(kept / "storage", config) is None
    assert kept_reading(kept / "storage", config) is not None


def test_a_relative_path_is_that_of_its_working_directory(kept, tmp_path, monkeypatch):
    shutil.copytree(kept / "unchanged", tmp_path / "unchanged")
    config = CorpusConfig(path=Path("unchanged"))
    monkeypatch.chdir(kept)
    assert kept_reading(kept / "storage", config) is not None
    monkeypatch.chdir(tmp_path)
    assert kept_reading(kept / "storage", config) is None


def test_a_training_list_that_comes_to_lie_before_the_other_counts(tmp_path, monkeypatch):
    root = make_corpus(tmp_path / "corpus")
    (root / "evaluation_setup/mine.csv").write_text("filename\tscene_label\naudio/a.wav\tpark\n")
    (tmp_path / "storage").mkdir()
    time.sleep(TICK + 0.1)
    monkeypatch.chdir(tmp_path)
    config = CorpusConfig(path=root, train_split=Path("mine.csv"))
    keep(tmp_path / "storage", config, new_reading(config))
    assert kept_reading(tmp_path / "storage", config) is not None
    (tmp_path / "mine.csv").write_text("filename\tscene_label\naudio/b.wav\tpark\n")
    assert kept_reading(tmp_path / "storage", config) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-9]),
        lambda file: file.write_text(file.read_text().replace("park", "bark")),
        lambda file: write_record(file, {"tables": []}),
        lambda file: write_record(file, read_record(file) | {"groups": 3}),
        lambda file: write_record(file, read_record(file) | {"groups": [[0], [0, 1], [1]]}),
        lambda file: write_record(file, read_record(file) | {"audio": 3}),
        lambda file: file.write_text(json.dumps([1])),
    ],
)
def test_a_damaged_reading_is_none(kept, damage):
    for file in (kept / "storage" / READINGS).glob("*.json"):
        before = file.read_bytes()
        damage(file)
    assert found(kept, "unchanged") is None
    file.write_bytes(before)


def test_a_corpus_that_has_just_changed_is_read_again_the_next_time(tmp_path):
    """A second change within a tick of the disk's clock could leave the stamps as they are."""
    config = CorpusConfig(path=make_corpus(tmp_path / "corpus"))
    (tmp_path / "storage").mkdir()
    assert not new_reading(config).stamps
    keep(tmp_path / "storage", config, new_reading(config))
    assert kept_reading(tmp_path / "storage", config) is None


def test_linked_and_bad_clips_may_change_unseen(tmp_path):
    make_corpus(tmp_path / "linked")
    (tmp_path / "linked/audio/a.wav").rename(tmp_path / "linked/elsewhere.wav")
    (tmp_path / "linked/audio/a.wav").symlink_to("../elsewhere.wav")
    make_corpus(tmp_path / "bad", [*CLIPS, ("e", "train")])
    (tmp_path / "bad/audio/e.wav").write_bytes(b"")
    time.sleep(TICK + 0.1)
    for name in ("linked", "bad"):
        assert not new_reading(CorpusConfig(path=tmp_path / name, on_bad_clip="skip")).stamps


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo_corpus(root, load_config(TINY, ["storage=/tmp/unused"]).corpus.demo)
    time.sleep(TICK + 0.1)
    return root


def planned(storage: Path, corpus: Path, **options) -> Plan:
    return Plan(load_config(TINY, [f"storage={storage}", f"corpus.path={corpus}"]), **options)


def complete_clips(plan: Plan, skipped: tuple[str, ...] = ()) -> None:
    plan.clips.open_partial()
    plan.clips.finish({"skipped": skipped})


def keys(plan: Plan) -> dict[str, str]:
    return {artifact.name: artifact.key for some in plan.by_stage().values() for artifact in some}


def test_a_plan_goes_by_a_kept_reading_only_where_all_clips_are_ingested(demo, tmp_path):
    first = planned(tmp_path, demo)
    first.keep_reading()
    assert planned(tmp_path, demo).source.corpus is not None  # nothing is ingested
    complete_clips(first, skipped=("one",))
    first.keep_reading()
    assert planned(tmp_path, demo).source.corpus is not None  # a clip was left out, and may be mended
    shutil.rmtree(first.clips.path)
    complete_clips(first)
    first.keep_reading()
    second = planned(tmp_path, demo)
    assert second.source.corpus is None
    assert keys(second) == keys(first)
    assert keys(planned(tmp_path, demo, anew=True)) == keys(first)
    shutil.rmtree(first.clips.path)
    assert planned(tmp_path, demo).source.corpus is not None


def test_a_clip_that_was_overwritten_is_noticed_by_a_new_reading_which_ends_the_old_one(demo, tmp_path):
    root = tmp_path / "corpus"
    shutil.copytree(demo, root)
    storage = tmp_path / "storage"
    storage.mkdir()
    time.sleep(TICK + 0.1)
    first = planned(storage, root)
    complete_clips(first)
    first.keep_reading()
    clip = root / first.source.corpus.clips[1].clip_id
    with clip.open("ab") as file:
        file.write(b"..")
    assert keys(planned(storage, root)) == keys(first)  # as the page `architecture` says
    new = planned(storage, root, anew=True)
    assert new.clips.key != first.clips.key
    new.keep_reading()  # as a run does before it works, so that no later command goes by the old reading
    assert planned(storage, root).clips.key == new.clips.key
    complete_clips(new)
    clip.unlink()
    with pytest.raises(CorpusError, match="no such file"):
        planned(storage, root)
