"""Every parser of ours that reads a file from outside, given what nobody wrote: it reads it or refuses it."""

import contextlib
import copy
import json
import struct

import numpy as np
import onnx
import pytest
import yaml
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asc_ray.audio.recording import BadAudio, Recording
from asc_ray.config.composition import load_config
from asc_ray.config.yaml_text import read_yaml
from asc_ray.data.corpus import read_corpus
from asc_ray.data.decode import decode
from asc_ray.embedded.graph import read_network
from asc_ray.embedded.layers import Unknown
from asc_ray.embedded.memory import plan
from asc_ray.errors import ConfigError, CorpusError, UserError
from asc_ray.int8.bundle import seal
from asc_ray.models.pretrained import read_tensors
from asc_ray.plan import dump
from asc_ray.runtime import Bundle
from asc_ray.runtime.onnx_file import read_model
from asc_ray.runtime.protobuf import NotOurs

pytestmark = pytest.mark.timeout(300)
bounded = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(max_size=8), below, max_size=4),
    max_leaves=12,
)


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes with some changed, taken out, put in, or doubled."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        size = draw(st.sampled_from((1, 2, 8, 200)))
        match draw(st.sampled_from(("change", "cut", "put in", "double", "end"))):
            case "change":
                data[at : at + size] = draw(st.binary(min_size=1, max_size=8))
            case "cut":
                del data[at : at + size]
            case "put in":
                data[at:at] = draw(st.binary(max_size=16))
            case "double":
                data[at:at] = data[at : at + size]
            case "end":
                del data[at:]
    return bytes(data)


@pytest.fixture
def whole(bundle) -> bytes:
    return (bundle / "model.onnx").read_bytes()


@bounded
@given(data=st.data())
def test_a_model_is_read_or_refused(whole, data):
    """And what is read, onnx reads alike: no part is left out."""
    content = data.draw(damaged(whole))
    with contextlib.suppress(NotOurs):
        found = read_model(content)
        other = onnx.load_from_string(content)
        assert found.metadata == {entry.key: entry.value for entry in other.metadata_props}
        assert found.input[0] == other.graph.input[0].name
        assert found.output[0] == other.graph.output[0].name


@bounded
@given(data=st.data())
def test_a_model_has_a_c_form_or_is_refused(whole, data):
    content = data.draw(damaged(whole))
    with contextlib.suppress(NotOurs, Unknown):
        network = read_network(read_model(content))
        assert plan(network, 4).bytes > network.input.bytes


@bounded
@given(content=st.binary(max_size=300))
def test_bytes_are_a_model_or_refused(content):
    with contextlib.suppress(NotOurs):
        read_model(content)


def test_shapes_are_those_that_onnx_infers(whole):
    """Of every value of a real model."""
    from asc_ray.runtime import onnx_file

    found, infer = {}, onnx_file._infer

    def noted(node, shapes, weights):
        name, shape, work = infer(node, shapes, weights)
        found.setdefault(name, tuple(shape))  # of one clip, which comes first
        return name, shape, work

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(onnx_file, "_infer", noted)
        read_model(whole)
    model = onnx.load_from_string(whole)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    inferred = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.value_info
    }
    assert len(inferred) > 50
    assert {name: found[name] for name in inferred} == inferred


@bounded
@given(name=st.sampled_from(("labels.json", "frontend.json")), content=values.map(json.dumps) | st.text())
def test_labels_and_front_ends_are_read_or_refused(bundle, name, content):
    (bundle / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    seal(bundle)
    with contextlib.suppress(UserError):
        Bundle(bundle)


@bounded
@given(name=st.sampled_from(("SHA256SUMS", "labels.json", "frontend.json")), data=st.data())
def test_the_files_of_a_bundle_are_read_or_refused(bundle, name, data):
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data.draw(damaged(content)))
    with contextlib.suppress(UserError):
        Bundle(bundle)
    (bundle / name).write_bytes(content)


@bounded
@given(text=st.text(alphabet=st.sampled_from("abc:{}[],&*!|>-?'\"#%@` \n\t012.~<é"), max_size=120))
def test_yaml_is_read_or_refused(text):
    with contextlib.suppress(ConfigError):
        read_yaml(text, "here")


CONFIGURATION = dump(load_config(TINY))
SECTIONS = [
    *((key,) for key in CONFIGURATION),
    *((key, below) for key, section in CONFIGURATION.items() if isinstance(section, dict) for below in section),
    ("teachers", "systems"), ("teachers", "override"), ("student", "preset"), ("student", "recipe"),
    ("sweep", "preset"), ("base",),
]  # fmt: skip


@bounded
@given(place=st.sampled_from(SECTIONS), value=values)
def test_a_configuration_is_read_or_refused(tmp_path, place, value):
    document = {"base": str(TINY)}
    below = document
    for key in place[:-1]:
        below = below.setdefault(key, {})
    below[place[-1]] = copy.deepcopy(value)
    file = tmp_path / "c.yaml"
    file.write_bytes(yaml.safe_dump(document, allow_unicode=True).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        load_config(file)


META = "filename\tscene_label\tidentifier\tsource_label\n" + "".join(
    f"audio/{n}.wav\tpark\tplace-{n}\ta\n" for n in range(6)
)


@bounded
@given(data=st.data())
def test_a_corpus_is_read_or_refused(tmp_path, data):
    root = tmp_path / "corpus"
    (root / "audio").mkdir(parents=True, exist_ok=True)
    (root / "evaluation_setup").mkdir(exist_ok=True)
    for number in range(6):
        (root / "audio" / f"{number}.wav").write_bytes(b"x")
    lines = META.splitlines()
    names = ["\t".join(line.split("\t")[:2]) for line in lines]
    files = {
        root / "meta.csv": META,
        root / "evaluation_setup" / "fold1_train.csv": "\n".join(names[:4]),
        root / "evaluation_setup" / "fold1_evaluate.csv": "\n".join([names[0], *names[4:]]),
    }
    for path, text in files.items():
        path.write_text(text)
    target = data.draw(st.sampled_from(sorted(files)))
    target.write_bytes(data.draw(damaged(files[target].encode())))
    with contextlib.suppress(CorpusError):
        read_corpus(root)


HEADER = b"RIFF" + struct.pack("<I", 36 + 2000) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 1000, 2000, 2, 16)
SOUND = HEADER + b"data" + struct.pack("<I", 2000) + np.random.default_rng(0).bytes(2000)


@bounded
@given(content=damaged(SOUND))
def test_a_recording_is_heard_or_refused(tmp_path, content):
    file = tmp_path / "a.wav"
    file.write_bytes(content)
    decode([file], np.zeros((1, 32_000), np.int16))
    with contextlib.suppress(BadAudio), Recording(file) as recording:
        for _ in recording.blocks(10_000):
            pass


def checkpoints():
    import io

    import torch
    from safetensors.torch import save

    state = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}
    stream = io.BytesIO()
    torch.save(state, stream)
    return {".pt": stream.getvalue(), ".safetensors": save(state)}


CHECKPOINTS = checkpoints()


@bounded
@given(suffix=st.sampled_from(sorted(CHECKPOINTS)), data=st.data())
def test_a_checkpoint_is_read_or_refused(tmp_path, suffix, data):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(data.draw(damaged(CHECKPOINTS[suffix])))
    with contextlib.suppress(ConfigError):
        read_tensors(file)
