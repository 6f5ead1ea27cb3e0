"""Seconds that follow each other in a recording, and crops across them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import coded, noise

from asc_ray.audio.augment import Augment
from asc_ray.audio.config import AugmentConfig, FrontendConfig
from asc_ray.audio.impulse import ImpulseBank
from asc_ray.config.composition import load_config
from asc_ray.data.clip import Clip
from asc_ray.data.clips import ClipStore, write_clips
from asc_ray.data.config import DataConfig, DemoConfig
from asc_ray.data.demo import make_demo_corpus
from asc_ray.data.recordings import following
from asc_ray.errors import ConfigError
from asc_ray.plan import Plan
from asc_ray.training.dataset import Dataset


def clip(name: str, scene: str = "park", place: str = "park-oslo-1") -> Clip:
    return Clip(name, scene, "a", place, "train")


CASES = {  # name: the second that follows it among these
    "audio/park-oslo-1-7-1-a.wav": "audio/park-oslo-1-7-2-a.wav",
    "audio/park-oslo-1-7-0-a.wav": "audio/park-oslo-1-7-1-a.wav",
    "audio/park-oslo-1-7-2-a.wav": None,  # the recording's last
    "audio/park-oslo-1-7-9-a.wav": "audio/park-oslo-1-7-10-a.wav",
    "audio/park-oslo-1-7-10-a.wav": None,
    "audio/park-oslo-1-7-3-b.wav": None,  # another device's third second
    "audio/park-oslo-1-8-3-a.wav": None,  # another recording's
    "audio/elsewhere-1-a.wav": None,
    "noise.wav": None,
    "-.wav": None,
}


def test_the_second_that_follows_is_of_the_same_recording_and_device():
    clips = [clip(name) for name in CASES]
    found = [clips[index].clip_id for index in followed(clips)]
    assert dict(zip(CASES, found, strict=True)) == {name: after or name for name, after in CASES.items()}


@pytest.mark.parametrize("other", [{"scene": "bus"}, {"place": "park-oslo-2"}])
def test_names_that_are_no_recording_s_join_nothing(other):
    """Numbered files of several scenes or places look like seconds, and are none."""
    assert followed([clip("x-1-a.wav"), clip("x-2-a.wav", **other)]) == [0, 1]


def followed(clips: list[Clip]) -> list[int]:
    ids = pa.chunked_array([[clip.clip_id for clip in clips]], pa.string())
    return following(ids, *coded(clips)[:2]).tolist()


def augment(config: AugmentConfig) -> Augment:
    return Augment(config, FrontendConfig(), ImpulseBank(("one",), torch.ones(1, 1)), 1.0)


def test_a_crop_is_a_second_of_both_and_of_the_last_a_rotation():
    ours = augment(AugmentConfig(crop=True))
    wave = torch.from_numpy(noise(6, 64_000))
    wave[3, 32_000:] = wave[3, :32_000]
    draw = ours.draw(torch.ones(6), ["a"] * 6, torch.Generator().manual_seed(1))
    assert len(set(draw.start.tolist())) == 6
    for own, start, cropped in zip(wave, draw.start.tolist(), ours.wave(wave, draw), strict=True):
        assert torch.equal(cropped, own[start : start + 32_000])
    rolled = torch.roll(wave[3, :32_000], -int(draw.start[3]))
    assert torch.equal(ours.wave(wave, draw)[3], rolled)


def test_crops_start_anywhere_and_change_no_other_draw():
    config = AugmentConfig(roll=500, freq_mask=20, mixup_alpha=0.3)
    one, other = (
        augment(own).draw(torch.ones(4000), ["a"] * 4000, torch.Generator().manual_seed(1))
        for own in (config, config.model_copy(update={"crop": True}))
    )
    assert torch.equal(one.packed(), torch.cat([other.packed()[:, :1], other.packed()[:, 2:]], dim=1))
    assert 0 <= other.start.min() < 100
    assert 31_900 < other.start.max() < 32_000
    assert abs(other.start.double().mean() - 16_000) < 4 * 32_000 / np.sqrt(12 * 4000)


@pytest.mark.parametrize("mode", ["mapped", "resident"])
def test_each_clip_brings_the_second_that_follows_it(tmp_path, mode):
    clips = [clip(f"audio/park-oslo-1-7-{second}-a.wav") for second in (4, 2, 0, 1, 3)]
    pcm = np.arange(5 * 32_000).astype(np.int16).reshape(5, -1)
    store = made(tmp_path, clips, pcm)
    rows = np.array([1, 2, 3, 4])  # the clip of second 4 is in another part
    waves = Dataset(store, {}, None, DataConfig(mode=mode)).waves(rows, torch.device("cpu"), crop=True)
    (batch,) = waves.batches([np.array([3, 0, 1])])
    assert torch.equal(batch, torch.from_numpy(np.concatenate([pcm[[4, 1, 2]], pcm[[4, 4, 3]]], axis=1)))


def made(folder: Path, clips: list[Clip], pcm: np.ndarray) -> ClipStore:
    write_clips(folder / "shard-00000.arrow", clips, pcm, ["park"], ["a"], "f00d")
    return ClipStore(folder)


def test_a_corpus_of_single_seconds_is_told_before_any_training(tmp_path):
    corpus = tmp_path / "corpus"
    make_demo_corpus(corpus, DemoConfig(train_clips_per_scene=4, test_seconds_per_scene=1, impulse_responses=1))
    settings = [f"storage={tmp_path}", f"corpus.path={corpus}", "student.augment.crop=true"]
    with pytest.raises(ConfigError, match=r"student\.augment\.crop: no training clip is followed by another second"):
        Plan(load_config("demo", settings))
    searched = 'sweep.space={"augment.crop": {choice: [false, true]}}'
    with pytest.raises(ConfigError, match=r"sweep\.space\.augment\.crop: no training clip is followed"):
        Plan(load_config("demo", [*settings[:2], searched]))
