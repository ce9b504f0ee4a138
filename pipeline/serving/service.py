"""What is served and how: the options of jobs/serve.py as values."""

from __future__ import annotations

from dataclasses import dataclass

DRAIN = 10  # seconds in which what is under way is finished when the server stops


@dataclass(frozen=True)
class Service:
    """What is served, and how.

    Attributes:
        student: URI of its folder, which every node can read.
        teacher: whether its teacher is loaded, too, in a replica of its own.
        device: cpu or cuda; None: a GPU if the cluster has one.
        replicas: of the student, each with one CPU, and one GPU on cuda.
        batch: images that go through the network together, at most.
        queue: images that may wait, beyond those that are with a replica, when another request is taken.
        host, port: where it listens.
    """

    student: str
    teacher: bool = False
    device: str | None = None
    replicas: int = 1
    batch: int = 16
    queue: int = 256
    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def address(self) -> str:
        """As a browser takes it."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"
