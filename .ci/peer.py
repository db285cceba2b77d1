"""A hookd of one's own, and the words to speak to it: what github, git, disk and fuzz share.

Each of those is a `unittest` program of its own. A test asks for a `Daemon` with the ini it needs,
sends it real bytes over a real socket, and waits for what it expects with a deadline that tells the
log when it passes. Nothing here imports hookd.py: the checks know it only from outside.
"""

import contextlib
import hashlib
import hmac
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import urllib.parse
import uuid
from pathlib import Path
from typing import Any, Callable, NamedTuple, Optional, TypeVar

HOOKD = Path(os.environ.get("HOOKD") or Path(__file__).resolve().parent.parent / "hookd.py")
SECRET = "It's a Secret to Everybody"
ZERO = "0" * 40
PATIENCE = 20.0
T = TypeVar("T")
# What a check that is told to end, by a time limit, ends first: its daemons live in their own
# sessions and would stay.
endings: list[Callable[[], object]] = []


def sign(secret: str, body: bytes) -> str:
    """Return the value of X-Hub-Signature-256 for these bytes."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def push(repo: str = "octo/site", ref: str = "refs/heads/main", commit: str = "1" * 40,
         **more: object) -> dict[str, Any]:
    """Return the payload of a push as GitHub words it; `more` replaces or adds fields."""
    owner, name = repo.split("/", 1)
    head = {"id": commit, "message": "a commit", "added": [], "removed": [],
            "modified": ["README.md"]}
    payload = {
        "ref": ref, "before": "2" * 40, "after": commit,
        "created": False, "deleted": False, "forced": False, "base_ref": None,
        "commits": [head], "head_commit": head,
        "repository": {"id": 1, "name": name, "full_name": repo, "private": True,
                       "owner": {"name": owner, "login": owner}, "default_branch": "main"},
        "pusher": {"name": "mona", "email": "mona@example.com"},
        "sender": {"login": "mona"},
    }
    payload.update(more)
    return payload


class Request(NamedTuple):
    """A delivery before it is bytes; every part may be replaced with `_replace`."""

    body: bytes
    headers: tuple[tuple[str, str], ...]
    line: str = "POST / HTTP/1.1"

    def raw(self) -> bytes:
        """Return the bytes of the request, with the Content-Length that is right for the body."""
        head = [self.line, *(f"{k}: {v}" for k, v in self.headers),
                f"Content-Length: {len(self.body)}", "", ""]
        return "\r\n".join(head).encode("utf-8", "surrogateescape") + self.body


def delivery(payload: object, event: str = "push", secret: Optional[str] = SECRET, *,
             form: bool = False, delivery_id: str = "") -> Request:
    """Return a signed delivery; bytes are sent as they are, anything else as JSON."""
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    kind = "application/json"
    if form:
        body = b"payload=" + urllib.parse.quote_plus(body).encode()
        kind = "application/x-www-form-urlencoded"
    headers = [("Host", "127.0.0.1"), ("User-Agent", "GitHub-Hookshot/0000000"),
               ("Content-Type", kind), ("X-GitHub-Event", event),
               ("X-GitHub-Delivery", delivery_id or str(uuid.uuid4()))]
    if secret is not None:
        headers.append(("X-Hub-Signature-256", sign(secret, body)))
    return Request(body, tuple(headers))


class Answer(NamedTuple):
    """What came back: a status (0 when the connection closed without one) and the body's text."""

    status: int
    text: str


ANSWER = re.compile(rb"HTTP/1\.[01] (\d{3}) [^\r\n]*\r\n((?:[^\r\n]+\r\n)*)\r\n")


def split_answers(data: bytes) -> tuple[list[Answer], bytes]:
    """Return the whole answers at the front of `data`, and what is left behind them."""
    found: list[Answer] = []
    while True:
        head = ANSWER.match(data)
        length = head and re.search(rb"(?im)^content-length: *(\d+)\r$", head[2])
        if not head or not length or len(data) < head.end() + int(length[1]):
            return found, data
        end = head.end() + int(length[1])
        found.append(Answer(int(head[1]), data[head.end():end].decode("utf-8", "replace")))
        data = data[end:]


