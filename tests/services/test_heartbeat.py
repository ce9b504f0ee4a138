"""What is in work is said, and taken from a process that does not come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lab
import pytest
import ray.data

from pipeline.host.errors import Unfinished
from pipeline.recipe import Recipe
from pipeline.services import cluster, heartbeat
from pipeline.settings.cluster import ClusterSettings

HASTY = replace(Recipe(), cluster=ClusterSettings(cpus=1, heartbeat_minutes=0.5 / 60, stall_minutes=2 / 60))


def run(place: Path, times: int) -> list[Any]:
    """Three units on two actors; those at unit 1 hang so many times."""
    beat = cluster.Heartbeat(HASTY, "units", total=4, done=1)
    with cluster.session(HASTY, 2), beat:
        data = ray.data.range(3, override_num_blocks=3).rename_columns({"id": "number"})
        data = data.map_batches(
            lab.Hanging,
            fn_constructor_args=(str(place), times, beat.announcer.working),
            batch_size=1,
            **cluster.pool(HASTY, 2, retries=5),
        )
        return sorted(row["number"] for row in beat.rows(data))


@pytest.mark.faults("replica: hangs")
def test_a_unit_that_hangs_is_named_and_given_to_another_process(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", 0.1)
    assert run(tmp_path, times=1) == [0, 1, 2]
    said = capfd.readouterr().err
    assert "/4 units; unit 1 in work since " in said
    assert "unit 1 was in work on node " in said
    assert "for more than cluster.stall_minutes (0.0333333); another process gets it." in said


@pytest.mark.faults("replica: hangs for ever")
@pytest.mark.slow
def test_a_unit_that_hangs_again_ends_the_job(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "LOOK", 0.1)
    with pytest.raises(Unfinished, match=r"unit 1 was in work .* another process, too; what is finished is kept"):
        run(tmp_path, times=9)
    assert len(list(tmp_path.iterdir())) == heartbeat.TRIES
