"""The synthetic corpus: layout, determinism, and devices that differ as they should."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import soundfile as sf
from conftest import coded

from asc_ray.data.config import DemoConfig
from asc_ray.data.corpus import read_corpus
from asc_ray.data.demo import DEVICES, SCENES, make_demo_corpus
from asc_ray.data.division import partition
from asc_ray.errors import UserError

TINY = DemoConfig(
    train_clips_per_scene=6,
    train_places_per_scene=3,
    test_seconds_per_scene=2,
    test_places_per_scene=2,
    impulse_responses=3,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "corpus"
    make_demo_corpus(out, TINY)
    return out


def test_the_layout_is_tau22s(demo):
    corpus = read_corpus(demo)
    train = [clip for clip in corpus.clips if clip.split == "train"]
    test = [clip for clip in corpus.clips if clip.split == "test"]
    assert corpus.labels == tuple(SCENES)
    assert corpus.devices == DEVICES
    trained, tested = ({clip.device for clip in corpus.clips if clip.split == split} for split in ("train", "test"))
    assert tested - trained == {"s4", "s5", "s6"}
    assert Counter(clip.scene for clip in train) == dict.fromkeys(SCENES, 6)
    assert 0.5 < np.mean([clip.device == "a" for clip in train]) < 0.8
    assert not {clip.place for clip in train} & {clip.place for clip in test}
    seconds = defaultdict(set)
    for clip in test:
        seconds[clip.clip_id.rpartition("-")[0]].add(clip.device)
    assert len(seconds) == 20
    assert all(devices == set(DEVICES) for devices in seconds.values())
    names = (demo / "evaluation_setup/fold1_test.csv").read_text().splitlines()[1:]
    assert names == [clip.clip_id for clip in test]


def test_every_scene_can_be_held_out(demo):
    train = [clip for clip in read_corpus(demo).clips if clip.split == "train"]
    parts = partition(*coded(train), {"fusion": 0.25, "validation": 0.25}, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {"train": 20, "fusion": 20, "validation": 20}


def test_audio_is_one_second_of_16_bit_at_44100_hz(demo):
    for clip in read_corpus(demo).clips[::20]:
        info = sf.info(demo / clip.clip_id)
        assert (info.frames, info.samplerate, info.channels, info.subtype) == (44_100, 44_100, 1, "PCM_16")
        assert np.sqrt(np.mean(sf.read(demo / clip.clip_id)[0] ** 2)) > 0.005


def test_a_device_is_one_chain(demo):
    """A device's spectrum differs from a's by the same curve in two scenes; another device's does not."""
    bands = np.searchsorted(np.fft.rfftfreq(44_100, 1 / 44_100), np.geomspace(150, 10_000, 17))
    names = [clip for clip in read_corpus(demo).clips if clip.split == "test"]

    def levels(scene, device):
        """(16,) dB by band over the scene's test seconds."""
        waves = [sf.read(demo / clip.clip_id)[0] for clip in names if (clip.scene, clip.device) == (scene, device)]
        power = np.square(np.abs(np.fft.rfft(waves))).sum(0)
        return 10 * np.log10([power[low:high].mean() for low, high in pairwise(bands)])

    def curve(scene, device):
        difference = levels(scene, device) - levels(scene, "a")
        return difference - difference.mean()

    same = np.corrcoef(curve("rain", "s4"), curve("surf", "s4"))[0, 1]
    other = np.corrcoef(curve("rain", "s4"), curve("surf", "s5"))[0, 1]
    assert same > 0.8
    assert same > other + 0.1
    assert np.std(curve("rain", "s4")) > 2 * np.std(curve("rain", "b"))


def test_impulse_responses_are_short_and_start_at_once(demo):
    files = sorted((demo / "dirs").glob("*.wav"))
    assert len(files) == 3
    for file in files:
        response, rate = sf.read(file)
        assert rate == 44_100
        assert np.abs(response).max() == pytest.approx(0.9)
        assert np.sum(response[:400] ** 2) > 0.8 * np.sum(response**2)


def test_the_same_seed_gives_the_same_bytes(demo, tmp_path):
    make_demo_corpus(tmp_path / "again", TINY)
    make_demo_corpus(tmp_path / "other", TINY.model_copy(update={"seed": 1}))
    files = sorted(path.relative_to(demo) for path in demo.rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "again") for p in (tmp_path / "again").rglob("*") if p.is_file())
    assert all((demo / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert read_corpus(demo).fingerprint == read_corpus(tmp_path / "again").fingerprint
    assert any((demo / f).read_bytes() != (tmp_path / "other" / f).read_bytes() for f in files if f.parts[0] == "dirs")


def test_an_existing_folder_is_not_written_into(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        make_demo_corpus(tmp_path, TINY)
    with pytest.raises(UserError, match="not an empty folder"):
        make_demo_corpus(tmp_path / "note.txt", TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
