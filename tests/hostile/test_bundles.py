"""Bundles from a stranger: `verify`, `predict` and a device open them alike."""

import io
import json
import os
import pickle
import socket
import subprocess
import sys
import zipfile
from hashlib import sha256

import numpy as np
import onnx
import pytest
import soundfile as sf
import torch
from conftest import BUNDLE_LABELS, command
from onnx import TensorProto, helper
from refusal import refused, replaced, sparse

from asc_ray.int8.bundle import seal
from asc_ray.runtime import Bundle, verify

pytestmark = pytest.mark.timeout(60)
SUMS = "SHA256SUMS"


def listed(folder, *lines):
    with (folder / SUMS).open("a") as sums:
        sums.writelines(f"{line}\n" for line in lines)


def bind(path):
    socket.socket(socket.AF_UNIX).bind(str(path))


DIGEST = "0" * 64
FILES = {
    "sums that name a file above": (lambda f: listed(f, f"{DIGEST}  ../x"), "not a list of checksums"),
    "sums that name the folder above": (lambda f: listed(f, f"{DIGEST}  .."), "not a list of checksums"),
    "sums with an absolute name": (lambda f: listed(f, f"{DIGEST}  /etc/passwd"), "not a list of checksums"),
    "sums with a Windows path": (lambda f: listed(f, f"{DIGEST}  ..\\x"), "not a list of checksums"),
    "sums of themselves": (lambda f: listed(f, f"{DIGEST}  {SUMS}"), "not a list of checksums"),
    "a name longer than a file system's": (lambda f: listed(f, f"{DIGEST}  {'x' * 300}"), "not a list of checksums"),
    "a name with an escape": (lambda f: listed(f, f"{DIGEST}  \x1b[2Jx"), "not a list of checksums"),
    "a name with a zero byte": (lambda f: listed(f, f"{DIGEST}  a\0b"), "not a list of checksums"),
    "a name twice": (lambda f: listed(f, f"{DIGEST}  labels.json"), "not a list of checksums"),
    "more files than a bundle has": (
        lambda f: listed(f, *(f"{DIGEST}  {number}" for number in range(100))),
        "not a list of checksums",
    ),
    "sums that are no text": (lambda f: (f / SUMS).write_bytes(b"\xff\xfe\0"), "not a list of checksums"),
    "sums of 20 GB": (replaced(SUMS, sparse), "allowed are 1,048,576"),
    "sums in a pipe": (replaced(SUMS, os.mkfifo), "a named pipe, and not a plain file"),
    "sums behind a link": (replaced(SUMS, lambda p: p.symlink_to("/dev/zero")), "a symbolic link"),
    "labels of 20 GB": (replaced("labels.json", sparse), "labels.json: 21,474,836,480 bytes"),
    "a model of 20 GB": (replaced("model.onnx", sparse), "model.onnx: 21,474,836,480 bytes"),
    "labels in a pipe": (replaced("labels.json", os.mkfifo), "labels.json: a named pipe"),
    "labels in a socket": (replaced("labels.json", bind), "labels.json: a socket"),
    "labels in a folder": (replaced("labels.json", os.mkdir), "labels.json: a folder"),
    "labels behind a link": (
        replaced("labels.json", lambda p: p.symlink_to("/etc/passwd")),
        "labels.json: a symbolic link",
    ),
    "a model behind a link to a device": (
        replaced("model.onnx", lambda p: p.symlink_to("/dev/zero")),
        "model.onnx: a symbolic link",
    ),
    "a link to itself": (
        replaced("frontend.json", lambda p: p.symlink_to(p)),
        "frontend.json: a symbolic link",
    ),
    "a card that cannot be read": (replaced("card.md", os.mkfifo), "card.md: a named pipe"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_none(bundle, kind):
    damage, message = FILES[kind]
    damage(bundle)
    refused(lambda: verify(bundle), message)
    refused(lambda: Bundle(bundle), message)


def written(name, text):
    def write(folder):
        (folder / name).write_text(text, encoding="utf-8")
        model = onnx.load(folder / "model.onnx")
        entries = {entry.key: entry.value for entry in model.metadata_props} | {name: text}
        helper.set_model_props(model, entries)  # the model says the same: it is no other bundle's
        onnx.save(model, folder / "model.onnx")

    return write


FRONTEND = {
    "sample_rate": 32000, "samples": 32000, "n_fft": 4096, "window": 3072, "hop": 1000, "mels": 64, "fmin": 0.0,
    "fmax": 16000.0,
}  # fmt: skip


def labels(*names):
    return written("labels.json", json.dumps(names))


def frontend(**changes):
    return written("frontend.json", json.dumps(FRONTEND | changes))


TEXTS = {
    "a label twice": (labels("a", "a", "b", "c"), "4 labels, 3 different"),
    "no label": (written("labels.json", "[]"), "0 labels"),
    "an empty label": (labels("", "a", "b", "c"), "allowed are up to"),
    "a label of blanks": (labels(" ", "a", "b", "c"), "allowed are up to"),
    "a label with a blank behind": (labels("a ", "a", "b", "c"), "allowed are up to"),
    "a label with an escape": (labels("\x1b]0;x\x07", "a", "b", "c"), "\\x1b"),
    "a label of two lines": (labels("a\nb", "c", "d", "e"), "allowed are up to"),
    "a label that turns the line": (labels("\u202egnp", "a", "b", "c"), "\\u202e"),
    "a label of nothing to see": (labels("\u200b", "a", "b", "c"), "\\u200b"),
    "a label of half a character": (written("labels.json", '["\\ud800", "a", "b", "c"]'), "\\ud800"),
    "a label of a million characters": (labels("x" * 900_000, "a", "b", "c"), "allowed are up to"),
    "more labels than scenes": (labels(*map(str, range(5000))), "5000 labels"),
    "labels more than outputs": (labels(*"abcde"), "gives logits (4,), but labels.json has 5 labels"),
    "numbers for labels": (written("labels.json", "[1, 2, 3, 4]"), "a list of scenes is expected"),
    "labels in labels": (written("labels.json", '[["a"]]'), "a list of scenes is expected"),
    "JSON of 100,000 levels": (written("labels.json", "[" * 100_000), "not valid JSON"),
    "a number of a million digits": (written("labels.json", "1" * 1_000_000), "not valid JSON"),
    "no text": (lambda f: (f / "labels.json").write_bytes(b"\xff\xff"), "not valid JSON"),
    "a key twice": (
        written("frontend.json", json.dumps(FRONTEND)[:-1] + ', "hop": 500}'),
        "a key is there twice",
    ),
    "a spectrum of 4 GB": (frontend(n_fft=1 << 30, window=4), "whole numbers from 1 to"),
    "frames without end": (frontend(hop=1, samples=1 << 22, n_fft=1 << 12), "more than a front end takes"),
    "a million mels": (frontend(mels=1_000_000), "more than a front end takes"),
    "a clip of a year": (frontend(samples=10**12), "whole numbers from 1 to"),
    "a window longer than its transform": (frontend(window=8192), "must not exceed n_fft"),
    "truth for a number": (frontend(hop=True), "whole numbers from 1 to"),
    "a number with a fraction": (frontend(hop=1000.0), "whole numbers from 1 to"),
    "a frequency that is none": (written("frontend.json", json.dumps(FRONTEND | {"fmax": float("nan")})), "fmax nan"),
    "an endless frequency": (written("frontend.json", json.dumps(FRONTEND | {"fmax": float("inf")})), "fmax inf"),
    "a frequency in a list": (frontend(fmin=[0]), "fmin [0]"),
    "a clip of nothing": (frontend(samples=32), "a tenth of a second at least"),
    "a rate beyond sound": (frontend(sample_rate=4_000_000, samples=4_000_000, hop=100_000), "1 kHz to 1 MHz"),
    "a rate below zero": (frontend(sample_rate=-1), "whole numbers from 1 to"),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_labels_and_front_ends_that_are_none(bundle, kind):
    damage, message = TEXTS[kind]
    damage(bundle)
    seal(bundle)
    refused(lambda: verify(bundle), message)


def edited(change):
    def write(folder):
        model = onnx.load(folder / "model.onnx")
        change(model)
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return write


def external(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def node(kind, inputs=("mel",), **attributes):
    def add(model):
        model.graph.node.insert(0, helper.make_node(kind, list(inputs), ["odd"], **attributes))

    return add


def body():
    value = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    keep = helper.make_tensor_value_info("keep", TensorProto.BOOL, [])
    return helper.make_graph([], "endless", [value, keep], [keep])


def weight(name, shape, kind=TensorProto.FLOAT, raw=None):
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    tensor.raw_data = np.ones(shape, np.float32).tobytes() if raw is None else raw
    return tensor


def big_kernel(model):
    model.graph.initializer.append(weight("one", [1, 1, 1, 1]))
    node("Conv", ("mel", "one"), pads=[10**9] * 4)(model)


def broadcast(model):
    """Weights of 100 kB in all, whose sum would take 400 TB."""
    for axis in range(4):
        shape = [1, 1, 1, 1]
        shape[axis] = 10_000
        model.graph.initializer.append(weight(f"w{axis}", shape))
    for axis in range(3):
        inputs = [f"s{axis}", f"w{axis + 1}"] if axis else ["w0", "w1"]
        model.graph.node.insert(axis, helper.make_node("Add", inputs, [f"s{axis + 1}"]))


def work(model):
    """A network that takes an hour a clip, in memory that is nothing special."""
    model.graph.initializer.append(weight("kernel", [64, 1, 31, 31]))
    model.graph.initializer.append(weight("wide", [64, 64, 31, 31]))
    same = {"pads": [15] * 4}
    model.graph.node.insert(0, helper.make_node("Conv", ["mel", "kernel"], ["c0"], **same))
    for number in range(40):
        model.graph.node.insert(
            number + 1, helper.make_node("Conv", [f"c{number}", "wide"], [f"c{number + 1}"], **same)
        )


def wide_kernel(model):
    model.graph.initializer.append(weight("wide", [1, 1, 64, 32]))
    node("Conv", ("mel", "wide"), pads=[64, 512, 64, 512])(model)


def wide_sum(model):
    """8 million elements of two small weights."""
    model.graph.initializer.append(weight("a", [1, 2048, 1, 1]))
    model.graph.initializer.append(weight("b", [1, 1, 64, 64]))
    node("Add", ("a", "b"))(model)


def many_sums(model):
    """2 million elements, 40 times."""
    model.graph.initializer.append(weight("a", [1, 2048, 1, 1]))
    model.graph.initializer.append(weight("b", [1, 1, 32, 32]))
    model.graph.node.insert(0, helper.make_node("Add", ["a", "b"], ["r0"]))
    for number in range(40):
        model.graph.node.insert(number + 1, helper.make_node("Relu", [f"r{number}"], [f"r{number + 1}"]))


def many_products(model):
    """A billion products of 2,048 channels by 2,048, in little memory, twice."""
    model.graph.initializer.append(weight("plane", [1, 2048, 16, 16]))
    model.graph.initializer.append(weight("square", [2048, 2048, 1, 1], TensorProto.INT8, bytes(1 << 22)))
    for number in range(2):
        model.graph.node.insert(0, helper.make_node("Conv", ["plane", "square"], [f"c{number}"]))


def mixed(model):
    model.graph.initializer.append(weight("flat", [2], TensorProto.INT64, np.array([1, -1]).tobytes()))
    node("Reshape", ("mel", "flat"))(model)


def averaged(model):
    model.graph.initializer.append(weight("first", [1], TensorProto.INT64, np.array([0]).tobytes()))
    node("ReduceMean", ("mel", "first"))(model)


def turned(model):
    for name, value in (("from", -1), ("to", -(2**40)), ("axis", 0), ("step", -1)):
        model.graph.initializer.append(weight(name, [1], TensorProto.INT64, np.array([value]).tobytes()))
    node("Slice", ("mel", "from", "to", "axis", "step"))(model)


def spoiled(value):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT)
        numbers = np.frombuffer(tensor.raw_data, np.float32).copy()
        numbers[0] = value
        tensor.raw_data = numbers.tobytes()

    return change


def first(model):
    return model.graph.initializer[0]


def infinite(model):
    found = next(n for n in model.graph.node if n.op_type == "Gemm")
    del found.attribute[:]
    found.attribute.append(helper.make_attribute("alpha", float("inf")))


def reshaped(model):
    found = next(n for n in model.graph.node if n.op_type == "Reshape")
    shape = next(t for t in model.graph.initializer if t.name == found.input[1])
    shape.raw_data = np.array([2**40, -(2**40)], np.int64).tobytes()


MODELS = {
    "a weight in another file": (external, "field 13 of a tensor"),
    "a loop without end": (node("Loop", ("", "", "mel"), body=body()), "field 6 of a attribute"),
    "a choice of graphs": (node("If", ("mel",), then_branch=body(), else_branch=body()), "field 6 of a attribute"),
    "a scan": (node("Scan", ("mel",), num_scan_inputs=1), "the operator Scan"),
    "an operator that writes": (node("Print", domain="com.evil"), "the operator com.evil Print"),
    "a Python operator": (node("PyOp", domain="ai.onnx.contrib"), "the operator ai.onnx.contrib PyOp"),
    "an operator of no short list": (node("ConstantOfShape"), "the operator ConstantOfShape"),
    "an operator that grows": (node("Expand", ("mel", "mel")), "the operator Expand"),
    "a random one": (node("RandomNormal", (), shape=[10**6]), "the operator RandomNormal"),
    "an attribute too many": (node("Relu", alpha=1.0), "the attribute 'alpha' of Relu"),
    "an attribute that is endless": (infinite, "the attribute 'alpha' of Gemm is not finite"),
    "padding of a billion": (big_kernel, "a Conv that takes"),
    "a pool of a billion": (node("MaxPool", kernel_shape=[10**9, 1]), "a MaxPool that takes"),
    "a stride of nothing": (node("MaxPool", kernel_shape=[2, 2], strides=[0, 0]), "a MaxPool that takes"),
    "padding chosen by the engine": (node("MaxPool", kernel_shape=[2, 2], auto_pad="SAME_UPPER"), "auto_pad"),
    "sums of 400 TB": (broadcast, "more memory or work"),
    "an hour of work a clip": (work, "more memory or work"),
    "a sum of eight million": (wide_sum, "a Add of shape (1, 2048, 64, 64): more memory or work"),
    "sums of two million, forty times": (many_sums, "a Relu of shape (1, 2048, 32, 32): more memory or work"),
    "two billion products": (many_products, "a Conv of shape (1, 2048, 16, 16): more memory or work"),
    "a weight of 300,000 dimensions": (lambda m: first(m).dims.extend([1] * 300_000), "more than 200,000 parts"),
    "a kernel as large as the clip": (wide_kernel, "more memory or work"),
    "clips that are mixed": (mixed, "mixes clips"),
    "a mean over clips": (averaged, "mixes clips"),
    "clips in the other order": (turned, "a Slice that takes"),
    "clips in place of channels": (node("Transpose", perm=[1, 0, 2, 3]), "mixes clips"),
    "clips after clips": (node("Concat", ("mel", "mel"), axis=0), "mixes clips"),
    "axes that are none": (node("Transpose", perm=[0, 2, 2, 3]), "a Transpose that takes"),
    "ten thousand nodes": (
        lambda m: m.graph.node.extend([helper.make_node("Relu", ["mel"], [f"r{i}"]) for i in range(10_000)]),
        "nodes; allowed are",
    ),
    "a weight that is not finite": (spoiled(np.nan), "is not finite"),
    "an endless weight": (spoiled(np.inf), "is not finite"),
    "a weight of a billion by a billion": (lambda m: first(m).dims.extend([10**9, 10**9]), "a shape of"),
    "a weight of less than nothing": (lambda m: first(m).dims.extend([-1]), "a shape of"),
    "a weight shorter than it says": (lambda m: first(m).dims.extend([7]), "in"),
    "a weight of words": (
        lambda m: m.graph.initializer.append(helper.make_tensor("s", TensorProto.STRING, [1], [b"x"])),
        "field 6 of a tensor",
    ),
    "a weight of another kind": (
        lambda m: m.graph.initializer.append(weight("h", [2], TensorProto.FLOAT16, b"\0\0\0\0")),
        "a weight of ONNX's type 10",
    ),
    "a weight's name twice": (lambda m: m.graph.initializer.append(first(m)), "is there twice"),
    "a value's name twice": (lambda m: m.graph.node.append(m.graph.node[0]), "is there twice"),
    "a value that is nowhere": (node("Relu", ("nothing",)), "are not there: 'nothing'"),
    "nodes in a circle": (node("Relu", ("odd",)), "are not there: 'odd'"),
    "a shape of a trillion": (reshaped, "a Reshape that takes"),
    "two inputs": (lambda m: m.graph.input.append(m.graph.input[0]), "2 inputs and 1 outputs"),
    "no output": (lambda m: m.graph.ClearField("output"), "1 inputs and 0 outputs"),
    "an output that lies": (
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 9),
        "is said to have the shape",
    ),
    "an input of another type": (
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", TensorProto.DOUBLE),
        "no float tensor",
    ),
    "functions": (
        lambda m: m.functions.append(helper.make_function("d", "f", [], [], [], m.opset_import)),
        "field 25 of a model",
    ),
    "training": (lambda m: m.training_info.add(), "field 20 of a model"),
    "weights of another layout": (lambda m: m.graph.sparse_initializer.add(), "field 15 of a graph"),
    "operators of others": (lambda m: m.opset_import.append(helper.make_opsetid("evil", 1)), "domain"),
    "metadata twice": (lambda m: m.metadata_props.append(m.metadata_props[0]), "metadata occurs twice"),
    "another program's": (lambda m: m.ClearField("metadata_props"), "not a model of `asc-ray export`"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_no_exporter_of_ours_wrote(bundle, kind):
    change, message = MODELS[kind]
    edited(change)(bundle)
    seal(bundle)
    refused(lambda: verify(bundle), "model.onnx", message)


def varint(number):
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


BYTES = {
    "nothing": (lambda whole: b"", "no"),
    "noise": (lambda whole: np.random.default_rng(0).bytes(10_000), "model.onnx: holds"),
    "half of it": (lambda whole: whole[: len(whole) // 2], "cut short"),
    "another model behind it": (lambda whole: whole + whole, "twice"),
    "a second graph": (lambda whole: whole + b"\x3a\x00", "field 7 of a model twice"),
    "a group": (lambda whole: whole + b"\x0b\x0c", "no ONNX"),
    "a length beyond the end": (lambda whole: whole + b"\x3a" + varint(1 << 62), "cut short"),
    "a number without end": (lambda whole: whole + b"\x08" + b"\xff" * 30, "a number of more than 64 bits"),
    "a field of a billion": (lambda whole: whole + varint((1 << 30) << 3) + b"\0", "of a model"),
    "a field of another encoding": (lambda whole: whole + b"\x3d\0\0\0\0", "in another encoding"),
    "a name that is no text": (lambda whole: whole + b"\x12\x01\xff", "a name that is no text"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_that_are_no_model(bundle, kind):
    change, message = BYTES[kind]
    file = bundle / "model.onnx"
    file.write_bytes(change(file.read_bytes()))
    seal(bundle)
    refused(lambda: verify(bundle), "model.onnx", message)


class Payload:
    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return open, (self.canary, "w")


def archive(parts):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    return stream.getvalue()


def exported():
    stream = io.BytesIO()
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)), stream)
    with zipfile.ZipFile(stream) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def two_directories(parts, harmless):
    """An archive whose directory at the end is the harmless one's, for a reader that looks for another first."""
    return archive(parts) + archive(harmless)


def program(parts, change):
    name = next(name for name in parts if name.endswith("models/model.json"))
    document = json.loads(parts[name])
    change(document)
    return {**parts, name: json.dumps(document).encode()}


PROGRAMS = {
    "a guard": lambda parts, run: archive(program(parts, lambda d: d.update(guards_code=[run]))),
    "a compiled library": lambda parts, run: archive({**parts, "archive/data/aotinductor/model/x.so": b"\x7fELF"}),
    "its program under another suffix": lambda parts, run: archive(
        {name.replace("model.json", "model.txt"): part for name, part in program(
            parts, lambda d: d.update(guards_code=[run])).items()}
    ),
    "its program without a suffix": lambda parts, run: archive(
        {name.replace("model.json", "model"): part for name, part in parts.items()} | {"code": run.encode()}
    ),
    "the layout of older versions": lambda parts, run: archive(
        {"serialized_exported_program.json": run.encode(), "version": b"7.0",
         "serialized_state_dict.pt": pickle.dumps(Payload(run))}
    ),
    "two directories": lambda parts, run: two_directories(
        program(parts, lambda d: d.update(guards_code=[run])), parts
    ),
    "a pickle": lambda parts, run: archive(
        {**parts, "archive/data/sample_inputs/model.pt": pickle.dumps(Payload(run))}
    ),
    "an expression": lambda parts, run: archive(
        {name: part.replace(b'"as_sym_int"', json.dumps(run).encode()) for name, part in parts.items()}
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROGRAMS)
def test_torchs_own_form_is_never_opened(bundle, canary, kind, monkeypatch):
    """A bundle may hold one, as those of earlier versions do: it is a file that is compared with its checksum."""
    content = PROGRAMS[kind](exported(), f"open({str(canary)!r}, 'w')")
    (bundle / "model.pt2").write_bytes(content)
    seal(bundle)
    opened = []
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: opened.append(1))
    monkeypatch.setattr(torch, "load", lambda *_, **__: opened.append(1))
    assert verify(bundle)["files"]["model.pt2"] == len(content)
    assert Bundle(bundle).labels == BUNDLE_LABELS
    assert not opened


def test_a_stranger_is_answered_by_the_command(bundle, canary, tmp_path):
    """By one line, and without torch."""
    (bundle / "model.pt2").write_bytes(pickle.dumps(Payload(canary)))
    seal(bundle)
    fine = subprocess.run(command("verify", bundle), capture_output=True, text=True, check=False)
    assert (fine.returncode, fine.stderr) == (0, "")
    edited(node("Loop", ("", "", "mel"), body=body()))(bundle)
    seal(bundle)
    for words in (("verify", bundle), ("predict", bundle, tmp_path)):
        done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("asc-ray: ")
        assert done.stderr.count("\n") == 1
        assert "Traceback" not in done.stderr
    code = "import sys; sys.argv = ['asc-ray', 'verify', sys.argv[1]]\nfrom asc_ray.cli import main\ntry:\n main()\n"
    code += "except SystemExit: pass\nprint('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "False"


def test_names_of_files_do_not_steer_a_terminal(bundle, tmp_path):
    """Nor start a formula where a table is opened."""
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    stream = io.BytesIO()
    sf.write(stream, np.random.default_rng(0).uniform(-0.1, 0.1, 32_000), 32_000, format="WAV")
    for name in ("=cmd|x.wav", "\x1b[31mred.wav", "-x.wav"):
        (recordings / name).write_bytes(stream.getvalue())
    (recordings / "\x1b[2Jbroken.wav").write_bytes(b"RIFF")
    for form in ("table", "csv", "jsonl"):
        words = command("predict", bundle, recordings, "--format", form)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "\x1b" not in done.stdout + done.stderr
        if form == "csv":
            names = [line.split("\t")[0] for line in done.stdout.splitlines()[1:]]
            assert names == ["\\x1b[31mred.wav", "./-x.wav", "./=cmd|x.wav"]


def test_the_sums_are_of_the_bytes_that_are_used(bundle):
    """Each file is read once: what was compared is what is opened."""
    content = {path.name: path.read_bytes() for path in bundle.iterdir()}
    for line in content[SUMS].decode().splitlines():
        digest, name = line.split("  ")
        assert sha256(content[name]).hexdigest() == digest
