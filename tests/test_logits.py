"""The logit store: round trip, and a join by clip_id that refuses what does not belong together."""

import json
import pickle

import numpy as np
import pytest

from asc_ray.data.logits import Ensemble, read_logits, write_logits
from asc_ray.errors import UserError

LABELS = ["bus", "metro", "park"]
IDS = [f"audio/{i}.wav" for i in range(6)]


def metadata(system="passt_1", **changes):
    return {"system": system, "labels": json.dumps(LABELS), "corpus": "f00d", "split": "train"} | changes


def values(ids, offset=0.0):
    """Row i of clip audio/i.wav is (i, i + .1, i + .2) + offset, wherever it stands."""
    numbers = np.array([int(clip_id[6:-4]) for clip_id in ids], dtype=np.float32)
    return numbers[:, None] + np.array([0.0, 0.1, 0.2], dtype=np.float32) + np.float32(offset)


@pytest.fixture
def stored(tmp_path):
    def store(ids=tuple(IDS), logits=None, name="x", **changes):
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_logits(folder / "logits.arrow", ids, values(ids) if logits is None else logits, metadata(**changes))
        return read_logits(folder)

    return store


def test_round_trip_is_exact(stored):
    logits = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    read = stored(logits=logits, checkpoint="abc")
    assert (read.system, read.labels) == ("passt_1", tuple(LABELS))
    assert read.ids.tolist() == IDS
    everything = read.take(np.arange(6))
    assert everything.dtype == np.float32
    assert (everything == logits).all()
    assert (read.take(np.array([5, 0, 5])) == logits[[5, 0, 5]]).all()
    assert read.metadata == metadata(checkpoint="abc")


def test_several_files_are_one_system(tmp_path):
    write_logits(tmp_path / "train-0.arrow", IDS[:2], values(IDS[:2]), metadata())
    write_logits(tmp_path / "train-1.arrow", IDS[2:4], values(IDS[2:4]), metadata())
    write_logits(tmp_path / "test-0.arrow", IDS[4:], values(IDS[4:]), metadata(split="test"))
    read = read_logits(tmp_path)
    assert sorted(read.ids) == IDS
    assert (read.take(np.array([5, 1, 3, 0])) == values(read.ids[[5, 1, 3, 0]])).all()
    assert "split" not in read.metadata
    assert read_logits(tmp_path, "train").ids.tolist() == IDS[:4]
    assert read_logits([tmp_path / "test-0.arrow"]).ids.tolist() == IDS[4:]
    write_logits(tmp_path / "other.arrow", IDS[:1], values(IDS[:1]), metadata(checkpoint="another"))
    with pytest.raises(UserError, match=r"differs from .*other\.arrow in checkpoint"):
        read_logits(tmp_path)


def test_a_piece_is_a_slice_of_the_whole_here_and_in_another_process(stored):
    ensemble = Ensemble([stored(), stored(IDS[::-1], values(IDS[::-1], offset=0.5), system="cpr_1")], IDS)
    piece = pickle.loads(pickle.dumps(ensemble.piece(slice(1, 4))))
    assert (piece() == ensemble.read()[:, 1:4]).all()


def test_joined_by_clip_id_never_by_position(stored):
    rng = np.random.default_rng(1)
    shuffled = [IDS[i] for i in rng.permutation(6)]
    first, second = stored(), stored(shuffled, values(shuffled, offset=0.5), system="cpr_1")
    wanted = [IDS[4], IDS[0], IDS[5]]
    joined = Ensemble([first, second], wanted).read()
    assert joined.shape == (2, 3, 3)
    assert joined.dtype == np.float32
    assert (joined[0] == values(wanted)).all()
    assert (joined[1] == values(wanted, offset=0.5)).all()


def broken(row, value):
    logits = values(IDS)
    logits[row, 1] = value
    return logits


REFUSED: dict[str, tuple[dict, str]] = {
    "corpora": ({"corpus": "beef"}, "different corpora.*f00d and beef"),
    "label orders": ({"labels": json.dumps(LABELS[::-1])}, "label orders.*park, metro, bus"),
    "duplicates": ({"ids": [*IDS, IDS[2]]}, r"system cpr_1: 1 clips occur more than once: audio/2\.wav"),
    "missing": ({"ids": IDS[1:5]}, r"system cpr_1 lacks 2 of 6 clips: audio/0\.wav, audio/5\.wav"),
    "all missing": ({"ids": ["audio/9.wav"]}, r"lacks 6 of 6 clips: .*audio/2\.wav, \.\.\."),
    "nan": ({"logits": broken(3, np.nan)}, r"system cpr_1: logits of 1 of 6 clips are not finite: audio/3\.wav"),
    "infinite": ({"logits": broken(0, -np.inf)}, r"logits of 1 of 6 clips are not finite: audio/0\.wav"),
    "one name": ({"system": "passt_1"}, "systems of one name: passt_1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_join_refuses(stored, case):
    changes, message = REFUSED[case]
    second = stored(**({"system": "cpr_1"} | changes))
    with pytest.raises(UserError, match=message):
        Ensemble([stored(), second], IDS).read()


def test_join_refuses_repeated_requests_and_no_systems(stored):
    with pytest.raises(UserError, match="requested clips"):
        Ensemble([stored()], [IDS[0], IDS[0]])
    with pytest.raises(UserError, match="no system"):
        Ensemble([], IDS)


def test_broken_logits_of_clips_not_asked_for_do_not_matter(stored):
    assert np.isfinite(Ensemble([stored(logits=broken(3, np.nan))], IDS[:3]).read()).all()


def test_files_that_are_no_logits_are_named(tmp_path, stored):
    with pytest.raises(UserError, match=r"no \*\.arrow"):
        read_logits(tmp_path / "nowhere")
    file = tmp_path / "cut.arrow"
    write_logits(file, IDS, values(IDS), metadata())
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cut\.arrow: truncated"):
        read_logits([file])


@pytest.mark.parametrize(
    ("logits", "changes"),
    [(values(IDS[:5]), {}), (values(IDS)[:, :2], {}), (values(IDS), {"labels": json.dumps(LABELS[:2])})],
)
def test_shapes_are_checked_before_writing(tmp_path, logits, changes):
    with pytest.raises(ValueError, match="expected"):
        write_logits(tmp_path / "x.arrow", IDS, logits, metadata(**changes))
    assert list(tmp_path.iterdir()) == []
