"""Entry of `ray job submit` for the stage `specialize`; takes the options of `asc-ray specialize`."""

from asc_ray.cli import main

main("specialize")