def until(condition: Callable[[], T], what: str, seconds: float = PATIENCE,
          tell: Callable[[], str] = str) -> T:
    """Return the first true value of `condition`; fail with `what` and `tell()` after a while."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds:g} s for {what}\n{tell()}")
        time.sleep(0.02)


class Daemon:
    """A hookd with a directory, an ini, a state and a log of its own; a context manager.

    `ini` is the text of the sections below `[hookd]`; `settings` are the lines inside it, where
    listen, log, state and secret have values that suit a test unless they are named.
    """

    def __init__(self, ini: str, settings: str = "", *, env: Optional[dict[str, str]] = None,
                 state: Optional[Path] = None) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hookd-ci-"))
        self.state = state or self.directory / "state"
        self.ini = self.directory / "hookd.ini"
        self.log_file = self.directory / "log"
        # A python of pyenv is a shell script that looks for itself in PATH: name the real one.
        self.python = [os.path.realpath(sys.executable)]
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.directory / "home"),
                    "LANG": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1", **(env or {})}
        endings.append(self.__exit__)
        (self.directory / "home").mkdir()
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.address: tuple[str, int] = ("", 0)
        self.configure(ini, settings)

    def configure(self, ini: str, settings: str = "") -> None:
        """Write the ini; a running daemon reads it at its next start or reload."""
        lines = settings.splitlines()
        for line in ("listen = 127.0.0.1:0", "log = stderr", f"state = {self.state}",
                     f"secret = {SECRET}"):
            if not any(x.split("=")[0].strip() == line.split(" ")[0] for x in lines):
                lines.append(line)
        self.ini.write_text("[hookd]\n" + "\n".join(lines) + "\n" + ini)
        self.ini.chmod(0o600)  # it has a secret

    def __enter__(self) -> "Daemon":
        try:
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def command(self, *arguments: str) -> list[str]:
        """Return the command line for a verb of hookd.py on this ini."""
        return [*self.python, str(HOOKD), "-c", str(self.ini), *arguments]

    def verb(self, *arguments: str, seconds: float = 60) -> "subprocess.CompletedProcess[str]":
        """Run a verb of hookd.py on this ini and return what it said."""
        return subprocess.run(self.command(*arguments), env=self.env, stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=seconds, check=False,
                              encoding="utf-8", errors="replace")

    def launch(self) -> "Daemon":
        """Start the process without waiting for it to answer."""
        self.began_at = self.log_file.stat().st_size if self.log_file.exists() else 0
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(self.command("serve"), env=self.env, stdout=log,
                                            stdin=subprocess.DEVNULL, stderr=log,
                                            start_new_session=True)
        return self

    def start(self) -> "Daemon":
        """Start the process and wait until it says where it listens."""
        return self.launch().answering()

    def answering(self) -> "Daemon":
        """Wait until the process that was launched says where it listens."""
        until(self._listening, "hookd to listen", tell=lambda: self.log)
        return self

    def _listening(self) -> bool:
        fixed = re.search(r"(?m)^listen = (127\.[\d.]+):([1-9]\d*)$", self.ini.read_text())
        if fixed:  # where the log is syslog's, a connection tells
            self.address = fixed[1], int(fixed[2])
            with contextlib.suppress(OSError), self.connect(1):
                return True
        new = self.log_file.read_bytes()[self.began_at:].decode("utf-8", "replace")
        said = not fixed and re.search(r"listening on (?:https?://)?127\.0\.0\.1:(\d+)", new)
        if not said and not self.alive():
            raise AssertionError(f"hookd ended before it listened\n{new}")
        if said:
            self.address = "127.0.0.1", int(said[1])
        return bool(said)

    def alive(self) -> bool:
        """Tell whether the process that was started is still the one that runs."""
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the daemon alone."""
        if self.process and self.alive():
            self.process.send_signal(number)

    def stop(self, seconds: float = 90) -> int:
        """Ask it to end, and return its exit status."""
        if not self.process:
            return 0
        self.signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """End it as a power cut would; its runs live on, as they would after a crash."""
        if self.process:
            self.signal(signal.SIGKILL)
            self.process.wait(10)

    @property
    def log(self) -> str:
        """Everything it has said."""
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def logged(self, words: str, seconds: float = PATIENCE) -> str:
        """Wait until the log has a line that matches the expression, and return the line."""
        def lines() -> list[str]:
            return re.findall(f"(?im)^.*(?:{words}).*$", self.log)
        return until(lines, f"a log line like {words!r}", seconds, lambda: self.log)[0]

    def connect(self, timeout: float = 15) -> socket.socket:
        """Open a connection to the daemon."""
        return socket.create_connection(self.address, timeout)

    def post(self, request: Request, seconds: float = 15) -> Answer:
        """Send a request on a connection of its own and return the answer."""
        with self.connect(seconds) as connection:
            # An early refusal may close the connection while the body is on its way.
            with contextlib.suppress(ConnectionError):
                connection.sendall(request.raw())
            return read_answer(connection)

    def push(self, repo: str = "octo/site", ref: str = "refs/heads/main",
             commit: str = "1" * 40, **more: object) -> Answer:
        """Send a signed push."""
        return self.post(delivery(push(repo, ref, commit, **more)))

    def status(self) -> list[dict[str, Any]]:
        """Return what `status --json` tells."""
        said = self.verb("status", "--json")
        try:
            targets: list[dict[str, Any]] = json.loads(said.stdout)
        except ValueError:
            raise AssertionError(f"status: {said.returncode} {said.stdout} {said.stderr}") from None
        return targets

    def target(self, ref: str = "refs/heads/main") -> dict[str, Any]:
        """Return the target of a ref, or nothing when there is none yet."""
        return next((x for x in self.status() if ref in (x["ref"], f"refs/heads/{x['ref']}")), {})

    def ended(self, run: int, ref: str = "refs/heads/main",
              seconds: float = PATIENCE) -> dict[str, Any]:
        """Wait until that run, or a later one of the target, has ended; return the target."""
        told, looked = re.compile(rf"\brun {run} (ok|failed|timeout)\b"), time.monotonic()

        def done() -> dict[str, Any]:
            nonlocal looked  # `status` is a process each time: the log is asked more often
            if not told.search(self.log) and time.monotonic() < looked + 1:
                return {}
            looked = time.monotonic()
            target = self.target(ref)
            idle = target and not target["running"] and not target["waiting"]
            return target if idle and (target["run"] or 0) >= run else {}
        return until(done, f"run {run} to end", seconds, lambda: self.log)

    def output(self, run: int) -> str:
        """Return what a run wrote."""
        path = self.state / "runs" / str(run) / "output.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""


