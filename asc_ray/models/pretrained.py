"""Checkpoints made elsewhere: bare state dicts, Lightning checkpoints, safetensors; read without running their code."""

import io
import json
import os
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from asc_ray.errors import ConfigError
from asc_ray.files import open_plain
from asc_ray.shown import printable

# What training frameworks put before the names of a network's own tensors.
_PREFIX = re.compile(r"^(model|net|module)\.")
_HEAD = re.compile(r"^head(_dist)?\.")
_NAMES_SHOWN = 6
_ABOUT = "asc_ray"  # the entry of safetensors' metadata that is ours
_OF_TENSORS = re.compile(r"torch(\.\w+)+|collections\.(OrderedDict|defaultdict|Counter)")  # calls that make tensors
_LEGACY_PICKLES = 5  # at the beginning of a file of torch before 1.6


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read the network's tensors by name, without a framework's prefixes; tensors beside the network's are left out.

    Raises ConfigError for files that are unreadable, hold no tensors, name two alike, or hold tensors that cannot be
    weights. It also refuses pickles of anything but plain tensors, numbers and text, because loading one could run
    code that came with it.
    """
    stored = read_stored(file)
    for container in ("state_dict", "model"):  # Lightning's, and others'
        if isinstance(stored, Mapping) and isinstance(stored.get(container), Mapping):
            stored = stored[container]
    tensors = {name: value for name, value in _items(stored) if isinstance(value, Tensor)}
    if not tensors:
        raise ConfigError(f"{file}: holds no tensors; a state dict of the network is expected")
    if odd := [name for name in tensors if not isinstance(name, str)]:
        raise ConfigError(f"{file}: names tensors {printable(repr(odd[0]))}; a state dict names them by text")
    while prefixed := [name for name in tensors if _PREFIX.match(name)]:
        bare: dict[str, str] = {}
        for name in prefixed:
            if (other := bare.setdefault(_PREFIX.sub("", name), name)) != name:
                raise ConfigError(f"{file}: {other} and {name} are one tensor's names; keep one network")
        tensors = {own: tensors[name] for own, name in bare.items()}
    if odd := [f"{name} ({kind})" for name, value in tensors.items() if (kind := _odd_kind(value))]:
        raise ConfigError(f"{file}: holds tensors that are no weights: {_some(odd)}; save plain ones")
    return tensors


def read_stored(file: Path) -> Any:
    """Read a checkpoint's file without running code that came with it. Raises ConfigError."""
    try:
        with open_plain(file) as opened:
            if file.suffix == ".safetensors":
                return load_file(file)
            _refuse_more_than_tensors(file, opened)
            opened.seek(0)
            return torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found is None:
            raise ConfigError(f"{file}: cannot be read as a checkpoint (no pickle that torch knows)") from None
        raise _refused(file, found.group(1)) from None
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read as a checkpoint ({error.strerror or error})") from None
    except ConfigError:
        raise
    except Exception as error:  # a cut or forged pickle may raise anything: AttributeError, KeyError, AssertionError
        reason = printable(next(iter(str(error).splitlines()), "") or type(error).__name__)
        raise ConfigError(f"{file}: cannot be read as a checkpoint ({reason[:200]})") from None


def _refuse_more_than_tensors(file: Path, opened: BinaryIO) -> None:
    """Raise ConfigError where a file has packed parts, or a pickle that calls what makes no tensors.

    Packed parts may be a thousand times the file's size. torch's unpickler for plain tensors lets some functions of
    Python be called with anything.
    """
    if zipfile.is_zipfile(opened):
        size = os.fstat(opened.fileno()).st_size
        with zipfile.ZipFile(opened) as archive:
            parts = archive.infolist()
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            if packed or sum(part.file_size for part in parts) > size:
                raise ConfigError(f"{file}: its parts are packed, as torch writes none; save it again with torch.save")
            pickles = [archive.read(part) for part in parts if part.filename.endswith("data.pkl")]
        for content in pickles:
            _refuse_calls(file, io.BytesIO(content))
        return
    opened.seek(0)
    for _ in range(_LEGACY_PICKLES):
        _refuse_calls(file, opened)


def _refuse_calls(file: Path, stream: BinaryIO) -> None:
    """Raise ConfigError if the next pickle of a stream calls what makes no tensors, ValueError if there is none."""
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "STACK_GLOBAL":
            raise _refused(file, "a name that it puts together")
        if opcode.name in ("GLOBAL", "INST") and not _OF_TENSORS.fullmatch(called := str(argument).replace(" ", ".")):
            raise _refused(file, called)


def _refused(file: Path, called: str) -> ConfigError:
    return ConfigError(
        f"{file}: refused: its pickle holds more than plain tensors ({printable(called)[:100]}), and reading that can "
        "run code. Save the state dict alone, best as safetensors"
    )


