#!/usr/bin/env python3
"""The tests of hookd: `python3 test_hookd.py [Class[.test_name] ...]`.

Nothing is imitated: each test starts its own daemon in its own directory, with a real ini, real
sockets, real git repositories, a forge that speaks HTTP and a real SQLite file, and asserts what a
user, GitHub or systemd would see. Pure rules are called directly, as tables. A condition is waited
for, never slept for, and a condition that does not come true fails with the daemon's log. They
need Python and git alone; what needs root, or a program that is not here, is skipped.

The classes stand in the order of hookd.py. They run several at a time, because most of a test
is waiting; HOOKD_TEST_JOBS=1 runs one after the other, HOOKD_TEST_KEEP=1 keeps the directories.
"""

import ast
import atexit
import collections
import ctypes
import dataclasses
import email.utils
import fcntl
import hashlib
import hmac
import itertools
import json
import logging
import os
import pty
import pwd
import py_compile
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import unittest
import urllib.parse
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

sys.dont_write_bytecode = True  # the folder is the administrator's: leave nothing there
import hookd  # noqa: E402

logging.getLogger("hookd").addHandler(logging.NullHandler())  # what hookd logs here is no news

HERE = Path(__file__).resolve().parent
HOOKD = HERE / "hookd.py"
SECRET = "it's a secret to everybody"
PATIENCE = 40.0  # seconds after which a condition that has not come true fails its test
JOBS = int(os.environ.get("HOOKD_TEST_JOBS", "10"))
NOBODY = 65534
WAITING = {"queued", "running"}
ZERO = "0" * 40


def compile_once():
    """Compile hookd.py into a folder of its own: as a main script it is compiled at each start."""
    folder = Path(tempfile.mkdtemp(prefix="hookd-tests-"))
    atexit.register(shutil.rmtree, folder)
    folder.chmod(0o755)
    return py_compile.compile(str(HOOKD), str(folder / "hookd.pyc"), doraise=True)


COMPILED = compile_once()

# A verb's time is the start of Python and its imports, and there are a thousand verbs here. This
# process has both behind it, and forks one for each verb that goes on as `hookd.py` would.
FORKS = """
import argparse, io, json, os, select, signal, socket, sys, traceback
import hookd

def start(connection):
    words, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
    verb = os.fork()
    if verb:
        connection.send(str(os.waitstatus_to_exitcode(os.waitpid(verb, 0)[1])).encode())
        os._exit(0)
    for number, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, number)
    os.closerange(3, 64)
    sys.stdout = open(1, "w", encoding="utf-8")
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace")
    words, environment, folder = json.loads(words)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    ended = 1
    try:
        ended = hookd.main(words)
    except SystemExit as error:
        ended = error.code
    except BaseException:
        traceback.print_exc()
    if isinstance(ended, str):
        print(ended, file=sys.stderr)
        ended = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended or 0)

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
listener = socket.socket(fileno=int(sys.argv[1]))
while select.select([0, listener], [], [])[0] == [listener]:
    connection = listener.accept()[0]
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        start(connection)
    connection.close()
"""


class Forks:
    """Processes that have imported hookd already; `run` has one do a verb."""

    def __init__(self):
        self.path = str(Path(COMPILED).with_name("forks"))
        self.process = None
        self.starting = threading.Lock()

    def start(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.path)
            listener.listen(100)
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", FORKS, str(listener.fileno())], cwd=HERE,
                stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=clean_environment())
        atexit.register(self.close)

    def close(self):
        self.process.stdin.close()
        self.process.wait()

    def run(self, words, environment, folder):
        """Run hookd with these words; return how it ended."""
        with self.starting:
            if not self.process:
                self.start()
        request = json.dumps([[os.fsdecode(word) for word in words], environment, str(folder)])
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(
                socket.AF_UNIX, socket.SOCK_SEQPACKET) as one:
            one.settimeout(PATIENCE * 2)
            one.connect(self.path)
            socket.send_fds(one, [request.encode()], [out.fileno(), err.fileno()])
            code = int(one.recv(100))
            texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
        return Ended(code, *texts)


# ---------------------------------------------------------------- What GitHub sends


def sha(name):
    """Return a commit id that looks like one; the same name gives the same id."""
    return hashlib.sha1(str(name).encode()).hexdigest()


def push_of(branch="main", commit=None, repo="octo/site", **fields):
    """Return the payload of a push of one commit; `fields` replace or add members."""
    commit = commit or sha("commit")
    changes = {"id": commit, "added": [], "removed": [], "modified": ["index.html"]}
    payload = {
        "ref": f"refs/heads/{branch}", "before": sha("before"), "after": commit,
        "created": False, "deleted": False, "forced": False,
        "commits": [changes], "head_commit": {**changes, "message": "Say hello"},
        "pusher": {"name": "mona"}, "sender": {"login": "mona"},
        "repository": repository_of(repo, pushed_at=int(time.time()))}
    payload.update(fields)
    return payload


def deletion_of(branch, **fields):
    """Return the payload of a push that deletes `branch`."""
    return push_of(branch, ZERO, deleted=True, head_commit=None, commits=[], **fields)


def repository_of(name="octo/site", **fields):
    owner, _, short = name.partition("/")
    return {"full_name": name, "name": short, "owner": {"login": owner}, **fields}


def workflow_run_of(commit=None, repo="octo/site", run=None, **fields):
    """Return the payload of a workflow that ended well for a push to main; `run` changes it."""
    workflow_run = {
        "event": "push", "status": "completed", "conclusion": "success", "name": "CI",
        "head_branch": "main", "head_sha": commit or sha("commit"),
        "head_repository": repository_of(repo), "head_commit": {"id": commit or sha("commit")}}
    workflow_run.update(run or {})
    return {"action": "completed", "workflow_run": workflow_run, "sender": {"login": "mona"},
            "repository": repository_of(repo), **fields}


def release_of(tag="v1.0", repo="octo/site", **fields):
    release = {"tag_name": tag, "target_commitish": "main", "draft": False, "prerelease": False}
    return {"action": "published", "release": release, "sender": {"login": "mona"},
            "repository": repository_of(repo), **fields}


def sign(body, secret=SECRET):
    """Return GitHub's signature header for a body of bytes."""
    return "sha256=" + hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()


def request(body=b"", secret=SECRET, method="POST", path="/", version="HTTP/1.1", **headers):
    """Return the bytes of a delivery; a header given as None is left out.

    Headers are spelled as keywords: X_GitHub_Event="ping".
    """
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    fields = {
        "Host": "hookd.test", "User-Agent": "GitHub-Hookshot/044aadd",
        "Content-Type": "application/json", "Content-Length": len(body),
        "X-GitHub-Event": "push", "X-GitHub-Delivery": uuid.uuid4(),
        "X-Hub-Signature-256": sign(body, secret)}
    fields.update((name.replace("_", "-"), value) for name, value in headers.items())
    lines = [f"{name}: {value}\r\n" for name, value in fields.items() if value is not None]
    return f"{method} {path} {version}\r\n{''.join(lines)}\r\n".encode("latin-1") + body


def form(payload, secret=SECRET, **headers):
    """Return the bytes of a delivery whose content type is GitHub's form."""
    body = urllib.parse.urlencode({"payload": json.dumps(payload)}).encode()
    headers.setdefault("Content_Type", "application/x-www-form-urlencoded")
    return request(body, secret, **headers)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came back for one request; status 0 is a connection closed without an answer."""

    status: int
    text: str = ""
    headers: dict = dataclasses.field(default_factory=dict)


def read_answer(stream):
    """Read one answer from the file of a socket, and no byte more."""
    try:
        start = stream.readline().split(None, 2)
        if len(start) < 2:
            return Answer(0)
        headers = {}
        for line in iter(stream.readline, b"\r\n"):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", "0")))
        return Answer(int(start[1]), body.decode(), headers)
    except (ConnectionError, ssl.SSLEOFError):
        return Answer(0)


# ---------------------------------------------------------------- What an ini says

PYTHON = shlex.quote(sys.executable)
NOTE = 'echo "$HOOKD_COMMIT" >> "$HOME/seen"'  # a command: leave word of the commit
NAME = 'echo "$HOOKD_BRANCH" >> "$HOME/seen"'  # a command: leave word of the branch
BEGUN = 'echo $$ >> "$HOME/begun"'  # a command: leave word that the script began
GATE = 'until [ -e "$HOME/gate" ]; do sleep 0.05; done'  # a command: until the test opens it
BRIEFLY = "sleep 0.3"
DETACHED = f"""\
{PYTHON} -c 'import os; os.setsid(); open(os.environ["HOME"] + "/child", "w").write(
str(os.getpid())); os.execvp("sleep", ["sleep", "300"])' &
until [ -s "$HOME/child" ]; do sleep 0.05; done"""  # a command: leave a process that is on its own


def section(name, keys=(), **more):
    """Return a section of an ini; values of several lines are indented as configparser wants."""
    keys = {**dict(keys), **more}
    lines = [f"{key} = " + str(value).strip().replace("\n", "\n    ")
             for key, value in keys.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def hook(command, branch="main", repo="octo/site", **keys):
    """Return the section of a hook with a command."""
    return section(f"{repo} {branch}", command=command, **keys)


def alone(command, key="$HOOKD_SLUG"):
    """Return `command` between two acts that note any other run of the same key beside it."""
    return f"""\
for other in "$HOME"/alive."{key}".*; do
    if grep -q . "/proc/${{other##*.}}/cmdline" 2>/dev/null; then
        echo "$$ beside $other" >> "$HOME/overlaps"
    fi
done
: > "$HOME/alive.{key}.$$"
{command}
rm "$HOME/alive.{key}.$$"
"""


# ---------------------------------------------------------------- The daemon under test


def wait_for(condition, what, told=str):
    """Return the first true value of `condition()`; after PATIENCE fail with `told()`."""
    end = time.monotonic() + PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"waited {PATIENCE:.0f} s in vain for {what}\n{told()}")
        time.sleep(0.02)


def alive(pid):
    """Say whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: exit status, standard output, standard error."""

    code: int
    out: str
    err: str


class Daemon:
    """One hookd with what is its own: directory, ini, process, address, log, state.

    `home` is the HOME of the daemon and so of its commands, which leave their traces there.
    """

    def __init__(self, home, ini, variables=None):
        self.home = home
        self.state = home / "state"
        self.ini = home / "hookd.ini"
        self.configure(ini)
        self.logfile = home / "daemon.log"
        self.logfile.touch()
        self.process = None
        self.address = None
        self.environment = {**clean_environment(), "HOME": str(home), **(variables or {})}

    def configure(self, ini):
        self.ini.write_text(ini)
        self.ini.chmod(0o600)  # it has a secret in it

    def start(self, sockets=(), names="", **more):
        """Start hookd as systemd would, with `sockets` passed, and wait until it answers."""
        known = len(self.log)
        self.process = self.spawn(self.command(), sockets, names, **more)
        self.wait(lambda: self.process.poll() is not None or "listening on " in self.log[known:],
                  "the daemon to listen")
        if "listening on " not in self.log[known:]:  # a command may have ended it since
            raise AssertionError(f"hookd ended with {self.process.poll()}\n{self.log}")
        self.address = re.search(r"listening on (\S+)", self.log[known:]).group(1)
        return self

    def command(self, *words):
        """Return what starts hookd on this ini with these words.

        As the owner of the state hookd may start again under another Python: from its source.
        Without -S, Python would spend as long again on looking for what is installed beside it.
        """
        own = not self.state.exists() or self.state.stat().st_uid == os.geteuid()
        alone = [] if "PYTHONPATH" in self.environment else ["-S"]
        program = str(COMPILED if own else HOOKD)
        return [sys.executable, *alone, program, "-c", str(self.ini), *words]

    def spawn(self, command, sockets=(), names="", **more):
        """Start a process in the daemon's environment, its output at the end of the log.

        Its standard input has words in it, which no command may find in its own.
        """
        environment = self.environment
        if sockets:
            numbers = [str(one.fileno()) for one in sockets]
            command = [sys.executable, "-c", PASS_SOCKETS, ",".join(numbers), names, *command]
            more["pass_fds"] = [one.fileno() for one in sockets]
        with open(self.logfile, "ab") as log, open(self.ini, "rb") as words:
            return subprocess.Popen(command, env=environment, cwd=self.home, stdout=log,
                                    stdin=words, stderr=log, **more)

    def tell(self, number):
        self.process.send_signal(number)

    def kill(self):
        """End the daemon as a power cut would."""
        self.process.kill()
        self.process.wait()

    def stop(self, number=signal.SIGTERM):
        """Ask the daemon to end; return its exit status."""
        self.tell(number)
        return self.ended()

    def ended(self):
        """Wait until the daemon has ended; return its exit status."""
        return self.wait(lambda: self.process.poll() is not None and [self.process.poll()],
                         "the daemon to end")[0]

    def reload(self, ini):
        self.configure(ini)
        self.tell(signal.SIGHUP)

    def sweep(self):
        """End the daemon and whatever it started, and leave nothing of it running."""
        if self.process and self.process.poll() is None:
            self.kill()
        self.wait(self.kill_descendants, "what it started to end")

    def kill_descendants(self):
        """Kill what has this daemon's HOME; say whether nothing was left to kill."""
        left = self.descendants()
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    def descendants(self):
        """Return the ids of the processes that have this daemon's HOME."""
        mark, found = b"HOME=" + os.fsencode(self.home), []
        for entry in os.scandir("/proc"):
            with suppress(OSError, ValueError):
                variables = Path(entry.path, "environ").read_bytes().split(b"\0")
                if mark in variables and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    # What it tells

    @property
    def log(self):
        return self.logfile.read_text(errors="replace")

    def wait(self, condition, what):
        return wait_for(condition, what, lambda: self.log[-6000:])

    def wait_for_log(self, pattern, since=0):
        return self.wait(lambda: re.search(pattern, self.log[since:]), f"{pattern!r} in the log")

    def read(self, name):
        """Return the text of a file in the daemon's home, empty where there is none."""
        path = self.home / name
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name):
        """Wait until a file in the daemon's home has text; return it."""
        return self.wait(lambda: self.read(name), f"text in {name}")

    def seen(self):
        """Return what commands noted with NOTE, in order."""
        return self.read("seen").split()

    def states(self):
        """Return the state of each run that the history has."""
        if not (self.state / "hookd.db").exists():
            return {}
        with closing(sqlite3.connect(self.state / "hookd.db")) as store:
            return dict(store.execute("SELECT id, state FROM runs ORDER BY id"))

    def open_gate(self):
        (self.home / "gate").touch()

    def output(self, run):
        return self.read(f"state/runs/{run}/output.log")

    # What one sends to it

    def connect(self):
        """Return a connection to the daemon."""
        if self.address.startswith("unix:"):
            one = socket.socket(socket.AF_UNIX)
            one.settimeout(PATIENCE)
            one.connect(self.address[len("unix:"):])
            return one
        host, _, port = self.address.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), PATIENCE)

    def exchange(self, raw, half_close=False):
        """Send bytes on a connection of their own; return the answer."""
        with closing(self.connect()) as one, one.makefile("rb") as stream:
            with suppress(ConnectionError):  # an answer may come before the last byte is taken
                one.sendall(raw)
                if half_close:
                    one.shutdown(socket.SHUT_WR)
            return read_answer(stream)

    def post(self, body, **more):
        """Send a signed delivery; return the answer."""
        return self.exchange(request(body, **more))

    def push(self, branch="main", commit=None, **fields):
        """Send a signed push; return the answer."""
        return self.post(push_of(branch, commit, **fields))

    # What its command line says

    def hookd(self, *arguments, **more):
        """Run a verb of hookd on the same ini; return how it ended."""
        if not more:
            return FORKED.run(["-c", str(self.ini), *arguments], self.environment, self.home)
        done = subprocess.run(
            self.command(*arguments), env=self.environment, cwd=self.home, timeout=PATIENCE * 2,
            stdin=subprocess.DEVNULL, capture_output=True, check=False, **more)
        return Ended(done.returncode, done.stdout.decode(errors="replace"),
                     done.stderr.decode(errors="replace"))

    def targets(self):
        """Return `status --json` as {(repo, branch): entry}."""
        told = self.hookd("status", "--json")
        try:
            return {(one["repo"], one["branch"]): one for one in json.loads(told.out)}
        except ValueError:
            raise AssertionError(f"status --json printed {told}\n{self.log[-6000:]}") from None

    def wait_for_run(self, number):
        """Wait until a run is running."""
        self.wait(lambda: self.states().get(number) == "running", f"run {number}")

    def settle(self):
        """Wait until nothing runs or waits."""
        self.wait(lambda: not WAITING & set(self.states().values()),
                  "every run to end")

    def settled(self, branch="main", repo="octo/site"):
        """Wait until nothing runs or waits; return the entry of one target."""
        self.settle()
        return self.targets()[repo, branch]


PASS_SOCKETS = """
import os, sys
for number, source in enumerate(sys.argv[1].split(","), 3):
    os.dup2(int(source), number)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(number - 2),
                  LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


def clean_environment():
    """Return this process's environment without what is systemd's, git's or hookd's."""
    return {name: value for name, value in os.environ.items()
            if name not in ("NOTIFY_SOCKET", "INVOCATION_ID", "JOURNAL_STREAM", "XDG_STATE_HOME")
            and not name.endswith("_DIRECTORY")
            and not name.startswith(("GIT_", "HOOKD_", "LISTEN_", "WATCHDOG_"))}


FORKED = Forks()


class Repository:
    """A real git repository to deploy from."""

    def __init__(self, path):
        self.path = path
        self.git("init", "-q", str(path))
        self.git("symbolic-ref", "HEAD", "refs/heads/main")

    def git(self, *arguments):
        """Run git in the repository; return what it printed."""
        identity = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        for who in ("AUTHOR", "COMMITTER"):
            identity.update({f"GIT_{who}_NAME": "Mona", f"GIT_{who}_EMAIL": "mona@example.com"})
        where = [] if arguments[0] == "init" else ["-C", str(self.path)]
        done = subprocess.run(["git", *where, *arguments], env={**clean_environment(), **identity},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        if done.returncode:
            raise AssertionError(f"git {arguments}: {done.stdout.decode()}")
        return done.stdout.decode().strip()

    def commit(self, branch="main", **files):
        """Commit files, named by keyword (index="text"), to a branch; return the commit's id."""
        known = self.git("branch", "--list", branch)
        if known:
            self.git("checkout", "-q", branch)
        elif self.git("rev-list", "-n1", "--all"):
            self.git("checkout", "-q", "-b", branch)
        for name, text in files.items():
            (self.path / name).write_text(text)
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", "A change")
        return self.git("rev-parse", "HEAD")


class Remote:
    """A real git server on a port of its own: refusing, then `listen`, then `serve`.

    `calls` counts connections, `sent` the bytes that git sent back.
    """

    def __init__(self, folder):
        self.folder, self.calls, self.sent, self.serving, self.held = folder, 0, 0, False, []
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))  # bound and not listening: it refuses, nobody takes it
        self.url = f"git://127.0.0.1:{self.socket.getsockname()[1]}/origin"

    def listen(self):
        """Accept connections, and answer none before `serve`."""
        self.socket.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def serve(self):
        """Accept connections, and answer them."""
        self.serving = True
        self.listen()

    def accept(self):
        with suppress(OSError):
            while True:
                client = self.socket.accept()[0]
                self.calls += 1
                if self.serving:
                    threading.Thread(target=self.answer, args=[client], daemon=True).start()
                else:
                    self.held.append(client)

    def answer(self, client):
        command = ["git", "daemon", "--inetd", "--export-all", f"--base-path={self.folder}"]
        with client, suppress(OSError), subprocess.Popen(
                command, stdin=client, stdout=subprocess.PIPE, env=clean_environment(),
                bufsize=0) as server:
            for data in iter(lambda: server.stdout.read(1 << 16), b""):
                self.sent += len(data)
                client.sendall(data)
            client.shutdown(socket.SHUT_RDWR)

    def close(self):
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        for one in [self.socket, *self.held]:
            one.close()


class Systemd:
    """The socket on which systemd hears what a service of Type=notify says."""

    def __init__(self, home):
        self.heard = []
        self.sockets = []
        self.path = str(home / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.setblocking(False)

    def listen(self):
        """Take in what has been said; return all of it."""
        with suppress(BlockingIOError):
            while True:
                data, numbers, _, _ = socket.recv_fds(self.socket, 4096, 8)
                self.heard.append(data.decode())
                self.sockets += [socket.socket(fileno=one) for one in numbers]
        return self.heard

    def count(self, word):
        return sum(word in one for one in self.listen())

    def close(self):
        for one in [self.socket, *self.sockets]:
            one.close()


class Case(unittest.TestCase):
    """A test with a directory of its own and, as a rule, one daemon."""

    def setUp(self):
        self.home = Path(tempfile.mkdtemp(prefix="hookd-test-"))
        self.daemons = []
        if not os.environ.get("HOOKD_TEST_KEEP"):
            self.addCleanup(shutil.rmtree, self.home, ignore_errors=True)

    def ini(self, *sections, **keys):
        """Return the text of an ini: `keys` of [hookd] over what every test needs, sections."""
        head = {"listen": "127.0.0.1:0", "state": self.home / "state", "log": "stderr",
                "secret": SECRET, **keys}
        return "\n".join([section("hookd", **without_none(head)), *sections])

    def prepare(self, *sections, variables=None, **keys):
        """Return a daemon that is not started."""
        daemon = Daemon(self.home, self.ini(*sections, **keys), variables)
        daemon.state = Path(keys.get("state") or daemon.state)
        self.daemons.append(daemon)
        self.addCleanup(self.assert_no_bug, daemon)
        self.addCleanup(daemon.sweep)
        return daemon

    def serve(self, *sections, **more):
        """Return a daemon that answers."""
        return self.prepare(*sections, **more).start()

    def repository(self, name="origin"):
        return Repository(self.home / name)

    def deploying(self, command="", branch="main", **keys):
        """Return a hook that deploys the repository `origin` into `live`."""
        keys = {"git": self.home / "origin", "directory": self.home / "live", "catch_up": "no",
                **keys}
        return section(f"octo/site {branch}", command=command or NOTE, **keys)

    def script(self, path, text):
        path.write_text("#!/bin/sh\n" + text + "\n")
        path.chmod(0o755)

    def counting_git(self):
        """Return an environment in which each call of git leaves a line in the file `calls`."""
        programs = self.home / "bin"
        programs.mkdir()
        self.script(programs / "git", f'echo "$@" >> "{self.home}/calls"\n'
                    f'exec {shutil.which("git")} "$@"')
        return {"PATH": f"{programs}:{os.environ['PATH']}"}

    def wait_for_rounds(self, daemon, rounds):
        """Wait until the remote was asked so many times more."""
        goal = daemon.read("calls").count("ls-remote") + rounds
        daemon.wait(lambda: daemon.read("calls").count("ls-remote") >= goal, "catch-up")

    def serve_in(self, name, *sections, **keys):
        """Return a daemon that answers, whose state is a folder `name` of the test's."""
        return self.serve(*sections, state=self.home / name, **keys)

    def follow(self, daemon, *arguments):
        """Start a verb that follows its run; return it once its run is in the queue."""
        known = len(daemon.states())
        verb = daemon.spawn(daemon.command(*arguments))
        self.addCleanup(lambda: (verb.kill(), verb.wait()))
        daemon.wait(lambda: len(daemon.states()) > known, f"{arguments} to be queued")
        return verb

    def wait_for_states(self, daemon, expected):
        daemon.wait(lambda: daemon.states() == expected,
                    f"states {expected}, not {daemon.states()}")

    def check_first_holds_second_up(self, daemon):
        """Wait until run 2 waits for run 1, and run 3 does not; then let all of them end."""
        self.wait_for_states(daemon, {1: "running", 2: "queued", 3: "ok"})
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(set(daemon.states().values()), {"ok"})

    def wait_for_status(self, daemon, pattern, *of):
        """Wait until `status` says what a regular expression describes; return its text."""
        daemon.wait(lambda: re.search(pattern, daemon.hookd("status", *of).out),
                    f"{pattern!r} in status, which says\n{daemon.hookd('status', *of).out}")

    def reload(self, daemon, *sections, **keys):
        """Reload with another ini and wait until it is in force."""
        known = len(daemon.log)
        daemon.reload(self.ini(*sections, **keys))
        daemon.wait_for_log("reloaded", known)

    def remote(self):
        """Return the git server of this test's repositories; it refuses connections at first."""
        remote = Remote(self.home)
        self.addCleanup(remote.close)
        return remote

    def take(self, daemon, *table):
        """Send deliveries, rows of (what, payload, status); wait for the end of each run."""
        for what, payload, status in table:
            event = "workflow_run" if "workflow_run" in payload else "push"
            with self.subTest(what):
                self.assert_answer(daemon.post(payload, X_GitHub_Event=event), status,
                                   "queued" if status == 202 else "ignored")
                daemon.settle()

    def did(self, daemon, *words, code=0, says=(), **more):
        """Run a verb, check its exit status and words; return all that it said."""
        told = daemon.hookd(*words, **more)
        text = told.out + told.err
        self.assertEqual(told.code, code, (words, text))
        self.assertNotIn("Traceback", text)
        for word in [says] if isinstance(says, str) else says:
            self.assertRegex(text, word)
        return text

    def history(self, daemon, branch="main"):
        """Return what `status REPO BRANCH --json` prints."""
        return json.loads(daemon.hookd("status", "octo/site", branch, "--json").out)

    def git_in(self, path, *words):
        """Run git in a folder as its owner would; return what it printed."""
        return subprocess.check_output(["git", "-C", str(path), *words], env=clean_environment(),
                                       stderr=subprocess.STDOUT).decode().strip()

    def open_to_nobody(self):
        """Let user nobody reach the test's directory, and skip where it cannot reach Python."""
        self.home.chmod(0o755)
        try:
            subprocess.run([sys.executable, str(HOOKD), "--version"], user=NOBODY, check=True,
                           capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            self.skipTest("user nobody cannot read this Python or this folder")

    def assert_no_bug(self, daemon):
        self.assertNotRegex(daemon.log, "Traceback|DeprecationWarning")

    def assert_answer(self, answer, status, text=""):
        """Check an answer's status, and that its text holds `text`."""
        self.assertEqual(answer.status, status, answer.text)
        self.assertIn(text, answer.text)

    def assert_never_overlapped(self, daemon):
        self.assertEqual(daemon.read("overlaps"), "")

    def _formatMessage(self, msg, standardMsg):  # noqa: N802, N803 (unittest's own names)
        """Put the daemon's last words beside each assertion that fails."""
        told = "".join(f"\n--- the daemon's log\n{one.log[-4000:]}" for one in self.daemons[:1])
        return super()._formatMessage(msg, standardMsg) + told


def without_none(keys):
    return {key: value for key, value in keys.items() if value is not None}


# ---------------------------------------------------------------- Configuration

# The tables of the contract: each key with the text that means its default.
DAEMON_DEFAULTS = {
    "listen": "127.0.0.1:9000", "path": "/", "state": "", "jobs": "2", "keep": "50",
    "max_body": "25M", "log": "auto", "tls_cert": "", "tls_key": "", "quiet": "no", "page": "",
    "page_output": "no", "allow_from": ""}
HOOK_DEFAULTS = {
    "secret": "", "secret_file": "", "command": "", "directory": "", "git": "", "deploy_key": "",
    "environment": "", "environment_file": "", "timeout": "15m", "queue": "newest",
    "event": "push", "workflows": "", "paths": "", "lock": "", "catch_up": "1h",
    "releases": "no", "shared": "", "activate": "", "healthcheck": "",
    "healthcheck_timeout": "30s", "skip": "[skip deploy]", "on_success": "", "on_failure": "",
    "on_delete": "", "report_token": "", "report_token_file": "",
    "report_api": "https://api.github.com", "report_url": ""}


def complaint(section, key):
    """Return the pattern of a complaint: file, section, key, fault."""
    return rf"(?m)^(?:warning: )?hookd\.ini: \[{re.escape(section)}\] {key}: (.+)$"


# Tables that belong to one class stand in it.
# ruff: noqa: RUF012
def read_ini(text):
    """Return the Config of an ini's text."""
    return hookd.Ini("hookd.ini", "/etc/hookd", text, "/var/lib/hookd").config()


def problems_of(text):
    """Return all that is wrong with an ini, in one text."""
    try:
        read_ini(text)
    except hookd.ConfigError as error:
        return "\n".join(error.args)
    return ""


class Configuration(Case):
    """The ini: its grammar, its lookup, and how its faults are told."""

    GIT = {"git": "https://git.example.com/{repo}.git"}
    RELEASES = {**GIT, "releases": "5"}

    FAULTS = (  # section, its other settings, key, value, words of the complaint
        ("hookd", {}, "job", "2", "jobs"),
        ("hookd", {}, "listen", "nowhere", "127.0.0.1:9000"),
        ("hookd", {}, "path", "hook", "/"),
        ("hookd", {}, "keep", "many", "'many'"),
        ("hookd", {}, "jobs", "0", "'0'"),
        ("hookd", {}, "max_body", "25X", "25M"),
        ("hookd", {}, "quiet", "maybe", "yes no"),
        ("hookd", {}, "log", "file", "syslog stderr"),
        ("hookd", {}, "allow_from", "10.0.0.0/40", "10.0.0.0/40"),
        ("hookd", {}, "tls_cert", "/nowhere/cert.pem", "tls_key"),
        ("octo/site", {}, "comand", "true", "command"),
        ("octo/site a", {}, "timeout", "soon", "15m"),
        ("octo/site b", {}, "queue", "latest", "newest every replace"),
        ("octo/site c", {}, "event", "pull", "push workflow_run release"),
        ("octo/site d", {}, "environment", "A=1\nNOVALUE\n1A=b", "line 2, line 3 NAME=value"),
        ("octo/site d", {}, "que", "every", "queue"),
        ("octo/site e", {}, "catch_up", "sometimes", "no 15m"),
        ("octo/site f", {}, "directory", "/srv/{banana}", "{banana} {slug}"),
        ("octo/site g", {}, "listen", "127.0.0.1:9001", "[hookd]"),
        ("octo/site h", {}, "deploy_key", "/nowhere/key", "git"),
        ("hookd", {}, "page_output", "maybe", "yes"),
        ("hookd", {}, "page", "~/public", "~"),
        ("octo/shop a", GIT, "releases", "1", "2"),
        ("octo/shop b", GIT, "releases", "many", "'many'"),
        ("octo/shop c", {}, "releases", "5", "git"),
        ("octo/shop d", RELEASES, "shared", "/etc/passwd", "/etc/passwd"),
        ("octo/shop e", RELEASES, "shared", "uploads/\na/../../b", "a/../../b"),
        ("octo/shop f", {}, "shared", "uploads/", "releases"),
        ("octo/shop g", {}, "healthcheck", "ftp://127.0.0.1/", "http"),
        ("octo/shop h", {}, "healthcheck", "127.0.0.1:8000", "http"),
        ("octo/shop t", {}, "healthcheck", "unix:health", "unix:"),
        ("octo/shop i", {}, "healthcheck_timeout", "soon", "'soon' 15m"),
        ("octo/shop j", {}, "report_url", "https://ci.test/{banana}", "{banana} {run}"),
        ("octo/shop k", {}, "report_api", "api.github.com", "https://"),
        ("octo/shop l", {}, "relases", "5", "releases"),
        ("octo/shop m", {}, "health_check", "http://127.0.0.1/", "healthcheck"),
        ("octo/shop n", {}, "enviroment_file", "site.env", "environment_file"),
        ("octo/shop o", {}, "workflow", "CI", "workflows"),
        ("octo/shop p", {}, "report_tokn", "hunter2", "report_token"),
        ("octo/shop q", {}, "activte", "true", "activate"),
        ("octo/shop r", {}, "page", "/srv/page", "[hookd]"),
        ("octo/shop s", {}, "page_output", "yes", "[hookd]"),
    )

    STRUCTURE = (  # an ini that configparser refuses, or that is not hookd's
        ("a section twice", "[o/r main]\ncommand = a\n[o/r main]\ncommand = b\n", "[o/r main]"),
        ("a key twice", "[o/r main]\ncommand = a\ncommand = b\n", "[o/r main] command"),
        ("a [DEFAULT] section", "[DEFAULT]\ntimeout = 5m\n", "[DEFAULT]"),
        ("a line before any section", "command = a\n", "line 1"),
        ("a line that is no setting", "[o/r main]\ncommand\n", "line 2"),
        ("a hook without a repository", "[octo main]\ncommand = a\n", "[octo main]"),
        ("a hook of three words", "[o/r main dev]\ncommand = a\n", "[o/r main dev]"),
        ("a hook that does nothing", "[o/r main]\ntimeout = 5m\n", "[o/r main] command"),
        ("a section that no hook uses", "[o/r]\ncommand = a\n", "[o/r]"),
        ("a section without its ]", "[hookd]\njobs = 2\n[o/r main\ncommand = true\n",
         "line 3 is no [section]"),
        ("a repository twice", "[o/r]\n[O/R]\n[o/r main]\ncommand = a\n", "[o/r]: no hook uses"),
    )

    SILENT = {  # looks a little like one of the mistakes below, and is none
        "a # inside a word": {"directory": "/srv/a#b", "command": "true # done"},
        "a fragment": {"report_url": "https://ci.test/#run-{run}"},
        "assignments": {"command": "timeout=5\nevent=push\nexport lock=a"},
        "commands of that name": {"command": "timeout 5 true\nlock() { true; }"},
        "a comment in a script": {"command": "# timeout = 5m\ntrue"},
        "a value with a =": {"environment": "OPTIONS=a = b"},
        "a shebang": {"command": "#!/bin/sh\ntrue"}}

    WARNINGS = {  # mistakes that hookd can live with: settings, key, words of the warning
        "a comment behind a directory": ({"directory": "/srv/site # live"}, "directory", "#"),
        "a comment behind a URL": ({"git": "https://git.test/x.git ; mine"}, "git", ";"),
        "a comment behind a variable": ({"environment": "A=1\nB=2 # two"}, "environment", "#"),
        "a setting inside a script": ({"command": "true\ntimeout = 5m"}, "command", "timeout"),
        "a setting inside another": ({"on_failure": "true\nqueue = every"}, "on_failure", "queue"),
        "any workflow counts": ({"event": "workflow_run"}, "workflows", "workflow")}

    def complaints(self, text):
        """Return what `check` says of an ini, and insist on its exit status."""
        daemon = self.prepare()
        daemon.ini.write_bytes(text.encode(errors="surrogateescape"))
        told = daemon.hookd("check")
        self.assertEqual(told.code, 78, told)
        return told.out + told.err

    def test_a_good_ini_is_told_as_a_table_of_its_hooks(self):
        told = self.prepare(hook("true"), hook("true", "staging")).hookd("check")
        self.assertEqual(told.code, 0, told)
        for word in ("octo/site", "main", "staging"):
            self.assertIn(word, told.out)

    def test_all_faults_are_told_at_once_each_with_its_place_and_remedy(self):
        sections = {}
        for name, keys, key, value, _ in self.FAULTS:
            more = {} if name == "hookd" else {"command": "true", **keys}
            sections.setdefault(name, more)[key] = value
        told = self.complaints("\n".join(section(*one) for one in sections.items()))
        for name, _, key, _, words in self.FAULTS:
            with self.subTest(section=name, key=key):
                found = re.findall(complaint(name, key), told)
                self.assertEqual(len(found), 1, told)
                self.assertIn("; ", found[0], "a fault without its remedy")
                for word in words.split():
                    self.assertIn(word, found[0])
        self.assertNotIn("hunter2", told)

    def test_a_fault_is_told_once_whoever_uses_it(self):
        shared = section("octo/site", queue="latest")
        for name, sections in (("by two hooks", (hook("true"), hook("true", "dev"))),
                               ("by none", (hook("true", queue="every"),))):
            with self.subTest(name):
                told = self.complaints(self.ini(shared, *sections, timeout="soon"))
                self.assertEqual(told.count("[octo/site] queue"), 1, told)
                self.assertEqual(told.count("[hookd] timeout"), 1, told)

    def test_what_is_set_badly_is_not_said_to_be_missing(self):
        told = self.complaints("[octo/site main]\ngit = https://example.com/{banana}\n")
        self.assertEqual(told.count("[octo/site main]"), 1, told)

    def test_an_unknown_setting_is_told_with_the_nearest_known_one(self):
        told = self.complaints("[octo/site main]\ncommand = true\ntimout = 5m\n")
        self.assertRegex(told, r"hookd\.ini: \[octo/site main\] timout: .*did you mean timeout\?")

    def test_an_ini_that_is_no_ini_is_refused_with_its_line(self):
        for name, text, word in self.STRUCTURE:
            with self.subTest(name):
                self.assertIn(word, problems_of(text))
        self.assertIn("line 1 is no", self.complaints("command = a\n"))
        self.assertIn("UTF-8", self.complaints("[o/r main]\ncommand = \udcff\udcfe\n"))

    def test_a_missing_ini_is_told_with_its_name(self):
        daemon = self.prepare()
        daemon.ini.unlink()
        for verb in ("check", "serve"):
            with self.subTest(verb):
                told = daemon.hookd(verb)
                self.assertEqual(told.code, 78, told)
                self.assertIn("hookd.ini: cannot be read", told.err)

    def test_serve_does_not_start_with_a_faulty_ini(self):
        daemon = self.prepare(hook("true", timeout="soon"), hook("true", "dev", queue="latest"))
        told = daemon.hookd("serve")
        self.assertEqual(told.code, 78, told)
        self.assertRegex(told.err, r"(?s)\[octo/site main\] timeout.*\[octo/site dev\] queue")

    def test_a_secret_is_never_told(self):
        for keys in ({"secret": "hunter2\nhunter2"}, {"secret": "hunter2", "secrets": "hunter2"},
                     {"secret": "hunter2", "path": "hunter"}, {"secret": "hunter2"}):
            with self.subTest(**keys):
                daemon = self.prepare(hook("true"), **keys)
                told = daemon.hookd("check")
                self.assertNotIn("hunter2", told.out + told.err)

    def test_an_empty_secret_is_no_secret(self):
        (self.home / "empty").write_text("\n")
        told = self.prepare(hook("true"), secret=None,
                            secret_file=self.home / "empty").hookd("serve")
        self.assertEqual(told.code, 78, told)
        self.assertRegex(told.err, r"\[hookd\] secret_file: .*empty")
        daemon = self.serve(hook("true"), secret="")
        self.assert_answer(daemon.post(push_of(), secret=""), 403)
        made = daemon.hookd("secret").out.strip()
        self.assert_answer(daemon.post(push_of(), secret=made), 202)

    def test_percent_hash_and_semicolon_belong_to_the_command(self):
        daemon = self.serve(hook("printf '%s\\n' '50% # of ; all' > \"$HOME/said\" # a comment"))
        daemon.push()
        self.assertEqual(daemon.wait_for("said"), "50% # of ; all\n")

    def test_a_command_has_as_many_lines_as_are_indented(self):
        daemon = self.serve(hook("one=1\nif true; then\n    two=2\nfi\n\n"
                                 'echo "$one$two" > "$HOME/said"'))
        daemon.push()
        self.assertEqual(daemon.wait_for("said"), "12\n")

    def test_a_setting_is_looked_up_in_the_hook_then_the_repository_then_the_daemon(self):
        say = 'echo "$LEVEL" >> "$HOME/said"'
        daemon = self.serve(
            section("octo/site", environment="LEVEL=repository"),
            hook(say, "main", environment="LEVEL=hook"), hook(say, "dev"),
            hook(say, "main", repo="octo/other"), environment="LEVEL=daemon",
            queue="every", jobs=1)
        for branch, repo in (("main", "octo/site"), ("dev", "octo/site"), ("main", "octo/other")):
            self.assert_answer(daemon.push(branch, repo=repo), 202)
        daemon.settle()
        self.assertEqual(daemon.read("said").split(), ["hook", "repository", "daemon"])

    def test_the_first_hook_that_matches_is_the_one_that_runs(self):
        daemon = self.serve(*(hook(f'echo {name} >> "$HOME/said"', pattern, repo) for
                              name, pattern, repo in (
                                  ("main", "main", "octo/site"), ("wip", "wip/*", "Octo/Site"),
                                  ("version", "v[0-9]", "octo/site"), ("rest", "*", "octo/site"),
                                  ("never", "dev", "octo/site"), ("owner", "main", "octo/*"))),
                            jobs=1)
        table = (("octo/site", "main", "main"), ("OCTO/SITE", "main", "main"),
                 ("octo/site", "wip/deep/er", "wip"), ("octo/site", "v7", "version"),
                 ("octo/site", "dev", "rest"), ("octo/site", "a/b", "rest"),
                 ("octo/other", "main", "owner"))
        for repo, branch, _ in table:
            self.assert_answer(daemon.push(branch, repo=repo), 202)
            daemon.settle()
        self.assertEqual(daemon.read("said").split(), [name for _, _, name in table])
        self.assert_answer(daemon.push("dev", repo="octo/other"), 200, "no hook for octo/other dev")

    def test_a_pattern_is_matched_with_case_and_in_whole(self):
        daemon = self.serve(hook("true", "main"))
        for branch in ("Main", "mainline", "amain", "main/x"):
            with self.subTest(branch):
                self.assert_answer(daemon.push(branch), 200, "ignored: no hook")

    def test_only_a_pattern_that_begins_with_refs_meets_tags(self):
        daemon = self.serve(hook(NOTE, "*"), hook(NOTE, "refs/tags/v*"),
                            hook(NOTE, "refs/heads/never", "octo/other"))
        table = (("refs/tags/v1", "octo/site", 202), ("refs/tags/x1", "octo/site", 200),
                 ("refs/heads/v1", "octo/site", 202), ("refs/heads/never", "octo/other", 202),
                 ("refs/tags/never", "octo/other", 200))
        for ref, repo, status in table:
            with self.subTest(ref):
                self.assert_answer(daemon.push(ref=ref, repo=repo), status)

    def test_the_state_is_where_the_contract_says(self):
        xdg, systemd = self.home / "xdg", self.home / "systemd"
        systemd.mkdir(mode=0o700)
        table = [({"STATE_DIRECTORY": str(systemd), "XDG_STATE_HOME": str(xdg)}, systemd)]
        if not Path("/var/lib/hookd").exists():
            table += [({"XDG_STATE_HOME": str(xdg)}, xdg / "hookd"),
                      ({}, self.home / ".local/state/hookd")]
        for variables, place in table:
            with self.subTest(place=place):
                daemon = self.serve(hook("true"), variables=variables, state=None, secret=None)
                daemon.stop()
                self.assertTrue((place / "secret").exists())
                self.assertEqual(stat.S_IMODE(place.stat().st_mode) & 0o077, 0)

    def test_state_and_secret_are_readable_by_nobody_else(self):
        daemon = self.serve(hook("true"), secret=None)
        self.assertEqual(stat.S_IMODE(daemon.state.stat().st_mode), 0o700)
        self.assertEqual(stat.S_IMODE((daemon.state / "secret").stat().st_mode), 0o600)

    def test_a_relative_secret_file_is_a_credential_of_systemd(self):
        (self.home / "credentials").mkdir()
        credential = self.home / "credentials" / "github"
        credential.write_text("from a credential\n")
        credential.chmod(0o400)
        daemon = self.serve(hook("true"), secret=None, secret_file="github",
                            variables={"CREDENTIALS_DIRECTORY": str(self.home / "credentials")})
        self.assert_answer(daemon.post(push_of(), secret="from a credential"), 202)
        self.assert_answer(daemon.push(), 403)
        self.assertEqual(daemon.hookd("check").code, 0)

    def test_a_missing_credential_is_no_secret(self):
        (self.home / "credentials").mkdir()
        daemon = self.prepare(hook("true"), secret=None, secret_file="github",
                              variables={"CREDENTIALS_DIRECTORY": str(self.home / "credentials")})
        told = daemon.hookd("serve")
        self.assertEqual(told.code, 78, told)
        self.assertRegex(told.err, r"\[hookd\] secret_file: .*github")

    def test_a_secret_file_holds_one_secret_a_line(self):
        (self.home / "secrets").write_bytes(b"the old one\r\n\nthe new one\nthe last")
        daemon = self.serve(hook("true"), secret=None, secret_file=self.home / "secrets")
        for secret, status in (("the old one", 202), ("the new one", 202), ("the last", 202),
                               ("", 403), ("the old one\n", 403), ("the old one\r", 403),
                               ("the old one\nthe new one", 403), ("the", 403)):
            with self.subTest(secret=secret):
                self.assert_answer(daemon.post(push_of(), secret=secret), status)

    def test_a_key_of_the_daemon_alone_is_refused_in_a_hook(self):
        told = self.complaints("[o/r main]\n" + "".join(f"{key} = 1\n" for key in DAEMON_DEFAULTS))
        for key in DAEMON_DEFAULTS:
            with self.subTest(key):
                self.assertRegex(told, rf"\[o/r main\] {key}: .*\[hookd\]")

    def numbered(self, rows):
        """Return a section for each row of settings; directories are in the test's own."""
        for number, keys in enumerate(rows):
            keys = {"command": "true", **keys}
            if "directory" in keys:
                keys["directory"] = f"{self.home}{keys['directory']}"
            yield section(f"octo/site {number}", keys)

    def test_each_mistake_that_hookd_can_live_with_is_a_warning(self):
        (self.home / "srv").mkdir()
        told = self.prepare(*self.numbered(keys for keys, _, _ in self.WARNINGS.values())).hookd(
            "check")
        self.assertEqual(told.code, 0, told)
        for number, (name, (_, key, word)) in enumerate(self.WARNINGS.items()):
            with self.subTest(name):
                found = re.findall(complaint(f"octo/site {number}", key), told.err)
                self.assertEqual(len(found), 1, told)
                self.assertIn(word, found[0])

    def test_a_good_ini_is_not_warned_of(self):
        (self.home / "srv").mkdir()
        told = self.prepare(*self.numbered(self.SILENT.values())).hookd("check")
        self.assertEqual((told.code, told.err), (0, ""))

    def test_a_script_that_sh_cannot_read_is_an_error(self):
        keys = ("command", "activate", "on_success", "on_failure", "on_delete")
        told = self.complaints("\n".join(
            section(f"octo/site {key}", {"command": "true", key: "if true; then\n  echo"})
            for key in keys))
        for key in keys:
            with self.subTest(key):
                self.assertRegex(told, complaint(f"octo/site {key}", key))

    def test_a_secret_that_everyone_can_read_is_a_warning_because_a_start_takes_it(self):
        self.home.chmod(0o755)
        secret = self.home / "secret"
        secret.write_text("hunter2\n")
        secret.chmod(0o644)
        daemon = self.prepare(hook("true"), secret=None, secret_file=secret)
        told = daemon.hookd("check")
        self.assertEqual(told.code, 0, told)
        self.assertRegex(told.err, complaint("hookd", "secret_file"))
        self.assertNotIn("hunter2", told.out + told.err)
        daemon.start()
        daemon.tell(signal.SIGHUP)
        daemon.wait_for_log("reloaded")

    def test_a_token_file_that_cannot_be_read_is_an_error(self):
        daemon = self.prepare(hook("true", report_token_file="/nowhere/token"))
        for verb in ("check", "serve"):
            told = daemon.hookd(verb)
            self.assertEqual(told.code, 78, told)
            self.assertRegex(told.err, complaint("octo/site main", "report_token_file"))

    def test_no_word_of_an_ini_that_cannot_be_read_is_repeated(self):
        for name, text in (("a lone word", "[hookd]\nsecret\nhunter2\n"),
                           ("outside", "hunter2 = 1\n[hookd]\n"),
                           ("a password", "[o/r main]\ngit = https://me:hunter2@g.test/{banana}\n"),
                           ("a token", "[o/r main]\ncommand = a\nreport_token = hunter2\nx = 1\n"),
                           ("a twin", "[hookd]\nreport_token = hunter2\nreport_token = hunter2\n"),
                           ("a variable", "[o/r main]\ncommand = a\nenvironment = A hunter2\n")):
            with self.subTest(name):
                told = problems_of(text)
                self.assertIn("hookd.ini: ", told)
                self.assertNotIn("hunter2", told)

    def test_an_ini_may_have_a_mark_at_its_begin_and_any_line_ends(self):
        daemon = self.prepare(hook("one=1\necho $one > \"$HOME/said\""))
        text = daemon.ini.read_text()
        daemon.ini.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
        daemon.start()
        self.assert_answer(daemon.push(), 202)
        self.assertEqual(daemon.wait_for("said"), "1\n")


class Levels(Case):
    """`check REPO BRANCH`: each setting as it is for a branch, and the section that it is from."""

    VALUES = {  # of each setting: in the hook, in [owner/repo], in [hookd]
        "command": ("echo 1", "echo 2", "echo 3"), "directory": ("/srv/1", "/srv/2", "/srv/3"),
        "git": ("https://git.test/1", "https://git.test/2", "https://git.test/3"),
        "deploy_key": ("/k/1", "/k/2", "/k/3"), "timeout": ("1m", "2m", "3m"),
        "environment_file": ("/e/1", "/e/2", "/e/3"), "queue": ("replace", "every", "newest"),
        "event": ("push", "workflow_run", "push"), "paths": ("1/*", "2/*", "3/*"),
        "lock": ("one", "two", "three"), "catch_up": ("1d", "2d", "no"),
        "releases": ("2", "3", "4"), "shared": ("one/", "two/", "three/"),
        "activate": ("true 1", "true 2", "true 3"), "skip": ("[one]", "[two]", "[three]"),
        "healthcheck": ("http://a/1", "http://a/2", "http://a/3"),
        "healthcheck_timeout": ("1s", "2s", "3s"), "on_success": ("true 1", "true 2", "true 3"),
        "on_failure": ("true 4", "true 5", "true 6"), "on_delete": ("true 7", "true 8", "true 9"),
        "report_token_file": ("/t/1", "/t/2", "/t/3"),
        "report_api": ("https://a.test/1", "https://a.test/2", "https://a.test/3"),
        "report_url": ("https://u.test/1", "https://u.test/2", "https://u.test/3")}

    def settings(self, daemon, repo, branch):
        """Return what `check REPO BRANCH` says of each setting: its value and its level."""
        told = daemon.hookd("check", repo, branch)
        self.assertEqual(told.code, 0, told)
        self.assertNotIn("hunter2", told.out + told.err)
        rows = (re.split("  +", line) for line in told.out.partition("SETTING")[2].splitlines()[1:])
        return {row[0]: (" ".join(row[1:-1]), row[-1]) for row in rows}

    def test_each_setting_is_the_nearest_levels(self):
        first, second, third = ({key: values[level] for key, values in self.VALUES.items()}
                                for level in range(3))
        second["workflows"] = "CI"
        daemon = self.prepare(section("octo/site main", first), section("OCTO/Site", second),
                              section("octo/site dev", command="true"),
                              section("octo/shop main", event="push"), **third)
        wanted = (("octo/site", "main", 0, "[octo/site main]"),
                  ("octo/site", "dev", 1, "[OCTO/Site]"),
                  ("octo/shop", "main", 2, "[hookd]"))
        for repo, branch, level, place in wanted:
            found = self.settings(daemon, repo, branch)
            for key in set(self.VALUES) - {"command", "event"}:
                with self.subTest(key, level=place):
                    self.assertEqual(found[key], (self.VALUES[key][level], place))

    def test_what_is_not_set_has_the_default_of_the_contract(self):
        daemon = self.prepare(hook("true"), secret=None)
        daemon.start()
        found = self.settings(daemon, "octo/site", "main")
        self.assertEqual(set(found), set(HOOK_DEFAULTS))
        for key, default in HOOK_DEFAULTS.items():
            with self.subTest(key):
                wanted = {"command": ("true", "[octo/site main]"),
                          "directory": (f"{daemon.state}/work/octo/site/main", "default"),
                          "secret_file": (f"{daemon.state}/secret", "default")}
                self.assertEqual(found[key], wanted.get(key, (default, "default")))

    def test_no_secret_is_shown_and_only_the_one_that_counts(self):
        (self.home / "other").write_text("hunter2\n")
        (self.home / "other").chmod(0o600)
        daemon = self.prepare(
            hook("true", environment="TOKEN=hunter2", report_token="hunter2"),
            hook("true", "dev", secret_file=self.home / "other"), secret="hunter2")
        found = self.settings(daemon, "octo/site", "main")
        self.assertEqual(found["secret"], ("***", "[hookd]"))
        self.assertEqual(found["report_token"], ("***", "[octo/site main]"))
        self.assertIn("TOKEN", found["environment"][0])
        found = self.settings(daemon, "octo/site", "dev")
        self.assertEqual(found["secret"][0], "")
        self.assertEqual(found["secret_file"], (str(self.home / "other"), "[octo/site dev]"))

    def test_the_page_has_every_key_of_the_contract_with_its_default(self):
        found = re.findall(r"(?m)^#(\w+) =(.*)$", (HERE / "hookd.ini").read_text())
        places = {"state": "/var/lib/hookd", "secret_file": "/var/lib/hookd/secret",
                  "directory": "/var/lib/hookd/work/{repo}/{slug}"}
        wanted = {**DAEMON_DEFAULTS, **HOOK_DEFAULTS, **places}
        self.assertEqual(sorted(key for key, _ in found), sorted(wanted))
        self.assertEqual({key: text.strip() for key, text in found}, wanted)

    def test_a_default_of_the_daemon_need_not_concern_every_hook(self):
        daemon = self.prepare(section("octo/site", workflows="CI", shared="uploads/"),
                              hook("true"), hook("true", "dev", event="workflow_run"),
                              deploy_key=self.home / "key")
        (self.home / "key").touch(0o600)
        told = daemon.hookd("check")
        self.assertEqual((told.code, told.err), (0, ""))

    def test_only_hooks_that_fill_a_directory_alike_share_it(self):
        git = {"git": "https://git.test/{repo}", "command": "true"}
        rows = (  # two hooks, with what is said of the second
            (("octo/site main", {}), ("octo/site dev", {}), ""),
            (("octo/site main", {}), ("octo/shop main", {}), ""),
            (("octo/site main", {}), ("octo/site *", {}), ""),
            (("octo/site main", {}), ("octo/site refs/tags/main", {}), ""),
            (("octo/site main", {}), ("octo/site refs/heads/mai?", {}), ""),
            (("octo/site main", {"directory": "a"}), ("octo/shop dev", {"directory": "a"}), ""),
            (("octo/site main", {"directory": "a", "releases": 3}),
             ("octo/shop dev", {"directory": "a", "releases": 3}), "set directory"),
            (("octo/site main", {"directory": "a", "releases": 3}),
             ("octo/site dev", {"directory": "b/../a/", "releases": 3}), "set directory"),
            (("octo/site main", {"directory": "{name}", "releases": 3}),
             ("octo/site dev", {"directory": "{name}", "releases": 3}), "set directory"),
            (("octo/site main", {"directory": "{slug}", "releases": 3}),
             ("octo/shop dev", {"directory": "{slug}", "releases": 3}), ""))
        sections = {"": [], "refused": []}
        for number, ((first, keys), (second, more), words) in enumerate(rows):
            second += " " * (first == second)  # another section of the same meaning
            sections["refused" if words else ""] += [
                section(name.replace("octo/", f"o{number}/"), {**git, **{
                    key: f"{number}/{value}" if key == "directory" else value
                    for key, value in own.items()}})
                for name, own in ((first, keys), (second, more))]
        told = self.prepare(*sections[""]).hookd("check")
        self.assertEqual((told.code, told.err), (0, ""))
        told = self.prepare(*sections["refused"]).hookd("check")
        self.assertEqual(told.code, 78, told)
        for number, ((first, _), (second, more), words) in enumerate(rows):
            with self.subTest(first, second=second, **more):
                found = [line for line in told.err.splitlines() if f"[o{number}/" in line]
                self.assertEqual(len(found), bool(words), told)
                self.assertIn(words, "".join(found))


class EnvironmentFile(Case):
    """`environment_file`: what systemd's EnvironmentFile= means by it, read at each run."""

    LINES = (  # a line of the file, the value of A that the command finds (env-file.c of systemd)
        ("A=plain", "plain"), ("A=", ""), ("A=two words", "two words"),
        ("A=trailing   ", "trailing"), ("A=  leading", "leading"),
        ("  A=indented", "indented"), ("A =spaced", "spaced"),
        ("A='single'", "single"), ('A="double"', "double"), ('A="  kept  "', "  kept  "),
        ("A='a \\\"b\\\" \\n'", 'a \\"b\\" \\n'),
        ('A="a \\"b\\" \\\\ \\$c \\` \\n"', 'a "b" \\ $c ` \\n'),
        ("A=a\\ b\\\\c\\\"", 'a b\\c"'), ("A=it\"s", 'it"s'), ("A='one' \"two\"", "onetwo"),
        ("A='one'two", "onetwo"), ("A=first \\\nsecond", "first second"),
        ("A='two\nlines'", "two\nlines"), ('A="cut \\\nhere"', "cut here"),
        ("A=a # b", "a # b"), ("A=a;b", "a;b"), ("A=#b", "#b"), ("A=$HOME ${HOME} `id`", None),
        ("A=a=b", "a=b"), ("A=über", "über"), ("A=1\nA=2", "2"), ("#A=1\n;A=2\n\nA=3", "3"),
        ("A=%h", "%h"))

    def said(self, daemon, number):
        """Send a push and return what its command said, at run `number`."""
        self.assert_answer(daemon.push(commit=sha(number)), 202)
        daemon.settle()
        return daemon.read(f"said.{number}")

    def test_values_are_quoted_as_systemd_has_them(self):
        variables = self.home / "site.env"
        daemon = self.serve(hook('printf %s "$A" > "$HOME/said.$HOOKD_RUN"',
                                 environment_file=variables, environment="A=ini\nHOME2=x"))
        for number, (text, value) in enumerate(self.LINES, 1):
            with self.subTest(text):
                variables.write_text(text + "\n")
                wanted = text.partition("=")[2] if value is None else value
                self.assertEqual(self.said(daemon, number), wanted)

    def test_it_never_sets_what_is_hookds(self):
        variables = self.home / "site.env"
        variables.write_text("HOOKD_REPO=evil\nHOOKD_EXTRA=evil\nB=1\n")
        daemon = self.serve(hook('env > "$HOME/said"', environment_file=variables))
        self.assert_answer(daemon.push(), 202)
        daemon.settle()
        self.assertNotIn("evil", daemon.read("said"))
        told = daemon.hookd("check")
        self.assertRegex(told.out + told.err, complaint("octo/site main", "environment_file"))
        self.assertIn("HOOKD_REPO", told.out + told.err)

    def test_one_that_cannot_be_read_fails_the_run_and_check_says_so_before(self):
        variables = self.home / "site.env"
        daemon = self.serve(hook(NOTE, environment_file=variables))
        told = daemon.hookd("check")
        self.assertEqual(told.code, 78, told)
        self.assertRegex(told.err, complaint("octo/site main", "environment_file"))
        self.assert_answer(daemon.push(commit=sha(1)), 202)
        self.assertEqual(daemon.settled()["state"], "failed")
        self.assertIn("site.env", daemon.log)
        variables.write_text("A=1\n")
        self.assert_answer(daemon.push(commit=sha(2)), 202)
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual(daemon.seen(), [sha(2)])
        self.assertEqual(daemon.hookd("check").code, 0)

    def test_its_values_are_shown_nowhere(self):
        variables = self.home / "site.env"
        variables.write_text("TOKEN=hunter2-hunter2\nHOOKD_X=hunter2-hunter2\nno variable\n")
        daemon = self.prepare(hook("true", environment_file=variables))
        for arguments in (("check",), ("check", "octo/site", "main")):
            told = daemon.hookd(*arguments)
            self.assertNotIn("hunter2", told.out + told.err)


# ---------------------------------------------------------------- Judgement

VECTORS = (  # from octokit's, gidgethub's and GitHub's own tests: secret, body, signature
    ("mysecret", '{"foo":"bar"}',
     "sha256=4864d2759938a15468b5df9ade20bf161da9b4f737ea61794142f3484236bda3"),
    ("development", '{"foo":"Foo\\n\\u001B[34mbar: ♥♥♥♥♥♥♥♥\\nthis-is-lost\\u001B[0m\\u001B[2K"}',
     "sha256=afecc3caa27548bb90d51a50384cb2868b9a3327b4ad6a01c9bd4ed0f8b0b12c"),
    ("development", '{"foo":"\\\\u001b"}',
     "sha256=6f8326efbacfbd04e870cea25b5652e635be8c9807f2fd5348ef60753c9e96ed"),
    ("secret", "data",
     "sha256=1b2c16b75bd2a870c114153ccda5bcfca63314bc722fa160d690de133ccbb9db"),
    ("123456", "gidget",
     "sha256=091319196718d5bcb1c20ad25fc890597423ecdbad1f947f560afd643b5000de"),
    ("It's a Secret to Everybody", "Hello, World!",
     "sha256=757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"),
)

DIGEST = "b207d041ea2c868d2f0a04f9476df323457b51444dc832111123f3f753cffda5"
SIGNED = b'{"ref":"refs/heads/main"}'  # what DIGEST is of, under test-secret
FALSE_SIGNATURES = {
    "bare": DIGEST, "upper prefix": "SHA256=" + DIGEST, "mixed prefix": "Sha256=" + DIGEST,
    "empty": "", "prefix only": "sha256=", "no equals sign": "sha256" + DIGEST,
    "colon": "sha256:" + DIGEST, "prefix twice": "sha256=sha256=" + DIGEST,
    "63 digits": "sha256=" + DIGEST[:63], "32 digits": "sha256=" + DIGEST[:32],
    "65 digits": "sha256=" + DIGEST + "0", "last digit off": "sha256=" + DIGEST[:63] + "0",
    "first digit off": "sha256=0" + DIGEST[1:], "space inside": "sha256= " + DIGEST,
    "space between": f"sha256={DIGEST[:35]} {DIGEST[35:]}",
    "pairs": "sha256=" + ":".join(DIGEST[i:i + 2] for i in range(0, 64, 2)),
    "quoted": f'"sha256={DIGEST}"', "sha1": "sha1=7e06435bcf391795fb7449979ecebf9969e95710",
    "sha1 prefix": "sha1=" + DIGEST, "sha512 prefix": "sha512=" + DIGEST * 2,
    "short sha1": "sha256=7e06435bcf391795fb7449979ecebf9969e95710",
    "list, bad first": f"sha256={'0' * 64},sha256={DIGEST}",
    "list, good first": f"sha256={DIGEST},sha256={'0' * 64}",
    "not ASCII": "sha256=" + "é" * 64, "non-breaking space": f"sha256=\xa0{DIGEST}",
    "zeros": "sha256=" + "0" * 64, "not hexadecimal": "sha256=" + "z" * 64, "a word": "foo",
    "base64": "sha256=sgfQQeosho0vCgT5R23zI0V7UURNyDIRESPz91PP/aU=",
    "junk around": f"sha256=!{DIGEST}!", "encoded": "sha256%3D" + DIGEST,
    "of an empty secret":
        "sha256=70f408f0cf4971860f1ae76a84a59fed54c23b666a5c1069573bd17b46168283",
    "of no secret":
        "sha256=090ba1b9ca860d37bb4ca7492549a8a347caac3490f763399e6498622c9b47f9",
    "secret put before":
        "sha256=eab13a05aba70b041ebcb5b44a0877920f3db745fdd6483e1e4fe7f9a6ed0c0e",
    "secret with newline":
        "sha256=a3643e18104910f39ee02e9d11fe0f5ddad2cab11909b850827c63fb18af610b",
    "body with newline":
        "sha256=849ffef3abf714f929049f26d0f837aa3bf5d861ecca057a452d947f81478061",
    "the secret": "test-secret",
}

NO_JSON = {
    "nothing": b"", "a word": b"push", "half": b'{"ref":', "a list": b"[]", "null": b"null",
    "a number": b"1", "text": b'"refs/heads/main"', "latin-1": b'{"ref":"\xe9"}',
    "deep": b"[" * 100_000, "deep and closed": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "5,000 digits": b'{"id":' + b"9" * 5_000 + b"}",
    "UTF-16": json.dumps(push_of()).encode("utf-16"),
    "UTF-32": json.dumps(push_of()).encode("utf-32"),
    "two objects": b"{}{}", "NUL": b"\0", "a comma too many": b'{"a":1,}'}

LEGAL = ("`id`", "$(id)", "a;b", "-rf", "x';id;'", 'x"y', "a&b|c", "a>b", "#1", "100%",
         "%s%n", "feature/über", "a/-b/--c", "日本", "{repo}", "$HOME", "v1.0", "a=b", "@x",
         "refs/heads/main")

ILLEGAL = ("refs/heads/", "refs/heads/../../../evil", "refs/heads/a..b", "refs/heads/a b",
           "refs/heads/a\nb", "refs/heads/a\0b", "refs/heads/a\x1b[31m", "refs/heads/a~1",
           "refs/heads/a^", "refs/heads/a:b", "refs/heads/a?", "refs/heads/a*",
           "refs/heads/a[", "refs/heads/a\\b", "refs/heads//a", "refs/heads/a/",
           "refs/heads/.a", "refs/heads/a.lock", "refs/heads/a.", "refs/heads/a@{1}",
           "main", "HEAD", "", "refs", "/refs/heads/main", "refs/heads/main\n")

PATHS = (  # what the push says of itself, and whether a hook for docs/* and *.md runs
    ("a file that matches", {"modified": ["docs/a.txt"]}, 202),
    ("one deep below", {"added": ["docs/x/y/z.txt"]}, 202),
    ("a removed one", {"removed": ["README.md"]}, 202),
    ("one of several", {"added": ["src/a.c"], "modified": ["docs/a"]}, 202),
    ("none that matches", {"modified": ["src/a.c", "docs.txt"]}, 200),
)


def read_hook(text):
    """Return the hook that an ini has for octo/site."""
    (one,) = read_ini(text).hooks_for("octo/site")
    return one


class PureConfiguration(unittest.TestCase):
    """The rules of the ini, called directly: text in, values out."""

    NO_NUMBERS = ("x", "-1", "+5", "1_0", "٣", "1e3", "9" * 40)
    VALUES = (  # key, the texts that it takes with what they mean, the texts that it refuses
        ("timeout", {"90s": 90, "15m": 900, "2h": 7200, "1d": 86400},
         ("0s", "no", "90", "1.5h", "15 m", "15M", "1h30m", "-1s", "٣s", "9" * 40 + "d",
          *NO_NUMBERS)),
        ("healthcheck_timeout", {"1s": 1, "5m": 300}, ("0s", "90", "1.5h", "no")),
        ("catch_up", {"no": 0, "1h": 3600, "1d": 86400}, ("maybe", "-1h", "1 h", "1hh", "90")),
        ("releases", {"no": 0, "2": 2, "50": 50}, ("0", "1", "5.0", "2 2", *NO_NUMBERS)),
        ("max_body", {"64K": 65536, "25M": 26214400, "900": 900}, ("0", "25m", "25MB", "1.5M")),
        ("jobs", {"1": 1, "12": 12}, ("0", "two", "1s", *NO_NUMBERS)),
        ("keep", {"50": 50}, ("0", "all")),
        ("quiet", {"yes": True, "on": True, "No": False, "0": False}, ("perhaps", "2")),
        ("path", {"/": "/", "/hook-1f2e": "/hook-1f2e"}, ("hook", "/a b", "/a?b", "/a#b", "/é")),
        ("queue", {"newest": "newest", "every": "every", "replace": "replace"},
         ("oldest", "Newest", "every replace")),
        ("event", {"push": "push", "release": "release"}, ("ping", "PUSH", "push release")),
    )

    def value(self, key, text):
        """Return what a key means, read from the section where it belongs."""
        if key in DAEMON_DEFAULTS:
            ini = f"[hookd]\n{key} = {text}\n[octo/site main]\ncommand = true\n"
            return getattr(read_ini(ini), key)
        ini = f"[octo/site main]\ncommand = true\ngit = https://git.test/x\n{key} = {text}\n"
        return getattr(read_hook(ini), key)

    def test_a_value_has_one_form(self):
        for key, good, bad in self.VALUES:
            for text, value in good.items():
                with self.subTest(key, text=text):
                    self.assertEqual(self.value(key, text), value)
            for text in bad:
                with self.subTest(key, text=text), self.assertRaises(hookd.ConfigError) as raised:
                    self.value(key, text)
                self.assertIn(key, str(raised.exception.args))

    def test_an_address_is_a_host_and_port_or_a_socket(self):
        for text in ("127.0.0.1:9000", "[::1]:0", "localhost:65535", "unix:/run/hookd/hookd.sock"):
            with self.subTest(text):
                self.assertEqual(str(self.value("listen", text)), text)
        for text in ("9000", ":9000", "host:", "host:x", "host:65536", "host:-1", "host:٣", "unix:",
                     "::1:9000", "[::1]", "host:123456", "unix:relative", "http://host:1", "a b:1"):
            with self.subTest(text), self.assertRaises(hookd.ConfigError):
                self.value("listen", text)

    def test_every_default_of_the_page_is_the_default_of_the_program(self):
        shipped = (HERE / "hookd.ini").read_text()
        every = re.sub(r"(?m)^#(\w+ =)", r"\1", shipped)
        plain, full = (dataclasses.replace(read_ini(text), levels={}) for text in (shipped, every))
        self.assertEqual(plain, full)

    def test_secrets_never_show_when_a_value_is_printed(self):
        ini = "[octo/site main]\ncommand = true\nsecret = hunter2\n"
        self.assertEqual(list(read_hook(ini).secret), ["hunter2"])
        self.assertNotIn("hunter2", repr(read_ini(ini)) + str(read_hook(ini)))

    def test_a_slug_is_a_dns_label_that_no_other_branch_has(self):
        self.assertEqual([hookd.slug(name) for name in ("main", "v2", "fix-1")],
                         ["main", "v2", "fix-1"])
        letters = ("a", "A", "-", "/", "1", "_", "é")
        names = {"".join(word) for size in range(1, 6)
                 for word in itertools.product(letters, repeat=size)}
        names |= {"x" * 62, "x" * 63, "x" * 64, "x" * 200, "-" * 70, "日本", "İ", "ß", ".",
                  "\udcff"}
        names |= {hookd.slug(name) for name in list(names)}
        slugs = {}
        for name in names:
            label = hookd.slug(name)
            self.assertRegex(label, r"\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z", name)
            self.assertEqual(slugs.setdefault(label, name), name)

    def test_a_pattern_in_a_directory_is_replaced_once(self):
        found = hookd.fill("/srv/{owner}/{name}/{repo}/{branch}/{slug}", "o/r", "a/{name}")
        self.assertEqual(found, "/srv/o/r/o/r/a/{name}/" + hookd.slug("a/{name}"))


class PureJudgement(unittest.TestCase):
    """The rules for a delivery, called directly: bytes in, a decision or a refusal out."""

    INI = """\
[octo/site main]
command = true
[octo/site *]
command = true
paths = docs/*
[octo/site refs/tags/*]
command = true
[octo/site rel*]
event = release
command = true
[octo/ci *]
event = workflow_run
command = true
"""

    def setUp(self):
        self.config = read_ini(f"[hookd]\nsecret = {SECRET}\n{self.INI}")

    def test_signatures(self):
        for secret, body, signature in VECTORS:
            with self.subTest(body):
                found = hookd.authenticate(["other", secret], signature, body.encode())
                self.assertEqual(found, secret)
        for name, signature in FALSE_SIGNATURES.items():
            with self.subTest(name), self.assertRaises(hookd.Refusal) as raised:
                hookd.authenticate(["test-secret"], signature, SIGNED)
            self.assertEqual(raised.exception.status, 403)
        with self.assertRaises(hookd.Refusal):
            hookd.authenticate([""], FALSE_SIGNATURES["of an empty secret"], SIGNED)

    def judge(self, raw):
        """Return the Decision on the bytes of a whole request."""
        head, _, body = raw.partition(b"\r\n\r\n")
        headers = hookd.read_headers(head.partition(b"\r\n")[2])
        secrets = self.config.secrets
        secret = hookd.authenticate(secrets, headers["x-hub-signature-256"], body)
        return hookd.decide(self.config, headers, body, secret)

    def test_the_same_rules_hold_without_a_socket(self):
        table = ((push_of(), "push", 202, "octo/site main"),
                 (push_of("x"), "push", 200, "octo/site *"),
                 (push_of(ref="refs/tags/v1"), "push", 202, "octo/site refs/tags/*"),
                 (push_of(repo="octo/ci"), "push", 200, None),
                 (workflow_run_of(repo="octo/ci"), "workflow_run", 202, "octo/ci *"),
                 (release_of("release-1"), "release", 202, "octo/site rel*"),
                 (release_of("main"), "release", 200, None))
        for payload, event, status, wanted in table:
            with self.subTest(event, ref=payload.get("ref")):
                decision = self.judge(request(payload, X_GitHub_Event=event))
                self.assertEqual(decision.status, status, decision.text)
                self.assertEqual(decision.hook.section if decision.hook else None, wanted)

    def test_what_hookd_writes_itself_it_reads(self):
        for event, ref in (("push", "refs/heads/a/b"), ("workflow_run", "refs/heads/a"),
                           ("release", "refs/tags/v1")):
            commit = "" if event == "release" else sha(1)
            push = hookd.Push(event, "octo/site", ref, commit, pusher="mona")
            with self.subTest(event):
                _, data = hookd.read_payload(hookd.push_json(push), False)
                self.assertTrue(hookd.counts(event, data, "octo/site"))
                read = hookd.read_push(event, data, "octo/site")
                self.assertEqual((read.event, read.repo, read.ref, read.commit),
                                 (event, "octo/site", ref, commit))
        gone = push._replace(event="push", ref="refs/heads/a", commit="", deleted=True)
        _, data = hookd.read_payload(hookd.push_json(gone), False)
        self.assertTrue(hookd.read_push("push", data, "octo/site").deleted)

    def test_a_length_is_given_in_one_way(self):
        for headers, length in (
                ({"content-length": "0"}, 0), ({"content-length": "12"}, 12),
                ({"content-length": "9" * 15}, 10**15 - 1),
                ({"content-length": "9" * 5000}, 10**16),
                ({}, 411), ({"content-length": "x"}, 400), ({"content-length": "-1"}, 400),
                ({"content-length": "+1"}, 400), ({"content-length": "1_0"}, 400),
                ({"content-length": "\u0661"}, 400), ({"content-length": ""}, 400),
                ({"transfer-encoding": "chunked"}, 411), ({"transfer-encoding": "gzip"}, 501),
                ({"transfer-encoding": "chunked", "content-length": "1"}, 400)):
            with self.subTest(headers):
                if length in (400, 411, 501):
                    with self.assertRaises(hookd.Refusal) as raised:
                        hookd.body_length("POST", headers)
                    self.assertEqual(raised.exception.status, length)
                else:
                    self.assertEqual(hookd.body_length("POST", headers), length)
        self.assertEqual(hookd.body_length("GET", {}), 0)

    def test_a_head_alone_may_be_refused(self):
        config = read_ini("[hookd]\npath = /hook\nmax_body = 10\nallow_from = 10.0.0.0/8\n"
                          "[octo/site main]\ncommand = true\n")
        good = {"content-type": "application/json", "x-hub-signature-256": "sha256=" + "0" * 64}
        for status, reason, changes in (
                (0, "", {}), (0, "", {"path": "/hook?a=1"}), (0, "", {"path": "http://x/hook"}),
                (403, "address", {"client": "192.0.2.1"}), (403, "address", {"client": ""}),
                (404, "not found", {"path": "/"}), (405, "only POST", {"command": "GET"}),
                (501, "method", {"command": "BREW"}), (413, "large", {"length": 11}),
                (415, "Encoding", {"content-encoding": "gzip"}),
                (0, "", {"content-encoding": "Identity"}),
                (415, "Content-Type must", {"content-type": "text/plain"}),
                (415, "Content-Type missing", {"content-type": ""}),
                (0, "", {"content-type": "Application/JSON ; charset=utf-8"}),
                (403, "signature missing", {"x-hub-signature-256": ""})):
            with self.subTest(changes):
                told = {"path": "/hook", "command": "POST", "client": "10.1.2.3", "length": 10,
                        **changes}
                headers = {name: changes.get(name, text) for name, text in good.items()}
                headers.update((name, text) for name, text in changes.items() if "-" in name)
                request = SimpleNamespace(headers=headers, path=told["path"],
                                          command=told["command"],
                                          address_string=lambda told=told: told["client"])
                try:
                    hookd.check_head(config, request, told["length"])
                    self.assertEqual(status, 0)
                except hookd.Refusal as refusal:
                    self.assertEqual(refusal.status, status)
                    self.assertIn(reason, refusal.reason)

    def test_what_a_push_says_of_its_place_is_read_or_left_out(self):
        for before, read in ((sha(1), sha(1)), (ZERO, ""), ("garbage", ""), ("", ""), (7, "")):
            with self.subTest(before=before):
                push = hookd.read_push("push", push_of(before=before), "octo/site")
                self.assertEqual(push.before, read)
        for at, order in ((5.0, 5), (2.0**52, 2**52), (2.0**53, 0), (0.0, 0), (-1.0, 0), ("5", 0),
                          (float("nan"), 0), (None, 0), (True, 0)):
            with self.subTest(pushed_at=at):
                payload = push_of(repository=repository_of(pushed_at=at))
                self.assertEqual(hookd.read_push("push", payload, "octo/site").order, order)

    def test_no_mutation_of_a_delivery_is_more_than_refused(self):
        chance = random.Random(20260101)
        seeds = [json.dumps(payload).encode() for payload in (
            push_of(), deletion_of("main"), workflow_run_of(repo="octo/ci"), release_of())]
        for _ in range(3000):
            body = bytearray(chance.choice(seeds))
            for _ in range(chance.randrange(1, 6)):
                place = chance.randrange(len(body))
                body[place:place + chance.randrange(3)] = chance.choice(
                    (b"", b"null", b"{}", b"[]", b'"', b"0", b"\\", b"\xff", b"\\ud800", b"1e9"))
            event = chance.choice(("push", "workflow_run", "release", "ping", "other"))
            try:
                decision = self.judge(request(bytes(body), X_GitHub_Event=event))
                self.assertIn(decision.status, (200, 202))
            except hookd.Refusal as refusal:
                self.assertIn(refusal.status, (400, 403))

    def test_no_ref_is_taken_that_git_would_refuse(self):
        chance = random.Random(20260102)
        pieces = ("a", "b", "/", ".", "..", "-", "@", "{", "~", "^", ":", "?", "*", "[", "\\", " ",
                  ".lock", "\x7f", "\t", "é", "$", ";")
        refs = {"refs/heads/" + "".join(chance.choices(pieces, k=chance.randrange(1, 6)))
                for _ in range(150)}
        refs |= {ref for ref in ILLEGAL if "\0" not in ref}
        for ref in refs:
            if self.takes(ref):
                done = subprocess.run(["git", "check-ref-format", ref], check=False)
                self.assertEqual(done.returncode, 0, ref)
        for name in LEGAL:
            self.assertTrue(self.takes("refs/heads/" + name), name)

    def takes(self, ref):
        try:
            self.judge(request(push_of(ref=ref)))
        except hookd.Refusal:
            return False
        return True

    def test_text_of_strangers_is_made_fit_for_a_line(self):
        for text in ("plain", "über", "a\nb", "\x1b[31m", "\0", "\x85", "\u2028", "\u202e",
                     "\ud800"):
            with self.subTest(text):
                self.assertTrue(hookd.escape(text).isprintable())


class Judgement(Case):
    """What a delivery means: its signature, its shape, its hook."""

    def test_known_signatures_are_accepted(self):
        secrets = "\n".join(dict.fromkeys(secret for secret, _, _ in VECTORS))
        daemon = self.serve(hook("true"), secret=secrets)
        for _, body, signature in VECTORS:
            with self.subTest(body):
                data = body.encode()
                answer = daemon.post(data, X_Hub_Signature_256=signature)
                self.assert_answer(answer, 400, "signed" if body[:1] == "{" else "JSON")
                answer = daemon.post(data + b" ", X_Hub_Signature_256=signature)
                self.assert_answer(answer, 403, "signature does not match")

    def test_anything_but_the_signature_is_refused(self):
        daemon = self.serve(hook("true"), secret="test-secret")
        good = daemon.post(SIGNED, X_Hub_Signature_256="sha256=" + DIGEST)
        self.assertNotEqual(good.status, 403, "the true signature is refused too")
        for name, value in FALSE_SIGNATURES.items():
            with self.subTest(name):
                answer = daemon.post(SIGNED, X_Hub_Signature_256=value)
                self.assert_answer(answer, 403, "signature")
                self.assertNotIn(DIGEST, answer.text)
        self.assertNotIn(DIGEST, daemon.log)

    def test_without_a_signature_nothing_is_accepted(self):
        daemon = self.serve(hook("true"))
        for headers in ({}, {"Content_Type": None}, {"X_Hub_Signature": "sha1=" + hmac.new(
                SECRET.encode(), b"{}", hashlib.sha1).hexdigest()}):
            with self.subTest(**headers):
                answer = daemon.post(b"{}", X_Hub_Signature_256=None, **headers)
                self.assert_answer(answer, 403, "signature missing")

    def test_each_of_two_secrets_is_accepted_while_one_is_replaced(self):
        daemon = self.serve(hook("true"), secret="old\nnew")
        for secret, status in (("old", 202), ("new", 202), ("older", 403), ("old\nnew", 403)):
            with self.subTest(secret):
                self.assert_answer(daemon.post(push_of(), secret=secret), status)

    def test_a_secret_speaks_only_for_its_own_repository(self):
        daemon = self.serve(hook("true", secret="of the site"),
                            hook("true", "dev", secret="of its branch dev"),
                            section("octo/shop", secret="of the shop"),
                            hook("true", repo="octo/shop"), secret="of the rest")
        table = (("of the site", "octo/site", 202), ("of the shop", "octo/shop", 202),
                 ("of the rest", "octo/none", 200), ("of the shop", "octo/site", 403),
                 ("of the site", "octo/shop", 403), ("of the rest", "octo/site", 403))
        for secret, repo, status in table:
            with self.subTest(secret=secret, repo=repo):
                answer = daemon.post(push_of(repo=repo), secret=secret)
                words = {403: "the secret is another repository's"}.get(status, "")
                self.assert_answer(answer, status, words)
        for branch, status in (("dev", 202), ("main", 403)):
            with self.subTest("of its branch dev", branch=branch):
                answer = daemon.post(push_of(branch), secret="of its branch dev")
                self.assert_answer(answer, status)
        for payload, event in ((push_of("no-hook"), "push"), (push_of(), "ping")):
            with self.subTest(event):
                answer = daemon.post(payload, secret="of the shop", X_GitHub_Event=event)
                self.assert_answer(answer, 403, "the secret is another repository's")

    def test_ping_is_answered_with_the_hooks_of_the_repository(self):
        daemon = self.serve(hook("true"), hook("true", "staging"))
        ping = {"zen": "Keep it logically awesome.", "hook_id": 1, "hook": {"events": ["push"]}}
        answer = daemon.post({**ping, "repository": repository_of()}, X_GitHub_Event="ping")
        self.assert_answer(answer, 200, "pong: octo/site has hooks for main, staging")
        answer = daemon.post({**ping, "organization": {"login": "octo"}}, X_GitHub_Event="ping")
        self.assert_answer(answer, 200, "pong")
        answer = daemon.post({**ping, "repository": repository_of("octo/none")},
                             X_GitHub_Event="ping")
        self.assert_answer(answer, 200, "octo/none")

    def test_a_form_is_read_and_signed_as_it_was_sent(self):
        daemon = self.serve(hook(NOTE))
        payload = push_of(commit=sha("form"), note="a + b & c = ♥ %20")
        self.assert_answer(daemon.exchange(form(payload)), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("form")])
        self.assertEqual(json.loads(daemon.read("state/runs/1/payload.json")), payload)
        inner = sign(json.dumps(payload).encode())
        self.assert_answer(daemon.exchange(form(payload, X_Hub_Signature_256=inner)), 403)

    def test_a_form_without_a_payload_is_refused(self):
        daemon = self.serve(hook("true"))
        for body in (b"", b"payload=", b"payload", b"other=1", b"payload=%7B", b"payload=%FF%FE",
                     b"payload=[]", b"&&&=&payload", b"payload=1"):
            with self.subTest(body):
                answer = daemon.post(body, Content_Type="application/x-www-form-urlencoded")
                self.assert_answer(answer, 400)

    def test_a_signed_body_that_is_no_delivery_is_refused(self):
        daemon = self.serve(hook("true"))
        for name, body in NO_JSON.items():
            with self.subTest(name):
                self.assert_answer(daemon.post(body), 400)
        self.assert_answer(daemon.push(), 202)

    def test_a_member_of_a_wrong_type_never_breaks_the_answer(self):
        daemon = self.serve(hook("true", "*", paths="index.html"), hook("true", "refs/tags/*"))
        wrong = (None, 0, -1, True, 1e300, "", "x", [], {}, [None], {"a": 1}, "\ud800", "\0",
                 "x" * 70_000)
        fields = ("ref", "before", "after", "created", "deleted", "forced", "commits",
                  "head_commit", "pusher", "sender", "repository", "organization")
        inner = (("repository", "full_name"), ("repository", "owner"), ("repository", "pushed_at"),
                 ("pusher", "name"), ("head_commit", "id"))
        needed = ("ref", "after", "repository", "full_name")
        for value in wrong:
            for field in fields:
                gone = field == "deleted" and value is True
                self.assert_answered(daemon, push_of(**{field: value}), field, value,
                                     400 if field in needed else 200 if gone else 202)
            for field, member in inner:
                whole = push_of()
                whole[field] = {**whole[field], member: value}
                self.assert_answered(daemon, whole, member, value,
                                     400 if member in needed else 202)
            for member in ("added", "modified", "removed"):
                commits = [{"id": sha(1), "added": [], "modified": [], "removed": [],
                            member: value}]
                known = isinstance(value, list)  # and then no path is among them
                self.assert_answered(daemon, push_of(commits=commits), member, value,
                                     200 if known else 202)
        for field in (*fields, "no such field"):
            whole = push_of()
            whole.pop(field, None)
            self.assert_answered(daemon, whole, field, "missing", 400 if field in needed else 202)

    def assert_answered(self, daemon, payload, field, value, status):
        with self.subTest(field, value=str(value)[:40]):
            self.assert_answer(daemon.post(payload), status)

    def test_an_event_header_does_not_make_a_push(self):
        daemon = self.serve(hook("true", "*"))
        for name, payload in (("release", release_of()), ("workflow", workflow_run_of()),
                              ("issue", {"action": "opened", "repository": repository_of()}),
                              ("create", {"ref": "main", "ref_type": "branch",
                                          "repository": repository_of()})):
            with self.subTest(name):
                self.assert_answer(daemon.post(payload), 400)
        self.assert_answer(daemon.post(push_of(), X_GitHub_Event=None), 400)

    def test_a_branch_may_have_any_legal_name_and_is_only_ever_data(self):
        daemon = self.serve(hook('printf "%s\\n" "$HOOKD_BRANCH" >> "$HOME/said"\n'
                                 'printf "%s\\n" "$HOOKD_SLUG" >> "$HOME/slugs"', "*"), jobs=1)
        for branch in LEGAL:
            with self.subTest(branch):
                self.assert_answer(daemon.push(branch), 202, branch)
        daemon.settle()
        self.assertEqual(sorted(daemon.read("said").splitlines()), sorted(LEGAL))
        slugs = daemon.read("slugs").split()
        self.assertEqual(len(set(slugs)), len(LEGAL))
        for slug in slugs:
            self.assertRegex(slug, r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")

    def test_a_name_that_git_would_refuse_runs_nothing(self):
        daemon = self.serve(hook(NOTE, "*", directory=self.home / "work/{branch}"),
                            hook(NOTE, "refs/*", directory=self.home / "work/{branch}"))
        for ref in ILLEGAL:
            with self.subTest(ref):
                self.assert_answer(daemon.push(ref=ref), 400)
        daemon.settle()
        self.assertNotIn("evil", [one.name for one in self.home.parent.iterdir()])
        self.assertFalse((self.home / "evil").exists())

    def test_a_repository_name_never_leaves_its_directory(self):
        daemon = self.serve(hook(NOTE, "*", "octo/*"))
        for repo in ("octo/..", "octo/../../evil", "../evil", "octo/", "/evil", "octo",
                     "octo/a/b", "octo/a b", "octo/\0", "octo/a\nb", "octo/.", "octo/%2e%2e"):
            with self.subTest(repo):
                self.assert_answer(daemon.push(repo=repo), 400)
        self.assertEqual(daemon.targets(), {})

    def test_a_late_delivery_is_ignored_and_a_repeated_one_is_taken(self):
        daemon = self.serve(hook(NOTE))
        new, old = 1_700_000_100, 1_700_000_000
        send = {when: push_of(commit=sha(when), repository=repository_of(pushed_at=when))
                for when in (new, old)}
        self.assert_answer(daemon.post(send[new]), 202)
        self.assert_answer(daemon.post(send[old]), 200, "ignored")
        daemon.settle()
        self.assert_answer(daemon.post(send[old]), 200, "ignored")
        self.assert_answer(daemon.post(send[new]), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(new), sha(new)])

    def test_paths_decide_by_what_the_push_touched(self):
        daemon = self.serve(hook("true", paths="docs/*\n*.md"))
        for name, changes, status in PATHS:
            commit = {"id": sha(name), "added": [], "modified": [], "removed": [], **changes}
            with self.subTest(name):
                self.assert_answer(daemon.push(commits=[commit]), status,
                                   "ignored" if status == 200 else "queued")
        other = {"id": sha(1), "added": [], "modified": ["src/a.c"], "removed": []}
        unknown = (("created", {"created": True, "before": ZERO}), ("forced", {"forced": True}),
                   ("no commits", {"commits": []}), ("2048 commits", {"commits": [other] * 2048}))
        for name, fields in unknown:
            with self.subTest(name):
                self.assert_answer(daemon.push(**{"commits": [other], **fields}), 202)

    def test_a_workflow_run_counts_only_completed_successful_and_from_a_push_here(self):
        daemon = self.serve(hook(NOTE, event="workflow_run"))
        table = (
            ("failed", {"conclusion": "failure"}, {}), ("skipped", {"conclusion": "skipped"}, {}),
            ("cancelled", {"conclusion": "cancelled"}, {}), ("nothing", {"conclusion": None}, {}),
            ("pull request", {"event": "pull_request"}, {}), ("a timer", {"event": "schedule"}, {}),
            ("a fork", {"head_repository": repository_of("mallory/site")}, {}),
            ("a fork without a name", {"head_repository": None}, {}),
            ("another branch", {"head_branch": "dev"}, {}),
            ("requested", {"status": "queued"}, {"action": "requested"}),
            ("in progress", {"status": "in_progress"}, {"action": "in_progress"}))
        for name, run, fields in table:
            with self.subTest(name):
                answer = daemon.post(workflow_run_of(run=run, **fields),
                                     X_GitHub_Event="workflow_run")
                self.assert_answer(answer, 200, "ignored")
        self.assert_answer(daemon.push(), 200, "ignored")
        answer = daemon.post(workflow_run_of(sha("tested")), X_GitHub_Event="workflow_run")
        self.assert_answer(answer, 202, "octo/site main at " + sha("tested")[:7])
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("tested")])

    def test_a_release_counts_when_it_is_published(self):
        say = 'echo "$HOOKD_REF $HOOKD_BRANCH $HOOKD_EVENT" >> "$HOME/said"'
        daemon = self.serve(hook(say, "v*", event="release"))
        for action in ("created", "edited", "released", "deleted", "unpublished", "prereleased"):
            with self.subTest(action):
                answer = daemon.post(release_of(action=action), X_GitHub_Event="release")
                self.assert_answer(answer, 200, "ignored")
        self.assert_answer(daemon.post(release_of("x1"), X_GitHub_Event="release"), 200)
        self.assert_answer(daemon.post(release_of("v1.0"), X_GitHub_Event="release"), 202)
        self.assertEqual(daemon.wait_for("said"), "refs/tags/v1.0 v1.0 release\n")


LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


class Meaning(Case):
    """What a signed delivery means, in what the contract adds to version 1.0."""

    SLUG = 'printf "%s %s\\n" "$HOOKD_REF" "$HOOKD_SLUG" >> "$HOME/slugs"'

    def slugs(self, daemon, refs):
        """Push each ref; return the slugs that the commands found, by ref."""
        for ref in refs:
            self.assert_answer(daemon.push(ref=ref), 202)
        daemon.settle()
        return dict(line.split() for line in daemon.read("slugs").splitlines())

    def test_nobody_can_make_two_branches_share_a_slug(self):
        daemon = self.serve(hook(self.SLUG, "*"), hook(self.SLUG, "refs/tags/*"), jobs=8)
        names = {"main", "fix-1", "release/1.0", "release_1_0$#%==_|%&!", "Main", "a/b", "a-b",
                 "a--b", "-a", "a-", "_", "x" * 63, "x" * 64, "x" * 65, "x" * 200, "日本", "ß",
                 "x" * 62 + "/y", "1/2"}
        refs = {f"refs/heads/{name}" for name in names} | {
            "refs/tags/main", "refs/tags/release/1.0", "refs/tags/" + "x" * 63}
        found = self.slugs(daemon, refs)
        again = self.slugs(daemon, {f"refs/heads/{one}" for one in found.values()})
        self.assertEqual(len(again), len(set(again.values())), again)
        for ref, slug in again.items():
            with self.subTest(ref):
                self.assertRegex(slug, rf"\A{LABEL}\Z")
        for plain in ("main", "fix-1", "a-b", "x" * 63):
            self.assertEqual(found[f"refs/heads/{plain}"], plain)
        for ref in ("refs/heads/release/1.0", "refs/heads/" + "x" * 200, "refs/tags/main",
                    "refs/tags/" + "x" * 63):
            with self.subTest(ref):
                self.assert_long_hash(found[ref])

    def assert_long_hash(self, slug):
        """Check that a slug ends in a hash whose collisions nobody can compute."""
        tail = slug.rpartition("-")[2]
        bits = len(tail) * (4 if re.fullmatch("[0-9a-f]*", tail) else 5)
        self.assertGreaterEqual(bits, 120, f"{slug}: half of {bits} bits find two of a kind")

    def test_a_tag_has_another_slug_than_a_branch_of_its_name(self):
        daemon = self.serve(hook(self.SLUG, "*"), hook(self.SLUG, "refs/tags/*"))
        found = self.slugs(daemon, ("refs/heads/v1", "refs/tags/v1", "refs/tags/v2"))
        self.assertEqual(found["refs/heads/v1"], "v1")
        self.assertTrue(found["refs/tags/v1"].startswith("v1-"))
        tails = {found[ref].rpartition("-")[2] for ref in ("refs/tags/v1", "refs/tags/v2")}
        self.assertEqual(len(tails), 2, "the hash is not of the whole ref")
        places = {one["directory"] for one in daemon.targets().values()}
        self.assertIn(str(daemon.state / "work/octo/site/v1"), places)

    def test_a_repository_keeps_the_spelling_of_its_delivery_and_is_one_target(self):
        say = 'printf "%s %s\\n" "$HOOKD_REPO" "$HOOKD_LAST_GOOD" >> "$HOME/said"'
        daemon = self.serve(section("CODERTOCAT/Hello-World", environment="A=1"),
                            hook(say, "main", "codertocat/hello-world"),
                            hook(say, "*", "codertocat/*"),
                            queue="every", jobs=1)
        first, second = "Codertocat/Hello-World", "codertocat/HELLO-world"
        for number, repo in enumerate((first, second)):
            self.assert_answer(daemon.push(commit=sha(number), repo=repo), 202, f"{repo} main at ")
        daemon.settle()
        self.assertEqual(daemon.read("said").split(" "), [first, f"\n{second}", sha(0) + "\n"])
        self.assertEqual(len(daemon.targets()), 1)
        self.assertTrue((daemon.state / "work" / first / "main").is_dir())
        self.assertRegex(daemon.log, rf"{first} main at {sha(0)[:7]}")

    def test_workflows_are_named_by_name_or_by_file(self):
        daemon = self.serve(hook(NOTE, event="workflow_run", workflows="Build and test\ndeploy.yml",
                                 queue="every"))
        folder = ".github/workflows/"
        table = (("Build and test", folder + "ci.yml", 202), ("Lint", folder + "lint.yml", 200),
                 ("Deploy", folder + "deploy.yml", 202),
                 ("Deploy", folder + "deploy.yml@refs/heads/main", 202),
                 ("Deploy", folder + "not-deploy.yml", 200), ("Build", folder + "ci.yml", 200),
                 ("Deploy", folder + "deploy.yml.bak", 200), (None, None, 200),
                 (["Build and test"], {"a": folder + "deploy.yml"}, 200))
        taken = []
        for name, path, status in table:
            with self.subTest(name, path=path):
                commit = sha((str(name), str(path)))
                answer = daemon.post(workflow_run_of(commit, run={"name": name, "path": path}),
                                     X_GitHub_Event="workflow_run")
                self.assert_answer(answer, status, "" if status == 202 else "ignored: ")
                taken += [commit] if status == 202 else []
        daemon.settle()
        self.assertEqual(daemon.seen(), taken)

    def test_workflows_of_a_repository_concern_no_hook_for_pushes(self):
        daemon = self.serve(section("octo/site", workflows="CI"), hook(NOTE))
        self.assert_answer(daemon.push(), 202)

    def test_without_workflows_any_counts(self):
        daemon = self.serve(hook(NOTE, event="workflow_run"))
        for name in ("CI", "Lint"):
            answer = daemon.post(workflow_run_of(sha(name), run={"name": name}),
                                 X_GitHub_Event="workflow_run")
            self.assert_answer(answer, 202, f"at {sha(name)[:7]}")

    def test_a_workflow_run_of_a_tag_never_deploys_what_the_branch_does_not_have(self):
        origin = self.repository()
        good = origin.commit(index="good")
        evil = origin.commit("elsewhere", index="evil")
        origin.git("tag", "main", evil)
        daemon = self.serve(hook('git rev-parse HEAD >> "$HOME/seen"', event="workflow_run",
                                 git=origin.path, directory=self.home / "site"))
        for commit in (evil, good):
            answer = daemon.post(workflow_run_of(commit), X_GitHub_Event="workflow_run")
            self.assert_answer(answer, 202)
            daemon.settle()
        self.assertEqual(daemon.seen(), [good])
        self.assertEqual((self.home / "site/index").read_text(), "good")
        self.assertNotIn("ok: octo/site main at " + evil[:7], daemon.log)

    def test_a_push_whose_newest_message_says_so_is_passed_over(self):
        daemon = self.serve(hook(NOTE, queue="every"),
                            hook(NOTE, "dev", queue="every", skip="[no deploy]\nwip:"),
                            hook(NOTE, "all", queue="every", skip=""))
        older = [{"id": sha(0), "message": "old [skip deploy]", "modified": ["a"]},
                 {"id": sha(1), "message": "new", "modified": ["a"]}]
        table = (("main", "Fix [skip deploy]", {}, 200),
                 ("main", "Fix\n\n[skip deploy]\n", {}, 200),
                 ("main", "Fix", {"commits": older}, 202), ("main", "skip deploy", {}, 202),
                 ("main", None, {}, 202), ("main", ["[skip deploy]"], {}, 202),
                 ("dev", "Fix [skip deploy]", {}, 202), ("dev", "Fix [no deploy]", {}, 200),
                 ("dev", "wip: more", {}, 200), ("all", "Fix [skip deploy]", {}, 202))
        taken = []
        for number, (branch, message, fields, status) in enumerate(table):
            with self.subTest(branch, message=message):
                commit = sha(("skip", number))
                payload = push_of(branch, commit, head_commit={"id": commit, "message": message},
                                  **fields)
                self.assert_answer(daemon.post(payload), status,
                                   "queued run " if status == 202 else "ignored: ")
                taken += [commit] if status == 202 else []
        daemon.settle()
        self.assertEqual(sorted(daemon.seen()), sorted(taken))

    def test_a_workflow_of_such_a_push_is_passed_over_too(self):
        daemon = self.serve(hook(NOTE, event="workflow_run"))
        for message, status in (("Fix [skip deploy]", 200), ("Fix", 202)):
            run = {"head_commit": {"id": sha("commit"), "message": message}}
            answer = daemon.post(workflow_run_of(run=run), X_GitHub_Event="workflow_run")
            self.assert_answer(answer, status)

    def test_a_deletion_cancels_what_waits_and_lifts_the_pauses_of_its_branch(self):
        for answered, keys in ((200, {}), (202, {"on_delete": 'echo gone >> "$HOME/gone"'})):
            with self.subTest(**keys):
                self.check_deletion(answered, keys)
        self.assertEqual((self.home / "gone").read_text(), "gone\n")

    def check_deletion(self, answered, keys):
        daemon = self.serve(hook(NOTE, "*", **keys), state=self.home / f"state-{answered}")
        for branch in ("dev", "other"):
            told = daemon.hookd("pause", "octo/site", branch, "-m", "moving")
            self.assertEqual(told.code, 0, told)
            answer = daemon.push(branch, sha((branch, answered)))
            self.assert_answer(answer, 202, "; paused: moving")
        self.assert_answer(daemon.post(deletion_of("dev")), answered)
        daemon.wait(lambda: daemon.states()[1] == "cancelled", "run 1 to be cancelled")
        again = sha(("again", answered))
        self.assertNotIn("paused", daemon.push("dev", again).text)
        daemon.wait(lambda: again in daemon.seen(), "the branch made anew")
        self.assertEqual(daemon.states()[2], "queued")
        self.assertNotIn(sha(("dev", answered)), daemon.seen())
        daemon.stop()

    def test_the_answers_are_the_words_of_the_contract(self):
        daemon = self.serve(hook(GATE), hook("true", "staging"), hook("true", "paused"),
                            section("octo/shop main", command="true", secret="of the shop"))
        self.assertEqual(daemon.hookd("pause", "octo/site", "paused", "-m", "moving house").code, 0)
        ping = {"zen": "Design for failure.", "hook_id": 1}
        one, two, three = (sha(number) for number in range(3))
        table = (
            (request(push_of(commit=one)), 202, f"queued run 1: octo/site main at {one[:7]}"),
            (request(push_of(commit=two)), 202, f"queued run 2: octo/site main at {two[:7]}"),
            (request(push_of(commit=three)), 202,
             f"queued run 3: octo/site main at {three[:7]}, in place of run 2"),
            (request(push_of("paused", one)), 202,
             f"queued run 4: octo/site paused at {one[:7]}; paused: moving house"),
            (request({**ping, "repository": repository_of()}, X_GitHub_Event="ping"), 200,
             "pong: octo/site has hooks for main, staging, paused"),
            (request(push_of("dev")), 200, "ignored: no hook for octo/site dev"),
            (request({}, X_Hub_Signature_256=None), 403, "signature missing"),
            (request({}, "wrong"), 403, "signature does not match"),
            (request(push_of(), "of the shop"), 403, "the secret is another repository's"))
        for number, (raw, status, words) in enumerate(table):
            with self.subTest(words):
                answer = daemon.exchange(raw)
                self.assertEqual((answer.status, answer.text), (status, words + "\n"))
                if number == 0:
                    daemon.wait_for_run(1)

    def test_every_other_signed_event_is_ignored(self):
        daemon = self.serve(hook(NOTE, "*"), hook(NOTE, "v*", event="release"))
        for event, payload in (("issues", {"action": "opened", "repository": repository_of()}),
                               ("create", {"ref": "main", "repository": repository_of()}),
                               ("workflow_run", workflow_run_of()),
                               ("release", release_of(action="edited")),
                               ("no_such", push_of())):
            with self.subTest(event):
                answer = daemon.post(payload, X_GitHub_Event=event)
                self.assert_answer(answer, 200)
                self.assertRegex(answer.text, r"\Aignored: [^\n]+\n\Z")
        self.assertEqual(daemon.targets(), {})


# ---------------------------------------------------------------- Queue


class Queue(Case):
    """Which pushes run, in which order, and what never runs beside what."""

    def test_a_second_push_waits_for_the_first(self):
        daemon = self.serve(hook(alone(GATE + "\n" + NOTE)))
        daemon.push(commit=sha(1))
        daemon.wait_for_run(1)
        daemon.push(commit=sha(2))
        self.assertEqual(daemon.targets()["octo/site", "main"]["waiting"], [2])
        self.assertEqual(daemon.seen(), [])
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(1), sha(2)])
        self.assert_never_overlapped(daemon)

    def test_newest_lets_the_newest_push_take_the_place_of_the_waiting_one(self):
        daemon = self.serve(hook(GATE + "\n" + NOTE))
        for number in range(1, 5):
            daemon.push(commit=sha(number))
            if number == 1:
                daemon.wait_for_run(1)
        daemon.open_gate()
        self.assertEqual(daemon.settled()["commit"], sha(4))
        self.assertEqual(daemon.seen(), [sha(1), sha(4)])
        self.assertEqual(daemon.states(), {1: "ok", 2: "superseded", 3: "superseded", 4: "ok"})

    def test_every_runs_each_push_in_order(self):
        daemon = self.serve(hook(NOTE, queue="every"), jobs=4)
        commits = [sha(number) for number in range(6)]
        for commit in commits:
            daemon.push(commit=commit)
        daemon.settle()
        self.assertEqual(daemon.seen(), commits)

    def test_replace_ends_the_running_one(self):
        command = f'if [ "$HOOKD_COMMIT" = {sha(1)} ]; then touch "$HOME/begun"; {GATE}; fi\n{NOTE}'
        daemon = self.serve(hook(alone(command), queue="replace"))
        daemon.push(commit=sha(1))
        daemon.wait((self.home / "begun").exists, "the first run")
        self.assert_answer(daemon.push(commit=sha(2)), 202, "queued run 2")
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(2)])
        self.assertEqual(daemon.states(), {1: "cancelled", 2: "ok"})
        self.assert_never_overlapped(daemon)

    def test_at_most_so_many_jobs_run_at_once(self):
        for jobs in (1, 2):
            with self.subTest(jobs=jobs):
                self.check_jobs(jobs)

    def check_jobs(self, jobs):
        count = f"""\
touch "$HOME/in.$HOOKD_BRANCH"
ls "$HOME" | grep -c '^in\\.' >> "$HOME/counts.{jobs}"
{BRIEFLY}
rm "$HOME/in.$HOOKD_BRANCH"
"""
        daemon = self.serve(*(hook(count, f"branch-{number}") for number in range(5)), jobs=jobs,
                            state=self.home / f"state.{jobs}")
        for number in range(5):
            daemon.push(f"branch-{number}")
        daemon.settle()
        self.assertEqual(max(daemon.read(f"counts.{jobs}").split()), str(jobs))
        daemon.kill()

    def test_two_hooks_with_one_directory_never_overlap(self):
        work = self.home / "work"
        daemon = self.serve(hook(alone(BRIEFLY, "dir") + NOTE, "a", directory=work),
                            hook(alone(BRIEFLY, "dir") + NOTE, "b", directory=f"{work}/../work/"),
                            jobs=4)
        for branch in "abab":
            daemon.push(branch)
        daemon.settle()
        self.assertGreaterEqual(len(daemon.seen()), 2)
        self.assert_never_overlapped(daemon)

    def test_two_hooks_with_one_lock_never_overlap(self):
        daemon = self.serve(*(hook(alone(BRIEFLY, "lock") + NOTE, branch, lock="database")
                              for branch in "abc"), jobs=4)
        for branch in "abc":
            daemon.push(branch)
        daemon.settle()
        self.assertEqual(len(daemon.seen()), 3)
        self.assert_never_overlapped(daemon)

    def test_different_directories_do_not_wait_for_each_other(self):
        daemon = self.serve(hook(GATE, "slow"), hook(NOTE, "quick"))
        daemon.push("slow")
        daemon.wait_for_run(1)
        daemon.push("quick")
        daemon.wait_for("seen")
        daemon.open_gate()

    def test_a_job_that_waits_for_a_lock_does_not_take_a_place(self):
        daemon = self.serve(hook(GATE, "a", lock="one"), hook(NOTE, "b", lock="one"),
                            hook(NOTE, "c"), jobs=2)
        daemon.push("a")
        daemon.wait_for_run(1)
        daemon.push("b", sha("b"))
        daemon.push("c", sha("c"))
        self.assertEqual(daemon.wait_for("seen").split(), [sha("c")])
        daemon.open_gate()
        daemon.settle()

    def test_a_burst_is_one_run_and_at_most_one_more(self):
        daemon = self.serve(hook(alone(NOTE + "\n" + BRIEFLY)))
        together = repository_of(pushed_at=int(time.time()))
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda number: daemon.push(commit=sha(number),
                                                               repository=together), range(60)))
        self.assertEqual({answer.status for answer in answers}, {202})
        daemon.push(commit=sha("last"))
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], sha("last"))
        self.assertLess(len(daemon.seen()), 30)
        self.assert_never_overlapped(daemon)

    def test_only_so_many_finished_runs_are_kept(self):
        daemon = self.serve(hook(NOTE, queue="every"), hook("true", "dev"), keep=2)
        daemon.push("dev")
        for number in range(5):
            daemon.push(commit=sha(number))
        daemon.settle()
        kept = self.home / "state" / "runs"
        daemon.wait(lambda: sorted(int(one.name) for one in kept.iterdir()) == [1, 5, 6],
                    "old runs to go")
        self.assertEqual(daemon.hookd("log", "1").code, 0)
        self.assertNotEqual(daemon.hookd("log", "2").code, 0)


class Beginning(Case):
    """Which waiting run begins next, and which one a push may take the place of."""

    def test_verbs_begin_first_then_exact_branches_then_patterns_oldest_first(self):
        """A preview, or the order of arrival alone, decides what production waits for."""
        daemon = self.serve(hook(GATE, "hold"), hook(NAME), hook(NAME, "dev"), hook(NAME, "p/*"),
                            jobs=1)
        for branch in ("hold", "p/a", "p/b", "main", "dev"):
            daemon.push(branch)
        self.follow(daemon, "run", "octo/site", "p/c")
        self.follow(daemon, "run", "octo/site", "dev")
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen(), ["p/c", "dev", "main", "dev", "p/a", "p/b"])

    def test_previews_never_hold_production_up(self):
        """Patterns fill every job: a push to production waits for the end of a preview."""
        daemon = self.serve(hook(NAME), hook(GATE, "*"), jobs=3)
        for number in range(5):
            daemon.push(f"p{number}")
        daemon.wait(lambda: list(daemon.states().values()).count("running") == 2, "two previews")
        daemon.push("main")
        daemon.wait_for("seen")
        daemon.wait(lambda: daemon.states()[6] == "ok", "production")
        self.assertEqual([daemon.states()[number] for number in range(1, 6)],
                         ["running"] * 2 + ["queued"] * 3)

    def test_the_last_job_is_kept_from_patterns_though_an_exact_branch_has_the_others(self):
        """One long production run and one preview fill two jobs; the next exact branch waits."""
        daemon = self.serve(hook(GATE), hook(NAME, "dev"), hook(GATE, "*"), jobs=2)
        daemon.push("main")
        daemon.wait_for_run(1)
        daemon.push("preview")
        daemon.push("dev")
        self.check_first_holds_second_up(daemon)

    def test_a_person_may_have_the_last_job_for_a_pattern(self):
        """What a verb asked for is held back as if a push had asked for it."""
        daemon = self.serve(hook(GATE), hook(NAME, "*"), jobs=2)
        daemon.push("main")
        daemon.wait_for_run(1)
        verb = self.follow(daemon, "run", "octo/site", "preview")
        self.assertEqual(verb.wait(PATIENCE), 0)
        self.assertEqual(daemon.states()[1], "running")

    def test_a_deletion_cancels_what_waits(self):
        """A deleted branch is deployed after all; without `on_delete` the deletion is forgotten."""
        daemon = self.serve(hook(GATE, "topic"), hook(GATE, "other", on_delete=NAME))
        for number, branch in ((1, "topic"), (3, "other")):
            with self.subTest(branch):
                daemon.push(branch)
                daemon.wait_for_run(number)
                daemon.push(branch, sha("waits"))
                daemon.post(deletion_of(branch))
                daemon.wait(lambda at=number + 1: daemon.states()[at] == "cancelled", "the end")
                self.assertEqual(daemon.states()[number], "running")
        daemon.open_gate()
        daemon.wait(lambda: not WAITING & set(daemon.states().values()), "every run to end")
        self.assertEqual(daemon.seen(), ["other"])

    def test_runs_whose_folders_were_removed_still_end(self):
        """What cannot begin, or end, stays in the queue for ever and keeps its target."""
        daemon = self.serve(hook(f"{GATE}\n{NOTE}"))
        daemon.push(commit=sha(1))
        daemon.wait_for_run(1)
        daemon.push(commit=sha(2))
        shutil.rmtree(daemon.state / "runs")
        daemon.open_gate()
        daemon.settle()
        daemon.push(commit=sha(3))
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], sha(3))
        self.assertEqual((daemon.seen()[0], daemon.states()[3]), (sha(1), "ok"))


class Order(Case):
    """A late, repeated or replayed delivery never brings old code back, and no push is lost."""

    def test_pushes_count_after_the_event_was_changed(self):
        """Ids of workflow runs and times share a scale: every later push is late for ever."""
        daemon = self.serve(hook(NOTE, event="workflow_run"))
        self.take(daemon, ("checked", workflow_run_of(sha(1), run={"id": 17 * 10 ** 9}), 202))
        self.reload(daemon, hook(NOTE))
        self.take(daemon, ("pushed", push_of(commit=sha(2)), 202))
        self.reload(daemon, hook(NOTE, event="workflow_run"))
        self.take(daemon, ("checked again", workflow_run_of(sha(3), run={"id": 3}), 202))
        self.assertEqual(daemon.seen(), [sha(1), sha(2), sha(3)])

    def test_two_pushes_that_no_time_orders_are_ordered_by_what_they_began_from(self):
        """Of two pushes of one second, or without a time, the older goes live: it came last."""
        for name, repository in (("one second", repository_of(pushed_at=1_700_000_000)),
                                 ("no time", repository_of())):
            first = push_of(before=sha(0), commit=sha(1), repository=repository)
            newer = push_of(before=sha(1), commit=sha(2), repository=repository)
            back = push_of(before=sha(2), commit=sha(1), forced=True, repository=repository)
            daemon = self.serve_in(name, hook(NOTE, "*"))
            self.take(daemon, (f"{name}: the newer", newer, 202), ("the older, late", first, 200),
                      ("the newer again", newer, 202), ("forced back", back, 202),
                      ("the newer, replayed", newer, 200))
            daemon.stop()
        self.assertEqual(daemon.seen(), [sha(2), sha(2), sha(1)] * 2)

    def test_tags_that_share_a_directory_are_in_one_order_and_branches_in_their_own(self):
        """v1, delivered again after v2, brings v1 back; or one branch makes another late."""
        daemon = self.serve(hook(NAME, "refs/tags/v*", directory=self.home / "live"),
                            hook(NAME, "*"))

        def tag(name, when):
            return push_of(ref=f"refs/tags/{name}", commit=sha(name), before=ZERO, created=True,
                           repository=repository_of(pushed_at=when))
        self.take(daemon, ("v1", tag("v1", 10), 202), ("v2", tag("v2", 20), 202),
                  ("v1 again", tag("v1", 10), 200), ("v2 again", tag("v2", 20), 202),
                  ("dev", push_of("dev", repository=repository_of(pushed_at=20)), 202),
                  ("main, older", push_of(repository=repository_of(pushed_at=10)), 202))
        self.assertEqual(daemon.seen(), ["v1", "v2", "v2", "dev", "main"])

    def test_a_replay_is_known_by_its_signature_whatever_was_forgotten(self):
        """Under another delivery id, or once `keep` forgot its run, an old body rolls back."""
        for name, repository in (("no time", repository_of()),
                                 ("one second", repository_of(pushed_at=1_700_000_000))):
            daemon = self.serve_in(name, hook(NOTE, "*"), keep=2)
            bodies = [push_of(commit=sha(at), before=sha(("elsewhere", at)), repository=repository)
                      for at in range(6)]
            for number, body in enumerate(bodies):
                self.assert_answer(daemon.post(body, X_GitHub_Delivery=f"d{number}"), 202)
                daemon.settle()
            daemon.kill()
            daemon.start()
            for number in (0, 4):
                for delivery in (f"d{number}", "another"):
                    with self.subTest(name, body=number, delivery=delivery):
                        self.assert_answer(daemon.post(bodies[number], X_GitHub_Delivery=delivery),
                                           200, "ignored")
            for delivery in ("d5", "another"):
                with self.subTest(name, newest=delivery):
                    self.assert_answer(daemon.post(bodies[5], X_GitHub_Delivery=delivery), 202)
                    daemon.settle()
            daemon.stop()
        self.assertEqual(daemon.seen(), [sha(at) for at in (0, 1, 2, 3, 4, 5, 5, 5)] * 2)

    def test_a_push_that_was_passed_over_makes_no_other_late(self):
        """After a push without a touched path, or with `skip`, GitHub's Redeliver does nothing."""
        daemon = self.serve(hook(f"{NOTE}\nfalse", "*", paths="docs/*"))
        for timed in (True, False):
            for path, message in (("src/a", "Say hello"), ("docs/a", "[skip deploy]")):
                branch = f"{path[:3]}-{timed}"
                failed = self.touching(branch, 1, timed, "docs/a", "Break it")
                self.take(daemon, (f"{branch} fails", failed, 202),
                          ("passed over", self.touching(branch, 2, timed, path, message), 200),
                          (f"{branch} again", failed, 202))
        self.assertEqual(len(daemon.seen()), 8)

    def touching(self, branch, number, timed, path, message):
        """Return the push of a commit that touches a path."""
        changes = {"id": sha(number), "added": [path], "removed": [], "modified": []}
        times = {"pushed_at": 1_700_000_000 + number} if timed else {}
        return push_of(branch, sha((branch, number)), before=sha((branch, number - 1)),
                       commits=[changes], head_commit={**changes, "message": message},
                       repository=repository_of(**times))

    def test_a_branch_made_again_keeps_its_preview(self):
        """A deletion that comes late, or again, removes the preview that is live."""
        seconds = [{"repository": repository_of(pushed_at=1_700_000_000 + at)} for at in range(3)]

        def made(branch, number, second):
            return push_of(branch, sha(number), before=ZERO, created=True, **seconds[second])
        late = deletion_of("a", before=sha(1), **seconds[1])
        gone = deletion_of("b", before=sha(3), **seconds[1])
        old = push_of("b", sha(4), before=sha(3), **seconds[0])
        for queue in ("newest", "every"):
            daemon = self.serve_in(queue, hook(NOTE, "*", queue=queue,
                                               on_delete='echo gone >> "$HOME/seen"'))
            self.take(daemon, (f"{queue}: made", made("a", 1, 0), 202),
                      ("made again", made("a", 2, 1), 202),
                      ("deleted in that second, but earlier", late, 200),
                      ("another made", made("b", 3, 0), 202), ("deleted", gone, 202),
                      ("a push from before that", old, 200),
                      ("made again after that", made("b", 5, 2), 202),
                      ("the deletion again", gone, 200))
            daemon.stop()
        self.assertEqual(daemon.seen(), [sha(1), sha(2), sha(3), "gone", sha(5)] * 2)


class Locks(Case):
    """Two runs never work in one directory tree at the same time."""

    NESTED = (("inside", "site/feature", "site/feature/login"),
              ("around", "site/feature/login", "site/feature"),
              ("by another text", "site/x/../feature/", "site/feature"),
              ("behind a link", "link", "real/below"), ("around a link", "real", "link/below"),
              ("a link to what is inside", "real", "inner"), ("two links", "link", "link-2"))

    def test_directories_inside_each_other_never_overlap(self):
        """`feature` and `feature/login` are two texts: a run works inside the tree of another."""
        for what, first, second in self.NESTED:
            with self.subTest(what):
                self.check_nested(what, first, second)

    def check_nested(self, what, first, second):
        """Run in `first`, push to `second` and to a neighbour; only the neighbour may run."""
        home = self.home / what
        (home / "real/below").mkdir(parents=True)
        for link, goal in (("link", "real"), ("link-2", "real"), ("inner", "real/below")):
            (home / link).symlink_to(home / goal)
        for name in ("gate", "begun", "overlaps"):
            (self.home / name).unlink(missing_ok=True)
        work = alone(f"{BEGUN}\n{GATE}", "tree")
        daemon = self.serve_in(f"{what}/state", hook(work, "a", directory=home / first),
                               hook(work, "b", directory=home / second),
                               hook(NOTE, "c", directory=home / "site/feature-2"), jobs=2)
        known = len(daemon.log)
        daemon.push("a")
        daemon.wait_for("begun")
        daemon.push("b")
        daemon.push("c", sha(what))
        daemon.wait(lambda: sha(what) in daemon.seen(), "the neighbour")
        daemon.wait(lambda: daemon.targets()["octo/site", "b"]["waiting"] == [2], "run 2 to wait")
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.states(), {1: "ok", 2: "ok", 3: "ok"})
        self.assertEqual(daemon.log[known:].count("run 2 began"), 1)
        self.assert_never_overlapped(daemon)
        daemon.kill()

    def test_who_left_the_group_does_not_keep_the_directory_locked(self):
        """A process that a script left behind inherits the lock: no run begins while it lives."""
        daemon = self.serve(hook(f"{DETACHED}\n{NOTE}"))
        daemon.push(commit=sha(1))
        daemon.settle()
        self.assertTrue(alive(int(daemon.read("child"))))
        daemon.push(commit=sha(2))
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(1), sha(2)])

    def test_what_escaped_a_crash_blocks_its_directory_until_it_ends(self):
        """A run begins beside what is left of the one that a crash cut off and no mark shows."""
        escape = (f"{BEGUN}\nif [ ! -s \"$HOME/child\" ]; then env -i HOME=\"$HOME\" setsid "
                  f"sh -c 'echo $$ > \"$HOME/child\"; sleep 300' & {GATE}; fi\n{NOTE}")
        daemon = self.serve(hook(escape), hook(NAME, "dev"))
        daemon.push()
        escaped = int(daemon.wait_for("child"))
        daemon.kill()
        daemon.start()
        self.assertTrue(alive(escaped), "it must survive for this test to mean much")
        self.wait_for_status(daemon, "(?i)lock")
        daemon.push("dev")
        self.assertEqual(daemon.wait_for("seen"), "dev\n")
        daemon.wait(lambda: daemon.states()[1] == "queued", "the run to wait for the lock again")
        os.killpg(escaped, signal.SIGKILL)
        daemon.wait(lambda: daemon.states()[1] == "ok", "the directory to be free")

    def test_a_tag_has_neither_directory_nor_lock_of_the_branch_of_its_name(self):
        """The tag `main` and the branch `main` work in one directory, or wait for each other."""
        daemon = self.serve(hook(f"{GATE}", "*"), hook(NOTE, "refs/tags/*"), jobs=3)
        daemon.push("main")
        daemon.wait_for_run(1)
        daemon.push(ref="refs/tags/main")
        daemon.wait_for("seen")
        found = {entry["directory"] for entry in json.loads(daemon.hookd("status", "--json").out)}
        self.assertEqual(len(found), 2, found)

    def test_lock_files_that_were_removed_let_nobody_overlap(self):
        """A clean-up of `locks/` lets two runs into one directory."""
        work = self.home / "work"
        daemon = self.serve(*(hook(alone(f"{BEGUN}\n{GATE}", "dir"), branch, directory=work)
                              for branch in ("a", "b")), hook(NOTE, "c"))
        daemon.push("a")
        daemon.wait_for("begun")
        shutil.rmtree(daemon.state / "locks")
        daemon.push("b")
        daemon.push("c")
        daemon.wait_for("seen")
        self.check_first_holds_second_up(daemon)
        self.assert_never_overlapped(daemon)


# ---------------------------------------------------------------- Runs


class Runs(Case):
    """What a command finds, how it ends, and what remains of it."""

    def test_a_command_finds_what_the_contract_promises(self):
        daemon = self.serve(hook('env -0 > "$HOME/env"; cat > "$HOME/stdin"; pwd > "$HOME/pwd"; '
                                 'umask > "$HOME/umask"', "feature/*",
                                 environment="GREETING=hello = world\nEMPTY="))
        payload = push_of("feature/Über", sha("new"), before=sha("old"), pusher={"name": "móna"})
        daemon.post(payload, X_GitHub_Delivery="d-1")
        target = daemon.settled("feature/Über")
        found = dict(line.split("=", 1) for line in daemon.read("env").split("\0") if line)
        expected = {
            "HOOKD_EVENT": "push", "HOOKD_REPO": "octo/site",
            "HOOKD_REF": "refs/heads/feature/Über",
            "HOOKD_BRANCH": "feature/Über", "HOOKD_COMMIT": sha("new"), "HOOKD_BEFORE": sha("old"),
            "HOOKD_PUSHER": "móna", "HOOKD_DELIVERY": "d-1", "HOOKD_RUN": "1",
            "HOOKD_LAST_GOOD": "", "GIT_TERMINAL_PROMPT": "0", "GREETING": "hello = world",
            "EMPTY": "", "HOME": str(self.home),
            "HOOKD_PAYLOAD": str(self.home / "state/runs/1/payload.json")}
        for name, value in expected.items():
            with self.subTest(name):
                self.assertEqual(found.get(name), value)
        self.assertRegex(found["HOOKD_SLUG"], r"^feature--ber-[0-9a-z]+$")
        self.assertEqual(daemon.read("stdin"), "")
        self.assertEqual(daemon.read("pwd").strip(), os.path.realpath(target["directory"]))
        payload_file = Path(found["HOOKD_PAYLOAD"])
        self.assertEqual(json.loads(payload_file.read_bytes()), payload)
        self.assertEqual(stat.S_IMODE(payload_file.stat().st_mode), 0o600)

    def test_a_command_does_not_find_what_is_private_to_systemd_and_hookd(self):
        private = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "90000000", "LISTEN_FDS": "2",
                   "WATCHDOG_PID": "1", "LISTEN_PID": "1", "LISTEN_FDNAMES": "a:b",
                   "CREDENTIALS_DIRECTORY": str(self.home), "STATE_DIRECTORY": str(self.home),
                   "RUNTIME_DIRECTORY": str(self.home), "INVOCATION_ID": "0123",
                   "JOURNAL_STREAM": "8:1", "LOGS_DIRECTORY": str(self.home)}
        daemon = self.serve(hook('env -0 > "$HOME/env"'), variables={**private, "MINE": "kept"})
        daemon.push()
        found = dict(line.split("=", 1) for line in daemon.wait_for("env").split("\0") if line)
        self.assertEqual(found["MINE"], "kept")
        self.assertEqual(sorted(set(private) & set(found)), [])
        self.assertNotIn(SECRET, "".join(found.values()))

    def test_a_value_that_cannot_be_a_variable_does_not_stop_the_run(self):
        daemon = self.serve(hook('env -0 > "$HOME/env.$HOOKD_RUN"', queue="every"))
        strange = ("a\0b", "\ud800", "x" * 200_000, "\udcff", "♥" * 100_000)
        for value in strange:
            self.assert_answer(daemon.push(pusher={"name": value}), 202)
        target = daemon.settled()
        self.assertEqual((target["state"], target["run"]), ("ok", len(strange)))
        for number in range(1, len(strange) + 1):
            self.assertIn("HOOKD_PUSHER=", daemon.read(f"env.{number}"))
            self.assertLess(len(daemon.read(f"env.{number}").encode()), 200_000)

    def test_a_command_never_becomes_part_of_a_name(self):
        daemon = self.serve(hook('printf "%s" "$HOOKD_BRANCH" > "$HOME/said"', "*"))
        branch = "$(touch${IFS}$HOME/evil);`touch${IFS}$HOME/evil`"
        self.assert_answer(daemon.push(branch), 202)
        self.assertEqual(daemon.wait_for("said"), branch)
        self.assertFalse((self.home / "evil").exists())

    def test_the_first_command_that_fails_ends_the_run(self):
        daemon = self.serve(hook('echo before; false; touch "$HOME/after"'))
        daemon.push()
        target = daemon.settled()
        self.assertEqual((target["state"], target["exit"]), ("failed", 1))
        self.assertIn("before", daemon.output(1))
        self.assertFalse((self.home / "after").exists())

    OUTCOMES = (("exit 0", "ok", 0), ("exit 7", "failed", 7), ("no-such-program", "failed", 127),
                ("kill -9 $$", "failed", 137), ("kill -TERM $$", "failed", 143),
                ("exit 256", "ok", 0), ("if", "failed", 2))

    def test_the_outcome_is_the_commands_own(self):
        daemon = self.serve(*(hook(command, f"b{number}") for number, (command, _, _)
                              in enumerate(self.OUTCOMES)), jobs=4)
        for number in range(len(self.OUTCOMES)):
            daemon.push(f"b{number}")
        daemon.settle()
        targets = daemon.targets()
        for number, (command, state, code) in enumerate(self.OUTCOMES):
            with self.subTest(command):
                target = targets["octo/site", f"b{number}"]
                self.assertEqual((target["state"], target["exit"]), (state, code))

    def test_a_command_that_fails_is_told_with_its_last_words(self):
        daemon = self.serve(hook("printf 'the cause\\033[2J\\007\\200 of it all\\n'; exit 3"))
        daemon.push()
        daemon.wait_for_log("the cause.* of it all")
        self.assertNotRegex(daemon.log, "[\0-\x09\x0b-\x1f\x7f-\x9f]")

    def test_the_directory_is_made_where_it_is_missing(self):
        daemon = self.serve(hook('touch here', "*",
                                 directory=self.home / "srv/{owner}/{name}/{repo}/{branch}/{slug}"))
        daemon.push("Fix/1")
        daemon.settle()
        found = [one.relative_to(self.home / "srv") for one in (self.home / "srv").rglob("here")]
        self.assertRegex(str(found[0]), r"^octo/site/octo/site/Fix/1/fix-1-[0-9a-z]+/here$")

    def test_a_directory_that_cannot_be_made_is_a_failure_with_a_reason(self):
        (self.home / "file").touch()
        daemon = self.serve(hook("true", directory=self.home / "file/below"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "failed")
        self.assertIn("file/below", daemon.output(1) + daemon.log)

    def test_a_run_ends_by_its_timeout_with_its_whole_group(self):
        daemon = self.serve(hook('sleep 300 & echo $! > "$HOME/child"; sleep 300', timeout="1s"))
        daemon.push()
        target = daemon.settled()
        self.assertEqual((target["state"], target["exit"]), ("timeout", 124))
        daemon.wait(lambda: not alive(int(daemon.read("child"))), "the child to end")
        self.assertRegex(daemon.output(1) + daemon.log, "1 ?s")

    def test_what_ignores_term_is_killed_ten_seconds_later(self):
        stubborn = "trap '' TERM; " + GATE
        daemon = self.serve(hook(f"({stubborn}) &\n{stubborn}", timeout="1s"))
        daemon.push()
        target = daemon.settled()
        self.assertEqual(target["state"], "timeout")
        self.assertTrue(9 < target["duration"] < 30, target)
        self.assertEqual(daemon.descendants(), [daemon.process.pid])

    def test_a_child_that_keeps_the_output_open_does_not_hold_the_run(self):
        daemon = self.serve(hook(DETACHED + "\necho done"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertIn("done", daemon.output(1))
        self.assertTrue(alive(int(daemon.read("child"))), "who leaves the group is let go")

    def test_what_remains_of_the_group_ends_with_the_run(self):
        daemon = self.serve(hook('sleep 300 & echo $! > "$HOME/child"'))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        daemon.wait(lambda: not alive(int(daemon.read("child"))), "the child to end")

    def test_a_command_that_closes_its_output_is_still_waited_for(self):
        daemon = self.serve(hook(f"exec >/dev/null 2>&1\n{BRIEFLY}\n{NOTE}\nexit 4"))
        daemon.push()
        self.assertEqual(daemon.settled()["exit"], 4)
        self.assertEqual(len(daemon.seen()), 1)

    def test_output_of_any_size_and_kind_stays_bounded_with_both_its_ends(self):
        noise = "head -c 40000000 /dev/zero | tr '\\0' x"
        daemon = self.serve(hook(f"echo the beginning; {noise}; printf '\\377\\033[31m\\n'; "
                                 "echo the end"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertLess((daemon.state / "runs/1/output.log").stat().st_size, 20_000_000)
        told = daemon.hookd("log", "1")
        self.assertEqual(told.code, 0)
        self.assertTrue(told.out.startswith("the beginning"), told.out[:100])
        self.assertTrue(told.out.rstrip().endswith("the end"), told.out[-100:])
        self.assertRegex(told.out, r"\d+ (bytes|[KM]B)")
        self.assertNotIn("\x1b", daemon.log)

    def test_the_last_good_commit_is_known_to_the_next_run(self):
        command = 'echo "was:$HOOKD_LAST_GOOD" >> "$HOME/said"; test ! -e "$HOME/broken"'
        daemon = self.serve(hook(command))
        for number in (1, 2, 3):
            if number == 2:
                (self.home / "broken").touch()
            daemon.push(commit=sha(number))
            target = daemon.settled()
        self.assertEqual(daemon.read("said").split(), ["was:", "was:" + sha(1), "was:" + sha(1)])
        self.assertEqual((target["state"], target["last_good"]), ("failed", sha(1)))

    TELL = ('echo "$HOOKD_STATE $HOOKD_EXIT $HOOKD_PREVIOUS_STATE $HOOKD_COMMIT $HOOKD_BRANCH"'
            ' >> "$HOME/told"; test -s "$HOOKD_LOG"; echo "afterwards, $HOOKD_DURATION s"')

    def test_what_follows_a_run_knows_its_outcome(self):
        daemon = self.serve(hook('echo works; test ! -e "$HOME/broken"', on_success=self.TELL,
                                 on_failure=self.TELL))
        daemon.push(commit=sha(1))
        daemon.settle()
        (self.home / "broken").touch()
        daemon.push(commit=sha(2))
        self.assertEqual(daemon.settled()["state"], "failed")
        first, second = daemon.read("told").splitlines()
        self.assertEqual(first.split(), ["ok", "0", sha(1), "main"])
        self.assertEqual(second, f"failed 1 ok {sha(2)} main")
        self.assertRegex(daemon.output(1), r"afterwards, [0-9.]+ s")

    def test_on_failure_follows_a_timeout_too(self):
        daemon = self.serve(hook("sleep 300", timeout="1s", on_failure='echo "$HOOKD_STATE '
                                 '$HOOKD_EXIT" > "$HOME/told"'))
        daemon.push()
        self.assertEqual(daemon.wait_for("told"), "timeout 124\n")

    def test_an_on_failure_that_fails_is_told_and_changes_nothing(self):
        daemon = self.serve(hook("exit 3", on_failure="echo the mail is down; exit 9"))
        daemon.push()
        target = daemon.settled()
        self.assertEqual((target["state"], target["exit"]), ("failed", 3))
        daemon.wait_for_log("on_failure")

    def test_an_on_success_that_fails_does_not_unmake_the_success(self):
        daemon = self.serve(hook("true", on_success="exit 9"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        daemon.wait_for_log("on_success")

    def test_what_follows_a_run_has_a_timeout_of_its_own(self):
        daemon = self.serve(hook("true", on_success='touch "$HOME/begun"; sleep 300',
                                 timeout="1s"), hook(NOTE, "dev"), jobs=1)
        daemon.push()
        daemon.wait((self.home / "begun").exists, "on_success")
        daemon.push("dev")
        daemon.wait_for("seen")
        self.assertEqual(daemon.settled()["state"], "ok")

    def test_on_delete_runs_when_the_branch_is_deleted(self):
        daemon = self.serve(hook("touch page", "*", directory=self.home / "previews/{slug}",
                                 on_delete='cd /; rm -r "$HOME/previews/$HOOKD_SLUG"; '
                                           'echo "$HOOKD_BRANCH" >> "$HOME/gone"'))
        daemon.push("topic")
        daemon.settle()
        self.assertTrue((self.home / "previews/topic/page").exists())
        self.assert_answer(daemon.post(deletion_of("topic")), 202, "octo/site topic")
        daemon.settle()
        self.assertEqual(daemon.read("gone"), "topic\n")
        self.assertFalse((self.home / "previews/topic").exists())

    def test_branches_that_differ_a_little_never_share_a_directory(self):
        daemon = self.serve(hook('echo "$HOOKD_BRANCH" >> who', "*"), jobs=4)
        branches = ("feature/x", "feature-x", "Feature-x", "feature_x", "x" * 70, "x" * 71)
        for branch in branches:
            daemon.push(branch)
        daemon.settle()
        targets = daemon.targets()
        for branch in branches:
            who = Path(targets["octo/site", branch]["directory"], "who").read_text()
            self.assertEqual(who, branch + "\n")

    def test_the_payload_and_output_are_readable_by_nobody_else(self):
        daemon = self.serve(hook("echo secret things"))
        daemon.push()
        daemon.settle()
        for name in ("payload.json", "output.log"):
            mode = (daemon.state / "runs/1" / name).stat().st_mode
            self.assertEqual(stat.S_IMODE(mode) & 0o077, 0, name)

    def test_a_command_inherits_no_descriptor_of_the_daemon(self):
        daemon = self.serve(hook('ls -l /proc/self/fd > "$HOME/fds"'))
        daemon.push()
        self.assertNotRegex(daemon.wait_for("fds"), r"hookd\.db|socket:|eventpoll")


class Surroundings(Case):
    """The environment of a command: causes, subjects, files of secrets, and nothing of git's."""

    def environment(self, daemon, name="env"):
        return dict(line.split("=", 1) for line in daemon.read(name).split("\0") if "=" in line)

    def test_nothing_that_points_git_elsewhere_is_inherited(self):
        """Started from a git hook or direnv, hookd overwrites another checkout's work."""
        origin, other = self.repository(), self.repository("other")
        new = origin.commit(page="one")
        other.commit(page="precious")
        (other.path / "page").write_text("uncommitted")
        pointing = {"GIT_DIR": f"{other.path}/.git", "GIT_WORK_TREE": str(other.path),
                    "GIT_INDEX_FILE": f"{other.path}/.git/index",
                    "GIT_OBJECT_DIRECTORY": f"{other.path}/.git/objects",
                    "GIT_COMMON_DIR": f"{other.path}/.git", "GIT_CONFIG_COUNT": "1",
                    "GIT_CONFIG_KEY_0": "core.bare", "GIT_CONFIG_VALUE_0": "true"}
        daemon = self.serve(self.deploying(f'{NOTE}\nenv -0 > "$HOME/env"', catch_up="1h"),
                            variables=pointing)
        daemon.push()
        self.assertEqual(daemon.settled()["commit"], new, daemon.output(1))
        self.assertEqual(daemon.read("live/page"), "one")
        self.assertEqual((other.path / "page").read_text(), "uncommitted")
        local = set(other.git("rev-parse", "--local-env-vars").split())
        self.assertEqual(local & set(self.environment(daemon)), set())

    def test_what_follows_a_run_never_works_in_the_root_directory(self):
        """`on_success` runs in `/` when the directory is gone: `rm -r *` there is fatal."""
        daemon = self.serve(hook('rmdir "$PWD"', on_success='pwd > "$HOME/where"'))
        daemon.push()
        daemon.settle()
        self.assertEqual(daemon.read("where"), f"{daemon.state}/runs/1\n")


# ---------------------------------------------------------------- Git


class Git(Case):
    """`git = URL`: the directory is the branch's newest commit, whatever was there before."""

    def deployed(self):
        """Return a repository of one commit and a daemon that has deployed it into `live`."""
        origin = self.repository()
        origin.commit(page="one")
        daemon = self.serve(self.deploying())
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok", daemon.output(1))
        return origin, daemon

    def test_two_branches_are_deployed_to_two_folders(self):
        origin = self.repository()
        main, staging = origin.commit(page="live"), origin.commit("staging", page="next")
        daemon = self.serve(self.deploying('cp page "$HOME/on-$HOOKD_BRANCH"'),
                            self.deploying('cp page "$HOME/on-$HOOKD_BRANCH"', "staging",
                                           directory=self.home / "staging"), jobs=2)
        daemon.push("main", main)
        daemon.push("staging", staging)
        daemon.settle()
        targets = daemon.targets()
        self.assertEqual({one["state"] for one in targets.values()}, {"ok"}, daemon.log)
        self.assertEqual(daemon.read("on-main") + daemon.read("on-staging"), "livenext")
        self.assertEqual(daemon.read("live/page") + daemon.read("staging/page"), "livenext")

    def test_two_branches_may_share_one_working_copy(self):
        origin = self.repository()
        origin.commit(page="live")
        origin.commit("staging", page="next", extra="only here")
        publish = alone('rm -rf "$HOME/out/$HOOKD_BRANCH"; mkdir -p "$HOME/out/$HOOKD_BRANCH"\n'
                        'cp page "$HOME/out/$HOOKD_BRANCH/"; ls > "$HOME/ls.$HOOKD_BRANCH"', "copy")
        daemon = self.serve(self.deploying(publish), self.deploying(publish, "staging"), jobs=2)
        for _ in range(2):
            daemon.push("main")
            daemon.push("staging")
            daemon.settle()
        self.assertEqual(daemon.read("out/main/page") + daemon.read("out/staging/page"), "livenext")
        self.assertEqual(daemon.read("ls.main").split(), ["page"])
        self.assertEqual(daemon.read("ls.staging").split(), ["extra", "page"])
        self.assert_never_overlapped(daemon)

    def test_the_newest_commit_is_deployed_not_the_one_that_was_pushed(self):
        origin, daemon = self.deployed()
        (old,) = daemon.seen()
        new = origin.commit(page="new")
        daemon.push(commit=old, repository=repository_of(pushed_at=1))
        target = daemon.settled()
        self.assertEqual(daemon.seen(), [old, new])
        self.assertEqual(daemon.read("live/page"), "new")
        self.assertEqual(target["commit"], new)

    def test_local_changes_are_discarded_and_other_files_are_left(self):
        origin, daemon = self.deployed()
        (self.home / "live/page").write_text("changed by hand")
        (self.home / "live/cache").write_text("ignored")
        (self.home / "live/upload").write_text("untracked")
        origin.commit(page="two", **{".gitignore": "cache\n"})
        daemon.push()
        daemon.settle()
        texts = [daemon.read(f"live/{name}") for name in ("page", "cache", "upload")]
        self.assertEqual(texts, ["two", "ignored", "untracked"])

    def test_a_forced_push_is_followed(self):
        origin, daemon = self.deployed()
        origin.commit(page="two", gone="soon")
        daemon.push()
        daemon.settle()
        origin.git("reset", "-q", "--hard", "HEAD~1")
        other = origin.commit(page="three")
        daemon.push(commit=other, forced=True)
        self.assertEqual(daemon.settled()["commit"], other)
        self.assertEqual(daemon.read("live/page"), "three")
        self.assertFalse((self.home / "live/gone").exists())

    def test_a_hook_with_git_needs_no_command(self):
        self.repository().commit(page="one")
        daemon = self.serve(section("octo/site main", git=self.home / "origin", catch_up="no",
                                    directory=self.home / "live"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual(daemon.read("live/page"), "one")

    def test_a_tag_is_deployed(self):
        origin = self.repository()
        tagged = origin.commit(page="tagged")
        origin.git("tag", "-a", "-m", "A release", "v1.0")
        origin.commit(page="later")
        daemon = self.serve(self.deploying(NOTE + '; echo "$HOOKD_BRANCH" > "$HOME/tag"',
                                           "refs/tags/v*"))
        daemon.push(ref="refs/tags/v1.0", commit=tagged)
        daemon.settle()
        self.assertEqual((daemon.seen(), daemon.read("live/page")), ([tagged], "tagged"))
        self.assertEqual(daemon.read("tag"), "v1.0\n")

    def test_a_release_deploys_its_tag(self):
        origin = self.repository()
        tagged = origin.commit(page="released")
        origin.git("tag", "v2")
        origin.commit(page="later")
        daemon = self.serve(self.deploying(branch="v*", event="release"))
        daemon.post(release_of("v2"), X_GitHub_Event="release")
        daemon.settle()
        self.assertEqual((daemon.seen(), daemon.read("live/page")), ([tagged], "released"))

    def test_one_hook_may_deploy_every_repository_of_an_owner(self):
        for name in ("one", "two"):
            Repository(self.home / "octo" / name).commit(page=f"of {name}")
        daemon = self.serve(hook(NOTE, "main", "Octo/*", git=str(self.home) + "/{repo}",
                                 directory=self.home / "live/{name}", catch_up="no"))
        for repo in ("octo/one", "octo/two"):
            self.assert_answer(daemon.push(repo=repo), 202)
        daemon.settle()
        self.assertEqual(daemon.read("live/one/page") + daemon.read("live/two/page"),
                         "of oneof two")

    def test_submodules_come_along(self):
        (self.home / ".gitconfig").write_text("[protocol \"file\"]\n\tallow = always\n")
        self.repository("library").commit(code="of the library")
        origin = self.repository()
        origin.commit(page="one")
        origin.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add",
                   str(self.home / "library"), "lib")
        origin.commit()
        daemon = self.serve(self.deploying())
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual(daemon.read("live/lib/code"), "of the library")

    def test_a_submodule_that_cannot_be_updated_fails_the_run(self):
        (self.home / ".gitconfig").write_text("[protocol \"file\"]\n\tallow = always\n")
        library, origin = self.repository("library"), self.repository()
        library.commit(code="one")
        origin.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add",
                   str(library.path), "lib")
        origin.commit()
        daemon = self.serve(self.deploying())
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok")
        os.truncate(self.home / "live/.git/modules/lib/index", 10)
        origin.git("-C", "lib", "pull", "-q")
        library.commit(code="two")
        origin.git("-C", "lib", "pull", "-q")
        origin.commit()
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "failed", daemon.output(2))
        self.assertEqual(len(daemon.seen()), 1)

    def test_an_index_that_was_cut_short_is_made_anew(self):
        origin, daemon = self.deployed()
        os.truncate(self.home / "live/.git/index", 10)
        new = origin.commit(page="two")
        daemon.push()
        self.assertEqual(daemon.settled()["commit"], new, daemon.output(2))
        self.assertEqual(daemon.read("live/page"), "two")

    def test_the_remedy_for_another_repository_in_the_directory_works(self):
        new = self.repository().commit(page="one")
        Repository(self.home / "live").commit(page="precious")
        daemon = self.serve(self.deploying())
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "failed")
        remedy = daemon.output(1).partition("as hookd's user: ")[2].strip()
        subprocess.run(remedy, shell=True, check=True, env=daemon.environment)
        daemon.push()
        self.assertEqual(daemon.settled()["commit"], new, daemon.output(2))

    def test_a_directory_that_holds_something_else_is_left_alone(self):
        self.repository().commit(page="one")
        other = self.repository("other")
        other.commit(page="precious")
        (self.home / "live").mkdir()
        (self.home / "live/page").write_text("precious")
        daemon = self.serve(self.deploying(), self.deploying(branch="dev", directory=other.path))
        for branch, place in (("main", "live"), ("dev", "other")):
            with self.subTest(place):
                daemon.push(branch)
                self.assertEqual(daemon.settled(branch)["state"], "failed")
                self.assertEqual(daemon.read(f"{place}/page"), "precious")
                self.assertIn(str(self.home / place), daemon.log)
        self.assertEqual(os.listdir(self.home / "live"), ["page"])
        self.assertEqual(daemon.seen(), [])

    def test_locks_that_a_killed_git_left_are_no_hindrance(self):
        origin, daemon = self.deployed()
        for name in ("index.lock", "HEAD.lock", "shallow.lock", "config.lock", "FETCH_HEAD.lock"):
            (self.home / "live/.git" / name).touch()
        new = origin.commit(page="two")
        daemon.push()
        target = daemon.settled()
        self.assertEqual((target["state"], target["commit"]), ("ok", new), daemon.output(2))

    def test_a_clone_that_was_cut_short_is_begun_again(self):
        origin = self.repository()
        new = origin.commit(page="one")
        daemon = self.serve(self.deploying())
        Repository(self.home / "live").git("remote", "add", "origin", str(origin.path))
        (self.home / "live/.git/index.lock").touch()
        daemon.push()
        self.assertEqual(daemon.settled()["commit"], new, daemon.output(1))

    def test_a_broken_clone_inside_another_checkout_leaves_that_alone(self):
        origin = self.repository()
        origin.commit(page="one")
        around = self.home / "around"
        origin.git("clone", "-q", str(origin.path), str(around))
        (around / "page").write_text("uncommitted")
        daemon = self.serve(self.deploying(directory=around / "live"))
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok", daemon.output(1))
        (around / "live/.git/HEAD").unlink()
        origin.commit(page="two")
        daemon.push(commit=sha("next"))
        daemon.settle()
        self.assertEqual((around / "page").read_text(), "uncommitted", daemon.output(2))

    def test_git_has_left_nothing_behind_that_works_on_in_the_clone(self):
        """A `gc` that goes on behind a deploy holds locks that the next one meets."""
        self.repository().commit(page="one")
        daemon = self.serve(self.deploying(), variables=self.counting_git())
        daemon.push()
        daemon.settle()
        calls = daemon.read("calls").splitlines()
        fetches = [line for line in calls if " fetch " in line]
        self.assertTrue(fetches, calls)
        for line in fetches:
            self.assertIn("gc.autoDetach=false", line)

    def test_a_fetch_that_fails_is_told_and_the_command_does_not_run(self):
        self.repository().commit(page="one")
        daemon = self.serve(self.deploying(branch="gone"),
                            self.deploying(branch="lost", git=self.home / "nowhere",
                                           directory=self.home / "lost"), jobs=1)
        for number, (branch, word) in enumerate((("gone", "gone"), ("lost", "nowhere")), 1):
            with self.subTest(branch):
                daemon.push(branch)
                self.assertEqual(daemon.settled(branch)["state"], "failed")
                self.assertIn(word, daemon.output(number))
        self.assertEqual(daemon.seen(), [])

    def test_a_question_to_git_ends_whoever_keeps_its_pipe(self):
        (self.home / "git").write_text("#!/bin/sh\nsetsid sleep 300 &\nsleep 300\n")
        (self.home / "git").chmod(0o755)
        environ = {b"PATH": os.fsencode(f"{self.home}:{os.environ['PATH']}"),
                   b"HOME": os.fsencode(self.home)}
        daemon = self.prepare(self.deploying())  # whose end is also that of what is left
        patience, hookd.GIT_SECONDS = hookd.GIT_SECONDS, 0.2
        try:
            answer = hookd.ask_git(["ls-remote"], environ)
        finally:
            hookd.GIT_SECONDS = patience
        self.assertEqual(answer, (1, "", "no answer in time"))
        daemon.sweep()

    def test_a_missing_git_is_told(self):
        self.repository().commit(page="one")
        (self.home / "bin").mkdir()
        daemon = self.serve(self.deploying(), variables={"PATH": str(self.home / "bin")})
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "failed")
        self.assertRegex(daemon.output(1), "git.*PATH|PATH.*git")

    @unittest.skipUnless(os.geteuid() == 0, "only root can give a directory away")
    def test_a_directory_of_another_owner_is_told_with_its_remedy(self):
        daemon = self.deployed()[1]
        for place in (self.home / "live", *(self.home / "live").rglob("*")):
            os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "failed")
        self.assertIn("chown", daemon.output(2))

    def test_a_remote_that_asks_for_a_password_fails_at_once(self):
        with http_server(401, {"WWW-Authenticate": 'Basic realm="git"'}) as url:
            daemon = self.serve(self.deploying(git=url + "/site"))
            daemon.push()
            self.assertEqual(daemon.settled()["state"], "failed")

    def test_the_deploy_key_is_the_only_identity_and_nothing_is_asked(self):
        origin = self.repository()
        origin.commit(page="over ssh")
        programs = self.home / "bin"
        programs.mkdir()
        self.script(programs / "ssh", f'echo "$@" >> "{self.home}/ssh"\n'
                    'for last; do :; done\nexec sh -c "$last"')
        (self.home / "key").write_text("a private key\n")
        (self.home / "key").chmod(0o600)
        daemon = self.serve(
            self.deploying(git=f"git@host.test:{origin.path}", deploy_key=self.home / "key"),
            variables={"PATH": f"{programs}:{os.environ['PATH']}"})
        daemon.push()
        self.assertEqual(daemon.settled()["state"], "ok", daemon.output(1))
        self.assertEqual(daemon.read("live/page"), "over ssh")
        for word in (f"-i {self.home}/key", "IdentitiesOnly=yes", "BatchMode=yes",
                     f"UserKnownHostsFile={daemon.state}/known_hosts",
                     "StrictHostKeyChecking=accept-new", "git@host.test"):
            self.assertIn(word, daemon.read("ssh").replace('"', ""))

    def test_a_superseded_push_is_not_missed(self):
        origin = self.repository()
        origin.commit(page="one")
        daemon = self.serve(self.deploying(GATE + "\n" + NOTE))
        daemon.push()
        daemon.wait_for_run(1)
        newest = origin.commit(page="two")
        daemon.push()
        daemon.push()
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], newest)
        self.assertEqual(len(daemon.seen()), 2)


@contextmanager
def http_server(status, headers):
    """Answer every GET on a free port with a status and headers; give the URL."""
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Commits(Case):
    """Which commit is deployed, what is said of it, and what it costs to get it."""

    def test_the_second_fetch_of_a_large_repository_is_small(self):
        """Every deploy downloads the whole repository again."""
        origin = self.repository()
        for number in range(400):
            (origin.path / f"file-{number}").write_bytes(os.urandom(4096))
        origin.commit(page="one")
        remote = self.remote()
        remote.serve()
        daemon = self.serve(self.deploying(git=remote.url))
        costs = []
        for page in ("one", "two", "three", "three"):
            origin.commit(page=page)
            if page == "three":
                origin.git("commit", "-q", "--amend", "--allow-empty", "-m", "Forced")
            before = remote.sent
            daemon.push(commit=origin.git("rev-parse", "HEAD"))
            self.assertEqual(daemon.settled()["state"], "ok")
            costs.append(remote.sent - before)
        self.assertGreater(costs[0], 1_600_000)
        self.assertLess(max(costs[1:]), costs[0] / 20, costs)
        self.assertEqual(daemon.read("live/page"), "three")

    def test_everything_said_of_a_run_names_the_commit_that_was_deployed(self):
        """The log names the commit that the push claimed, which may not even exist."""
        origin = self.repository()
        newest = origin.commit(page="one")
        say = 'echo "$HOOKD_SUMMARY $HOOKD_COMMIT" > "$HOME/said"'
        daemon = self.serve(self.deploying(on_success=say))
        claimed = sha("claimed")
        self.assert_answer(daemon.push(commit=claimed), 202, f"at {claimed[:7]}")
        target = daemon.settled()
        self.assertEqual((target["commit"], target["subject"]), (newest, "A change"))
        self.assertEqual((target["last_good"], self.history(daemon)[0]["commit"]), (newest, newest))
        daemon.wait_for_log(f"run 1 ok: octo/site main at {newest[:7]}")
        self.assertEqual(daemon.seen(), [newest])
        self.assertRegex(daemon.wait_for("said"), f"at {newest[:7]} .* {newest}\n")
        self.assertIn(newest[:7], daemon.hookd("status").out)
        named = [line for line in daemon.log.splitlines() if claimed[:7] in line]
        self.assertEqual([line for line in named if "queued" not in line], [])
        self.assertTrue(named)

    def test_every_push_in_order_deploys_the_newest_commit(self):
        """With `every`, an older commit goes live in between."""
        origin, daemon = self.repository(), None
        old = origin.commit(page="one")
        daemon = self.serve(self.deploying(f"{NOTE}\n{GATE}", queue="every"))
        daemon.push(commit=old)
        daemon.wait_for("seen")
        daemon.push(commit=origin.commit(page="two"))
        newest = origin.commit(page="three")
        daemon.push(commit=newest)
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen(), [old, newest, newest])

    def checked(self, daemon, commit, **run):
        """Tell the daemon that the checks of a commit passed; return the target at the end."""
        payload = workflow_run_of(commit, run=run)
        self.assert_answer(daemon.post(payload, X_GitHub_Event="workflow_run"), 202)
        return daemon.settled()

    def test_what_passed_its_checks_is_deployed_and_nothing_newer(self):
        """A red commit goes live because the one before it was green."""
        origin = self.repository()
        green, red = origin.commit(page="green"), origin.commit(page="red")
        daemon = self.serve(self.deploying(event="workflow_run"))
        self.assertEqual(self.checked(daemon, green)["commit"], green)
        self.assertEqual((daemon.seen(), daemon.read("live/page")), ([green], "green"))
        self.assertEqual(self.checked(daemon, red)["state"], "ok")
        self.assertEqual((daemon.seen(), daemon.read("live/page")), ([green, red], "red"))

    def test_a_run_by_hand_needs_no_check(self):
        """`run` on a workflow's hook ends `superseded`: its push names no commit."""
        newest = self.repository().commit(page="one")
        daemon = self.serve(self.deploying(event="workflow_run"))
        told = daemon.hookd("run", "octo/site", "main")
        self.assertEqual((told.code, daemon.seen()), (0, [newest]), told)

    def test_a_check_that_passes_late_brings_no_older_commit_back(self):
        """The slow check of an old commit, or its second run, rolls back."""
        origin = self.repository()
        old, new = origin.commit(page="old"), origin.commit(page="new")
        daemon = self.serve(self.deploying(event="workflow_run"))
        self.checked(daemon, new)
        for run in ({"id": 5}, {"id": 99, "run_attempt": 2}):
            target = self.checked(daemon, old, **run)
            self.assertEqual((target["last_good"], daemon.read("live/page")), (new, "new"))
        self.assertEqual(daemon.seen(), [new])

    def test_a_checked_commit_that_the_branch_lost_is_not_deployed(self):
        """A forced push took a commit back, and its check brings it live."""
        origin = self.repository()
        base, lost = origin.commit(page="base"), origin.commit(page="lost")
        daemon = self.serve(self.deploying(event="workflow_run"))
        self.checked(daemon, base)
        origin.git("reset", "-q", "--hard", base)
        self.checked(daemon, lost)
        self.assertEqual((daemon.seen(), daemon.read("live/page")), ([base], "base"))

    def test_a_tag_that_moved_is_followed(self):
        """A fetch into a ref of our own refuses a tag that moved."""
        origin = self.repository()
        commits = [origin.commit(page="one"), origin.commit(page="two")]
        daemon = self.serve(self.deploying(branch="refs/tags/v*"))
        for commit in commits:
            origin.git("tag", "-f", "-a", "-m", "A release", "v1", commit)
            daemon.push(ref="refs/tags/v1", commit=commit)
            daemon.settle()
        self.assertEqual((daemon.seen(), daemon.read("live/page")), (commits, "two"))


class Outage(Case):
    """A remote that cannot be reached: the run waits, says so, and begins again."""

    NEXT_TRY = r"next try at \d\d:\d\d"

    def test_a_run_waits_for_a_remote_that_cannot_be_reached(self):
        """A deploy of a minute's outage is `failed`, and nobody tries it again."""
        self.repository().commit(page="one")
        for name, url, words in (("refused", self.remote().url, "unable to connect"),
                                 ("unknown", "git://host.invalid/x", ".nable to look up")):
            with self.subTest(name):
                daemon = self.serve_in(name, self.deploying(git=url, on_failure=NAME,
                                                            directory=self.home / f"{name}-live"))
                daemon.push()
                self.wait_for_status(daemon, self.NEXT_TRY)
                daemon.wait_for_log(f"run 1 waits 60 s: git fetch: {words}")
                self.assertEqual(daemon.states(), {1: "queued"})
                daemon.kill()
                daemon.start()
                self.wait_for_status(daemon, self.NEXT_TRY)
                self.assertEqual((daemon.states(), daemon.seen()), ({1: "queued"}, []))
                daemon.kill()

    def test_it_is_tried_again_after_1_5_and_15_minutes_and_then_has_failed(self):
        """A remote that is gone for good is tried for ever, or given up after a minute."""
        newest, remote = self.repository().commit(page="one"), self.remote()
        daemon = self.serve(self.deploying("true", git=remote.url, on_failure=NAME, catch_up="1d"))
        daemon.push(commit=newest)
        for minutes in (1, 5, 15):
            with self.subTest(minutes=minutes), closing(sqlite3.connect(
                    daemon.state / "hookd.db", isolation_level=None)) as store:
                (later,) = daemon.wait(lambda one=store: one.execute(
                    "SELECT not_before FROM runs WHERE not_before > ?", [time.time()]).fetchone(),
                    "the next try")
                self.assertAlmostEqual(later - time.time(), minutes * 60, delta=20)
                self.assertEqual(daemon.states(), {1: "queued"})
                daemon.stop()
                store.execute("UPDATE runs SET not_before = 1")  # hookd was down for so long
                daemon.start()
        self.wait_for_states(daemon, {1: "failed"})
        self.assertEqual(daemon.wait_for("seen"), "main\n")
        remote.serve()
        self.did(daemon, "pause")
        self.did(daemon, "resume")  # catch-up asks; what never reached the remote saw nothing
        self.wait_for_states(daemon, {1: "failed", 2: "ok"})

    def test_a_remote_that_never_answers_is_tried_again(self):
        """A remote that is silent until `timeout` ends the deploy for good."""
        remote = self.remote()
        remote.listen()
        daemon = self.serve(self.deploying(git=remote.url, timeout="1s"))
        daemon.push()
        self.wait_for_status(daemon, self.NEXT_TRY)
        self.assertEqual((daemon.states(), daemon.seen()), ({1: "queued"}, []))
        daemon.wait(lambda: daemon.descendants() == [daemon.process.pid], "git to end")

    def test_a_newer_push_takes_the_place_of_what_waits_for_its_remote(self):
        """A push waits for the clock of an earlier one; it comes in less than the minute."""
        newest = self.repository().commit(page="one")
        remote = self.remote()
        daemon = self.serve(self.deploying(git=remote.url))
        daemon.push(commit=sha(1))
        self.wait_for_status(daemon, self.NEXT_TRY)
        remote.serve()
        began = time.monotonic()
        self.assert_answer(daemon.push(commit=newest), 202, "in place of run 1")
        self.wait_for_states(daemon, {1: "superseded", 2: "ok"})
        self.assertLess(time.monotonic() - began, 30)
        self.assertEqual(daemon.seen(), [newest])

    def test_a_newer_push_takes_the_place_of_one_whose_remote_is_being_asked(self):
        """Two runs of a branch wait: the older one is deployed after the newer one."""
        newest = self.repository().commit(page="one")
        remote = self.remote()
        remote.listen()
        daemon = self.serve(self.deploying(git=remote.url, timeout="2s"))
        daemon.push(commit=sha(1))
        daemon.wait(lambda: remote.calls, "git to ask")
        self.assert_answer(daemon.push(commit=newest), 202)
        remote.serving = True
        self.wait_for_states(daemon, {1: "superseded", 2: "ok"})

    def test_what_waits_for_its_remote_takes_no_job(self):
        """An unreachable remote stops every other repository."""
        daemon = self.serve(self.deploying(git=self.remote().url), hook(NAME, "dev"), jobs=1)
        daemon.push()
        self.wait_for_status(daemon, self.NEXT_TRY)
        daemon.push("dev")
        self.assertEqual(daemon.wait_for("seen"), "dev\n")
        self.assertEqual(daemon.states()[1], "queued")

    def test_what_the_remote_refuses_is_a_failure_at_once(self):
        """A missing branch or repository is tried for 21 minutes before anybody is told."""
        self.repository().commit(page="one")
        remote = self.remote()
        remote.serve()
        daemon = self.serve(self.deploying(git=remote.url, branch="gone"),
                            self.deploying(git=remote.url + "-missing", branch="lost",
                                           directory=self.home / "lost"))
        for branch in ("gone", "lost"):
            with self.subTest(branch):
                daemon.push(branch)
                self.assertEqual(daemon.settled(branch)["state"], "failed")


class CatchUp(Case):
    """What hookd finds for itself, and what it leaves alone."""

    def test_at_start_a_commit_that_no_run_took_is_deployed(self):
        origin = self.repository()
        commits = [origin.commit(page="missed")]
        daemon = self.serve(self.deploying(catch_up="1h"))
        self.assertEqual(daemon.wait_for("seen").split(), commits)
        daemon.settle()
        daemon.stop()
        commits.append(origin.commit(page="missed again"))
        daemon.start()
        daemon.wait(lambda: daemon.seen() == commits, "the second commit")

    def test_a_push_that_never_arrived_is_found_in_time(self):
        origin = self.repository()
        commits = [origin.commit(page="one")]
        daemon = self.serve(self.deploying(catch_up="1s"))
        daemon.wait_for("seen")
        commits.append(origin.commit(page="two"))
        daemon.wait(lambda: daemon.seen() == commits, "both commits")

    def test_a_remote_may_be_asked_once_a_month(self):
        self.repository().commit(page="one")
        daemon = self.serve(self.deploying(catch_up="30d"))
        daemon.wait_for("seen")
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assert_answer(daemon.push(), 202)

    def test_catch_up_can_be_turned_off(self):
        self.repository().commit(page="one")
        other = self.home / "count"
        daemon = self.serve(self.deploying(catch_up="no"),
                            self.deploying(f'touch "{other}"', "main", catch_up="1s").replace(
                                "octo/site", "octo/other"))
        daemon.wait(other.exists, "the other hook to catch up")
        daemon.settle()
        self.assertEqual(daemon.targets().keys(), {("octo/other", "main")})

    def test_a_commit_that_failed_is_not_tried_again_and_again(self):
        origin = self.repository()
        broken = origin.commit(page="broken")
        daemon = self.serve(self.deploying(NOTE + "; exit 1", catch_up="1s"),
                            variables=self.counting_git())
        daemon.wait_for("seen")
        self.wait_for_rounds(daemon, 3)
        self.assertEqual(daemon.seen(), [broken])

    def test_a_remote_that_is_down_is_told_once_and_again_when_it_is_back(self):
        daemon = self.serve(self.deploying(catch_up="1s"), variables=self.counting_git())
        self.wait_for_rounds(daemon, 3)
        self.assertEqual(self.told_of_origin(daemon), 1)
        new = self.repository().commit(page="back")
        daemon.wait(lambda: daemon.seen() == [new], "the commit after the outage")
        self.assertEqual(self.told_of_origin(daemon), 2)

    def told_of_origin(self, daemon):
        return sum(str(self.home / "origin") in line for line in daemon.log.splitlines())

    def ask_again(self, daemon):
        """Have catch-up ask twice, as `resume` does: then the first answer was taken in."""
        for _ in range(2):
            goal = daemon.read("calls").count("ls-remote") + 1
            self.did(daemon, "pause", "octo/site", "other")
            self.did(daemon, "resume", "octo/site", "other")
            daemon.wait(lambda at=goal: daemon.read("calls").count("ls-remote") >= at, "catch-up")

    def test_a_commit_that_was_passed_over_stays_so(self):
        """Catch-up brings a skipped, cancelled or untouched commit back within the hour."""
        origin = self.repository()
        commits = [origin.commit(page="one")]
        daemon = self.serve(self.deploying(f"{NOTE}\n{GATE}", catch_up="1d", paths="docs/*"),
                            variables=self.counting_git())
        daemon.open_gate()
        daemon.wait(lambda: daemon.seen() == commits, "the first commit")
        daemon.settle()
        for path, message in (("src/a", "Say hello"), ("docs/a", "[skip deploy]")):
            commit = origin.commit(page=message)
            changes = {"id": commit, "added": [path], "removed": [], "modified": []}
            self.assert_answer(daemon.push(commit=commit, commits=[changes],
                                           head_commit={**changes, "message": message}), 200)
            self.ask_again(daemon)
            self.assertEqual(daemon.seen(), commits, message)
        (self.home / "gate").unlink()
        commits.append(origin.commit(page="cancelled"))
        self.ask_again(daemon)
        daemon.wait(lambda: daemon.seen() == commits, "the run to cancel")
        self.did(daemon, "cancel", "octo/site", "main")
        self.ask_again(daemon)
        daemon.kill()
        daemon.start()
        self.ask_again(daemon)
        self.assertEqual(daemon.seen(), commits)
        self.assertEqual(daemon.settled()["state"], "cancelled")

    def test_what_a_run_deployed_was_seen_whatever_its_push_claimed(self):
        """A push that names another commit than it deploys is deployed twice."""
        origin = self.repository()
        commits = [origin.commit(page="one")]
        daemon = self.serve(self.deploying(NOTE, catch_up="1d"), variables=self.counting_git())
        daemon.wait_for("seen")
        daemon.settle()
        commits.append(origin.commit(page="two"))
        daemon.push(commit=sha("claimed"))
        daemon.settle()
        self.ask_again(daemon)
        commits.append(origin.commit(page="three"))
        self.did(daemon, "run", "octo/site", "main")
        self.ask_again(daemon)
        self.assertEqual(daemon.seen(), commits)

    def test_a_run_that_never_reached_the_remote_saw_nothing(self):
        """After an outage a commit counts as seen that nobody ever fetched."""
        newest = self.repository().commit(page="one")
        remote = self.remote()
        daemon = self.serve(self.deploying(git=remote.url, catch_up="1s"))
        self.follow(daemon, "run", "octo/site", "main")
        self.wait_for_status(daemon, Outage.NEXT_TRY)
        self.did(daemon, "cancel", "octo/site", "main")
        remote.serve()
        self.assertEqual(daemon.wait_for("seen").split(), [newest])
        entry = self.history(daemon)[0]
        self.assertEqual((entry["cause"], entry["commit"]), ("catch-up", newest))

    def test_a_pattern_only_notes_the_branches_that_are_there_at_first(self):
        """A new `*` hook builds every branch of the repository."""
        origin = self.repository()
        origin.commit(page="one")
        for number in range(5):
            origin.commit(f"p/{number}", page=f"{number}")
        daemon = self.serve(self.deploying(NAME, "p/*", directory=self.home / "p/{slug}",
                                           catch_up="1s"), variables=self.counting_git())
        self.wait_for_rounds(daemon, 2)
        self.assertEqual(daemon.seen(), [])
        origin.commit("p/0", page="moved")
        origin.commit("p/new", page="new")
        daemon.wait(lambda: len(daemon.seen()) == 2, "what is new")
        self.wait_for_rounds(daemon, 2)
        daemon.kill()
        daemon.start()
        self.wait_for_rounds(daemon, 2)
        self.assertEqual(sorted(daemon.seen()), ["p/0", "p/new"])

    def test_a_pattern_leaves_what_an_earlier_hook_takes_to_it(self):
        """Catch-up of `*` deploys a branch that another hook owns, without its settings."""
        origin = self.repository()
        origin.commit(page="one")
        daemon = self.serve(hook('echo "main: $HOOKD_BRANCH" >> "$HOME/seen"'),
                            self.deploying(NAME, "*", directory=self.home / "p/{slug}",
                                           catch_up="1s"), variables=self.counting_git())
        self.wait_for_rounds(daemon, 2)
        origin.commit(page="two")
        origin.commit("topic", page="three")
        daemon.wait_for("seen")
        self.wait_for_rounds(daemon, 2)
        # Twice where catch-up came between the new branch and its commit.
        self.assertEqual(set(daemon.seen()), {"topic"})

    def test_a_reload_deploys_nothing(self):
        """A reload asks the remotes anew: a new hook deploys before anybody pushed."""
        asked = self.repository("asked")
        asked.commit(page="one")
        newest = self.repository().commit(page="one")
        clock = self.deploying("true", "main", git=asked.path, catch_up="1s",
                               directory=self.home / "asked-live").replace("octo/", "acme/")
        daemon = self.serve(clock, variables=self.counting_git())
        self.wait_for_rounds(daemon, 1)
        new = self.deploying(NOTE, catch_up="1h")
        self.reload(daemon, clock, new, self.deploying(NOTE, "*", catch_up="1h",
                                                       directory=self.home / "p/{slug}"))
        self.wait_for_rounds(daemon, 3)
        self.assertEqual(daemon.seen(), [])
        self.assertNotIn(f"{self.home}/origin", daemon.read("calls"))
        daemon.kill()
        daemon.start()
        self.assertEqual(daemon.wait_for("seen").split(), [newest])

    def test_what_a_run_by_hand_deployed_was_seen(self):
        """The first commit of a new hook is deployed by hand, and an hour later once more."""
        newest = self.repository().commit(page="one")
        daemon = self.serve(hook("true", "dev"), variables=self.counting_git())
        self.reload(daemon, self.deploying(NOTE, catch_up="1d"))
        self.did(daemon, "run", "octo/site", "main")
        self.ask_again(daemon)
        self.assertEqual(daemon.seen(), [newest])

    def test_a_new_hook_is_caught_up_by_the_clock(self):
        """A hook that came with a reload waits for a restart."""
        daemon = self.serve(hook("true", "dev"))
        newest = self.repository().commit(page="one")
        self.reload(daemon, self.deploying(NOTE, catch_up="1s"))
        self.assertEqual(daemon.wait_for("seen").split(), [newest])

    def test_a_start_answers_before_the_remotes_do(self):
        """A remote that never answers delays `listening`, or the pushes of others."""
        remote = self.remote()
        remote.listen()
        daemon = self.serve(self.deploying(git=remote.url, catch_up="1s"), hook(NAME, "dev"))
        daemon.wait(lambda: remote.calls, "the remote to be asked")
        daemon.push("dev")
        self.assertEqual(daemon.wait_for("seen"), "dev\n")


# ---------------------------------------------------------------- Releases

BUILD = """\
mkdir -p public
cat page > public/a
{}
for name in b c d; do cat page > "public/$name"; done
"""

READER = """
import os, sys
current, end = sys.argv[1:]
count, pages = 0, []
while not os.path.exists(end):
    folder = os.open(current, os.O_RDONLY | os.O_DIRECTORY)
    texts = set()
    try:
        for name in "abcd":
            file = os.open("public/" + name, os.O_RDONLY, dir_fd=folder)
            texts.add(os.read(file, 1000).decode().strip())
            os.close(file)
    except FileNotFoundError:  # fine for a reader that slept until all this was history
        if os.path.samestat(os.stat(current), os.fstat(folder)):
            raise
    os.close(folder)
    if len(texts) > 1:
        sys.exit(f"read {count} of {current} was torn: {texts}")
    count += 1
    pages += texts - set(pages)
print(count, *pages)
"""  # a reader of `current` in a loop, as a web server is one

STEPS = """
import itertools, os, sys, time

HOME, numbers = os.environ["HOME"], itertools.count(1)
EVENTS = ("os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
          "shutil.copytree", "shutil.rmtree", "subprocess.Popen")


def step(event, arguments):
    if event in EVENTS and HOME + "/live" in repr(arguments[:3]):
        if os.path.exists(HOME + "/stop-at"):
            with open(HOME + "/stop-at") as file:
                wanted = int(file.read())
            if next(numbers) == wanted:
                with open(HOME + "/held.new", "w") as file:
                    file.write(event)
                os.rename(HOME + "/held.new", HOME + "/held")
                while True:
                    time.sleep(60)


sys.addaudithook(step)
"""  # a sitecustomize.py: holds the daemon before the Nth change that it makes in `live`

SYNCS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void note(const char *what, int fd, const char *name)
{
    char link[64], path[4096] = "", line[9000];
    if (fd >= 0) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t size = readlink(link, path, sizeof path - 1);
        path[size < 0 ? 0 : size] = 0;
    }
    snprintf(line, sizeof line, "%s/calls", getenv("HOME"));
    int file = open(line, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    int size = snprintf(line, sizeof line, "%s %s\n", what, name ? name : path);
    if (file < 0 || write(file, line, size) != size) abort();
    close(file);
}

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))
int fsync(int fd) { note("fsync", fd, 0); return REAL(fsync)(fd); }
int fdatasync(int fd) { note("fsync", fd, 0); return REAL(fdatasync)(fd); }
int syncfs(int fd) { note("sync", fd, 0); return REAL(syncfs)(fd); }
void sync(void) { note("sync", -1, "/"); REAL(sync)(); }
int rename(const char *a, const char *b) { note("rename", -1, b); return REAL(rename)(a, b); }
int renameat(int c, const char *a, int d, const char *b)
{ note("rename", -1, b); return REAL(renameat)(c, a, d, b); }
"""  # a library to preload: notes what is synced and renamed, and does it


class Probe:
    """The site's own HTTP server: how it answers, the page that is live decides.

    `sick`: 503; `moved`: a redirect to what is fine; `late`: 503 twice, then 200; `slow`: nothing
    until `let_go`; any other: 200. `asked` has the path and the page of each request, `times`
    when it came, `left` how long a client waited before it gave up.
    """

    def __init__(self, page, address=("127.0.0.1", 0), context=None):
        self.page, self.asked, self.times, self.left = page, [], [], []
        self.let_go = threading.Event()
        family = UnixServer if isinstance(address, str) else ThreadingHTTPServer
        self.server = family(address, self.handler())
        self.server.daemon_threads = True
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = None if isinstance(address, str) else self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def handler(probe):  # noqa: N805 (the handler inside has the name `self`)
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page = probe.page.read_text().strip()
                probe.asked.append((self.path, page))
                came = time.monotonic()
                probe.times.append(came)
                late = page == "late" and probe.pages().count("late") <= 2
                drips = itertools.cycle(b"HTTP/1.1 200 OK X-Drip: ")
                while page in ("slow", "drip") and not probe.let_go.wait(0.02):
                    if select.select([self.connection], [], [], 0)[0]:  # closed
                        probe.left.append(time.monotonic() - came)
                        return
                    with suppress(OSError):
                        self.connection.send(bytes([next(drips)]) if page == "drip" else b"")
                moved = page == "moved" and self.path != "/fine"
                with suppress(OSError):  # hookd may have given up
                    self.send_response(503 if late or page == "sick" else 302 if moved else 200)
                    self.send_header("Location", "/fine")
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *words):
                """Print nothing."""

        return Handler

    def pages(self):
        return [page for _, page in self.asked]

    def url(self, path="/health"):
        return f"http://127.0.0.1:{self.port}{path}"

    def close(self):
        self.let_go.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


class UnixServer(ThreadingHTTPServer):
    """An HTTP server on a unix socket."""

    address_family = socket.AF_UNIX

    def server_bind(self):
        socketserver.TCPServer.server_bind(self)  # HTTPServer's own wants a host and a port


class Site(Case):
    """A site made of releases: a build writes four files that must agree, scripts leave a trace.

    Each commit brings its own scripts `build` and `activate`, so that a commit can fail, hang or
    wait for the gate. `trace` has "build PAGE" and "activate PAGE" for each that began.
    """

    def site(self, *more, variables=None, keep=50, **keys):
        """Return a daemon whose hook deploys `origin` into `live`."""
        self.origin = self.repository()
        self.live = self.home / "live"
        self.clock = itertools.count(int(time.time()))
        self.more, self.keep, self.keys = more, keep, keys
        self.daemon = self.prepare(self.hook(), *more, variables=variables, keep=keep)
        os.chown(self.daemon.ini, self.home.stat().st_uid, self.home.stat().st_gid)
        return self.daemon.start()

    def hook(self, branch="main", **keys):
        """Return the section of a hook that makes releases; `keys` change it, None removes."""
        return section(f"octo/site {branch}", without_none({
            "git": self.home / "origin", "directory": self.home / "live", "releases": 3,
            "catch_up": "no", "healthcheck_timeout": "3s" if "healthcheck" in self.keys else None,
            "command": 'echo "build $(cat page)" >> "$HOME/trace"\n. ./build',
            "activate": 'echo "activate $(cat page)" >> "$HOME/trace"\n. ./activate',
            **self.keys, **keys}))

    def change(self, **keys):
        """Stop the daemon and start it with other keys of the hook."""
        self.daemon.stop()
        self.keys.update(keys)
        self.daemon.configure(self.ini(self.hook(), *self.more, keep=self.keep))
        self.daemon.start()

    def probe(self, *arguments, page="live/current/page"):
        probe = Probe(self.home / page, *arguments)
        self.addCleanup(probe.close)
        return probe

    def commit(self, page, build="", activate="", **files):
        return self.origin.commit(page=f"{page}\n", build=BUILD.format(build),
                                  activate=f"{activate}\n", **files)

    def push(self, commit, branch="main", **fields):
        """Push a commit to the daemon; return the number of its run."""
        answer = self.daemon.push(branch, commit,
                                  repository=repository_of(pushed_at=next(self.clock)), **fields)
        self.assert_answer(answer, 202)
        return int(re.search(r"run (\d+)", answer.text).group(1))

    def begin(self, page, **scripts):
        """Commit and push; return the number of the run."""
        return self.push(self.commit(page, **scripts))

    def deploy(self, page, state="ok", **scripts):
        """Commit and push, and wait until the run has ended in a state; return the commit."""
        commit = self.commit(page, **scripts)
        self.ends(self.push(commit), state)
        return commit

    def ends(self, run, state="ok"):
        """Wait until a run has ended, and insist on how."""
        ended = self.daemon.wait(
            lambda: {**self.daemon.states()}.get(run, "queued") not in ("queued", "running")
            and self.daemon.states()[run], f"run {run} to end")
        self.assertEqual(ended, state, self.daemon.output(run))

    def roll_back(self, *goal, code=0):
        """Roll back, wait until the run has ended; return what the verb said."""
        done = self.daemon.hookd("rollback", "octo/site", "main", *goal)
        self.daemon.settle()
        self.assertEqual(done.code, code, done)
        return done

    def reaches(self, line, times=1):
        """Wait until a script of a page has begun, so many times."""
        self.daemon.wait(lambda: self.trace().count(line) >= times, f"{line!r} in the trace")

    def trace(self):
        return self.daemon.read("trace").splitlines()

    def released(self):
        """Return the names of the releases on disk, oldest first."""
        names = os.listdir(self.live / "releases")
        return sorted(names, key=lambda name: [int(one) for one in re.findall(r"\d+", name)])

    def pages(self, release):
        """Return the texts of the four files of a release: one, if it is whole."""
        return {(release / "public" / name).read_text().strip() for name in "abcd"}

    def assert_stands(self, release, page):
        """Check which release is live, that it is whole, and its page."""
        self.assertEqual((os.readlink(self.live / "current"), self.pages(self.live / "current")),
                         (f"releases/{release}", {page}))

    def assert_only_ours(self):
        """Check that the directory holds what the contract names, and nothing half done."""
        self.assertLessEqual(set(os.listdir(self.live)), {"repo", "releases", "shared", "current"})

    def held(self):
        """Return the commits that `repo` holds for runs: {run: commit}."""
        told = self.git_in(self.live / "repo", "for-each-ref", "--sort=version:refname",
                           "--format=%(refname:lstrip=2) %(objectname)", "refs/hookd")
        return {run: commit for run, commit in map(str.split, told.splitlines()) if run.isdigit()}

    def resume(self):
        self.assertEqual(self.daemon.hookd("resume", "octo/site", "main").code, 0)

    def note(self, run):
        """Return the note of a run, as the history has it."""
        told = self.daemon.hookd("status", "octo/site", "main", "--json")
        return next(one["note"] for one in json.loads(told.out) if one["run"] == run) or ""

    def told(self, run):
        """Return what is said of a run that failed, in one line each: {where: text}."""
        end = self.daemon.wait_for_log(rf"run {run} (failed|timeout|cancelled|interrupted).*")
        return {"note": self.note(run), "log": end.group(), "output": self.daemon.output(run),
                "summary": self.daemon.read(f"summary.{run}")}

    def assert_told(self, run, stands, words=""):
        """Check that note, log, output and summary of a run say what stands, and `status` which."""
        words = words or rf"release 1 \({stands[:7]}\)(, which)? stands"
        for place, text in self.told(run).items():
            with self.subTest(place):
                self.assertRegex(text, words)
        self.assertIn(stands[:7], self.daemon.hookd("status", "octo/site", "main").out)


SUMMARY = 'echo "$HOOKD_SUMMARY" > "$HOME/summary.$HOOKD_RUN"'  # an on_failure


class Releases(Site):
    """`releases = N`: built beside, switched at once; what is in the directory, what is kept."""

    def test_a_release_is_a_whole_checkout_behind_a_relative_link(self):
        daemon = self.site()
        one = self.deploy("one")
        two = self.deploy("two")
        self.assert_stands(2, "two")
        self.assertEqual(self.released(), ["1", "2"])
        self.assert_only_ours()
        for number, commits in (("1", [one]), ("2", [two, one])):
            log = self.git_in(self.live / "releases" / number, "log", "--format=%H")
            self.assertEqual(log.split(), commits)
        target = daemon.targets()["octo/site", "main"]
        self.assertEqual((target["state"], target["commit"], target["last_good"]), ("ok", two, two))

    def test_scripts_find_the_paths_of_the_release_and_of_current(self):
        tell = 'echo "$HOOKD_RELEASE $HOOKD_CURRENT $(pwd -P) $(readlink "$HOOKD_CURRENT")"'
        self.site(command=f'. ./build\n{tell} >> "$HOME/command"',
                  activate=f'{tell} >> "$HOME/activate"',
                  on_success=f'{tell} > "$HOME/on.$HOOKD_RUN"')
        self.deploy("one")
        self.deploy("two")
        release, current = self.live / "releases/2", self.live / "current"
        self.assertEqual(self.daemon.read("command").splitlines()[1],
                         f"{release} {current} {release} releases/1")
        self.assertEqual(self.daemon.read("activate").splitlines()[1],
                         f"{release} {current} {release} releases/2")
        self.assertEqual(self.daemon.wait_for("on.2").split()[:2], [str(release), str(current)])

    def test_nothing_is_switched_before_the_command_is_through(self):
        self.site()
        self.deploy("one")
        run = self.begin("two", build=GATE)
        self.reaches("build two")
        self.assert_stands(1, "one")
        self.daemon.open_gate()
        self.ends(run)
        self.assert_stands(2, "two")
        self.deploy("three", "failed", build="exit 4")
        self.assert_stands(2, "two")
        self.assertEqual(self.trace()[-2:], ["activate two", "build three"])
        target = self.daemon.targets()["octo/site", "main"]
        self.assertEqual((target["state"], target["exit"]), ("failed", 4))

    def test_a_reader_finds_a_whole_release_at_any_instant(self):
        probe = self.probe()
        self.site(healthcheck=probe.url(), releases=2)
        self.deploy("one")
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, self.live / "current", self.home / "end"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.addCleanup(reader.stdout.close)
        self.addCleanup(reader.wait)
        self.addCleanup(reader.kill)
        self.deploy("two")
        self.deploy("three", "failed", build="exit 1")
        self.deploy("four", "failed", activate="exit 1")
        self.deploy("sick", "failed")
        for page, stage in (("five", "build"), ("six", "activate")):
            run = self.begin(page, **{stage: GATE})
            self.reaches(f"{stage} {page}")
            self.daemon.kill()
            self.daemon.open_gate()
            self.daemon.start()
            self.ends(run)
            (self.home / "gate").unlink()
        self.roll_back()
        self.assertEqual(self.pages(self.live / "current"), {"five"})
        (self.home / "end").touch()
        told = reader.communicate()[0].decode()
        self.assertEqual(reader.returncode, 0, told)
        count, *pages = told.split()
        self.assertGreater(int(count), 100)
        self.assertEqual([page for page in pages if page not in ("one", "four")],
                         ["two", "sick", "five", "six"])

    def test_a_disk_that_is_full_for_a_while_costs_nothing_that_is_live(self):
        daemon = self.site()
        self.deploy("one")
        hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (16 << 20, hard))
        self.deploy("two", "failed", large="\0" * (17 << 20))
        self.deploy("three", "failed", large="", build="head -c 17000000 /dev/zero > large")
        self.assert_stands(1, "one")
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        self.deploy("four")
        self.assert_stands(4, "four")
        self.assert_only_ours()

    @unittest.skipUnless(shutil.which("cc"), "no C compiler")
    def test_a_release_is_on_disk_before_the_switch_and_the_switch_before_activate(self):
        library = self.home / "syncs.so"
        (self.home / "syncs.c").write_text(SYNCS)
        subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", library, self.home / "syncs.c",
                        "-ldl"], check=True)
        self.site(variables={"LD_PRELOAD": str(library)},
                  activate='cp "$HOME/calls" "$HOME/calls.then"')
        self.deploy("one")
        calls = [line.split(" ", 1) for line in self.daemon.read("calls.then").splitlines()]
        (switch,) = [number for number, (what, path) in enumerate(calls)
                     if what == "rename" and path.rpartition("/")[2] == "current"]
        before, after = calls[:switch], calls[switch:]
        synced = {path for what, path in before if what == "fsync"}
        files = {str(path) for path in (self.live / "releases/1").rglob("*") if path.is_file()}
        self.assertTrue([one for one in before if one[0] == "sync"] or files <= synced, calls)
        self.assertIn(["fsync", str(self.live)], after)

    def test_the_newest_good_ones_are_kept_and_the_newest_failed_one(self):
        self.site(releases=2)
        for page in ("one", "two", "three"):
            self.deploy(page)
        self.assertEqual(self.released(), ["2", "3"])
        self.deploy("four", "failed", build="exit 1")
        self.deploy("five", "failed", activate="exit 1")
        self.assertEqual(self.released(), ["2", "3", "5"])
        self.deploy("six")
        self.assertEqual(self.released(), ["3", "5", "6"])

    def test_the_live_one_and_the_one_that_was_live_before_are_always_kept(self):
        self.site(releases=2)
        for page in ("one", "two", "three"):
            self.deploy(page)
        self.roll_back()
        self.resume()
        self.deploy("four", "failed", build="exit 1")
        self.assertEqual(self.released(), ["2", "3", "5"])
        self.assert_stands(2, "two")
        self.deploy("five")
        self.assertLessEqual({"2", "6"}, set(self.released()))
        self.assert_stands(6, "five")

    def test_nothing_is_removed_before_the_new_one_is_through(self):
        self.site(releases=2)
        self.deploy("one")
        self.deploy("two")
        run = self.begin("three", activate=GATE)
        self.reaches("activate three")
        self.assertEqual(self.released(), ["1", "2", "3"])
        self.daemon.open_gate()
        self.ends(run)
        self.assertEqual(self.released(), ["2", "3"])

    def test_what_hookd_did_not_make_is_never_removed(self):
        self.site(releases=2)
        self.deploy("one")
        names = ("own", "releases/3", "releases/77", "releases/mine", "releases/1.old")
        for name in names:
            (self.live / name).mkdir()
            (self.live / name / "precious").write_text("mine")
        (self.live / "releases/note").write_text("mine")
        os.symlink("1", self.live / "releases/stable")
        self.deploy("two")
        self.deploy("three", "failed", build="exit 1")
        self.assertEqual(len(self.released()), 9)
        for page in ("four", "five", "six"):
            self.deploy(page, "ok" if page != "five" else "failed", build=f"[ {page} != five ]")
        self.assertEqual(set(self.released()),
                         {"3", "4", "5", "6", "77", "mine", "1.old", "note", "stable"})
        for name in names:
            self.assertEqual((self.live / name / "precious").read_text(), "mine")

    def test_a_release_that_its_build_made_read_only_goes_too(self):
        if os.geteuid() == 0:  # whom no mode stops: hookd becomes the owner of its state
            self.open_to_nobody()
            for path in (self.home, self.home / "state"):
                path.mkdir(exist_ok=True)
                os.chown(path, NOBODY, NOBODY)
            (self.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")
        self.site(releases=2, environment=f"HOME={self.home}")
        for page in ("one", "two", "three"):
            self.deploy(page, build="mkdir -p cache/deep\ntouch cache/deep/a\nchmod -R a-w cache")
        self.assertEqual(self.released(), ["2", "3"])

    def test_releases_go_although_their_runs_are_forgotten(self):
        self.site(keep=1)
        for number in range(1, 6):
            self.deploy(f"page-{number}")
        self.assertEqual(self.released(), ["3", "4", "5"])

    def test_a_current_that_is_no_link_fails_the_run_at_once(self):
        self.site()
        (self.live / "current").mkdir(parents=True)
        (self.live / "current/precious").write_text("mine")
        self.deploy("one", "failed")
        self.assertEqual(self.trace(), [])
        self.assertEqual(os.listdir(self.live / "current"), ["precious"])
        self.assertIn(str(self.live / "current"), self.daemon.output(1))
        self.assertIn("current", self.note(1))

    def test_the_commits_of_kept_runs_are_held_whatever_is_forced(self):
        self.site(releases=2)
        commits = {"one": self.deploy("one"), "two": self.deploy("two")}
        self.deploy("three", "failed", build="exit 1")
        self.origin.git("reset", "-q", "--hard", commits["one"])
        for page in ("four", "five"):
            commits[page] = self.deploy(page)
        for path in (self.origin.path, self.live / "repo"):
            self.git_in(path, "reflog", "expire", "--expire=now", "--all")
            self.git_in(path, "gc", "-q", "--prune=now")
        with self.assertRaises(AssertionError):
            self.origin.git("cat-file", "-e", commits["two"])
        self.assertEqual(self.held(), dict(zip("1245", commits.values())))
        self.roll_back(commits["two"])
        self.assertEqual(self.pages(self.live / "current"), {"two"})
        self.assertEqual(self.trace()[-2:], ["build two", "activate two"])

    def test_a_run_that_is_forgotten_no_longer_holds_its_commit(self):
        self.site(keep=2)
        for number in range(1, 5):
            self.deploy(f"page-{number}")
        self.assertEqual(list(self.held())[-2:], ["3", "4"])
        self.assertNotIn("1", self.held())

    def test_a_clean_up_of_the_clone_by_hand_harms_no_run(self):
        self.site()
        self.deploy("one")
        self.git_in(self.live / "repo", "gc", "-q", "--prune=now")
        self.assertEqual(self.daemon.hookd("run", "octo/site", "main").code, 0)
        self.assert_stands(2, "one")
        self.assertEqual(list(self.held()), ["1", "2"])

    def test_objects_are_not_copied_into_releases(self):
        self.with_library()
        for name in ("origin", "library"):
            (self.home / name / "large").write_bytes(os.urandom(1 << 20))
        self.library.commit(code="one")
        self.origin.git("-C", "lib", "pull", "-q")
        for page in ("one", "two", "three"):
            self.deploy(page)
        objects = {(one.stat().st_dev, one.stat().st_ino): one.stat().st_size
                   for one in self.live.rglob("*")
                   if "objects" in one.relative_to(self.live).parts and one.is_file()}
        self.assertTrue(2 << 20 < sum(objects.values()) < 3 << 20, sum(objects.values()))

    def with_library(self):
        """Serve a site that has a library as a submodule."""
        (self.home / ".gitconfig").write_text("[protocol \"file\"]\n\tallow = always\n")
        self.library = self.repository("library")
        self.library.commit(code="of the library")
        self.site()
        self.origin.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add",
                        str(self.home / "library"), "lib")

    def test_submodules_come_along_and_are_fetched_once(self):
        self.with_library()
        self.deploy("one")
        self.library.commit(code="newer")
        self.origin.git("-C", "lib", "pull", "-q")
        self.deploy("two")
        codes = [self.daemon.read(f"live/releases/{number}/lib/code") for number in (1, 2)]
        self.assertEqual(codes, ["of the library", "newer"])
        self.library.path.rename(self.home / "gone")
        self.deploy("three")
        self.assertEqual(self.daemon.read("live/current/lib/code"), "newer")

    def test_a_release_has_every_file_of_the_commit_as_it_is(self):
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 9\n"
        self.site()
        commit = self.deploy("one", **{
            ".gitattributes": "left export-ignore\nwhen export-subst\n*.bin filter=lfs -text\n",
            "left": "here", "when": "$Format:%H$", "image.bin": pointer})
        self.assertEqual(len(commit), 40)
        texts = [self.daemon.read(f"live/current/{name}") for name in ("left", "when", "image.bin")]
        self.assertEqual(texts, ["here", "$Format:%H$", pointer])

    def test_a_branch_of_any_name_has_its_releases(self):
        self.site(self.hook_of_all())
        for branch in ('a"b;$(touch${IFS}owned)`id`', "-rf", "日本/-b"):
            with self.subTest(branch):
                commit = self.commit(branch)
                self.origin.git("update-ref", f"refs/heads/{branch}", commit)
                run = self.push(commit, branch)
                self.ends(run)
                slug = self.daemon.targets()["octo/site", branch]["directory"]
                self.assertEqual(self.pages(Path(slug) / "current"), {branch})
                self.assertEqual(os.readlink(Path(slug) / "current"), f"releases/{run}")
        self.assertEqual(list(self.home.rglob("owned")), [])

    def hook_of_all(self):
        self.keys = {}
        return self.hook("*", directory=self.home / "branches/{slug}")

    def test_tags_of_one_pattern_are_releases_of_one_directory(self):
        self.keys = {}
        self.site(self.hook("refs/tags/v*", directory=self.home / "tags", releases=2))
        for number, tag in enumerate(("v1", "v2", "v3"), 1):
            commit = self.commit(tag)
            self.origin.git("tag", tag)
            self.ends(self.push(commit, tag, ref=f"refs/tags/{tag}"))
            self.assertEqual(os.readlink(self.home / "tags/current"), f"releases/{number}")
        self.assertEqual(sorted(os.listdir(self.home / "tags/releases")), ["2", "3"])


class WayBack(Site):
    """Whatever ends badly after the switch goes back to the release before, and says so."""

    def switched(self, activate=GATE, page="two", **keys):
        """Serve a site with a release; return the commit and the run that now activates `page`."""
        self.site(on_failure=SUMMARY, **keys)
        one = self.deploy("one")
        run = self.begin(page, activate=activate)
        self.reaches(f"activate {page}")
        return one, run

    def assert_went_back(self, run, one):
        """Check that release 1 stands again, that it was activated, and that all say so."""
        self.assert_stands(1, "one")
        self.assertEqual(self.trace(), ["build one", "activate one", "build two", "activate two",
                                        "activate one"])
        self.assert_told(run, one)
        self.assertEqual(self.daemon.targets()["octo/site", "main"]["last_good"], one)

    def test_an_activate_that_fails(self):
        one, run = self.switched("exit 3")
        self.ends(run, "failed")
        self.assert_went_back(run, one)
        self.assertEqual(self.released(), ["1", "2"])
        self.deploy("three")
        self.assert_stands(3, "three")

    def test_scripts_on_the_way_back_find_the_release_that_they_activate(self):
        note = 'echo "$HOOKD_RELEASE $HOOKD_COMMIT" >> "$HOME/found"'
        self.site(activate=f"{note}\n. ./activate", on_failure=note)
        one = self.deploy("one")
        self.deploy("two", "failed", activate="exit 1")
        _, second, third, failure = self.daemon.read("found").splitlines()
        self.assertEqual(third, f"{self.live}/releases/1 {one}")
        self.assertEqual(failure, second, "on_failure is about the release that failed")

    def test_a_healthcheck_that_is_not_answered_in_time(self):
        probe = self.probe()
        self.site(healthcheck=probe.url(), on_failure=SUMMARY)
        one = self.deploy("one")
        self.deploy("sick", "failed")
        self.assert_stands(1, "one")
        self.assert_told(2, one)
        self.assertEqual(self.trace()[-2:], ["activate sick", "activate one"])
        asked = probe.pages()
        self.assertEqual((asked[0], set(asked[1:-1]), asked[-1]), ("one", {"sick"}, "one"))
        self.assertIn("503", self.daemon.output(2))

    def test_a_timeout(self):
        one, run = self.switched("exec sleep 300", timeout="3s")
        self.ends(run, "timeout")
        self.assert_went_back(run, one)

    def test_a_cancel(self):
        one, run = self.switched()
        self.assertEqual(self.pages(self.live / "current"), {"two"})
        self.assertEqual(self.daemon.hookd("cancel", str(run)).code, 0)
        self.ends(run, "cancelled")
        self.assert_stands(1, "one")
        self.assertEqual(self.trace()[-2:], ["activate two", "activate one"])
        for text in (self.note(run), self.daemon.output(run)):
            self.assertIn(f"went back to release 1 ({one[:7]}), which stands", text)
        self.assertEqual(self.daemon.read(f"summary.{run}"), "")

    def test_a_cancel_of_a_build_leaves_nothing_behind(self):
        self.site()
        one = self.deploy("one")
        run = self.begin("two", build=GATE)
        self.reaches("build two")
        self.assertEqual(self.daemon.hookd("cancel", str(run)).code, 0)
        self.ends(run, "cancelled")
        self.assertEqual(self.released(), ["1"])
        self.assertIn(f"release 1 ({one[:7]}) stands", self.note(run))

    def test_a_cancel_while_its_health_is_asked(self):
        probe = self.probe()
        _, run = self.switched("", "slow", healthcheck=probe.url(), healthcheck_timeout="60s")
        self.daemon.wait(lambda: "slow" in probe.pages(), "a question for the health")
        self.assertEqual(self.daemon.hookd("cancel", "octo/site", "main").code, 0)
        self.ends(run, "cancelled")
        self.assert_stands(1, "one")
        self.assertEqual(probe.pages()[-1], "one")

    def test_a_newer_push_that_replaces_it(self):
        _, run = self.switched(queue="replace")
        self.deploy("three")
        self.ends(run, "cancelled")
        self.assertEqual(self.trace()[3:], ["activate two", "activate one", "build three",
                                            "activate three"])
        self.assert_stands(3, "three")

    def test_a_stop(self):
        _, run = self.switched()
        self.daemon.tell(signal.SIGTERM)
        self.daemon.wait_for_log("stopping after 1 running command")
        self.daemon.tell(signal.SIGTERM)
        self.assertEqual(self.daemon.ended(), 0)
        self.assert_stands(1, "one")
        self.assertEqual(self.daemon.descendants(), [])
        self.assertEqual(self.daemon.states()[run], "queued")
        self.daemon.open_gate()
        self.daemon.start()
        self.ends(run)
        self.assert_stands(f"{run}-2", "two")
        self.assertEqual(self.trace()[3:], ["activate two", "activate one", "build two",
                                            "activate two"])

    def test_with_nothing_to_go_back_to_current_stays_and_that_is_said(self):
        self.site(on_failure=SUMMARY)
        self.deploy("one", "failed", activate="exit 1")
        self.assert_stands(1, "one")
        self.assert_told(1, "", "nothing to go back to, release 1 stays")
        self.deploy("two", "failed", build="exit 1")
        self.assert_stands(1, "one")
        self.deploy("three")
        self.assert_stands(3, "three")

    def test_a_release_whose_history_is_lost_is_gone_back_to(self):
        self.site()
        self.deploy("one")
        self.daemon.stop()
        for path in self.daemon.state.glob("hookd.db*"):
            path.unlink()
        self.daemon.start()
        self.deploy("two", "failed", activate="exit 1")
        self.assert_stands(1, "one")
        self.assertIn("went back to release 1, which stands",
                      self.note(max(self.daemon.states())))
        self.begin("three", activate=GATE)
        self.reaches("activate three")
        self.daemon.kill()
        self.assertEqual(self.pages(self.live / "current"), {"three"})
        self.daemon.start()
        self.reaches("activate one", 3)
        self.assert_stands(1, "one")

    def test_a_way_back_that_fails_too_is_said_and_ends_there(self):
        self.site(on_failure=SUMMARY)
        one = self.deploy("one", activate='[ ! -e "$HOME/broken" ]')
        (self.home / "broken").touch()
        self.deploy("two", "failed", activate="exit 1")
        self.assert_stands(1, "one")
        self.assertEqual(self.trace()[-2:], ["activate two", "activate one"])
        self.assert_told(2, one, rf"went back to release 1 \({one[:7]}\), but activate exited "
                         "with 1; it stays")

    def test_a_rollback_that_fails_goes_back_to_the_newer_one(self):
        self.site()
        self.deploy("one", activate='[ ! -e "$HOME/broken" ]')
        self.deploy("two")
        (self.home / "broken").touch()
        self.roll_back(code=1)
        self.assertEqual(self.daemon.states()[3], "failed")
        self.assert_stands(2, "two")
        self.assertEqual(self.trace()[-2:], ["activate one", "activate two"])
        self.assertIsNone(self.daemon.targets()["octo/site", "main"]["paused"])


class RollbackOfReleases(Site):
    """`rollback` with releases: a switch where the release is kept, else a build."""

    def test_to_a_kept_release_it_needs_neither_git_nor_command(self):
        daemon = self.site(variables=self.counting_git(),
                           activate='echo "activate $(cat page)" >> "$HOME/trace"\n'
                                    'cp "$HOME/calls" "$HOME/calls.then"')
        one = self.deploy("one")
        self.deploy("two")
        before = daemon.read("calls")
        self.assertIn("fetch", before)
        shutil.rmtree(self.origin.path)
        said = self.roll_back().out
        self.assertIn(one[:7], said)
        self.assert_stands(1, "one")
        self.assertEqual(daemon.read("calls.then"), before)
        self.assertNotIn("fetch", daemon.read("calls")[len(before):])
        self.assertEqual(self.trace()[-2:], ["activate two", "activate one"])
        self.assertEqual(self.released(), ["1", "2"])
        target = daemon.targets()["octo/site", "main"]
        self.assertEqual((target["state"], target["cause"], target["commit"]),
                         ("ok", "rollback", one))

    def test_a_build_that_fails_leaves_no_pause(self):
        """Nothing was switched, and yet pushes are held back."""
        self.site(releases=2, command='! test -e "$HOME/broken"')
        one = self.deploy("one")
        for page in ("two", "three"):
            self.deploy(page)
        (self.home / "broken").touch()
        self.roll_back(one, code=1)
        self.assertIsNone(self.daemon.targets()["octo/site", "main"]["paused"])
        self.assertEqual(self.daemon.read("live/current/page"), "three\n")

    def test_to_one_that_is_gone_it_is_built_anew(self):
        self.site(releases=2)
        one = self.deploy("one")
        for page in ("two", "three"):
            self.deploy(page)
        self.assertEqual(self.released(), ["2", "3"])
        self.roll_back(one)
        self.assert_stands(4, "one")
        self.assertEqual(self.trace()[-2:], ["build one", "activate one"])

    def test_twice_is_two_back_and_a_push_goes_on_from_there(self):
        self.site()
        for page in ("one", "two", "three"):
            self.deploy(page)
        for page, release in (("two", 2), ("one", 1)):
            self.roll_back()
            self.assert_stands(release, page)
        self.roll_back(code=1)
        self.assert_stands(1, "one")
        self.resume()
        self.deploy("four")
        self.assertEqual(self.pages(self.live / "current"), {"four"})

    def test_after_a_failure_it_is_back_to_what_stands(self):
        self.site()
        self.deploy("one")
        self.deploy("two")
        self.deploy("three", "failed", build="exit 1")
        self.roll_back()
        self.assert_stands(2, "two")
        self.assertEqual(self.trace()[-2:], ["build three", "activate two"])

    def test_it_asks_for_the_health_of_what_it_brings_back(self):
        probe = self.probe()
        self.site(healthcheck=probe.url())
        self.deploy("one")
        self.deploy("two")
        self.roll_back()
        self.assertEqual(probe.pages(), ["one", "two", "one"])


class CutOff(Site):
    """A crash at any step of a run: no half release, `current` whole, the push deployed."""

    def cut_off(self, stage="activate", page="two", **scripts):
        """Kill the daemon while the second release is at a stage; return its run."""
        self.site(on_failure=SUMMARY)
        self.deploy("one")
        run = self.begin(page, **(scripts or {stage: GATE}))
        self.reaches(f"{stage} {page}")
        self.daemon.kill()
        return run

    def test_a_build_leaves_nothing_and_begins_again_under_another_name(self):
        run = self.cut_off("build")
        self.assert_stands(1, "one")
        self.daemon.open_gate()
        self.daemon.start()
        self.ends(run)
        self.assertEqual(self.released(), ["1", "2-2"])
        self.assert_stands("2-2", "two")
        self.assert_only_ours()

    def test_after_the_switch_the_way_back_is_the_first_thing_done(self):
        run = self.cut_off()
        self.assertEqual(self.pages(self.live / "current"), {"two"})
        self.daemon.open_gate()
        self.daemon.start()
        self.ends(run)
        self.assertEqual(self.trace()[2:], ["build two", "activate two", "activate one",
                                            "build two", "activate two"])
        self.assertEqual(self.released(), ["1", "2-2"])
        self.assert_stands("2-2", "two")

    def test_a_newer_push_waits_for_the_way_back(self):
        self.site()
        self.deploy("one", activate=f'[ ! -e "$HOME/block" ] || {{ {GATE}; }}')
        self.begin("two", activate="exec sleep 300")
        self.reaches("activate two")
        (self.home / "block").touch()
        self.daemon.kill()
        self.daemon.start()
        self.reaches("activate one", 2)
        run = self.begin("three")
        self.assertEqual(self.trace()[3:], ["activate two", "activate one"])
        self.daemon.open_gate()
        self.ends(run)
        self.assertNotIn("activate two", self.trace()[4:])
        self.assert_stands(run, "three")
        self.assertEqual(self.released(), ["1", "3"])

    def test_while_its_health_is_asked(self):
        probe = self.probe()
        self.site(healthcheck=probe.url(), healthcheck_timeout="60s")
        self.deploy("one")
        run = self.begin("slow")
        self.daemon.wait(lambda: "slow" in probe.pages(), "a question for the health")
        self.daemon.kill()
        probe.let_go.set()
        self.daemon.start()
        self.ends(run)
        self.assertEqual(probe.pages(), ["one", "slow", "one", "slow"])
        self.assert_stands("2-2", "slow")

    def test_cut_off_twice_it_is_interrupted_and_the_one_before_stands(self):
        run = self.cut_off()
        self.daemon.start()
        self.reaches("activate two", 2)
        self.daemon.kill()
        self.daemon.start()
        self.ends(run, "interrupted")
        self.reaches("activate one", 3)
        self.assertEqual(self.trace().count("activate two"), 2)
        self.daemon.wait_for(f"summary.{run}")
        self.assert_stands(1, "one")
        self.deploy("three")
        self.assert_stands(3, "three")
        self.assertEqual(self.released(), ["1", "3"])

    def test_the_log_names_a_current_that_nobody_goes_back_from(self):
        """The hook is no more in the ini, and a release stays live that nothing confirmed."""
        self.cut_off()
        self.daemon.configure(self.ini(section("octo/other main", command="true")))
        self.daemon.start()
        self.daemon.wait_for_log(rf"run 2: .*\[octo/site main\].* {self.live}/current stays unconf")
        self.daemon.wait_for_log("run 2 cancelled")

    def test_on_the_way_back_it_goes_back_again(self):
        self.site()
        one = self.deploy("one", activate=f'[ ! -e "$HOME/block" ] || {{ {GATE}; }}')
        (self.home / "block").touch()
        run = self.begin("two", activate="exit 1")
        self.reaches("activate one", 2)
        self.daemon.kill()
        self.daemon.open_gate()
        self.daemon.start()
        self.ends(run, "failed")
        self.assert_stands(1, "one")
        self.assertEqual(self.trace()[3:6], ["activate two", "activate one", "activate one"])
        self.assertEqual(self.daemon.targets()["octo/site", "main"]["last_good"], one)

    def test_in_the_midst_of_a_checkout(self):
        (self.home / ".gitconfig").write_text(
            '[filter "gate"]\n\tsmudge = "touch $HOME/smudge; '
            'until [ -e $HOME/gate ]; do sleep 0.05; done; cat"\n')
        self.site()
        self.deploy("one")
        run = self.begin("two", **{".gitattributes": "zoo filter=gate\n", "zoo": "animals"})
        self.daemon.wait((self.home / "smudge").exists, "half a checkout")
        self.daemon.kill()
        self.assert_stands(1, "one")
        self.daemon.open_gate()
        self.daemon.start()
        self.ends(run)
        self.assertEqual(self.pages(self.live / "current"), {"two"})
        self.assertEqual(self.daemon.read("live/current/zoo"), "animals")
        self.assertEqual(self.released(), ["1", os.readlink(self.live / "current")[9:]])

    def test_at_each_step_of_a_deploy(self):
        self.in_steps(releases=2)
        self.deploy("one")
        self.deploy("two")
        count = self.crash_at_each_step(lambda number: (self.begin(f"p{number}"), f"p{number}"))
        self.assertGreater(count, 4)

    def test_at_each_step_of_a_rollback(self):
        self.in_steps(releases=2)
        commits = [self.deploy("one"), self.deploy("two")]

        def roll_back(number):
            run, goal = max(self.daemon.states()) + 1, (number + 1) % 2
            verb = self.daemon.spawn(self.daemon.command("rollback", "octo/site", "main",
                                                         commits[goal]))
            self.daemon.wait_for_log(f"run {run} began")
            verb.kill()  # the run is the daemon's
            verb.wait()
            return run, ("one", "two")[goal]

        self.assertGreater(self.crash_at_each_step(roll_back), 1)
        self.assertEqual(self.released(), ["1", "2"])
        self.assertEqual([line for line in self.trace() if "build" in line],
                         ["build one", "build two"])

    def in_steps(self, **keys):
        """Serve a site whose daemon can be held before any change that it makes in `live`."""
        (self.home / "python").mkdir()
        (self.home / "python/sitecustomize.py").write_text(STEPS)
        self.site(variables={"PYTHONPATH": str(self.home / "python")}, **keys)

    def crash_at_each_step(self, begin):
        """Kill the daemon before each change of a run that `begin(number)` starts.

        It returns the run and the page that then has to stand. Return how many changes there are.
        """
        number = 1
        while self.crash_at(number, begin):
            number += 1
        return number - 1

    def crash_at(self, number, begin):
        """Kill the daemon before the change of that number; say whether there is one."""
        held, stop = self.home / "held", self.home / "stop-at"
        standing = self.pages(self.live / "current")
        stop.write_text(str(number))
        run, page = begin(number)
        self.daemon.wait(lambda: held.exists() or self.daemon.states().get(run) == "ok",
                         f"step {number}")
        if not held.exists():
            return False
        self.daemon.kill()
        self.assertIn(self.pages(self.live / "current"), (standing, {page}))
        stop.unlink()
        step = self.daemon.wait_for("held")
        held.unlink()
        self.daemon.start()
        with self.subTest(number=number, step=step):
            self.ends(run)
            self.assertEqual(self.pages(self.live / "current"), {page})
            self.assert_only_ours()
            names = self.released()
            self.assertEqual(len(names), 2, names)
            for name in names:
                self.assertEqual(len(self.pages(self.live / "releases" / name)), 1, name)
        return True


class Shared(Site):
    """`shared`: what lives beside the releases and is a link in each."""

    def test_what_is_written_there_is_in_every_release(self):
        self.site(shared="uploads/\nstorage/logs/\n.env",
                  command='. ./build\necho "$HOOKD_COMMIT" >> storage/logs/log\n'
                          'cat .env >> uploads/x')
        (self.live / "shared").mkdir(parents=True)
        (self.live / "shared/.env").write_text("KEY=value\n")
        one = self.deploy("one")
        two = self.deploy("two", stray="x")
        for number in (1, 2):
            release = self.live / "releases" / str(number)
            self.assertEqual((release / "storage/logs/log").read_text().split(), [one, two])
            self.assertEqual((release / "uploads/x").read_text(), "KEY=value\n" * 2)
            for name in ("uploads", "storage/logs", ".env"):
                self.assertTrue((release / name).is_symlink(), name)
                self.assertTrue((release / name).samefile(self.live / "shared" / name), name)

    def test_a_missing_file_fails_the_run_before_the_command(self):
        self.site(shared="config/site.env\nuploads/")
        self.deploy("one", "failed")
        self.assertEqual(self.trace(), [])
        path = self.live / "shared/config/site.env"
        self.assertIn(str(path), self.daemon.output(1))
        self.assertFalse(os.path.lexists(self.live / "current"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("here")
        self.deploy("two")
        self.assertEqual(self.daemon.read("live/current/config/site.env"), "here")

    def test_a_path_of_the_repository_gives_way_and_that_is_said(self):
        self.site(shared="uploads/\nsettings.ini")
        (self.live / "shared").mkdir(parents=True)
        (self.live / "shared/settings.ini").write_text("of the server")
        (self.origin.path / "uploads").mkdir()
        (self.origin.path / "uploads/example").write_text("of the repository")
        self.deploy("one", **{"settings.ini": "of the repository"})
        self.assertEqual(self.daemon.read("live/current/settings.ini"), "of the server")
        self.assertEqual(os.listdir(self.live / "current/uploads"), [])
        for name in ("uploads", "settings.ini"):
            self.assertRegex(self.daemon.output(1), f"(?m)^.*\\b{name}\\b.*shared|shared.*{name}")
        self.assertEqual(self.daemon.read("live/shared/settings.ini"), "of the server")

    def test_a_link_in_the_repository_leads_nothing_out_of_the_release(self):
        self.site(shared="storage/logs/\nstorage/.env")
        (self.home / "victim/logs").mkdir(parents=True)
        (self.home / "victim/logs/precious").write_text("mine")
        (self.live / "shared/storage").mkdir(parents=True)
        (self.live / "shared/storage/.env").write_text("KEY=value")
        (self.origin.path / "storage").symlink_to(self.home / "victim")
        run = self.begin("one")
        self.daemon.settle()
        self.assertEqual(os.listdir(self.home / "victim"), ["logs"], self.daemon.output(run))
        self.assertEqual(self.daemon.read("victim/logs/precious"), "mine")

    def test_removing_a_release_leaves_what_is_shared(self):
        self.site(shared="uploads/", releases=2)
        self.deploy("one", build="echo precious > uploads/one")
        for page in ("two", "three", "four"):
            self.deploy(page)
        self.assertEqual(self.released(), ["3", "4"])
        self.assertEqual(self.daemon.read("live/current/uploads/one"), "precious\n")


class Moving(Site):
    """From a plain directory to releases and back: nothing is lost."""

    def test_a_plain_directory_that_becomes_one_of_releases_loses_nothing(self):
        self.site(releases=None, activate=None)
        self.deploy("one")
        (self.live / "upload").write_text("precious")
        self.change(releases=3)
        self.deploy("two")
        self.assertEqual(self.pages(self.live), {"one"})
        self.assertEqual(self.daemon.read("live/upload"), "precious")
        self.assert_stands(2, "two")

    def test_a_directory_of_releases_that_becomes_plain_loses_nothing(self):
        self.site()
        self.deploy("one")
        self.change(releases=None, activate=None)
        self.deploy("two", "failed")
        self.assert_stands(1, "one")
        self.assert_only_ours()
        self.assertIn("set another directory", self.daemon.output(2))
        self.change(directory=self.home / "plain")
        self.deploy("three")
        self.assertEqual(self.pages(self.home / "plain"), {"three"})


class Healthcheck(Site):
    """`healthcheck`: a URL that must answer 2xx after `activate`, with and without releases."""

    def test_it_is_asked_once_a_second_until_it_answers(self):
        probe = self.probe()
        self.site(healthcheck=probe.url("/up?now=1"), healthcheck_timeout="30s")
        self.deploy("late")
        self.assertEqual(probe.asked, [("/up?now=1", "late")] * 3)
        self.assertGreater(probe.times[1] - probe.times[0], 0.8)

    def test_https_is_verified_by_the_certificates_of_the_system(self):
        path = self.home / "tls.pem"
        path.write_text(CERTIFICATES[0])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        probe = self.probe(("127.0.0.1", 0), context)
        url = f"https://127.0.0.1:{probe.port}/"
        self.site(healthcheck=url)
        self.deploy("one", "failed")
        self.assertRegex(self.daemon.output(1), "(?i)certificate")
        self.assertEqual(probe.asked, [])
        self.daemon.environment["SSL_CERT_FILE"] = str(path)
        self.change(healthcheck=url)
        self.deploy("two")
        self.assertEqual(probe.asked, [("/", "two")])

    def test_a_unix_socket_is_asked_for_a_path(self):
        path = self.home / "app.sock"
        probe = self.probe(str(path))
        self.site(healthcheck=f"unix:{path}:/health?x=1")
        self.deploy("one")
        self.assertEqual(probe.asked, [("/health?x=1", "one")])
        self.deploy("sick", "failed")
        self.assertIn("503", self.daemon.output(2))
        self.assert_stands(1, "one")

    def test_a_redirect_is_not_followed(self):
        probe = self.probe()
        self.site(healthcheck=probe.url())
        self.deploy("moved", "failed")
        self.assertEqual({path for path, _ in probe.asked}, {"/health"})
        self.assertIn("302", self.daemon.output(1))

    def test_nobody_there_is_said_in_the_log(self):
        with closing(socket.socket()) as taken:
            taken.bind(("127.0.0.1", 0))  # and nobody listens
            port = taken.getsockname()[1]
            self.site(healthcheck=f"http://127.0.0.1:{port}/")
            self.deploy("one", "failed")
        self.assertRegex(self.daemon.output(1), "(?i)refused")

    def test_an_answer_that_never_comes_is_not_waited_for_longer_than_the_timeout(self):
        probe = self.probe()
        self.site(healthcheck=probe.url(), healthcheck_timeout="1s")
        self.deploy("slow", "failed")
        self.assertRegex(self.daemon.output(1), "(?i)timed out|no answer")
        wait_for(lambda: probe.left, "the client to give up")
        self.assertLess(probe.left[0], 4)  # a request alone may take 5

    def asked_twice(self, page):
        """Deploy a page whose first answer is given up in time; return the probe and the run."""
        probe = self.probe()
        self.site(healthcheck=probe.url(), healthcheck_timeout="60s")
        run = self.begin(page)
        self.daemon.wait(lambda: len(probe.asked) == 2 and probe.left, "a second question")
        self.assertTrue(4.5 < probe.left[0] < 15, probe.left)
        return probe, run

    def test_a_question_is_given_up_after_five_seconds_and_asked_again(self):
        probe, run = self.asked_twice("slow")
        probe.let_go.set()
        self.ends(run)

    def test_an_answer_that_drips_is_given_up_like_one_that_never_comes(self):
        _, run = self.asked_twice("drip")
        self.assertEqual(self.daemon.hookd("cancel", str(run)).code, 0)
        self.ends(run, "cancelled")

    def test_without_releases_it_follows_command_and_activate_in_the_directory(self):
        probe = self.probe(page="live/page")
        self.site(releases=None, healthcheck=probe.url(), on_failure=SUMMARY,
                  activate='echo "activate $(cat page) $(pwd -P) $HOOKD_CURRENT" >> "$HOME/trace"\n'
                           '. ./activate')
        one = self.deploy("one")
        self.assertEqual(self.trace(), ["build one", f"activate one {self.live} "])
        self.assertEqual(probe.asked, [("/health", "one")])
        self.deploy("sick", "failed")
        self.assertIn("503", self.daemon.output(2))
        self.deploy("two", "failed", activate="exit 3")
        self.assertEqual(probe.pages()[-1], "sick")
        self.assertEqual(self.daemon.targets()["octo/site", "main"]["last_good"], one)
        self.assertEqual(self.pages(self.live), {"two"})


# ---------------------------------------------------------------- Crash


class Crash(Case):
    """SIGKILL, a damaged or foreign state: what was promised is kept."""

    def test_a_push_answered_202_survives_a_crash_before_it_runs(self):
        daemon = self.serve(hook(GATE + "\n" + NOTE), hook(NOTE, "dev"), jobs=1)
        daemon.push()
        daemon.wait_for_run(1)
        self.assert_answer(daemon.push("dev", sha("kept")), 202)
        daemon.kill()
        daemon.open_gate()
        daemon.start()
        daemon.settle()
        self.assertIn(sha("kept"), daemon.seen())

    def test_a_command_that_kills_its_daemon_does_not_do_so_for_ever(self):
        daemon = self.serve(hook('echo x >> "$HOME/tries"; kill -9 $PPID; sleep 300'))
        daemon.push()
        for _ in range(2):
            daemon.ended()
            daemon.start()
        self.assertEqual(daemon.settled()["state"], "interrupted")
        self.assertEqual(daemon.read("tries").split(), ["x", "x"])
        self.assert_answer(daemon.push("other"), 200)

    def test_crashes_under_load_lose_nothing_and_overlap_nothing(self):
        daemon = self.serve(hook(alone(NOTE + '\nsleep 0.05\necho "$HOOKD_COMMIT" >> "$HOME/done"'),
                                 "*", queue="newest"), jobs=4)
        newest = {}
        for crash in range(5):
            for number in range(12):
                branch = f"b{number % 4}"
                commit = sha((crash, number))
                self.assert_answer(daemon.push(branch, commit), 202)
                newest[branch] = commit
            daemon.kill()
            daemon.start()
        daemon.settle()
        targets = daemon.targets()
        done = daemon.read("done").split()
        for branch, commit in newest.items():
            with self.subTest(branch):
                self.assertIn(commit, done)
                self.assertEqual(targets["octo/site", branch]["commit"], commit)
                self.assertEqual(targets["octo/site", branch]["state"], "ok")
        self.assert_never_overlapped(daemon)

    def test_a_stale_lock_file_stops_nobody(self):
        daemon = self.serve(hook(NOTE))
        daemon.push()
        daemon.settle()
        daemon.kill()
        locks = list((daemon.state / "locks").iterdir())
        self.assertTrue(locks, "a lock file stays where it is")
        for lock in locks:
            lock.write_text(f"{os.getpid()} 1\n")
        daemon.start()
        daemon.push(commit=sha(2))
        daemon.settle()
        self.assertEqual(len(daemon.seen()), 2)

    def test_a_state_of_a_newer_hookd_is_left_alone(self):
        daemon = self.serve(hook("true"))
        daemon.stop()
        with closing(sqlite3.connect(daemon.state / "hookd.db")) as store:
            self.assertGreater(store.execute("PRAGMA user_version").fetchone()[0], 0)
            store.execute("PRAGMA user_version = 999")
        for verb in ("serve", "status"):
            self.assert_refused(daemon.hookd(verb), "newer")
        with closing(sqlite3.connect(daemon.state / "hookd.db")) as store:
            self.assertEqual(store.execute("PRAGMA user_version").fetchone()[0], 999)

    def test_a_damaged_database_is_told_and_mended_by_moving_it_away(self):
        daemon = self.prepare(hook(NOTE))
        daemon.state.mkdir(mode=0o700)
        database = daemon.state / "hookd.db"
        database.write_bytes(b"this is no database" * 1000)
        for verb in ("serve", "status"):
            self.assert_refused(daemon.hookd(verb), "move it away")
        database.rename(self.home / "damaged")
        daemon.start()
        self.assert_answer(daemon.push(), 202)
        daemon.wait_for("seen")

    def assert_refused(self, told, word):
        """Check that a verb ended at once, with the database's name and what to do."""
        self.assertNotEqual(told.code, 0)
        self.assertRegex(told.err, f"hookd.db: .*{word}")
        self.assertNotIn("Traceback", told.err)

    def test_the_database_is_durable_and_kept_whole(self):
        daemon = self.serve(hook("true"))
        with closing(hookd.Store(str(daemon.state))) as store:
            self.assertEqual(store.value("PRAGMA journal_mode"), "wal")
            self.assertEqual(store.value("PRAGMA synchronous"), 2, "not FULL: a power cut loses")
            self.assertEqual(store.value("PRAGMA integrity_check"), "ok")

    def test_a_clock_set_back_loses_no_push(self):
        daemon = self.serve(hook(NOTE))
        future = int(time.time()) + 10 * 365 * 86400
        daemon.push(commit=sha(1), repository=repository_of(pushed_at=future))
        daemon.settle()
        daemon.push(commit=sha(2), repository=repository_of(pushed_at=future + 1))
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(1), sha(2)])


class Recovery(Case):
    """SIGKILL at each stage of a run, and what the next start makes of it."""

    def attempts(self, daemon, number):
        """Wait until the script has begun so many times; return the ids of its shells."""
        return daemon.wait(lambda: len(daemon.read("begun").split()) == number
                           and [int(pid) for pid in daemon.read("begun").split()],
                           f"attempt {number}")

    def crash(self, daemon):
        daemon.kill()
        daemon.start()

    def test_what_a_crash_left_is_dead_before_the_next_daemon_answers(self):
        """What was cut off works on beside the next daemon, for as long as it ignores TERM."""
        daemon = self.serve(hook(f"trap '' TERM\n{DETACHED}\n{BEGUN}\n{GATE}"))
        daemon.push()
        left = [*self.attempts(daemon, 1), int(daemon.read("child"))]
        daemon.kill()
        self.assertEqual([alive(pid) for pid in left], [True] * 2, "or this test means little")
        began = time.monotonic()
        daemon.start()
        self.assertEqual([alive(pid) for pid in left], [False] * 2)
        self.assertLess(time.monotonic() - began, 8, "a crash needs no grace")
        self.attempts(daemon, 2)
        daemon.open_gate()
        self.assertEqual(daemon.settled()["state"], "ok")

    def test_an_interrupted_run_is_told_once(self):
        """A run that was cut off twice ends in silence, or tells it at each start."""
        daemon = self.serve(hook(f"{BEGUN}\n{GATE}", on_failure='echo "$HOOKD_STATE '
                                 '$HOOKD_SUMMARY" >> "$HOME/told"'), hook(NAME, "dev"))
        daemon.push()
        for number in (1, 2):
            self.attempts(daemon, number)
            self.crash(daemon)
        told = daemon.wait_for("told")
        self.assertRegex(told, "^interrupted octo/site main interrupted .*run 1")
        self.wait_for_states(daemon, {1: "interrupted"})
        self.crash(daemon)
        daemon.push("dev")
        daemon.wait_for("seen")
        self.assertEqual((daemon.read("told"), daemon.states()[1]), (told, "interrupted"))
        self.attempts(daemon, 2)
        daemon.open_gate()
        daemon.push(commit=sha("next"))
        self.assertEqual(daemon.settled()["state"], "ok")

    def test_a_crash_while_git_runs_does_not_count(self):
        """Two crashes during the fetch end a deploy whose script never began."""
        newest = self.repository().commit(page="one")
        remote = self.remote()
        remote.listen()
        daemon = self.serve(self.deploying(f"{BEGUN}\n{GATE}\n{NOTE}", git=remote.url))
        daemon.push()
        for number in (1, 2, 3):
            daemon.wait(lambda: remote.calls, f"git to ask, attempt {number}")
            remote.calls = 0
            self.crash(daemon)
        remote.serving = True
        self.crash(daemon)
        self.attempts(daemon, 1)
        remote.serving, remote.calls = False, 0
        self.crash(daemon)
        daemon.wait(lambda: remote.calls, "git to ask after the script was cut off")
        remote.serving = True
        self.crash(daemon)
        self.attempts(daemon, 2)
        daemon.open_gate()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual((daemon.seen(), list(daemon.states())), ([newest], [1]))

    def test_a_wish_to_cancel_survives_a_crash(self):
        """A run that was being cancelled begins again after a crash."""
        stubborn = f"trap 'touch \"$HOME/termed\"' TERM\n{BEGUN}\n{GATE}"
        daemon = self.serve(hook(stubborn, on_failure=NAME))
        daemon.push()
        (pid,) = self.attempts(daemon, 1)
        self.follow_cancel(daemon)
        daemon.wait((self.home / "termed").exists, "TERM")
        self.crash(daemon)
        self.wait_for_states(daemon, {1: "cancelled"})
        self.assertEqual((alive(pid), daemon.seen()), (False, []))
        self.attempts(daemon, 1)

    def follow_cancel(self, daemon):
        verb = daemon.spawn(daemon.command("cancel", "1"))
        self.addCleanup(lambda: (verb.kill(), verb.wait()))

    def test_what_was_cut_off_keeps_its_place_among_what_waits(self):
        """After a crash an old push runs after a newer one, or a verb's run is lost."""
        for queue, verb, states in (("newest", False, {1: "superseded", 2: "ok"}),
                                    ("every", False, {1: "ok", 2: "ok"}),
                                    ("newest", True, {1: "ok", 2: "ok"})):
            with self.subTest(queue, verb=verb):
                self.check_place(queue, verb, states)

    def check_place(self, queue, verb, states):
        for name in ("gate", "seen", "begun"):
            (self.home / name).unlink(missing_ok=True)
        command = f'{BEGUN}\n{GATE}\necho "$HOOKD_RUN" >> "$HOME/seen"'
        daemon = self.serve_in(f"{queue}-{verb}", hook(command, queue=queue))
        if verb:
            self.follow(daemon, "run", "octo/site", "main")
        else:
            daemon.push(commit=sha(1))
        self.attempts(daemon, 1)
        daemon.push(commit=sha(2))
        self.crash(daemon)
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.states(), states)
        self.assertEqual(daemon.seen(), [str(run) for run, state in states.items()
                                         if state == "ok"])
        daemon.kill()

    def test_what_a_stop_cut_off_is_queued_again(self):
        """A restart of the service loses the run that it ended, or counts it as told."""
        daemon = self.serve(hook(f"{BEGUN}\n{GATE}\n{NOTE}", on_failure=NAME))
        daemon.push(commit=sha(1))
        (pid,) = self.attempts(daemon, 1)
        daemon.tell(signal.SIGTERM)
        daemon.wait_for_log("stopping after 1 running command")
        daemon.tell(signal.SIGTERM)
        self.assertEqual(daemon.ended(), 0)
        self.assertEqual((alive(pid), daemon.states()), (False, {1: "queued"}))
        daemon.open_gate()
        daemon.start()
        self.wait_for_states(daemon, {1: "ok"})
        self.assertEqual(daemon.seen(), [sha(1)])


# A user without any other process, of this suite alone, so that a limit on processes is exact.
LONELY = 61_000 + os.getpid() % 4_000
LONELY_USER = ["prlimit", "--nproc=24", "setpriv", f"--reuid={LONELY}", f"--regid={LONELY}",
               "--clear-groups", "--inh-caps=+dac_read_search",  # it may read this Python
               "--ambient-caps=+dac_read_search"]


@contextmanager
def dead_file_system(path):
    """Mount at `path` a file system that answers nobody, as a dead NFS server's does."""
    libc = ctypes.CDLL(None, use_errno=True)
    path.mkdir()
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError as error:
        raise unittest.SkipTest(f"no FUSE here: {error}") from None
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    try:
        if libc.mount(b"hookd-test", os.fsencode(path), b"fuse", 6, options):
            raise unittest.SkipTest(f"no mount here: {os.strerror(ctypes.get_errno())}")
        yield path
    finally:
        os.close(server)  # ends whoever waits for it
        libc.umount2(os.fsencode(path), 2)  # MNT_DETACH


class Scarcity(Case):
    """No thread, no answer from a disk, no room behind a lock, and files that were removed."""

    @unittest.skipUnless(os.geteuid() == 0 and shutil.which("setpriv"), "root makes another user")
    def test_a_run_waits_while_there_is_no_thread_or_process(self):
        """A full `TasksMax=` ends a deploy as `failed` that never began."""
        daemon = self.prepare(hook(NOTE, on_failure=NAME))
        for path in (self.home, daemon.ini, daemon.logfile):
            os.chown(path, LONELY, LONELY)
        spawn = daemon.spawn
        daemon.spawn = lambda command, *rest, **more: spawn([*LONELY_USER, *command], *rest, **more)
        daemon.start()
        for number, room in ((1, 0), (2, 1)):  # no thread; a thread, and no process
            with self.subTest(room=room):
                known = len(daemon.log)
                ballast = self.leave_room(daemon, room)
                self.assert_answer(daemon.push(commit=sha(number)), 202)
                daemon.wait_for_log(rf"(?i)run {number}\b.*(thread|process|resource)", known)
                state = daemon.states()[number]
                for one in ballast:
                    one.kill()
                    one.wait()
                self.assertIn(state, WAITING)
                daemon.wait(lambda at=number: daemon.states()[at] == "ok", "the run")
        self.assertEqual(daemon.seen(), [sha(1), sha(2)])

    def leave_room(self, daemon, room):
        """Start processes of the daemon's user until it may have only so many more."""
        ballast = []
        while not ballast or ballast[-1].poll() is None:
            script = f"echo >> {self.home}/ballast; exec sleep 300"
            ballast.append(daemon.spawn(["sh", "-c", script]))
            self.addCleanup(lambda one=ballast[-1]: (one.kill(), one.wait()))
            daemon.wait(lambda: ballast[-1].poll() is not None
                        or daemon.read("ballast").count("\n") == len(ballast), "ballast")
        (self.home / "ballast").unlink()
        full, room = ballast[:-1], room + 1  # exec lets one more in than fork does
        for one in full[:room]:
            one.kill()
            one.wait()
        return full[room:]

    def test_a_dead_file_system_costs_its_own_hook_one_job(self):
        """A dead NFS mount under one hook stops every repository, `status` and TERM."""
        with dead_file_system(self.home / "dead") as dead:
            self.check_dead(directory=dead / "site")

    def test_an_environment_file_that_never_answers_costs_its_own_hook_one_job(self):
        """A file that cannot be read to its end stops every repository, `status` and TERM."""
        with dead_file_system(self.home / "dead") as dead:
            self.check_dead(environment_file=dead / "secrets")

    def check_dead(self, **keys):
        daemon = self.serve(hook("true", "dead", **keys), hook(NOTE), jobs=2)
        self.assert_answer(daemon.push("dead"), 202)
        daemon.wait_for_run(1)
        for number in (1, 2):
            self.assert_answer(daemon.push(commit=sha(number)), 202)
            daemon.wait(lambda at=number: sha(at) in daemon.seen(), "the other hook")
        self.wait_for_status(daemon, "(?i)dead.*does not answer|does not answer.*dead")
        self.crash_or_stop(daemon)
        self.assert_answer(daemon.push(commit=sha(3)), 202)
        daemon.wait(lambda: sha(3) in daemon.seen(), "the other hook after the restart")
        self.assertIn(daemon.states()[1], WAITING)

    def crash_or_stop(self, daemon):
        """Stop with the second TERM, which ends what still runs, and start again."""
        daemon.tell(signal.SIGTERM)
        daemon.wait_for_log("stopping after 1 running command")
        daemon.tell(signal.SIGTERM)
        began = time.monotonic()
        self.assertEqual(daemon.ended(), 0)
        self.assertLess(time.monotonic() - began, 20)
        daemon.start()

    def test_a_fifo_for_an_environment_file_stops_nobody(self):
        """A named pipe without a writer takes a job for ever; it is no file."""
        os.mkfifo(self.home / "pipe")
        daemon = self.serve(hook(NAME, environment_file=self.home / "pipe"), hook(NOTE, "dev"))
        daemon.push()
        daemon.push("dev")
        daemon.wait_for("seen")
        self.assertEqual(daemon.settled()["state"], "failed")
        self.assertIn("pipe", daemon.output(1))

    def test_a_removed_write_ahead_log_loses_nothing(self):
        """202s go on into a file that is gone; after a SIGKILL the whole history is gone."""
        for number, names in enumerate((("hookd.db-wal",), ("hookd.db-wal", "hookd.db-shm"))):
            with self.subTest(names):
                daemon = self.serve_in(f"s{number}", hook(NOTE, queue="every"))
                daemon.push(commit=sha((number, "before")))
                daemon.settle()
                for name in names:
                    (daemon.state / name).unlink()
                self.assert_answer(self.push_until_taken(daemon, sha((number, "after"))), 202)
                daemon.kill()
                daemon.start()
                daemon.settle()
                self.assertEqual(set(daemon.states().values()), {"ok"})
                self.assertIn(sha((number, "after")), daemon.seen())
                commits = {entry["commit"] for entry in self.history(daemon)}
                self.assertEqual(commits, {sha((number, "before")), sha((number, "after"))})
                daemon.kill()

    def push_until_taken(self, daemon, commit):
        """Push until it is taken, as GitHub's Redeliver would; restart hookd as systemd would."""
        payload = push_of(commit=commit)

        def taken():
            if daemon.process.poll() is not None:
                daemon.start()
            with suppress(ConnectionError):
                answer = daemon.post(payload)
                return answer.status == 202 and answer
        return daemon.wait(taken, "the push to be taken")

    MANY = 1000

    def test_thousands_of_runs_behind_one_lock_cost_a_turn_nothing(self):
        """Each turn tries each waiting run: thousands make a turn of seconds."""
        daemon = self.serve(hook(GATE, "hold", lock="one"), hook(GATE, "busy"),
                            hook("true", "*", lock="one"), jobs=4)
        for number, branch in enumerate(("hold", "busy"), 1):
            daemon.push(branch)
            daemon.wait_for_run(number)
        alone = min(self.cost_of_pushes(daemon, "busy") for _ in range(3))
        self.push_many(daemon, [f"b{number}" for number in range(self.MANY)], 8)
        crowded = min(self.cost_of_pushes(daemon, "busy") for _ in range(3))
        self.assertLess(crowded, alone * 1.5, "processor time of 100 pushes, in nanoseconds")

    def push_many(self, daemon, branches, connections=1):
        """Push to many branches, one after the other on each connection."""

        def push(part):
            with closing(daemon.connect()) as one, one.makefile("rb") as stream:
                for branch in part:
                    one.sendall(request(push_of(branch, sha((branch, time.monotonic())))))
                    self.assert_answer(read_answer(stream), 202)
        with ThreadPoolExecutor(connections) as pool:
            list(pool.map(push, [branches[at::connections] for at in range(connections)]))

    def cost_of_pushes(self, daemon, branch):
        """Return the processor time of the daemon's main thread for 100 pushes."""
        path = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/schedstat")
        before = int(path.read_text().split()[0])
        self.push_many(daemon, [branch] * 100)
        return int(path.read_text().split()[0]) - before


# ---------------------------------------------------------------- Delivery


class Delivery(Case):
    """HTTP: each status of the contract, over TCP, unix sockets and TLS."""

    def test_each_answer_has_its_status_and_one_line_of_text(self):
        daemon = self.serve(hook("true"), path="/hook-1f2e", max_body="64K")
        body = json.dumps(push_of()).encode()
        table = (
            ("a push", request(body, path="/hook-1f2e"), 202),
            ("a ping", request(b"{}", path="/hook-1f2e", X_GitHub_Event="ping"), 200),
            ("HTTP/1.0", request(body, path="/hook-1f2e", version="HTTP/1.0"), 202),
            ("not JSON", request(b"{", path="/hook-1f2e"), 400),
            ("no signature", request(body, path="/hook-1f2e", X_Hub_Signature_256=None), 403),
            ("another secret", request(body, "other", path="/hook-1f2e"), 403),
            ("another path", request(body), 404),
            ("another path and method", request(body, path="/x", method="GET"), 404),
            ("GET", request(path="/hook-1f2e", method="GET"), 405),
            ("PUT", request(body, path="/hook-1f2e", method="PUT"), 405),
            ("no length", request(path="/hook-1f2e", Content_Length=None), 411),
            ("chunked", request(b"0\r\n\r\n", path="/hook-1f2e", Content_Length=None,
                                Transfer_Encoding="chunked"), 411),
            ("too large", request(b"x" * 65537, path="/hook-1f2e"), 413),
            ("a long path", request(body, path="/" + "x" * 9000), 414),
            ("text", request(body, path="/hook-1f2e", Content_Type="text/plain"), 415),
            ("gzip", request(body, path="/hook-1f2e", Content_Encoding="gzip"), 415),
            ("101 fields", request(body, path="/hook-1f2e",
                                   **{f"X{i}": i for i in range(101)}), 431),
            ("a large head", request(body, path="/hook-1f2e", X="x" * 17_000), 431),
            ("an unknown method", request(body, path="/hook-1f2e", method="BREW"), 501),
            ("an unknown coding", request(body, path="/hook-1f2e", Content_Length=None,
                                          Transfer_Encoding="gzip"), 501))
        for name, raw, status in table:
            with self.subTest(name):
                answer = daemon.exchange(raw)
                self.assert_answer(answer, status)
                self.assertRegex(answer.text, r"\A[^\n]+\n\Z")
                self.assertTrue(answer.headers["content-type"].startswith("text/plain"))
                self.assertRegex(answer.headers["date"],
                                 r"^[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT$")
                date = email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
                self.assertLess(abs(time.time() - date), PATIENCE)
                if status == 405:
                    self.assertEqual(answer.headers["allow"], "POST")

    def test_a_connection_may_be_used_again(self):
        daemon = self.serve(hook("true"))
        raw = (request(push_of()), request(b"{}", X_Hub_Signature_256=None),
               request(b"{}", X_GitHub_Event="ping"), request(push_of()))
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            for data, status in zip(raw, (202, 403, 200, 202)):
                one.sendall(data)
                answer = read_answer(stream)
                self.assert_answer(answer, status)
                if answer.headers.get("connection") == "close":
                    break
            else:
                status = None
        self.assertIsNone(status, "closed after an answer that need not close")

    def test_what_is_sent_behind_a_request_is_never_taken_for_one(self):
        daemon = self.serve(hook("true"))
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            one.sendall(request(push_of()) + request(b"{}", X_GitHub_Event="ping")
                        + request(b"x", "wrong") + request(push_of()))
            answers = [read_answer(stream) for _ in range(2)]
        self.assertEqual([answer.status for answer in answers], [202, 0])
        self.assertEqual(answers[0].headers["connection"], "close")
        daemon.settle()
        self.assertEqual(len(daemon.states()), 1)

    def test_a_body_that_is_refused_is_never_the_next_request(self):
        daemon = self.serve(hook(NOTE), path="/hook")
        smuggled = request(push_of(), path="/hook")
        for name, raw in (("another path", request(smuggled, path="/other")),
                          ("a GET", request(smuggled, method="GET", path="/hook")),
                          ("text", request(smuggled, path="/hook", Content_Type="text/plain")),
                          ("no length", request(path="/hook", Content_Length=None) + smuggled),
                          ("chunked", request(path="/hook", Content_Length=None,
                                              Transfer_Encoding="chunked") + smuggled)):
            for there in (len(raw), len(raw) - len(smuggled)):  # when the answer is given
                with self.subTest(name, there=there):
                    self.check_smuggling(daemon, raw[:there], raw[there:])
        self.assertEqual(daemon.targets(), {})

    def check_smuggling(self, daemon, raw, later):
        """Send a refused request, then more of it and a ping: only the ping may be answered."""
        ping = request(b"{}", path="/hook", X_GitHub_Event="ping")
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            one.sendall(raw)
            self.assertGreaterEqual(read_answer(stream).status, 400)
            with suppress(ConnectionError):
                one.sendall(later + ping)
            answer = read_answer(stream)
            self.assertTrue(answer.status == 0 or "pong" in answer.text, answer)

    def test_an_answer_is_one_write(self):
        daemon = self.serve(hook("true"))
        for raw in (request(push_of()), request(b"{}", "wrong"), request(method="GET")):
            with closing(daemon.connect()) as one:
                one.sendall(raw)
                first = one.recv(65536).partition(b"\r\n\r\n")
                self.assertTrue(first[2].endswith(b"\n"), first)

    def test_a_request_that_takes_over_ten_seconds_is_given_up(self):
        daemon = self.serve(hook(NOTE))
        whole = request(push_of(commit=sha("slow")))
        parts = {"nothing": b"", "half a line": b"POST", "half a head": whole[:60],
                 "half a body": whole[:-10], "all but a byte": whole[:-1]}
        began = time.monotonic()
        with ExitStack() as stack:
            held = {}
            for name, part in parts.items():
                held[name] = stack.enter_context(closing(daemon.connect()))
                held[name].sendall(part)
            drip = stack.enter_context(closing(daemon.connect()))
            self.drip_until_closed(drip, whole)
            for name, one in held.items():
                with self.subTest(name), one.makefile("rb") as stream:
                    self.assert_answer(read_answer(stream), 408 if parts[name] else 0)
        self.assertTrue(8 < time.monotonic() - began < 25)
        self.assert_answer(daemon.push(commit=sha("next")), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("next")])

    def drip_until_closed(self, one, raw):
        """Send a byte now and then, as one who means to hold the connection for ever."""
        one.settimeout(0.4)
        for byte in raw:
            try:
                one.sendall(bytes([byte]))
                if one.recv(4096):
                    return
            except socket.timeout:
                continue
            except ConnectionError:
                return
        self.fail("the whole request was taken, byte by byte")

    def test_a_body_cut_short_is_refused_although_its_signature_is_right(self):
        daemon = self.serve(hook(NOTE))
        body = json.dumps(push_of()).encode()
        raw = request(body, Content_Length=len(body) + 50)
        self.assert_answer(daemon.exchange(raw, half_close=True), 400)
        self.assertEqual(daemon.targets(), {})

    def test_a_push_that_cannot_be_kept_is_answered_503(self):
        daemon = self.serve(hook(NOTE))
        self.assert_answer(daemon.push(commit=sha(1)), 202)
        daemon.settle()
        with closing(sqlite3.connect(daemon.state / "hookd.db", isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            self.assert_answer(daemon.push(commit=sha(2)), 503)
            other.execute("ROLLBACK")
        self.assert_answer(daemon.push(commit=sha(3)), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(1), sha(3)])

    def test_a_full_disk_is_answered_503_until_there_is_room_again(self):
        daemon = self.serve(hook(NOTE))
        hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1, hard))
        self.assert_answer(daemon.push(commit=sha(1)), 503)
        self.assert_answer(daemon.push(commit=sha(2)), 503)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        self.assert_answer(daemon.push(commit=sha(3)), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(3)])

    def test_the_log_names_the_delivery_and_the_real_sender(self):
        daemon = self.serve(hook("true"))
        delivery = str(uuid.uuid4())
        daemon.post(push_of(), X_GitHub_Delivery=delivery,
                    X_Forwarded_For="203.0.113.1, 192.0.2.77")
        daemon.settle()
        lines = [line for line in daemon.log.splitlines() if delivery in line]
        self.assertTrue(lines, daemon.log)
        self.assertIn("192.0.2.77", "\n".join(lines))
        self.assertNotIn("203.0.113.1", daemon.log)

    def test_a_unix_socket_is_open_to_the_web_server(self):
        path = self.home / "hookd.sock"
        daemon = self.serve(hook(NOTE), listen=f"unix:{path}")
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o666)
        self.assert_answer(daemon.push(), 202)
        daemon.settle()
        daemon.kill()
        daemon.start()  # a socket that a crash left behind is no hindrance
        self.assert_answer(daemon.push(commit=sha("again")), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("commit"), sha("again")])
        daemon.tell(signal.SIGTERM)
        daemon.ended()
        self.assertFalse(path.exists(), "left behind, nginx would ask a dead socket")

    def test_ipv6_has_brackets(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("this machine has no IPv6")
        daemon = self.serve(hook("true"), listen="[::1]:0")
        self.assertRegex(daemon.address, r"^\[::1\]:\d+$")
        self.assert_answer(daemon.push(), 202)

    def test_refused_noise_does_not_fill_the_log(self):
        daemon = self.serve(hook("true"))
        before = len(daemon.log)
        for number in range(300):
            self.assert_answer(daemon.post(b"{}", secret="wrong", X_GitHub_Delivery=number), 403)
            self.assert_answer(daemon.exchange(request(path=f"/{number}.php", method="GET")), 404)
        self.assertLess(daemon.log.count("\n", before), 12)

    def test_strangers_cannot_write_into_the_log(self):
        daemon = self.serve(hook("true", "*"))
        evil = "\x1b[2J\r\nall is well level=info\x07\x85\u2028"
        daemon.push(evil)
        daemon.push("x", repo="octo/" + evil)
        daemon.push("x", pusher={"name": evil}, head_commit={"id": evil, "message": evil})
        for raw in (request(path="/\x1b[31mx"), request(b"{}", X_GitHub_Delivery="\x1b[31m"),
                    request(b"{}", X_GitHub_Event="push\x1b[31m"), b"\x1b[2J\x07\r\n\r\n",
                    request(b"{}", User_Agent="\x1b[31m"), request(b"{}", X_Forwarded_For="\x1b[")):
            daemon.exchange(raw)
        daemon.settle()
        self.assertNotRegex(daemon.log, "[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]")
        self.assertNotRegex(daemon.log, r"(?m)^all is well")


def talk(daemon, raw, half_close=False):
    """Send bytes on a connection of their own; return all that comes until it is closed."""
    with closing(daemon.connect()) as one:
        with suppress(ConnectionError):
            one.sendall(raw)
            if half_close:
                one.shutdown(socket.SHUT_WR)
        parts = []
        with suppress(ConnectionError):
            for part in iter(lambda: one.recv(65536), b""):
                parts.append(part)
        return b"".join(parts)


def with_fields(*lines, body=None):
    """Return a signed push with these raw lines before its other header fields."""
    raw = request(push_of() if body is None else body)
    return raw.replace(b"\r\nHost:", b"\r\n" + b"\r\n".join(lines) + b"\r\nHost:", 1)


class Wire(Case):
    """HTTP/1.1 as the contract has it, byte for byte."""

    def test_what_is_no_http_1_is_refused_at_once_with_a_whole_answer(self):
        daemon = self.serve(hook(NOTE))
        hello = bytes.fromhex("16030100c8010000c40303") + bytes(190)
        table = {"HTTP/0.9": b"GET /\r\n", "HTTP/0.9 with a body": b"POST /\r\n\r\n",
                 "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), "TLS": hello,
                 "HTTP/2.0": request(push_of(), version="HTTP/2.0"),
                 "HTTP/3": request(push_of(), version="HTTP/3"), "SSH": b"SSH-2.0-x\r\n"}
        for name, raw in table.items():
            with self.subTest(name):
                began = time.monotonic()
                head, _, text = talk(daemon, raw).partition(b"\r\n\r\n")
                self.assertLess(time.monotonic() - began, 9)
                self.assertTrue(head.startswith(b"HTTP/1.1 400 "), head)
                self.assertIn(b"\r\nContent-Length: %d" % len(text), head)
        self.assertEqual(daemon.targets(), {})

    def test_a_head_request_is_answered_without_a_body(self):
        daemon = self.serve(hook(NOTE))
        for path, status in (("/", b"405"), ("/x", b"404")):
            with self.subTest(path):
                raw = request(method="HEAD", path=path, Content_Length=None, Connection="close")
                head, end, rest = talk(daemon, raw).partition(b"\r\n\r\n")
                self.assertTrue(head.startswith(b"HTTP/1.1 " + status), head)
                self.assertEqual((end, rest), (b"\r\n\r\n", b""))

    def test_http_1_0_closes_unless_it_asks_to_be_kept(self):
        daemon = self.serve(hook("true"))
        ping = {"version": "HTTP/1.0", "X_GitHub_Event": "ping"}
        for name, more, answers in (("plain", {}, 1), ("close", {"Connection": "close"}, 1),
                                    ("no Host", {"Host": None}, 1),
                                    ("kept", {"Connection": "Keep-Alive"}, 2)):
            with self.subTest(name), closing(daemon.connect()) as one, \
                    one.makefile("rb") as stream:
                raw = request(b"{}", **ping, **more)
                found = []
                with suppress(ConnectionError):
                    for _ in range(2):
                        one.sendall(raw)
                        found.append(read_answer(stream).status)
                self.assertEqual([status for status in found if status], [200] * answers)

    def test_100_continue_is_said_only_to_whom_it_helps(self):
        daemon = self.serve(hook("true"))
        body = json.dumps(push_of()).encode()
        table = (  # head, the first answer, whether the body is awaited
            ("a push", {}, b"100"), ("in capitals", {"Expect": "100-Continue"}, b"100"),
            ("unsigned", {"X_Hub_Signature_256": None}, b"403"),
            ("another path", {"path": "/x"}, b"404"), ("a type", {"Content_Type": "a/b"}, b"415"),
            ("too large", {"Content_Length": 10**9}, b"413"))
        for name, more, status in table:
            with self.subTest(name), closing(daemon.connect()) as one:
                head = request(body, **{"Expect": "100-continue", **more})[:-len(body)]
                one.sendall(head)
                with one.makefile("rb") as stream:
                    self.assertEqual(stream.readline().split()[1], status)
                    if status == b"100":
                        self.assertEqual(stream.readline(), b"\r\n")
                        one.sendall(body)
                        self.assertEqual(read_answer(stream).status, 202)
        raw = request(body, version="HTTP/1.0", Expect="100-continue")
        self.assertTrue(talk(daemon, raw).startswith(b"HTTP/1.1 202 "), "100 to an older HTTP")

    def test_what_counts_once_may_not_come_twice(self):
        daemon = self.serve(hook(NOTE))
        for line in (b"X-GitHub-Delivery: 1", b"Content-Encoding: identity\r\nContent-Encoding: a",
                     b"X-Hub-Signature-256: " + sign(b"x").encode(), b"X-GitHub-Event: push",
                     b"Content-Type: application/json", b"Host: other", b"Content-Length: 0",
                     b"content-LENGTH: 0", b"Transfer-Encoding: chunked"):
            with self.subTest(line):
                self.assert_answer(daemon.exchange(with_fields(line)), 400)
        self.assertEqual(daemon.targets(), {})
        raw = with_fields(b"Accept: a", b"Accept: b", b"Via: c", b"Via: c")
        self.assert_answer(daemon.exchange(raw), 202)

    def test_a_bare_cr_or_lf_or_nul_ends_no_line(self):
        daemon = self.serve(hook(NOTE))
        good = b"X-Hub-Signature-256: " + sign(json.dumps(push_of()).encode()).encode()
        for mark in (b"\r", b"\n", b"\0", b"\x0b", b"\x85\r", b"\r \r"):
            for name in (b"X-Y: ", b"User-Agent: ", b""):
                with self.subTest(name, mark=mark):
                    raw = request(push_of(), "wrong").replace(
                        b"\r\n\r\n", b"\r\n" + name + b"a" + mark + good + b"\r\n\r\n", 1)
                    self.assert_answer(daemon.exchange(raw), 400)
        raw = request(push_of()).replace(b"POST / ", b"POST /\r ", 1)
        self.assert_answer(daemon.exchange(raw), 400)
        self.assertEqual(daemon.targets(), {})

    FORWARDED = (  # values of X-Forwarded-For, one for each field of that name, and who may enter
        (("192.0.2.7",), 202), (("198.51.100.9",), 403), (("198.51.100.9, 192.0.2.7",), 202),
        (("192.0.2.7, 198.51.100.9",), 403), (("198.51.100.9", "192.0.2.7"), 202),
        (("192.0.2.7", "198.51.100.9"), 403), (("2001:db8::7",), 202), (("2001:db9::7",), 403),
        (("::ffff:192.0.2.7",), 202), (("192.0.2.7,",), 403), (("",), 403), ((",",), 403),
        (("unknown",), 403), (("192.0.2.7 ",), 202), (("192.0.2.256",), 403), (("192.0.2",), 403),
        (("0xC0000207",), 403), (("192.0.2.07",), 403), (("192.0.2.7/24",), 403),
        (("2001:db8::ffff:7",), 202))

    def check_forwarded(self, daemon):
        for values, status in self.FORWARDED:
            with self.subTest(values):
                lines = [b"X-Forwarded-For: " + value.encode() for value in values]
                self.assert_answer(daemon.exchange(with_fields(*lines)), status)

    def test_behind_a_proxy_the_last_forwarded_address_decides(self):
        daemon = self.serve(hook("true"), allow_from="192.0.2.0/24 2001:db8::/32")
        self.check_forwarded(daemon)
        self.assert_answer(daemon.push(), 403, "address")

    def test_over_a_unix_socket_nobody_enters_without_a_name(self):
        daemon = self.serve(hook("true"), allow_from="192.0.2.0/24 2001:db8::/32",
                            listen=f"unix:{self.home}/hookd.sock")
        self.assert_answer(daemon.push(), 403, "address")
        self.check_forwarded(daemon)

    def test_a_peer_elsewhere_is_not_believed_about_its_address(self):
        with closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing: asks the kernel for our address
            except OSError:
                self.skipTest("this machine has no address but loopback")
            address = probe.getsockname()[0]
        daemon = self.serve(hook("true"), listen=f"{address}:0", allow_from="203.0.113.0/24")
        self.assert_answer(daemon.post(push_of(), X_Forwarded_For="203.0.113.7"), 403, "address")
        daemon.stop()
        daemon.configure(self.ini(hook("true"), listen=f"{address}:0", allow_from=address))
        daemon.start()
        self.assert_answer(daemon.post(push_of(), X_Forwarded_For="203.0.113.7"), 202)

    def test_quiet_gives_nothing_away(self):
        daemon = self.serve(hook(NOTE), quiet="yes", path="/hook", max_body="64K")
        body = json.dumps(push_of()).encode()
        rows = {"a push": request(body, path="/hook"), "a path": request(body),
                "a method": request(method="GET", path="/hook"),
                "no JSON": request(b"{", path="/hook"),
                "a secret": request(body, "wrong", path="/hook"),
                "a type": request(body, path="/hook", Content_Type="text/plain"),
                "a size": request(b"x" * 65537, path="/hook"),
                "unsigned": request(body, path="/hook", X_Hub_Signature_256=None)}
        for name, raw in rows.items():
            with self.subTest(name):
                answer = daemon.exchange(raw)
                self.assertEqual((answer.status, answer.text), (200, "ok\n"))
                self.assertNotIn("allow", answer.headers)
        self.assert_answer(daemon.exchange(b"nonsense\r\n\r\n"), 400)
        daemon.wait_for_log("signature does not match")
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("commit")])


# ---------------------------------------------------------------- What strangers cost


def processor(daemon):
    """Return the processor time that a daemon has used, in seconds (clock_getcpuclockid(3))."""
    return time.clock_gettime((~daemon.process.pid << 3) | 2)


def memory(daemon, name="VmHWM"):
    """Return a figure of /proc/PID/status in bytes."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024


def cost(daemon, raw, times=8, rounds=3):
    """Return the processor time that one request costs, the best of a few rounds."""
    best = []
    for _ in range(rounds):
        began = processor(daemon)
        for _ in range(times):
            daemon.exchange(raw)
        best.append((processor(daemon) - began) / times)
    return min(best)


N = 15_000


def unsigned(*lines, path=b"/", method=b"POST"):
    """Return a head without a signature."""
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: a", *lines, b"", b""])


def filler(name):
    """Return heads whose field `name` is full of what a pattern might look at twice."""
    parts = (b" ", b"\t", b" \t", b"a ", b",", b", ", b";", b" ;", b"/", b"0", b"9", b".", b":",
             b"1.", b"=", b"%", b"\xff", b'"', b"\\", b"(", b"-", b"a:")
    for part in parts:
        for end in (b"", b"\x01", b"x"):
            yield (part, end), unsigned(name + b":" + part * (N // len(part)) + end)


def form_of(message):
    """Return the body of a form delivery of a push with this message, in UTF-8."""
    payload = push_of(head_commit={"id": sha("commit"), "message": message})
    text = json.dumps(payload, ensure_ascii=False)
    return urllib.parse.urlencode({"payload": text}).encode()


class Cost(Case):
    """What one stranger's byte costs: a ratio to the plain case, so that any machine can judge."""

    def test_no_head_costs_more_processor_time_than_a_plain_one(self):
        daemon = self.serve(hook("true"), allow_from="127.0.0.0/8", quiet="no")
        plain = cost(daemon, unsigned(b"X-Y: " + b"a" * N), 20)
        names = (b"a", b"X-Forwarded-For", b"Content-Type", b"Content-Length", b"Connection",
                 b"X-Hub-Signature-256", b"Transfer-Encoding", b"Expect", b"X-GitHub-Delivery")
        rows = {(name, *what): raw for name in names for what, raw in filler(name)}
        half = N // 2
        for part in (b"/", b"a", b"/.", b"%2f", b"?", b"?&", b"//@", b"#", b"*", b"\x01"):
            rows["path", part] = unsigned(path=b"/" + part * (half // len(part)))
            rows["URL", part] = unsigned(path=b"http://" + part * (half // len(part)))
        for part in (b"A", b"!", b"a-", b"/", b"\t", b"\xff"):
            rows["method", part] = unsigned(method=part * (half // len(part)))
        rows["names"] = unsigned(*[b"a" * 150 + b":"] * 99)
        rows["a name"] = unsigned(b"a" * N)
        rows["a name and a space"] = unsigned(b"a" * N + b" :")
        rows["colons"] = unsigned(b":" * N)
        rows["returns"] = unsigned(b"X-Y: " + b"\r" * N)
        rows["lines"] = unsigned(b"X-Y: " + b"\n" * N)
        for name, raw in rows.items():
            with self.subTest(name):
                self.assertLess(cost(daemon, raw, 4, 1), 6 * plain + 0.0005)
        self.assert_answer(daemon.push(), 202)

    def test_no_field_of_a_signed_body_costs_more_than_a_plain_push(self):
        daemon = self.serve(hook("true", "*", paths="docs/*/*.md\n*x*y*z"),
                            variables={"PYTHONINTMAXSTRDIGITS": "0"})
        size = 400_000
        commits = [{"id": sha(number), "added": ["a/b"], "removed": [], "modified": ["c"],
                    "message": "Say hello"} for number in range(size // 160)]
        plain = cost(daemon, request(push_of(commits=commits[:2000])), 3)
        rows = {}
        for part in (" ", "a", "/", "a/", "0", "\x1b", "\n", "\r\n", "\ud800", "é", "x", ".", "{"):
            text = part * (size // len(json.dumps(part)))
            rows["ref", part] = push_of(ref="refs/heads/" + text)
            rows["commit", part] = push_of(after=text)
            rows["before", part] = push_of(before=text)
            rows["repository", part] = push_of(repository={"full_name": "o/" + text})
            rows["pusher", part] = push_of(pusher={"name": text})
            rows["message", part] = push_of(head_commit={"id": sha(1), "message": text})
            rows["file", part] = push_of(commits=[{"added": [text], "removed": [], "modified": []}])
        raws = {name: request(json.dumps(payload).encode()) for name, payload in rows.items()}
        for number in (b"9" * size, b"-" + b"9" * size, b"0." + b"9" * size, b"1e" + b"9" * size):
            body = json.dumps(push_of()).encode()
            body = re.sub(rb'"pushed_at": \d+', b'"pushed_at": ' + number, body)
            raws["number", number[:3]] = request(body)
        for name, raw in raws.items():
            with self.subTest(name):
                self.assertLess(cost(daemon, raw, 1, 1), 10 * plain + 0.05)
        self.assert_answer(daemon.push(commits=[]), 202)

    def test_bodies_in_flight_are_bounded_whoever_gives_way(self):
        daemon = self.serve(hook("true", "*"))
        self.assert_answer(daemon.push("before"), 202)
        before = memory(daemon)
        head = request(b"", "wrong", Content_Length=20_000_000)
        with ExitStack() as stack:
            for _ in range(800):  # the oldest, which give way first and free a byte each
                stack.enter_context(closing(daemon.connect())).sendall(head + b"x")
            for _ in range(10):
                one = stack.enter_context(closing(daemon.connect()))
                with suppress(ConnectionError):
                    one.sendall(head + b"x" * 19_000_000)
            self.assert_answer(daemon.push("after"), 202)
        self.assertLess(memory(daemon) - before, 90_000_000)

    def test_a_number_of_many_digits_costs_no_more_than_its_bytes(self):
        daemon = self.serve(hook(NOTE), variables={"PYTHONINTMAXSTRDIGITS": "0"})
        for digits in (b"9" * 5000, b"9" * 2_000_000, b"1" * 18):
            with self.subTest(len(digits)):
                body = json.dumps(push_of(id=7)).encode().replace(b'"id": 7', b'"id": ' + digits)
                self.assert_answer(daemon.post(body), 202)
                plain = cost(daemon, request(b" " * len(body)), 2)
                self.assertLess(cost(daemon, request(body), 2, 1), 10 * plain + 0.05)

    FORMS = {  # bodies of form deliveries, with what they are answered
        "an honest one": (lambda size: form_of("中" * (size // 9)), 202),
        "escapes": (lambda size: b"payload=" + b"%7B" * (size // 3), 400),
        "plus signs": (lambda size: b"payload=" + b"+" * size, 400),
        "other fields": (lambda size: b"a=1&" * (size // 4) + form_of("Hello"), 202),
        "nothing": (lambda size: b"&" * size, 400),
        "equals signs": (lambda size: b"=" * size, 400),
        "broken escapes": (lambda size: b"payload=" + b"%" * size, 400),
        "many payloads": (lambda size: b"payload=%7B%7D&" * (size // 15), 400)}

    def test_a_form_costs_little_more_memory_and_time_than_its_bytes(self):
        size = 8_000_000
        daemon = self.prepare(hook("true"))
        times = {}
        for name, (make, status) in self.FORMS.items():
            with self.subTest(name):
                raw = request(make(size), Content_Type="application/x-www-form-urlencoded")
                daemon.start()
                self.assert_answer(daemon.push("none"), 200)
                before, began = memory(daemon), processor(daemon)
                answer = daemon.exchange(raw)
                times[name], peak = processor(daemon) - began, memory(daemon) - before
                daemon.kill()
                self.assert_answer(answer, status)
                self.assertLess(peak, 8 * len(raw))
                self.assertLess(times[name], 8 * times["an honest one"] + 0.1)

    def test_what_is_kept_of_a_push_is_bounded(self):
        daemon = self.serve(hook('env > "$HOME/said"', "*"))
        large = "x" * 2_000_000
        self.assertEqual(daemon.hookd("pause", "octo/site", "large").code, 0)
        light = cost(daemon, request(push_of("other")), 10)
        for number in range(2):
            payload = push_of("large", sha(number), before=large, pusher={"name": large},
                              head_commit={"id": sha(number), "message": large})
            self.assert_answer(daemon.post(payload), 202)
        self.assertLess(cost(daemon, request(push_of("other")), 10), 3 * light + 0.002)
        self.assertEqual(daemon.hookd("resume", "octo/site", "large").code, 0)
        told = daemon.settled("large")
        self.assertEqual(told["state"], "ok")
        self.assertLess(len(json.dumps(told)), 100_000)
        self.assertLess(len(daemon.log), 1_000_000)
        self.assertLess(max(map(len, daemon.read("said").splitlines())), 70_000)
        self.assertLess(self.largest_value(daemon), 100_000)

    def largest_value(self, daemon):
        """Return the size of the largest value in the database."""
        with closing(sqlite3.connect(daemon.state / "hookd.db")) as store:
            names = [name for (name,) in store.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table'")]
            rows = itertools.chain.from_iterable(
                store.execute(f'SELECT * FROM "{name}"') for name in names)
            return max(len(value) if isinstance(value, (str, bytes)) else 8
                       for row in rows for value in row)

    def test_unfinished_heads_of_refused_addresses_push_nobody_out(self):
        heads, soft, hard = 2200, *resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard < 2 * heads:
            self.skipTest(f"a process may have only {hard} files open")
        if soft < 2 * heads:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        daemon = self.serve(hook("true", "*"), allow_from="192.0.2.0/24")
        part = b"POST / HTTP/1.1\r\nX-Forwarded-For: 198.51.100.9\r\nX-Y: " + b"z" * 16_000
        with ExitStack() as stack:
            def strangers(count):
                for _ in range(count):
                    stack.enter_context(closing(daemon.connect())).sendall(part)

            strangers(heads)
            for number in range(20):
                strangers(3)  # where some had to go, others come
                payload = push_of(f"b{number}", note="x" * 20_000)
                answer = daemon.post(payload, X_Forwarded_For="192.0.2.7")
                self.assert_answer(answer, 202)

    def test_the_oldest_unfinished_body_gives_way_and_not_the_largest(self):
        daemon = self.serve(hook("true", "*"))
        part = request(b"", "wrong", Content_Length=2_000_000) + b"x" * 1_000_000
        with ExitStack() as stack:
            for _ in range(40):
                stack.enter_context(closing(daemon.connect())).sendall(part)
            self.assert_answer(daemon.push("large", note="x" * 5_000_000), 202)
            self.assert_answer(daemon.push("small"), 202)


class Secrets(Case):
    """However many secrets there are, nobody can make hookd compute for all of them at length."""

    COUNT = 200

    def sections(self):
        return [section(f"octo/r{number} main", command="true", secret=f"secret {number}")
                for number in range(self.COUNT)]

    def test_each_of_many_secrets_is_accepted_for_its_own(self):
        daemon = self.serve(*self.sections())
        for number in (0, 99, self.COUNT - 1):
            with self.subTest(number):
                payload = push_of(repo=f"octo/r{number}", note="x" * 200_000)
                self.assert_answer(daemon.post(payload, secret=f"secret {number}"), 202)
                self.assert_answer(daemon.post(payload, secret=f"secret {number - 1}"), 403)

    def test_a_large_push_is_taken_from_a_webhook_that_is_known(self):
        daemon = self.serve(*self.sections())
        last = f"octo/r{self.COUNT - 1}"
        for size in (10, 5_000_000):
            answer = daemon.post(push_of(repo=last, note="x" * size), X_GitHub_Hook_ID=7,
                                 secret=f"secret {self.COUNT - 1}")
            self.assert_answer(answer, 202, last)

    def test_a_secret_that_was_replaced_signs_nothing_even_for_a_webhook_that_is_known(self):
        daemon = self.serve(hook("true"))
        self.assert_answer(daemon.post(push_of(), X_GitHub_Hook_ID=7), 202)
        self.reload(daemon, hook("true"), secret="another")
        answer = daemon.post(push_of(), secret=SECRET, X_GitHub_Hook_ID=7)
        self.assert_answer(answer, 403, "signature does not match")

    def test_the_work_for_a_large_body_does_not_grow_with_the_secrets(self):
        body = b"x" * 25_000_000
        few = self.serve(*self.sections()[:4])
        bound = cost(few, request(body, "wrong"), 1, 2)
        few.kill()
        many = self.prepare(*self.sections())
        many.start()
        self.assertLess(cost(many, request(body, "wrong"), 1, 2), 4 * bound)


CERTIFICATES = (  # two self-signed ones with their keys, made for these tests alone
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWr1BIgGeB7AxJ6Xi
ciRtg0blXN+sCbQ9fxyH2S1D9aWhRANCAARlV8KVR7ATAFVK76sFfsmYr9LF5EA+
u9dS51K1zUYlOMh4zFSuNYqOb0WwmZ9QN4qDGJqjm5wp2iaCAthDeV4p
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBoTCCAUegAwIBAgIUH6vpu7b4VcHixmjIMdR8ceNG8wwwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMaG9va2QtdGVzdC0xMCAXDTI2MTEyMTAxNTk0NloYDzIxMjYx
MDI4MDE1OTQ2WjAXMRUwEwYDVQQDDAxob29rZC10ZXN0LTEwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAARlV8KVR7ATAFVK76sFfsmYr9LF5EA+u9dS51K1zUYlOMh4
zFSuNYqOb0WwmZ9QN4qDGJqjm5wp2iaCAthDeV4po28wbTAdBgNVHQ4EFgQU3HUN
tuiJ6owqSZhkJzTOrjsGfCUwHwYDVR0jBBgwFoAU3HUNtuiJ6owqSZhkJzTOrjsG
fCUwDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEw
CgYIKoZIzj0EAwIDSAAwRQIgMADb6BwlGB1UYrTKE/RFKhW0ONWweGLLedwdWV9a
oxgCIQDun2hlqhgmHrvnc943yUd6KvVfTMckEqUKS+VrNCJPzw==
-----END CERTIFICATE-----
""",
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzmQUFut5QfimSptC
9oQI5cshk0/aGwO3XGd6UZpSF8mhRANCAAQCz9dsjteEDBNSTibjyVMWuWfwrgxS
50i+juwhLwOq4UL8y3BPSNQr2O35thKIk4UpmusQVA+vfWgDvvN/r9cX
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBoTCCAUegAwIBAgIUf+0DbCguCwLnx8YeeMpcKwUhODYwCgYIKoZIzj0EAwIw
FzEVMBMGA1UEAwwMaG9va2QtdGVzdC0yMCAXDTI2MTEyMTAxNTk0NloYDzIxMjYx
MDI4MDE1OTQ2WjAXMRUwEwYDVQQDDAxob29rZC10ZXN0LTIwWTATBgcqhkjOPQIB
BggqhkjOPQMBBwNCAAQCz9dsjteEDBNSTibjyVMWuWfwrgxS50i+juwhLwOq4UL8
y3BPSNQr2O35thKIk4UpmusQVA+vfWgDvvN/r9cXo28wbTAdBgNVHQ4EFgQURSET
b0HDAXxNcZKnECrByFTwBmIwHwYDVR0jBBgwFoAURSETb0HDAXxNcZKnECrByFTw
BmIwDwYDVR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEw
CgYIKoZIzj0EAwIDSAAwRQIgUVgRqIs86KlKi4dImspNvjgJtoDXIi96du5TImzy
OH8CIQCYm7uoXbn1TsRVmetmO2DrRjlNnaoll1niiX/dMU0IpQ==
-----END CERTIFICATE-----
""",
)


class Tls(Case):
    """HTTPS by hookd itself."""

    def serve_tls(self, number, *sections, **keys):
        """Return a daemon that answers over TLS with the certificate of that number."""
        self.install(number)
        return self.serve(*sections, tls_cert=self.home / "tls.pem",
                          tls_key=self.home / "tls.pem", **keys)

    def install(self, number):
        path = self.home / "tls.pem"
        path.write_text(CERTIFICATES[number])
        path.chmod(0o600)

    def connect(self, daemon):
        """Return a TLS connection; its certificate is not verified, only looked at."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context.wrap_socket(daemon.connect(), server_hostname="localhost")

    def exchange(self, daemon, raw):
        with closing(self.connect(daemon)) as one, one.makefile("rb") as stream:
            one.sendall(raw)
            return read_answer(stream)

    def certificate(self, daemon):
        with closing(self.connect(daemon)) as one:
            return ssl.DER_cert_to_PEM_cert(one.getpeercert(binary_form=True))

    def test_a_push_arrives_over_tls(self):
        daemon = self.serve_tls(0, hook(NOTE))
        self.assert_answer(self.exchange(daemon, request(push_of())), 202)
        large = push_of(commit=sha("large"), note="x" * 3_000_000)
        self.assert_answer(self.exchange(daemon, request(large)), 202)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("commit"), sha("large")])

    def test_a_handshake_that_never_ends_blocks_nobody(self):
        daemon = self.serve_tls(0, hook("true"))
        with ExitStack() as stack:
            for start in (b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", b"\x80" * 50):
                one = stack.enter_context(closing(daemon.connect()))
                one.sendall(start)
            self.assert_answer(self.exchange(daemon, request(push_of())), 202)

    def test_a_renewed_certificate_is_taken_at_a_reload(self):
        daemon = self.serve_tls(0, hook("true"))
        self.assertIn(self.certificate(daemon), CERTIFICATES[0])
        self.install(1)
        self.assertIn(self.certificate(daemon), CERTIFICATES[0])
        daemon.tell(signal.SIGHUP)
        daemon.wait(lambda: self.certificate(daemon) in CERTIFICATES[1], "the new certificate")
        self.assert_answer(self.exchange(daemon, request(push_of())), 202)

    def test_a_certificate_that_cannot_be_read_is_told(self):
        (self.home / "tls.pem").write_text("no certificate\n")
        daemon = self.prepare(hook("true"), tls_cert=self.home / "tls.pem",
                              tls_key=self.home / "tls.pem")
        told = daemon.hookd("check")
        self.assertEqual(told.code, 78)
        self.assertIn("tls_cert", told.err + told.out)

    def test_send_speaks_tls_to_its_own_daemon(self):
        daemon = self.serve_tls(0, hook(NOTE))
        self.assertEqual(daemon.hookd("send", "octo/site", "main", "--wait").code, 0)
        self.assertEqual(len(daemon.seen()), 1)


# ---------------------------------------------------------------- Signals


class Signals(Case):
    """SIGTERM, SIGINT, SIGHUP, and what systemd hears and hands over."""

    def serve_running(self, *sections, **keys):
        """Return a daemon in the middle of run 1 of main, which ends when the gate opens."""
        daemon = self.serve(hook('touch "$HOME/begun"\n' + GATE + "\n" + NOTE), *sections, **keys)
        daemon.push(commit=sha(1))
        daemon.wait((self.home / "begun").exists, "run 1")
        return daemon

    def test_an_idle_daemon_ends_at_once_with_0(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                daemon = self.serve(hook("true"), state=self.home / number.name)
                began = time.monotonic()
                self.assertEqual(daemon.stop(number), 0)
                self.assertLess(time.monotonic() - began, 5)

    def test_a_running_command_is_let_finish_while_deliveries_are_kept(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                self.check_drain(number)

    def check_drain(self, number):
        for name in ("gate", "begun", "seen"):
            with suppress(FileNotFoundError):
                (self.home / name).unlink()
        daemon = self.serve_running(hook(NOTE, "dev"), state=self.home / number.name)
        known = len(daemon.log)
        daemon.tell(number)
        daemon.wait(lambda: len(daemon.log) > known, "word of the signal")
        self.assert_answer(daemon.push("dev", sha("while it ends")), 202)
        self.assertIsNone(daemon.process.poll())
        daemon.open_gate()
        self.assertEqual(daemon.ended(), 0)
        self.assertEqual(daemon.seen(), [sha(1)], "nothing new may start")
        daemon.start()
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual(daemon.seen(), [sha(1), sha("while it ends")])
        daemon.kill()

    def test_hangup_reads_the_ini_again(self):
        daemon = self.serve(hook(NOTE))
        self.assert_answer(daemon.push("dev"), 200)
        daemon.reload(self.ini(hook(NOTE, "dev")))
        daemon.wait(lambda: daemon.push("dev").status == 202, "the new hook")
        self.assert_answer(daemon.push("main"), 200, "ignored")
        self.assertIsNone(daemon.process.poll())

    def test_a_bad_ini_is_told_at_a_reload_and_the_old_one_stays(self):
        daemon = self.serve(hook(NOTE))
        daemon.reload(self.ini(hook(NOTE, "main", timout="5m"), hook(NOTE, "dev")))
        daemon.wait_for_log("did you mean timeout")
        self.assert_answer(daemon.push("main"), 202)
        self.assert_answer(daemon.push("dev"), 200, "ignored")
        daemon.ini.unlink()
        known = len(daemon.log)
        daemon.tell(signal.SIGHUP)
        daemon.wait_for_log("hookd.ini", known)
        self.assert_answer(daemon.push("main"), 202)

    def test_a_secret_that_cannot_be_read_does_not_end_the_daemon_at_a_reload(self):
        daemon = self.serve(hook(NOTE), secret=None)
        secret = daemon.hookd("secret").out.strip()
        (daemon.state / "secret").unlink()
        (daemon.state / "secret").mkdir()
        daemon.tell(signal.SIGHUP)
        daemon.wait_for_log("reload failed; keeping the old configuration")
        self.assert_answer(daemon.post(push_of(), secret=secret), 202)

    @unittest.skipUnless(os.geteuid() == 0, "only root could become another")
    def test_a_reload_never_changes_the_user_of_the_daemon(self):
        daemon = self.serve(hook(NOTE))
        other = self.home / "other"
        other.mkdir()
        os.chown(other, NOBODY, NOBODY)
        daemon.reload(self.ini(hook(NOTE), state=other))
        daemon.wait_for_log("reload failed; keeping the old configuration.*restart")
        daemon.configure(self.ini(hook(NOTE)))
        self.assert_answer(daemon.push(), 202)
        self.assertEqual(daemon.settled()["state"], "ok")

    def test_a_stop_ends_although_the_history_cannot_be_written(self):
        daemon = self.serve_running()
        with closing(sqlite3.connect(daemon.state / "hookd.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            daemon.tell(signal.SIGTERM)
            daemon.open_gate()
            self.assertEqual(daemon.ended(), 0)
            other.execute("ROLLBACK")
        daemon.start()
        self.assertEqual(daemon.settled()["state"], "ok")

    def test_a_waiting_run_whose_hook_is_gone_is_cancelled(self):
        daemon = self.serve_running(hook(NOTE, "dev"), jobs=1)
        daemon.push("dev")
        daemon.reload(self.ini(hook("true"), jobs=1))
        daemon.wait(lambda: daemon.push("dev").status == 200, "the new ini")
        daemon.open_gate()
        daemon.wait(lambda: daemon.states() == {1: "ok", 2: "cancelled"}, "both to end")
        self.assertEqual(daemon.seen(), [sha(1)])

    def test_a_reload_disturbs_neither_runs_nor_connections(self):
        daemon = self.serve_running()
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            raw = request(push_of(commit=sha(2)))
            one.sendall(raw[:50])
            known = len(daemon.log)
            daemon.tell(signal.SIGHUP)
            daemon.wait(lambda: len(daemon.log) > known, "word of the reload")
            one.sendall(raw[50:])
            self.assert_answer(read_answer(stream), 202)
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(1), sha(2)])

    def test_a_secret_is_replaced_by_a_reload(self):
        daemon = self.serve(hook("true"), secret="old")
        daemon.reload(self.ini(hook("true"), secret="new"))
        daemon.wait(lambda: daemon.post(push_of(), secret="new").status == 202, "the new secret")
        self.assert_answer(daemon.post(push_of(), secret="old"), 403)

    def test_a_second_daemon_on_one_state_says_who_holds_it(self):
        daemon = self.serve(hook("true"))
        told = daemon.hookd("serve")
        self.assertNotEqual(told.code, 0)
        self.assertIn(str(daemon.process.pid), told.err)
        self.assertIn(str(daemon.state), told.err)
        self.assert_answer(daemon.push(), 202)

    def test_a_listen_that_is_taken_is_told(self):
        daemon = self.serve(hook("true"))
        other = self.home / "other"
        other.mkdir()
        second = Daemon(other, self.ini(hook("true"), listen=daemon.address, state=other / "state"))
        told = second.hookd("serve")
        self.assertNotEqual(told.code, 0)
        self.assertIn(daemon.address, told.err)
        self.assertNotIn("Traceback", told.err)

    def systemd(self):
        systemd = Systemd(self.home)
        self.addCleanup(systemd.close)
        return systemd

    def test_systemd_hears_what_the_daemon_does(self):
        systemd = self.systemd()
        daemon = self.serve(hook(NOTE), variables={"NOTIFY_SOCKET": systemd.path,
                                                     "WATCHDOG_USEC": "400000"})
        daemon.wait(lambda: systemd.count("READY=1"), "READY=1")
        daemon.wait(lambda: systemd.count("STATUS="), "STATUS=")
        daemon.wait(lambda: systemd.count("WATCHDOG=1") >= 3, "the watchdog to be fed")
        daemon.tell(signal.SIGHUP)
        daemon.wait(lambda: systemd.count("READY=1") >= 2, "READY=1 after the reload")
        self.assertEqual(systemd.count("MONOTONIC_USEC="), systemd.count("RELOADING=1"))
        self.assertEqual(daemon.stop(), 0)
        daemon.wait(lambda: systemd.count("STOPPING=1"), "STOPPING=1")

    def serve_stored(self):
        """Return a daemon, the socket that it gave systemd to keep, and that socket's name."""
        systemd = self.systemd()
        daemon = self.serve(hook(NOTE), variables={"NOTIFY_SOCKET": systemd.path})
        daemon.wait(lambda: systemd.listen() and systemd.sockets, "the socket to be handed over")
        (told,) = [one for one in systemd.heard if "FDSTORE=1" in one]
        return daemon, systemd.sockets[0], re.search(r"FDNAME=(\S+)", told).group(1)

    def test_a_crash_refuses_no_connection_because_systemd_keeps_the_socket(self):
        daemon, kept, name = self.serve_stored()
        address = daemon.address
        daemon.kill()
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            one.sendall(request(push_of(commit=sha("while it was dead"))))
            daemon.start([kept], name)
            self.assert_answer(read_answer(stream), 202)
        self.assertEqual(daemon.address, address)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha("while it was dead")])

    def test_a_stop_keeps_the_socket_too(self):
        daemon, kept, name = self.serve_stored()
        self.assertEqual(daemon.stop(), 0)
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            one.sendall(request(push_of()))
            daemon.start([kept], name)
            self.assert_answer(read_answer(stream), 202)

    def test_a_kept_socket_is_dropped_when_listen_has_changed(self):
        daemon, kept, name = self.serve_stored()
        daemon.kill()
        path = f"unix:{self.home}/hookd.sock"
        daemon.configure(self.ini(hook(NOTE), listen=path))
        daemon.start([kept], name)
        self.assertEqual(daemon.address, path)
        self.assert_answer(daemon.push(), 202)

    def test_a_socket_unit_is_used_as_it_is(self):
        path = str(self.home / "unit.sock")
        with socket.create_server(("127.0.0.1", 0)) as tcp, closing(
                socket.socket(socket.AF_UNIX)) as unix:
            unix.bind(path)
            unix.listen()
            daemon = self.prepare(hook("true"))
            daemon.start([tcp, unix], "hookd.socket:hookd.socket")
            for address in (f"127.0.0.1:{tcp.getsockname()[1]}", f"unix:{path}"):
                with self.subTest(address):
                    daemon.address = address
                    self.assert_answer(daemon.push(), 202)

    def test_sockets_meant_for_another_process_are_left_alone(self):
        daemon = self.serve(hook("true"), variables={"LISTEN_FDS": "1", "LISTEN_PID": "1",
                                                       "LISTEN_FDNAMES": "hookd"})
        self.assert_answer(daemon.push(), 202)

    def test_a_command_that_ends_its_own_daemon_is_run_again_once_at_most(self):
        daemon = self.serve(hook('echo x >> "$HOME/tries"\nkill $PPID; sleep 1; kill $PPID; '
                                 "sleep 9"))
        daemon.push()
        self.assertEqual(daemon.ended(), 0)
        daemon.start()
        self.assertEqual(daemon.ended(), 0)
        daemon.start()
        self.assertEqual(daemon.settled()["state"], "interrupted")
        self.assertEqual(daemon.read("tries").split(), ["x", "x"])


LOG_LINES = """
import hookd, sys
listener = hookd.open_log("syslog", sys.argv[1])
for line in sys.stdin:
    level, _, text = line.strip().partition(" ")
    getattr(hookd.log, level)(text)
    print("logged", flush=True)
"""


class Syslog(Case):
    """The log on its way to syslog, which may be missing, restarted or stuck."""

    def setUp(self):
        super().setUp()
        self.path = str(self.home / "log")
        self.syslog = self.bind()
        self.process = subprocess.Popen([sys.executable, "-c", LOG_LINES, self.path], cwd=HERE,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.addCleanup(self.end)

    def end(self):
        self.process.kill()
        self.process.communicate()
        self.syslog.close()

    def bind(self):
        """Return a socket that hears as /dev/log does."""
        one = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        one.bind(self.path)
        one.settimeout(PATIENCE)
        return one

    def say(self, line):
        """Have a line logged, and wait until its writer has gone on."""
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        self.assertEqual(self.process.stdout.readline(), b"logged\n")

    def heard(self):
        return self.syslog.recv(65536).decode().rstrip("\0\n")

    def test_each_line_has_its_priority_and_the_name_of_the_program(self):
        for level, number in (("info", 30), ("warning", 28), ("error", 27)):  # of daemon.*
            self.say(f"{level} a line of {level}")
            self.assertRegex(self.heard(), rf"^<{number}>hookd\[\d+\]: a line of {level}$")

    def test_a_syslog_that_is_restarted_is_found_again(self):
        self.say("info before")
        self.assertIn("before", self.heard())
        self.syslog.close()
        os.unlink(self.path)
        self.say("info nobody listens")
        self.syslog = self.bind()
        self.say("info after")
        while "after" not in self.heard():
            pass

    def test_a_syslog_that_is_stuck_blocks_nobody(self):
        for number in range(12_000):  # more than the socket and the queue hold
            self.say(f"info line {number}")
        self.assertIn("line 0", self.heard())
        self.syslog.settimeout(0.2)
        with suppress(socket.timeout):
            while True:
                self.heard()
        self.syslog.settimeout(PATIENCE)
        self.say("info the next")
        self.assertRegex(self.heard(), "lost [0-9]+ lines")

    def test_a_long_or_strange_line_harms_none_after_it(self):
        self.say("info " + "x" * 500_000)
        self.say("info one\x1b[31m\x07two")
        heard = self.heard()
        while "two" not in heard:
            heard = self.heard()
        self.assertNotRegex(heard, "[\0-\x1f]")


# ---------------------------------------------------------------- Reports and page

TOKEN = "github_pat_11SECRET0123456789"
HANG, DROP, DRIP = "never answers", "hangs up", "answers a byte now and then"
hookd.REPORT_DELAYS = (0.01,) * 5  # for messengers in this process


@dataclasses.dataclass(frozen=True)
class CommitStatus:
    """A commit status as a forge took it."""

    at: float
    path: str
    headers: dict
    state: str
    body: dict


class Forge(socketserver.ThreadingMixIn, HTTPServer):
    """A forge on loopback: takes commit statuses and answers each as it is told, at last 201.

    An answer is a status, (status, headers), or HANG, DROP, DRIP.
    """

    daemon_threads = True
    request_queue_size = 50

    def __init__(self, *answers, always=201):
        super().__init__(("127.0.0.1", 0), ForgeHandler)
        self.answers, self.always = collections.deque(answers), always
        self.taken, self.ending = [], threading.Event()
        self.api = f"http://127.0.0.1:{self.server_port}/api/v3"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.ending.set()
        self.shutdown()
        self.server_close()

    def states(self, commit=None):
        return [one.state for one in self.taken if commit is None or commit in one.path]

    def handle_error(self, request, client_address):
        """Say nothing: hookd may hang up."""


class ForgeHandler(BaseHTTPRequestHandler):
    """Note a commit status, and answer as the forge was told."""

    protocol_version = "HTTP/1.1"  # so that a connection stays open behind an answer

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        forge = self.server
        forge.taken.append(CommitStatus(time.monotonic(), self.path, dict(self.headers),
                                        body["state"], body))
        answer = forge.answers.popleft() if forge.answers else forge.always
        self.close_connection = answer in (HANG, DROP, DRIP)
        if answer == HANG:
            forge.ending.wait()
        elif answer == DRIP:
            self.wfile.write(b"HTTP/1.1 201 Created\r\nX: ")
            while not forge.ending.wait(0.5):
                self.wfile.write(b"x")
        elif answer != DROP:
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

    def log_message(self, *arguments):
        """Say nothing."""


def report_of(number=1, api="", token=TOKEN, **more):
    """Return a report as the daemon would make it."""
    body = {"state": "success", "context": "hookd/main", "description": "run 1 ok", **more}
    return hookd.Report(number, api, token, "octo/site", sha("commit"), body)


STARVED = f"""
import sys, threading
from {Path(__file__).stem} import hookd, report_of
done = []
painted = []
messenger = hookd.Messenger(lambda report: done.append(report.id), lambda: painted.append(True))
threading.stack_size(1 << 46)  # more than there is: each start fails as it does at a limit
messenger.send(report_of(1, sys.argv[1], state="pending"))
messenger.show()
print("no thread" if threading.active_count() == 1 else "a thread")
threading.stack_size(0)
messenger.send(report_of(2, sys.argv[1]))
messenger.show()
messenger.close({PATIENCE})
print(done, "page" if painted else "")
"""
HEARTBEAT = f"""
import time
from {Path(__file__).stem} import hookd, wait_for
hookd.PAGE_SECONDS = 2.5
written = []
messenger = hookd.Messenger(print, lambda: written.append(time.monotonic()))
messenger.show()
wait_for(lambda: len(written) == 3, "the third page")
print(min(after - before for before, after in zip(written, written[1:])) >= 2.5)
"""


def run_script(script, *arguments):
    """Run Python that imports this module, in a process of its own; return what it says."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run([sys.executable, "-B", str(script), *map(str, arguments)], check=False,
                          env={**os.environ, "PYTHONPATH": path}, timeout=PATIENCE * 2,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8").stdout


class ReportCase(Case):
    """A test with forges, and with a messenger that retries at once."""

    def forge(self, *answers, **more):
        forge = Forge(*answers, **more)
        self.addCleanup(forge.close)
        return forge

    def messenger(self):
        self.done = []
        self.written = []
        return hookd.Messenger(lambda report: self.done.append(report.id),
                               lambda: self.written.append(True))

    def wait_until_done(self, *numbers):
        wait_for(lambda: len(self.done) >= len(numbers), "the reports", lambda: str(self.done))
        self.assertEqual(sorted(self.done), sorted(numbers))


class OneReport(ReportCase):
    """How one commit status goes out, and what its answers mean."""

    def test_a_report_is_the_call_that_every_forge_knows(self):
        forge = self.forge()
        started = time.monotonic()
        told = hookd.send_report(report_of(
            api=forge.api + "/", target_url="https://x.test/#run-1", state="failure",
            description="run 1 failed (exit 2)"))
        self.assertEqual(told, ("", hookd.NEVER))
        self.assertLess(time.monotonic() - started, 5, "waits for more than the answer")
        [status] = forge.taken
        self.assertEqual(status.path, f"/api/v3/repos/octo/site/statuses/{sha('commit')}")
        self.assertEqual(status.body, {
            "state": "failure", "context": "hookd/main", "description": "run 1 failed (exit 2)",
            "target_url": "https://x.test/#run-1"})
        self.assertEqual(status.headers["Authorization"], f"token {TOKEN}")
        self.assertEqual(status.headers["Host"], f"127.0.0.1:{forge.server_port}")
        self.assertEqual(status.headers["Content-Type"], "application/json")
        self.assertRegex(status.headers["User-Agent"], r"^hookd/\d")

    def test_an_answer_says_whether_to_try_again_and_what_is_wrong(self):
        table = (  # answer, whether to try again, words of the fault
            (200, False, ""), (201, False, ""), (204, False, ""),
            (301, False, "301 report_api"), (400, False, "400 report_api"),
            (401, False, "401 token expired"), (404, False, "404 repository repo:status"),
            (403, False, "403 token repo:status write:repository statuses: write"),
            (422, False, "422"),
            (408, True, "408"), (429, True, "429"), (500, True, "500"), (503, True, "503"),
            (599, True, "599"),
            (DROP, True, "HTTP"))
        forge = self.forge(*(answer for answer, _, _ in table))
        for answer, retried, words in table:
            with self.subTest(answer=answer):
                fault, wait = hookd.send_report(report_of(api=forge.api))
                self.assertEqual(wait, 0.0 if retried else hookd.NEVER)
                self.assertEqual(bool(fault), bool(words), fault)
                for word in words.split():
                    self.assertIn(word, fault)

    def test_no_fault_shows_the_token(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            closed = f"http://127.0.0.1:{unused.getsockname()[1]}"
        forge = self.forge(always=403)
        table = (("refused", closed, TOKEN, True),
                 ("no such name", "http://x.invalid", TOKEN, True),
                 ("no TLS", forge.api.replace("http", "https"), TOKEN, True),
                 ("forbidden", forge.api, TOKEN, False),
                 ("a line break", forge.api, f"{TOKEN}\r\nX: y", False),
                 ("no ASCII", forge.api, f"{TOKEN}\u2713", False))
        for name, api, token, retried in table:
            with self.subTest(name):
                report = report_of(api=api, token=token)
                fault, wait = hookd.send_report(report)
                self.assertTrue(fault)
                self.assertEqual(wait, 0.0 if retried else hookd.NEVER, fault)
                for told in (fault, repr(report), str(report), f"{report}", f"{[report]}"):
                    self.assertNotIn(TOKEN, told)

    def test_a_forge_that_does_not_answer_costs_fifteen_seconds_however_it_does_that(self):
        started = time.monotonic()
        ended = {}

        def measure(kind):
            forge = self.forge(always=kind)
            ended[kind] = (*hookd.send_report(report_of(api=forge.api)), time.monotonic() - started)

        threads = [threading.Thread(target=measure, args=(kind,)) for kind in (HANG, DRIP)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        for kind in (HANG, DRIP):
            with self.subTest(kind):
                fault, wait, seconds = ended[kind]
                self.assertLess(14.5, seconds)
                self.assertLess(seconds, 20)
                self.assertIn("timed out", fault)
                self.assertEqual(wait, 0.0)

    def test_a_token_is_tried_on_a_commit_that_cannot_exist(self):
        table = ((422, ""), (500, ""), (401, "expired"), (403, "repo:status"), (404, "repository"),
                 (301, "report_api"), (502, "502"), (DROP, "HTTP"))
        forge = self.forge(*(answer for answer, _ in table))
        for answer, word in table:
            with self.subTest(answer=answer):
                told = hookd.token_fault(forge.api, TOKEN, "octo/site")
                self.assertEqual(bool(told), bool(word), told)
                self.assertIn(word, told)
        self.assertEqual({one.path for one in forge.taken},
                         {f"/api/v3/repos/octo/site/statuses/{'0' * 40}"})

    def test_a_token_does_not_travel_unencrypted(self):
        table = (("https://api.github.com", True), ("https://git.example.com/api/v1", True),
                 ("http://127.0.0.1:3000/api/v1", True), ("http://localhost/api/v1", True),
                 ("http://localhost", True), ("http://[::1]:3000/api/v1", True),
                 ("http://git.example.com/api/v1", False), ("http://127.example.com/", False),
                 ("http://localhost.example.com/", False), ("http://localhost@x.test/", False))
        for api, fine in table:
            with self.subTest(api):
                told = self.prepare(hook("true"), report_api=api).hookd("check")
                self.assertEqual("unencrypted" not in told.err, fine, told)
                self.assertEqual(told.code, 0 if fine else 78, told)


class ReportOrder(ReportCase):
    """Queues, retries and threads of the messenger."""

    def test_reports_go_out_in_order_and_each_is_done_once(self):
        forge, messenger = self.forge(), self.messenger()
        for number in range(1, 31):
            messenger.send(report_of(number, forge.api, description=str(number)))
        self.wait_until_done(*range(1, 31))
        self.assertEqual([one.body["description"] for one in forge.taken],
                         [str(number) for number in range(1, 31)])

    def test_a_retry_is_not_overtaken_by_the_next_report(self):
        for answer in (408, 429, 500, 503, DROP):
            with self.subTest(answer=answer):
                forge, messenger = self.forge(answer, answer), self.messenger()
                messenger.send(report_of(1, forge.api, state="pending"))
                messenger.send(report_of(2, forge.api, state="success"))
                self.wait_until_done(1, 2)
                self.assertEqual(forge.states(), ["pending"] * 3 + ["success"])

    def test_a_report_is_tried_five_times_and_then_given_up(self):
        for answer in (408, 429, 500, DROP):
            with self.subTest(answer=answer):
                forge, messenger = self.forge(*[answer] * 5), self.messenger()
                messenger.send(report_of(1, forge.api, state="pending"))
                messenger.send(report_of(2, forge.api, state="success"))
                self.wait_until_done(1, 2)
                self.assertEqual(forge.states(), ["pending"] * 5 + ["success"])

    def test_what_the_forge_will_not_take_is_tried_once(self):
        for answer in (301, 400, 401, 403, 404, 422):
            with self.subTest(answer=answer):
                forge, messenger = self.forge(always=answer), self.messenger()
                messenger.send(report_of(1, forge.api))
                self.wait_until_done(1)
                self.assertEqual(len(forge.taken), 1)

    def test_retry_after_is_heeded(self):
        forge = self.forge((429, {"Retry-After": "1"}))
        messenger = self.messenger()
        messenger.send(report_of(1, forge.api))
        self.wait_until_done(1)
        first, second = forge.taken
        self.assertGreaterEqual(second.at - first.at, 0.99)

    def test_a_forge_that_never_answers_does_not_hold_up_the_page(self):
        dead, messenger = self.forge(always=HANG), self.messenger()
        messenger.send(report_of(1, dead.api))
        wait_for(lambda: dead.taken, "the dead forge to be asked")
        messenger.show()
        wait_for(lambda: self.written, "the page")
        self.assertEqual(len(dead.taken), 1)

    def test_a_thread_that_could_not_be_started_is_started_at_the_next_call(self):
        forge = self.forge()
        script = self.home / "starved.py"
        script.write_text(STARVED)
        self.assertEqual(run_script(script, forge.api), "no thread\n[1, 2] page\n")
        self.assertEqual(forge.states(), ["pending", "success"])

    def test_without_a_page_none_is_written_at_the_end_either(self):
        forge, messenger = self.forge(), self.messenger()
        messenger.send(report_of(1, forge.api))
        messenger.close(PATIENCE)
        self.assertEqual(self.done, [1])
        self.assertEqual(self.written, [], "a page that nobody asked for")

    def test_a_stop_does_not_wait_until_the_page_may_be_written_again(self):
        written = []

        def write():  # a page that takes long, so that the next has to wait 4 s
            time.sleep(0.2)
            return written.append(True)

        messenger = hookd.Messenger(print, write)
        messenger.show()
        wait_for(lambda: written, "the page")
        messenger.show()
        started = time.monotonic()
        messenger.close(PATIENCE)
        self.assertLess(time.monotonic() - started, 3)
        self.assertEqual(written, [True, True])

    def test_close_waits_for_what_is_under_way_and_no_longer_than_it_is_told(self):
        dead, messenger = self.forge(always=HANG), self.messenger()
        messenger.show()
        messenger.send(report_of(1, dead.api))
        started = time.monotonic()
        messenger.close(0.5)
        self.assertTrue(self.written)
        self.assertLess(time.monotonic() - started, 5)


class Advice(unittest.TestCase):
    """What to do about errors that git and ssh word badly."""

    def test_each_of_their_words_has_its_remedy(self):
        for words, remedy in (
                ("fatal: detected dubious ownership in repository at '/srv/x'", "chown -R"),
                ("Permissions 0644 for 'key' are too open ... bad permissions", "chmod 600"),
                ("Host key verification failed.", "ssh-keygen -R"),
                ("git@github.com: Permission denied (publickey).", ".pub"),
                ("fatal: could not read Username for 'https://x'", "deploy_key"),
                ("fatal: Authentication failed for 'https://x'", "deploy_key"),
                ("fatal: couldn't find remote ref refs/heads/x", "deleted"),
                ("ERROR: Repository not found.", "no such repository"),
                ("ssh: Could not resolve hostname x", "network"),
                ("error: unable to write file: No space left on device", "make room"),
                ("[Errno 2] No such file or directory: 'git'", "install git"),
                ("sh: 1: git: not found", "install git"), ("anything else", "")):
            with self.subTest(words):
                self.assertIn(remedy, hookd.advice(words))
                self.assertEqual(bool(hookd.advice(words)), bool(remedy))


class Redaction(unittest.TestCase):
    """What is shown as ***."""

    def test_hidden_texts_and_logins_in_urls_are_not_shown(self):
        hidden = ("hunter2hunter2", "hunter2hunter2-and-more", "7 chars", "8 chars.",
                  "two\nlines of it")
        table = (
            ("a hunter2hunter2 b", "a *** b"), ("a hunter2hunter2-and-more b", "a *** b"),
            ("7 chars", "7 chars"), ("8 chars.", "***"), ("x two\nlines of it y", "x *** y"),
            ("https://mona:pa:s@s@example.com/x", "https://***@example.com/x"),
            ("https://ghp_abc@github.com/octo/site", "https://***@github.com/octo/site"),
            ("https://x-access-token:abc@github.com", "https://***@github.com"),
            ("postgres://u:p@db/x redis://:secret@r", "postgres://***@db/x redis://***@r"),
            ("ssh://git@github.com/octo/site", "ssh://git@github.com/octo/site"),
            ("git@github.com:octo/site", "git@github.com:octo/site"),
            ("https://example.com/a@b", "https://example.com/a@b"),
            ("https://example.com:8080/x", "https://example.com:8080/x"),
            ("see https://example.com, mail me@example.com",
             "see https://example.com, mail me@example.com"))
        for text, shown in table:
            with self.subTest(text):
                self.assertEqual(hookd.redact(text, hidden), shown)

    def test_redaction_takes_linear_time(self):
        def cost(text):
            times = []
            for _ in range(5):
                started = time.thread_time()
                hookd.redact(text, ())
                times.append(time.thread_time() - started)
            return max(min(times), 1e-4)

        for unit in ("a", ":", "@", "://", "http://", "http://a:", "http://a@", "://a:@", "://:"):
            with self.subTest(unit):
                small, large = unit * (40_000 // len(unit)), unit * (800_000 // len(unit))
                for start in ("", "http://", "x://a:"):
                    ratio = cost(start + large) / cost(start + small)
                    self.assertLess(ratio, 100, "quadratic time would be 400 times")


NOW = 1_790_000_000.0  # 21 September 2026, 14:13:20 UTC
EVIL = ("<script>alert(1)</script><img src=//evil.test/x onerror=alert(2)>\u202etxt\u2066"
        " \x1b]0;x\x07 \"'&amp;]]>{x}$words\\1\ud800")


def target_of(run=12, ref="refs/heads/main", **more):
    """Return an object of `status --json`."""
    repo = more.pop("repo", "octo/site")
    return {"repo": repo, "ref": ref, "branch": ref.split("/", 2)[2], "hook": f"{repo} *",
            "directory": "/srv/site", "run": run, "state": "ok", "event": "push",
            "cause": "delivery", "commit": sha(run), "subject": "Fix the menu", "pusher": "mona",
            "began": NOW - 308, "ended": NOW - 300, "duration": 8.25, "exit": 0,
            "last_good": sha(run), "running": None, "waiting": [], "paused": None, **more}


def run_of(run=12, state="ok", **more):
    """Return an object of `status REPO BRANCH --json`."""
    return {"run": run, "state": state, "event": "push", "cause": "delivery", "commit": sha(run),
            "subject": "Fix the menu", "pusher": "mona", "queued": NOW - 309, "began": NOW - 308,
            "ended": NOW - 300, "duration": 8.25, "exit": 0, "note": "", **more}


def snapshot_of(*targets, runs=None, totals=(), output=None, up=True):
    """Return a snapshot in which each target has the one run that it names, or `runs`."""
    known = [[run_of(one["run"], one["state"])] if runs is None and one["run"] else runs or []
             for one in targets]
    return hookd.Snapshot(NOW, up, list(targets), known, list(totals), output or {})


class Reader(HTMLParser):
    """Read a page as a browser does: its text, its elements, what it would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.ids, self.links, self.times = [], [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.append(tag)
        self.ids += [named["id"]] if "id" in named else []
        self.links += [value for name, value in attributes if name in ("href", "src", "srcset")]
        self.times += [named] if tag == "time" else []
        assert not [name for name in named if name.startswith("on")], named

    def handle_data(self, data):
        if self.tags[-1:] != ["style"] or not data.strip().startswith(":root"):
            self.words.append(data)


class PageText(unittest.TestCase):
    """What the page's files say, built from a snapshot."""

    def read(self, *targets, **more):
        return Reader(hookd.page_html(snapshot_of(*targets, **more)))

    def test_the_headline_says_how_it_stands(self):
        ok, failed = target_of(1), target_of(2, "refs/heads/dev", state="failed")
        table = (((), "No run has ended yet", "\u2713"), ((ok,), "1 of 1 targets ok", "\u2713"),
                 ((ok, failed), "1 of 2 targets ok", "\u2717"),
                 ((target_of(None, state=None, running=4),), "No run has ended yet", "\u2713"))
        for state in ("failed", "timeout", "interrupted", "cancelled"):
            table += (((target_of(5, state=state),), "0 of 1 targets ok", "\u2717"),)
        for targets, words, sign in table:
            with self.subTest(words, states=[one["state"] for one in targets]):
                runs = [] if any(one["state"] is None for one in targets) else None
                page = hookd.page_html(snapshot_of(*targets, runs=runs))
                self.assertIn(f"{sign} {words}", Reader(page).text)
                self.assertIn(f"<title>{sign} ", page)

    def test_a_stopped_daemon_is_not_taken_for_a_good_one(self):
        page = self.read(target_of(), up=False)
        self.assertIn("\u2717 hookd is stopped", page.text)
        self.assertNotIn("Rewritten every minute", page.text)
        self.assertNotIn(" ago", page.text)

    def test_the_page_says_when_it_was_written_and_what_its_age_means(self):
        page = self.read(target_of())
        self.assertRegex(page.text, r"Written \d+ September 2026, \d\d:\d\d:20 \w+ ?\. Rewritten "
                                    "every minute: if this is older, hookd is not running")
        self.assertEqual(page.times[0]["datetime"], "2026-09-21T14:13:20Z")

    def test_a_date_is_words_with_the_exact_time_behind_them(self):
        table = ((0, "0 seconds ago"), (1, "1 second ago"), (119.9, "119 seconds ago"),
                 (120, "2 minutes ago"), (7199, "119 minutes ago"), (7200, "2 hours ago"),
                 (172799, "47 hours ago"), (172800, "2 days ago"), (40 * 86400, "40 days ago"),
                 (-5, "0 seconds ago"))
        for past, words in table:
            with self.subTest(words):
                time_element = Reader(hookd.moment(NOW - past, NOW))
                self.assertEqual(time_element.text, words)
                self.assertRegex(time_element.times[0]["title"],
                                 r"^[1-9]\d? \w+ 2026, [\d:]{8} \w+$")
                self.assertRegex(time_element.times[0]["datetime"], r"^2026-[\d-]+T[\d:]{8}Z$")

    def test_each_target_links_to_its_newest_run_and_what_failed_comes_first(self):
        targets = (target_of(12), target_of(9, "refs/heads/dev", state="failed"),
                   target_of(14, "refs/tags/v1", repo="octo/shop", running=15, waiting=[16, 17]))
        newest = [run_of(17, "queued", began=None, ended=None, duration=None, exit=None),
                  run_of(15, "running", ended=None, duration=None, exit=None), run_of(14)]
        snapshot = snapshot_of(*targets)
        page = Reader(hookd.page_html(snapshot._replace(runs=[*snapshot.runs[:2], newest])))
        links = [one for one in page.links if one.startswith("#")]
        self.assertEqual(links, ["#run-9", "#run-12", "#run-17"])
        self.assertLessEqual({one[1:] for one in links}, set(page.ids))
        self.assertEqual(len(page.ids), len(set(page.ids)))
        self.assertIn("octo/shop tags/v1", page.text)
        self.assertIn("run 15 is running \u00b7 2 waiting", page.text)

    def test_a_state_is_a_word_and_a_sign_besides_its_colour(self):
        states = ("ok", "failed", "timeout", "interrupted", "cancelled", "superseded", "queued",
                  "running")
        runs = [run_of(number, state) for number, state in enumerate(states)]
        text = self.read(target_of(), runs=runs).text
        for state in states:
            self.assertRegex(text, rf"[\u2713\u2717!\u2013\u25b8\u2026] {state}\b")

    def test_a_run_says_who_what_why_and_how_long(self):
        run = run_of(12, "failed", cause="rollback", duration=125, exit=3, note="of the script")
        text = self.read(target_of(), runs=[run]).text
        for words in (sha(12)[:7], "Fix the menu", "run 12 \u00b7 rollback \u00b7 by mona",
                      "took 125 s", "exit 3", "of the script", "5 minutes ago"):
            self.assertIn(words, text)

    def test_unknown_facts_are_left_out(self):
        nothing = dict.fromkeys(("commit", "subject", "pusher", "began", "ended", "duration",
                                 "exit", "note", "cause"))
        page = self.read(target_of(None, state=None, waiting=[3], **nothing),
                         runs=[run_of(3, "queued", **nothing)])
        self.assertNotIn("None", page.text)
        self.assertIn("#run-3", page.links)

    def test_output_is_shown_as_text(self):
        page = self.read(target_of(), output={12: "\x1b[31mred\n\tx\x1b]0;t\x07\r\ny"})
        self.assertIn("details", page.tags)
        self.assertRegex(page.text, r"\\x1b\[31mred x\\x1b\]0;t\\x07 y")
        self.assertNotIn("details", self.read(target_of()).tags)

    def test_what_strangers_wrote_stays_text(self):
        target = target_of(3, f"refs/heads/{EVIL[:-1]}", subject=EVIL, pusher=EVIL, paused=EVIL,
                           state="failed")
        snapshot = snapshot_of(target, runs=[run_of(3, "failed", subject=EVIL, pusher=EVIL,
                                                    note=EVIL)], output={3: EVIL})
        page = hookd.page_html(snapshot)
        reader = Reader(page)
        self.assertNotIn("script", reader.tags)
        self.assertNotIn("img", reader.tags)
        self.assertGreaterEqual(reader.text.count("<script>alert(1)</script><img src=//evil"), 7)
        self.assertTrue(page.isascii() or not re.search(
            "[\0-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", page))
        ElementTree.fromstring(hookd.badge_svg(target))

    def test_the_page_fetches_and_runs_nothing(self):
        page = hookd.page_html(snapshot_of(target_of(), output={12: "x"}))
        reader = Reader(page)
        self.assertEqual(set(reader.tags), {
            "html", "meta", "title", "link", "style", "main", "h1", "h2", "b", "i", "p", "ul", "ol",
            "li", "div", "a", "code", "bdi", "time", "details", "summary", "pre"})
        for link in reader.links:
            self.assertRegex(link, r"(?s)^(#run-\d+|data:image/svg\+xml,<svg .*)$")
        icons = {"ok": "%2323693b", "failed": "%23ab2f27"}
        for state, colour in icons.items():
            told = hookd.page_html(snapshot_of(target_of(state=state)))
            self.assertIn(f"fill='{colour}'", told)
        self.assertIn("default-src 'none'", page)
        self.assertNotRegex(page, "@import|url\\(|refresh")

    def test_a_badge_is_an_image_with_a_title(self):
        space = "{http://www.w3.org/2000/svg}"
        for state in ("ok", "failed", "timeout", "interrupted", "cancelled", None):
            for branch in ("main", "a" * 200, "\u4e2d\u6587/\u5206\u652f", "<&>\"'"):
                with self.subTest(state=state, branch=branch):
                    text = hookd.badge_svg(target_of(12, f"refs/heads/{branch}", state=state))
                    image = ElementTree.fromstring(text)
                    word = state or "no run yet"
                    self.assertEqual(image.get("role"), "img")
                    self.assertEqual(image.find(f"{space}title").text, image.get("aria-label"))
                    self.assertEqual(image.get("aria-label"), f"octo/site {branch[:40]}: {word}")
                    self.assertEqual([one.text for one in image.iter(f"{space}text")],
                                     [branch[:40], word])

    def test_metrics_have_help_type_and_each_line_once(self):
        targets = (target_of(12, state="failed", paused="x", waiting=[13, 14]),
                   target_of(9, "refs/tags/main", duration=None),
                   target_of(None, "refs/heads/main", repo="octo/new", state=None),
                   target_of(5, 'refs/heads/a"\\\nb', repo="Octo/Shop", state=None))
        totals = [("octo/site", "main", "ok", 7, NOW - 900),
                  ("octo/site", "main", "failed", 1, NOW), ("octo/site", "gone", "ok", 1, NOW)]
        text = hookd.metrics_text(snapshot_of(*targets, totals=totals))
        values = {}
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                self.assertNotIn(name, values)
                values[name] = float(value)
                base = name.partition("{")[0]
                self.assertRegex(text, rf"# HELP {base} .+\n# TYPE {base} (gauge|counter)\n")
        main = '{repo="octo/site",branch="main"}'
        for name, value in (
                ("hookd_up", 1), ("hookd_page_written_timestamp_seconds", NOW),
                ('hookd_runs_total{repo="octo/site",branch="main",state="ok"}', 7),
                ('hookd_runs_total{repo="octo/site",branch="main",state="failed"}', 1),
                (f"hookd_last_run_duration_seconds{main}", 8.25),
                (f"hookd_last_success_timestamp_seconds{main}", NOW - 900),
                ('hookd_last_success_timestamp_seconds{repo="octo/site",branch="gone"}', None),
                (f"hookd_waiting{main}", 2), (f"hookd_paused{main}", 1),
                ('hookd_paused{repo="octo/shop",branch="a\\"\\\\\\nb"}', 0)):
            self.assertEqual(values.get(name), value, f"{name}\n{text}")
        self.assertIn("\nhookd_up 0\n", hookd.metrics_text(snapshot_of(up=False)))


class PageFiles(Case):
    """How the page gets into its directory."""

    def write(self, *targets, **more):
        hookd.write_page(str(self.home), snapshot_of(*targets, **more))

    def files(self):
        return sorted(str(one.relative_to(self.home)) for one in self.home.rglob("*")
                      if one.is_file())

    def test_every_file_is_there(self):
        targets = (target_of(), target_of(3, "refs/heads/dev", repo="octo/shop"),
                   target_of(None, "refs/heads/new", state=None))
        self.write(*targets)
        self.assertEqual(self.files(), [
            "badge/octo/shop/dev.svg", "badge/octo/site/main.svg", "badge/octo/site/new.svg",
            "index.html", "metrics.prom", "status.json"])
        self.assertEqual(json.loads((self.home / "status.json").read_text()), list(targets))

    def test_a_file_is_replaced_by_a_rename_and_only_when_it_changes(self):
        self.write(target_of())
        with open(self.home / "index.html") as reader:
            self.write(target_of(state="failed"))
            self.assertIn("1 of 1 targets ok", reader.read())  # a reader keeps what it opened
        self.assertIn("0 of 1 targets ok", (self.home / "index.html").read_text())
        files = self.files()
        before = [(self.home / name).stat().st_mtime_ns for name in files]
        self.write(target_of(state="failed"))
        self.assertEqual([(self.home / name).stat().st_mtime_ns for name in files], before)
        self.assertEqual(self.files(), files)

    def test_badges_of_branches_that_are_gone_are_removed(self):
        self.write(target_of(), target_of(3, "refs/heads/dev"), target_of(4, repo="octo/shop"))
        foreign = ["badge/mine.svg", "badge/octo/site/notes.txt", "badge/octo/site/mine.svg",
                   "mine.html"]
        for name in foreign:
            (self.home / name).write_text("x")
        self.write(target_of())
        self.assertEqual(self.files(), sorted([
            *foreign, "badge/octo/site/main.svg", "index.html", "metrics.prom", "status.json"]))

    def test_a_planted_link_is_not_followed(self):
        precious = self.home / "precious"
        precious.write_text("keep")
        for name in ("index.html.new", "metrics.prom.new"):
            (self.home / name).symlink_to(precious)
        (self.home / "status.json").symlink_to(precious)
        self.write(target_of())
        self.assertEqual(precious.read_text(), "keep")
        self.assertFalse((self.home / "status.json").is_symlink())
        self.assertFalse((self.home / "index.html.new").is_symlink())

    def test_a_page_on_which_nothing_changes_is_written_again(self):
        script = self.home / "heartbeat.py"
        script.write_text(HEARTBEAT)
        self.assertEqual(run_script(script), "True\n")

    def test_a_burst_is_written_at_most_once_a_second_and_ends_with_the_newest(self):
        state, written = [0], []

        def write():
            written.append((time.monotonic(), state[0]))

        messenger = hookd.Messenger(print, write)
        started = time.monotonic()
        while time.monotonic() - started < 2.5:
            state[0] += 1
            messenger.show()
            time.sleep(0.002)
        messenger.close(PATIENCE)
        self.assertEqual(written[-1][1], state[0])
        for (before, _), (after, _) in zip(written, written[1:-1]):  # the last is that of a stop
            self.assertGreaterEqual(after - before, 0.99)
        self.assertGreaterEqual(len(written), 3)


class Reports(ReportCase):
    """Commit statuses, as a forge sees them from a real daemon."""

    def report_to(self, forge, *sections, **keys):
        return self.serve(*sections, report_token=TOKEN, report_api=forge.api, **keys)

    def wait_for_states(self, daemon, forge, *states):
        daemon.wait(lambda: len(forge.taken) >= len(states), f"{len(states)} reports")
        self.assertEqual(forge.states(), list(states))

    def test_a_run_is_shown_on_the_commit_that_it_deploys(self):
        forge, origin = self.forge(), self.repository()
        commit = origin.commit(index="one")
        daemon = self.report_to(forge, hook(NOTE, git=origin.path), catch_up="no",
                                report_url="https://x.test/{repo}/{slug}#run-{run}")
        self.assert_answer(daemon.push(commit=sha("claimed")), 202)
        self.wait_for_states(daemon, forge, "pending", "success")
        for status in forge.taken:
            self.assertEqual(status.path, f"/api/v3/repos/octo/site/statuses/{commit}")
            self.assertEqual(status.body["context"], "hookd/main")
            self.assertEqual(status.body["target_url"], "https://x.test/octo/site/main#run-1")
            self.assertTrue(0 < len(status.body["description"]) <= 140, status.body)
            self.assertEqual(status.headers["Authorization"], f"token {TOKEN}")

    def test_pending_is_told_while_the_command_runs(self):
        forge = self.forge()
        daemon = self.report_to(forge, hook(GATE))
        daemon.push()
        self.wait_for_states(daemon, forge, "pending")
        self.assertNotIn("target_url", forge.taken[0].body)
        daemon.open_gate()
        self.wait_for_states(daemon, forge, "pending", "success")

    def test_how_a_run_ended_is_the_state_of_the_commit(self):
        forge = self.forge()
        daemon = self.report_to(forge, hook("exit 2", "fails"), hook("sleep 60", "stuck"),
                                hook("sleep 60", "hangs", timeout="1s"), jobs=3)
        for branch in ("fails", "hangs", "stuck"):
            self.assert_answer(daemon.push(branch, sha(branch)), 202)
        daemon.wait_for_run(3)
        self.assertEqual(daemon.hookd("cancel", "3").code, 0)
        for branch, state in (("fails", "failure"), ("hangs", "failure"), ("stuck", "error")):
            with self.subTest(branch):
                daemon.wait(lambda: len(forge.states(sha(branch))) == 2, branch)  # noqa: B023
                self.assertEqual(forge.states(sha(branch)), ["pending", state])

    def test_a_run_that_is_cut_off_twice_is_an_error_on_the_commit(self):
        forge = self.forge()
        daemon = self.report_to(forge, hook('echo begun >> "$HOME/begun"; sleep 60'))
        daemon.push()
        for times in (1, 2):
            daemon.wait(lambda: daemon.read("begun").count("begun") == times,  # noqa: B023
                        "the run")
            daemon.kill()
            daemon.start()
        daemon.wait(lambda: forge.states()[-1:] == ["error"], "the error")
        self.assertEqual(set(forge.states()[:-1]), {"pending"})

    def test_what_fails_before_the_commit_is_known_is_shown_on_the_pushed_one(self):
        forge, origin = self.forge(), self.repository()
        origin.commit(index="one")
        daemon = self.report_to(forge, hook(NOTE, "*", git=origin.path), catch_up="no")
        daemon.push("nobranch", sha("pushed"))
        daemon.wait(lambda: forge.states()[-1:] == ["failure"], "the failure")
        self.assertEqual({one.path.rpartition("/")[2] for one in forge.taken}, {sha("pushed")})

    def test_runs_that_never_began_and_deletions_show_nothing(self):
        forge = self.forge()
        daemon = self.report_to(forge, hook(GATE, "main", on_delete="true"))
        daemon.push(commit=sha("first"))
        daemon.wait_for_run(1)
        self.assert_answer(daemon.push(commit=sha("second")), 202)
        self.assert_answer(daemon.push(commit=sha("third")), 202, "in place of")
        self.assert_answer(daemon.push(commit=sha("skipped"), head_commit={
            "id": sha("skipped"), "message": "Tidy [skip deploy]"}), 200)
        daemon.open_gate()
        daemon.settle()
        self.assert_answer(daemon.post(deletion_of("main")), 202)
        daemon.settle()
        daemon.push(commit=sha("last"), created=True)
        daemon.wait(lambda: len(forge.states(sha("last"))) == 2, "the last reports")
        self.assertEqual(forge.states(), ["pending", "success"] * 3)
        self.assertEqual([forge.states(sha(name)) for name in ("second", "skipped")], [[], []])

    def test_a_restart_in_the_middle_leaves_no_commit_pending(self):
        for name, kill in (("a crash", True), ("a stop", False)):
            with self.subTest(name):
                home = self.home / name.replace(" ", "-")
                home.mkdir()
                self.home, outer = home, self.home
                forge = self.forge()
                daemon = self.report_to(forge, hook(GATE))
                daemon.push()
                self.wait_for_states(daemon, forge, "pending")
                forge.always = 503
                daemon.open_gate()
                daemon.settle()
                daemon.wait(lambda: len(forge.taken) > 1, "a try in vain")  # noqa: B023
                daemon.kill() if kill else daemon.stop()
                before, forge.always = len(forge.taken), 201
                daemon.start()
                daemon.wait(lambda: len(forge.taken) > before, "the report")  # noqa: B023
                self.assertEqual(forge.states()[-1], "success")
                self.home = outer

    def test_the_token_may_lie_in_a_file(self):
        forge = self.forge()
        (self.home / "token").write_text(TOKEN + "\n")
        (self.home / "token").chmod(0o600)
        daemon = self.serve(hook("true"), report_token_file=self.home / "token",
                            report_api=forge.api)
        daemon.push()
        self.wait_for_states(daemon, forge, "pending", "success")
        self.assertEqual(forge.taken[0].headers["Authorization"], f"token {TOKEN}")

    def test_without_a_token_nothing_is_sent(self):
        forge = self.forge()
        daemon = self.serve(hook("true"), hook("true", "dev", report_token=TOKEN),
                            report_api=forge.api)
        daemon.push(commit=sha("main"))
        daemon.settle()
        daemon.push("dev", sha("dev"))
        daemon.wait(lambda: len(forge.taken) == 2, "the reports of dev")
        self.assertEqual(forge.states(sha("main")), [])

    def test_each_kind_of_fault_is_logged_once_with_its_remedy(self):
        forge = self.forge(always=403)
        daemon = self.report_to(forge, hook("true"))
        for number in range(3):
            daemon.push(commit=sha(number))
            daemon.wait(lambda: len(forge.taken) == 2 * number + 2, "the reports")  # noqa: B023
        forge.always = 401
        daemon.push(commit=sha("last"))
        daemon.wait_for_log("401, the forge does not know the token")
        told = [line for line in daemon.log.splitlines() if "cannot be sent" in line]
        self.assertEqual(len(told), 2, told)
        self.assertIn("repo:status", told[0])
        self.assertIn(forge.api, told[0])

    def test_a_forge_that_never_answers_delays_and_changes_no_run(self):
        forge = self.forge(always=HANG)
        daemon = self.report_to(forge, hook(NOTE, queue="every"))
        commits = [sha(number) for number in range(4)]
        for commit in commits:
            self.assert_answer(daemon.push(commit=commit), 202)
        self.assertEqual(daemon.settled()["state"], "ok")
        self.assertEqual(daemon.seen(), commits)
        self.assertEqual(len(forge.taken), 1)
        started = time.monotonic()
        self.assertEqual(daemon.stop(), 0)
        self.assertLess(time.monotonic() - started, 14)

    def test_the_token_is_shown_nowhere(self):
        forge = self.forge(always=403)
        (self.home / "page").mkdir()
        (self.home / "words").write_text(f"the token is {TOKEN}\n")
        look = '{ env; cat /proc/[0-9]*/cmdline; } >> "$HOME/seen-by-scripts" || :'
        daemon = self.report_to(forge, hook(f'{look}; cat "$HOME/words"; exit 1', on_failure=look),
                                page=self.home / "page", page_output="yes")
        daemon.push(commit=sha("a"))
        daemon.wait(lambda: len(forge.taken) == 2, "the reports")
        self.assertEqual(daemon.settled()["state"], "failed")
        daemon.wait_for_log("cannot be sent")
        daemon.wait(lambda: "***" in daemon.read("page/index.html"), "the page")
        verbs = (("status",), ("status", "--json"), ("status", "octo/site", "main"), ("check",),
                 ("check", "octo/site", "main"), ("log",), ("log", "1"),
                 ("status", "octo/site", "main", "--json"))
        told = {" ".join(verb): "".join(map(str, (x.out, x.err)))
                for verb in verbs for x in [daemon.hookd(*verb)]}
        told.update({"the log": daemon.log, "scripts": daemon.read("seen-by-scripts"),
                     "ps": daemon.read(f"/proc/{daemon.process.pid}/cmdline")})
        told.update({str(x): x.read_text() for x in (self.home / "page").rglob("*") if x.is_file()})
        for place, text in told.items():
            with self.subTest(place):
                self.assertTrue(text, place)
                self.assertNotIn(TOKEN, text)
        daemon.stop()

    def test_check_judges_the_address_and_online_the_token(self):
        forge = self.forge(always=403)
        for api, word in (("http://git.example.com/api/v1", "unencrypted"),
                          ("nonsense", "https://")):
            with self.subTest(api):
                told = self.prepare(hook("true"), report_token=TOKEN, report_api=api).hookd("check")
                self.assertIn("report_api", told.out + told.err)
                self.assertIn(word, told.out + told.err)
        daemon = self.prepare(hook("true"), report_token=TOKEN, report_api=forge.api)
        self.assertEqual(daemon.hookd("check").code, 0)
        self.assertEqual(forge.taken, [])
        told = daemon.hookd("check", "--online")
        self.assertIn("repo:status", told.out + told.err)
        self.assertNotIn(TOKEN, told.out + told.err)
        forge.always = 422
        told = daemon.hookd("check", "--online")
        self.assertEqual(told.code, 0, told)
        self.assertEqual({one.path.rpartition("/")[2] for one in forge.taken}, {"0" * 40})

    def test_a_rollback_is_shown_on_the_commit_that_it_restores(self):
        forge, origin = self.forge(), self.repository()
        good = origin.commit(index="one")
        daemon = self.report_to(forge, hook("! grep -q two index", git=origin.path), catch_up="no")
        daemon.push(commit=good)
        daemon.settle()
        bad = origin.commit(index="two")
        daemon.push(commit=bad)
        daemon.wait(lambda: forge.states(bad) == ["pending", "failure"], "the failure")
        self.assertEqual(daemon.hookd("rollback", "octo/site", "main").code, 0)
        daemon.wait(lambda: len(forge.states(good)) == 4, "the reports of the rollback")
        self.assertEqual(forge.states(good), ["pending", "success"] * 2)


class Page(Case):
    """The page's directory, as a web server sees it beside a real daemon."""

    def show_page(self, *sections, **keys):
        self.page = self.home / "page"
        self.page.mkdir()
        return self.serve(*sections, page=self.page, **keys)

    def read(self, name="index.html"):
        path = self.page / name
        return path.read_text() if path.exists() else ""

    def wait_for_text(self, daemon, text, name="index.html"):
        daemon.wait(lambda: text in self.read(name), f"{text!r} in {name}")

    def metric(self, name, **labels):
        """Return the value of a metric, None where it is missing."""
        pairs = ",".join(f'{key}="{value}"' for key, value in labels.items())
        found = re.search(rf"(?m)^{re.escape(name + (f'{{{pairs}}}' if pairs else ''))} (\S+)$",
                          self.read("metrics.prom"))
        return found and float(found[1])

    def test_every_file_follows_a_run_from_its_start_to_its_end(self):
        daemon = self.show_page(hook(GATE))
        self.wait_for_text(daemon, "No run has ended yet")
        self.assertEqual(json.loads(self.read("status.json")), [])
        self.assertEqual(self.metric("hookd_up"), 1)
        daemon.push()
        self.wait_for_text(daemon, "run 1 is running")
        daemon.open_gate()
        self.wait_for_text(daemon, "1 of 1 targets ok")
        reader = Reader(self.read())
        for words in ("octo/site main", sha("commit")[:7], "Say hello", "by mona", "run 1"):
            self.assertIn(words, reader.text)
        self.assertEqual(json.loads(self.read("status.json")),
                         json.loads(daemon.hookd("status", "--json").out))
        at = {"repo": "octo/site", "branch": "main"}
        self.assertEqual(self.metric("hookd_runs_total", **at, state="ok"), 1)
        self.assertAlmostEqual(self.metric("hookd_last_success_timestamp_seconds", **at),
                               time.time(), delta=PATIENCE)
        for name in ("last_run_duration_seconds", "waiting", "paused"):
            self.assertIsNotNone(self.metric(f"hookd_{name}", **at), name)
        self.assertIn("octo/site main: ok", self.read("badge/octo/site/main.svg"))

    def test_a_failure_a_pause_and_what_waits_are_shown(self):
        daemon = self.show_page(hook("exit 3"))
        daemon.push()
        self.wait_for_text(daemon, "0 of 1 targets ok")
        self.assertIn("exit 3", self.read())
        self.assertIn("octo/site main: failed", self.read("badge/octo/site/main.svg"))
        self.assertEqual(daemon.hookd("pause", "octo/site", "main", "-m", "moving <house>").code, 0)
        self.wait_for_text(daemon, "moving &lt;house&gt;")
        daemon.push(commit=sha("next"))
        self.wait_for_text(daemon, "1 waiting")
        at = {"repo": "octo/site", "branch": "main"}
        self.assertEqual((self.metric("hookd_waiting", **at), self.metric("hookd_paused", **at)),
                         (1, 1))

    def test_a_stop_leaves_a_page_that_says_so(self):
        daemon = self.show_page(hook("true"))
        daemon.push()
        self.wait_for_text(daemon, "1 of 1 targets ok")
        self.assertEqual(daemon.stop(), 0)
        self.assertIn("hookd is stopped", self.read())
        self.assertEqual(self.metric("hookd_up"), 0)
        daemon.start()
        self.wait_for_text(daemon, "1 of 1 targets ok")
        self.assertEqual(self.metric("hookd_up"), 1)

    def test_output_is_shown_only_when_asked_for(self):
        for wanted in (None, "yes"):
            with self.subTest(page_output=wanted):
                self.home = Path(tempfile.mkdtemp(dir=self.home))
                daemon = self.show_page(hook("seq 1 300; echo said"), page_output=wanted)
                daemon.push()
                self.wait_for_text(daemon, "1 of 1 targets ok")
                lines = Reader(self.read()).text.split()
                self.assertEqual("said" in lines, bool(wanted))
                self.assertEqual("202" in lines, bool(wanted))
                self.assertNotIn("200", lines)

    def test_secrets_are_shown_as_stars(self):
        secret = "a-secret-of-the-webhook"
        (self.home / "variables").write_text("API_KEY='hunter2 hunter2'\nSHORT=abc\n")
        daemon = self.show_page(
            hook(f'echo "$API_KEY $SHORT {secret} https://me:pass@x.test/"',
                 environment_file=self.home / "variables"), page_output="yes", secret=secret)
        payload = push_of(pusher={"name": f"mona {secret}"}, head_commit={
            "id": sha("commit"), "message": "Use hunter2 hunter2"})
        self.assert_answer(daemon.post(payload, secret=secret), 202)
        self.wait_for_text(daemon, "*** abc *** https://***@x.test/")
        self.wait_for_text(daemon, "1 of 1 targets ok")
        for text in (self.read(), self.read("status.json"), daemon.hookd("log").out,
                     *(daemon.hookd(*verb).out for verb in (
                         ("status",), ("status", "--json"), ("status", "octo/site", "main")))):
            self.assertIn("***", text)
            for hidden in ("hunter2", "me:pass", secret):
                self.assertNotIn(hidden, text)

    def test_a_missing_folder_is_made(self):
        self.page = self.home / "www/page"
        daemon = self.serve(hook(NOTE), page=self.page)
        daemon.push()
        self.wait_for_text(daemon, "1 of 1 targets ok")

    def test_a_folder_that_cannot_be_made_is_told_once_and_costs_no_run(self):
        (self.home / "page").touch()
        daemon = self.prepare(hook(NOTE), page=self.home / "page")
        self.assertRegex(daemon.hookd("check").err, "page: .* is no directory")
        daemon.start()
        for number in range(3):
            daemon.push(commit=sha(number))
            daemon.settle()
        daemon.wait_for_log("the page cannot be written")
        self.page = self.home / "page"
        self.page.unlink()
        daemon.push(commit=sha("last"))
        daemon.settle()
        self.wait_for_text(daemon, "1 of 1 targets ok")
        self.assertEqual(daemon.log.count("the page cannot be written"), 1)
        self.assertEqual(len(daemon.seen()), 4)

    def test_totals_never_go_back(self):
        daemon = self.show_page(hook("true"), keep=1)
        at = {"repo": "octo/site", "branch": "main", "state": "ok"}
        for number in range(3):
            daemon.push(commit=sha(number))
            daemon.settle()
        daemon.wait(lambda: self.metric("hookd_runs_total", **at) == 3, "a total of 3")
        daemon.kill()
        (self.page / "metrics.prom").unlink()
        daemon.start()
        daemon.wait(lambda: self.metric("hookd_runs_total", **at) == 3, "the same total")

    def test_a_deleted_branch_leaves_the_page_and_takes_its_badge_along(self):
        daemon = self.show_page(hook("true", "*"))
        for branch in ("main", "feature/x"):
            daemon.push(branch)
        self.wait_for_text(daemon, "2 of 2 targets ok")
        badges = {path.name for path in (self.page / "badge/octo/site").iterdir()}
        self.assertEqual(len(badges), 2)
        daemon.post(deletion_of("feature/x"))
        self.wait_for_text(daemon, "1 of 1 targets ok")
        self.assertNotIn("feature/x", self.read())
        daemon.wait(lambda: {x.name for x in (self.page / "badge/octo/site").iterdir()}
                    == {"main.svg"}, "the badge to go")

    def test_a_reload_turns_the_page_on_and_off(self):
        daemon = self.serve(hook("true"))
        self.page = self.home / "page"
        self.page.mkdir()
        daemon.reload(self.ini(hook("true"), page=self.page))
        self.wait_for_text(daemon, "No run has ended yet")
        daemon.reload(self.ini(hook("true")))
        daemon.wait(lambda: daemon.log.count("reloaded") == 2, "the second reload")
        daemon.push()
        daemon.settle()
        self.assertNotIn("octo/site", self.read())


# ---------------------------------------------------------------- Decisions


class Brain(unittest.TestCase):
    """The queue's brain: values go in; rows and values come out. No socket, thread or process."""

    INI = section("octo/site", queue="every") + "\n".join((
        hook("true", "a"), hook("true", "b", lock="one"), hook("true", "c", lock="one"),
        hook("true", "replaced", queue="replace"), hook("true", "newest", queue="newest"),
        hook("true", "gone", on_delete="true"), hook("true", "*", directory="/srv/shared")))

    one_at_a_time = threading.Lock()  # a logger has one list of handlers, for all threads

    @contextmanager
    def errors_logged(self):
        with self.one_at_a_time, self.assertLogs("hookd", "ERROR") as log:
            yield log

    def setUp(self):
        self.state = tempfile.mkdtemp(prefix="hookd-test-")
        self.addCleanup(shutil.rmtree, self.state)
        for name in ("runs", "locks"):
            os.mkdir(os.path.join(self.state, name))
        self.bodies = itertools.count()
        self.read(self.INI)

    def read(self, *sections):
        """Begin, or begin again, with this ini."""
        text = "\n".join(sections)
        self.config = hookd.Ini("hookd.ini", self.state, text, self.state).config()
        return self.start()

    def start(self):
        """Begin with what is on disk, as after a crash; return what follows from that."""
        if hasattr(self, "store"):
            self.store.close()
        self.store = hookd.Store(self.state, serves=True)
        self.addCleanup(self.store.close)
        self.dispatcher = hookd.Dispatcher(self.config, self.store, self.fail)
        self.jobs = {}
        self.moves = []
        self.store.connect().create_function("note_move", 2, lambda *move: self.moves.append(move))
        self.store.execute("CREATE TEMP TRIGGER moves AFTER UPDATE OF state ON main.runs "
                           "BEGIN SELECT note_move(old.state, new.state); END")
        return self.dispatcher.recover()

    def push(self, branch="a", **fields):
        push = hookd.Push("push", "octo/site", f"refs/heads/{branch}", sha(next(self.bodies)))
        return push._replace(**fields)

    def delivered(self, branch="a", **fields):
        """Return the value of a push that was judged good; `connection` is its branch."""
        push = self.push(branch, **fields)
        name = push.commit or f"body {next(self.bodies)}"
        decision = hookd.Decision(202, "", self.config.hook_for(push), push, b"{}", name)
        return hookd.Delivered(branch, "a delivery", decision)

    def ended(self, run, state="ok", **fields):
        return hookd.Ended(self.jobs[run], hookd.Outcome(state, **fields), 1.0)

    def turn(self, *events, begins=True):
        """Return what follows from events; keep the jobs that began."""
        effects = self.dispatcher.turn(events, begins)
        for effect in effects:
            if isinstance(effect, hookd.Job):
                self.jobs[effect.run.id] = effect
            if isinstance(effect, hookd.Done):
                self.jobs.pop(effect.job.run.id, None)
        return effects

    def write(self, sql, *values):
        """Write as a verb would, or as time passes."""
        with self.store.transaction():
            return self.store.execute(sql, *values)

    def let_time_pass(self):
        self.store.execute("UPDATE runs SET not_before = 0")

    def later(self, *events):
        """Take a turn when the waiting is over."""
        with self.store.transaction():
            self.let_time_pass()
        return self.turn(*events)

    def queue(self, branch, cause, **facts):
        """Queue a run as a verb does; return its number."""
        push, store = self.push(branch), self.store
        found = self.config.hook_for(push)
        with store.transaction():
            target = store.target(found, push.repo, push.ref)
            return store.add(target, push, cause, found, payload=b"{}", **facts)

    def states(self):
        return dict(self.store.execute("SELECT id, state FROM runs ORDER BY id").fetchall())

    def row(self, run, names):
        """Return one or several columns of a run."""
        found = self.store.execute(f"SELECT {names} FROM runs WHERE id = ?", run).fetchone()
        return found if "," in names else found[0]

    def begun(self, effects):
        return [effect.run.id for effect in effects if isinstance(effect, hookd.Job)]

    def answers(self, effects):
        return [(effect.connection, effect.status) for effect in effects
                if isinstance(effect, hookd.Answer)]

    def texts(self, effects):
        return [effect.text for effect in effects if isinstance(effect, hookd.Answer)]

    def lines(self, effects):
        return [(logging.getLevelName(effect.level), effect.text) for effect in effects
                if isinstance(effect, hookd.Line)]

    def reports(self, effects):
        return [effect for effect in effects if isinstance(effect, hookd.Report)]


class Decisions(Brain):
    """The moves of a run, and a turn as a whole."""

    MOVES = {  # the contract's states, and how a run may go from one to another
        "queued": {"running", "superseded", "cancelled"},
        "running": {"ok", "failed", "timeout", "cancelled", "interrupted", "superseded", "queued"},
        "ok": set(), "failed": set(), "timeout": set(), "cancelled": set(), "interrupted": set(),
        "superseded": set()}

    def test_every_move_of_the_table_is_made_and_every_other_refused(self):
        self.turn(self.delivered())
        for old in self.MOVES:
            for new in (*self.MOVES, "", "RUNNING", None):
                with self.subTest(f"{old} -> {new}"), self.store.transaction():
                    self.store.execute("UPDATE runs SET state = ?", old)
                    if new in self.MOVES[old]:
                        self.store.move(1, new)
                        self.assertEqual(self.states(), {1: new})
                    else:
                        with self.assertRaises(ValueError):
                            self.store.move(1, new)
                        self.assertEqual(self.states(), {1: old})

    def test_a_push_is_answered_and_begins_in_one_turn_and_its_end_is_a_row(self):
        effects = self.turn(self.delivered())
        self.assertEqual(self.answers(effects), [("a", 202)])
        self.assertEqual(self.begun(effects), [1])
        self.assertEqual(self.states(), {1: "running"})
        effects = self.turn(self.ended(1))
        self.assertEqual([type(effect).__name__ for effect in effects], ["Line", "Done"])
        self.assertRegex(effects[0].text, "^run 1 ok: octo/site a at ")
        self.assertEqual(self.states(), {1: "ok"})

    def test_a_value_that_raises_costs_itself_alone(self):
        bad = self.delivered("b")
        bad = bad._replace(decision=bad.decision._replace(push=None))
        with self.errors_logged() as log:
            effects = self.turn(self.delivered("a"), bad, self.delivered("c"))
        self.assertEqual(self.answers(effects), [("a", 202), ("b", 500), ("c", 202)])
        self.assertEqual(self.begun(effects), [1, 2])
        self.assertIn("Traceback", log.output[0])
        with self.errors_logged():
            effects = self.turn(self.ended(1, "no state"), self.ended(2, "failed", exit=3))
        self.assertEqual(self.states(), {1: "running", 2: "failed"})
        effects = self.turn(self.delivered("gone"))
        self.assertEqual(self.begun(effects), [3], "the queue goes on")

    def test_a_job_hands_over_its_end_before_a_stop_may_count_it_as_ended(self):
        self.dispatcher.tell = lambda event: ends.append(event.job.through)
        ends = []
        self.turn(self.delivered())
        self.jobs[1].perform = lambda: hookd.Outcome("ok")
        self.jobs[1].work()
        self.assertEqual((ends, self.jobs[1].through), ([False], True))

    def test_a_second_end_of_a_run_changes_nothing(self):
        self.turn(self.delivered())
        end = self.ended(1)
        self.turn(end)
        with self.errors_logged():
            self.turn(end._replace(outcome=hookd.Outcome("failed", 1)))
        self.assertEqual(self.states(), {1: "ok"})

    def test_when_the_commit_fails_nothing_of_the_turn_has_happened(self):
        self.turn(self.delivered())
        events = (self.ended(1), self.delivered("b"))
        with closing(sqlite3.connect(f"{self.state}/hookd.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with self.assertRaises(sqlite3.Error):
                self.turn(*events)
            other.execute("ROLLBACK")
        self.assertEqual(self.states(), {1: "running"})
        effects = self.turn(*events)
        self.assertEqual(self.answers(effects), [("b", 202)])
        self.assertEqual(self.states(), {1: "ok", 2: "running"})

    def test_a_newer_push_ends_the_running_one_where_it_is_to_be_replaced(self):
        self.turn(self.delivered("replaced"))
        effects = self.turn(self.delivered("replaced"))
        self.assertEqual([effect.run for effect in effects if isinstance(effect, hookd.End)], [1])
        self.assertEqual(self.states(), {1: "running", 2: "queued"})

    def test_what_a_crash_left_is_queued_twice_at_most(self):
        self.turn(self.delivered())
        for state in ("queued", "interrupted"):
            os.makedirs(f"{self.state}/runs/1", exist_ok=True)
            Path(self.state, "runs/1/begun").touch()  # its script had begun
            self.store.close()
            effects = self.start()
            self.assertRegex(effects[-1].text, "^run 1 was cut off ")
            self.assertEqual(self.states(), {1: state})
            self.turn()

    def test_whatever_happens_every_move_is_in_the_table(self):
        chance = random.Random(20260103)
        ends = ("ok", "failed", "timeout", "cancelled", "interrupted", "superseded", "queued")
        branches = ("a", "b", "c", "replaced", "newest", "gone", "x", "y", "z")
        seen = set()
        for _ in range(600):
            events = []
            if chance.random() < 0.6:
                deleted = chance.random() < 0.2
                events.append(self.delivered(chance.choice(branches), deleted=deleted))
            for run in list(self.jobs):
                if chance.random() < 0.4:
                    self.jobs[run].begun = chance.random() < 0.5
                    events.append(self.ended(run, chance.choice(ends)))
            with self.store.transaction():
                self.let_time_pass()
                if chance.random() < 0.2:
                    self.store.pause(("octo/site", f"refs/heads/{chance.choice(branches)}"), "")
                if chance.random() < 0.2:
                    self.store.lift("1")
            chance.shuffle(events)
            self.turn(*events)
            self.check_running()
            seen.update(self.moves)
            if chance.random() < 0.05:
                self.store.close()
                self.start()
                self.check_running()
        self.drain()
        seen.update(self.moves)
        table = {(old, new) for old, states in self.MOVES.items() for new in states}
        self.assertEqual(seen - table, set())
        self.assertEqual(table - seen, set(), "the walk has to come by every move")

    def check_running(self):
        """Check that no two runs have one lock or directory, nor more run than there are jobs."""
        rows = self.store.execute(
            "SELECT t.directory, r.lock FROM runs r JOIN targets t ON t.id = r.target "
            "WHERE r.state = 'running'").fetchall()
        self.assertLessEqual(len(rows), self.config.jobs)
        self.assertEqual(len({directory for directory, _ in rows}), len(rows))
        locks = [lock for _, lock in rows if lock]
        self.assertEqual(len(set(locks)), len(locks))

    def drain(self):
        """Let all that waits come to its end: nothing may be forgotten."""
        for _ in range(2000):
            with self.store.transaction():
                self.let_time_pass()
                self.store.lift("1")
            self.turn(*(self.ended(run) for run in list(self.jobs)))
            if not {"queued", "running"} & set(self.states().values()):
                return
        self.fail(f"these wait for ever: {self.states()}")


class Deliveries(Brain):
    """What becomes of a push, a deletion and a commit that catch-up found."""

    def test_the_answer_names_the_run_the_push_and_what_it_replaces(self):
        self.turn(self.delivered("newest"))
        first, second, third = (self.delivered("newest") for _ in range(3))
        self.turn(first)
        self.assertEqual(self.texts(self.turn(second, third)), [
            f"queued run 3: {second.decision.push}, in place of run 2",
            f"queued run 4: {third.decision.push}, in place of run 3"])
        self.assertEqual(str(third.decision.push), f"octo/site newest at {sha(3)[:7]}")
        self.assertEqual(self.states(), {1: "running", 2: "superseded", 3: "superseded",
                                         4: "queued"})
        self.assertEqual(self.row(2, "note, payload"), ("by run 3", None))

    def test_with_every_each_push_waits_its_turn(self):
        effects = self.turn(*(self.delivered("a") for _ in range(3)))
        self.assertNotIn("in place of", " ".join(self.texts(effects)))
        self.assertEqual(self.begun(effects), [1])
        self.assertEqual(self.begun(self.turn(self.ended(1))), [2])
        self.assertEqual(self.begun(self.turn(self.ended(2, "failed", exit=1))), [3])

    def test_with_replace_the_answer_names_the_run_that_ends_once(self):
        self.turn(self.delivered("replaced"))
        effects = self.turn(self.delivered("replaced"))
        self.assertIn(", in place of run 1", self.texts(effects)[0])
        self.assertEqual(self.row(1, "wish"), "by run 2")
        effects = self.turn(self.delivered("replaced"))
        self.assertIn(", in place of run 2", self.texts(effects)[0])
        self.assertEqual(self.row(1, "wish"), "by run 2", "the first to ask is the one who did")
        self.turn(self.ended(1, "cancelled"))
        self.assertEqual(self.begun(self.later()), [3])

    def test_replace_does_not_end_what_a_verb_began_nor_anything_while_paused(self):
        self.queue("replaced", "run")
        self.turn()
        effects = self.turn(self.delivered("replaced"))
        self.assertEqual(self.row(1, "wish"), "")
        self.turn(self.ended(1))
        self.later()
        with self.store.transaction():
            self.store.pause(("octo/site", ""), "moving house")
        effects = self.turn(self.delivered("replaced"))
        self.assertRegex(self.texts(effects)[0], "^queued run 3: .*; paused: moving house$")
        self.assertEqual(self.row(2, "state, wish"), ("running", ""))

    def test_a_push_takes_no_place_of_a_run_that_a_verb_queued(self):
        self.turn(self.delivered("newest"))
        for cause in ("run", "rollback"):
            self.queue("newest", cause)
        self.assertNotIn("in place", self.texts(self.turn(self.delivered("newest")))[0])
        self.assertEqual(self.states(), {1: "running", 2: "queued", 3: "queued", 4: "queued"})

    def test_a_late_push_is_ignored_and_with_git_deploys_the_newest_commit(self):
        for number, keys in enumerate(({}, {"git": "/srv/origin"})):
            with self.subTest(keys):
                branch = f"late{number}"
                self.read(hook("true", branch, **keys))
                self.turn(self.delivered(branch, order=9))
                effects = self.turn(self.delivered(branch, order=8))
                text, = self.texts(effects)
                self.assertEqual(self.answers(effects), [(branch, 202 if keys else 200)])
                if keys:
                    self.assertRegex(text, "^queued run")
                else:
                    self.assertEqual(text, f"ignored: octo/site {branch} had a newer push already")
                newest = self.store.value("SELECT ordinal FROM targets WHERE ref = ?",
                                          f"refs/heads/{branch}")
                self.assertEqual(newest, 9, "a late push is never the newest")

    def test_what_orders_pushes(self):
        first, second = sha("first"), sha("second")
        for what, old, new, late in (
                ("a higher order", {"order": 5}, {"order": 6}, False),
                ("a lower order", {"order": 5}, {"order": 4}, True),
                ("an order of another event", {"order": 5, "event": "release"}, {"order": 4},
                 False),
                ("no order behind one that has", {"order": 5}, {"before": first}, False),
                ("an order behind none, older", {"before": second}, {"order": 5}, True),
                ("no order, and it follows the newest", {}, {"before": first}, False),
                ("no order, and it is where an older one began", {"before": second}, {}, True),
                ("an equal order that follows", {"order": 5}, {"order": 5, "before": first}, False),
                ("an equal order, older", {"order": 5, "before": second}, {"order": 5}, True),
                ("no order, and nothing tells", {}, {"before": sha("else")}, False),
                ("a deletion of the newest", {},
                 {"deleted": True, "commit": "", "before": first}, False)):
            with self.subTest(what):
                for name in ("runs", "targets", "taken"):
                    self.write(f"DELETE FROM {name}")
                self.turn(self.delivered(**{"commit": first, **old}), begins=False)
                status = self.texts(self.turn(self.delivered(**{"commit": second, **new}),
                                              begins=False))[0]
                self.assertEqual("newer push already" in status, late, status)

    def test_a_repeated_body_is_taken_only_while_it_is_the_newest(self):
        taken = "SELECT count(*) FROM taken"
        for branch, order in (("a", 0), ("b", 5)):
            first, second = (self.delivered(branch, order=order) for _ in range(2))
            for event, late in ((first, False), (first, False), (second, False), (first, True),
                                (second, False)):
                text, = self.texts(self.turn(event, begins=False))
                self.assertEqual("newer push already" in text, late, text)
            self.assertGreater(self.store.value(taken), 0)
            self.turn(self.delivered(branch, order=6), begins=False)
            self.assertEqual(self.store.value(taken), 0, "a higher order makes them late anyway")

    def test_a_deletion_cancels_what_waits_and_lifts_the_pauses_of_its_branch(self):
        self.turn(self.delivered("a"), self.delivered("a"), self.delivered("x"),
                  self.delivered("y"), self.delivered("x"))
        with self.store.transaction():
            self.store.pause(("octo/site", "refs/heads/a"), "")
            self.store.pause(("octo/site", ""), "")
        effects = self.turn(self.delivered("a", commit="", deleted=True))
        self.assertEqual([(effect.status, effect.text) for effect in effects
                          if isinstance(effect, hookd.Answer)],
                         [(200, "ignored: octo/site a was deleted")])
        self.assertEqual(self.row(2, "state, note"), ("cancelled", "the branch was deleted"))
        self.assertEqual(self.row(1, "state"), "running")
        self.assertEqual([self.row(run, "state") for run in (4, 5)], ["queued", "queued"])
        self.assertEqual(self.store.execute("SELECT ref FROM pauses").fetchall(), [("",)])
        text, = self.texts(self.turn(self.delivered("gone", commit="", deleted=True)))
        self.assertRegex(text, r"^queued run 6: octo/site gone \(deleted\)")

    def test_a_branch_that_was_deleted_is_listed_again_when_it_is_pushed_again(self):
        listed = "SELECT gone FROM targets WHERE ref = 'refs/heads/a'"
        for deleted in (False, True, False):
            self.turn(self.delivered("a", deleted=deleted), begins=False)
            self.assertEqual(self.store.value(listed), int(deleted))

    def test_catch_up_queues_what_nothing_saw(self):
        self.read(hook("true", "main", git="/srv/origin"),
                  hook("true", "*", git="/srv/origin", queue="every"))
        exact, pattern = self.config.hooks.values()
        one, two = sha(1), sha(2)

        def found(hook, **heads):
            return self.turn(hookd.Found(hook, "octo/site", {
                f"refs/heads/{name}": commit for name, commit in heads.items()}), begins=False)

        self.assertEqual(self.lines(found(exact, main=one, other=one)), [
            ("INFO", f"queued run 1: octo/site main at {one[:7]}, found by catch-up")])
        self.assertEqual(self.row(1, "cause, commit_id, ref"),
                         ("catch-up", one, "refs/heads/main"))
        self.assertEqual(found(exact, main=one), [], "it was seen")
        self.assertEqual(len(found(exact, main=two)), 1)
        self.assertEqual(self.states(), {1: "superseded", 2: "queued"})
        self.assertEqual(found(pattern, main=two, other=one), [], "at first they are noted")
        self.assertEqual(len(found(pattern, other=two, new=one)), 2)
        self.assertEqual(len(found(pattern, other=one)), 1)
        self.assertEqual(set(self.states().values()), {"superseded", "queued"})
        self.assertEqual(list(self.states().values()).count("queued"), 4, "`every` keeps each")
        bad = hookd.Found(pattern, "octo/site", {"refs/heads/a..b": one, "HEAD": one})
        self.assertEqual(self.turn(bad, begins=False), [])

    def test_catch_up_ends_nothing_that_runs(self):
        self.read(hook("true", "main", git="/srv/origin"))
        self.turn(self.delivered("main"))
        hook_of = self.config.hooks["octo/site main"]
        self.turn(hookd.Found(hook_of, "octo/site", {"refs/heads/main": sha("tip")}))
        self.assertEqual(self.row(1, "state, wish"), ("running", ""))

    def test_the_repositories_of_a_hook_are_its_own_or_those_that_pushed(self):
        self.read(hook("true", "main"), hook("true", "*", repo="octo/*"))
        own, all_of_octo = self.config.hooks.values()
        self.assertEqual(self.store.repositories(own), ["octo/site"])
        self.assertEqual(self.store.repositories(all_of_octo), [])
        self.turn(self.delivered("x"), self.delivered("y"), self.delivered("x", repo="octo/app"))
        self.assertEqual(sorted(self.store.repositories(all_of_octo)), ["octo/app", "octo/site"])

    def test_catch_up_knows_what_a_delivery_brought(self):
        self.read(hook("true", "main", git="/srv/origin"))
        push = self.delivered("main")
        self.turn(push)
        heads = {"refs/heads/main": push.decision.push.commit}
        hook_of = self.config.hooks["octo/site main"]
        self.assertEqual(self.turn(hookd.Found(hook_of, "octo/site", heads)), [])

    def test_what_verbs_want_follows_from_the_next_turn(self):
        self.turn(self.delivered("a"))
        self.write("UPDATE runs SET wish = 'by mona'")
        effects = self.turn()
        self.assertEqual([effect for effect in effects if isinstance(effect, hookd.End)],
                         [hookd.End(1, "by mona")])


class WhatBegins(Brain):
    """Which waiting run begins next, and what holds the others back."""

    def test_verbs_then_exact_branches_then_patterns_each_oldest_first(self):
        self.read("[hookd]\njobs = 1", section("octo/site", queue="every"),
                  hook("true", "a", directory="/srv/a"), hook("true", "*"))
        self.turn(self.delivered("a"))
        for branch in ("x", "y", "a", "a"):
            self.turn(self.delivered(branch))
        for branch in ("x", "a"):
            self.queue(branch, "run")
        order = []
        while self.jobs:
            run, = self.jobs
            order += self.begun(self.turn(self.ended(run)))
        self.assertEqual(order, [6, 7, 4, 5, 2, 3])

    def test_a_pattern_never_takes_the_last_of_several_jobs(self):
        for jobs, taken in ((1, 1), (2, 1), (3, 2)):
            with self.subTest(jobs=jobs):
                self.write("DELETE FROM runs")
                self.read(f"[hookd]\njobs = {jobs}", hook("true", "main"), hook("true", "*"))
                pushes = [self.delivered(name) for name in ("w", "x", "y", "z")]
                self.assertEqual(len(self.begun(self.turn(*pushes))), taken)
                begun = self.begun(self.turn(self.delivered("main")))
                self.assertEqual(len(begun), jobs - taken)

    def test_nothing_begins_where_nothing_may(self):
        effects = self.turn(self.delivered("a"), begins=False)
        self.assertEqual(self.begun(effects), [])
        self.assertEqual(self.begun(self.turn()), [1])
        self.assertEqual(self.begun(self.turn()), [])

    def test_a_lock_that_becomes_free_wakes_one_waiter(self):
        self.turn(self.delivered("b"))
        self.turn(self.delivered("c"), self.delivered("b"), self.delivered("c"))
        waits = "SELECT id, waits FROM runs WHERE state = 'queued' ORDER BY id"
        self.assertEqual([why for _, why in self.store.execute(waits)],
                         ["lock one", f"directory {self.state}/work/octo/site/b", "lock one"])
        self.assertEqual(self.store.why(2), "behind run 1 (lock one)")
        self.assertEqual(self.store.why(3), "behind run 1")
        self.assertEqual(self.begun(self.turn(self.ended(1))), [2])
        self.assertEqual(self.begun(self.turn(self.ended(2))), [3])
        self.assertEqual(self.begun(self.turn(self.ended(3))), [4])

    def test_a_woken_run_that_ends_before_it_begins_wakes_the_next(self):
        self.read("[hookd]\njobs = 3", section("octo/site", queue="every"),
                  hook("true", "b", lock="one"), hook("true", "c", lock="one"))
        self.turn(self.delivered("b"))
        self.turn(self.delivered("b"), self.delivered("c"))
        self.turn(self.ended(1), begins=False)
        with self.store.transaction():
            self.store.move(2, "cancelled")
        self.assertEqual(self.begun(self.turn()), [3])

    def test_a_paused_run_waits_and_lets_others_begin(self):
        for words in (("octo/site", "refs/heads/b"), ("octo/site", ""), ("", "")):
            with self.subTest(words):
                self.write("DELETE FROM runs")
                self.start()
                with self.store.transaction():
                    self.store.pause(words, "why not")
                self.turn(self.delivered("b"))
                run, = self.states()
                self.assertEqual(self.states(), {run: "queued"})
                self.assertEqual(self.store.why(run), "paused: why not")
                verb = self.queue("c", "run")
                self.assertEqual(self.begun(self.turn()), [verb], "a verb's run is not held back")
                self.turn(self.ended(verb))
                with self.store.transaction():
                    lifted = self.store.lift("repo = ? AND ref = ?", *words)
                self.assertEqual(lifted, 1)
                self.assertEqual(self.begun(self.turn()), [run])

    def test_a_pause_of_something_else_holds_nothing_back(self):
        with self.store.transaction():
            self.store.pause(("octo/site", "refs/heads/b"), "")
            self.store.pause(("octo/other", ""), "")
        self.assertEqual(self.begun(self.turn(self.delivered("a"))), [1])

    def test_a_pause_by_a_person_keeps_its_reason(self):
        place, why = ("octo/site", "refs/heads/a"), "SELECT why FROM pauses"
        for run, given, kept in ((0, "mine", "mine"), (7, "rolled back", "mine")):
            with self.store.transaction():
                self.store.pause(place, given, run)
            self.assertEqual(self.store.value(why), kept)
        self.write("UPDATE pauses SET run = 7")
        with self.store.transaction():
            self.store.pause(place, "rolled back again", 8)
        self.assertEqual(self.store.value(why), "rolled back again")

    def test_a_rollbacks_pause_holds_back_all_that_share_its_releases(self):
        self.read(hook("true", "*", git="/srv/origin", releases="2", directory="/srv/site"))
        self.turn(self.delivered("x"))
        self.turn(self.ended(1))
        with self.store.transaction():
            self.store.pause(("octo/site", "refs/heads/x"), "rolled back", 7, 1)
        self.assertEqual(self.begun(self.turn(self.delivered("y"))), [])
        self.assertEqual(self.store.why(2), "paused: rolled back")

    def test_a_burst_goes_on_although_the_run_before_it_has_ended(self):
        self.turn(self.delivered("newest"))
        self.turn(self.delivered("newest"), begins=False)
        end = self.row(2, "burst_end")
        self.turn(self.ended(1), self.delivered("newest"), begins=False)
        self.assertEqual(self.row(3, "waits, burst_end"), ("time", end))

    def test_a_burst_begins_when_it_is_quiet_and_at_its_end_at_last(self):
        self.turn(self.delivered("newest"))
        begins = []
        for _ in range(3):
            before = time.time()
            self.turn(self.delivered("newest"), begins=False)
            run = max(self.states())
            quiet, end = self.row(run, "not_before, burst_end")
            self.assertEqual(self.row(run, "waits"), "time")
            self.assertLessEqual(quiet, min(time.time() + hookd.QUIET_SECONDS, end))
            self.assertGreaterEqual(end, before)
            begins.append(end)
        self.assertEqual(begins[0], begins[-1], "a burst does not move its own end")
        self.assertLessEqual(begins[0], time.time() + hookd.BURST_SECONDS)
        self.turn(self.ended(1))
        self.assertLessEqual(self.store.next_time(), hookd.QUIET_SECONDS)
        self.assertEqual(self.begun(self.later()), [4])
        self.assertEqual(self.store.next_time(), hookd.NEVER)

    def test_a_clock_that_was_set_back_holds_nothing_up(self):
        self.turn(self.delivered("newest"), self.delivered("a"))
        self.turn(self.delivered("newest"))
        self.turn(self.ended(1), self.ended(2, "queued", note="git fetch: no", delay=900,
                                            unreachable=True))
        hour = time.time() + 3600
        self.write("UPDATE runs SET not_before = ? WHERE id = 3", hour)
        self.assertEqual(self.begun(self.turn()), [3], "a burst never lasts as long")
        self.assertEqual(self.begun(self.turn()), [], "a retry may")
        self.write("UPDATE runs SET not_before = ? WHERE id = 2", hour)
        self.assertEqual(self.begun(self.turn()), [2], "but not an hour")

    def test_a_run_whose_hook_is_no_more_is_cancelled(self):
        self.turn(self.delivered("a"), begins=False)
        self.read(hook("true", "b"))
        effects = self.turn()
        self.assertEqual(self.begun(effects), [])
        self.assertEqual(self.row(1, "state"), "cancelled")
        self.assertIn("no such hook", self.row(1, "note"))
        level, text = self.lines(effects)[0]
        self.assertEqual(level, "WARNING")
        self.assertRegex(text, "^run 1 cancelled, its hook is no more: octo/site a at ")

    def test_a_run_begins_where_the_ini_in_force_says(self):
        self.turn(self.delivered("a"), begins=False)
        self.read(hook("true", "a", directory="/srv/elsewhere"))
        self.assertEqual(self.begun(self.turn()), [1])
        self.assertEqual(self.jobs[1].directory, "/srv/elsewhere")

    def test_a_deletion_is_no_release(self):
        self.read(hook("true", "main", git="/srv/origin", releases="2", on_delete="true"),
                  hook("true", "plain"))
        for branch, deleted, kind in (("main", False, hookd.ReleaseJob), ("main", True, hookd.Job),
                                      ("plain", False, hookd.Job)):
            self.turn(self.delivered(branch, deleted=deleted))
            run, = self.jobs
            self.assertIs(type(self.jobs[run]), kind)
            self.turn(self.ended(run))

    def test_a_job_knows_what_its_run_needs(self):
        self.turn(self.delivered("a", subject="One"))
        self.assertEqual(self.jobs[1].payload, b"{}")
        self.turn(self.ended(1))
        self.turn(self.delivered("a", subject="Two", pusher="mona"))
        job = self.jobs[2]
        self.assertEqual((job.run.last_state, job.run.last_good), ("ok", self.row(1, "commit_id")))
        self.assertEqual(job.held, {1})
        self.assertRegex(job.began, '^run 2 began: octo/site a at [0-9a-f]{7} pusher=mona '
                         'subject="Two" cause=delivery delivery=a delivery$')
        self.assertEqual(self.row(2, "seq"), 2)


class Endings(Brain):
    """What becomes of a run that a job gives back."""

    def finish(self, state="ok", branch="a", **fields):
        """Push, and end the run; return its number and what followed from its end."""
        self.turn(self.delivered(branch))
        run = max(self.jobs)
        return run, self.turn(self.ended(run, state, **fields))

    def test_the_history_says_how_a_run_ended(self):
        for state, level in (("ok", "INFO"), ("superseded", "INFO"), ("failed", "WARNING"),
                             ("timeout", "WARNING"), ("cancelled", "WARNING")):
            with self.subTest(state):
                run, effects = self.finish(state, exit=3, note="a note")
                self.assertEqual(self.row(run, "state, exit, note, duration, payload"),
                                 (state, 3, "a note", 1.0, None))
                self.assertAlmostEqual(self.row(run, "ended"), time.time(), delta=60)
                self.assertEqual(self.lines(effects)[0][0], level)
                self.assertRegex(self.lines(effects)[0][1],
                                 rf"^run {run} {state} \(a note\): octo/site a at [0-9a-f]{{7}} "
                                 "exit=3 seconds=1.0 cause=delivery delivery=a delivery$")

    def test_the_last_words_of_a_failed_run_are_quoted(self):
        self.turn(self.delivered())
        self.jobs[1].output = hookd.Output(os.path.join(self.state, "output.log"))
        self.addCleanup(self.jobs[1].output.close)
        self.jobs[1].output.write(b"\n".join(b"line %d" % n for n in range(30)))
        effects = self.turn(self.ended(1, "failed"))
        self.assertEqual(self.lines(effects)[1:], [
            ("WARNING", f"run 1 said: line {n}") for n in range(30 - hookd.QUOTED_LINES, 30)])

    def test_what_was_deployed_is_what_the_history_names(self):
        self.read(hook("true", "main", git="/srv/origin"))
        self.turn(self.delivered("main"))
        effects = self.turn(hookd.Named(self.jobs[1], sha("tip"), "Newer"))
        self.assertEqual(self.row(1, "commit_id, subject"), (sha("tip"), "Newer"))
        self.assertEqual(self.lines(effects), [
            ("INFO", f"run 1 deploys {sha('tip')}: octo/site main at {sha('tip')[:7]}")])
        job = self.jobs[1]
        job.commit, job.subject = sha("tip"), "Newer"
        self.turn(self.ended(1))
        self.assertEqual(self.row(1, "commit_id, subject"), (sha("tip"), "Newer"))
        self.assertEqual(self.turn(hookd.Named(job, sha("else"), "No")), [], "it has ended")

    def test_a_run_that_cannot_reach_its_remote_waits_and_says_so(self):
        self.turn(self.delivered())
        for tries, delay in ((1, 60.0), (2, 300.0)):
            effects = self.turn(self.ended(1, "queued", note="git fetch: no", delay=delay,
                                           unreachable=True))
            self.assertEqual(self.row(1, "state, tries, waits, note"),
                             ("queued", tries, "time", "git fetch: no"))
            self.assertAlmostEqual(self.row(1, "not_before"), time.time() + delay, delta=30)
            self.assertRegex(str(self.lines(effects)),
                             f"WARNING.*run 1 waits {delay:.0f} s: git fetch: no: octo/site a at")
            self.assertRegex(self.store.why(1), "^next try at ..:..:..: git fetch: no$")
            self.later()

    def test_a_lock_held_elsewhere_is_logged_once(self):
        self.turn(self.delivered())
        for logged in (1, 0, 0):
            effects = self.turn(self.ended(1, "queued", note="the lock is held", delay=0.5))
            self.assertEqual(len(self.lines(effects)), logged)
            self.assertEqual(self.row(1, "tries"), 0)
            self.assertLessEqual(self.store.next_time(), 0.5)
            self.later()

    def test_a_newer_push_takes_the_place_of_a_run_that_waits_again(self):
        self.turn(self.delivered("newest"))
        self.turn(self.delivered("newest"))
        self.turn(self.ended(1, "queued", note="git fetch: no", delay=60, unreachable=True))
        self.assertEqual(self.states(), {1: "superseded", 2: "queued"})
        self.turn(self.delivered("a"))
        self.turn(self.delivered("a"))
        self.turn(self.ended(3, "queued", note="git fetch: no", delay=60, unreachable=True))
        self.assertEqual([self.row(run, "state") for run in (3, 4)], ["queued", "running"],
                         "`every` keeps both")

    def test_a_newer_push_does_not_wait_for_the_next_try_of_a_remote(self):
        self.turn(self.delivered("newest"))
        self.turn(self.delivered("newest"))  # a burst
        self.turn(self.ended(1))
        self.assertEqual(self.begun(self.later()), [2])
        self.turn(self.ended(2, "queued", note="git fetch: no", delay=60, unreachable=True))
        self.assertEqual(self.begun(self.turn(self.delivered("newest"))), [3])

    def test_catch_up_asks_again_where_a_run_saw_no_commit(self):
        self.read(hook("true", "main", git="/srv/origin"))
        heads = "SELECT commit_id FROM heads"
        run, _ = self.finish("failed", "main")
        self.assertEqual(self.store.value(heads), self.row(run, "commit_id"))
        self.finish("failed", "main", unreachable=True)
        self.assertIsNone(self.store.value(heads))

    def test_a_run_sees_the_commit_that_it_deploys(self):
        self.read(hook("true", "main", git="/srv/origin"))
        heads = "SELECT commit_id FROM heads"
        self.turn(self.delivered("main"))
        self.jobs[1].commit = sha("tip")
        self.turn(self.ended(1))
        self.assertEqual(self.store.value(heads), sha("tip"))
        self.turn(self.delivered("main"))
        self.jobs[2].commit = sha("tip 2")
        newer = self.delivered("main")
        self.turn(newer)
        self.turn(self.ended(2))
        self.assertEqual(self.store.value(heads), newer.decision.push.commit,
                         "what was seen while it ran stays the newest")
        self.later()
        self.turn(self.ended(3))
        run = self.queue("main", "run", goal=sha("old"))
        self.turn()
        self.jobs[run].commit = sha("old")
        self.turn(self.ended(run))
        self.assertEqual(self.store.value(heads), newer.decision.push.commit,
                         "a certain commit is not the newest")

    def test_a_run_that_was_cut_off_is_queued_once_and_then_interrupted(self):
        self.turn(self.delivered(pusher="mona"))
        for state, owed in (("queued", 0), ("interrupted", 1)):
            self.jobs[1].begun = True
            effects = self.turn(self.ended(1, "interrupted"), begins=False)
            self.assertEqual(self.row(1, "state, owed"), (state, owed))
            level = "WARNING" if state == "queued" else "ERROR"
            self.assertEqual(self.lines(effects)[0][0], level)
            self.assertRegex(self.lines(effects)[0][1],
                             f"^run 1 was cut off and is {state}: octo/site a at .* pusher=mona")
            self.turn(begins=state == "queued")
        self.assertEqual(self.row(1, "exit, duration, note"), (1, 1.0, "cut off twice"))
        effects = self.turn()
        self.assertTrue(self.jobs[1].run.owed)
        self.assertEqual(self.row(1, "owed"), 3)
        self.turn(self.delivered())
        self.assertEqual(self.states(), {1: "interrupted", 2: "queued"}, "its directory is held")
        self.turn(self.ended(1, "interrupted", note="cut off twice; told"))
        self.assertEqual(self.row(1, "owed, note"), (0, "cut off twice; told"))
        self.assertEqual(self.states(), {1: "interrupted", 2: "running"})

    def test_a_cut_off_before_the_script_counts_for_nothing(self):
        self.turn(self.delivered())
        for _ in range(4):
            self.turn(self.ended(1, "interrupted"), begins=False)
            self.assertEqual(self.row(1, "state, attempts"), ("queued", 0))
            self.turn()

    def test_a_cut_off_run_that_is_to_be_cancelled_is_cancelled(self):
        self.turn(self.delivered())
        self.write("UPDATE runs SET wish = 'by mona'")
        self.turn(self.ended(1, "interrupted"), begins=False)
        self.assertEqual(self.row(1, "state, note, owed"), ("cancelled", "by mona", 0))

    def test_a_cut_off_release_owes_the_way_back_a_deletion_does_not(self):
        self.read(hook("true", "main", git="/srv/origin", releases="2", on_delete="true"))
        for deleted, owed in ((False, 1), (True, 0)):
            self.turn(self.delivered("main", deleted=deleted))
            run = max(self.jobs)
            self.turn(self.ended(run, "interrupted"), begins=False)
            self.assertEqual(self.row(run, "state, owed"), ("queued", owed))
            self.write("UPDATE runs SET owed = 0, state = 'ok' WHERE id = ?", run)

    def test_what_is_left_to_do_behind_a_lock_held_elsewhere_is_tried_again(self):
        self.turn(self.delivered())
        self.jobs[1].begun = True
        self.write("UPDATE runs SET attempts = 1")
        self.turn(self.ended(1, "interrupted"), begins=False)
        for _ in range(2):
            self.turn()
            self.turn(self.ended(1, "queued", note="the lock is held", delay=0.5), begins=False)
            self.assertEqual(self.row(1, "state, owed, note"), ("interrupted", 1, "cut off twice"))
            self.assertLessEqual(self.store.next_time(), 0.5)
            self.assertEqual(self.begun(self.turn()), [], "not at once")
            self.later()
            self.assertIn(1, self.jobs)

    def test_a_switch_that_nobody_can_confirm_any_more_is_told(self):
        self.turn(self.delivered())
        self.write("UPDATE runs SET state = 'interrupted', owed = 1")
        os.makedirs(f"{self.state}/runs/1")
        for mark, level in (("made", []), ("switched", ["ERROR"])):
            Path(self.state, "runs/1", mark).touch()
            self.write("UPDATE runs SET owed = 1")
            self.read(hook("true", "another"))
            lines = self.lines(self.turn())
            self.assertEqual([level for level, _ in lines], level)
            self.assertEqual(self.row(1, "owed"), 0)
        self.assertRegex(lines[0][1], r"no \[octo/site a\] .*/current stays unconfirmed")

    def test_a_crash_while_it_settles_leaves_the_way_back_alone(self):
        self.turn(self.delivered())
        self.write("UPDATE runs SET state = 'interrupted', owed = 3")
        self.start()
        self.assertEqual(self.row(1, "owed"), 2)
        self.assertEqual(self.begun(self.turn()), [1])
        self.assertTrue(self.jobs[1].run.owed)

    def test_a_newer_push_takes_the_place_of_what_a_crash_cut_off(self):
        self.turn(self.delivered("newest"), self.delivered("a"))
        self.turn(self.delivered("newest"), self.delivered("a"))
        self.start()
        self.assertEqual(self.states(), {1: "superseded", 2: "queued", 3: "queued", 4: "queued"})

    def test_a_crash_lets_what_waited_for_a_lock_look_again(self):
        self.turn(self.delivered("b"))
        self.turn(self.delivered("c"))
        self.assertEqual(self.row(2, "waits"), "lock one")
        self.write("UPDATE runs SET state = 'ok' WHERE id = 1")
        self.start()
        self.assertEqual(self.begun(self.turn()), [2])

    def test_a_run_whose_database_was_removed_is_told(self):
        self.turn(self.delivered())
        end = self.ended(1)
        self.write("DELETE FROM runs")
        effects = self.turn(end)
        self.assertRegex(str(self.lines(effects)), "run 1 ok, but its database was removed")
        self.assertIsInstance(effects[-1], hookd.Done)

    def test_a_failed_rollback_that_changed_nothing_lifts_its_pause(self):
        for state, changed, kept in (("failed", False, 0), ("failed", True, 1), ("ok", False, 1)):
            run = self.queue("a", "rollback")
            with self.store.transaction():
                self.store.pause(("octo/site", "refs/heads/a"), "rolled back", run)
            self.turn()
            self.jobs[run].changed = changed
            self.turn(self.ended(run, state))
            self.assertEqual(self.store.value("SELECT count(*) FROM pauses"), kept)

    def test_a_cancelled_rollback_that_never_began_lifts_its_pause(self):
        run = self.queue("a", "rollback")
        with self.store.transaction():
            self.store.pause(("octo/site", "refs/heads/a"), "rolled back", run)
            self.store.move(run, "cancelled")
        self.assertEqual(self.store.value("SELECT count(*) FROM pauses"), 0)

    def test_keep_bounds_the_history_of_each_target(self):
        self.read("[hookd]\nkeep = 3", hook("true", "newest"), hook("true", "a"))
        good, _ = self.finish("ok", "newest")
        other, _ = self.finish("ok", "a")
        forgotten = []
        for _ in range(6):
            self.turn(self.delivered("newest"))
            self.later()
            run = max(self.jobs)
            self.turn(self.delivered("newest"))
            self.turn(self.delivered("newest"))
            done = [effect for effect in self.turn(self.ended(run, "failed"))
                    if isinstance(effect, hookd.Done)]
            forgotten += done[0].forgotten
            self.later()
            self.turn(self.ended(max(self.jobs), "failed"))
        count = "SELECT count(*) FROM runs WHERE target = 1 AND state = ?"
        self.assertEqual(self.store.value(count, "failed"), 3)
        self.assertEqual(self.store.value(count, "superseded"), 3)
        self.assertEqual(self.row(good, "state"), "ok", "what stands is kept")
        self.assertEqual(self.row(other, "state"), "ok", "each target by itself")
        self.assertNotIn(good, forgotten)
        self.assertEqual(len(set(forgotten)), len(forgotten))

    def test_deleted_branches_share_one_history(self):
        self.read("[hookd]\nkeep = 2", hook("true", "*", on_delete="true"))
        for branch in ("x", "y", "z"):
            self.finish("ok", branch)
            self.turn(self.delivered(branch, commit="", deleted=True))
            self.turn(self.ended(max(self.jobs)))
        self.assertEqual(set(self.states()), {1, 3, 5, 6}, "what stands of each, and the newest 2")

    def test_releases_that_were_removed_are_no_way_back(self):
        self.read(hook("true", "main", git="/srv/origin", releases="2"))
        for run in (1, 2, 3):
            self.turn(self.delivered("main"))
            self.jobs[run].release, self.jobs[run].dropped = str(run), [str(run - 2)]
            self.turn(self.ended(run))
        self.assertEqual([self.row(run, "release") for run in (1, 2, 3)], ["", "2", "3"])
        self.turn(self.delivered("main"))
        self.assertEqual(self.jobs[4].releases, [("3", "ok"), ("2", "ok")])
        self.assertEqual(self.jobs[4].run.live, "3")


class History(Brain):
    """What the store says of targets and runs."""

    def target(self, branch):
        found, = (facts for facts in self.store.overview() if facts["branch"] == branch)
        return found

    def test_a_target_shows_its_last_run_and_what_runs_and_waits(self):
        self.read("[hookd]\njobs = 3", section("octo/site", queue="every"),
                  hook("true", "a"), hook("true", "*"))
        self.turn(self.delivered("a", subject="One", pusher="mona"), self.delivered("b"))
        self.assertEqual([self.target("a")[name] for name in ("run", "state", "commit", "running")],
                         [None, None, None, 1])
        self.turn(self.ended(1, exit=0))
        commit = self.row(1, "commit_id")
        for state in ("failed", "cancelled"):
            self.turn(self.delivered("a"))
            self.turn(self.ended(max(self.jobs), state, exit=3, note="a note"))
        self.turn(*(self.delivered("a") for _ in range(3)))
        self.queue("a", "run")
        facts = self.target("a")
        self.assertEqual({name: facts[name] for name in (
            "repo", "ref", "hook", "directory", "run", "state", "event", "cause", "exit", "note",
            "duration", "last_good", "running", "waiting", "paused", "gone")}, {
                "repo": "octo/site", "ref": "refs/heads/a", "hook": "octo/site a",
                "directory": f"{self.state}/work/octo/site/a", "run": 4, "state": "cancelled",
                "event": "push", "cause": "delivery", "exit": 3, "note": "a note", "duration": 1.0,
                "last_good": commit, "running": 5, "waiting": [8, 6, 7], "paused": None, "gone": 0})
        self.assertEqual((self.target("b")["running"], self.target("b")["waiting"]), (2, []))

    def test_a_target_shows_the_pause_that_holds_it_back(self):
        self.turn(self.delivered("a"))
        for words, why in ((("octo/site", "refs/heads/b"), None), (("octo/other", ""), None),
                           (("octo/site", "refs/heads/a"), "mine"), (("octo/site", ""), "mine")):
            with self.store.transaction():
                self.store.pause(words, "mine" if why else "not mine")
            self.assertEqual(self.target("a")["paused"], why)

    def test_releases_of_several_branches_share_a_line(self):
        self.read(hook("true", "*", git="/srv/origin", releases="2", directory="/srv/site"))
        self.turn(self.delivered("x"))
        self.turn(self.ended(1))
        self.turn(self.delivered("y"))
        facts, = self.store.overview()
        self.assertEqual((facts["branch"], facts["running"], facts["last_good"]),
                         ("x", 2, self.row(1, "commit_id")))

    def test_tags_share_a_line_that_names_the_newest(self):
        self.read(hook("true", "refs/tags/v*", directory="/srv/site"))
        for tag in ("v1", "v2"):
            self.turn(self.delivered(ref=f"refs/tags/{tag}"))
            self.turn(self.ended(max(self.jobs)))
        facts, = self.store.overview()
        self.assertEqual((facts["ref"], facts["branch"], facts["run"]), ("refs/tags/v2", "v2", 2))
        self.turn(self.delivered(ref="refs/tags/v3"))
        facts, = self.store.overview()
        self.assertEqual((facts["branch"], facts["running"]), ("v2", 3))

    def test_what_stands_is_the_newest_ok_run_that_was_no_deletion(self):
        self.read(hook("true", "a", on_delete="true"))
        self.turn(self.delivered("a"))
        self.turn(self.ended(1))
        self.turn(self.delivered("a"))
        self.turn(self.ended(2, "failed"))
        self.turn(self.delivered("a", commit="", deleted=True))
        self.turn(self.ended(3))
        self.turn(self.delivered("a"))
        self.assertEqual(self.jobs[4].run.last_good, self.row(1, "commit_id"))
        self.assertEqual(self.jobs[4].run.last_state, "ok")
        self.assertEqual([run for run, *_ in self.store.good(1)], [1])

    def test_a_run_says_what_it_waits_for(self):
        self.turn(self.delivered("a"))
        self.assertEqual(self.store.why(1), "")
        self.write("UPDATE runs SET note = 'its disk does not answer'")
        self.assertEqual(self.store.why(1), "its disk does not answer")
        self.turn(self.delivered("newest"), self.delivered("b"))
        self.turn(self.delivered("newest"))
        self.assertEqual(self.store.why(3), "for a free job")
        self.assertEqual(self.store.why(4), "", "for the end of a burst")
        self.write("UPDATE runs SET waits = 'lock of another'  WHERE id = 4")
        self.assertEqual(self.store.why(4), "for the lock of another")
        self.assertEqual(self.store.why(99), "")

    def test_a_name_is_spelled_as_the_newest_delivery_has_it(self):
        self.assertEqual(self.store.spelling("Octo/Site"), "Octo/Site")
        self.turn(self.delivered("a", repo="octo/Site"), self.delivered("a", repo="OCTO/site"))
        self.assertEqual(len(self.store.overview()), 1)
        self.assertEqual(self.store.spelling("octo/site"), "octo/Site")

    def test_the_totals_count_what_began_and_never_go_back(self):
        self.read("[hookd]\nkeep = 1", hook("true", "a"), hook("true", "newest"))
        for state in ("ok", "ok", "failed"):
            self.turn(self.delivered("a", repo="Octo/Site"))
            self.turn(self.ended(max(self.jobs), state))
        self.turn(self.delivered("newest"))
        self.turn(self.delivered("newest"), self.delivered("newest"))
        self.start()
        rows = self.store.execute("SELECT repo, branch, state, runs FROM totals").fetchall()
        self.assertEqual(sorted(rows), [("octo/site", "a", "failed", 1),
                                        ("octo/site", "a", "ok", 2)])

    def test_what_a_transaction_wrote_is_on_disk_or_was_never_there(self):
        self.assertEqual(self.store.value("PRAGMA synchronous"), 2)  # FULL
        self.assertEqual(self.store.value("PRAGMA journal_mode"), "wal")
        with self.assertRaises(KeyError), self.store.transaction():
            self.store.execute("INSERT INTO asked VALUES ('octo/site', '')")
            raise KeyError
        with self.store.transaction():
            with suppress(KeyError), self.store.savepoint():
                self.store.execute("INSERT INTO asked VALUES ('octo/site', '')")
                raise KeyError
            with self.store.savepoint():
                self.store.execute("INSERT INTO asked VALUES ('octo/app', '')")
        with closing(hookd.Store(self.state)) as other:
            self.assertEqual(other.execute("SELECT hook FROM asked").fetchall(), [("octo/app",)])

    def test_a_database_that_was_removed_or_replaced_is_opened_anew(self):
        for name in ("hookd.db", "hookd.db-wal"):
            with self.subTest(name):
                self.write("INSERT INTO asked VALUES (?, '')", name)
                os.unlink(f"{self.state}/{name}")
                self.turn(self.delivered("a"))
                with closing(hookd.Store(self.state)) as other:
                    self.assertEqual(other.value("SELECT state FROM runs"), "running")
                self.write("DELETE FROM runs")

    def test_a_new_database_gives_no_run_an_old_number(self):
        os.makedirs(f"{self.state}/runs/41")
        Path(self.state, "runs/42.bak").touch()
        self.store.close()
        for suffix in ("", "-wal", "-shm"):
            with suppress(FileNotFoundError):
                os.unlink(f"{self.state}/hookd.db{suffix}")
        self.start()
        self.turn(self.delivered("a"))
        self.assertEqual(set(self.states()), {42})


class Outbox(Brain):
    """Commit statuses: which follow from the moves of a run."""

    def begin_with(self, **keys):
        keys = {"report_token": "a token", **keys}
        self.read(hook("true", "main", report_url="https://x.example/{run}/{slug}", **keys))

    def test_a_run_is_pending_and_then_how_it_ended(self):
        for state, shown in (("ok", "success"), ("failed", "failure"), ("timeout", "failure"),
                             ("cancelled", "error")):
            with self.subTest(state):
                self.begin_with()
                pending, = self.reports(self.turn(self.delivered("main")))
                run = max(self.jobs)
                self.assertEqual(pending.body, {
                    "state": "pending", "context": "hookd/main",
                    "description": f"run {run} is running",
                    "target_url": f"https://x.example/{run}/main"})
                self.assertEqual((pending.repo, pending.commit, pending.token),
                                 ("octo/site", self.row(run, "commit_id"), "a token"))
                end, = self.reports(self.turn(self.ended(run, state, note="so" * 100)))
                self.assertEqual(end.body["state"], shown)
                self.assertEqual(end.body["description"], f"run {run} {state}: {'so' * 100}"[:140])
                self.turn(pending, end)
                self.assertEqual(self.store.value("SELECT count(*) FROM reports"), 0)

    def test_a_report_of_a_turn_that_was_not_committed_is_handed_on_by_the_next(self):
        self.begin_with()
        for sql in ("PRAGMA foreign_keys = ON", "CREATE TEMP TABLE one (id INTEGER PRIMARY KEY)",
                    "CREATE TEMP TABLE two (id REFERENCES one DEFERRABLE INITIALLY DEFERRED)",
                    """CREATE TEMP TRIGGER fails AFTER INSERT ON main.reports
                       BEGIN INSERT INTO two VALUES (1); END"""):
            self.store.execute(sql)
        event = self.delivered("main")
        with self.assertRaises(sqlite3.IntegrityError):
            self.turn(event)
        self.assertEqual(len(self.reports(self.turn(event))), 1)

    def test_with_git_a_run_is_pending_once_its_commit_is_known(self):
        self.begin_with(git="/srv/origin")
        self.assertEqual(self.reports(self.turn(self.delivered("main"))), [])
        report, = self.reports(self.turn(hookd.Named(self.jobs[1], sha("tip"), "")))
        self.assertEqual((report.commit, report.body["state"]), (sha("tip"), "pending"))

    def test_what_never_began_and_a_deletion_show_nothing(self):
        self.begin_with(on_delete="true")
        self.turn(self.delivered("main"))
        effects = self.turn(self.delivered("main"), self.delivered("main"))
        self.assertEqual(self.row(2, "state"), "superseded")
        self.assertEqual(self.reports(effects), [])
        self.turn(self.ended(1))
        effects = self.later()
        self.assertEqual(len(self.reports(self.turn(self.ended(3)))), 1)
        effects = self.turn(self.delivered("main", commit="", deleted=True))
        self.assertEqual(self.reports([*effects, *self.turn(self.ended(4))]), [])

    def test_what_fails_before_its_commit_is_known_is_shown_on_the_pushed_one(self):
        self.begin_with(git="/srv/origin")
        for state, shown in (("failed", ["failure"]), ("superseded", [])):
            push = self.delivered("main")
            self.turn(push)
            reports = self.reports(self.turn(self.ended(max(self.jobs), state)))
            self.assertEqual([report.body["state"] for report in reports], shown)
            self.assertEqual([report.commit for report in reports],
                             [push.decision.push.commit] * len(shown))
            self.assertTrue(all(report.body["description"].endswith(" failed")
                                for report in reports), reports)

    def test_a_run_that_ends_for_a_newer_one_does_not_stay_pending(self):
        self.begin_with(git="/srv/origin")
        self.turn(self.delivered("main"))
        self.turn(hookd.Named(self.jobs[1], sha("tip"), ""))
        report, = self.reports(self.turn(self.ended(1, "superseded")))
        self.assertEqual(report.body["state"], "error")

    def test_what_is_cancelled_before_it_began_shows_nothing(self):
        self.begin_with()
        self.turn(self.delivered("main"), begins=False)
        with self.store.transaction():
            self.store.move(1, "cancelled")
        self.assertEqual(self.reports(self.turn()), [])

    def test_without_a_token_nothing_is_kept(self):
        self.begin_with(report_token="")
        self.assertEqual(self.reports(self.turn(self.delivered("main"))), [])
        self.assertEqual(self.store.value("SELECT count(*) FROM reports"), 0)

    def test_what_was_not_sent_is_handed_on_again_after_a_restart(self):
        self.begin_with()
        first = self.reports(self.turn(self.delivered("main")))
        self.assertEqual(self.reports(self.turn()), [], "once")
        self.begin_with()
        self.assertEqual(self.row(1, "state"), "queued")
        again = self.reports(self.turn(begins=False))
        self.assertEqual([report.id for report in again], [first[0].id])

    def test_a_cut_off_run_that_is_shown_as_pending_does_not_stay_so(self):
        self.begin_with()
        self.turn(self.delivered("main"))
        self.write("UPDATE runs SET attempts = 1")
        self.jobs[1].begun = True
        report, = self.reports(self.turn(self.ended(1, "interrupted"), begins=False))
        self.assertEqual(report.body["state"], "error")


# ---------------------------------------------------------------- Command line


class CommandLine(Case):
    """Each verb, and how it exits."""

    VERBS = ("serve", "check", "run", "rollback", "cancel", "pause", "resume", "send", "status",
             "log", "secret")

    def test_help_and_version_need_no_ini(self):
        for arguments, (code, out, err) in self.in_one_process(
                ["--help"], *([verb, "--help"] for verb in self.VERBS)):
            with self.subTest(arguments):
                self.assertEqual((code, err), (0, ""))
                self.assertIn("usage: ", out)
        self.assertRegex(self.prepare().hookd("--version").out, r"\Ahookd \d.*Python 3\.9 or later")

    def test_a_wrong_command_line_exits_2(self):
        for arguments, (code, out, err) in self.in_one_process(
                ["deploy"], ["run"], ["run", "octo/site"], ["send", "--nonsense"], ["rollback"],
                ["rollback", "octo/site"], ["cancel"], ["--nonsense"],
                ["status", "octo/site", "main", "extra"]):
            with self.subTest(arguments):
                self.assertEqual((code, out), (2, ""))
                self.assertIn("usage: ", err)
        self.assertEqual(self.prepare(hook("true")).hookd("deploy").code, 2)

    def in_one_process(self, *rows):
        """Yield arguments with exit status and output of hookd, for each row of arguments."""
        code = """
import contextlib, hookd, io, json, sys
for row in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                ended = hookd.main(row)
            except SystemExit as error:
                ended = error.code
    print(json.dumps([row, [ended, out.getvalue(), err.getvalue()]]))
"""
        done = subprocess.run([sys.executable, "-c", code, json.dumps(rows)], cwd=HERE, check=True,
                              env=clean_environment(), stdout=subprocess.PIPE)
        return map(json.loads, done.stdout.splitlines())

    def test_the_ini_beside_hookd_is_the_default(self):
        shutil.copy(HOOKD, self.home / "hookd.py")
        daemon = self.prepare(hook("true", "a-branch-of-its-own"))
        done = subprocess.run([sys.executable, str(self.home / "hookd.py"), "check"], cwd="/",
                              env=daemon.environment, capture_output=True, check=True)
        self.assertIn(b"a-branch-of-its-own", done.stdout)

    def test_check_online_asks_each_remote(self):
        origin = Repository(self.home / "origin")
        origin.commit(page="one")
        here = section("octo/site main", git=origin.path)
        nowhere = section("octo/site dev", git=self.home / "nowhere")
        self.assertEqual(self.prepare(here).hookd("check", "--online").code, 0)
        daemon = self.prepare(here, nowhere)
        self.assertEqual(daemon.hookd("check").code, 0)
        told = daemon.hookd("check", "--online")
        self.assertEqual(told.code, 78)
        self.assertRegex(told.err + told.out, r"\[octo/site dev\] git: .*nowhere")

    def test_check_finds_what_would_fail_later(self):
        (self.home / "file").touch()
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            told = self.prepare(
                hook("true", "b", git="/nowhere", deploy_key=self.home / "no.key"),
                hook("true", "d", directory=self.home / "file/below"),
                listen=f"127.0.0.1:{port}").hookd("check")
        self.assertEqual(told.code, 78)
        for place, word in (("[octo/site b] deploy_key", "no.key"),
                            ("[octo/site d] directory", "file"),
                            ("[hookd] listen", str(port))):
            with self.subTest(place):
                line = [one for one in told.err.splitlines() if place in one]
                self.assertTrue(line, told.err)
                self.assertIn(word, line[0])

    def test_check_looks_for_git_where_the_hook_would(self):
        (self.home / "bin").mkdir()
        git = shutil.which("git")
        for name, path, own in (("hookd has it, the hook not", os.environ["PATH"], "/nowhere"),
                                ("the hook alone has it", str(self.home / "bin"),
                                 os.path.dirname(git))):
            with self.subTest(name):
                daemon = self.prepare(hook("true", git="/nowhere", environment=f"PATH={own}"),
                                      variables={"PATH": path})
                told = daemon.hookd("check")
                self.assertEqual((told.code, "no git in PATH" in told.err),
                                 (78, True) if own == "/nowhere" else (0, False), told)

    def test_check_is_content_while_the_daemon_runs(self):
        daemon = self.serve(hook("true"))
        daemon.configure(self.ini(hook("true"), listen=daemon.address))
        told = daemon.hookd("check")  # as ExecReload does
        self.assertEqual(told.code, 0, told)

    def test_run_knows_the_newest_commit_and_keeps_the_last_good_one(self):
        daemon = self.serve(hook('echo "$HOOKD_COMMIT $HOOKD_LAST_GOOD" >> "$HOME/seen"'))
        daemon.push(commit=sha(1))
        daemon.settle()
        for _ in range(2):
            daemon.hookd("run", "octo/site", "main")
        self.assertEqual(daemon.seen(), [sha(1)] * 5)

    def test_the_lock_of_a_run_names_its_process_and_its_number(self):
        daemon = self.serve(hook('cat "$HOME"/state/locks/*.lock'))
        told = daemon.hookd("run", "octo/site", "main").out
        self.assertRegex(told, rf"(?m)^hookd {daemon.process.pid} run 1 "
                         rf".*{daemon.state}/work/octo/site/main$")

    def test_a_run_without_a_delivery_finds_a_payload_too(self):
        daemon = self.serve(hook('cat "$HOOKD_PAYLOAD" > "$HOME/payload"'))
        self.assertEqual(daemon.hookd("run", "octo/site", "main").code, 0)
        payload = json.loads(daemon.read("payload"))
        self.assertEqual(payload["repository"]["full_name"], "octo/site")
        self.assertEqual(payload["ref"], "refs/heads/main")

    def test_run_and_send_of_what_no_hook_matches_say_so(self):
        daemon = self.serve(hook("true"))
        for verb in ("run", "send"):
            with self.subTest(verb):
                told = daemon.hookd(verb, "octo/site", "dev")
                self.assertEqual(told.code, 1)
                self.assertIn("octo/site dev", told.out + told.err)
                self.assertNotIn("Traceback", told.err)

    def test_send_prints_the_answer_and_exits_by_it(self):
        daemon = self.serve(hook(NOTE + '; echo "$HOOKD_PUSHER" > "$HOME/who"'))
        table = (((), 0, "queued run 1: octo/site main"),
                 (("--event", "ping"), 0, "pong"), (("--event", "delete"), 1, "ignored"),
                 (("--event", "workflow_run"), 1, "ignored"),
                 (("--event", "release"), 1, "ignored"),
                 (("--commit", sha("given")), 0, sha("given")[:7]))
        for arguments, code, text in table:
            with self.subTest(arguments):
                told = daemon.hookd("send", "octo/site", "main", *arguments)
                self.assertEqual(told.code, code, told)
                self.assertIn(text, told.out)
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], sha("given"))

    def test_send_wait_follows_the_run_and_exits_by_its_outcome(self):
        daemon = self.serve(hook("echo this is it; exit 7", "b7"),
                            hook("echo this is it; sleep 60", "b124", timeout="1s"))
        for code in (7, 124):
            with self.subTest(code):
                told = daemon.hookd("send", "--wait", "octo/site", f"b{code}")
                self.assertEqual(told.code, code, told)
                self.assertIn("this is it", told.out)

    def test_send_sends_the_other_events_too(self):
        say = 'echo "$HOOKD_EVENT" >> "$HOME/said"'
        daemon = self.serve(hook(say, "main", event="workflow_run"),
                            hook(say, "v*", event="release"),
                            hook("true", "topic", on_delete='echo gone >> "$HOME/said"'))
        for branch, event in (("main", "workflow_run"), ("v1", "release"), ("topic", "delete")):
            with self.subTest(event):
                told = daemon.hookd("send", "--wait", "--event", event, "octo/site", branch)
                self.assertEqual(told.code, 0, told)
        self.assertEqual(daemon.read("said").split(), ["workflow_run", "release", "gone"])

    def test_send_without_a_daemon_says_that_none_answers(self):
        daemon = self.serve(hook("true"))
        daemon.kill()
        told = daemon.hookd("send", "octo/site", "main")
        self.assertEqual(told.code, 1)
        self.assertIn("127.0.0.1", told.err)
        self.assertNotIn("Traceback", told.err)

    def test_send_finds_a_daemon_on_a_unix_socket(self):
        for number, name in enumerate(("hookd.sock", "of:octo.sock"), 1):
            with self.subTest(name):
                daemon = self.serve(hook(NOTE), listen=f"unix:{self.home}/{name}", path="/1f2e")
                self.assertEqual(daemon.hookd("send", "--wait", "octo/site", "main").code, 0)
                self.assertEqual(len(daemon.seen()), number)
                daemon.stop()

    def test_log_follows_a_run_and_ends_when_it_ends(self):
        daemon = self.serve(hook(f"echo the beginning\n{GATE}\necho the end"))
        daemon.push()
        daemon.wait(lambda: "the beginning" in daemon.output(1), "the first words")
        command = daemon.command("log", "-f")
        follower = subprocess.Popen(command, env=daemon.environment, stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL)
        with follower, follower.stdout:
            self.assertEqual(follower.stdout.readline(), b"the beginning\n")
            self.assertIsNone(follower.poll())
            daemon.open_gate()
            self.assertRegex(follower.stdout.read(),
                             rb"\Athe end\nocto/site main ok at .* run 1, \d+ s\n\Z")
        self.assertEqual(follower.returncode, 0)

    def test_secret_is_made_once_and_printed_again(self):
        daemon = self.prepare(hook(NOTE), secret=None)
        daemon.state.mkdir(mode=0o700)
        told = daemon.hookd("secret")
        self.assertEqual(told.code, 0, told)
        secret = told.out.strip()
        self.assertGreaterEqual(len(secret), 32)
        self.assertEqual(daemon.hookd("secret").out.strip(), secret)
        daemon.start()
        self.assert_answer(daemon.post(push_of(), secret=secret), 202)
        self.assertNotIn(secret, daemon.log)

    def test_two_states_have_two_secrets(self):
        secrets = set()
        for name in ("a", "b"):
            (self.home / name).mkdir(mode=0o700)
            told = self.prepare(hook("true"), secret=None, state=self.home / name).hookd("secret")
            self.assertEqual(told.code, 0, told)
            secrets.add(told.out)
        self.assertEqual(len(secrets), 2)

    def test_the_history_may_be_read_while_it_is_written(self):
        daemon = self.serve(hook("true", "*"))
        with ThreadPoolExecutor(2) as pool:
            told = [pool.submit(daemon.hookd, "status", "--json") for _ in range(6)]
            answers = [daemon.push(f"b{number % 3}") for number in range(150)]
            codes = [one.result().code for one in told]
        self.assertEqual({answer.status for answer in answers}, {202})
        self.assertEqual(set(codes), {0})

    def test_a_reader_of_the_log_may_leave_early(self):
        daemon = self.serve(hook("head -c 900000 /dev/zero | tr '\\0' 'x'"))
        daemon.push()
        daemon.settle()
        verb = shlex.join(daemon.command("log"))
        done = subprocess.run(["sh", "-c", verb + " | head -c 10"], env=daemon.environment,
                              capture_output=True, check=True)
        self.assertNotRegex(done.stderr, b"Traceback|Broken pipe")

    def test_on_a_terminal_the_log_goes_there(self):
        daemon = self.prepare(hook("true"), log="auto")
        master, slave = pty.openpty()
        command = daemon.command()
        daemon.process = subprocess.Popen(command, env=daemon.environment, stdin=slave,
                                          stdout=slave, stderr=slave)
        os.close(slave)
        heard = os.read(master, 4096)
        os.close(master)
        self.assertRegex(heard, b"hookd|listening")

    def test_a_long_line_on_standard_error_ends_before_the_next(self):
        code = "import hookd; hookd.open_log('stderr'); [hookd.log.info('x' * 9999) for _ in '12']"
        told = subprocess.run([sys.executable, "-c", code], cwd=HERE, stderr=subprocess.PIPE,
                              env=clean_environment(), check=True).stderr
        self.assertEqual((told.count(b"INFO"), told.count(b"\n")), (2, 2))

    @unittest.skipIf(Path("/dev/log").exists(), "a syslog answers on this machine")
    def test_where_no_syslog_answers_the_log_goes_to_standard_error(self):
        daemon = self.serve(hook("true"), log="auto")
        daemon.push()
        daemon.settle()
        self.assertIn("octo/site", daemon.log)

    @unittest.skipUnless(os.geteuid() == 0, "only root becomes another")
    def test_root_becomes_the_owner_of_the_state(self):
        daemon = self.prepare(hook(f'id -u >> "{self.home}/who"'))
        daemon.state.mkdir(mode=0o700)
        os.chown(daemon.state, NOBODY, NOBODY)
        self.home.chmod(0o777)
        os.chown(daemon.ini, NOBODY, NOBODY)
        daemon.start()
        daemon.push()
        daemon.settle()
        self.assertEqual(daemon.hookd("run", "octo/site", "main").code, 0)
        daemon.hookd("status")
        self.assertEqual(daemon.read("who").split(), [str(NOBODY)] * 2)
        owners = {one.lstat().st_uid for one in daemon.state.rglob("*")}
        self.assertEqual(owners, {NOBODY})


# A command: note the run, then wait until the test opens the gate for all, this run or this branch.
HOLD = """\
echo "$HOOKD_RUN" >> "$HOME/begun"
until [ -e "$HOME/gate" ] || [ -e "$HOME/gate.$HOOKD_RUN" ] || [ -e "$HOME/gate.$HOOKD_SLUG" ]; do
    sleep 0.05
done
"""
try:
    WHO = pwd.getpwuid(os.geteuid()).pw_name
except KeyError:  # a container's user may have no name
    WHO = str(os.geteuid())
WHERE = ("octo/site", "main")
OLD, NEW = sha("old"), sha("new")


class Verb:
    """A verb at work: its process, and what it has said so far on both its outputs."""

    def __init__(self, daemon, *words, command=(), **more):
        self.daemon = daemon
        handle, self.path = tempfile.mkstemp(prefix="verb-", dir=daemon.home)
        command = command or daemon.command(*words)
        with open(handle, "wb") as out:
            self.process = subprocess.Popen(
                command, env=daemon.environment, cwd=daemon.home, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, **more)

    @property
    def text(self):
        return Path(self.path).read_text(errors="replace")

    def wait_for(self, pattern):
        wait_for(lambda: re.search(pattern, self.text), f"{pattern!r} from the verb",
                 lambda: f"{self.text}\n--- the daemon's log\n{self.daemon.log[-4000:]}")

    def end(self):
        """Wait until the verb has ended; return its exit status."""
        wait_for(lambda: self.process.poll() is not None, "the verb to end",
                 lambda: f"{self.text}\n--- the daemon's log\n{self.daemon.log[-4000:]}")
        return self.process.returncode


class VerbCase(Case):
    """A test of verbs."""

    def deploy(self, daemon, origin, page, branch="main"):
        """Commit a page, push it, wait until it is deployed; return the commit."""
        commit = origin.commit(branch, page=page)
        daemon.push(branch, commit)
        self.assertEqual(daemon.settled(branch)["commit"], commit)
        return commit

    def push_each(self, daemon, *numbers):
        """Push commits of these numbers to main; each is deployed before the next."""
        for number in numbers:
            daemon.push(commit=sha(number))
            daemon.settle()

    def clear(self, daemon):
        """End a daemon and remove its state and traces, for another in the same directory."""
        daemon.sweep()
        shutil.rmtree(daemon.state)
        for name in ("begun", "seen", "order", "gate", "told"):
            (self.home / name).unlink(missing_ok=True)

    def paused(self, daemon, branch="main"):
        return daemon.targets()["octo/site", branch]["paused"]

    def begun(self, daemon, run):
        """Wait until the script of a run that uses HOLD has begun."""
        daemon.wait(lambda: str(run) in daemon.read("begun").split(), f"run {run} to begin")

    def on_terminal(self, daemon, columns, *words):
        """Return what a verb prints on a terminal of so many columns."""
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        environment = {name: value for name, value in daemon.environment.items()
                       if name not in ("COLUMNS", "LINES")}
        with subprocess.Popen(daemon.command(*words), env=environment, stdin=slave, stdout=slave,
                              stderr=slave):
            os.close(slave)
            heard = b""
            with suppress(OSError):  # EIO: nobody has the other end any more
                while data := os.read(master, 65536):
                    heard += data
        os.close(master)
        return heard.decode().replace("\r\n", "\n")


class Check(VerbCase):
    """`check`: by the daemon's own eyes, with the command that mends."""

    @unittest.skipUnless(os.geteuid() == 0, "only root makes what another cannot write")
    def test_a_directory_that_cannot_be_made_is_told_with_the_command_that_makes_it(self):
        daemon = self.prepare(hook("true", directory=self.home / "sites/blog/source"))
        daemon.state.mkdir(mode=0o700)
        os.chown(daemon.state, NOBODY, NOBODY)
        (self.home / "sites").mkdir()
        self.home.chmod(0o755)
        daemon.ini.chmod(0o644)
        told = self.did(daemon, "check", code=78)
        who = pwd.getpwuid(NOBODY).pw_name
        self.assertRegex(told, rf"install -d -o {who} -g \S+ {self.home}/sites/blog")
        self.assertNotRegex(told, rf"chown (\S+ )*{self.home}/sites(\s|$)")

    @unittest.skipUnless(os.geteuid() == 0, "only root has a mount namespace")
    def test_check_sees_what_the_daemon_sees(self):
        sites = self.home / "sites"
        sites.mkdir()
        daemon = self.prepare(hook("true", directory=sites / "blog"))
        self.did(daemon, "check")
        inside = (f"mount -t tmpfs -o ro none {sites} && touch {self.home}/mounted && "
                  f"exec {PYTHON} {HOOKD} -c {daemon.ini}")
        daemon.process = daemon.spawn(["unshare", "-m", "sh", "-c", inside])
        daemon.wait(lambda: "listening on " in daemon.log or daemon.process.poll() is not None,
                    "the daemon or its end")
        if not (self.home / "mounted").exists():
            self.skipTest("this machine allows no mount")
        self.did(daemon, "check", code=78, says=r"\[octo/site main\] directory: .*sites")

    def test_each_setting_of_a_branch_is_shown_as_it_is_there(self):
        (self.home / "env").write_text("A=env-file-value-5\n")
        daemon = self.prepare(
            hook("make", "feature/*", directory=self.home / "{repo}/{slug}", lock="{branch}",
                 git="https://mona:url-password-x@git.example.com/{repo}.git",
                 environment="KEY=env-file-value-5", environment_file=self.home / "env"),
            report_url="https://example.com/{name}/{slug}")
        told = self.did(daemon, "check", "octo/site", "feature/Menu")
        slug = re.search(r"slug is (feature-menu-\w+)", told)[1]
        for key, value, level in (
                ("directory", f"{self.home}/octo/site/{slug}", "[octo/site feature/*]"),
                ("git", "git.example.com/octo/site.git", "[octo/site feature/*]"),
                ("lock", "feature/Menu", "[octo/site feature/*]"),
                ("report_url", f"https://example.com/site/{slug}", "[hookd]")):
            with self.subTest(key):
                self.assertRegex(told, rf"(?m)^{key} .*{re.escape(f'{value}  ')}.*"
                                 rf"{re.escape(level)}$")
        self.assertNotRegex(told, "url-password-x|env-file-value-5")

    def test_what_the_ini_says_wrongly_hides_nothing_that_it_names(self):
        """Mend one line, and the next fault shows: every problem is told at once."""
        daemon = self.prepare(
            hook("if", timeot="3m", deploy_key="/nowhere/key", git="/srv/origin",
                 shared="../x\n/abs\nfine"),
            hook("true", "dev", environment_file="/nowhere/variables"))
        self.did(daemon, "check", code=78, says=(
            "timeot.*did you mean timeout", r"\] command: sh cannot read it",
            r"\] deploy_key: .*/nowhere/key", "environment_file: .*/nowhere/variables",
            r"\] shared: \.\./x, /abs leads out", "octo/site dev +push"))

    def test_check_of_a_branch_that_no_hook_takes_says_so(self):
        self.did(self.prepare(hook("true")), "check", "octo/site", "dev", code=78,
                 says="no hook.*octo/site dev")


class Words(VerbCase):
    """The words of a command line, however wrong, have an answer."""

    HUGE, NO_TEXT = "9" * 30, b"octo/\xff"
    WRONG = (  # words, exit status
        (("cancel", HUGE), 1), (("cancel", "abc"), 2), (("cancel", "octo/site"), 2),
        (("cancel", "-1"), 2), (("cancel", NO_TEXT, "main"), 2), (("log", HUGE), 1),
        (("log",), 1), (("log", "7"), 1), (("log", "-1"), 2), (("log", *WHERE), 1),
        (("log", "octo/site", "dev"), 1), (("log", "abc"), 2), (("log", NO_TEXT, "main"), 2),
        (("rollback", *WHERE, HUGE), 1),
        (("rollback", *WHERE, "0"), 1), (("rollback", *WHERE, b"\xff"), 1),
        (("run", "octo/site", ""), 2), (("run", "octo/site", "a b"), 2),
        (("run", *WHERE, "--commit", "zz"), 1), (("run", *WHERE, "--commit", b"\xff"), 1),
        (("send", *WHERE, "--commit", "zz"), 1), (("send", "octo/site", "x\ty"), 2),
        (("pause", "bad"), 2), (("pause", "octo/site", "a b"), 2),
        (("pause", *WHERE, "more"), 2),
        (("resume", "bad"), 2), (("secret", "octo/nothing"), 1), (("secret", NO_TEXT), 2),
        (("check", "octo/site"), 2), (("status", *WHERE, "more"), 2), (("status", NO_TEXT), 2),
    )

    def test_words_that_make_no_sense_change_nothing_and_are_told(self):
        daemon = self.serve(hook(NOTE))
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(lambda row: daemon.hookd(*row[0]), self.WRONG))
        for (words, code), done in zip(self.WRONG, told):
            with self.subTest(words):
                self.assertEqual(done.code, code, done)
                self.assertRegex(done.err, "^(usage|hookd): " if code == 2 else "^hookd: |^$")
                self.assertTrue(done.out + done.err)
                self.assertNotIn("Traceback", done.err)
        self.assertEqual(daemon.states(), {})
        self.assertNotIn("paused", self.did(daemon, "status"))


class Run(VerbCase):
    """`run`: queue, follow, exit as it ended."""

    EXITS = (("true", 0, "ok"), ("exit 7", 7, "failed"), ("kill -9 $$", 137, "failed"),
             ("sleep 60", 124, "timeout"))

    def test_run_prints_the_output_says_the_outcome_and_exits_by_it(self):
        daemon = self.serve(*(hook(f"echo this is it; {command}", f"b{number}", timeout="1s")
                              for number, (command, _, _) in enumerate(self.EXITS)))
        for number, (command, code, state) in enumerate(self.EXITS):
            with self.subTest(command):
                told = daemon.hookd("run", "octo/site", f"b{number}")
                self.assertEqual(told.code, code, told)
                self.assertIn("this is it\n", told.out)
                self.assertRegex((told.out + told.err).splitlines()[-1],
                                 rf"^octo/site b{number} {state}\b.*, run {number + 1}, \d+ s$")
                self.assertEqual(daemon.states()[number + 1], state)

    def test_the_output_is_seen_while_the_run_goes_on(self):
        daemon = self.serve(hook("echo first\n" + HOLD + "echo last"))
        run = Verb(daemon, "run", *WHERE)
        run.wait_for("first\n")
        self.assertIsNone(run.process.poll())
        daemon.open_gate()
        self.assertEqual(run.end(), 0)
        self.assertEqual(run.text.count("first\n"), 1)
        self.assertIn("last\n", run.text)

    def test_the_daemon_alone_runs_what_is_asked_for(self):
        daemon = self.serve(hook('echo "$PPID $HOOKD_CAUSE" > "$HOME/said"'))
        self.did(daemon, "run", *WHERE)
        self.assertEqual(daemon.read("said"), f"{daemon.process.pid} run\n")
        run, = self.history(daemon)
        self.assertEqual((run["cause"], run["pusher"]), ("run", WHO))

    def test_an_interrupt_only_stops_following(self):
        daemon = self.serve(hook(HOLD + NOTE))
        daemon.push(commit=sha(1))
        for number, sign in ((2, signal.SIGINT), (3, signal.SIGTERM), (4, signal.SIGHUP)):
            with self.subTest(sign):
                run = Verb(daemon, "run", *WHERE,
                           preexec_fn=lambda one=sign: signal.signal(one, signal.SIG_DFL))
                run.wait_for(f"run {number}")
                run.process.send_signal(sign)
                self.assertNotEqual(run.end(), 0)
                self.assertNotIn("Traceback", run.text)
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.states(), dict.fromkeys(range(1, 5), "ok"))

    def test_while_the_daemon_is_down_a_run_is_queued(self):
        daemon = self.serve(hook(NOTE))
        daemon.push(commit=sha(1))
        daemon.settle()
        for end in (daemon.stop, daemon.kill):
            end()
            self.did(daemon, "run", *WHERE, code=1, says="begins when it starts")
            known = len(daemon.states())
            self.assertEqual(daemon.states()[known], "queued")
            daemon.start()
            daemon.wait(lambda n=known: daemon.states()[n] == "ok", "the run")
        self.assertEqual(len(daemon.seen()), 3)

    def test_runs_by_hand_wait_for_one_another_and_none_is_left_out(self):
        daemon = self.serve(hook(alone("sleep 0.2") + NOTE))
        verbs = [Verb(daemon, "run", *WHERE) for _ in range(3)]
        daemon.push(commit=sha(1))
        self.assertEqual([one.end() for one in verbs], [0] * 3)
        daemon.settle()
        self.assertEqual(list(daemon.states().values()), ["ok"] * 4)
        self.assert_never_overlapped(daemon)

    def test_a_push_takes_the_place_of_no_run_that_a_verb_queued(self):
        for queue in ("newest", "replace"):
            with self.subTest(queue):
                daemon = self.serve(hook(HOLD + 'echo "$HOOKD_RUN" >> "$HOME/order"', queue=queue))
                first = Verb(daemon, "run", *WHERE)
                self.begun(daemon, 1)
                second = Verb(daemon, "run", *WHERE)
                second.wait_for("run 2")
                daemon.push(commit=sha(3))
                daemon.push(commit=sha(4))
                daemon.open_gate()
                self.assertEqual(first.end(), 0)
                self.assertEqual(second.end(), 0)
                daemon.settle()
                self.assertEqual(daemon.read("order").split(), ["1", "2", "4"])
                self.assertEqual(daemon.states()[3], "superseded")
                self.clear(daemon)

    def test_a_run_of_a_commit_deploys_that_very_one(self):
        origin = self.repository()
        daemon = self.serve(self.deploying())
        commits = [self.deploy(daemon, origin, page) for page in ("one", "two", "three")]
        for commit, given, page in ((commits[0], commits[0], "one"),
                                    (commits[1], commits[1][:7], "two"),
                                    (commits[0], commits[0][:12], "one")):
            with self.subTest(given):
                self.did(daemon, "run", *WHERE, "--commit", given, says=f"ok.*{commit[:7]}")
                self.assertEqual((daemon.seen()[-1], daemon.read("live/page")), (commit, page))
        self.assertEqual(daemon.targets()[WHERE]["commit"], commits[0])
        self.did(daemon, "run", *WHERE)
        self.assertEqual(daemon.seen()[-1], commits[2], "without --commit it is the newest")

    def test_an_abbreviated_commit_may_be_one_that_the_clone_alone_has(self):
        origin = self.repository()
        between = [origin.commit(page=page) for page in ("one", "two")][1]
        daemon = self.serve(self.deploying())
        self.deploy(daemon, origin, "three")
        self.did(daemon, "run", *WHERE, "--commit", between[:9])
        self.assertEqual(daemon.seen()[-1], between)

    def test_a_git_that_does_not_answer_a_verb_holds_no_push_up(self):
        origin, folder = self.repository(), self.home / "bin"
        folder.mkdir()
        (folder / "git").write_text(
            '#!/bin/sh\ncase "$*" in *--verify*abcdef*) touch "$HOME/asked"\n'
            'until [ -e "$HOME/gate" ]; do sleep 0.05; done;; esac\n'
            f'exec {shutil.which("git")} "$@"\n')
        (folder / "git").chmod(0o755)
        daemon = self.serve(self.deploying(), variables={"PATH": f"{folder}:{os.environ['PATH']}"})
        self.deploy(daemon, origin, "one")
        for words in (("run", *WHERE, "--commit", "abcdef1"), ("rollback", *WHERE, "abcdef1")):
            with self.subTest(words):
                verb = Verb(daemon, *words)
                daemon.wait((self.home / "asked").exists, "the verb's question to git")
                self.assert_answer(daemon.push(), 202)
                daemon.open_gate()
                self.assertEqual(verb.end(), 1)
                for name in ("asked", "gate"):
                    (self.home / name).unlink()

    def test_a_commit_that_a_forced_push_left_is_fetched_by_its_id(self):
        origin = self.repository()
        origin.commit(page="base")
        left = origin.commit(page="left")
        origin.git("reset", "-q", "--hard", "HEAD~1")
        daemon = self.serve(self.deploying())
        self.deploy(daemon, origin, "new")
        self.did(daemon, "run", *WHERE, "--commit", left, says="no branch or tag")
        self.assertEqual((daemon.seen()[-1], daemon.read("live/page")), (left, "left"))
        told = self.did(daemon, "run", *WHERE, "--commit", origin.git("rev-parse", "main"))
        self.assertNotIn("no branch or tag", told)

    def test_a_commit_that_is_unknown_runs_nothing(self):
        origin = self.repository()
        daemon = self.serve(self.deploying(), hook(NOTE, "plain"))
        commit = self.deploy(daemon, origin, "one")
        for branch, given in (("main", "abcdef1"), ("plain", "abcdef1"), ("main", "no-commit"),
                              ("plain", "no-commit")):
            with self.subTest(branch=branch, commit=given):
                self.did(daemon, "run", "octo/site", branch, "--commit", given, code=1,
                         says=given)
                self.assertEqual(daemon.states(), {1: "ok"})
        told = Verb(daemon, "run", *WHERE, "--commit", sha("nowhere"))
        self.assertNotEqual(told.end(), 0)
        self.assertIn(sha("nowhere")[:7], told.text)
        self.assertEqual(daemon.seen(), [commit])

    def test_without_git_the_commit_is_what_the_command_is_told(self):
        daemon = self.serve(hook(NOTE))
        self.push_each(daemon, 1, 2)
        self.did(daemon, "run", *WHERE, "--commit", sha("given"),
                 says=f"queued run 3: octo/site main at {sha('given')[:7]}")
        self.did(daemon, "run", *WHERE, "--commit", sha(1)[:8])
        self.did(daemon, "run", *WHERE)
        self.assertEqual(daemon.seen()[2:4], [sha("given"), sha(1)])
        self.assertRegex(daemon.log, f"run 3 began: octo/site main at {sha('given')[:7]}")

    def test_a_branch_that_the_remote_does_not_have_leaves_nothing_behind(self):
        origin = self.repository()
        daemon = self.serve(self.deploying(branch="*", directory=self.home / "live/{slug}"))
        self.deploy(daemon, origin, "one")
        self.did(daemon, "run", "octo/site", "nobranch", code=1, says="nobranch")
        self.assertEqual(list(daemon.targets()), [WHERE])
        self.assertEqual(os.listdir(self.home / "live"), ["main"])
        self.did(daemon, "status")

    def test_a_run_is_followed_through_a_restart(self):
        daemon = self.serve(hook(HOLD + NOTE))
        run = Verb(daemon, "run", *WHERE, "--commit", sha(1))
        self.begun(daemon, 1)
        daemon.kill()
        daemon.start()
        daemon.wait(lambda: daemon.read("begun").split() == ["1", "1"], "the second attempt")
        daemon.open_gate()
        self.assertEqual(run.end(), 0, run.text)
        self.assertEqual((daemon.states(), daemon.seen()), ({1: "ok"}, [sha(1)]))


class Rollback(VerbCase):
    """`rollback`: what stands, and the way back."""

    # Each letter is a run of a commit (a small one fails); <A is a rollback that brings A back,
    # <- one that has nowhere to go.
    HISTORIES = (
        "<-", "A <-", "a <-", "A a <A <-", "A A <-",
        "A B <A <-",
        "A B C <B <A <-",
        "A B B <A <-",
        "A B A <B <A <-",
        "A B c <B <A <-",
        "A b c <A <-",
        "A B C <B d <B <A <-",
        "A B <A C <A",
        "A B <A B <A <-",
        "A B C <B D <B",
    )
    JUDGE = f"""\
case "$HOOKD_COMMIT" in {"|".join(sha(letter) for letter in "abcd")}) exit 3;; esac
echo "$HOOKD_COMMIT" >> "$HOME/seen.$HOOKD_SLUG"
"""

    def play(self, daemon, branch, history):
        """Do what a row says on a branch of its own; return the row as it came about."""
        names, told = {sha(letter): letter for letter in "ABCD"}, []
        for move in history.split():
            if move[0] != "<":
                done = daemon.hookd("run", "octo/site", branch, "--commit", sha(move))
                told.append(move if done.code == (3 if move.islower() else 0) else str(done))
                continue
            before = daemon.read(f"seen.{branch}").split()
            done = daemon.hookd("rollback", "octo/site", branch)
            after = daemon.read(f"seen.{branch}").split()
            if (done.code, before) == (1, after):
                told.append("<-")
            else:
                told.append(f"<{names[after[-1]]}" if done.code == 0 else str(done))
        return " ".join(told)

    def test_each_history_has_its_way_back(self):
        daemon = self.serve(hook(self.JUDGE, "*"), jobs=8)
        with ThreadPoolExecutor(3) as pool:
            told = list(pool.map(lambda row: self.play(daemon, f"b{row[0]}", row[1]),
                                 enumerate(self.HISTORIES)))
        for wanted, got in zip(self.HISTORIES, told):
            with self.subTest(wanted):
                self.assertEqual(got, wanted)
        paused = {branch: entry["paused"] for (_, branch), entry in daemon.targets().items()}
        for number, row in enumerate(self.HISTORIES):
            if re.fullmatch(r"[^<]*<-", row):
                with self.subTest(row, paused="no"):
                    self.assertIsNone(paused.get(f"b{number}"))

    def two(self, **keys):
        """Return a repository, a daemon that has deployed two commits of it, and both commits."""
        origin = self.repository()
        daemon = self.serve(self.deploying(**keys))
        return origin, daemon, [self.deploy(daemon, origin, page) for page in ("one", "two")]

    def test_it_says_from_where_to_where_and_how_to_go_on(self):
        _, daemon, (old, new) = self.two()
        told = self.did(daemon, "rollback", *WHERE, says=(old[:7], new[:7], "paused"))
        self.assertIn("resume octo/site main", told)
        self.assertEqual((daemon.seen()[-1], daemon.read("live/page")), (old, "one"))
        target = daemon.targets()[WHERE]
        self.assertEqual((target["commit"], target["last_good"], target["cause"]),
                         (old, old, "rollback"))
        self.assertIsNotNone(target["paused"])

    def test_neither_push_nor_catch_up_undoes_it(self):
        origin, daemon, (old, _) = self.two(catch_up="1s")
        self.did(daemon, "rollback", *WHERE)
        new = origin.commit(page="three")
        answer = daemon.push(commit=new)
        self.assert_answer(answer, 202, "; paused")
        daemon.stop()
        daemon.start()
        self.did(daemon, "run", *WHERE, "--commit", old)  # a turn of the queue has gone by
        self.assertEqual(daemon.seen()[-1], old)
        self.did(daemon, "resume", *WHERE)
        daemon.wait(lambda: daemon.seen()[-1] == new, "the push that waited")

    def test_resume_names_run_where_a_commit_stays_undeployed(self):
        origin, daemon, (old, _) = self.two(catch_up="1h")
        self.did(daemon, "rollback", *WHERE)
        self.did(daemon, "resume", *WHERE, says="run octo/site main")
        new = self.deploy(daemon, origin, "three")
        self.assertEqual(daemon.seen()[-2:], [old, new], "the rolled back one came back")
        self.did(daemon, "pause", *WHERE)
        told = self.did(daemon, "resume", *WHERE)
        self.assertNotIn("run octo/site", told)

    def test_a_commit_or_a_run_may_be_named(self):
        origin, daemon, commits = self.two()
        commits.append(self.deploy(daemon, origin, "three"))
        for given, goal in ((commits[0], 0), (commits[1][:8], 1), ("3", 2), ("1", 0)):
            with self.subTest(given):
                self.did(daemon, "rollback", *WHERE, given, says=commits[goal][:7])
                self.assertEqual(daemon.seen()[-1], commits[goal])

    def test_behind_a_commit_or_run_that_was_named_it_goes_on_from_there(self):
        daemon = self.serve(hook(NOTE))
        self.push_each(daemon, 1, 2, 3)
        for given in (sha(1), "1"):
            with self.subTest(given):
                self.did(daemon, "rollback", *WHERE, given)
                self.did(daemon, "rollback", *WHERE, code=1, says="nothing to go back to")
        self.did(daemon, "rollback", *WHERE, "2")
        self.did(daemon, "rollback", *WHERE)
        self.assertEqual(daemon.seen()[-2:], [sha(2), sha(1)])

    def test_what_cannot_be_gone_back_to_changes_nothing(self):
        _, daemon, (_, new) = self.two()
        for given in ("99", "abcdef1", "no-such-thing", sha("nowhere")):
            with self.subTest(given):
                self.did(daemon, "rollback", *WHERE, given, code=1, says=given[:7])
                self.assertIsNone(self.paused(daemon))
                self.assertEqual(daemon.seen()[-1], new)
        self.did(daemon, "rollback", "octo/site", "dev", code=1, says="octo/site dev")

    def test_a_run_that_deployed_no_commit_is_nothing_to_go_back_to(self):
        daemon = self.serve(hook(HOLD + NOTE))
        daemon.open_gate()
        self.did(daemon, "run", *WHERE)  # without git, and before any push: of no commit
        self.push_each(daemon, 1)
        self.did(daemon, "rollback", *WHERE, code=1, says="nothing to go back to")
        (self.home / "gate").unlink()
        daemon.push(commit=sha(2))
        self.begun(daemon, 3)
        daemon.push(commit=sha(3))
        for given in ("1", "4"):
            with self.subTest(given):
                self.did(daemon, "rollback", *WHERE, given, code=1, says=f"run {given} ")
        self.assertIsNone(self.paused(daemon))
        self.assertEqual(len(daemon.states()), 4)
        daemon.open_gate()
        daemon.settle()

    def test_the_tags_of_a_directory_go_back_as_one(self):
        daemon = self.serve(hook('echo "$HOOKD_COMMIT" >> "$HOME/seen"', "refs/tags/v*",
                                 directory=self.home / "live"))
        for tag in ("v1", "v2"):
            daemon.push(commit=sha(tag), ref=f"refs/tags/{tag}")
            daemon.settle()
        self.did(daemon, "rollback", "octo/site", "v2")
        self.assertEqual(daemon.seen()[-1], sha("v1"))
        answer = daemon.push(commit=sha("v3"), ref="refs/tags/v3")
        self.assert_answer(answer, 202, "; paused: ")
        target, = daemon.targets().values()
        self.assertEqual((target["commit"], target["waiting"]), (sha("v1"), [4]))
        self.did(daemon, "resume", "octo/site", "v2")
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], sha("v3"))
        for tag in ("v1", "v3"):
            self.did(daemon, "status", "octo/site", tag, says="(?m)^4 +ok")

    def test_a_rollback_that_changed_nothing_lifts_its_own_pause_alone(self):
        daemon = self.serve(hook(HOLD + NOTE), hook("true", "dev"))
        daemon.open_gate()
        self.push_each(daemon, 1, 2)
        (self.home / "gate").unlink()
        for why in (None, "moving house"):
            with self.subTest(paused_before=why):
                if why:
                    self.did(daemon, "pause", *WHERE, "-m", why)
                number = len(daemon.states()) + 1
                running = Verb(daemon, "run", *WHERE, "--commit", sha(2))
                self.begun(daemon, number)
                daemon.kill()  # what is queued now cannot begin
                self.did(daemon, "rollback", *WHERE, code=1, says="begins when it starts")
                self.assertIsNotNone(self.paused(daemon))
                self.did(daemon, "cancel", str(number + 1))
                self.assertEqual(self.paused(daemon), why)
                daemon.open_gate()
                daemon.start()
                running.end()
                daemon.settle()
                (self.home / "gate").unlink()

    def test_while_one_is_open_another_is_refused(self):
        daemon = self.serve(hook(f'[ "$HOOKD_CAUSE" != rollback ] || {{\n{HOLD}}}\n' + NOTE))
        self.push_each(daemon, 1, 2, 3)
        first = Verb(daemon, "rollback", *WHERE)
        self.begun(daemon, 4)
        self.did(daemon, "rollback", *WHERE, code=1, says="run 4")
        self.did(daemon, "rollback", *WHERE, "1", code=1, says="run 4")
        self.assertEqual(len(daemon.states()), 4)
        daemon.open_gate()
        self.assertEqual(first.end(), 0)
        self.did(daemon, "rollback", *WHERE)
        self.assertEqual(daemon.seen()[-2:], [sha(2), sha(1)])

    def test_of_two_rollbacks_at_the_same_instant_one_is_taken(self):
        daemon = self.serve(hook(NOTE))
        self.push_each(daemon, 1, 2, 3)
        daemon.stop()
        verbs = [Verb(daemon, "rollback", *WHERE) for _ in range(3)]
        self.assertEqual([one.end() for one in verbs], [1, 1, 1])
        self.assertEqual(sum("begins when it starts" in one.text for one in verbs), 1)
        self.assertEqual(daemon.states(), {1: "ok", 2: "ok", 3: "ok", 4: "queued"})

    def test_while_a_deploy_runs_it_goes_back_to_what_stands(self):
        daemon = self.serve(hook(f'[ "$HOOKD_COMMIT" != {sha(3)} ] || {{\n{HOLD}}}\n' + NOTE))
        self.push_each(daemon, 1, 2)
        daemon.push(commit=sha(3))
        self.begun(daemon, 3)
        daemon.push(commit=sha(4))
        verb = Verb(daemon, "rollback", *WHERE)
        verb.wait_for("run 5")
        self.assertIsNotNone(self.paused(daemon), "paused from the moment that it was typed")
        daemon.open_gate()
        self.assertEqual(verb.end(), 0, verb.text)
        self.assertEqual(daemon.seen()[-1], sha(2), "its goal was fixed when it was typed")
        self.assertEqual({number: daemon.states()[number] for number in (4, 5)},
                         {4: "queued", 5: "ok"})

    def test_the_pause_is_there_before_the_rollback_begins(self):
        _, daemon, (old, new) = self.two(catch_up="1h")
        daemon.kill()
        self.did(daemon, "rollback", *WHERE, code=1, says="begins when it starts")
        run = max(daemon.states())  # catch-up may have been faster than a push
        self.assertEqual(daemon.states()[run], "queued")
        self.assertIsNotNone(self.paused(daemon))
        daemon.start()
        daemon.wait(lambda: daemon.states()[run] == "ok", "the rollback")
        self.assertEqual(daemon.seen()[-2:], [new, old])

    def test_a_forced_push_does_not_take_the_way_back(self):
        origin, daemon, (old, _) = self.two()
        live = Repository.__new__(Repository)
        live.path = self.home / "live"
        self.assertEqual(live.git("for-each-ref", "--format=%(refname)", "refs/hookd/[0-9]*"),
                         "refs/hookd/1\nrefs/hookd/2")
        origin.git("checkout", "-q", "--orphan", "new")
        origin.git("commit", "-q", "-m", "Another beginning")
        origin.git("branch", "-q", "-M", "new", "main")
        for clean in (("reflog", "expire", "--expire=now", "--all"),
                      ("gc", "-q", "--prune=now")):
            origin.git(*clean)
        daemon.push(commit=origin.git("rev-parse", "main"))
        self.assertEqual(daemon.settled()["state"], "ok")
        for clean in (("reflog", "expire", "--expire=now", "--all"), ("gc", "-q", "--prune=now")):
            live.git(*clean)
        for goal in ("2", old[:10]):
            self.did(daemon, "rollback", *WHERE, goal)
        self.assertEqual((daemon.seen()[-1], daemon.read("live/page")), (old, "one"))

    def test_refs_of_runs_that_are_not_kept_go_with_them(self):
        origin, kept = self.repository(), set()
        daemon = self.serve(self.deploying(NOTE + '\n[ "$(cat page)" != bad ]'), keep=2)
        for page in ("one", "two", "bad", "three", "four"):
            before = kept  # a run tidies up what the runs before it left
            daemon.push(commit=origin.commit(page=page))
            daemon.settle()
            kept = {number for number, state in daemon.states().items() if state == "ok"}
            refs = subprocess.run(["git", "-C", str(self.home / "live"), "for-each-ref",
                                   "--format=%(refname:lstrip=2)", "refs/hookd/[0-9]*"],
                                  capture_output=True, check=True).stdout.split()
            self.assertLessEqual(kept, set(map(int, refs)))
            self.assertLessEqual(set(map(int, refs)), kept | before)

    def test_without_git_the_command_is_told_the_commit_and_the_cause(self):
        daemon = self.serve(hook('echo "$HOOKD_COMMIT $HOOKD_CAUSE" >> "$HOME/said"'))
        self.push_each(daemon, 1, 2)
        self.did(daemon, "rollback", *WHERE)
        self.assertEqual(daemon.read("said").splitlines()[-1], f"{sha(1)} rollback")

    def test_it_exits_as_its_run_ended(self):
        daemon = self.serve(hook('[ "$HOOKD_CAUSE" != rollback ] || exit 5'))
        self.push_each(daemon, 1, 2)
        self.did(daemon, "rollback", *WHERE, code=5, says="failed")
        self.assertIsNotNone(self.paused(daemon), "its command may have changed something")


class Cancel(VerbCase):
    """`cancel`: what runs or waits ends, and history says by whom."""

    def test_a_running_run_ends_with_its_group_and_tells_nobody_that_it_failed(self):
        for name, words in (("its number", ("1",)), ("its branch", WHERE)):
            with self.subTest(name):
                daemon = self.serve(hook(HOLD, on_failure='touch "$HOME/told"',
                                         on_success='touch "$HOME/told"'))
                run = Verb(daemon, "run", *WHERE)
                self.begun(daemon, 1)
                self.did(daemon, "cancel", *words, says="run 1 cancelled|cancelled run 1")
                self.assertEqual(daemon.states(), {1: "cancelled"}, "it did not wait")
                self.assertNotEqual(run.end(), 0)
                self.assertIn("cancelled", run.text)
                entry, = self.history(daemon)
                self.assertEqual(entry["state"], "cancelled")
                self.assertIn(WHO, entry["note"])
                self.assertAlmostEqual(entry["ended"], time.time(), delta=60)
                daemon.stop()
                self.assertFalse((self.home / "told").exists())
                self.assertEqual(daemon.descendants(), [])
                self.clear(daemon)

    def test_what_ignores_the_term_signal_is_killed(self):
        daemon = self.serve(hook("trap '' TERM\n" + HOLD))
        daemon.push()
        self.begun(daemon, 1)
        began = time.monotonic()
        self.did(daemon, "cancel", "1")
        self.assertGreater(time.monotonic() - began, 9)
        self.assertEqual(daemon.states(), {1: "cancelled"})

    def test_what_waits_never_begins(self):
        daemon = self.serve(hook(HOLD + NOTE, queue="every"))
        for number in (1, 2, 3, 4):
            daemon.push(commit=sha(number))
        self.begun(daemon, 1)
        self.did(daemon, "cancel", "3")
        self.assertEqual(daemon.states(), {1: "running", 2: "queued", 3: "cancelled", 4: "queued"})
        self.did(daemon, "cancel", *WHERE)
        self.assertEqual(daemon.states(), dict.fromkeys(range(1, 5), "cancelled"))
        self.assert_answer(daemon.push(commit=sha(5)), 202)
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(5)])

    def test_while_a_script_after_the_run_is_at_work_the_outcome_stays(self):
        for state, command in (("ok", "true"), ("failed", "exit 3")):
            with self.subTest(state):
                daemon = self.serve(hook(command, on_success=HOLD, on_failure=HOLD))
                daemon.push()
                self.begun(daemon, 1)
                self.did(daemon, "cancel", "1")
                self.assertEqual(daemon.settled()["state"], state)
                self.assertEqual([pid for pid in daemon.descendants()
                                  if pid != daemon.process.pid], [])
                self.clear(daemon)

    def test_while_the_daemon_is_down_it_takes_effect_all_the_same(self):
        daemon = self.serve(hook(HOLD + NOTE))
        daemon.push(commit=sha(1))
        self.begun(daemon, 1)
        daemon.push(commit=sha(2))
        daemon.kill()
        self.did(daemon, "cancel", "2", says="cancelled")
        self.assertEqual(daemon.states()[2], "cancelled")
        self.did(daemon, "cancel", "1", says="start")
        daemon.open_gate()
        daemon.start()
        self.assertEqual(daemon.states(), {1: "cancelled", 2: "cancelled"})
        self.assertEqual(daemon.read("begun").split(), ["1"], "it began again")


class Pause(VerbCase):
    """`pause` and `resume`."""

    WORDS = ((), ("octo/site",), ("octo/site", "main"), ("octo/site", "dev"), ("octo/other",))

    def test_only_the_words_that_made_a_pause_lift_it(self):
        daemon = self.serve(hook(NOTE), hook(NOTE, "dev"), hook(NOTE, repo="octo/other"))
        for words in self.WORDS:
            self.did(daemon, "pause", *words, "-m", f"words {len(words)} {words[-1:]}")
            for other in self.WORDS:
                if other != words:
                    with self.subTest(paused=words, resumed=other):
                        self.did(daemon, "resume", *other, code=1, says="no pause|not paused")
            holds = [(repo, branch) for repo, branch in
                     (("octo/site", "main"), ("octo/site", "dev"), ("octo/other", "main"))
                     if (repo, branch)[:len(words)] == words]
            for repo, branch in (("octo/site", "main"), ("octo/site", "dev"),
                                 ("octo/other", "main")):
                with self.subTest(paused=words, push=(repo, branch)):
                    answer = daemon.push(branch, sha((words, repo, branch)), repo=repo)
                    self.assert_answer(answer, 202, "queued")
                    self.assertEqual("; paused: words" in answer.text, (repo, branch) in holds)
            self.did(daemon, "resume", *words)
            daemon.settle()
        self.assertEqual(len(daemon.seen()), 15)

    def test_pauses_lie_over_one_another(self):
        daemon = self.serve(hook(NOTE))
        self.did(daemon, "pause")
        self.did(daemon, "pause", *WHERE, "-m", "one branch")
        daemon.push(commit=sha(1))
        self.did(daemon, "resume")
        self.assertEqual(self.paused(daemon), "one branch")
        self.did(daemon, "run", *WHERE)
        self.assertEqual(daemon.states()[1], "queued")
        self.did(daemon, "resume", *WHERE)
        daemon.settle()
        self.assertEqual(daemon.seen()[-1], sha(1))

    def test_a_pause_outlives_restarts_and_crashes_and_is_told_everywhere(self):
        daemon = self.serve(hook(NOTE))
        self.did(daemon, "pause", *WHERE, "-m", "moving house")
        for number, end in enumerate((daemon.stop, daemon.kill, lambda: None), 1):
            end()
            if daemon.process.poll() is not None:
                daemon.start()
            answer = daemon.push(commit=sha(number))
            self.assert_answer(answer, 202)
            self.assertRegex(answer.text, rf"^queued run {number}: octo/site main at "
                             rf"{sha(number)[:7]}.*; paused: moving house\n$")
            self.assertEqual(self.paused(daemon), "moving house")
        self.did(daemon, "status", says="moving house")
        self.assertRegex(daemon.log, r"queued run 3: octo/site main.*paused: moving house")
        self.did(daemon, "resume", *WHERE)
        daemon.settle()
        self.assertEqual(daemon.seen(), [sha(3)], "the newest alone")
        self.assertIsNone(self.paused(daemon))

    def test_its_reason_stays_one_line_and_obeys_nobody(self):
        daemon = self.serve(hook(NOTE))
        self.did(daemon, "pause", "OCTO/Site", "main", "-m", "two\nlines\x1b[31m")
        answer = daemon.push()
        self.assert_answer(answer, 202, "; paused: two")
        self.assertEqual(answer.text.count("\n"), 1)
        told = (answer.text + daemon.log + self.did(daemon, "status")
                + self.did(daemon, "status", *WHERE))
        self.assertNotRegex(told, "\x1b|\nlines")
        self.did(daemon, "resume", *WHERE)
        daemon.settle()

    def test_run_and_rollback_are_not_held_back(self):
        daemon = self.serve(hook(NOTE))
        self.push_each(daemon, 1, 2)
        self.did(daemon, "pause")
        self.did(daemon, "run", *WHERE, "--commit", sha(3))
        self.did(daemon, "rollback", *WHERE)
        self.assertEqual(daemon.seen()[2:], [sha(3), sha(2)])

    def test_a_pause_ends_nothing_and_every_keeps_all(self):
        for queue, wanted in (("newest", [1, 4]), ("replace", [1, 4]), ("every", [1, 2, 3, 4])):
            with self.subTest(queue):
                daemon = self.serve(hook(HOLD + NOTE, queue=queue))
                daemon.push(commit=sha(1))
                self.begun(daemon, 1)
                self.did(daemon, "pause", *WHERE)
                for number in (2, 3, 4):
                    daemon.push(commit=sha(number))
                daemon.open_gate()
                daemon.wait(lambda one=daemon: one.states()[1] != "running", "run 1")
                self.did(daemon, "resume", *WHERE)
                daemon.settle()
                self.assertEqual(daemon.seen(), [sha(number) for number in wanted])
                self.clear(daemon)

    def test_resume_asks_the_remote_for_what_was_missed(self):
        origin = self.repository()
        daemon = self.serve(self.deploying(catch_up="1d"))
        self.deploy(daemon, origin, "one")
        self.did(daemon, "pause", *WHERE)
        missed = origin.commit(page="missed")
        self.did(daemon, "resume", *WHERE)
        daemon.wait(lambda: daemon.seen()[-1] == missed, "the push that never arrived")

    def test_while_the_daemon_is_down_both_take_effect_at_once(self):
        daemon = self.serve(hook(NOTE))
        daemon.push(commit=sha(1))
        daemon.settle()
        daemon.kill()
        self.did(daemon, "pause", *WHERE, "-m", "down")
        self.assertEqual(self.paused(daemon), "down")
        self.did(daemon, "resume", *WHERE)
        self.assertIsNone(self.paused(daemon))


class Send(VerbCase):
    """`send`: a push as GitHub would send it."""

    def test_with_git_a_commit_that_is_named_is_not_the_one_deployed(self):
        origin = self.repository()
        daemon = self.serve(self.deploying(), hook(NOTE, "plain"))
        old, new = (self.deploy(daemon, origin, page) for page in ("one", "two"))
        told = daemon.hookd("send", "--wait", *WHERE, "--commit", old)
        self.assertRegex(told.err, "newest")
        self.assertRegex(told.err, "run octo/site main --commit|run .*--commit")
        self.assertEqual((told.code, daemon.seen()[-1]), (0, new))
        self.assertRegex(daemon.log, rf"run 3 ok: octo/site main at {new[:7]}")
        told = daemon.hookd("send", "--wait", "octo/site", "plain", "--commit", old)
        self.assertEqual((told.code, daemon.seen()[-1]), (0, old))
        self.assertNotIn("newest", told.err)


class Status(VerbCase):
    """`status`: the table, the history, and both for programs."""

    TARGET = ("repo", "ref", "branch", "hook", "directory", "run", "state", "event", "cause",
              "commit", "subject", "pusher", "began", "ended", "duration", "exit", "last_good",
              "running", "waiting", "paused")
    RUN = ("run", "state", "event", "cause", "commit", "subject", "pusher", "queued", "began",
           "ended", "duration", "exit", "note")

    def test_the_runs_of_a_branch_are_listed_whatever_became_of_it(self):
        """A branch whose run was cancelled, or that was deleted, has no history."""
        daemon = self.serve(hook("true"))
        self.did(daemon, "pause", "octo/site", "main")
        daemon.push()
        self.did(daemon, "cancel", "1")
        self.did(daemon, "resume", "octo/site", "main")
        self.assertEqual([run["state"] for run in self.history(daemon)], ["cancelled"])
        daemon.push(commit=sha("next"))
        daemon.settle()
        daemon.post(deletion_of("main"))
        self.assertEqual(daemon.targets(), {})
        self.assertEqual([run["state"] for run in self.history(daemon)], ["ok", "cancelled"])

    def test_a_locale_without_a_letter_stops_no_table(self):
        """An umlaut in a subject ends `status` with a traceback."""
        daemon = self.serve(hook("true"))
        daemon.post(push_of(head_commit={"message": "Men\u00fc"}))
        daemon.settle()
        daemon.environment.update(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
        told = daemon.hookd("status", umask=0o022)
        self.assertEqual((told.code, told.err), (0, ""))
        self.assertIn("Men\\xfc", told.out)

    def test_json_has_the_documented_members_for_targets_and_runs(self):
        daemon = self.serve(hook(HOLD, queue="every"))
        began = int(time.time())
        daemon.push(commit=sha(1))
        self.begun(daemon, 1)
        daemon.push(commit=sha(2))
        daemon.push(commit=sha(3))
        target, = json.loads(daemon.hookd("status", "--json").out)
        self.assertCountEqual(target, self.TARGET)
        self.assertEqual((target["running"], target["waiting"], target["paused"],
                          target["last_good"]), (1, [2, 3], None, None))
        runs = self.history(daemon)
        self.assertEqual([(run["run"], run["state"]) for run in runs],
                         [(3, "queued"), (2, "queued"), (1, "running")])
        for run in runs:
            self.assertCountEqual(run, self.RUN)
        self.assertEqual([runs[0][name] for name in ("began", "ended", "duration", "exit")],
                         [None] * 4)
        daemon.open_gate()
        target = daemon.settled()
        expected = {"repo": "octo/site", "ref": "refs/heads/main", "branch": "main",
                    "hook": "octo/site main", "run": 3, "state": "ok", "event": "push",
                    "cause": "delivery", "commit": sha(3), "subject": "Say hello",
                    "pusher": "mona", "exit": 0, "last_good": sha(3), "running": None,
                    "waiting": [], "paused": None,
                    "directory": str(daemon.state / "work/octo/site/main")}
        self.assertEqual({name: target[name] for name in expected}, expected)
        run = self.history(daemon)[0]
        common = [name for name in self.RUN if name in self.TARGET]
        self.assertEqual({name: run[name] for name in common},
                         {name: target[name] for name in common})
        self.assertTrue(began - 1 <= run["queued"] <= run["began"] <= run["ended"]
                        <= time.time() + 1)
        self.assertAlmostEqual(run["duration"], run["ended"] - run["began"], delta=1.1)

    def test_words_choose_what_is_listed(self):
        daemon = self.serve(hook("true"), hook("true", "dev"), hook("true", repo="octo/other"))
        for branch, repo in (("main", "octo/site"), ("dev", "octo/site"), ("main", "octo/other")):
            daemon.push(branch, repo=repo)
        daemon.settle()
        for words, wanted in (((), 3), (("octo/site",), 2), (("OCTO/Other",), 1)):
            with self.subTest(words):
                told = json.loads(daemon.hookd("status", *words, "--json").out)
                self.assertEqual(len(told), wanted)
        for words in (("octo/nothing",), ("octo/nothing", "main"), ("octo/site", "nothing")):
            self.did(daemon, "status", *words)

    def test_its_exit_status_is_for_programs(self):
        daemon = self.serve(hook("true"), hook("exit 3", "dev"))
        for form in ((), ("--json",)):
            with self.subTest("nothing has run", form=form):
                self.did(daemon, "status", *form)
        daemon.push()
        daemon.settle()
        daemon.push("dev")
        daemon.settle()
        for words, code in (((), 1), (("octo/site",), 1), (WHERE, 0), (("octo/site", "dev"), 1)):
            for form in ((), ("--json",)):
                with self.subTest(words, form=form):
                    self.did(daemon, "status", *words, *form, code=code)

    def test_it_says_whether_the_daemon_is_up(self):
        daemon = self.serve(hook("true"))
        daemon.push()
        daemon.settle()
        for end in (daemon.stop, daemon.kill):
            told = self.did(daemon, "status")
            self.assertNotIn("not running", told)
            end()
            self.did(daemon, "status", code=1, says="not running")
            told = daemon.hookd("status", "--json")
            self.assertEqual((told.code, len(json.loads(told.out))), (1, 1))
            daemon.start()

    def test_it_tells_who_what_when_and_why_something_waits(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # nobody listens there
            nowhere = f"git://127.0.0.1:{taken.getsockname()[1]}/site.git"
            daemon = self.serve(
                hook(HOLD, lock="shop"), hook("true", "behind", lock="shop"),
                hook("true", "paused"), section("octo/site far", command="true", git=nowhere,
                                                catch_up="no"), jobs=4)
            self.did(daemon, "pause", "octo/site", "paused", "-m", "moving house")
            daemon.push(commit=sha(1))
            self.begun(daemon, 1)
            for branch in ("main", "behind", "paused", "far"):
                daemon.push(branch, sha(branch))
            told = daemon.wait(lambda: re.search(r"(?s).*next try.*", daemon.hookd("status").out),
                               "the remote to be asked in vain")[0]
        for branch, words in (("main", ("run 1 has been running for", "behind run 1")),
                              ("behind", ("lock shop", "run 1")), ("paused", ("moving house",)),
                              ("far", (r"next try at \d\d:\d\d",))):
            line = [one for one in told.splitlines() if f"octo/site {branch} " in one]
            for word in words:
                with self.subTest(branch, word=word):
                    self.assertTrue(line, told)
                    self.assertRegex(line[0], word)

    def test_it_tells_who_pushed_what_and_when(self):
        daemon = self.serve(hook("exit 3"))
        daemon.push()
        daemon.settle()
        self.did(daemon, "status", code=1, says=(
            rf"octo/site main +1 +failed +{sha('commit')[:7]} +mona +Say hello +"
            r"\d+ seconds? ago +\d"))
        self.did(daemon, "status", *WHERE, code=1, says=(
            rf"(?m)^1 +failed +delivery +{sha('commit')[:7]} +mona +Say hello +\d+ seconds? ago",))

    def test_a_branch_that_was_deleted_leaves_the_list(self):
        daemon = self.serve(hook('[ "$HOOKD_SLUG" = good ]', "*"))
        for branch in ("good", "bad"):
            daemon.push(branch, sha(branch))
            daemon.settle()
        self.did(daemon, "status", code=1)
        daemon.post(deletion_of("bad", before=sha("bad")))
        daemon.settle()
        self.assertEqual(list(daemon.targets()), [("octo/site", "good")])
        self.did(daemon, "status")
        daemon.push("bad", sha("again"), created=True)
        daemon.settle()
        self.assertEqual(len(daemon.targets()), 2)

    def test_names_are_cut_only_where_a_terminal_is_too_narrow(self):
        branch = "a-branch-with-a-name-that-is-longer-than-a-line-has-room-for/and-more"
        daemon = self.serve(hook("true", "*"))
        daemon.push(branch)
        daemon.settle()
        self.assertIn(f"octo/site {branch} ", self.did(daemon, "status"))
        self.assertIn(branch, self.on_terminal(daemon, 300, "status"))
        narrow = self.on_terminal(daemon, 80, "status")
        self.assertLessEqual(max(map(len, narrow.splitlines())), 80)
        self.assertIn("octo/site a-bra", narrow)
        self.assertNotIn(branch, narrow)

    def test_text_of_strangers_is_only_shown(self):
        daemon = self.serve(hook("true", "*"))
        payload = push_of("main")
        payload["head_commit"]["message"] = "a\x1b[31m\u202eb\nsecond line"
        payload["pusher"]["name"] = "mo\x1b]0;na"
        daemon.post(payload)
        daemon.settle()
        for told in (self.on_terminal(daemon, 300, "status"), self.did(daemon, "status"),
                     self.did(daemon, "status", *WHERE)):
            self.assertNotRegex(told, "\x1b|\u202e|second line")
        self.assertEqual(daemon.targets()[WHERE]["subject"], "a\x1b[31m\u202eb")


class Log(VerbCase):
    """`log`: a run's output."""

    def test_a_run_or_a_branch_is_named(self):
        daemon = self.serve(hook('echo "words of run $HOOKD_RUN"', "*"))
        for branch in ("main", "dev", "main"):
            daemon.push(branch, sha((branch, len(daemon.states()))))
            daemon.settle()
        daemon.kill()
        for words, wanted in (((), 3), (("1",), 1), (("octo/site", "dev"), 2),
                              (("Octo/Site", "main"), 3)):
            with self.subTest(words):
                told = daemon.hookd("log", *words)
                self.assertEqual((told.code, told.out), (0, f"words of run {wanted}\n"))
                self.assertRegex(told.err, rf"run {wanted} ok")

    def test_half_a_line_is_not_shown_while_the_other_half_may_come(self):
        """A secret that is printed in two halves is no secret to whoever follows."""
        daemon = self.serve(hook(f'echo first; printf %s "{SECRET[:-4]}"; {GATE}; '
                                 f'echo "{SECRET[-4:]}"'))
        daemon.push()
        daemon.wait(lambda: SECRET[:-4] in daemon.output(1), "the first half")
        self.assertEqual(daemon.hookd("log", "1").out, "first\n")
        daemon.open_gate()
        daemon.settle()
        self.assertEqual(daemon.hookd("log", "1").out, "first\n***\n")

    def test_f_follows_a_run_that_still_waits(self):
        daemon = self.serve(hook(HOLD + 'echo "words of run $HOOKD_RUN"', queue="every"))
        daemon.push(commit=sha(1))
        self.begun(daemon, 1)
        daemon.push(commit=sha(2))
        follower = Verb(daemon, "log", "-f", "2")
        follower.wait_for("run 2")
        daemon.open_gate()
        self.assertEqual(follower.end(), 0)
        self.assertIn("words of run 2\n", follower.text)
        self.assertNotIn("words of run 1", follower.text)

    def test_without_f_what_is_there_is_shown(self):
        daemon = self.serve(hook("echo first\n" + HOLD))
        daemon.push()
        self.begun(daemon, 1)
        told = daemon.hookd("log", "1")
        self.assertEqual(told.out, "first\n")

    def test_secrets_are_shown_as_stars(self):
        (self.home / "env").write_text("KEY=a-value-of-a-file\nSHORT=abc\n")
        daemon = self.serve(hook(
            f'echo "$KEY $SHORT {SECRET[-8:]}"; cat "$HOME/secrets"', report_token="token-4711-x",
            report_api="http://127.0.0.1:9", environment_file=self.home / "env"))
        (self.home / "secrets").write_text(
            f"{SECRET} token-4711-x https://mona:pass-word-1@example.com/a.git\n")
        daemon.push()
        daemon.settle()
        told = self.did(daemon, "log", "1", says=r"\*\*\*")
        for secret in ("a-value-of-a-file", SECRET, "token-4711-x", "pass-word-1"):
            self.assertNotIn(secret, told + daemon.log)
        self.assertIn("abc", told)


class Secret(VerbCase):
    """`secret [REPO]`."""

    def test_a_repository_may_have_its_own(self):
        for name in ("own", "state"):
            (self.home / name).mkdir()
        (self.home / "own/file").write_text("of a file\n")
        daemon = self.prepare(
            section("octo/own", secret="of its own"), hook("true", repo="octo/own"),
            hook("true", repo="octo/file", secret_file=self.home / "own/file"), hook("true"),
            secret="common")
        for words, secret in (((), "common"), (("octo/site",), "common"),
                              (("octo/own",), "of its own"), (("Octo/Own",), "of its own"),
                              (("octo/file",), "of a file")):
            with self.subTest(words):
                self.assertEqual(daemon.hookd("secret", *words).out, secret + "\n")
        self.did(daemon, "secret", "octo/unknown", code=1, says="octo/unknown")


class BrokenIni(VerbCase):
    """With a broken ini on disk the verbs that need only the state still serve."""

    def test_verbs_that_need_only_the_state_still_serve(self):
        daemon = self.serve(hook("echo words\n" + HOLD, queue="every"))
        for number in (1, 2, 3):
            daemon.push(commit=sha(number))
        self.begun(daemon, 1)
        good = daemon.ini.read_text()
        for name, text in (("a bad value", good.replace("queue = every", "queue = often")),
                           ("no bracket", good.replace("main]", "main")),
                           ("a section twice", good + "[octo/site main]\ncommand = true\n")):
            daemon.configure(text)
            fault = daemon.hookd("check")
            self.assertEqual(fault.code, 78)
            for words, shows in ((("status",), "octo/site main"), (("status", *WHERE), "queued"),
                                 (("log", "1"), "words"), (("pause", *WHERE), "pause"),
                                 (("resume", *WHERE), "")):
                with self.subTest(name, verb=words[0]):
                    told = daemon.hookd(*words)
                    self.assertEqual(told.code, 0, told)
                    self.assertIn(shows, told.out)
                    self.assertIn(fault.err.splitlines()[0], told.err)
            for words in (("run", *WHERE), ("rollback", *WHERE), ("send", *WHERE)):
                with self.subTest(name, verb=words[0]):
                    self.assertEqual(daemon.hookd(*words).code, 78)
        for number in (3, 2, 1):
            self.did(daemon, "cancel", str(number))
        self.assertEqual(daemon.states(), dict.fromkeys((1, 2, 3), "cancelled"))
        self.did(daemon, "status", code=1, says="octo/site main +1 +cancelled")


class Owner(VerbCase):
    """Whose files they are: root becomes the owner, another is told to use sudo."""

    OPEN = (("status",), ("log",), ("pause", *WHERE), ("resume", *WHERE), ("cancel", "1"))
    QUEUE = (("run", *WHERE), ("rollback", *WHERE))

    def owned_by_nobody(self, command):
        self.open_to_nobody()
        daemon = self.prepare(hook(command))
        daemon.state.mkdir(mode=0o700)
        os.chown(daemon.state, NOBODY, NOBODY)
        os.chown(daemon.ini, NOBODY, NOBODY)
        self.home.chmod(0o777)
        return daemon.start()

    @unittest.skipUnless(os.geteuid() == 0, "only root becomes another")
    def test_root_becomes_the_owner_by_exec(self):
        daemon = self.owned_by_nobody(f'HOME="{self.home}"\n{HOLD}id -u >> "$HOME/who"')
        run = Verb(daemon, "run", *WHERE)
        self.begun(daemon, 1)
        # What only calls setuid is not dumpable: its entry in /proc stays root's.
        daemon.wait(lambda: os.stat(f"/proc/{run.process.pid}").st_uid == NOBODY, "the exec")
        status = Path(f"/proc/{run.process.pid}/status").read_text()
        self.assertRegex(status, rf"Uid:\s+{NOBODY}\s+{NOBODY}\s+{NOBODY}")
        self.assertNotIn("0", re.search("Groups:(.*)", status)[1].split())
        daemon.open_gate()
        self.assertEqual(run.end(), 0, run.text)
        for words in (*self.OPEN, *self.QUEUE, ("secret",), ("send", "--wait", *WHERE)):
            daemon.hookd(*words)
        daemon.stop()
        for words in (*self.OPEN, *self.QUEUE):
            daemon.hookd(*words)
        self.assertEqual({one.lstat().st_uid for one in daemon.state.rglob("*")}, {NOBODY})
        self.assertEqual(set(daemon.read("who").split()), {str(NOBODY)})

    @unittest.skipUnless(os.geteuid() == 0, "only root can be another user as well")
    def test_another_user_is_told_to_use_sudo(self):
        daemon = self.serve(hook("true"))
        daemon.push()
        daemon.settle()
        self.open_to_nobody()
        for mode in (0o644, 0o600):
            daemon.ini.chmod(mode)
            for words in (*self.OPEN, *self.QUEUE, ("status", "--json")):
                with self.subTest(words, ini=mode):
                    told = daemon.hookd(*words, user=NOBODY, group=NOBODY)
                    self.assertNotEqual(told.code, 0, told)
                    self.assertIn("sudo", told.err)
                    self.assertNotIn("Traceback", told.err)
        self.assertEqual(daemon.states(), {1: "ok"})

    @unittest.skipUnless(os.geteuid() == 0, "root alone would make the state its own")
    def test_without_a_state_directory_root_is_told_to_start_hookd_first(self):
        daemon = self.prepare(hook("true"))
        for words in (("run", *WHERE), ("rollback", *WHERE), ("pause",), ("resume",),
                      ("cancel", "1"), ("secret",)):
            with self.subTest(words):
                self.did(daemon, *words, code=1, says="start hookd")
                self.assertFalse(daemon.state.exists())
        for words in (("check",), ("status",), ("log",), ("check", *WHERE)):
            with self.subTest(words):
                daemon.hookd(*words)
                self.assertFalse(daemon.state.exists(), "root made it, and it is root's")


class OldDatabase(VerbCase):
    """A database that hookd 1.0 left."""

    OLD = "85dd90c"  # the last commit of 1.0

    def old_state(self):
        """Return a daemon whose state 1.0 left: ok, failed, cut off, waiting."""
        old = self.home / "old.py"
        shown = subprocess.run(["git", "-C", str(HERE), "show", f"{self.OLD}:hookd.py"],
                               capture_output=True, check=False)
        if shown.returncode:
            self.skipTest("the history of the repository is not here")
        old.write_bytes(shown.stdout)
        daemon = self.prepare(hook(HOLD + NOTE, "dev"),
                              hook(f'{NOTE}\n[ "$HOOKD_SLUG" != bad ]', "*"))
        daemon.process = daemon.spawn([sys.executable, str(old), "-c", str(daemon.ini)])
        daemon.wait_for_log("listening on ")
        daemon.address = re.search(r"listening on (\S+)", daemon.log)[1]
        for branch in ("main", "bad", "dev"):
            daemon.push(branch, sha(branch))
            daemon.wait(lambda one=branch: sha(one) in daemon.seen() or
                        daemon.read("begun"), branch)
        daemon.push("dev", sha("newer"))
        daemon.wait(lambda: list(daemon.states().values()) ==
                    ["ok", "failed", "running", "queued"], "the four states")
        daemon.kill()
        return daemon

    def version(self, path):
        with closing(sqlite3.connect(path)) as store:
            return store.execute("PRAGMA user_version").fetchone()[0]

    def test_only_serve_brings_it_up_to_date_and_keeps_a_copy(self):
        daemon = self.old_state()
        database = daemon.state / "hookd.db"
        old = self.version(database)
        for words in (("run", *WHERE), ("rollback", *WHERE), ("cancel", "4"), ("pause",),
                      ("resume",), ("status",), ("log",)):
            with self.subTest(words):
                told = self.did(daemon, *words, code=78, says="older hookd; start hookd")
                self.assertNotIn("no such column", told)
                self.assertEqual(self.version(database), old)
        daemon.start()
        self.assertGreater(self.version(database), old)
        copies = [path for path in daemon.state.iterdir() if path != database and path.is_file()
                  and path.read_bytes()[:6] == b"SQLite" and self.version(path) == old]
        self.assertEqual(len(copies), 1, os.listdir(daemon.state))
        daemon.open_gate()
        daemon.settle()
        targets = daemon.targets()
        self.assertEqual({branch: (entry["state"], entry["commit"])
                          for (_, branch), entry in targets.items()},
                         {"main": ("ok", sha("main")), "bad": ("failed", sha("bad")),
                          "dev": ("ok", sha("newer"))})
        self.assertEqual(self.history(daemon, "main")[0]["pusher"], "mona")
        self.did(daemon, "rollback", "octo/site", "dev", sha("dev")[:9])
        self.assertEqual(daemon.seen()[-1], sha("dev"))

    def test_the_copy_is_made_once(self):
        daemon = self.old_state()
        daemon.open_gate()
        daemon.start()
        before = sorted(os.listdir(daemon.state))
        daemon.settle()
        daemon.stop()
        daemon.start()
        self.assertEqual(sorted(os.listdir(daemon.state)), before)


class StatesAndVerbs(VerbCase):
    """Each verb in each state of the last run of a branch, the daemon up or down."""

    # Rows: the state of run N, the newest of a branch whose run before it was ok.
    # Cells: exit status, and the state of what the verb was about: for `run` and `rollback` the
    # run that it queued (and the commit that stands then), for the others run N. "+" opens the
    # gate of what runs once the verb's row is there.
    UP = """
                  run      rollback   cancel       cancel-all   pause       resume      log  status
    never         0:ok     1          1            1            0           1           1    0
    queued        +0:ok    +0:ok:old  0:cancelled  0:cancelled  0:queued    1:queued    0    0
    paused        0:ok     1          0:cancelled  0:cancelled  0:queued    0:ok        0    0
    running       +0:ok    +0:ok:old  0:cancelled  0:cancelled  0:running   1:running   0    0
    ok            0:ok     0:ok:old   1:ok         1:ok         0:ok        1:ok        0    0
    failed        0:ok     0:ok:old   1:failed     1:failed     0:failed    1:failed    0    1
    timeout       0:ok     0:ok:old   1:timeout    1:timeout    0:timeout   1:timeout   0    1
    interrupted   0:ok     0:ok:old   1:interrupted 1:interrupted 0:interrupted 1:interrupted 0 1
    cancelled     0:ok     0:ok:old   1:cancelled  1:cancelled  0:cancelled 1:cancelled 0    1
    superseded    0:ok     0:ok:new   1:superseded 1:superseded 0:superseded 1:superseded 0  0
    """
    # Exit status while down; state of the run then; after the start (the gate stands open).
    DOWN = """
                  run               rollback              cancel                  pause
    queued        1:queued:ok       1:queued:ok           0:cancelled:cancelled   0:queued:queued
    running       1:queued:ok       1:queued:ok           0:running:cancelled     0:running:queued
    ok            1:queued:ok       1:queued:ok           1:ok:ok                 0:ok:ok
    """
    SCRIPT = f"""\
echo "$HOOKD_COMMIT" >> "$HOME/seen.$HOOKD_SLUG"
[ "$HOOKD_COMMIT $HOOKD_CAUSE" = "{NEW} delivery" ] || exit 0
case "$HOOKD_BRANCH" in
ok-*|paused-*) ;;
failed-*) exit 3;;
timeout-*) sleep 60;;
*) until [ -e "$HOME/gate.$HOOKD_SLUG" ]; do sleep 0.05; done;;
esac
"""

    def cells(self, table):
        """Return {(state, verb): cell} of a table."""
        head, *rows = [line.split() for line in table.strip().splitlines()]
        for state, *cells in rows:
            self.assertEqual(len(cells), len(head), state)
        return {(state, verb): cell for state, *cells in rows for verb, cell in zip(head, cells)}

    def newest(self, daemon, branch):
        """Return the number of the newest run of a branch, 0 where there is none."""
        with closing(sqlite3.connect(daemon.state / "hookd.db")) as store:
            sql = "SELECT max(id) FROM runs WHERE ref = ?"
            return store.execute(sql, (f"refs/heads/{branch}",)).fetchone()[0] or 0

    def push_all(self, daemon, branches, commit):
        return {branch: int(re.search(r"run (\d+)", daemon.push(branch, commit).text)[1])
                for branch in branches}

    def wait_for_state(self, daemon, runs, state):
        daemon.wait(lambda: {daemon.states().get(run) for run in runs} <= {state},
                    f"runs {sorted(runs)} to be {state}")

    def arrange(self, cells):
        """Return a daemon with a branch STATE-VERB for each cell, and the run N of each."""
        daemon = self.serve(hook(self.SCRIPT, "timeout-*", timeout="1s"),
                            hook(self.SCRIPT, "*"), jobs=200)
        branches = [f"{state}-{verb}" for state, verb in cells if state != "never"]

        def of(*states):
            return [branch for branch in branches if branch.split("-")[0] in states]

        self.wait_for_state(daemon, self.push_all(daemon, branches, OLD).values(), "ok")
        runs = self.push_all(daemon, of("interrupted"), NEW)
        for attempt in (2, 3) if runs else ():
            for branch in runs:
                daemon.wait(lambda one=branch, n=attempt:
                            len(daemon.read(f"seen.{one}").split()) == n, branch)
            daemon.kill()
            daemon.start()
        self.wait_for_state(daemon, runs.values(), "interrupted")
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda one: daemon.hookd("pause", "octo/site", one), of("paused")))
        runs.update(self.push_all(daemon, of("ok", "failed", "timeout", "paused"), NEW))
        begun = self.push_all(daemon, of("running", "queued", "cancelled", "superseded"), NEW)
        self.wait_for_state(daemon, begun.values(), "running")
        runs.update(begun)
        runs.update(self.push_all(daemon, of("queued", "superseded"), sha("mid")))
        self.push_all(daemon, of("superseded"), sha("last"))
        for branch in of("superseded"):
            (self.home / f"gate.{branch}").touch()
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda one: daemon.hookd("cancel", str(begun[one])), of("cancelled")))
        for branch, run in runs.items():
            state = branch.split("-")[0].replace("paused", "queued")
            self.wait_for_state(daemon, [run], state)
        daemon.wait(lambda: all(daemon.read(f"seen.{one}").split()[-1] == sha("last")
                                for one in of("superseded")), "the last ones")
        return daemon, runs

    def words(self, verb, branch, run):
        where = ("octo/site", branch)
        return {"cancel": ("cancel", str(run or 9999)), "log": ("log", str(run or 9999)),
                "cancel-all": ("cancel", *where)}.get(verb, (verb, *where))

    def outcome(self, daemon, state, verb, run, cell):
        """Do what a cell says; return what came of it, written as the cell."""
        branch = f"{state}-{verb}"
        before = self.newest(daemon, branch)
        one = Verb(daemon, *self.words(verb, branch, run))
        if cell[0] == "+":
            daemon.wait(lambda: self.newest(daemon, branch) > before
                        or one.process.poll() is not None, "the verb's own run")
            (self.home / f"gate.{branch}").touch()
        told = ["+" * (cell[0] == "+") + str(one.end())]
        if "Traceback" in one.text:
            return one.text
        number = self.newest(daemon, branch) if verb in ("run", "rollback") else run
        if verb == "resume" and told == ["0"]:
            self.wait_for_state(daemon, [run], "ok")
        if number and verb not in ("log", "status") and not (
                verb in ("run", "rollback") and number == before):
            told.append(daemon.states()[number])
        if verb == "rollback" and told[1:]:
            last = daemon.read(f"seen.{branch}").split()[-1]
            told.append({OLD: "old", NEW: "new", sha("mid"): "mid"}.get(last, last))
        return ":".join(told)

    def test_each_verb_has_its_outcome_in_each_state(self):
        cells = self.cells(self.UP)
        daemon, runs = self.arrange(cells)
        with ThreadPoolExecutor(3) as pool:
            told = pool.map(lambda key: self.outcome(daemon, *key, runs.get("-".join(key), 0),
                                                     cells[key]), cells)
            told = dict(zip(cells, told))
        for (state, verb), wanted in cells.items():
            with self.subTest(state=state, verb=verb):
                self.assertEqual(told[state, verb], wanted)

    def test_each_verb_has_its_outcome_while_the_daemon_is_down(self):
        cells = self.cells(self.DOWN)
        daemon, runs = self.arrange(cells)
        daemon.kill()
        told, numbers = {}, {}
        for state, verb in cells:
            branch = f"{state}-{verb}"
            done = daemon.hookd(*self.words(verb, branch, runs[branch]))
            numbers[state, verb] = (self.newest(daemon, branch) if verb in ("run", "rollback")
                                    else runs[branch])
            told[state, verb] = f"{done.code}:{daemon.states()[numbers[state, verb]]}"
            self.assertNotIn("Traceback", done.err)
            (self.home / f"gate.{branch}").touch()
        daemon.start()
        for (state, verb), wanted in cells.items():
            with self.subTest(state=state, verb=verb):
                end = wanted.split(":")[2]
                self.assertEqual(f"{told[state, verb]}:{end}", wanted)
                self.wait_for_state(daemon, [numbers[state, verb]], end)

    def test_verbs_at_the_same_instant_leave_one_truth(self):
        pairs = ((("run",), ("run",)), (("run",), ("cancel",)), (("rollback",), ("cancel",)),
                 (("pause",), ("resume",)), (("pause",), ("pause",)), (("rollback",), ("run",)),
                 (("cancel",), ("cancel",)), (("resume",), ("resume",)),
                 (("rollback",), ("pause",)))
        daemon = self.serve(hook(NOTE, "*"), jobs=20)
        for number, pair in enumerate(pairs):
            with self.subTest(pair):
                where = ("octo/site", f"b{number}")
                for commit in (OLD, NEW):
                    daemon.push(where[1], commit)
                    daemon.settle()
                if "resume" in pair[0]:
                    daemon.hookd("pause", *where)
                verbs = [Verb(daemon, *words, *where) for words in pair]
                codes = sorted(one.end() for one in verbs)
                text = "".join(one.text for one in verbs)
                self.assertNotRegex(text, "Traceback|locked|busy")
                daemon.settle()
                if pair[0] == pair[1]:
                    self.assertEqual(codes, {"run": [0, 0], "pause": [0, 0], "cancel": [1, 1],
                                             "resume": [0, 1]}[pair[0][0]], text)
                paused = self.paused(daemon, where[1]) is not None
                if pair == (("rollback",), ("pause",)):
                    self.assertTrue(paused)
                if pair[0] == ("resume",):
                    self.assertFalse(paused)

    def test_verbs_work_while_the_daemon_stops_and_starts(self):
        daemon = self.serve(hook(HOLD + NOTE), hook(NOTE, "dev"), jobs=4)
        for commit in (OLD, NEW):
            daemon.push("dev", commit)
            daemon.settle()
        daemon.push(commit=sha(1))
        self.begun(daemon, 3)
        daemon.tell(signal.SIGTERM)
        daemon.wait_for_log("stopping after 1 running command")
        run = Verb(daemon, "run", "octo/site", "dev")
        run.wait_for("run 4")
        self.did(daemon, "pause", *WHERE, "-m", "while it stops")
        self.did(daemon, "cancel", "3")
        self.assertEqual(daemon.states()[3], "cancelled")
        self.assertEqual(daemon.ended(), 0)
        back = Verb(daemon, "rollback", "octo/site", "dev", OLD)
        self.assertEqual(back.end(), 1)
        daemon.start()
        self.assertEqual(run.end(), 0, run.text)
        daemon.wait(lambda: daemon.states()[5] == "ok", "the rollback")
        self.assertEqual((daemon.seen()[-1], self.paused(daemon)), (OLD, "while it stops"))

    def limit(self, pid, size):
        """Let a process write files of so many bytes at most; None lifts that."""
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard if size is None else size, hard))

    def test_on_a_full_disk_a_verb_changes_nothing_and_says_so(self):
        daemon = self.serve(hook(HOLD, "dev"), hook(NOTE))
        self.push_each(daemon, 1, 2)
        daemon.push("dev")
        self.begun(daemon, 3)
        states = daemon.states()
        limit = {"preexec_fn": lambda: self.limit(0, 1)}
        for words in (("run", *WHERE), ("rollback", *WHERE), ("pause", *WHERE), ("cancel", "3")):
            with self.subTest(words):
                told = daemon.hookd(*words, **limit)
                self.assertEqual(told.code, 1, told)
                self.assertRegex(told.err, "(?i)disk|full|space|large")
                self.assertNotIn("Traceback", told.err)
                self.assertEqual((daemon.states(), self.paused(daemon)), (states, None))
        self.did(daemon, "status", "octo/site", "main", **limit)
        self.did(daemon, "log", "3", **limit)
        self.did(daemon, "cancel", "3")

    def test_a_daemon_on_a_full_disk_takes_up_later_what_a_verb_asked_for(self):
        daemon = self.serve(hook(HOLD, "dev"), hook(NOTE))
        daemon.push(commit=sha(1))
        daemon.settle()
        daemon.push("dev")
        self.begun(daemon, 2)
        self.limit(daemon.process.pid, 1)
        run = Verb(daemon, "run", *WHERE)
        run.wait_for("run 3")
        cancel = Verb(daemon, "cancel", "2")
        self.assert_answer(daemon.push(commit=sha(9)), 503)
        self.limit(daemon.process.pid, None)
        self.assertEqual((run.end(), cancel.end()), (0, 0), run.text + cancel.text)
        self.assertEqual(daemon.states(), {1: "ok", 2: "cancelled", 3: "ok"})


class WhatARunKnows(VerbCase):
    """HOOKD_CAUSE, HOOKD_SUBJECT, HOOKD_SUMMARY, and the log's lines."""

    def message(self, text, branch="main", commit=None):
        payload = push_of(branch, commit)
        payload["head_commit"]["message"] = text
        return payload

    def test_who_asks_for_a_run_gets_it_whatever_the_message_says(self):
        origin = self.repository()
        origin.commit(page="one")
        origin.git("commit", "-q", "--allow-empty", "-m", "Fix [skip deploy]")
        commit = origin.git("rev-parse", "HEAD")
        daemon = self.serve(self.deploying())
        self.did(daemon, "run", *WHERE)
        self.did(daemon, "run", *WHERE, "--commit", commit)
        self.assertEqual(daemon.seen(), [commit] * 2)

    SAY = 'echo "$HOOKD_CAUSE|$HOOKD_SUBJECT" >> "$HOME/said"'

    def test_cause_and_subject_are_known_to_the_command(self):
        origin = self.repository()
        daemon = self.serve(self.deploying(self.SAY, catch_up="1d"))

        def commit(message):
            origin.git("commit", "-q", "--allow-empty", "-m", message)
            return origin.git("rev-parse", "HEAD")

        self.did(daemon, "pause", *WHERE)
        daemon.post(self.message("Another text", commit=commit("One `id`\n\nbody")))
        self.did(daemon, "resume", *WHERE)
        daemon.settle()
        self.did(daemon, "pause", *WHERE)
        commit("Two $(id)")
        self.did(daemon, "resume", *WHERE)
        daemon.wait(lambda: "catch-up" in daemon.read("said"), "catch-up")
        daemon.settle()
        self.did(daemon, "run", *WHERE)
        self.did(daemon, "rollback", *WHERE)
        self.assertEqual(daemon.read("said").splitlines(), [
            "delivery|One `id`", "catch-up|Two $(id)", "run|Two $(id)", "rollback|One `id`"])
        self.assertEqual([run["cause"] for run in self.history(daemon)],
                         ["rollback", "run", "catch-up", "delivery"])

    def test_without_git_the_subject_is_the_deliverys(self):
        daemon = self.serve(hook(self.SAY))
        daemon.post(self.message("Fix the menu\n\nand more"))
        daemon.settle()
        self.assertEqual(daemon.read("said"), "delivery|Fix the menu\n")

    def test_the_summary_is_one_line_for_a_person(self):
        daemon = self.serve(hook('[ "$HOOKD_BRANCH" = good ] || exit 2', "*",
                                 on_success='echo "$HOOKD_SUMMARY" >> "$HOME/said"',
                                 on_failure='echo "$HOOKD_SUMMARY" >> "$HOME/said"'))
        for branch, state in (("good", "ok"), ("main", r"failed \(exit 2\)")):
            with self.subTest(branch):
                daemon.post(self.message("Fix the menu\nmore", branch))
                daemon.settle()
                said = daemon.read("said").splitlines()
                self.assertRegex(said[-1], rf'^octo/site {branch} {state} at {sha("commit")[:7]} '
                                 rf'"Fix the menu" by mona, run {len(said)}, \d+ s$')

    def test_the_logs_lines_name_pusher_subject_and_cause(self):
        daemon = self.serve(hook("true"))
        daemon.post(self.message("Fix the menu"))
        daemon.settle()
        line = re.search("run 1 ok: .*", daemon.log)[0]
        for word in ("octo/site main", sha("commit")[:7], "Fix the menu", "mona"):
            self.assertIn(word, line)
        self.did(daemon, "run", *WHERE)
        self.assertRegex(daemon.log, rf"run 2 ok: octo/site main .*pusher={WHO} .*cause=run\n")


# ---------------------------------------------------------------- Hostile

PUSH = json.dumps(push_of("hostile")).encode()
CUT = -len(PUSH)


def with_length(value):
    """Return a signed push whose Content-Length is the raw bytes `value`."""
    return request(PUSH).replace(b"Content-Length: %d" % len(PUSH), b"Content-Length: " + value)


def with_line(line):
    """Return a signed push whose request line is the raw bytes `line`."""
    return line + request(PUSH)[len(b"POST / HTTP/1.1"):]


LENGTHS = {
    "signed": (b"+%d" % len(PUSH), 400), "negative": (b"-1", 400), "nothing": (b"", 400),
    "underscored": (b"1_0", 400), "hexadecimal": (b"0x10", 400), "a fraction": (b"5.0", 400),
    "an exponent": (b"1e3", 400), "a list": (b"5, 5", 400), "a word": (b"five", 400),
    "no-break space": (b"\xa05", 400), "Arabic digits": ("٥".encode(), 400),
    "superscript": (b"\xb2", 400), "two words": (b"5 5", 400),
    "a huge number": (b"9" * 30, 413), "very many digits": (b"9" * 5000, 413),
    "over the limit": (b"26214401", 413), "leading tab and NUL": (b"\t\0005", 400),
    "less than the body": (b"%d" % (len(PUSH) - 1), 403), "zero": (b"0", 403)}

LINES = {
    "HTTP/0.9": (b"POST /", 400), "HTTP/0.9 in words": (b"POST / HTTP/0.9", 400),
    "HTTP/2.0": (b"POST / HTTP/2.0", 400), "HTTP/1.2": (b"POST / HTTP/1.2", 400),
    "HTTP/11": (b"POST / HTTP/11", 400), "HTTP/1.1.1": (b"POST / HTTP/1.1.1", 400),
    "http/1.1": (b"POST / http/1.1", 400), "ICY": (b"POST / ICY/1.1", 400),
    "no path": (b"POST HTTP/1.1", 400), "two spaces": (b"POST  / HTTP/1.1", 400),
    "a tab": (b"POST\t/\tHTTP/1.1", 400), "a space first": (b" POST / HTTP/1.1", 400),
    "a space last": (b"POST / HTTP/1.1 ", 400), "a space in the path": (b"POST /a b HTTP/1.1", 400),
    "lower case": (b"post / HTTP/1.1", 501), "no name": (b" / HTTP/1.1", 400),
    "a method of symbols": (b"P@ST / HTTP/1.1", 400),
    "CONNECT": (b"CONNECT x:1 HTTP/1.1", 404),
    "an asterisk": (b"OPTIONS * HTTP/1.1", 404),
    "absolute form": (b"POST http://evil.test/x HTTP/1.1", 404),
    "two slashes": (b"POST // HTTP/1.1", 404), "dots": (b"POST /.. HTTP/1.1", 404),
    "dots in between": (b"POST /x/../ HTTP/1.1", 404), "encoded NUL": (b"POST /%00 HTTP/1.1", 404),
    "encoded slash": (b"POST %2F HTTP/1.1", 404), "NUL": (b"POST /\0 HTTP/1.1", 400),
    "controls": (b"POST /\x01\x1b[2J HTTP/1.1", 400), "DEL": (b"POST /\x7f HTTP/1.1", 400),
    "bare CR": (b"POST /\rX HTTP/1.1", 400), "not ASCII": (b"POST /\xff HTTP/1.1", 400),
    "a fragment": (b"POST /#x HTTP/1.1", 404),
    "64 KB": (b"POST /" + b"x" * 65536 + b" HTTP/1.1", 414)}

FIELDS = {
    "no colon": (b"Nonsense", 400), "space before the colon": (b"X-Y : z", 400),
    "no name": (b": x", 400), "folded": (b"X-Y: a\r\n b", 400), "folded first": (b" a: b", 400),
    "NUL in the name": (b"X\0Y: b", 400),
    "a control": (b"X-Y: \x1b[2J", 400), "a name in Latin-1": (b"X-\xe9: a", 400),
    "a name in brackets": (b"(X): a", 400),
    "one length twice": (b"Content-Length: %d" % len(PUSH), 400),
    "odd chunked beside a length": (b"Transfer-Encoding: xchunked", 400),
    "gzip": (b"Content-Encoding: gzip", 415),
    "101 fields": (b"\r\n".join(b"X-%d: y" % number for number in range(101)), 431),
    "one of 40 KB": (b"X-Y: " + b"z" * 40_000, 431),
    "a name of 20 KB": (b"X" * 20_000 + b": y", 431),
    "4 MB of them": (b"\r\n".join([b"X-Y: " + b"z" * 40_000] * 100), 431)}

WHOLE = {
    "a TLS hello": (bytes.fromhex("16030100c8010000c40303") + bytes(190), 400),
    "an HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 400),
    "binary": (bytes(range(256)) * 4, 400), "empty lines": (b"\r\n" * 50, 400),
    "an SSH client": (b"SSH-2.0-OpenSSH_9.2\r\n", 400),
    "a head of LF": (request(PUSH)[:CUT].replace(b"\r\n", b"\n") + PUSH, 400),
    "a head of CR": (request(PUSH)[:CUT].replace(b"\r\n", b"\r") + PUSH, 400),
    "half a head": (request(PUSH)[:80], 400), "half a body": (request(PUSH)[:-9], 400),
    "nothing": (b"", 0), "no type": (request(PUSH, Content_Type=None), 415),
    "an image": (request(PUSH, Content_Type="image/png"), 415),
    "several parts": (request(PUSH, Content_Type="multipart/form-data; boundary=x"), 415),
    "JSON by another name": (request(PUSH, Content_Type="application/jsonp"), 415),
    "a form that is JSON": (request(PUSH, Content_Type="application/x-www-form-urlencoded"), 400),
    "chunked": (request(b"5\r\nhello\r\n0\r\n\r\n", Content_Length=None,
                        Transfer_Encoding="chunked"), 411),
    "chunked and gzip": (request(PUSH, Content_Length=None,
                                 Transfer_Encoding="gzip, chunked"), 501),
    "a wish that nobody grants": (request(PUSH, Expect="a miracle"), 202),
    "an upgrade": (request(PUSH, Connection="Upgrade", Upgrade="h2c"), 202)}

FINE = {  # as unusual, and right
    "a charset": request(PUSH, Content_Type="Application/JSON; charset=UTF-8"),
    "space around a value": with_fields(b"X-Y: \t a \t "),
    "an empty value": with_fields(b"X-Y:"),
    "HTTP/1.0": with_line(b"POST / HTTP/1.0"),
    "names in lower case": request(PUSH).replace(b"X-Hub-Signature", b"x-hub-signature").replace(
        b"Content-Length", b"content-length")}


class Hostile(Case):
    """Whatever anyone sends: an answer from the table or a closed connection, and nothing runs."""

    def test_every_request_is_answered_from_the_table_or_closed(self):
        daemon = self.serve(hook(NOTE, "*"))
        rows = {"length: " + name: (with_length(value), status)
                for name, (value, status) in LENGTHS.items()}
        rows.update(("line: " + name, (with_line(line), status))
                    for name, (line, status) in LINES.items())
        rows.update(("field: " + name, (with_fields(line, body=PUSH), status))
                    for name, (line, status) in FIELDS.items())
        rows.update(WHOLE)
        for name, (raw, status) in rows.items():
            with self.subTest(name):
                began = time.monotonic()
                self.assert_answer(daemon.exchange(raw, half_close=True), status)
                self.assertLess(time.monotonic() - began, 9, "not answered but given up")
        for name, raw in FINE.items():
            with self.subTest(name):
                self.assert_answer(daemon.exchange(raw), 202)
        self.assert_answer(daemon.push("the-end"), 202)

    def test_what_is_refused_is_answered_without_waiting_for_more(self):
        daemon = self.serve(hook(NOTE, "*"))
        for raw in (with_line(LINES["HTTP/2.0"][0]), with_fields(FIELDS["no colon"][0]),
                    with_length(LENGTHS["negative"][0]), WHOLE["a TLS hello"][0]):
            with self.subTest(raw[:40]):
                began = time.monotonic()
                self.assert_answer(daemon.exchange(raw), 400)
                self.assertLess(time.monotonic() - began, 9)

    def test_a_reset_connection_is_nobodys_problem(self):
        daemon = self.serve(hook(NOTE))
        whole = request(push_of())
        for end in (0, 10, 100, len(whole) - 1, len(whole)):
            one = daemon.connect()
            one.sendall(whole[:end])
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            one.close()
        self.assert_answer(daemon.push(), 202)

    def test_a_client_that_sends_byte_by_byte_in_time_is_served(self):
        daemon = self.serve(hook(NOTE))
        raw = request(push_of())
        with closing(daemon.connect()) as one, one.makefile("rb") as stream:
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for position in range(len(raw)):
                one.sendall(raw[position:position + 1])
            self.assert_answer(read_answer(stream), 202)

    def test_many_slow_senders_do_not_delay_a_push(self):
        daemon = self.serve(hook(NOTE))
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        with ExitStack() as stack:
            for number in range(min(300, soft // 3)):
                one = stack.enter_context(closing(daemon.connect()))
                one.sendall(request(PUSH)[:number + 1])
            began = time.monotonic()
            self.assert_answer(daemon.push(), 202)
            self.assertLess(time.monotonic() - began, 5)

    def test_bodies_in_flight_are_bounded_in_all(self):
        daemon = self.serve(hook(NOTE))
        large = request(b"", Content_Length=25_000_000) + b"x" * 9_000_000
        with ExitStack() as stack:
            held = [stack.enter_context(closing(daemon.connect())) for _ in range(6)]
            for one in held:
                one.settimeout(3)
                with suppress(OSError):
                    one.sendall(large)
            self.assert_answer(daemon.push(), 202)
            refused = []
            for one in held:
                one.setblocking(False)
                with suppress(OSError):
                    refused.append(one.recv(12))
            self.assertIn(b"HTTP/1.1 503", refused)

    def test_a_request_that_fills_the_room_by_its_end_is_answered_once(self):
        def refused(connection, refusal):
            connection.answer(refusal.status, refusal.reason)

        listener = hookd.open_socket("127.0.0.1:0")
        server = hookd.Server(lambda *_: None, refused)
        with listener, closing(server.selector):
            server.listen([listener])
            server.room = 2000
            with socket.create_connection(listener.getsockname(), PATIENCE) as one:
                one.sendall(request(b"", Content_Length=2200) + b"x" * 1500)
                wait_for(lambda: server.poll(0.1) or server.held == 1500, "the first part")
                one.sendall(b"x" * 700)
                wait_for(lambda: server.poll(0.1) or server.held == 0, "the refusal")
                one.shutdown(socket.SHUT_WR)
                wait_for(lambda: server.poll(0.1) or not server.connections, "the end")
                with one.makefile("rb") as stream:
                    said = [read_answer(stream).status for _ in range(2)]
        self.assertEqual(said, [503, 0])

    def test_memory_and_descriptors_come_back_down(self):
        daemon = self.serve(hook("true"))
        self.assert_answer(daemon.push(), 202)
        daemon.settle()
        before = len(os.listdir(f"/proc/{daemon.process.pid}/fd"))
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(closing(daemon.connect())).sendall(b"POST / HTTP/1.1\r\n")
            self.assert_answer(daemon.push(), 202)
        daemon.settle()
        daemon.wait(lambda: len(os.listdir(f"/proc/{daemon.process.pid}/fd")) <= before + 2,
                    "the descriptors to be closed")

    def test_a_duplicate_key_is_read_in_one_way_only(self):
        daemon = self.serve(hook(NOTE, "main"))
        body = json.dumps(push_of("main", sha("last"))).encode()
        twice = body[:-1] + b', "ref": "refs/heads/dev"}'
        answer = daemon.post(twice)
        self.assert_answer(answer, 200, "ignored: no hook for octo/site dev")
        self.assertEqual(daemon.targets(), {})

    def test_numbers_that_are_none_are_refused_or_kept_out(self):
        daemon = self.serve(hook(NOTE))
        for number, status in ((b"NaN", 400), (b"Infinity", 400), (b"-Infinity", 400),
                               (b"1" * 400, 202), (b"1e999", 202), (b"-0", 202)):
            with self.subTest(number[:9]):
                body = json.dumps(push_of()).encode()
                body = re.sub(rb'"pushed_at": \d+', b'"pushed_at": ' + number, body)
                self.assert_answer(daemon.post(body), status)
        self.assert_answer(daemon.push(), 202)


# ---------------------------------------------------------------- Promises


class Promises(Case):
    """The promises of the contract, each as one story."""

    def test_nothing_is_parsed_logged_in_full_or_run_before_its_signature_is_verified(self):
        daemon = self.serve(hook(NOTE))
        mark = "a-mark-that-is-nowhere-else"
        for body in (push_of(note=mark), b"[" * 50_000 + mark.encode(), mark.encode()):
            for signature in (None, "sha256=" + "0" * 64, ""):
                answer = daemon.post(body, X_Hub_Signature_256=signature)
                self.assert_answer(answer, 403, "signature")
        self.assert_answer(daemon.push(), 202)
        daemon.settle()
        self.assertEqual(len(daemon.seen()), 1)
        self.assertNotIn(mark, daemon.log)
        stored = b"".join(one.read_bytes() for one in daemon.state.rglob("*") if one.is_file())
        self.assertNotIn(mark.encode(), stored)

    def test_a_push_answered_202_is_deployed_or_its_failure_is_told(self):
        daemon = self.serve(hook(NOTE, "*", queue="every"), jobs=2)
        accepted = []
        for number in range(24):
            commit = sha(number)
            if daemon.push(f"b{number % 3}", commit).status == 202:
                accepted.append(commit)
            if number == 15:  # once: what is cut off twice is told as interrupted
                daemon.kill()
                daemon.start()
        daemon.settle()
        self.assertEqual(len(accepted), 24)
        self.assertEqual(set(accepted) - set(daemon.seen()), set())
        self.assertEqual(set(daemon.states().values()), {"ok"})

    def test_two_runs_never_work_in_one_directory_whoever_started_them(self):
        daemon = self.serve(hook(alone("sleep 0.1") + NOTE))
        with ThreadPoolExecutor(6) as pool:
            runs = [pool.submit(daemon.hookd, "run", "octo/site", "main") for _ in range(3)]
            for number in range(6):
                daemon.push(commit=sha(number))
            daemon.wait(lambda: len(daemon.states()) == 9, "each run to be in the queue")
            daemon.kill()
            daemon.start()
            self.assertEqual([run.result().code for run in runs], [0, 0, 0])
        daemon.settle()
        self.assert_never_overlapped(daemon)
        self.assertIn(sha(5), daemon.seen())

    def test_a_late_repeated_or_replayed_delivery_never_brings_old_code_back(self):
        origin = Repository(self.home / "origin")
        old = origin.commit(page="old")
        daemon = self.serve(hook(NOTE, git=origin.path, directory=self.home / "live",
                                 catch_up="no"))
        replay = request(push_of(commit=old))
        self.assert_answer(daemon.exchange(replay), 202)
        daemon.settle()
        new = origin.commit(page="new")
        self.assert_answer(daemon.push(commit=new), 202)
        daemon.settle()
        self.assert_answer(daemon.exchange(replay), 202)
        daemon.settle()
        self.assertEqual(daemon.read("live/page"), "new")
        self.assertEqual(daemon.seen(), [old, new, new])

    def test_a_run_ends_with_its_whole_process_group(self):
        command = 'for number in 1 2 3; do (sleep 300; true) & done\n'
        daemon = self.serve(hook(command + "sleep 300", "a", timeout="1s"), hook(command, "b"),
                            hook(command + "exit 1", "c"), jobs=3)
        for branch in "abc":
            daemon.push(branch)
        daemon.settle()
        targets = daemon.targets()
        states = [targets["octo/site", branch]["state"] for branch in "abc"]
        self.assertEqual(states, ["timeout", "ok", "failed"])
        daemon.wait(lambda: daemon.descendants() == [daemon.process.pid], "all of them to end")

    def test_one_file_and_python_are_enough(self):
        shutil.copy(HOOKD, self.home / "only.py")
        daemon = self.prepare(hook(NOTE))
        command = [sys.executable, "-I", "-S", str(self.home / "only.py"), "-c", str(daemon.ini)]
        daemon.process = daemon.spawn(command)
        found = daemon.wait_for_log(r"listening on (\S+)")
        daemon.address = found.group(1)
        self.assert_answer(daemon.push(), 202)
        self.assertEqual(daemon.wait_for("seen").split(), [sha("commit")])


# ---------------------------------------------------------------- House


class House(unittest.TestCase):
    """The rules of style.md that a machine can check, and that page and program say the same."""

    LONGEST = 4500  # a bound to shrink, never to fill
    PARTS = ["errors", "values", "configuration", "judgement", "store", "work", "HTTP",
             "systemd and log", "reports and page", "decisions", "daemon", "command line"]
    BROAD = {  # who may catch everything: a thread's root, and who drops one value alone
        "Job.work", "Messenger.deliver", "Messenger.paint", "Remotes.ask", "Daemon.serve",
        "Dispatcher.guarded", "Daemon.carry_out"}

    def setUp(self):
        self.text = HOOKD.read_text()
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.functions = [node for node in ast.walk(self.tree)
                          if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        self.tops = [node for node in self.tree.body
                     if isinstance(node, (ast.ClassDef, ast.FunctionDef))]

    def code_lines(self, function):
        """Count the lines of a function that are neither blank, comment nor docstring."""
        wanted = set(range(function.lineno, function.end_lineno + 1))
        if ast.get_docstring(function):
            wanted -= set(range(function.body[0].lineno, function.body[0].end_lineno + 1))
        texts = (self.lines[number - 1].strip() for number in wanted)
        return sum(1 for text in texts if text and not text.startswith("#"))

    def test_hookd_stays_one_file_of_a_size_to_read(self):
        self.assertLessEqual(len(self.lines), self.LONGEST)

    def test_lines_have_at_most_100_columns(self):
        for path in (HOOKD, HERE / "test_hookd.py"):
            lines = enumerate(path.read_text().splitlines(), 1)
            self.assertEqual([number for number, line in lines if len(line) > 100], [], path.name)

    def test_functions_are_short_and_have_few_parameters(self):
        sizes = sorted(map(self.code_lines, self.functions))
        self.assertLessEqual(sizes[len(sizes) // 2], 8)
        long = [one.name for one in self.functions if self.code_lines(one) > 40]
        wide = [one.name for one in self.functions if self.parameters(one) > 5]
        self.assertEqual((long, wide), ([], []))

    def parameters(self, function):
        names = [one.arg for one in (*function.args.posonlyargs, *function.args.args,
                                     *function.args.kwonlyargs)]
        return len([name for name in names if name not in ("self", "cls")])

    def test_only_the_standard_library_is_imported(self):
        known = getattr(sys, "stdlib_module_names", None)
        if known is None:
            self.skipTest("this Python does not list its library")
        for node in ast.walk(self.tree):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                self.assertEqual(node.level, 0)
                names = [node.module]
            for name in names:
                self.assertIn(name.partition(".")[0], known)

    def test_an_old_python_gets_one_sentence(self):
        ast.parse(self.text, feature_version=(3, 6))
        self.assertNotIn("from __future__", self.text)
        for version in ((3, 6, 15), (3, 8, 20)):
            with self.subTest(version):
                code = (f"import runpy, sys; sys.version_info = {version}\n"
                        f"runpy.run_path({str(HOOKD)!r}, run_name='__main__')")
                done = subprocess.run([sys.executable, "-c", code], env=clean_environment(),
                                      capture_output=True, check=False)
                self.assertEqual((done.returncode, done.stdout), (1, b""))
                self.assertRegex(done.stderr, rb"\Ahookd needs Python 3\.9 or later; [^\n]*\n\Z")

    def test_the_licence_is_named_at_the_top(self):
        self.assertIn("# SPDX-License-Identifier: MIT", self.lines[:3])

    def test_there_is_no_global_and_no_broad_except_but_at_a_threads_root(self):
        self.assertEqual([node.names for node in ast.walk(self.tree)
                          if isinstance(node, ast.Global)], [])
        broad = set()
        for name, function in self.named_functions():
            for node in ast.walk(function):
                if not isinstance(node, ast.ExceptHandler) or not self.is_broad(node):
                    continue
                if isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None:
                    continue  # it cleans up and passes the exception on
                self.assertIn("log.exception(", ast.unparse(node), f"{name} keeps silent")
                broad.add(name)
        self.assertEqual(broad, self.BROAD)

    def named_functions(self):
        """Yield the functions of the top level and of its classes, with their names."""
        for top in self.tops:
            for node in top.body if isinstance(top, ast.ClassDef) else [top]:
                if isinstance(node, ast.FunctionDef):
                    yield node.name if node is top else f"{top.name}.{node.name}", node

    def is_broad(self, handler):
        caught = handler.type
        names = caught.elts if isinstance(caught, ast.Tuple) else [caught]
        return any(name is None or getattr(name, "id", "") in ("Exception", "BaseException")
                   for name in names)

    def test_every_class_and_every_longer_function_says_what_it_is(self):
        longer = [one for one in self.functions
                  if self.code_lines(one) > 12 and one.name != "__init__"]
        classes = [one for one in ast.walk(self.tree) if isinstance(one, ast.ClassDef)]
        silent = [getattr(one, "name", "hookd") for one in (self.tree, *classes, *longer)
                  if not ast.get_docstring(one)]
        self.assertEqual(silent, [])

    def test_judgement_opens_no_file_socket_or_clock(self):
        self.check_names("errors", "judgement", {
            "open", "os", "socket", "time", "subprocess", "threading", "sqlite3", "Path", "logging",
            "log", "random", "tempfile", "input", "print", "selectors", "select", "resource"})

    def test_decisions_know_no_socket_thread_or_process(self):
        self.check_names("decisions", "decisions", {
            "open", "socket", "subprocess", "threading", "selectors", "select", "signal", "print",
            "start_thread", "Server", "Connection", "Messenger", "Remotes"})

    def check_names(self, first, last, forbidden):
        """Check that some parts use none of these names; os.path is no file."""
        places = dict(self.parts())
        end = self.PARTS[self.PARTS.index(last) + 1]
        inside = [node for node in ast.walk(self.tree)
                  if places[first] <= getattr(node, "lineno", 0) < places[end]]
        paths = {id(node.value) for node in inside if isinstance(node, ast.Attribute)
                 and ast.unparse(node) == "os.path"}
        probes = {"exists", "lexists", "isdir", "isfile", "islink", "realpath", "stat"}
        for node in inside:
            if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                    and id(node) not in paths):
                self.assertNotIn(node.id, forbidden, f"line {node.lineno}")
            if isinstance(node, ast.Attribute) and "os" in forbidden:
                self.assertNotIn(node.attr, probes, f"line {node.lineno}")

    def parts(self):
        """Return the parts with their first lines, by their banners."""
        return [(line.strip("#= "), number) for number, line in enumerate(self.lines, 1)
                if line.startswith("# ====")]

    def test_the_parts_stand_in_the_order_of_the_book(self):
        self.assertEqual([name for name, _ in self.parts()], self.PARTS)

    def test_nothing_uses_what_stands_below_it(self):
        place = {one.name: one.lineno for one in self.tops}
        downward = {f"{one.name} uses {node.id}" for one in self.tops for node in ast.walk(one)
                    if isinstance(node, ast.Name) and place.get(node.id, 0) > one.end_lineno
                    and node.id not in self.own_names(one)}
        self.assertEqual(downward, set())

    def own_names(self, top):
        """Return the names that a function or a class gives to its own values."""
        return ({node.arg for node in ast.walk(top) if isinstance(node, ast.arg)}
                | {node.id for node in ast.walk(top)
                   if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)})

    def test_the_top_level_is_exactly_five_files(self):
        if not (HERE / ".git").exists():
            self.skipTest("not a checkout")
        listed = subprocess.run(["git", "-C", str(HERE), "ls-files"], capture_output=True,
                                check=True, env=clean_environment()).stdout.decode().split("\n")
        top = {name.partition("/")[0] for name in listed if name and not name.startswith(".")}
        self.assertEqual(top, {"hookd.py", "hookd.ini", "hookd.service", "test_hookd.py",
                               "README.md"})


class Documents(Case):
    """hookd.ini and README.md say what hookd does."""

    README = HERE / "README.md"
    SHIPPED = HERE / "hookd.ini"

    def test_the_readme_is_short(self):
        self.assertLessEqual(len(self.README.read_text().splitlines()), 200)

    def test_each_ini_in_the_readme_is_read(self):
        recipes = HERE / ".ci" / "recipes.md"
        text = self.README.read_text() + (recipes.read_text() if recipes.exists() else "")
        blocks = re.findall(r"```ini\n(.*?)```", text, re.DOTALL)
        self.assertGreaterEqual(len(blocks), 3)
        for block in blocks:
            with self.subTest(block.splitlines()[0]):
                read_ini(block)

    def test_the_shipped_ini_is_read_and_its_example_works(self):
        daemon = self.prepare()
        text = self.SHIPPED.read_text()
        daemon.ini.write_text(text.replace("#listen = 127.0.0.1:9000", "listen = 127.0.0.1:0")
                              .replace("#log = auto", "log = stderr")
                              .replace("#state = /var/lib/hookd", f"state = {daemon.state}"))
        daemon.start()
        told = daemon.hookd("send", "--wait", "octo/site", "main")
        self.assertEqual(told.code, 0, told)
        self.assertIn("octo/site", daemon.hookd("log").out)


# ---------------------------------------------------------------- Running them


class Recorder:
    """A result that keeps what one test reports until it can be told in one piece."""

    shouldStop = failfast = False  # noqa: N815 (unittest's own name)

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith(("add", "startTest", "stopTest")):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, arguments))

    def tell(self, result):
        for name, arguments in self.calls:
            getattr(result, name, lambda *_: None)(*arguments)


class Together(unittest.TestSuite):
    """A suite whose tests run several at a time: most of each is waiting."""

    def run(self, result, debug=False):
        with ThreadPoolExecutor(JOBS) as pool:
            tests = sorted(flatten(self), key=lambda test: not any(
                name in test.id() for name in LONGEST))
            for recorder in pool.map(self.run_one, tests):
                recorder.tell(result)
        return result

    def run_one(self, test):
        recorder = Recorder()
        test.run(recorder)
        return recorder


LONGEST = (  # these begin first, so that nothing is waited for at the end
    "StatesAndVerbs", "test_at_each_step", "test_what_ignores", "OneReport", "Cost", "Scarcity",
    "test_redaction", "Cancel", "ten_seconds", "Healthcheck", "test_a_page_on_which")


def flatten(suite):
    """Yield the tests of a suite of suites."""
    for one in suite:
        if isinstance(one, unittest.TestSuite):
            yield from flatten(one)
        else:
            yield one


class Loader(unittest.TestLoader):
    suiteClass = Together  # noqa: N815 (unittest's own name)


def load_tests(loader, tests, pattern):
    """Let `python3 -m unittest` run the tests of this module together, too."""
    return Together([tests])


if __name__ == "__main__":
    unittest.main(testLoader=Loader())
