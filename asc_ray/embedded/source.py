"""The C text of a network and of its front end's tables."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from asc_ray.embedded.layers import (
    Convolution,
    Layer,
    Linear,
    MaxPool,
    Mean,
    MeanLogits,
    Network,
    ResidualNorm,
    ResponseNorm,
    Sum,
    made,
    taken,
)
from asc_ray.embedded.memory import WORK, Plan, scratch
from asc_ray.runtime.frontend import Frontend, hann_window, mel_places

_WIDTH = 110  # columns of a table's line


def model_header(frontend: Frontend, labels: Sequence[str]) -> str:
    return f"""/* A scene classifier: one clip of 16-bit samples, mono, to one score a scene. */
#ifndef ASC_MODEL_H
#define ASC_MODEL_H

#include <stdint.h>

#define ASC_SAMPLE_RATE {frontend.sample_rate}
#define ASC_SAMPLES {frontend.samples}
#define ASC_LABELS {len(labels)}

extern const char *const asc_labels[ASC_LABELS];

/* Write the logit of each scene; the largest names the scene. All memory is static, so one call at a time. */
void asc_scores(const int16_t samples[ASC_SAMPLES], float logits[ASC_LABELS]);

/* The halves of asc_scores: the front end writes rounded log-mels into the arena, and the network reads them. */
void asc_listen(const int16_t samples[ASC_SAMPLES]);
void asc_name(float logits[ASC_LABELS]);

/* The rounded log-mels, {frontend.mels} bins of {frontend.frames} frames; asc_name overwrites them. */
uint8_t *asc_mels(void);

#endif
"""


def labels_source(labels: Sequence[str]) -> str:
    names = "\n".join(f"    {_text(label)}," for label in labels)
    return f'#include "asc_model.h"\n\nconst char *const asc_labels[ASC_LABELS] = {{\n{names}\n}};\n'


def model_source(network: Network, plan: Plan) -> str:
    """Return the weights as tables, and the layers as calls of the kernels, in their order."""
    tables: list[str] = []
    calls = [
        f"    /* {n}: {_told(layer)} */\n    {_call(n, layer, plan, tables)}"
        for n, layer in enumerate(network.layers, start=1)
    ]
    return f"""/* The network: weights, and one call a layer. Written by asc-ray; do not edit. */
#include "asc_model.h"

#include "asc_frontend.h"
#include "asc_kernels.h"

/* Every value has its place in here, planned by lifetimes. */
static union {{
    double aligned;
    uint8_t bytes[{plan.bytes}];
}} asc_arena;

#define AT(place) (asc_arena.bytes + (place))
#define FLOATS_AT(place) ((float *)(void *)AT(place))
#define COMPLEX_AT(place) ((asc_complex *)(void *)AT(place))

{chr(10).join(tables)}
uint8_t *asc_mels(void)
{{
    return AT({plan.at[network.input.name]});
}}

void asc_listen(const int16_t samples[ASC_SAMPLES])
{{
    asc_log_mel(samples, asc_mels(), COMPLEX_AT({plan.at[WORK]}));
}}

void asc_name(float logits[ASC_LABELS])
{{
{chr(10).join(calls)}
}}

void asc_scores(const int16_t samples[ASC_SAMPLES], float logits[ASC_LABELS])
{{
    asc_listen(samples);
    asc_name(logits);
}}
"""


def frontend_header(frontend: Frontend, network: Network) -> str:
    """Return the settings and the tables of `asc_frontend.c`."""
    f, step, zero = frontend, np.float64(network.input.step), network.input.zero
    at, edges = mel_places(f.sample_rate, f.n_fft, f.mels, f.fmin, f.fmax)
    starts = np.maximum(1, np.searchsorted(at, edges))  # bin 0 can only lie on the first edge, where its weight is 0
    side = np.searchsorted(edges, at[starts[0] : starts[-1]], side="right") - 1
    rise = (at[starts[0] : starts[-1]] - edges[side]) / (edges[side + 1] - edges[side])
    # Samples are hundredths of 16-bit steps, and two frames in one transform give twice the spectrum.
    rows = _rows(f)
    filled = read_samples(f) * rows // f.n_fft
    window = np.pad(hann_window(f.window) / (200.0 * 2**15), (0, read_samples(f) - f.window))
    turns = np.arange(f.n_fft // 8) / f.n_fft
    twiddles = np.exp(-2j * np.pi * np.stack([2 * turns, turns, turns + 1 / 8], axis=1))
    # The rounded log-mel is n + 1 or more where log(x) is at least 5 (n + 1/2 - zero) step - 4.5, with x below e^88.
    growth = np.exp(np.minimum(88, 5 * step * (np.arange(255) + 0.5 - zero) - 4.5)).astype(np.float32)
    slope = np.log(2) / (5 * step)
    shift = 4.5 / (5 * step) + zero + 0.5 - 127 * slope
    return f"""/* Settings and tables of the front end. Written by asc-ray; do not edit. */
