"""The forms of a student side by side: torch, ONNX, C."""

from collections.abc import Mapping
from dataclasses import dataclass

from asc_ray.embedded.figures import CLOCKS, CORE, CForm
from asc_ray.embedded.generate import planned, weight_bytes
from asc_ray.errors import UserError
from asc_ray.runtime.frontend import Frontend
from asc_ray.students.tflite import TFLiteForm


@dataclass(frozen=True)
class FormRow:
    """`bytes` and `ram`: how many, and of what. `time` and `agreement` are empty where they are not measured."""

    form: str
    bytes: str
    ram: str
    time: str = ""
    agreement: str = ""


def report_rows(fp32: int, peak: int | None, model: bytes, frontend: Frontend) -> list[FormRow]:
    """Return the forms as far as they are known before `asc-ray export`.

    fp32: bytes of the parameters; peak: of the activations as int8; model: the ONNX file.
    """
    try:
        network, plan = planned("model.onnx", model, frontend)
        c = (
            f"{weight_bytes(network):,} (weights)",
            f"{plan.bytes + 2 * frontend.samples:,} (with a clip's samples)",
        )
    except UserError as error:
        c = f"none: {error}", ""
    return [
        FormRow("float32, torch", f"{fp32:,} (parameters)", _activations(4 * peak if peak else None)),
        FormRow("int8, ONNX", f"{len(model):,} (file)", _activations(peak)),
        FormRow("int8, C", *c),
    ]


def card_rows(
    weights: Mapping[str, int],
    peak: int | None,
    file_bytes: int,
    agreement: Mapping[str, float],
    form: CForm | None,
    lite: TFLiteForm | None,
) -> list[FormRow]:
    """Return the forms as `asc-ray export` has measured them. weights: bytes by dtype."""
    clips = f"of {agreement['clips']:,.0f}"
    rows = [
        FormRow(
            "torch", f"{sum(weights.values()):,} (weights and scales)", _activations(peak), "",
            f"{agreement['differ']:.0f} {clips}, by at most {agreement['largest_difference']:.4f}",
        ),
        FormRow("ONNX", f"{file_bytes:,} (file)", _activations(peak), "", "the measure"),
    ]  # fmt: skip
    if form:
        stored, ram, time = f"{form.weights:,} (weights)", form.arena, ""
        if own := form.figures:
            total = own.front_end + own.network
            milliseconds = ", ".join(f"{total / clock / 1e3:.0f}" for clock in CLOCKS)
            stored, ram = f"{own.flash:,} (flash)", own.ram + own.stack
            time = f"{milliseconds} ms on a {CORE} of {', '.join(map(str, CLOCKS))} MHz"
        differ = f"{form.differ} {clips}, by at most {form.largest_difference:.4f}"
        rows.append(FormRow("C", stored, f"{ram + 2 * form.samples:,} (with a clip's samples)", time, differ))
    if lite:
        differ = f"{lite.differ} of {lite.clips:,} than from float32 in torch, by at most {lite.largest_difference:.1e}"
        activations = _activations(4 * peak if peak else None)
        rows.append(FormRow("TFLite, float32", f"{lite.bytes:,} (file)", activations, "", differ))
    return rows


def _activations(count: int | None) -> str:
    return f"{count:,} (activations)" if count else ""
