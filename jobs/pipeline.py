"""Entry of `ray job submit` for every stage; takes the options of `asc-ray pipeline`."""

from asc_ray.cli import main

main("pipeline")
