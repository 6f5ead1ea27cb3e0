"""Entry of `ray job submit` for the stage `ingest`; takes the options of `asc-ray ingest`."""

from asc_ray.cli import main

main("ingest")
