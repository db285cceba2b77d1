"""The other side: GitHub's webhook, a visitor of a site, and a load of pushes."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from harness import form, push_of, read_answer, request, sha

ZERO = "0" * 40


@dataclass(frozen=True)
class Answer:
    """What came back: status (0: nothing), the text or the error, seconds; of a load, for what."""

    status: int
    text: str
    seconds: float
    began: float = 0.0
    branch: str = ""
    number: int = 0


def push(repo: str, branch: str, after: str, before: str = "") -> dict[str, Any]:
    """Return the payload of a push; a commit of zeros deletes the branch."""
    gone: dict[str, Any] = {"deleted": True, "commits": [], "head_commit": None}
    payload: dict[str, Any] = push_of(branch, after, repo, before=before or ZERO,
                                      created=not before, **(gone if after == ZERO else {}))
    return payload


@dataclass
class GitHub:
    """A webhook as set up on GitHub's page: where it goes to and its secret."""

    secret: str
    address: tuple[str, int] = ("127.0.0.1", 9000)
    path: str = "/"
    host: str = "server.example.com"
    source: str = ""
    tls: ssl.SSLContext | None = None

    def deliver(self, payload: dict[str, Any], as_form: bool = False, **headers: str) -> Answer:
        """Send one delivery; headers are spelled as keywords."""
        make = form if as_form else request
        return self.send(make(payload, self.secret, path=self.path, Host=self.host, **headers))

    def send(self, data: bytes) -> Answer:
        """Send one request on a connection of its own."""
        began = time.monotonic()
        source = (self.source, 0) if self.source else None
        with socket.create_connection(self.address, 30, source) as connected:
            if self.tls:
                connected = self.tls.wrap_socket(connected, server_hostname=self.host)
            with connected, connected.makefile("rb") as stream:
                connected.sendall(data)
                answer = read_answer(stream)
        return Answer(answer.status, answer.text.strip(), time.monotonic() - began)

    def get(self, path: str = "/", **headers: str) -> Answer:
        return self.send(request(b"", method="GET", path=path, Host=self.host, **headers))


def get(host: str, path: str = "/", port: int = 80) -> Answer:
    """Return what a visitor of a site sees."""
    return GitHub("", ("127.0.0.1", port), host=host).get(path)


@dataclass
class Load:
    """Pushes to each branch from a thread of its own, so many a second, until `stopping` is set."""

    hook: GitHub
    repo: str
    branches: list[str]
    rate: float  # of each branch
    stopping: bool = False
    sent: list[Answer] = field(default_factory=list)

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.pushes, args=(branch,), daemon=True)
                   for branch in self.branches]
        for thread in threads:
            thread.start()
        return threads

    def pushes(self, branch: str) -> None:
        first, number = time.monotonic(), 0
        while not self.stopping:
            time.sleep(max(0.0, first + number / self.rate - time.monotonic()))
            began, number = time.monotonic(), number + 1
            payload = push(self.repo, branch, sha(f"{branch}{number}"))
            try:
                answer = self.hook.deliver(payload, X_GitHub_Delivery=f"{branch}-{number}")
            except OSError as error:
                answer = Answer(0, f"{type(error).__name__}: {error}", 0)
            self.sent.append(Answer(answer.status, answer.text, time.monotonic() - began, began,
                                    branch, number))


__all__ = ["ZERO", "Answer", "GitHub", "Load", "get", "push", "sha"]
