"""Checkpoints from a stranger, as `teachers.checkpoints`, `student.checkpoint` and `pretrained` name them."""

import builtins
import codecs
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from refusal import refused, sparse
from safetensors.torch import save_file
from torch import nn

from asc_ray.models.pretrained import load_published, metadata, read_tensors, start_from

pytestmark = pytest.mark.timeout(60)


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


STATE = {"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}


def saved(content):
    return lambda path, canary: torch.save(content, path)


def running(function, *arguments):
    def make(path, canary):
        filled = [str(argument).replace("CANARY", str(canary)) for argument in arguments]
        torch.save({**STATE, "x": Call(function, *filled)}, path)

    return make


def bare_pickle(path, canary):
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {canary}")))


def packed(path, canary):
    """A part of 1 GB in a file of 1 MB."""
    stream = io.BytesIO()
    torch.save(STATE, stream)
    with zipfile.ZipFile(stream) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            with bomb.open(name, "w") as part:
                part.write(whole.read(name))
                for _ in range(0 if name.endswith(".pkl") else 64):
                    part.write(bytes(1 << 23))


def expanded(path, canary):
    torch.save({"layer.weight": torch.ones(1).expand(1 << 40), "layer.bias": torch.ones(2)}, path)


def header(text, size=None):
    def make(path, canary):
        path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text)

    return make


def loop(path, canary):
    path.symlink_to(path)


QUANTIZED = torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)
CHECKPOINTS = {
    "a command": ("x.pt", running(os.system, "touch CANARY"), "refused: its pickle holds more than plain tensors"),
    "a command in a bare pickle": ("x.pt", bare_pickle, "cannot be read as a checkpoint|refused: its pickle holds"),
    "an expression": ("x.ckpt", running(eval, "open('CANARY', 'w')"), "refused: its pickle holds"),
    "a statement": ("x.pth", running(exec, "open('CANARY', 'w')"), "refused: its pickle holds"),
    "a file opened": ("x.pt", running(builtins.open, "CANARY", "w"), "refused: its pickle holds"),
    "an import": ("x.pt", running(__import__, "this"), "refused: its pickle holds"),
    "a module of torch": ("x.pt", saved({**STATE, "net": nn.Linear(1, 1)}), "refused: its pickle holds"),
    "memory by a pickle": ("x.pt", saved({**STATE, "x": Call(bytearray, 1 << 40)}), "refused: its pickle holds"),
    "time by a pickle": ("x.pt", saved({"x": Call(codecs.encode, "ab", "punycode")}), "refused: its pickle holds"),
    "a packed part": ("x.pt", packed, "its parts are packed"),
    "values that share memory": ("x.pt", expanded, "values that share memory"),
    "a pipe": ("x.pt", lambda path, canary: os.mkfifo(path), "a named pipe, and not a plain file"),
    "a pipe as safetensors": ("x.safetensors", lambda path, canary: os.mkfifo(path), "a named pipe"),
    "a device": ("x.pt", lambda path, canary: path.symlink_to("/dev/zero"), "a device, and not a plain file"),
    "a folder": ("x.pt", lambda path, canary: path.mkdir(), "a folder, and not a plain file"),
    "links to themselves": ("x.pt", loop, "cannot be read as a checkpoint"),
    "nothing": ("x.pt", lambda path, canary: path.touch(), "cannot be read as a checkpoint"),
    "noise": ("x.pt", lambda path, canary: path.write_bytes(b"\x80\x02" + bytes(range(256))), "cannot be read as"),
    "20 GB of zeros": ("x.pt", lambda path, canary: sparse(path), "cannot be read as a checkpoint"),
    "meta tensors": ("x.pt", saved({name: t.to("meta") for name, t in STATE.items()}), "layer.weight (meta)"),
    "sparse tensors": ("x.pt", saved(STATE | {"layer.weight": torch.ones(2, 3).to_sparse()}), "(sparse_coo)"),
    "compressed rows": ("x.pt", saved(STATE | {"layer.weight": torch.ones(2, 3).to_sparse_csr()}), "(sparse_csr)"),
    "quantized tensors": ("x.pt", saved(STATE | {"layer.weight": QUANTIZED}), "layer.weight (qint8)"),
    "complex tensors": ("x.pt", saved(STATE | {"layer.weight": torch.ones(2, 3, dtype=torch.cfloat)}), "(complex64)"),
    "whole numbers": ("x.pt", saved(STATE | {"layer.weight": torch.ones(2, 3, dtype=torch.long)}), "another type"),
    "names that are numbers": ("x.pt", saved({1: torch.ones(1)}), "names tensors 1"),
    "names that are truths": ("x.pt", saved({True: torch.ones(1)}), "names tensors True"),
    "dictionaries in dictionaries": ("x.pt", saved({"a": {"b": {"layer.weight": torch.ones(1)}}}), "holds no tensors"),
    "a list": ("x.pt", saved([torch.ones(1)]), "holds no tensors"),
    "a number": ("x.pt", saved(3), "holds no tensors"),
    "two networks of one name": (
        "x.pt",
        saved({f"{prefix}.{name}": t for prefix in ("model", "net") for name, t in STATE.items()}),
        "are one tensor's names",
    ),
    "two networks in a third": (
        "x.pt",
        saved({f"module.{prefix}.a": STATE["layer.bias"] for prefix in ("model", "net")}),
        "are one tensor's names",
    ),
    "a header of exabytes": ("x.safetensors", header(b"{}", 1 << 62), "cannot be read as a checkpoint"),
    "a header that is none": ("x.safetensors", header(b"[" * 1000), "cannot be read as a checkpoint"),
    "tensors beyond the file": (
        "x.safetensors",
        header(b'{"a": {"dtype": "F32", "shape": [1000000], "data_offsets": [0, 4000000]}}'),
        "cannot be read as a checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_strangers_checkpoint(tmp_path, canary, kind):
    name, make, message = CHECKPOINTS[kind]
    file = tmp_path / name
    make(file, canary)
    model = Small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    words = message.split("|")
    try:
        refused(lambda: load_published(model, file, {"labels": ["a"]}), str(file), words[0], code=2)
    except AssertionError:
        if len(words) == 1:
            raise
        refused(lambda: load_published(model, file, {"labels": ["a"]}), str(file), words[1], code=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_a_start_interpolates_is_plain_too(tmp_path):
    """A positional grid of another geometry is read before shapes are compared."""
    grid = torch.ones(1).expand(1, 1 << 20, 1 << 10, 1 << 10)
    torch.save({"freq_new_pos_embed": grid, **STATE}, tmp_path / "x.pt")
    refused(lambda: start_from(Small(), tmp_path / "x.pt", ["a"], [], {}), "values that share memory", code=2)


def test_metadata_of_a_stranger_is_compared_and_not_believed(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file(STATE, file, {"asc_ray": "[" * 100_000})
    assert not load_published(Small(), file, {"labels": ["a"]})
    save_file(STATE, file, metadata({"labels": ["b"]}))
    refused(lambda: load_published(Small(), file, {"labels": ["a"]}), "was trained with labels b", code=2)
    assert read_tensors(file).keys() == STATE.keys()
