"""What workers raise comes out as one sentence, wherever they raised it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lab
import pytest
import ray
import ray.data
import torch
from ray.data import DataContext

from pipeline.host.errors import Refused, Unfinished
from pipeline.recipe import Recipe
from pipeline.services import cluster
from pipeline.services.ray_errors import Lost

RECIPE = Recipe()


def in_a_task(kind: str) -> None:
    cluster.on_worker(RECIPE, lab.fail, kind)


def in_an_actor(kind: str) -> None:
    cluster.on_actor(RECIPE, lab.Falling, (), "work", kind)


def in_a_constructor(kind: str) -> None:
    cluster.on_actor(RECIPE, lab.Falling, (kind,), "work", "")


def in_a_data_set(kind: str) -> None:
    with cluster.session(RECIPE, 1):
        rows = ray.data.from_items([{"kind": kind}])
        list(rows.map_batches(lab.Falling, batch_size=1, **cluster.pool(RECIPE, 1, retries=0)).iter_rows())


PLACES = [in_a_task, in_an_actor, in_a_constructor, in_a_data_set]


@pytest.mark.faults("evaluation: error in an actor", "ray: refused in a worker")
@pytest.mark.parametrize("place", PLACES)
def test_an_error_in_a_worker_is_one_sentence(
    ray_cluster: None, capfd: pytest.CaptureFixture[str], place: Callable[[str], None]
) -> None:
    few = place in (in_a_constructor, in_a_data_set)  # whose processes take seconds to start
    for kind in ("refused", "diverged") if few else lab.KINDS.keys() - {"bug", "two lines"}:
        with pytest.raises(type(lab.KINDS[kind])) as raised:
            place(kind)
        assert str(raised.value) == str(lab.KINDS[kind])
        assert raised.value.__suppress_context__, "no traceback of Ray's is shown with it"
    with pytest.raises(Lost, match=r"^a worker failed: ZeroDivisionError: division by zero") as bug:
        place("bug")
    assert "lab.py:" in str(bug.value)
    assert str(bug.value).endswith("; what is finished is kept, and the same command goes on.")
    with pytest.raises(Lost) as two:
        place("two lines")
    assert "\n" not in str(two.value)
    assert "Traceback" not in str(two.value) + capfd.readouterr().err


@pytest.mark.faults("ray: a worker's process dies")
@pytest.mark.parametrize("place", [in_an_actor, in_a_data_set])
def test_a_process_that_dies_is_one_sentence(ray_cluster: None, place: Callable[[str], None]) -> None:
    with pytest.raises(Lost, match=r"^a worker failed: Actor\w+Error: The actor ") as raised:  # it died, or is gone
        place("death")
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 900


def test_an_error_of_the_driver_stays_as_it_is(ray_cluster: None) -> None:
    for error in (KeyError("x"), Refused("no")):
        with pytest.raises(type(error)) as raised, cluster.session(RECIPE, 1):
            raise error
        assert raised.value is error


def test_what_a_job_sets_in_ray_data_is_gone_after_it(ray_cluster: None) -> None:
    before = DataContext.get_current()
    with pytest.raises(Unfinished), cluster.session(RECIPE, 1):
        DataContext.get_current().max_errored_blocks = 10
        raise Unfinished("it fails")
    assert DataContext.get_current() is before
    with cluster.session(RECIPE, 1):
        assert DataContext.get_current().max_errored_blocks == 0, "the next job's are its own"


@pytest.mark.faults("replica: constructor fails once")
def test_an_actor_that_cannot_start_is_started_again_and_the_reason_is_named(
    ray_cluster: None, tmp_path: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with cluster.session(RECIPE, 1):
        data = ray.data.range(4, override_num_blocks=4).map_batches(
            lab.Once, fn_constructor_args=(str(tmp_path), 2), batch_size=1, **cluster.pool(RECIPE, 1, retries=0)
        )
        assert len(list(data.iter_rows())) == 4
    said = capfd.readouterr().err
    assert (
        said.count("An actor could not start and is started again: ConnectionError: 429 Too Many Requests (lab.py:")
        == 2
    )
    assert "Traceback" not in said


class Custom(RuntimeError):
    """Of a library."""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (RuntimeError("CUBLAS_STATUS_INTERNAL_ERROR when calling `cublasGemmEx`"), True),
        (RuntimeError("NCCL error in: unhandled system error"), True),
        (RuntimeError("uncorrectable ECC error encountered"), True),
        (Custom("CUDA driver error: unknown error"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), False),
        (RuntimeError("CUDA error: out of memory"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("CUDA error is a word of this sentence"), False),
        (Refused("cuDNN is named here"), False),
    ],
)
def test_a_lost_device_is_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert cluster.device_error(error) is lost