#ifndef ASC_FRONTEND_H
#define ASC_FRONTEND_H

#include <stdint.h>

#include "asc_model.h"

#define ASC_N_FFT {f.n_fft}
#define ASC_ROWS {rows} /* points that are transformed first */
#define ASC_FILLED {filled} /* of these under the window */
#define ASC_HOP {f.hop}
#define ASC_LEFT {f.n_fft // 2 - (f.n_fft - f.window) // 2} /* samples of the first frame before the clip */
#define ASC_FRAMES {f.frames}
#define ASC_MELS {f.mels}
/* From the bits of a float to the rounded log-mel, at most 0.02 too few beside what a straight line lacks. */
#define ASC_LOG_SLOPE {_float(slope / 2**23)}
#define ASC_LOG_SHIFT {_float(shift - 0.02)}

/* `both`: to load two floats at once. */
typedef union {{
    float part[2];
    double both;
}} asc_complex;

/* Write the rounded log-mels, by bin and frame. work: ASC_N_FFT numbers. */
void asc_log_mel(const int16_t *samples, uint8_t *mel, asc_complex *work);

#ifdef ASC_FRONTEND_TABLES
/* By column and row. */
{_table("float", "asc_window", window.reshape(filled, -1).T)}
/* exp(-2 pi i n / ASC_N_FFT) with n = 2 j, j and j + ASC_N_FFT / 8, by j. */
{_table("asc_complex", "asc_twiddles", twiddles)}
/* Where the sides of the mel bins begin, in bins of the transform, and how far up each of these bins lies. */
{_table("uint16_t", "asc_edges", starts)}
{_table("float", "asc_rise", rise)}
/* The energies at which the rounded log-mel grows by one, as the bits of a float, and one that none reaches. */
{_table("int32_t", "asc_growth", np.append(growth.view(np.int32), 2**31 - 1))}
#endif

#endif
"""


def work_bytes(frontend: Frontend) -> int:
    """Return the bytes that the front end computes in."""
    return 8 * frontend.n_fft


def read_samples(frontend: Frontend) -> int:
    """Return how many samples the front end reads for a frame: rows of the transform, in which the window lies."""
    columns = frontend.n_fft // _rows(frontend)
    return -(-frontend.window // columns) * columns


def _rows(frontend: Frontend) -> int:
    """Return how many points the transform takes first, 2, 4 or 8; then it goes on in eights."""
    return int(2 ** (1 + (frontend.n_fft.bit_length() - 2) % 3))


def _call(n: int, layer: Layer, plan: Plan, tables: list[str]) -> str:
    """Return the call of the layer's kernel, and append its tables."""

    def at(place: str) -> str:
        return f"AT({plan.at[place]})"

    kernel, values = _KERNELS[type(layer)](n, layer, tables)
    places = [at(grid.name) for grid in (*taken(layer), made(layer)) if grid]
    own = plan.at[scratch(n)]
    if isinstance(layer, ResponseNorm):
        values += [f"FLOATS_AT({own})", f"AT({own + 4 * layer.x.channels})"]
    elif isinstance(layer, Convolution | ResidualNorm):
        values += [f"AT({own})"]
    first = [f"&layer_{n}"] if isinstance(layer, Convolution | ResidualNorm | ResponseNorm) else []
    last = ["logits"] if made(layer) is None else []
    return f"{kernel}({_list([*first, *places, *last, *values])});"


_Kernel = tuple[str, list[Any]]  # its name, and its arguments behind the values


def _convolution(n: int, layer: Convolution, tables: list[str]) -> _Kernel:
    x, y = layer.x, layer.y
    shapes = [x.height, x.width, x.channels, y.height, y.width, y.channels, *layer.weights.shape[2:]]
    numbers = [*shapes, *layer.strides, *layer.pads[:2], x.zero, y.zero, layer.low]
    # A depthwise kernel reads the weights of a channel together, another one those of a place.
    tables += _weights(n, layer if layer.depthwise else replace(layer, weights=layer.weights.transpose(0, 2, 3, 1)))
    tables.append(f"static const asc_convolution layer_{n} = {{{_list(numbers)}}};\n")
    return "asc_filter" if layer.depthwise else "asc_convolve", [f"weights_{n}", f"bias_{n}", f"multiplier_{n}"]


def _sum(n: int, layer: Sum, tables: list[str]) -> _Kernel:
    a, b, y = layer.a, layer.b, layer.y
    ratios = np.float32(a.step / y.step), np.float32(b.step / y.step)
    fixed = np.float32(y.zero) - (ratios[0] * np.float32(a.zero) + ratios[1] * np.float32(b.zero))
    return "asc_add", [y.bytes, *map(_float, (*ratios, fixed)), layer.low]


