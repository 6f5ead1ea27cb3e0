"""What a C form takes, and how it agrees with onnxruntime."""

from dataclasses import dataclass

CORE = "Cortex-M4F"
CLOCKS = (80, 168, 480)  # MHz


@dataclass(frozen=True)
class Figures:
    """What the C form takes on a Cortex-M4F: bytes of flash, of static RAM and of stack, and instructions a clip.

    `flash` is the code and the tables of what a firmware takes over, with what they call of the C library.
    """

    flash: int
    ram: int
    stack: int
    front_end: int
    network: int


@dataclass(frozen=True)
class CForm:
    """A C form that was compared on `clips`: `differ` got another scene than from onnxruntime, `equal` its bits.

    A clip has `samples`; `bytes` are of the files, `weights` int8, `arena` is the RAM that network and front end share.
    `figures`: None where the machine has no cross compiler and emulator.
    """

    samples: int
    bytes: int
    weights: int
    arena: int
    clips: int
    differ: int
    equal: int
    largest_difference: float
    figures: Figures | None


def figure_rows(form: CForm) -> list[tuple[str, str]]:
    """Return what the C form takes, and how it agrees, as rows of a table."""
    rows = [("int8 weights, bytes", f"{form.weights:,}"), ("arena, bytes of RAM", f"{form.arena:,}")]
    if own := form.figures:
        total = own.front_end + own.network
        rows += [
            (f"flash on a {CORE}, code and tables, bytes", f"{own.flash:,}"),
            ("static RAM, bytes", f"{own.ram:,}"),
            ("stack, bytes", f"{own.stack:,}"),
            (f"RAM with stack and the {form.samples:,} samples, bytes", f"{own.ram + own.stack + 2 * form.samples:,}"),
            ("instructions of a clip", f"{total:,}"),
            ("of these the front end", f"{own.front_end:,} ({100 * own.front_end / total:.0f} %)"),
        ]
        rows += [(f"at one a cycle and {clock} MHz", f"{total / clock / 1e3:.0f} ms") for clock in CLOCKS]
    rows.append(("clips compared with onnxruntime", f"{form.clips:,}"))
    rows.append(("of these another scene", f"{form.differ}"))
    rows.append(("of these logits equal to the bit", f"{form.equal:,}"))
    rows.append(("largest difference of a logit", f"{form.largest_difference:.4f}"))
    return rows
