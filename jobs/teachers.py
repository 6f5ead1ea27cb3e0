"""Entry of `ray job submit` for the stage `teachers`; takes the options of `asc-ray teachers`."""

from asc_ray.cli import main

main("teachers")
