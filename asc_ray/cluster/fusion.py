"""The fusion's passes over the clips as tasks of the cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from asc_ray.cluster.resources import Resources
from asc_ray.cluster.runtime import fetch
from asc_ray.fusion.newton import Shard, Sums


@dataclass(frozen=True)
class Tasks:
    """A `map` over shards in so many tasks; each returns its shards' sums, which the caller adds up in order."""

    count: int
    resources: Resources
    retries: int

    def __call__(self, function: Callable[[Shard], Sums], shards: Sequence[Shard]) -> list[Sums]:
        task = _each.options(**self.resources.options(), max_retries=self.retries)
        runs = np.array_split(np.arange(len(shards)), min(self.count, len(shards)))
        references = [task.remote(function, [shards[index] for index in run]) for run in runs]
        return [sums for reference in references for sums in fetch(reference)]


@ray.remote
def _each(function: Callable[[Shard], Sums], shards: Sequence[Shard]) -> Any:
    return [function(shard) for shard in shards]
