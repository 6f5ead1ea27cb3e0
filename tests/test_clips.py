"""The clip store, and the batches drawn from it."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import soundfile as sf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.data.batches import Waves, device_shares, epoch_batches, eval_batches, step_generator, waveform
from asc_ray.data.clip import Clip
from asc_ray.data.clips import (
    CLIP_SAMPLES,
    SAMPLE_RATE,
    SHARD,
    ClipStore,
)
from asc_ray.data.corpus import Corpus
from asc_ray.data.pieces import missing_pieces, piece_file
from asc_ray.data.shards import write_shard
from asc_ray.errors import ConfigError, UserError

LABELS, DEVICES = ("metro", "park"), ("a", "s1")


def sine(rate: int, frequency=1000.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * frequency * np.arange(rate) / rate)


def wav(path: Path, samples, rate=SAMPLE_RATE, subtype="FLOAT") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.asarray(samples, dtype=np.float32), rate, subtype=subtype)
    return path


# --- store ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    """Seven clips of random 16-bit noise and one silent one."""
    rng = np.random.default_rng(1)
    clips = []
    for i in range(8):
        clip = Clip(f"audio/{i}.wav", LABELS[i % 2], DEVICES[i // 4], f"rome-{i % 3}", "train" if i < 5 else "test")
        (tmp_path / "corpus/audio").mkdir(parents=True, exist_ok=True)
        pcm = rng.integers(-3000, 3000, CLIP_SAMPLES).astype(np.int16) * (i != 3)
        sf.write(tmp_path / "corpus" / clip.clip_id, pcm, SAMPLE_RATE, subtype="PCM_16")
        clips.append(clip)
    return Corpus(tmp_path / "corpus", tuple(clips), LABELS, DEVICES, "f00d", ())


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    for some in missing_pieces(8, [], 3):
        file = piece_file(folder, SHARD, some.start)
        write_shard(corpus.root, corpus.clips[some], LABELS, DEVICES, file, fingerprint="f00d")
    return folder


def good(corpus):
    return [clip for clip in corpus.clips if clip.clip_id != "audio/3.wav"]


def test_the_store_returns_what_the_corpus_has(corpus, folder):
    store = ClipStore(folder)
    assert len(store) == 7
    assert (store.labels, store.devices, store.corpus) == (LABELS, DEVICES, "f00d")
    assert store.ids[:].tolist() == [clip.clip_id for clip in good(corpus)]
    assert (store.ids[5], list(store.ids)[5], store.ids[[5, 0, 2]].tolist()[0]) == ("audio/6.wav",) * 3
    assert store.ids[store.split == "test"].tolist() == store.ids[4:].tolist()
    assert store.scene.dtype == np.int64
    assert [store.labels[i] for i in store.scene] == [clip.scene for clip in good(corpus)]
    for column in ("device", "place", "split"):
        names = [getattr(clip, column) for clip in good(corpus)]
        assert getattr(store, column)[:].tolist() == names
        assert (getattr(store, column) == names[0]).tolist() == [name == names[0] for name in names]
        assert getattr(store, column).among(slice(2, 5)) == sorted(set(names[2:5]))
    assert store.unseen_devices == ()


def test_unseen_devices_are_those_of_the_test_split_alone(corpus, tmp_path):
    of = ["z", "z", "b", "z", "z", "a", "z", "c"]
    clips = tuple(replace(clip, device=device) for clip, device in zip(corpus.clips, of, strict=True))
    folder = tmp_path / "unseen"
    folder.mkdir()
    write_shard(corpus.root, clips, LABELS, ("a", "b", "c", "z"), piece_file(folder, SHARD, 0), fingerprint="f00d")
    assert ClipStore(folder).unseen_devices == ("a", "c")


def test_pcm_is_bit_equal_and_in_the_order_asked_for(corpus, folder):
    store = ClipStore(folder)
    indices = np.array([6, 0, 3, 3, 1])
    expected = [sf.read(corpus.root / good(corpus)[i].clip_id, dtype="int16")[0] for i in indices]
    out = np.zeros((5, CLIP_SAMPLES), dtype=np.int16)
    assert store.pcm(indices, out=out) is out
    assert (out == expected).all()
    assert (store.pcm(indices) == expected).all()
    (pcm,) = Waves(store, indices, torch.device("cpu")).batches([np.arange(len(indices))])
    assert (waveform(pcm).numpy() == np.array(expected) / np.float32(32768)).all()
    with pytest.raises(IndexError):
        store.pcm(np.array([7]))
    with pytest.raises(IndexError):
        store.pcm(np.array([-1]))


def test_pcm_is_mapped_not_copied(folder):
    before = pa.total_allocated_bytes()
    store = ClipStore(folder)
    store.pcm(np.array([0, 6]), out=np.empty((2, CLIP_SAMPLES), dtype=np.int16))
    assert len(store._pcm) == 2  # of three shards
    assert all(not rows.flags.owndata and not rows.flags.writeable for rows in store._pcm.values())
    assert pa.total_allocated_bytes() - before < CLIP_SAMPLES  # less than one clip


def test_energy_is_the_sum_of_squares(tmp_path):
    wav(tmp_path / "x.wav", sine(SAMPLE_RATE))
    clip = Clip("x.wav", "park", "a", "rome-1", "train")
    write_shard(tmp_path, [clip], LABELS, DEVICES, piece_file(tmp_path, SHARD, 0), fingerprint="")
    # A whole number of periods: N A^2 / 2.
    assert ClipStore(tmp_path).energy[0] == pytest.approx(CLIP_SAMPLES * 0.5**2 / 2, rel=1e-4)


def test_the_report_names_bad_clips_and_counts_notes(corpus, tmp_path):
    wav(corpus.root / "audio/0.wav", sine(44_100), 44_100)
    file = tmp_path / "shard-00000.arrow"
    report = write_shard(corpus.root, corpus.clips, LABELS, DEVICES, file, fingerprint="f00d")
    as_dict = json.loads(json.dumps(asdict(report)))
    assert len(ClipStore(tmp_path)) == 7
    assert as_dict["notes"] == {"resampled 44100 Hz": 1}
    assert as_dict["bad"] == [{"clip_id": "audio/3.wav", "reason": "silent: every sample is zero"}]
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert names == [file.name, "shard-00000.index"]  # no temporary file left


def test_the_same_input_gives_the_same_bytes(corpus, tmp_path):
    files = [tmp_path / "1.arrow", tmp_path / "2.arrow"]
    for file in files:
        write_shard(corpus.root, corpus.clips, LABELS, DEVICES, file, fingerprint="f00d")
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_interrupted_write_leaves_nothing(corpus, tmp_path, monkeypatch):
    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr("asc_ray.data.arrow.os.fsync", fail)
    (tmp_path / "store").mkdir()
    with pytest.raises(OSError, match="disk full"):
        write_shard(corpus.root, corpus.clips, LABELS, DEVICES, tmp_path / "store" / "s.arrow", fingerprint="")
    assert list((tmp_path / "store").iterdir()) == []


def test_index_of(folder):
    store = ClipStore(folder)
    assert store.index_of(["audio/7.wav", "audio/0.wav"]).tolist() == [6, 0]
    with pytest.raises(UserError, match=r"audio/3.wav \(1 missing\)"):
        store.index_of(["audio/3.wav", "audio/0.wav"])


def test_a_store_survives_pickling_small(folder):
    data = pickle.dumps(ClipStore(folder))
    assert len(data) < 1000
    assert (pickle.loads(data).pcm(np.arange(7)) == ClipStore(folder).pcm(np.arange(7))).all()


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def zero_footer(file):
    file.write_bytes(file.read_bytes()[:-50] + bytes(50))


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, zero_footer, empty])
def test_a_damaged_shard_is_named(folder, damage):
    damage(piece_file(folder, SHARD, 3))
    with pytest.raises(UserError, match=r"shard-000000003\.arrow: truncated or corrupted"):
        ClipStore(folder)


def test_stores_that_are_none(corpus, folder, tmp_path):
    with pytest.raises(UserError, match=r"no shard-\*\.arrow"):
        ClipStore(tmp_path)
    write_shard(corpus.root, corpus.clips[:1], LABELS, DEVICES, piece_file(folder, SHARD, 9), fingerprint="f00d")
    with pytest.raises(UserError, match="held twice"):
        ClipStore(folder)
    write_shard(corpus.root, corpus.clips[:1], LABELS, DEVICES, piece_file(folder, SHARD, 9), fingerprint="beef")
    with pytest.raises(UserError, match=r"shard-000000009\.arrow: not of one store"):
        ClipStore(folder)


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(data=st.data(), world=st.integers(1, 9), seed=st.integers(0, 2**40), epoch=st.integers(0, 300))
def test_every_index_once_an_epoch_for_any_world_size(data, world, seed, epoch):
    count = data.draw(st.integers(world, 200))
    batch_size = data.draw(st.integers(world, 64))
    batches = epoch_batches(count, batch_size, seed=seed, epoch=epoch, world=world)
    ranks = [[batch[rank::world] for batch in batches] for rank in range(world)]
    assert sorted(i for batches in ranks for batch in batches for i in batch) == list(range(count))
    for pieces in zip(*ranks, strict=True):
        sizes = [len(piece) for piece in pieces]
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) < batch_size + world
    if count % batch_size == 0 or count % batch_size >= world:  # no joined tail: the same global batches as alone
        alone = epoch_batches(count, batch_size, seed=seed, epoch=epoch)
        assert all((ours == theirs).all() for ours, theirs in zip(batches, alone, strict=True))


@settings(max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**40), balance=st.floats(0.05, 1.0))
def test_with_shares_every_clip_is_there_as_often_as_its_share_says(data, seed, balance):
    device = np.array(data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=120)))
    shares, count = device_shares(device, balance), len(device)
    times = np.zeros((50, count))
    for epoch in range(50):
        batches = epoch_batches(count, 16, seed=seed, epoch=epoch, shares=shares)
        assert [len(batch) for batch in batches] == [len(b) for b in epoch_batches(count, 16, seed=seed, epoch=epoch)]
        times[epoch] = np.bincount(np.concatenate(batches), minlength=count)
    assert (times >= np.floor(count * shares - 1e-9)).all()
    assert (times <= np.ceil(count * shares + 1e-9)).all()
    names, of, counts = np.unique(device, return_inverse=True, return_counts=True)
    wanted = counts ** (1 - balance) / (counts ** (1 - balance)).sum()
    got = np.bincount(of, weights=times.sum(0), minlength=len(names)) / times.sum()
    assert np.abs(got - wanted).max() < 0.1


def test_order_depends_on_seed_and_epoch_only():
    def order(seed, epoch):
        return tuple(np.concatenate(epoch_batches(50, 8, seed=seed, epoch=epoch)))

    assert order(0, 0) == order(0, 0)
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize(("count", "batch_size", "world"), [(3, 8, 4), (100, 2, 4), (0, 8, 1)])
def test_ranks_without_clips_are_refused(count, batch_size, world):
    with pytest.raises(ConfigError, match="some worker has no clip"):
        epoch_batches(count, batch_size, seed=0, epoch=0, world=world)


@given(count=st.integers(1, 100), batch_size=st.integers(1, 40))
def test_evaluation_goes_in_order(count, batch_size):
    batches = eval_batches(count, batch_size)
    assert np.concatenate(batches).tolist() == list(range(count))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size


def test_step_generators_are_repeatable_and_distinct():
    keys = [(s, e, t) for s in (0, 1) for e in (0, 1) for t in (0, 1, 2)]
    draws = {key: tuple(torch.rand(4, generator=step_generator(*key)).tolist()) for key in keys}
    assert len(set(draws.values())) == len(keys)
    assert all(tuple(torch.rand(4, generator=step_generator(*key)).tolist()) == draw for key, draw in draws.items())
