"""A Hugging Face Hub on loopback: as much of its HTTP interface as reading a model's files takes, out of folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
STOP = "/stop"  # who asks for it finds nobody from then on


class Shop(BaseHTTPRequestHandler):
    """Answers for the server's ``repositories``: {"owner/name": folder}, each with one commit on main."""

    server: Any

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if path == STOP:
            self._reply(b"")
            self.server.socket.close()
            threading.Thread(target=self.server.shutdown).start()
            return
        api, _, rest = path.removeprefix("/").partition("api/models/")
        parts = (rest if not api else path.removeprefix("/")).split("/")
        name, what = "/".join(parts[:2]), parts[2:]
        folder = self.server.repositories.get(name)
        if folder is None:
            return self._missing("RepoNotFound")
        if what[:1] == ["resolve"]:
            file = folder.joinpath(*what[2:])
            return self._reply(file.read_bytes()) if file.is_file() else self._missing("EntryNotFound")
        if what[:1] == ["tree"]:
            inside = folder.joinpath(*what[2:])
            if not inside.is_dir():
                return self._missing("EntryNotFound")
            return self._json([self._entry(folder, one) for one in sorted(inside.iterdir())])
        self._json(
            {"id": name, "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0, "likes": 0}
        )

    @staticmethod
    def _entry(folder: Path, place: Path) -> dict[str, Any]:
        """A file or a folder as the Hub lists it."""
        inside = str(place.relative_to(folder))
        if place.is_dir():
            return {"type": "directory", "oid": "d" * 40, "size": 0, "path": inside}
        oid = hashlib.sha1(place.read_bytes()).hexdigest()
        return {"type": "file", "oid": oid, "size": place.stat().st_size, "path": inside}

    def _json(self, value: Any) -> None:
        self._reply(json.dumps(value).encode())

    def _missing(self, code: str) -> None:
        self._reply(b"{}", 404, {"X-Error-Code": code, "X-Error-Message": "not here"})

    def _reply(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(**repositories: Path) -> Iterator[ThreadingHTTPServer]:
    """A Hub with the repositories owner/NAME; ``server.asked`` lists what was asked for, ``endpoint`` its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    server.repositories = {f"owner/{name}": folder for name, folder in repositories.items()}  # type: ignore[attr-defined]
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def environment(server: ThreadingHTTPServer, cache: Path) -> dict[str, str]:
    """What makes a process a client of the server; its address is read when huggingface_hub is imported."""
    return {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(cache / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(cache),
    }
