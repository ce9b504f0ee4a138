"""A user without a name and a home, as containers have them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from pipeline.host import startup


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for name in ("HOME", "USER"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # so that it is put back


def without_entry(*given: object) -> NoReturn:
    """Of a user that passwd does not know."""
    raise KeyError("uid not found")


@pytest.mark.faults("environment: HOME that does not exist", "environment: no HOME, no entry in passwd")
@pytest.mark.parametrize("home", ["/nonexistent", None])
def test_a_home_is_lent_where_there_is_none(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pwd.getpwuid", without_entry)
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME")
    startup.lend_home()
    assert Path.home() == tmp_path / "t" / f"distilled-decoding-{os.getuid()}"
    assert Path.home().stat().st_mode & 0o777 == 0o700
    assert f"goes to {Path.home()}" in capsys.readouterr().err


def test_a_home_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    startup.lend_home()
    assert Path.home() == tmp_path


def test_somebody_elses_folder_is_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nonexistent")
    trap = tmp_path / "t" / f"distilled-decoding-{os.getuid()}"
    (tmp_path / "elsewhere").mkdir()
    trap.symlink_to(tmp_path / "elsewhere")
    startup.lend_home()
    assert Path.home() not in {trap, tmp_path / "elsewhere"}
    assert Path.home().is_dir()


def test_a_name_is_lent_to_a_user_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pwd.getpwuid", without_entry)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    startup.lend_name()
    assert os.environ["USER"] == f"uid-{os.getuid()}"


def test_ray_data_has_no_thread_that_outlives_ray() -> None:
    """It reads what ``begin`` sets when it is imported, as in every job; conftest sets it for the tests."""
    from ray.data._internal.execution import metadata_fetcher

    assert isinstance(metadata_fetcher.make_metadata_fetcher(), metadata_fetcher.InlineMetadataFetcher)
