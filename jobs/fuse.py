"""Entry of `ray job submit` for the stage `fuse`; takes the options of `asc-ray fuse`."""

from asc_ray.cli import main

main("fuse")
