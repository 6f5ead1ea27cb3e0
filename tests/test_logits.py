"""The logit store: round trip, and a join by clip_id that refuses what does not belong together."""

import json

import numpy as np
import pytest

from asc_ray.data.logits import join, read_logits, write_logits
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


def test_round_trip_is_exact_and_mapped(stored):
    logits = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    read = stored(logits=logits, checkpoint="abc")
    assert (read.system, read.labels) == ("passt_1", tuple(LABELS))
    assert read.ids.tolist() == IDS
    assert read.values.dtype == np.float32
    assert (read.values == logits).all()
    assert not read.values.flags.owndata
    assert read.metadata == metadata(checkpoint="abc")


def test_several_files_are_one_system(tmp_path):
    write_logits(tmp_path / "train.arrow", IDS[:4], values(IDS[:4]), metadata())
    write_logits(tmp_path / "test.arrow", IDS[4:], values(IDS[4:]), metadata(split="test"))
    read = read_logits(tmp_path)
    assert sorted(read.ids) == IDS
    assert (read.values == values(read.ids)).all()
    assert "split" not in read.metadata
    assert read_logits([tmp_path / "test.arrow"]).ids.tolist() == IDS[4:]
    write_logits(tmp_path / "other.arrow", IDS[:1], values(IDS[:1]), metadata(checkpoint="another"))
    with pytest.raises(UserError, match=r"differs from .*other\.arrow in checkpoint"):
        read_logits(tmp_path)


def test_joined_by_clip_id_never_by_position(stored):
    rng = np.random.default_rng(1)
    shuffled = [IDS[i] for i in rng.permutation(6)]
    first, second = stored(), stored(shuffled, values(shuffled, offset=0.5), system="cpr_1")
    wanted = [IDS[4], IDS[0], IDS[5]]
    joined = join([first, second], wanted)
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
    "nan": ({"logits": broken(3, np.nan)}, r"system cpr_1: logits of 1 clips are not finite: audio/3\.wav"),
    "infinite": ({"logits": broken(0, -np.inf)}, r"logits of 1 clips are not finite: audio/0\.wav"),
    "one name": ({"system": "passt_1"}, "systems of one name: passt_1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_join_refuses(stored, case):
    changes, message = REFUSED[case]
    second = stored(**({"system": "cpr_1"} | changes))
    with pytest.raises(UserError, match=message):
        join([stored(), second], IDS)


def test_join_refuses_repeated_requests_and_no_systems(stored):
    with pytest.raises(UserError, match="requested clips"):
        join([stored()], [IDS[0], IDS[0]])
    with pytest.raises(UserError, match="no system"):
        join([], IDS)


def test_broken_logits_of_clips_not_asked_for_do_not_matter(stored):
    assert np.isfinite(join([stored(logits=broken(3, np.nan))], IDS[:3])).all()


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
