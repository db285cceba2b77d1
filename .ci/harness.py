"""What every check stands on: all that test_hookd.py has, other servers, processes, tools."""

import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import unittest
from contextlib import suppress
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from test_hookd import *

HERE = Path(__file__).resolve().parent
# Debian's interpreter where there is one: another's site packages would change the memory figures.
PYTHON = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable


class Service(Daemon):
    """A daemon that starts as by hookd.service, where it compiles itself each time."""

    def spawn(self, command, sockets=(), names="", **more):
        unit = (HERE.parent / "hookd.service").read_text()
        line = re.search(r"(?m)^ExecStart=(?:\S*/)?python3 (.*)$", unit).group(1)
        arguments = shlex.split(line.replace("/opt/hookd", str(HERE.parent)))
        self.environment["PYTHONDONTWRITEBYTECODE"] = "1"
        command = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(HERE.parent), PYTHON, *arguments,
                   "-c", str(self.ini)]
        return super().spawn(command, sockets, names, **more)

    @property
    def pid(self):
        return self.process.pid


def prepare(home, *sections, kind=Daemon, variables=None, **keys):
    """Return a daemon in a new directory that is not started; `keys` are those of [hookd]."""
    home.mkdir(parents=True)
    head = {"listen": "127.0.0.1:0", "state": home / "state", "log": "stderr", "secret": SECRET}
    return kind(home, "\n".join([section("hookd", {**head, **keys}), *sections]), variables)


class Program:
    """Another server: its folder, port, command, process, and what it wrote."""

    path = "/"

    def __init__(self, name, folder):
        self.name, self.folder, self.command, self.process = name, folder, [], None
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]

    @property
    def log(self):
        return (self.folder / "log").read_text(errors="replace")

    @property
    def pid(self):
        return self.process.pid

    def start(self):
        """Start it and wait until it takes connections."""
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=log, cwd=self.folder)

        def listens():
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
        wait_for(listens, f"{self.name} to listen", lambda: self.log)
        return self

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(15)


def run_number(answer):
    """Return the number in `queued run 12: ...`; fail where the answer is no 202."""
    found = re.match(r"queued run (\d+)", answer.text)
    if answer.status != 202 or not found:
        raise AssertionError(f"not queued: {answer}")
    return int(found[1])


def sh(*command, cwd=None):
    """Run a command that must succeed, and return what it wrote."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, stdin=subprocess.DEVNULL,
                          env=clean_environment(), stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=120, check=False)
    if done.returncode:
        raise AssertionError(f"{command}: {done.stdout.decode(errors='replace')}")
    return done.stdout.decode(errors="replace").strip()


# ---------------------------------------------------------------- What Linux says of a process


def process_tree(root):
    """Return the process and all its descendants."""
    children = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, []))
    return tree


def pss(*pids):
    """Return memory in MB: the processes' own pages, and their share of those they share."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"(?m)^Pss: +(\d+)", rollup)[1])
    return total / 1024


def resident(pid, peak=False):
    """Return the resident memory in MB, or its peak since `forget_peak`."""
    words = "VmHWM" if peak else "VmRSS"
    return int(re.search(rf"{words}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def forget_peak(pid):
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def cpu(pid):
    """Return the processor time of one process and its threads in seconds; 0 when it is gone."""
    with suppress(OSError):
        return time.clock_gettime((~pid << 3) | 2)  # as clock_getcpuclockid(3) makes it
    return 0.0


def wait_quiet(root, seconds=0.3):
    """Wait until a process tree has used next to no processor time for so long."""
    used = [0.0]

    def quiet():
        time.sleep(seconds)  # the span that is judged
        used.append(sum(map(cpu, process_tree(root))))
        return abs(used[-1] - used[-2]) < 0.01
    wait_for(quiet, f"process {root} to become quiet")


def handles(pid):
    """Return the numbers of open descriptors and of threads."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


# ---------------------------------------------------------------- The machine, and running


def installed(names, install):
    """Return a folder into which `install(folder)` put what these names say, once for all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / f"hookd-ci-{hashlib.sha256(repr(names).encode()).hexdigest()[:16]}"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "installed", "a+") as done:
        fcntl.flock(done, fcntl.LOCK_EX)
        if not os.stat(done.fileno()).st_size:
            install(place)
            done.write("yes")
    return place


def node(script, packages, *arguments):
    """Run a module of .ci under node with npm packages; return the JSON values that it prints."""
    def install(place):
        (place / "package.json").write_text('{"type": "module"}')
        sh("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--save-exact",
           "--loglevel=error", *packages, cwd=place)
    place = installed(packages, install)
    shutil.copy(HERE / script, place)
    done = subprocess.run(["node", place / script, *arguments], check=True, timeout=120,
                          stdout=subprocess.PIPE)
    return [json.loads(line) for line in done.stdout.splitlines()]


def python_with(*packages):
    """Return a Python that has these packages from PyPI."""
    def install(place):
        sh(sys.executable, "-m", "venv", place)
        sh(place / "bin/pip", "-q", "install", "--disable-pip-version-check", *packages)
    return installed([*packages, sys.version], install) / "bin/python3"


def machine(folder):
    """Return lines that say what was measured on what."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    taken = []
    with open(folder / "sync", "wb", buffering=0) as file:
        for _ in range(60):
            began = time.perf_counter()
            file.write(b"x" * 4096)
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter() - began)
    return (f"{time.strftime('%F')}, {os.cpu_count()} x {model[1] if model else 'cpu'}, Linux "
            f"{os.uname().release}, {sh(PYTHON, '--version')} at {PYTHON}, load average "
            f"{os.getloadavg()[0]:.1f}\nstate on {sh('df', '--output=fstype', folder).split()[-1]}"
            f", fdatasync of 4 KB {statistics.median(taken) * 1000:.2f} ms")


def end_on_sigterm():
    """Let a time limit interrupt the script, so that it ends what it started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main(together=True):
    """Run the calling script's tests, several at a time unless they measure."""
    end_on_sigterm()
    unittest.main(testLoader=Loader() if together else unittest.defaultTestLoader, verbosity=2)
