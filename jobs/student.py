"""Entry of `ray job submit` for the stage `student`; takes the options of `asc-ray student`."""

from asc_ray.cli import main

main("student")