def read_answer(connection: socket.socket) -> Answer:
    """Read one answer; a connection that is closed or reset first is an answer of status 0."""
    data = b""
    while True:
        answers, _ = split_answers(data)
        if answers:
            return answers[0]
        try:
            piece = connection.recv(65536)
        except ConnectionError:
            piece = b""
        if not piece:
            return Answer(0, data.decode("utf-8", "replace"))
        data += piece


def free_address() -> tuple[str, int]:
    """Return a host and port that nobody listens on; a host of one's own, so that nobody will."""
    host = "127." + ".".join(str(random.randrange(1, 255)) for _ in range(3))
    with socket.create_server((host, 0)) as free:
        return host, int(free.getsockname()[1])


def run_number(answer: Answer) -> int:
    """Return the number in `queued run 12: ...`; fail where the answer is no 202."""
    said = re.match(r"queued run (\d+)", answer.text)
    if answer.status != 202 or not said:
        raise AssertionError(f"not queued: {answer}")
    return int(said[1])


class Case(unittest.TestCase):
    """A test that says what hookd logged when it fails, and that hookd neither died nor raised."""

    def daemon(self, ini: str, settings: str = "", *, start: bool = True,
               **more: Any) -> Daemon:
        """Return a Daemon that ends with the test."""
        daemon = Daemon(ini, settings, **more)
        self.addCleanup(daemon.__exit__)
        return daemon.start() if start else daemon

    def sound(self, daemon: Daemon) -> None:
        """Fail if the daemon died, or if its log has a traceback."""
        self.assertTrue(daemon.alive(), f"hookd has died\n{daemon.log[-3000:]}")
        self.assertNotIn("Traceback", daemon.log)


class Result(unittest.TextTestResult):
    """Tells each test's name and seconds."""

    def startTest(self, test: unittest.TestCase) -> None:
        self.began = time.monotonic()
        super().startTest(test)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.stream.write(f"{time.monotonic() - self.began:.1f} s ")
        super().addSuccess(test)

    def getDescription(self, test: unittest.TestCase) -> str:
        words = str(test).split(" ", 2)  # name (class) [subtest]
        return " ".join((words[0], *words[2:]))


def end_well() -> None:
    """Make SIGTERM end what was started, too."""
    def end(*_: object) -> None:
        for ending in reversed(endings):
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                ending()
        os._exit(143)
    signal.signal(signal.SIGTERM, end)


def main() -> None:
    """Run the calling script's tests; each is told with its name and its seconds."""
    end_well()
    if not HOOKD.exists():
        sys.exit("hookd.py is not there")
    began = time.monotonic()
    kind: Any = Result
    runner = unittest.TextTestRunner(stream=sys.stdout, verbosity=2, resultclass=kind)
    outcome = unittest.main(testRunner=runner, exit=False).result
    bad = len({getattr(x, "test_case", x) for x, _ in outcome.failures + outcome.errors})
    skipped = len(outcome.skipped)
    print(f"{Path(sys.argv[0]).name}: {outcome.testsRun - bad - skipped} passed, {bad} failed, "
          f"{skipped} skipped, {time.monotonic() - began:.0f} s")
    sys.exit(0 if outcome.wasSuccessful() else 1)
