"""What Prometheus is told of a running job: counters and gauges of the process that does the work.

Ray's agent on a node hears from the processes there every ten seconds and exports what it heard, each name with
``ray_`` before it; ``cluster/grafana.json`` draws these names. It keeps a counter as long as the node lives, and
forgets a gauge that nobody sets again within twenty seconds. Outside of Ray there is no agent, and nothing is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import ray
from ray.util import metrics

from pipeline.recipe import Recipe

COUNTERS = {
    "dd_pairs_drawn_total": "Pairs that replicas have drawn; those of a shard that is made again count again.",
    "dd_pairs_committed_total": "Pairs of the shards that are committed.",
    "dd_pairs_teacher_seconds_total": "Seconds of the replicas in their teacher, the encoder of prompts included.",
    "dd_pairs_flow_seconds_total": "Seconds of the replicas in flow matching.",
    "dd_pairs_commit_seconds_total": "Seconds in which shards were written, waiting for the storage included.",
    "dd_evaluation_images_total": "Images that are drawn and scored.",
    "dd_evaluation_seconds_total": "Seconds in which images were drawn and scored.",
}
GAUGES = {
    "dd_train_step": "The optimiser step of the newest log line.",
    "dd_train_loss": "Loss since the log line before.",
    "dd_train_held_out_loss": "Loss of the moving average on the held-out pairs.",
    "dd_train_gradient_norm": "Norm of the gradient before clipping.",
    "dd_train_learning_rate": "The learning rate.",
    "dd_train_images_per_second": "Images a second of all workers together, snapshots left out.",
    "dd_train_data_wait_ratio": "Share of the time that the worker which waited longest for its pairs did.",
}
TAGS = ("experiment", "run")  # not ``job``, which is a label of Prometheus' own
OF_EVALUATION = (*TAGS, "sampler")  # there are as many as the recipe lists, and one for each student of its curve


class Recorder:
    """Tells Ray's metrics what happens in a run: ``Recorder(recipe)({"dd_train_loss": 0.5})``. It may travel."""

    def __init__(self, recipe: Recipe) -> None:
        self.tags = {"experiment": recipe.name, "run": recipe.run}

    def __call__(self, values: Mapping[str, float], **tags: str) -> None:
        """Add each value to the counter of its name, or make it what its gauge shows; KeyError for another name.

        ``tags``: the ``sampler`` of what an evaluation counts.
        """
        if not ray.is_initialized():
            return
        for name, value in values.items():
            series = _series(name)
            if isinstance(series, metrics.Gauge):
                series.set(float(value), self.tags | tags)
            elif value > 0:  # Ray refuses to add nothing
                series.inc(float(value), self.tags | tags)


@cache
def _series(name: str) -> metrics.Counter | metrics.Gauge:
    """The counter or the gauge of that name in this process."""
    tags = OF_EVALUATION if name.startswith("dd_evaluation_") else TAGS
    if name in COUNTERS:
        return metrics.Counter(name, COUNTERS[name], tags)
    return metrics.Gauge(name, GAUGES[name], tags)
