"""The files of a bundle's C form, but for what is measured on them."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from asc_ray.embedded.graph import read_network
from asc_ray.embedded.layers import Convolution, Linear, Network, Unknown
from asc_ray.embedded.memory import Plan, plan
from asc_ray.embedded.source import frontend_header, labels_source, model_header, model_source, read_samples, work_bytes
from asc_ray.errors import UserError
from asc_ray.files import read_plain
from asc_ray.runtime import MODEL, Bundle
from asc_ray.runtime.frontend import Frontend
from asc_ray.runtime.onnx_file import MOST_BYTES, read_model

LEAST_N_FFT, MOST_N_FFT = 64, 1 << 15
LEAST_MEL_STEP, MOST_MEL_STEP = 1e-5, 1.0  # 255 steps of 0.02 span all that is heard


@dataclass(frozen=True)
class Source:
    """`files`: text by name; `samples`: of a clip; `arena`: bytes of RAM that the network and the front end share;
    `weights`: bytes of int8 weights, without the channels of zeros that onnxruntime's form has.
    """

    files: dict[str, str]
    samples: int
    arena: int
    weights: int


def generate(folder: Path) -> Source:
    """Return the C form of the bundle in `folder`; the same bundle gives the same text.

    Raises UserError for a bundle that is not as it was exported, and for a network, an operator or a front end that has
    no C form.
    """
    bundle = Bundle(folder)
    network, placed = planned(str(folder / MODEL), read_plain(folder / MODEL, MOST_BYTES), bundle.frontend)
    written = {file.name: file.read_text() for file in files(__package__).joinpath("c").iterdir()}
    written |= {
        "asc_model.h": model_header(bundle.frontend, bundle.labels),
        "asc_model.c": model_source(network, placed),
        "asc_frontend.h": frontend_header(bundle.frontend, network),
        "asc_labels.c": labels_source(bundle.labels),
    }
    return Source(dict(sorted(written.items())), bundle.frontend.samples, placed.bytes, weight_bytes(network))


def planned(name: str, model: bytes, frontend: Frontend) -> tuple[Network, Plan]:
    """Return the layers of an ONNX file and their places in the arena.

    Raises UserError, beginning with `name`, for what has no C form: the network, an operator, or the front end.
    """
    _check(name, frontend)
    try:
        network = read_network(read_model(model))
        if not LEAST_MEL_STEP <= network.input.step <= MOST_MEL_STEP:
            raise Unknown(f"QuantizeLinear of the log-mel in steps of {network.input.step}")
    except Unknown as error:
        raise UserError(
            f"{name}: has {error}, which the C form does not compute. It knows the int8 networks of ds_flexinet and "
            "cp_mobile; export without --target c, or train one of these"
        ) from None
    return network, plan(network, work_bytes(frontend))


def weight_bytes(network: Network) -> int:
    return sum(int(layer.weights.size) for layer in network.layers if isinstance(layer, Convolution | Linear))


def _check(name: str, frontend: Frontend) -> None:
    n_fft, window = frontend.n_fft, frontend.window
    if n_fft & (n_fft - 1) or not LEAST_N_FFT <= n_fft <= MOST_N_FFT:
        raise UserError(
            f"{name}: n_fft is {n_fft}; the C form's transform takes powers of two from {LEAST_N_FFT} to {MOST_N_FFT:,}"
        )
    if max(read_samples(frontend), frontend.hop) > frontend.samples - 1:
        raise UserError(
            f"{name}: a window of {window} samples, or a hop of {frontend.hop}, is too long for a clip of "
            f"{frontend.samples:,}"
        )
