"""Recordings are heard from their first sample to their last, whatever their container says of their length."""

import io
import struct

import numpy as np
import pytest
import soundfile as sf
from hypothesis import given, settings
from hypothesis import strategies as st

from asc_ray.audio.recording import BadAudio, Recording, check_scale
from asc_ray.data.decode import _PcmWav, decode

RATE = 44_100
RNG = np.random.default_rng(0)


def noise(seconds: float, rate: int = RATE, channels: int = 1) -> np.ndarray:
    return 0.1 * RNG.standard_normal((round(seconds * rate), channels))


def encoded(samples: np.ndarray, form: str, rate: int = RATE, **options) -> bytes:
    out = io.BytesIO()
    sf.write(out, samples, rate, format=form, **options)
    return out.getvalue()


def heard(path, content: bytes, block: int = 10_000) -> np.ndarray:
    path.write_bytes(content)
    with Recording(path) as recording:
        return np.concatenate([np.zeros((0, recording.channels)), *recording.blocks(block)])


def loud_after_quiet(seconds: float, channels: int = 1) -> np.ndarray:
    """A tone, which takes few bits, and then noise, which takes many: the first frames say little of the mean."""
    tone = 0.3 * np.sin(np.arange(round(seconds * RATE / 6))[:, None] / 20) * np.ones((1, channels))
    return np.concatenate([tone, noise(seconds * 5 / 6, channels=channels)])


