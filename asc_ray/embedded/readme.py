"""The README of a C form."""

from importlib.resources import files
from string import Template

from asc_ray.embedded.figures import CForm, figure_rows
from asc_ray.runtime import Bundle

README = "README.md"
_MEASURED = """\
Flash, RAM, stack and instructions were measured on QEMU's emulated Cortex-M4F (machine mps2-an386). The emulator counts
instructions; it leaves out wait states of the flash, and that loads, branches and divisions take several cycles, so a
board takes longer than the table says."""
_NOT_MEASURED = """\
Flash, stack and instructions were not measured, because the machine that wrote this had no arm-none-eabi-gcc and
qemu-system-arm. `make CROSS=arm-none-eabi- run` measures them."""


def render_readme(bundle: Bundle, form: CForm) -> str:
    frontend = bundle.frontend
    rows = figure_rows(form)
    return Template(files(__package__).joinpath("readme.md.in").read_text()).substitute(
        samples=f"{frontend.samples:,}",
        rate=f"{frontend.sample_rate:,}",
        labels=len(bundle.labels),
        rows="\n".join(f"| {name} | {value} |" for name, value in rows),
        measured=_MEASURED if form.figures else _NOT_MEASURED,
    )
