"""How clips reach the device: mapped, resident and streamed alike, from a store of its own on each node."""

import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import soundfile as sf
import torch
from conftest import clip_store

from asc_ray import artifacts, remote
from asc_ray.artifacts import Artifact
from asc_ray.data.batches import Waves, delivery, epoch_batches, waveform
from asc_ray.data.clip import Clip
from asc_ray.data.clips import CLIP_SAMPLES, SAMPLE_RATE, ClipStore, open_clips
from asc_ray.data.config import DataConfig
from asc_ray.data.corpus import Corpus
from asc_ray.data.mirror import mirrored
from asc_ray.errors import ConfigError, UserError

CPU = torch.device("cpu")
CLIPS = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A store of three shards; the first two samples of a clip are its number."""
    root, folder = tmp_path_factory.mktemp("audio"), tmp_path_factory.mktemp("store")
    rng = np.random.default_rng(0)
    clips = []
    for number in range(CLIPS):
        pcm = rng.integers(-3000, 3000, CLIP_SAMPLES).astype(np.int16)
        pcm[:2] = number
        sf.write(root / f"{number:02d}.wav", pcm, SAMPLE_RATE, subtype="PCM_16")
        clips.append(Clip(f"{number:02d}.wav", "park", "a", "rome-1", "train"))
    return clip_store(folder, Corpus(root, tuple(clips), ("park",), ("a",), "f00d", ()), shard_clips=17)


def batches(epoch: int, rank: int = 0, world: int = 1, clips: int = CLIPS) -> list[np.ndarray]:
    return [batch[rank::world] for batch in epoch_batches(clips, 16, seed=3, epoch=epoch, world=world)]


@pytest.fixture(scope="module")
def cluster():
    """Two slots, both taken by trainings: reading ahead must not need one of its own."""
    ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=1)
def streamed(store: ClipStore, rows: np.ndarray, given: list[np.ndarray]) -> list[np.ndarray]:
    from asc_ray.cluster.stream import stream

    waves = Waves(store, rows, CPU, DataConfig(mode="stream"), stream)
    return [waveform(pcm).numpy() for pcm in waves.batches(given)]


def opened(folder: Path, how: str) -> ClipStore:
    """The store as `mapped` opens it, as a stream does, and as a stream does one of an earlier version."""
    return ClipStore(folder) if how == "shards" else open_clips(folder, whole=how == "whole")


@pytest.mark.parametrize(("epoch", "how"), [(0, "parts"), (5, "parts"), (5, "shards")])
def test_mapped_resident_and_streamed_batches_are_the_same(folder, cluster, epoch, how):
    store, rows = opened(folder, how), np.arange(5, 80)
    given = batches(epoch, clips=len(rows))
    expected = [ClipStore(folder).pcm(rows[batch]).astype(np.float32) / 32768 for batch in given]
    mapped = Waves(store, rows, CPU, DataConfig(mode="mapped")).batches(given)
    resident = Waves(store, rows, CPU, DataConfig(mode="resident")).batches(given)
    there = ray.get(streamed.remote(store, rows, given))
    for wanted, a, b, c in zip(expected, mapped, resident, there, strict=True):
        assert (waveform(a).numpy() == wanted).all()
        assert (waveform(b).numpy() == wanted).all()
        assert (c == wanted).all()


def test_a_stream_gives_two_workers_every_clip_once_an_epoch(folder, cluster):
    store, rows = open_clips(folder, whole=False), np.arange(CLIPS)
    for epoch in range(2):
        pieces = [streamed.remote(store, rows, batches(epoch, rank, world=2)) for rank in range(2)]
        numbers = [round(clip[0] * 32768) for worker in ray.get(pieces) for batch in worker for clip in batch]
        assert sorted(store.ids[:]) == [f"{number:02d}.wav" for number in sorted(numbers)]


def test_a_stream_starts_where_a_broken_epoch_ended(folder, cluster):
    store, rows, given = open_clips(folder, whole=False), np.arange(CLIPS), batches(1)
    whole = ray.get(streamed.remote(store, rows, given))
    rest = ray.get(streamed.remote(store, rows, given[3:]))
    assert all((a == b).all() for a, b in zip(whole[3:], rest, strict=True))
    assert ray.get(streamed.remote(store, rows, [])) == []


# --- single clips, from where the shards lie --------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["whole", "parts", "shards"])
def test_a_store_is_the_same_however_it_is_opened(folder, how):
    store, rows = opened(folder, how), np.array([16, 17, 18, 3, 89, 89, 0, 33, 34])
    expected = ClipStore(folder)
    for one in (store, pickle.loads(pickle.dumps(store))):
        assert one.ids[:].tolist() == expected.ids[:].tolist()
        assert (one.scene == expected.scene).all()
        assert (one.energy == expected.energy).all()
        assert (one.place[:] == expected.place[:]).all()
        assert (one.labels, one.devices, one.corpus) == (expected.labels, expected.devices, expected.corpus)
        assert (one.pcm(rows) == expected.pcm(rows)).all()
        assert one.pcm(rows[:0]).shape == (0, CLIP_SAMPLES)


def test_clips_that_follow_each_other_are_read_at_once(folder, monkeypatch):
    store, asked, part = open_clips(folder, whole=False), [], remote.part
    monkeypatch.setattr(remote, "part", lambda *where: asked.append(where[2] // (2 * CLIP_SAMPLES)) or part(*where))
    store.pcm(np.arange(10, 40))
    assert sorted(asked) == [6, 7, 17]  # of three shards of 17
    asked.clear()
    store.pcm(np.array([5, 4, 6, 7, 9, 9]))
    assert sorted(asked) == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_clip_that_is_not_as_it_was_written_is_named_and_others_are_read(folder, tmp_path, damage):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    shard, clip = copy / "shard-000000017.arrow", 20
    store, place = (
        open_clips(copy, whole=False),
        shard.read_bytes().find(ClipStore(copy).pcm(np.array([clip])).tobytes()),
    )
    with shard.open("r+b") as file:
        file.seek(place + 30_001)
        byte = file.read(1)[0]
        file.seek(place + 30_001)
        file.write(bytes([byte ^ 1]))
        if damage == "cut":
            file.truncate(place + 100)
    if damage == "gone":
        shard.unlink()
    told = r"shard-000000017\.arrow: is missing" if damage == "gone" else (
        r"shard-000000017\.arrow: the samples of 20\.wav are not as they were written; delete the folder "
    )  # fmt: skip
    with pytest.raises(UserError, match=told):
        store.pcm(np.array([0, 19, 20, 40]) if damage == "flipped" else np.array([clip]))
    assert (store.pcm(np.array([0, 40])) == ClipStore(folder).pcm(np.array([0, 40]))).all()
    with pytest.raises(UserError, match=r"shard-000000017\.arrow: (checksum differs|missing)"):
        open_clips(copy).pcm(np.array([0]))


def test_what_auto_comes_to():
    assert delivery(DataConfig(), 100, CPU) == "mapped"
    assert delivery(DataConfig(mode="stream"), 100, CPU) == "stream"
    assert delivery(DataConfig(mode="resident"), 100, CPU) == "resident"


def test_a_resident_split_that_does_not_fit_is_refused():
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    clips = free // (2 * CLIP_SAMPLES) + 1
    with pytest.raises(ConfigError, match=r"data.mode: resident takes .* GB for \d+ clips, and"):
        delivery(DataConfig(mode="resident"), clips, CPU)


@pytest.mark.parametrize(
    ("gpus", "free", "fits"), [(1.0, 80, 40), (0.25, 80, 10), (0.25, 16, 8), (2.0, 80, 40), (1.0, 60, 30)]
)
def test_a_part_of_a_gpu_has_its_part_of_the_memory(monkeypatch, gpus, free, fits):
    """Of a card of 80 clips' memory and the default share of one half; `free` is what all on it have left."""
    size, gpu = 2 * CLIP_SAMPLES, torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * size, 80 * size))
    assert delivery(DataConfig(), fits, gpu, gpus) == "resident"
    assert delivery(DataConfig(), fits + 1, gpu, gpus) == "mapped"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_auto_is_resident_and_gives_the_same_batches(folder):
    store, rows, gpu = ClipStore(folder), np.arange(CLIPS), torch.device("cuda")
    waves = Waves(store, rows, gpu, DataConfig())
    assert waves.mode == "resident"
    mapped = Waves(store, rows, gpu, DataConfig(mode="mapped"))
    for a, b in zip(waves.batches(batches(0)), mapped.batches(batches(0)), strict=True):
        assert torch.equal(a, b)