def _max_pool(n: int, layer: MaxPool, tables: list[str]) -> _Kernel:
    x = layer.x
    return "asc_max_pool", [x.height, x.width, x.channels, *layer.window, 0, 0, 1]


def _residual(n: int, layer: ResidualNorm, tables: list[str]) -> _Kernel:
    tables.append(_normalization(n, layer))
    return "asc_normalize", [_float(value) for value in (layer.residual, layer.inner, layer.gain, layer.eps)]


def _response(n: int, layer: ResponseNorm, tables: list[str]) -> _Kernel:
    tables.append(_normalization(n, layer))
    return "asc_respond", [_float(value) for value in (layer.gamma, layer.beta, layer.eps)]


def _mean(n: int, layer: Mean, tables: list[str]) -> _Kernel:
    x, y = layer.x, layer.y
    return "asc_mean", [
        x.positions, x.channels, x.zero, _float(x.step / (y.step * np.float32(x.positions))), y.zero,
    ]  # fmt: skip


def _mean_logits(n: int, layer: MeanLogits, tables: list[str]) -> _Kernel:
    x = layer.x
    return "asc_mean_logits", [x.positions, x.channels, x.zero, _float(x.step)]


def _linear(n: int, layer: Linear, tables: list[str]) -> _Kernel:
    tables += _weights(n, layer)
    return "asc_linear", [layer.x.channels, len(layer.bias), f"weights_{n}", f"bias_{n}", f"multiplier_{n}"]


_KERNELS: Mapping[type, Callable[[int, Any, list[str]], _Kernel]] = {
    Convolution: _convolution,
    Sum: _sum,
    MaxPool: _max_pool,
    ResidualNorm: _residual,
    ResponseNorm: _response,
    Mean: _mean,
    MeanLogits: _mean_logits,
    Linear: _linear,
}
_NAMES = {
    Sum: "sum",
    MaxPool: "maximum",
    ResidualNorm: "residual normalization",
    ResponseNorm: "global response normalization",
    Mean: "mean",
    MeanLogits: "mean",
    Linear: "linear",
}


def _weights(n: int, layer: Convolution | Linear) -> list[str]:
    return [
        _table("int8_t", f"weights_{n}", layer.weights),
        _table("int32_t", f"bias_{n}", layer.bias),
        _table("float", f"multiplier_{n}", layer.multiplier),
    ]


def _normalization(n: int, layer: ResidualNorm | ResponseNorm) -> str:
    x, y = layer.x, layer.y
    numbers = [x.height, x.width, x.channels, *layer.window, _float(x.step), x.zero, _float(y.step), y.zero, layer.low]
    return f"static const asc_normalization layer_{n} = {{{_list(numbers)}}};\n"


def _told(layer: Layer) -> str:
    """Return a line on the layer for the reader of the C text."""
    x, y = taken(layer)[0], made(layer)
    name = _NAMES.get(type(layer))
    if isinstance(layer, Convolution):
        name = "x".join(map(str, layer.weights.shape[2:])) + (" depthwise" if layer.depthwise else "")
    to = f" to {y.channels} of {y.height} x {y.width}" if y else ""
    return f"{name}, {x.channels} channels of {x.height} x {x.width}{to}"


def _table(kind: str, name: str, values: np.ndarray) -> str:
    flat = np.ravel(values)
    written = [_WRITTEN[kind](value) for value in flat]
    lines, line = [], ""
    for value in written:
        if len(line) + len(value) > _WIDTH:
            lines.append(line.rstrip())
            line = ""
        line += f"{value}, "
    lines.append(line.rstrip())
    body = "\n".join(f"    {line}" for line in lines)
    return f"static const {kind} {name}[{len(written)}] = {{\n{body}\n}};\n"


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _float(value: Any) -> str:
    """Return a float32 as a C constant that reads back equal."""
    written = f"{np.float32(value):.9g}"
    return f"{written}f" if {".", "e"} & set(written) else f"{written}.0f"


_WRITTEN: Mapping[str, Callable[[Any], str]] = {
    "float": _float,
    "asc_complex": lambda value: f"{{{{{_float(value.real)}, {_float(value.imag)}}}}}",
    **{kind: lambda value: str(int(value)) for kind in ("int8_t", "uint16_t", "int32_t")},
}


def _text(label: str) -> str:
    """Return a C string of the label's UTF-8, with escapes for all that C could read in another way."""
    plain = "".join(chr(b) if 32 <= b < 127 and chr(b) not in '"\\?' else f"\\{b:03o}" for b in label.encode())
    return f'"{plain}"'
