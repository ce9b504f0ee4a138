"""What is refused before Ray starts, in one sentence with exit status 2."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from shared_student import shared
from tiny import tiny

from pipeline.host.errors import Missing, Outage
from pipeline.serving import serve
from pipeline.serving.service import Service


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the job says of arguments beside those of a sound student."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    student = shared(tiny(tmp_path, "llamagen")).student_uri
    monkeypatch.setattr(serve, "serve", lambda service: pytest.fail("it would be served"))

    def run(*args: str) -> str:
        with pytest.raises(SystemExit) as caught:
            serve.main("Serves.", ["--student", student, *args])
        assert caught.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("error: ")

    return run


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--port", "70000"), "argument --port: '70000' is no whole number from 1 to 65,535; --help lists"),
        (("--port", "8000", "--batch", "65"), "argument --batch: '65' is no whole number from 1 to 64"),
        (("--port", "8000", "--queue", "0"), "argument --queue: '0' is no whole number from 1"),
        (("--port", "8000", "--device", "tpu"), "--device is tpu; it must be cpu or cuda."),
        (("--port", "8000", "--wait", "5"), "unrecognized arguments: --wait 5"),
        (("--port", "8000", "--student", "nowhere"), "there is no student at "),
        (("--port", "8000", "--host", "no.such.host.invalid"), "--host is no.such.host.invalid, which is no address"),
        (("--port", "8000", "--host", "203.0.113.9"), "nothing can listen on 203.0.113.9:8000"),
    ],
)
def test_bad_arguments_are_one_sentence(refusal: Callable[..., str], args: tuple[str, ...], sentence: str) -> None:
    assert refusal(*args).startswith(sentence)


def test_a_port_that_is_taken_is_named(refusal: Callable[..., str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert refusal("--port", port).startswith(f"nothing can listen on 127.0.0.1:{port} (Address already in use)")


def test_a_teacher_that_is_gone_is_named(refusal: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "llamagen-teacher.safetensors").unlink()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    assert "llamagen-teacher.safetensors" in refusal("--port", port, "--teacher", "true")


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "NEEDED", ("a_package_that_nobody_has",))
    with pytest.raises(Missing, match=r"pip install 'distilled-decoding\[serve\]'"):
        serve.checked(Service("anywhere"))


def test_a_server_that_has_ended_ends_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replicas are well, and nobody can be answered."""
    monkeypatch.setattr(serve, "LOOK", 0.0)
    ended = threading.Thread(target=lambda: None)
    ended.start()
    ended.join()
    with pytest.raises(Outage, match="the HTTP server has ended"):
        serve._watch(lambda: pytest.fail("it asked how the replicas are"), None, ended)  # type: ignore[arg-type]
