"""A pretended torch device: its tensors say that they are on it, but lie in the host's memory.

The CPU computes what a GPU would compute. What would make a GPU wait is an error: a value that the host needs, or a
tensor that was left on the host. Kernels and bytes are counted as on a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "rehearsal"
# Operators whose result, or its shape, the host has to wait for.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique", "unique", "bincount")


class _Module:
    """The functions that torch expects of a kind of devices."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@cache
def device() -> torch.device:
    """Register the device with torch for the rest of the process, in which real GPUs then stop working."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _AUTOCAST_FALLBACK.fallback(torch.library.fallthrough_kernel, _AUTOCAST)
    _in_bf16(torch.ops.aten.conv2d.default)
    _in_bf16(torch.ops.aten.linear.default)
    _foreach_utils._foreach_supported_types.append(There)  # one kernel for many tensors, as on a GPU
    return torch.device(NAME, 0)


_AUTOCAST = "AutocastPrivateUse1"
_AUTOCAST_FALLBACK = torch.library.Library("_", "IMPL")
_AUTOCAST_OPERATORS = torch.library.Library("aten", "IMPL")


def _in_bf16(operator: Any) -> None:
    """Make torch.autocast compute the operator in bf16, as on a GPU; for this device it must be told."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(torch.bfloat16) if floating else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _AUTOCAST))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return operator(*tree_map(cast, args), **kwargs)

    _AUTOCAST_OPERATORS.impl(operator._schema.name, kernel, _AUTOCAST)


class HostWaits(AssertionError):
    """Within a step the host needs a value from the device, or the device one from the host."""


class There(Tensor):
    """A tensor that says it is on the device; `here` is the tensor on the host that has its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device(),
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.here!r})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{operator} outside Rehearsal")


class _Made(TorchFunctionMode):
    """Makes torch.tensor build on the host and then copy, because a dispatch mode does not see its copy."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            return function(*args, **kwargs | {"device": "cpu"}).to(kwargs["device"])
        return function(*args, **kwargs)


class Rehearsal(TorchDispatchMode):
    """Runs all operators on the device while it is entered; within `strict` nothing may wait."""

    def __init__(self) -> None:
        super().__init__()
        self.device = device()
        self._strict = False
        self._made = _Made()
        self.kernels: list[str] = []
        self.bytes = 0

    def __enter__(self) -> "Rehearsal":
        self._made.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._made.__exit__(*error)

    @contextmanager
    def strict(self) -> Iterator[None]:
        """Count from zero, and raise HostWaits if something waits."""
        self._strict, self.kernels, self.bytes = True, [], 0
        try:
            yield
        finally:
            self._strict = False

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [value for value in given if isinstance(value, There)]
        asked = kwargs.get("device")
        to_device = torch.device(asked).type == NAME if asked is not None else bool(there)
        if not there and not to_device:
            return operator(*args, **kwargs)
        if self._strict:
            self._check(operator, args, given, to_device)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        wrapped = {id(value.here): value for value in there}
        result = operator(*tree_map(_here, args), **tree_map(_here, kwargs))
        if operator._schema.name == "aten::copy_" and not isinstance(args[0], There):
            return args[0]
        made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        size = moved_bytes(operator, [value.here for value in there], made) if self._strict else None
        if size is not None:
            self.kernels.append(operator._schema.name.removeprefix("aten::"))
            self.bytes += size
        if not to_device:
            return result

        def put(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return wrapped[id(value)] if id(value) in wrapped else There(value)

        return tree_map(put, result)

    def _check(self, operator: Any, args: Any, given: list[Tensor], to_device: bool) -> None:
        name = operator.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_", "_unsafe_index") else ()
        if name.startswith(WAITING) or any(index is not None and index.dtype == torch.bool for index in indices):
            raise HostWaits(f"{name} needs a value from the device")
        if not to_device or (name == "copy_" and not isinstance(args[0], There)):
            raise HostWaits(f"{name} brings a tensor of the device to the host")
        left = [tuple(value.shape) for value in given if not isinstance(value, There) and value.dim()]
        if left:
            raise HostWaits(f"{name} takes a tensor that was left on the host, {left[0]}")


def moved_bytes(operator: Any, taken: list[Tensor], made: list[Tensor]) -> int | None:
    """Return the bytes that a call reads and writes on a device, or None if it starts nothing there."""
    places = {value.untyped_storage().data_ptr() for value in taken}
    mutable = operator._schema.is_mutable
    if not mutable and all(value.untyped_storage().data_ptr() in places for value in made):
        return None  # a view
    if "empty" in operator._schema.name:
        return None
    return sum(
        min(value.numel() * value.element_size(), value.untyped_storage().nbytes())
        for value in taken + ([] if mutable else made)
    )


def _here(value: Any) -> Any:
    return value.here if isinstance(value, There) else value
