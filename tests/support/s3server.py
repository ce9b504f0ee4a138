"""A real S3 server on loopback: SeaweedFS with accounts of its own, behind a relay that can fail as a network does.

The relay's address is known, and free, from the moment that ``conftest`` is imported. So Ray's workers, whose
environment is that of the process which started them, find it however early they were started.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path

BUCKET = "distilled"
KEY, SECRET = "tests-may-write", "TELL-NOBODY/7f3a9c+of-this-secret"  # real ones hold slashes, too
READER, READER_SECRET = "tests-may-read", "another-secret-5d1e"
PROGRAM = shutil.which("weed", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")]))
PATIENCE = 60  # seconds for the server's start
BLOCK = 1 << 16
REFUSALS = {  # fault -> status line, code and message of S3's answer; the last is AWS's, SeaweedFS makes the bucket
    "slow down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "no bucket": ("404 Not Found", "NoSuchBucket", "The specified bucket does not exist"),
}

Fault = Callable[[str, str], str]
"""(method, path and query) of a request -> what befalls it: a name in ``Relay._answer``, or "" for nothing."""


def environment(**changes: str) -> dict[str, str]:
    """What a client of the server has in its environment, and no more: nothing of the developer's own accounts."""
    nowhere = os.devnull
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{LISTENER.getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": nowhere,
        "AWS_SHARED_CREDENTIALS_FILE": nowhere,
    } | changes


def _reserved() -> socket.socket:
    """A socket with a port of its own; who calls is refused until the relay listens."""
    out = socket.socket()
    out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    out.bind(("127.0.0.1", 0))
    return out


LISTENER = _reserved()


