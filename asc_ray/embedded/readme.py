"""The README of a C form."""

from asc_ray.embedded.figures import CForm, figure_rows
from asc_ray.runtime import Bundle

README = "README.md"


def render_readme(bundle: Bundle, form: CForm) -> str:
    f = bundle.frontend
    rows = "\n".join(f"| {name} | {value} |" for name, value in figure_rows(form, f.samples))
    measured = (
        "Flash, RAM, stack and instructions were measured on QEMU's emulated Cortex-M4F (machine mps2-an386). The emulator\n"
        "counts instructions; it leaves out wait states of the flash, and that loads, branches and divisions take several\n"
        "cycles, so a board takes longer than the table says."
        if form.figures
        else "Flash, stack and instructions were not measured, because the machine that wrote this had no\n"
        "arm-none-eabi-gcc and qemu-system-arm. `make CROSS=arm-none-eabi- run` measures them."
    )
    return f"""# The scene classifier in C

`asc_scores` turns {f.samples:,} samples of 16 bits at {f.sample_rate:,} Hz into one logit for each of {len(bundle.labels)} scenes; the largest
names the scene. C99, no heap, no library but `sqrtf`.

```c
#include "asc_model.h"

static int16_t samples[ASC_SAMPLES];
float logits[ASC_LABELS];
asc_scores(samples, logits);
```

## Take over

`asc_model.c` (network), `asc_kernels.c` (layers), `asc_frontend.c` (log-mel), `asc_labels.c` and the four headers. Compile with
`-ffp-contract=off`, so that sums round as in onnxruntime, and with `-fno-math-errno`, so that `sqrtf` is one instruction.
On a core with the DSP extension (`__ARM_FEATURE_DSP`) two products take one instruction. The front end and the rounding
compute in float32, so a core without an FPU is slow.

## Figures

| | |
| --- | --- |
{rows}

{measured}

## Try

```sh
make && ./asc samples.raw                  # here; raw 16-bit samples, one line a clip: scene, bits of the logits, name
make CROSS=arm-none-eabi- && make CROSS=arm-none-eabi- run   # in QEMU; reads samples.raw in this folder
```

In QEMU a line begins with the instructions of front end and network and the bytes of stack. `mps2*` are for QEMU alone.

## Where bits may differ

Convolutions, sums of branches, means and the linear layer are integers with one float32 multiplication, and equal
onnxruntime's 8-bit kernels to the bit. The front end adds in another order than NumPy, so one log-mel in some 300,000
rounds the other way (counted on 200 clips of the demo). Normalizations take exact statistics of the 8-bit values, where onnxruntime adds floats.

## License

All files were written by asc-ray and are under its license, Apache-2.0; the weights are under the model's, see `card.md`.
"""