def _odd_kind(tensor: Tensor) -> str:
    """Return why a network cannot compute with a tensor; empty for a plain one with memory of its own."""
    if tensor.device.type != "cpu":
        return tensor.device.type
    if tensor.is_quantized or tensor.dtype.is_complex:
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.layout is not torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "values that share memory"
    return ""


def metadata(about: Mapping[str, Any]) -> dict[str, str]:
    """Return what our own safetensors say of the network in them, such as its labels and its front end.

    It is one entry, because safetensors writes several in another order each time: equal trainings would differ.
    """
    return {_ABOUT: json.dumps(about)}


def said(file: Path) -> dict[str, Any]:
    """Return what `metadata` put into a file of ours; empty for a file from elsewhere."""
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as stored:
            found = json.loads((stored.metadata() or {}).get(_ABOUT, "{}"))
            return found if isinstance(found, dict) else {}
    except (OSError, ValueError, RecursionError, SafetensorError):  # no file of ours
        return {}


def load_published(model: nn.Module, file: Path, about: Mapping[str, Any]) -> bool:
    """Load all of `model` from `file`; return whether the file says for which scenes and which front end it is.

    `about` says it of `model`. Raises ConfigError where the file says something else, and names the tensors that are
    missing, left over, of another shape or type, not finite, or variances that are not above 0.
    """
    tensors, found = read_tensors(file), said(file)
    _refuse_others(file, found, about)
    _load(model, tensors, file)
    return all(name in found for name in about)


def _refuse_others(file: Path, found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raise ConfigError where a file says something else of its network than `about`."""
    for name, wanted in about.items():
        if name in found and found[name] != (expected := json.loads(json.dumps(wanted))):
            raise ConfigError(
                f"{file}: was trained with {name} {_listed(found[name])}, and here {_listed(expected)} are needed, in "
                "this order"
            )


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else json.dumps(value)


def start_from(
    model: nn.Module, file: Path, labels: Sequence[str], head: Sequence[str], about: Mapping[str, Any]
) -> list[str]:
    """Load a network trained on other classes, as PaSST on AudioSet's 527, and return what was done to make it fit.

    The fresh head stays where the file names other labels than `labels`, or its head has another shape; `head` are its
    tensors, of a PaSST also its normalization. A PaSST's positional grids of another size are interpolated. Raises
    ConfigError as `load_published` does, with `about` for what the file must not say otherwise.
    """
    tensors, own, changes = read_tensors(file), model.state_dict(), []
    _refuse_others(file, said(file), about)
    heads = [name for name in own if _HEAD.match(name)] or head
    others = said(file).get("labels", list(labels)) != list(labels)
    if others or any(name not in tensors or tensors[name].shape != own[name].shape for name in heads):
        changes.append("a fresh head")
        tensors = {name: value for name, value in tensors.items() if not _HEAD.match(name)}
        tensors |= {name: own[name] for name in heads}
    for name in ("freq_new_pos_embed", "time_new_pos_embed"):
        grid, wanted = tensors.get(name), own.get(name)
        if grid is not None and wanted is not None and grid.ndim == 4 and grid.shape != wanted.shape:
            size = (wanted.shape[2], wanted.shape[3])
            tensors[name] = functional.interpolate(grid.float(), size, mode="bilinear", align_corners=False)
            changes.append(f"{name} from {tuple(grid.shape[2:])} to {size}")
    _load(model, tensors, file)
    return changes


def _items(stored: Any) -> Any:
    return stored.items() if isinstance(stored, Mapping) else ()


def _load(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    own = model.state_dict()
    faults = {
        # Counts of batches seen, which some formats drop and nothing uses.
        "missing": [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")],
        "left over": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
            for name, value in own.items()
            if name in tensors and tensors[name].shape != value.shape
        ],
        "of another type": [
            f"{name} {str(tensors[name].dtype).removeprefix('torch.')}"
            for name, value in own.items()
            if name in tensors and not _same_kind(tensors[name], value)
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ConfigError(
            f"{file}: does not fit {type(model).__name__} as configured: {listed}. Compare the recipe's `model`"
        )
    weights = {name: tensors[name].to(value.dtype) for name, value in own.items() if name in tensors}
    faults = {
        "not finite": [name for name, value in weights.items() if not value.isfinite().all()],
        "variances that are not above 0": [
            name for name, value in weights.items() if name.endswith("running_var") and not (value > 0).all()
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise ConfigError(f"{file}: holds no weights that a network can compute with: {listed}")
    model.load_state_dict(weights, strict=False)


def _same_kind(found: Tensor, own: Tensor) -> bool:
    return found.dtype.is_floating_point == own.dtype.is_floating_point


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {len(names) - _NAMES_SHOWN} more" if names[_NAMES_SHOWN:] else "")