def enter() -> None:
    """Make this process, and those that it starts, clients of the server that ``serve`` starts."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_S3"))]:
        del os.environ[name]
    os.environ.update(environment())


@contextmanager
def client(**changes: str) -> Iterator[None]:
    """This process with other settings in the environment; s3fs keeps a client of each kind and has to forget it."""
    from s3fs import S3FileSystem

    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    S3FileSystem.clear_instance_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        S3FileSystem.clear_instance_cache()


@contextmanager
def serve() -> Iterator[Relay]:
    """The server and its relay; afterwards nothing of either is left."""
    with mini("127.0.0.1") as ports, Relay(ports["-s3.port"], ports["-filer.port"]).running() as relay:
        yield relay


@contextmanager
def mini(host: str) -> Iterator[dict[str, int]]:
    """The server alone, at an address of this machine; its ports by the flags that set them."""
    folder = tempfile.mkdtemp(prefix="dd-s3-", dir="/tmp")
    names = [f"-{name}.port{kind}" for name in ("s3", "master", "volume", "filer", "admin") for kind in ("", ".grpc")]
    sockets = [_reserved() for _ in names]
    ports = {name: other.getsockname()[1] for name, other in zip(names, sockets, strict=True)}
    for other in sockets:
        other.close()
    with open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(
            _command(folder, host, ports),
            cwd=folder,
            env=os.environ | {"GOMEMLIMIT": "256MiB"},  # it grows to 600 MB otherwise
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait(process, f"http://{host}:{ports['-s3.port']}", Path(folder, "log"))
        yield ports
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
        for port in ports.values():
            for place in Path("/tmp").glob(f"seaweedfs-*{port}.sock"):
                place.unlink(missing_ok=True)


def _command(folder: str, host: str, ports: dict[str, int]) -> list[str]:
    accounts = [(KEY, SECRET, ["Read", "Write", "List"]), (READER, READER_SECRET, ["Read", "List"])]
    identities = [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}
        for key, secret, actions in accounts
    ]
    Path(folder, "accounts.json").write_text(json.dumps({"identities": identities}))
    Path(folder, "data").mkdir()
    # Should pytest be killed, the server goes with it.
    leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    switches = "-master.telemetry=false -webdav=false -admin.ui=false -s3.port.iceberg=0 -s3.port.lance=0"
    return [
        *leash,
        *(str(PROGRAM), "-logtostderr=true", "mini", f"-ip={host}", f"-ip.bind={host}", *switches.split()),
        *(f"-dir={folder}/data", f"-s3.config={folder}/accounts.json", f"-bucket={BUCKET}"),
        *(f"{name}={port}" for name, port in ports.items()),
    ]


def _wait(process: subprocess.Popen[bytes], endpoint: str, log: Path) -> None:
    """Return once the server knows the account and the bucket."""
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    settings = Config(retries={"total_max_attempts": 1})
    s3 = botocore.session.Session().create_client("s3", endpoint_url=endpoint, config=settings)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            s3.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server does not answer ({error}): {log.read_text()[-2000:]}") from None
            time.sleep(0.1)


class Relay:
    """Passes requests on to the server, one a connection, unless ``fault`` names what is to go wrong with one."""

    def __init__(self, port: int, filer: int) -> None:
        self.direct = f"http://127.0.0.1:{port}"
        self.filer = filer
        self.requests: list[tuple[str, str]] = []
        self.fault: Fault = lambda method, target: ""
        self._port = port

    @contextmanager
    def running(self) -> Iterator[Relay]:
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, daemon=True)
        thread.start()
        started = asyncio.start_server(self._serve, sock=LISTENER.dup(), limit=1 << 20)
        server = asyncio.run_coroutine_threadsafe(started, loop).result()
        try:
            yield self
        finally:
            asyncio.run_coroutine_threadsafe(_close(server), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def create(self, uri: str, names: list[str]) -> None:
        """Many small files by the server's back door, in a tenth of the time."""
        connection = HTTPConnection("127.0.0.1", self.filer)
        for name in names:
            connection.request("PUT", f"{uri.replace('s3://', '/buckets/')}/{name}", body=b"x")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 201, answer.status
        connection.close()

    @contextmanager
    def counting(self) -> Iterator[list[tuple[str, str]]]:
        """The requests of a while, as they come."""
        self.requests = []
        yield self.requests

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self.fault = fault
        try:
            yield
        finally:
            self.fault = lambda method, target: ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # one side has gone
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *headers = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in headers)}
        length = int(fields.get("content-length", 0))
        self.requests.append((method, target))
        fault = self.fault(method, target)
        if fields.get("expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault in REFUSALS:
            status, code, message = REFUSALS[fault]
            await _copy(reader, None, length)
            body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>" if method != "HEAD" else ""
            answer = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            writer.write(answer.encode())
            await writer.drain()
            return
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            kept = [line for line in headers if line and not line.lower().startswith(("connection:", "expect:"))]
            up_writer.write("\r\n".join([first, *kept, "Connection: close", "", ""]).encode("latin-1"))
            if fault == "break upload":  # the server has half a body, the client no answer
                await _copy(reader, up_writer, length // 2)
                up_writer.transport.abort()
                return _reset(writer)
            await _copy(reader, up_writer, length)
            if fault == "lose answer":  # the server has done it, and the client cannot know
                await up_reader.read()
                return _reset(writer)
            if fault == "break download":  # half a body, if there is one
                answer = await up_reader.read()
                start = answer.index(b"\r\n\r\n") + 4
                writer.write(answer[: (start + len(answer)) // 2])
                await writer.drain()
                return _reset(writer)
            await _copy(up_reader, writer)
        finally:
            up_writer.close()


async def _close(server: asyncio.Server) -> None:
    """Also what still waits for a side that will never speak again."""
    server.close()
    waiting = asyncio.all_tasks() - {asyncio.current_task()}
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, length: int = 1 << 62) -> None:
    """``length`` bytes, or all there are, from one side to the other, or to nowhere."""
    while length and (data := await reader.read(min(length, BLOCK))):
        length -= len(data)
        if writer:
            writer.write(data)
            await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """End a connection as a crash does: with a reset, not with a farewell."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def every(number: int, *faults: str) -> Fault:
    """One request in ``number`` fails, in one of these ways after the other."""
    count, kinds = itertools.count(1), itertools.cycle(faults)
    return lambda method, target: "" if next(count) % number else next(kinds)
