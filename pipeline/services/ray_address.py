"""RAY_ADDRESS, before anything is claimed: whether a Ray of our version answers there, in one sentence where not."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
from contextlib import suppress
from pathlib import Path

from pipeline.host import signals
from pipeline.host.errors import Outage, Refused

LOCAL = "local"
PATIENCE = 10  # seconds that a head may take to answer
WANTED = "the address of a head, like 10.0.0.1:6379 (`ray start --head` prints it), or nothing for a local Ray"


def address() -> str:
    """What RAY_ADDRESS says, host:port or "auto"; "local" where it says nothing."""
    return os.environ.get("RAY_ADDRESS", "").strip() or LOCAL


def check_address() -> None:
    """Raise Refused or Outage, one sentence, unless RAY_ADDRESS is unset or a Ray like ours answers there.

    Nothing is joined, and next to nothing is asked.
    """
    import ray

    given = address()
    if given == LOCAL or ray.is_initialized():
        return
    host, port = _parsed(given)
    try:
        socket.create_connection((host, port), timeout=PATIENCE).close()
    except OSError as error:
        raise Outage(
            f"RAY_ADDRESS is {given}, and nothing answers there ({error.strerror or error}); start that cluster, or"
            f" set RAY_ADDRESS to {WANTED}."
        ) from None
    use_token()
    _check_versions(given, f"{host}:{port}")


def use_token() -> None:
    """Authenticate with the token that is there: given an address, Ray 2.60 ignores it unless told to use it."""
    with suppress(RuntimeError):  # neither HOME nor an entry in passwd
        token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        if "RAY_AUTH_MODE" not in os.environ and ("RAY_AUTH_TOKEN" in os.environ or token.exists()):
            os.environ["RAY_AUTH_MODE"] = "token"


def make_token() -> None:
    """A token of its own for a local Ray that cannot keep one in ~/.ray, as it would, because that is read-only."""
    if any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")):
        return
    folder = Path.home() / ".ray"
    place = folder if folder.exists() else folder.parent
    if not (folder / "auth_token").exists() and not os.access(place, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _parsed(given: str) -> tuple[str, int]:
    """(host, port) of an address; Refused where it is none of a head."""
    if given == "auto":
        given = _found()
    if given.startswith(("http://", "https://")):
        raise Refused(
            f"RAY_ADDRESS is {given}, the address of a dashboard, to which `ray job submit` sends jobs; to run a job"
            f" directly, unset it or set it to {WANTED}."
        )
    if given.startswith("ray://"):
        raise Refused(
            f"RAY_ADDRESS is {given}, an address of Ray Client, through which the jobs do not run; use `ray job submit`"
            f" (cluster/submit.py), or set it to {WANTED}."
        )
    host, _, port = given.rpartition(":")
    if not host or "/" in given or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Refused(f"RAY_ADDRESS is {given!r}; it must be {WANTED}.")
    return host.strip("[]"), int(port)


def _found() -> str:
    """The address of the Ray that "auto" means, the one that was started on this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return str(canonicalize_bootstrap_address("auto"))
    except ConnectionError:
        raise Refused(
            f"RAY_ADDRESS is auto and no Ray runs on this machine; start one, or set it to {WANTED}."
        ) from None


def _check_versions(given: str, head: str) -> None:
    """Ask the head which Ray and which Python it runs: another refuses everybody who joins, and so do we."""
    import ray
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's own compiled part

    try:
        client = signals.interruptible(lambda: GcsClient(address=head))  # waits long where what answers is no head
        theirs = json.loads(client.internal_kv_get(b"CLUSTER_METADATA", KV_NAMESPACE_CLUSTER, timeout=PATIENCE))
    except Exception as error:
        first = " ".join(str(error).split())[:300] or type(error).__name__
        raise Outage(
            f"RAY_ADDRESS is {given}, and what answers there is no Ray that this one can join ({first}); set it to"
            f" {WANTED}."
        ) from None
    mine = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    digits = 2 if os.environ.get("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL") == "minor" else 3
    if any(theirs[key].split(".")[:digits] != mine[key].split(".")[:digits] for key in mine):
        raise Refused(
            f"the cluster of RAY_ADDRESS {given} runs Ray {theirs['ray_version']} on Python"
            f" {theirs['python_version']}, this job Ray {mine['ray_version']} on Python {mine['python_version']}; both"
            " must be the same: use that environment here, or this one there."
        )
