"""The synthetic corpus of the demo."""

import shutil

from asc_ray import remote
from asc_ray.data.demo import make_demo_corpus
from asc_ray.stages.work import Work


def make(work: Work) -> None:
    artifact = work.plan.demo
    assert artifact is not None
    shutil.rmtree(artifact.partial, ignore_errors=True)
    remote.forget(artifact.partial)
    demo = work.plan.config.corpus.demo
    make_demo_corpus(artifact.open_partial(), demo)
    artifact.finish({})
