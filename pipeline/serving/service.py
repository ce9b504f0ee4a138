"""What is served and how: the options of jobs/serve.py as values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Service:
    """What is served, and how.

    Attributes:
        student: URI of its folder, which every node can read.
        teacher: whether its teacher is loaded, too, in a replica of its own.
        device: cpu or cuda; None: a GPU if the cluster has one.
        replicas: of the student, each with one CPU, and one GPU on cuda.
        batch: images that go through the network together, on which an image's last bits depend.
        queue: requests that may wait for a replica, beyond those that the replicas have.
        host, port: where it listens.
    """

    student: str
    teacher: bool = False
    device: str | None = None
    replicas: int = 1
    batch: int = 8
    queue: int = 64
    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def address(self) -> str:
        """As a browser takes it."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"
