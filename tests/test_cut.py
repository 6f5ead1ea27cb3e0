"""Recordings that are cut into seconds: the same clips as files of a second each, parts and scores by recording."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import clip_store, noise
from hypothesis import given
from hypothesis import strategies as st

from asc_ray.data.clip import Clip, second_id
from asc_ray.data.clips import ClipStore, open_clips
from asc_ray.data.config import CorpusConfig, PartitionConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.reading import new_reading
from asc_ray.data.recordings import cut_following
from asc_ray.data.shards import write_store
from asc_ray.errors import CorpusError
from asc_ray.evaluation.artifact import headline, score
from asc_ray.evaluation.scores import evaluate, of_recordings
from asc_ray.evaluation.seeds import over_seeds
from asc_ray.training.dataset import Source

CUT = CorpusConfig(layout="folders", segment_seconds=1.0, test_share=0.5)


def make(root: Path, name: str, seconds: float, rate: int = 32_000, channels: int = 1, **how) -> np.ndarray:
    wave = noise(channels, round(seconds * rate), seed=len(name) + sum(map(ord, name))).T
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    sf.write(root / name, wave, rate, **how)
    return wave


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "corpus"
    for scene in ("bus", "park"):
        for number in range(8):
            make(root, f"{scene}/{number}.wav", 2 + number % 2)
    return root


def clips(root: Path, config: CorpusConfig = CUT) -> list[str]:
    return sorted(clip.clip_id for clip in read_corpus(root, config).clips)


@given(st.lists(st.tuples(st.text("ab.-0/", min_size=1, max_size=6), st.integers(0, 12)), min_size=2, unique=True))
def test_no_two_seconds_have_one_id(seconds):
    # A path ends in no slash, and has no part that is a dot.
    seconds = [own for own in seconds if all(part.strip(".") for part in own[0].split("/"))]
    assert len({second_id(*own) for own in seconds}) == len(seconds)


def test_ids_are_the_recording_s_with_the_second(root):
    assert clips(root)[:5] == ["bus/0-0.wav", "bus/0-1.wav", "bus/1-0.wav", "bus/1-1.wav", "bus/1-2.wav"]
    assert second_id("audio/a.b/c", 3) == "audio/a.b/c-3"


@pytest.mark.parametrize(
    ("rate", "channels", "subtype"), [(48_000, 2, "PCM_24"), (44_100, 1, "PCM_16"), (8_000, 1, "FLOAT")]
)
@pytest.mark.parametrize("ending", ["wav", "flac"])
def test_a_second_is_the_file_of_that_second(tmp_path, rate, channels, subtype, ending):
    """Bit for bit, on every path of the decoder, also where a shard ends within a recording."""
    if ending == "flac" and subtype == "FLOAT":
        subtype = "PCM_16"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for scene in ("bus", "park"):
        for number in range(2):
            name = f"{scene}/{number}.{ending}"
            wave = make(whole, name, 3.4, rate, channels, subtype=subtype)
            for second in range(3):
                file = parts / second_id(name, second)
                file.parent.mkdir(parents=True, exist_ok=True)
                sf.write(file, wave[second * rate : (second + 1) * rate], rate, subtype=subtype)
    corpus = read_corpus(whole, CUT)
    assert write_store(corpus, tmp_path / "one", 4) == []
    files = tuple(replace(clip, recording="", second=0) for clip in corpus.clips)
    assert write_store(replace(corpus, root=parts, clips=files), tmp_path / "other", 4) == []
    one, other = ClipStore(tmp_path / "one"), ClipStore(tmp_path / "other")
    assert one.ids[:].tolist() == other.ids[:].tolist() == [clip.clip_id for clip in corpus.clips]
    assert np.array_equal(one.pcm(np.arange(12)), other.pcm(np.arange(12)))
    assert one.recording is not None
    assert one.second is not None
    assert [second_id(*own) for own in zip(one.recording[:], one.second, strict=True)] == one.ids[:].tolist()
    assert (other.recording, other.second) == (None, None)


def test_what_is_left_over_is_told_and_short_recordings_are_bad(root):
    make(root, "bus/1.wav", 1.7)
    make(root, "bus/2.wav", 0.95)
    make(root, "bus/3.wav", 1.0)
    corpus = read_corpus(root, CUT)
    assert [c for c in clips(root) if c < "bus/4"] == [
        "bus/0-0.wav", "bus/0-1.wav", "bus/1-0.wav", "bus/2-0.wav", "bus/3-0.wav"
    ]  # fmt: skip
    assert "16 recordings were cut into 35 seconds; at the end of 1 of them less than a second is left over, 0.7 s" in (
        " ".join(corpus.notes)
    )
    make(root, "bus/5.wav", 0.4)
    make(root, "bus/6.wav", 0.0)
    (root / "bus/7.wav").write_bytes(b"RIFF")
    with pytest.raises(CorpusError) as caught:
        read_corpus(root, CUT)
    lines = str(caught.value).splitlines()
    assert lines[1:3] == ["  bus/5.wav: 0.40 s long, one second is expected", "  bus/6.wav: no samples"]
    assert lines[3].startswith("  bus/7.wav: unreadable")
    assert "on_bad_clip=skip" in lines[4]
    skipping = CUT.model_copy(update={"on_bad_clip": "skip"})
    assert {clip.recording for clip in read_corpus(root, skipping).clips} == {
        f"{scene}/{n}.wav" for scene in ("bus", "park") for n in range(8) if scene == "park" or n < 5
    }


def test_without_the_key_a_long_recording_is_refused_with_it(root, tmp_path):
    bad = write_store(read_corpus(root, CUT.model_copy(update={"segment_seconds": None})), tmp_path / "store")
    assert {own.reason for own in bad} == {
        f"{length} s long, one second is expected; corpus.segment_seconds=1.0 cuts longer recordings"
        for length in ("2.00", "3.00")
    }


def test_a_recording_that_ends_before_its_header_says_is_bad_from_there_on(root, tmp_path):
    corpus = read_corpus(root, CUT)
    make(root, "bus/1.wav", 1.5)  # after its header was read
    bad = write_store(corpus, tmp_path / "store")
    assert [own.clip_id for own in bad] == ["bus/1-1.wav", "bus/1-2.wav"]
    assert "a second 1 that is not there" in bad[0].reason


@pytest.mark.parametrize("kind", ["an MP3 without a count", "joined Ogg streams"])
def test_lengths_that_no_header_says_are_found(tmp_path, kind):
    root = tmp_path / "corpus"
    for scene in ("bus", "park"):
        for number in range(2):
            name = root / scene / (f"{number}.mp3" if "MP3" in kind else f"{number}.ogg")
            make(root, str(name.relative_to(root)), 2.5, 44_100)
            content = name.read_bytes()
            if "Ogg" in kind:
                name.write_bytes(content + content)
            else:
                start = next(at for at in range(len(content)) if content[at : at + 2] == b"\xff\xfb")
                following = content.find(content[start : start + 2], start + 4)
                name.write_bytes(content[following:])
    found = clips(root)
    assert len(found) == 4 * (5 if "Ogg" in kind else 2)
    assert write_store(read_corpus(root, CUT), tmp_path / "store") == []


def test_silent_seconds_alone_are_left_out(root, tmp_path):
    wave, rate = sf.read(root / "bus/1.wav")
    wave[rate : 2 * rate] = 0
    sf.write(root / "bus/1.wav", wave, rate)
    bad = write_store(read_corpus(root, CUT), tmp_path / "store")
    assert [str(own) for own in bad] == ["bus/1-1.wav: silent: every sample is zero"]


def test_a_shard_of_bad_seconds_alone_is_of_the_store(root, tmp_path):
    for name in ("bus/0.wav", "bus/1.wav"):
        sf.write(root / name, np.zeros(96_000), 32_000)
    corpus = read_corpus(root, CUT.model_copy(update={"test_seed": 3}))
    assert write_store(corpus, tmp_path / "store", 1)
    store = ClipStore(tmp_path / "store")
    assert store.recording is not None
    assert len(store.recording) == len(store)


@pytest.fixture
def store(root, tmp_path) -> ClipStore:
    return open_clips(clip_store(tmp_path, read_corpus(root, CUT), shard_clips=5))


def test_no_recording_is_divided(store):
    assert store.recording is not None
    data = Source(store.folder, PartitionConfig(fusion=0.25, validation=0.25)).open(test=True)
    parts = {part: set(store.recording[rows].tolist()) for part, rows in data.parts.items()}
    assert set(parts) == {"train", "fusion", "validation", "test"}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 16


def test_crops_go_on_in_the_next_second_of_the_recording(store, root):
    data = Source(store.folder, PartitionConfig(fusion=0.25, validation=0.25)).open()
    rows = np.random.default_rng(0).permutation(data.parts["train"])
    (pairs,) = data.waves(rows, torch.device("cpu"), crop=True).batches([np.arange(len(rows))])
    row_of = {name: row for row, name in enumerate(store.ids)}
    for row, pair in zip(rows, pairs.numpy(), strict=True):
        stem, second = store.ids[row].removesuffix(".wav").rsplit("-", 1)
        after = row_of.get(f"{stem}-{int(second) + 1}.wav", row)
        assert np.array_equal(pair, store.pcm(np.array([row, after])).reshape(-1))
    assert new_reading(CUT.model_copy(update={"path": root})).followed


def test_the_second_that_follows_is_the_next_one_of_the_recording():
    recording, second = np.array([1, 0, 1, 1, 0, 2]), np.array([3, 0, 0, 1, 2, 1])
    assert cut_following(recording, second).tolist() == [0, 1, 3, 3, 4, 5]


def test_scores_by_recording_are_those_of_the_mean_log_posteriors(store):
    rows = np.flatnonzero(store.split == "test")
    logits = np.random.default_rng(0).standard_normal((len(rows), 2)).astype(np.float32) * 3
    found = score(store, rows, logits)
    assert found.clips == len(rows)
    assert found.by_recording is not None
    assert store.recording is not None
    # The definition, recording by recording: the product of posteriors to the power 1/S, normalized.
    names = store.recording[rows]
    right, loss = [], []
    for name in np.unique(names):
        own = np.exp(logits[names == name].astype(float))
        posterior = (own / own.sum(axis=1, keepdims=True)).prod(axis=0) ** (1 / len(own))
        posterior /= posterior.sum()
        scene = store.scene[rows][names == name][0]
        right.append(posterior.argmax() == scene)
        loss.append(-np.log(posterior[scene]))
    assert found.by_recording.clips == len(right) == 8
    assert found.by_recording.accuracy == pytest.approx(np.mean(right))
    assert found.by_recording.log_loss == pytest.approx(np.mean(loss))
    assert 0 < found.by_recording.accuracy < 1
    assert headline(found)["accuracy_by_recording"] == found.by_recording.accuracy
    assert all(isinstance(figure, float) for figure in headline(found).values())  # MLflow takes nothing else
    mean, deviation = over_seeds([found, score(store, rows, -logits)])
    assert mean.by_recording is not None
    assert deviation is not None
    assert deviation.by_recording is not None
    assert mean.by_recording.accuracy == pytest.approx(0.5)
    assert deviation.by_recording.accuracy == pytest.approx(np.std([np.mean(right), 1 - np.mean(right)], ddof=1))


def test_recordings_of_one_second_have_the_scores_of_their_clips():
    logits = np.random.default_rng(1).standard_normal((20, 3))
    values, first = of_recordings(logits, np.arange(20)[::-1])
    scene = np.arange(20) % 3
    one = evaluate(logits[first], scene[first], ["a"] * 20, ["x", "y", "z"], [])
    assert evaluate(values, scene[first], ["a"] * 20, ["x", "y", "z"], []).log_loss == pytest.approx(one.log_loss)


def test_clips_of_a_second_have_no_scores_by_recording(tmp_path):
    root = tmp_path / "corpus"
    for scene in ("bus", "park"):
        for number in range(2):
            make(root, f"{scene}/{number}.wav", 1.0)
    store = open_clips(clip_store(tmp_path, read_corpus(root, CorpusConfig(layout="folders", test_share=0.5))))
    rows = np.flatnonzero(store.split == "test")
    assert score(store, rows, np.eye(2)[store.scene[rows]]).by_recording is None


def test_cutting_and_layout_are_in_the_fingerprint_and_two_readings_of_one_corpus_are_one(root):
    one = read_corpus(root, CUT)
    assert read_corpus(root, CUT.model_copy(update={"segment_seconds": None})).fingerprint != one.fingerprint
    rows = [(c.recording, c.scene, c.split) for c in one.clips if c.second == 0]
    (root / "table.csv").write_text("".join(f"{','.join(row)}\n" for row in [("filename", "scene", "split"), *rows]))
    table = {"file": "table.csv", "path": "filename", "scene": "scene", "split": "split"}
    again = read_corpus(root, CorpusConfig.model_validate({"layout": "table", "table": table, "segment_seconds": 1.0}))
    assert (again.clips, again.fingerprint) == (one.clips, one.fingerprint)
    assert again.clips[0] == Clip(
        second_id(rows[0][0], 0), rows[0][1], "a", rows[0][0], "train", rows[0][0], 0
    )  # fmt: skip
