"""Entry of `ray job submit` for the stage `qat`; takes the options of `asc-ray qat`."""

from asc_ray.cli import main

main("qat")
