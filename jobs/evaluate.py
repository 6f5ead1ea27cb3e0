"""Entry of `ray job submit` for the stage `evaluate`; takes the options of `asc-ray evaluate`."""

from asc_ray.cli import main

main("evaluate")