def test_a_stream_without_a_cluster_is_refused(folder):
    with pytest.raises(ConfigError, match="allowed without: auto, mapped, resident"):
        Waves(ClipStore(folder), np.arange(3), CPU, DataConfig(mode="stream"))


# --- one copy a node --------------------------------------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path) -> Artifact:
    artifact = Artifact(tmp_path / "storage", "clips", "demo", "0123", {}, {})
    (artifact.open_partial() / "shard.arrow").write_bytes(b"clips" * 1000)
    artifact.finish({})
    return artifact


def test_the_first_who_asks_copies_and_the_others_wait(artifact, tmp_path, monkeypatch):
    copies = []

    def slow(source, target):
        copies.append(target)
        time.sleep(0.2)
        return copytree(source, target)

    copytree = artifacts.shutil.copytree
    monkeypatch.setattr(artifacts.shutil, "copytree", slow)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: mirrored(artifact.path, tmp_path / "cache"), range(4)))
    assert len(copies) == 1
    assert set(paths) == {tmp_path / "cache" / artifact.path.name}
    assert artifacts.damaged_files(paths[0]) == []


def test_a_copy_that_was_broken_off_is_made_again(artifact, tmp_path):
    half = tmp_path / "cache" / f"{artifact.path.name}.partial"
    half.mkdir(parents=True)
    (half / "shard.arrow").write_bytes(b"cli")
    copy = mirrored(artifact.path, tmp_path / "cache")
    assert (copy / "shard.arrow").read_bytes() == b"clips" * 1000
    assert not half.exists()


def test_what_cannot_be_copied_whole_is_named(artifact, tmp_path):
    (artifact.path / "shard.arrow").write_bytes(b"rotten")
    with pytest.raises(UserError, match=r"shard.arrow: checksum differs"):
        mirrored(artifact.path, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache: .* cannot be copied to .*file"):
        mirrored(artifact.path, tmp_path / "file")
