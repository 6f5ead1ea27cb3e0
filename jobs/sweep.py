"""Entry of `ray job submit` for the stage `sweep`; takes the options of `asc-ray sweep`."""

from asc_ray.cli import main

main("sweep")
