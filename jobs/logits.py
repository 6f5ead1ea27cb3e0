"""Entry of `ray job submit` for the stage `logits`; takes the options of `asc-ray logits`."""

from asc_ray.cli import main

main("logits")
