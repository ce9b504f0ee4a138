"""A RAY_ADDRESS that cannot be used is one sentence, before anything is claimed."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from tiny import tiny

from pipeline.host.errors import Outage, Refused
from pipeline.recipe import Recipe
from pipeline.services import ray_address, tracking
from pipeline.services.ray_address import check_address
from pipeline.workflow.generate import generate


@pytest.fixture
def closed() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the session's Ray had not been joined."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


def refused(monkeypatch: pytest.MonkeyPatch, given: str) -> str:
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises((Refused, Outage)) as raised:
        check_address()
    assert "RAY_ADDRESS" in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.faults("ray: address of a dashboard")
@pytest.mark.parametrize("given", ["http://127.0.0.1:8265", "https://ray.example.org"])
def test_a_dashboard_is_no_cluster(outside: None, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    assert "the address of a dashboard, to which `ray job submit` sends jobs" in refused(monkeypatch, given)


@pytest.mark.faults("ray: address of another kind")
@pytest.mark.parametrize("given", ["ray://10.0.0.1:10001", "6379", "head", "head:", ":6379", "a:b", "a:0", "a:65536"])
def test_what_is_no_address_of_a_head_is_refused(outside: None, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    assert "the address of a head, like 10.0.0.1:6379" in refused(monkeypatch, given)


@pytest.mark.faults("ray: cluster gone")
def test_a_cluster_that_is_gone(outside: None, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    assert f"RAY_ADDRESS is {closed}, and nothing answers there (Connection refused)" in refused(monkeypatch, closed)


@pytest.mark.faults("ray: no cluster for auto")
def test_auto_needs_a_cluster(outside: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(given: str) -> str:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", found)
    assert "RAY_ADDRESS is auto and no Ray runs on this machine" in refused(monkeypatch, "auto")


@pytest.mark.parametrize("given", ["", " ", "local"])
def test_without_an_address_ray_is_local(outside: None, monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert ray_address.address() == "local"
    check_address()


@pytest.mark.faults("ray: other version")
def test_another_version_of_ray_or_python(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    here = ray.get_runtime_context().gcs_address
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", here)
    check_address()
    version = ray.__version__
    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.59.0")
        assert f"runs Ray {version} on Python" in refused(monkeypatch, here)
        assert "this job Ray 2.59.0 on Python" in refused(monkeypatch, here)
    with monkeypatch.context() as patch:
        patch.setattr("platform.python_version", lambda: "3.9.1")
        assert "on Python 3.9.1" in refused(monkeypatch, here)


def test_it_is_found_before_anything_is_claimed(
    outside: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    def none(recipe: Recipe, *rest: object) -> None:
        pytest.fail("an MLflow run is begun")

    monkeypatch.setattr(tracking.Run, "start", none)
    recipe = tiny(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with pytest.raises(Outage, match="RAY_ADDRESS"):
        generate(recipe)
    assert not Path(recipe.run).exists()


def test_a_local_ray_keeps_its_token_to_itself_where_home_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    ray_address.make_token()
    assert "RAY_AUTH_TOKEN" not in ray_address.os.environ, "Ray keeps it in ~/.ray"
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    ray_address.make_token()
    assert len(ray_address.os.environ["RAY_AUTH_TOKEN"]) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN")
