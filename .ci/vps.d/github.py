"""The other side: GitHub's payloads, its signature, its connections, and a load of them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import time
import urllib.parse
import uuid
from dataclasses import dataclass, field
from typing import Any, Union

Address = Union[tuple[str, int], str]  # (host, port), or the path of a unix socket
ZERO = "0" * 40
JSON = "application/json"
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True)
class Answer:
    """What came back: status, the one line of text, and how long it took in seconds."""

    status: int
    text: str
    seconds: float


def sha(word: str) -> str:
    """Return a commit's name made up from a word."""
    return hashlib.sha1(word.encode()).hexdigest()


def push(repo: str, branch: str, after: str, before: str = "",
         files: tuple[str, ...] = ("index.html",)) -> dict[str, Any]:
    """Return a push payload with the fields that GitHub's has."""
    owner, name = repo.split("/")
    deleted = after == ZERO
    commit = {"id": after, "message": "a change", "timestamp": "2026-11-21T02:00:00Z",
              "added": [], "removed": [], "modified": list(files),
              "author": {"name": "Mona", "email": "mona@example.com", "username": "mona"}}
    return {
        "ref": f"refs/heads/{branch}", "before": before or ZERO, "after": after,
        "created": not before, "deleted": deleted, "forced": False, "base_ref": None,
        "repository": {"id": 1, "name": name, "full_name": repo, "private": True,
                       "owner": {"name": owner, "login": owner, "id": 2},
                       "default_branch": "main", "pushed_at": int(time.time())},
        "pusher": {"name": "mona", "email": "mona@example.com"},
        "sender": {"login": "mona", "id": 3, "type": "User"},
        "commits": [] if deleted else [commit], "head_commit": None if deleted else commit,
    }


@dataclass
class GitHub:
    """A webhook as set up on GitHub's page: where it goes to and its secret."""

    secret: str
    address: Address = ("127.0.0.1", 9000)
    path: str = "/"
    host: str = "server.example.com"
    source: str = ""
    tls: ssl.SSLContext | None = None
    answers: list[Answer] = field(default_factory=list)

    def headers(self, body: bytes, event: str = "push", kind: str = JSON) -> dict[str, str]:
        """Return the headers of a delivery, signed over the raw body."""
        digest = hmac.new(self.secret.encode(), body, hashlib.sha256).hexdigest()
        return {"Host": self.host, "User-Agent": "GitHub-Hookshot/0123456", "Accept": "*/*",
                "Content-Type": kind, "X-GitHub-Event": event,
                "X-GitHub-Delivery": str(uuid.uuid4()), "X-Hub-Signature-256": f"sha256={digest}"}

    def deliver(self, payload: dict[str, Any], event: str = "push", kind: str = JSON,
                **changed: str) -> Answer:
        """Send one delivery; `changed` replaces headers (an underscore stands for a hyphen)."""
        text = json.dumps(payload)
        body = text.encode()
        if kind == FORM:
            body = urllib.parse.urlencode({"payload": text}).encode()
        headers = self.headers(body, event, kind)
        headers.update({name.replace("_", "-"): value for name, value in changed.items()})
        return self.send(body, headers)

    def send(self, body: Any, headers: dict[str, str], method: str = "POST",
             chunked: bool = False, timeout: float = 30) -> Answer:
        """Send one request on a connection of its own."""
        began = time.monotonic()
        connection = self.connection(timeout)
        try:
            connection.request(method, self.path, body, headers, encode_chunked=chunked)
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace").strip()
            answer = Answer(response.status, text, time.monotonic() - began)
        finally:
            connection.close()
        self.answers.append(answer)
        return answer

    def connection(self, timeout: float = 30) -> http.client.HTTPConnection:
        """Return an open connection to where this webhook goes."""
        host = "localhost" if isinstance(self.address, str) else self.address[0]
        connection = http.client.HTTPConnection(host, timeout=timeout)
        connection.sock = open_socket(self.address, self.source, timeout)
        if self.tls:
            connection.sock = self.tls.wrap_socket(connection.sock, server_hostname=self.host)
        return connection


def open_socket(address: Address, source: str = "", timeout: float = 30) -> socket.socket:
    """Connect, over TCP (from the address `source`) or to a unix socket."""
    if isinstance(address, tuple):
        return socket.create_connection(address, timeout, (source, 0) if source else None)
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(timeout)
    connected.connect(address)
    return connected


def get(host: str, path: str = "/", address: Address = ("127.0.0.1", 80)) -> Answer:
    """Return what a visitor of a site sees."""
    visitor = GitHub("", address, path, host)
    return visitor.send(None, {"Host": host}, "GET")


# --- load ----------------------------------------------------------------------------------------


@dataclass
class Sent:
    """One push under load: when it began and ended, its status (0: no answer) and the error."""

    number: int
    branch: str
    began: float
    ended: float = 0.0
    status: int = 0
    error: str = ""


async def send_one(hook: GitHub, repo: str, sent: Sent) -> None:
    """Send one push on a new connection and note what came back."""
    payload = push(repo, sent.branch, sha(str(sent.number)), sha(str(sent.number - 1)))
    body = json.dumps(payload).encode()
    headers = dict(hook.headers(body), Connection="close")
    headers["Content-Length"] = str(len(body))
    headers["X-GitHub-Delivery"] = f"load-{sent.number}"
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    assert isinstance(hook.address, tuple)
    try:
        reader, writer = await asyncio.open_connection(*hook.address)
        try:
            writer.write(f"POST {hook.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
            line = await asyncio.wait_for(reader.readline(), 60)
            sent.status = int(line.split()[1])
            await reader.read()
        finally:
            writer.close()
    except (OSError, asyncio.TimeoutError, IndexError, ValueError) as error:
        sent.error = f"{type(error).__name__}: {error}"
    sent.ended = time.monotonic()


@dataclass
class Load:
    """A steady rate of pushes from a thread of its own, until `stopping` is set."""

    hook: GitHub
    repo: str
    branches: list[str]
    rate: float
    stopping: bool = False
    sent: list[Sent] = field(default_factory=list)

    def run(self) -> None:
        """Send until told to stop, then wait for every answer."""
        asyncio.run(self.all())

    async def all(self) -> None:
        """Start each push at its time, whether or not the ones before are answered."""
        began = time.monotonic()
        tasks = []
        while not self.stopping:
            number = len(self.sent)
            await asyncio.sleep(max(0.0, began + number / self.rate - time.monotonic()))
            sent = Sent(number, self.branches[number % len(self.branches)], time.monotonic())
            self.sent.append(sent)
            tasks.append(asyncio.ensure_future(send_one(self.hook, self.repo, sent)))
        await asyncio.gather(*tasks)
