"""The other side: GitHub's payloads, its connections, and a load of them."""

from __future__ import annotations

import hashlib
import http.client
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import peer
from peer import ZERO


@dataclass(frozen=True)
class Answer:
    """What came back: status (0: nothing), the line of text or the error, seconds, and for what."""

    status: int
    text: str
    seconds: float
    began: float = 0.0
    branch: str = ""
    number: int = 0


def sha(word: str) -> str:
    """Return a commit's name made up from a word."""
    return hashlib.sha1(word.encode()).hexdigest()


def push(repo: str, branch: str, after: str, before: str = "") -> dict[str, Any]:
    """Return a push payload with the fields that GitHub's has."""
    payload = peer.push(repo, f"refs/heads/{branch}", after, before=before or ZERO,
                        created=not before, deleted=after == ZERO)
    payload["repository"]["pushed_at"] = int(time.time())
    if after == ZERO:
        payload.update(commits=[], head_commit=None)
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

    def headers(self, body: bytes) -> dict[str, str]:
        """Return the headers of a delivery, signed over the raw body."""
        return dict(peer.delivery(body, secret=self.secret).headers, Host=self.host)

    def deliver(self, payload: dict[str, Any], event: str = "push", form: bool = False,
                **changed: str) -> Answer:
        """Send one delivery; `changed` replaces headers (an underscore stands for a hyphen)."""
        request = peer.delivery(payload, event, self.secret, form=form)
        headers = dict(request.headers, Host=self.host)
        headers.update({name.replace("_", "-"): value for name, value in changed.items()})
        return self.send(request.body, headers)

    def send(self, body: Any, headers: dict[str, str], method: str = "POST",
             chunked: bool = False) -> Answer:
        """Send one request on a connection of its own."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("localhost", timeout=30)
        try:
            connection.sock = socket.create_connection(
                self.address, 30, (self.source, 0) if self.source else None)
            if self.tls:
                connection.sock = self.tls.wrap_socket(connection.sock, server_hostname=self.host)
            connection.request(method, self.path, body, headers, encode_chunked=chunked)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace").strip()
            return Answer(response.status, text, time.monotonic() - began)
        finally:
            connection.close()


def get(host: str, path: str = "/", address: tuple[str, int] = ("127.0.0.1", 80)) -> Answer:
    """Return what a visitor of a site sees."""
    return GitHub("", address, path, host).send(None, {"Host": host}, "GET")


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
        """Return the threads that send."""
        threads = [threading.Thread(target=self.pushes, args=(branch,), daemon=True)
                   for branch in self.branches]
        for thread in threads:
            thread.start()
        return threads

    def pushes(self, branch: str) -> None:
        """Send each push at its time, or when the one before is answered."""
        first, number = time.monotonic(), 0
        while not self.stopping:
            time.sleep(max(0.0, first + number / self.rate - time.monotonic()))
            began, number = time.monotonic(), number + 1
            payload = push(self.repo, branch, sha(f"{branch}{number}"))
            try:
                answer = self.hook.deliver(payload, X_GitHub_Delivery=f"{branch}-{number}")
            except (OSError, http.client.HTTPException) as error:
                answer = Answer(0, f"{type(error).__name__}: {error}", 0)
            self.sent.append(Answer(answer.status, answer.text, time.monotonic() - began, began,
                                    branch, number))
