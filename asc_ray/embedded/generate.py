"""The files of a bundle's C form, but for what is measured on them."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from asc_ray.embedded.graph import read_network
from asc_ray.embedded.layers import Convolution, Linear, Network, Unknown
from asc_ray.embedded.memory import plan
from asc_ray.embedded.source import frontend_header, labels_source, model_header, model_source, work_bytes
from asc_ray.errors import UserError
from asc_ray.files import read_plain
from asc_ray.runtime import MODEL, Bundle
from asc_ray.runtime.frontend import Frontend
from asc_ray.runtime.onnx_file import MOST_BYTES, read_model

LEAST_N_FFT, MOST_N_FFT = 64, 1 << 15


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
    _check(folder, bundle.frontend)
    try:
        network = read_network(read_model(read_plain(folder / MODEL, MOST_BYTES)))
    except Unknown as error:
        raise UserError(
            f"{folder / MODEL}: has {error}, which the C form does not compute. It knows the int8 networks of "
            "ds_flexinet and cp_mobile; export without --target c, or train one of these"
        ) from None
    placed = plan(network, work_bytes(bundle.frontend))
    written = {file.name: file.read_text() for file in files(__package__).joinpath("c").iterdir()}
    written |= {
        "asc_model.h": model_header(bundle.frontend, bundle.labels),
        "asc_model.c": model_source(network, placed),
        "asc_frontend.h": frontend_header(bundle.frontend, network),
        "asc_labels.c": labels_source(bundle.labels),
    }
    return Source(dict(sorted(written.items())), bundle.frontend.samples, placed.bytes, _weights(network))


def _check(folder: Path, frontend: Frontend) -> None:
    n_fft, window = frontend.n_fft, frontend.window
    if n_fft & (n_fft - 1) or not LEAST_N_FFT <= n_fft <= MOST_N_FFT:
        raise UserError(
            f"{folder}: n_fft is {n_fft}; the C form's transform takes powers of two from {LEAST_N_FFT} to "
            f"{MOST_N_FFT:,}"
        )
    if window > frontend.samples - 1:
        raise UserError(f"{folder}: a window of {window} samples is longer than a clip of {frontend.samples}")


def _weights(network: Network) -> int:
    return sum(int(layer.weights.size) for layer in network.layers if isinstance(layer, Convolution | Linear))