def mp3(samples: np.ndarray, counted: bool = True) -> bytes:
    """`counted`: with the header that says how many frames there are."""
    content = encoded(samples, "MP3", bitrate_mode="VARIABLE", compression_level=0.5)
    if counted:
        return content
    assert b"Xing" in content[:200]
    kbits = [0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320][content[2] >> 4]
    return content[144 * kbits * 1000 // RATE + (content[2] >> 1 & 1) :]


@pytest.mark.parametrize("channels", [1, 2])
def test_an_mp3_without_a_count_of_its_frames_is_heard_to_its_end(tmp_path, channels):
    samples = loud_after_quiet(12, channels)
    whole = heard(tmp_path / "whole.mp3", mp3(samples))
    assert len(whole) == len(samples)
    content = mp3(samples, counted=False)
    believed = sf.info(io.BytesIO(content)).frames
    assert believed < 0.6 * len(samples), "libsndfile hears the beginning alone; else this test shows nothing"
    found = heard(tmp_path / "x.mp3", content)
    assert abs(len(found) - len(samples)) < 3 * 1152
    # The same sound, but for the encoder's delay, which the count's frame says more of.
    delay = next(d for d in range(3000) if np.array_equal(found[d : d + 5000], whole[:5000]))
    assert np.array_equal(found[delay:][: len(whole) - 3000], whole[: len(whole) - 3000])


def test_an_mp3_is_heard_behind_a_tag_and_before_one(tmp_path):
    samples = loud_after_quiet(6)
    bare = heard(tmp_path / "x.mp3", mp3(samples, counted=False))
    head = b"ID3\x04\x00\x00\x00\x00\x02\x00" + b"\xff\xfb\x90\x00" * 64  # what looks like a frame is in the tag
    tagged = heard(tmp_path / "y.mp3", head + mp3(samples, counted=False) + b"TAG" + bytes(125))
    assert np.array_equal(bare, tagged)


def test_mp3_files_in_a_row_are_heard_to_the_end(tmp_path):
    one, other = loud_after_quiet(3), noise(2)
    found = heard(tmp_path / "x.mp3", mp3(one) + mp3(other))
    assert len(found) / RATE == pytest.approx(5, abs=0.2)


def test_an_mp3_that_is_cut_short_says_so_where_it_counts_its_frames(tmp_path):
    content = mp3(loud_after_quiet(6))
    with pytest.raises(BadAudio, match=r"cut short: \d+ of 26\d+ samples"):
        heard(tmp_path / "x.mp3", content[: len(content) // 2])
    uncounted = mp3(loud_after_quiet(6), counted=False)
    half = heard(tmp_path / "y.mp3", uncounted[: len(uncounted) // 2])
    assert 2 < len(half) / RATE < 5


def test_a_second_of_mp3_without_a_count_is_a_clip(tmp_path):
    for name, counted in (("a.mp3", True), ("b.mp3", False)):
        (tmp_path / name).write_bytes(mp3(loud_after_quiet(1), counted))
    out = np.empty((2, 32_000), np.int16)
    assert not [r for r in decode([tmp_path / "a.mp3", tmp_path / "b.mp3"], out) if isinstance(r, BadAudio)]


@pytest.mark.parametrize(("subtype", "rate"), [("VORBIS", RATE), ("OPUS", 48_000)])
def test_a_chained_ogg_stream_is_heard_link_by_link(tmp_path, subtype, rate):
    links = [encoded(noise(seconds, rate), "OGG", rate, subtype=subtype) for seconds in (1.0, 2.0, 0.5)]
    alone = [heard(tmp_path / "x.ogg", link) for link in links]
    assert sf.info(io.BytesIO(b"".join(links))).frames == len(alone[0])
    for block in (777, 1_000_000):
        assert np.array_equal(heard(tmp_path / "x.ogg", b"".join(links), block), np.concatenate(alone))


def test_a_chain_of_links_of_other_rates_is_refused(tmp_path):
    links = [encoded(noise(1, rate), "OGG", rate, subtype="VORBIS") for rate in (RATE, 22_050)]
    with pytest.raises(BadAudio, match="joined of parts that differ in rate or channels"):
        heard(tmp_path / "x.ogg", b"".join(links))


def test_a_flac_stream_of_unknown_length_is_heard_to_its_end(tmp_path):
    samples = noise(2.3)
    content = bytearray(encoded(samples, "FLAC", subtype="PCM_16"))
    expected = heard(tmp_path / "x.flac", bytes(content))
    content[21] &= 0xF0  # the number of samples, 36 bits
    content[22:26] = bytes(4)
    assert np.array_equal(heard(tmp_path / "x.flac", bytes(content)), expected)
    content[22:26] = (60 * RATE).to_bytes(4, "big")
    with pytest.raises(BadAudio, match=rf"cut short: {len(samples)} of {60 * RATE} samples"):
        heard(tmp_path / "x.flac", bytes(content))


CONTAINERS = ["WAV", "AIFF", "AU", "W64", "RF64", "WAVEX", "SVX"]


@pytest.mark.parametrize("form", CONTAINERS)
def test_a_container_that_promises_more_than_there_is_is_cut_short(tmp_path, form):
    content = encoded(noise(2), form, subtype="PCM_16")
    assert len(heard(tmp_path / "x", content)) == 2 * RATE
    with pytest.raises(BadAudio, match=r"cut short: \d+ of 88\d+ samples"):
        heard(tmp_path / "x", content[: len(content) * 2 // 3])
    almost = heard(tmp_path / "x", content[:-400])  # less than a tenth of a second
    assert 2 * RATE - 250 <= len(almost) < 2 * RATE


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x80000000])
def test_the_header_of_a_stream_promises_nothing(tmp_path, size):
    content = bytearray(encoded(noise(2), "WAV", subtype="PCM_16"))
    content[40:44] = size.to_bytes(4, "little")
    content[4:8] = min(size + 36, 0xFFFFFFFF).to_bytes(4, "little")
    assert len(heard(tmp_path / "x.wav", bytes(content))) == 2 * RATE


# --- the fast reader of WAV files -------------------------------------------------------------------------------------


def wav(samples: np.ndarray, bits: int = 16, rate: int = 32_000, **changes) -> bytes:
    """A WAV file of int samples (frames, channels), with what is asked for beyond the simplest form."""
    channels = samples.shape[1]
    width = changes.get("width", bits // 8)  # bytes of a sample
    raw = samples.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    tag, valid, guid = changes.get("tag", 1), changes.get("valid", bits), changes.get("guid", b"\1\0")
    block = changes.get("block", channels * width)
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)
    if tag == 0xFFFE:
        fmt += struct.pack("<HHI", 22, valid, 0) + guid + bytes.fromhex("000000001000800000aa00389b71")
    chunks = b"fmt " + struct.pack("<I", len(fmt)) + fmt
    for name, content, padded in changes.get("chunks", ()):
        chunks += name + struct.pack("<I", len(content)) + content + (b"\0" if padded and len(content) % 2 else b"")
    chunks += b"data" + struct.pack("<I", changes.get("size", len(raw))) + raw[: changes.get("kept", len(raw))]
    chunks += changes.get("behind", b"")
    return b"RIFF" + struct.pack("<I", changes.get("riff", len(chunks) + 4)) + b"WAVE" + chunks


def ints(bits: int = 16, channels: int = 1) -> np.ndarray:
    return RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (32_000, channels))


UNUSUAL = {
    "a chunk of odd size without its pad byte": lambda: wav(ints(), chunks=[(b"LIST", b"abc", False)]),
    "a chunk of odd size with its pad byte": lambda: wav(ints(), chunks=[(b"LIST", b"abc", True)]),
    "an unknown chunk": lambda: wav(ints(), chunks=[(b"wxyz", b"abcd", True)]),
    "24 bits in 4 bytes": lambda: wav(ints(24) << 8, bits=24, width=4),
    "24 valid bits of 32": lambda: wav(ints(24) << 8, bits=32, tag=0xFFFE, valid=24),
    "float by its format": lambda: wav(ints(32), bits=32, tag=0xFFFE, guid=b"\3\0"),
    "blocks of another size": lambda: wav(ints(), block=4),
    "data beyond the file": lambda: wav(ints(), size=10**6),
    "data cut": lambda: wav(ints(), kept=1000),
    "RIFF too short": lambda: wav(ints(), riff=100),
    "an odd number of bytes": lambda: wav(ints(), size=63_999),
    "something behind": lambda: wav(ints(), behind=b"LIST\0\0\0\0"),
    "no channels": lambda: wav(ints()).replace(b"\1\0\1\0", b"\1\0\0\0", 1),
    "no format": lambda: wav(ints()).replace(b"fmt ", b"fnt ", 1),
    "half a header": lambda: wav(ints())[:30],
}


@pytest.mark.parametrize("case", UNUSUAL)
def test_what_is_unusual_is_left_to_libsndfile(tmp_path, case):
    path = tmp_path / "x.wav"
    path.write_bytes(UNUSUAL[case]())
    assert_as_libsndfile(path)


PLAIN = {
    "16 bits": lambda: wav(ints()),
    "24 bits": lambda: wav(ints(24), bits=24),
    "32 bits, two channels": lambda: wav(ints(32, 2), bits=32),
    "extensible": lambda: wav(ints(24), bits=24, tag=0xFFFE),
    "a list before": lambda: wav(ints(), chunks=[(b"LIST", b"INFOISFT\2\0\0\0x\0", True)]),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_is_plain_is_read_fast_and_the_same(tmp_path, case):
    path = tmp_path / "x.wav"
    path.write_bytes(PLAIN[case]())
    assert _PcmWav.of(path) is not None
    assert_as_libsndfile(path)


def assert_as_libsndfile(path) -> None:
    """Where the fast reader takes a file, its samples are libsndfile's; and decoding ends with a clip or a reason."""
    fast = _PcmWav.of(path)
    if fast is not None:
        expected, rate = sf.read(path, dtype="float32", always_2d=True)
        assert rate == fast.rate
        assert np.array_equal(fast.samples(path), expected)
    out = np.zeros((1, 32_000), np.int16)
    result = decode([path], out)[0]
    assert isinstance(result, BadAudio) or out.any()


@settings(max_examples=150)
@given(
    bits=st.sampled_from([8, 16, 24, 32]),
    channels=st.integers(1, 3),
    tag=st.sampled_from([1, 3, 0xFFFE]),
    chunks=st.lists(
        st.tuples(st.sampled_from([b"LIST", b"fact", b"wxyz", b"fmt ", b"data"]), st.binary(max_size=9), st.booleans()),
        max_size=2,
    ),
    changes=st.fixed_dictionaries(
        {},
        optional={
            "width": st.integers(1, 4),
            "valid": st.integers(1, 32),
            "block": st.integers(0, 16),
            "size": st.integers(0, 200_000),
            "riff": st.integers(0, 2**32 - 1),
            "kept": st.integers(0, 200_000),
        },
    ),
)
def test_whatever_a_header_says_the_fast_reader_is_right_or_stands_back(
    tmp_path_factory, bits, channels, tag, chunks, changes
):
    path = tmp_path_factory.mktemp("wav") / "x.wav"
    path.write_bytes(wav(ints(16, channels), bits=bits, tag=tag, chunks=chunks, **changes))
    assert_as_libsndfile(path)


@settings(max_examples=150)
@given(
    base=st.sampled_from(["WAV", "FLAC", "OGG", "MP3", "AIFF", "AU"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=8),
    kept=st.floats(0, 1),
)
def test_any_bytes_are_heard_or_refused_with_a_reason(tmp_path_factory, base, edits, kept):
    content = bytearray(BASES[base])
    for place, value in edits:
        content[int(place * (len(content) - 1))] = value
    path = tmp_path_factory.mktemp("any") / "x"
    path.write_bytes(content[: int(kept * len(content))])
    try:
        with Recording(path) as recording:
            for block in recording.blocks(5000):
                assert block.ndim == 2
    except BadAudio as error:
        assert str(error)  # noqa: PT017


BASES = {form: encoded(noise(0.2), form) for form in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU")}


@pytest.mark.parametrize("peak", [0.0, 1e-9, 1.0, 1.7, 7.9])
def test_what_a_float_recording_can_hold_is_taken(peak):
    check_scale(np.array([[0.3 * peak], [-peak]], np.float32))


@pytest.mark.parametrize("samples", [[3.0, -2.0], [1000.0, 0.5], [np.nan, 0], [np.inf, 0], [-9.0, 0.1]])
def test_another_scale_is_refused(samples):
    with pytest.raises(BadAudio, match=r"within \+-1|not finite"):
        check_scale(np.array([samples], np.float32).T)
