"""Entry of `ray job submit` for the stage `report`; takes the options of `asc-ray report`."""

from asc_ray.cli import main

main("report")
