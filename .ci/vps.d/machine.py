"""A Debian server in a container: its tree, its boot, and commands inside it.

The tree is built once with debootstrap and kept; every boot puts an overlay on top of it, in a
mount namespace of its own, so that nothing has to be unmounted afterwards.  systemd-nspawn starts
systemd as the first process.  The container's network is its own and has a loopback only; the
driver moves into that network (`Machine.enter_network`) and is then a client like any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

KEPT = Path(os.environ.get("HOOKD_VPS", "/var/tmp/hookd-vps"))
BASE = "systemd systemd-sysv dbus ca-certificates"
# The first is the server of nearly every scene, the others see an install and a first push.
NEEDED = "openssh-server openssh-client git python3 sudo procps iproute2 libpam-systemd"
PACKAGES = {"bookworm": NEEDED + """ nginx-light caddy rsyslog polkitd libnss-systemd
                python3-flask gunicorn curl openssl rsync cron tini wrk""",
            "bullseye": NEEDED, "trixie": NEEDED}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RECIPE = "4"  # change it when the way the tree is built changes
POLICY = "#!/bin/sh\nexit 101\n"  # no daemon is started while packages are installed
UNIFIED = "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"  # cgroups as on a Debian of its own
CGROUPS = Path("/sys/fs/cgroup")
CLONE_NEWNET = 0x40000000


class CannotBootError(Exception):
    """This machine cannot have the container; the reason is one line."""


# --- the tree ------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Keep a second `.ci/vps`, or a second one that builds this tree, waiting until we are done."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def require_debian() -> None:
    """Raise CannotBootError unless this is root on something like Debian."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise CannotBootError("not root on Debian")


def install_tools() -> None:
    """Install debootstrap and systemd-nspawn where they are missing."""
    wanted = {"debootstrap": "debootstrap", "systemd-nspawn": "systemd-container"}
    missing = [package for tool, package in wanted.items() if not shutil.which(tool)]
    if missing:
        logged(["apt-get", "update", "-qq"], 120)
        logged(["apt-get", "install", "-qq", "-y", "--no-install-recommends", *missing], 300)


def tree(suite: str) -> Path:
    """Return the directory of a suite's tree, built now if it is missing or outdated."""
    recipe = " ".join([RECIPE, *BASE.split(), *PACKAGES[suite].split()])
    place = KEPT / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with locked(suite):
        if not place.is_dir():
            for old in KEPT.glob(f"{suite}-*"):
                shutil.rmtree(old, ignore_errors=True)
            install_tools()
            build_tree(suite, place.with_suffix(".new"))
            place.with_suffix(".new").rename(place)
    return place


def build_tree(suite: str, root: Path) -> None:
    """Make a minimal Debian in `root`, then install the rest of the packages inside it."""
    include = "--include=" + ",".join(BASE.split())
    logged(["debootstrap", "--variant=minbase", include, suite, str(root)], 400)
    policy = root / "usr/sbin/policy-rc.d"
    policy.write_text(POLICY, encoding="ascii")
    policy.chmod(0o755)
    (root / "etc/dpkg/dpkg.cfg.d/unsafe").write_text("force-unsafe-io\n", encoding="ascii")
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]
    logged(["chroot", str(root), *install, *PACKAGES[suite].split()], 400)
    logged(["chroot", str(root), "apt-get", "clean"], 30)
    policy.unlink()
    for service in ("nginx", "caddy"):  # a check starts the one it is about
        if service in PACKAGES[suite]:
            logged(["chroot", str(root), "systemctl", "disable", service], 30)


def logged(command: list[str], timeout: float) -> None:
    """Run a command with its output in the build log; a failure is CannotBootError."""
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with open(KEPT / "build.log", "ab") as log:
        try:
            subprocess.run(command, env=environment, timeout=timeout, check=True,
                           stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotBootError(f"{error}; see {KEPT}/build.log") from None


# --- the running server --------------------------------------------------------------------------


class FailedError(Exception):
    """A check did not find what it expected."""


def wait_until(what: str, condition: Callable[[], object], seconds: float = 20) -> object:
    """Return the condition's first true value; FailedError names `what` after the deadline."""
    deadline, pause = time.monotonic() + seconds, 0.02
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise FailedError(f"after {seconds:g} s still not: {what}")
        time.sleep(pause)
        pause = min(pause * 1.5, 0.3)  # asking hookd costs a process each time


class Machine:
    """One server: boot() it, run() commands in it, stop() it."""

    def __init__(self, base: Path) -> None:
        self.place = KEPT / f"run-{os.getpid()}"
        self.base = base
        self.leader = 0
        self.nspawn: subprocess.Popen[bytes] | None = None
        for name in ("upper", "work", "root"):
            (self.place / name).mkdir(parents=True, exist_ok=True)

    def boot(self) -> None:
        """Start systemd on the overlay and wait until it says that it runs."""
        place = self.place
        overlay = f"lowerdir={self.base},upperdir={place}/upper,workdir={place}/work"
        nspawn = (f"systemd-nspawn -q -D {place}/root -b --register=no --keep-unit --machine=server"
                  " --private-network --console=read-only --resolv-conf=off --timezone=off"
                  " --link-journal=no")
        mount = f"mount -t overlay overlay -o {overlay} {place}/root"
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self.cgroups())
        script = f"{mount} && {{ {join}exec setsid env {UNIFIED} {nspawn}; }}"
        with open(place / "console", "ab") as console:
            self.nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "unshare", "-m", "sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            wait_until("the container started", self.find_leader, 30)
            wait_until("systemd runs", self.is_up, 60)
        except FailedError as failure:
            self.stop()
            console_text = (place / "console").read_text(encoding="utf-8", errors="replace")
            raise CannotBootError(f"{failure}; {' '.join(console_text.split())[-300:]}") from None
        self.enter_network()

    def cgroups(self) -> list[Path]:
        """Make and return control groups of this server's own, apart from another container's."""
        made = []
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            name, path = line.split(":")[1:]
            if name in ("", "name=systemd"):
                top = CGROUPS / ("systemd" if name else "unified")
                parent = (top if top.is_dir() else CGROUPS) / path.strip("/")
                made.append(parent / f"hookd-vps-{os.getpid()}")
                made[-1].mkdir(exist_ok=True)
        return made

    def find_leader(self) -> bool:
        """Note the container's first process: nspawn's child that is process 1 inside."""
        assert self.nspawn
        if self.nspawn.poll() is not None:
            raise FailedError(f"systemd-nspawn ended with {self.nspawn.returncode}")
        task = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}")
        for child in (task / "children").read_text(encoding="ascii").split():
            try:
                status = Path(f"/proc/{child}/status").read_text(encoding="ascii")
            except OSError:
                continue  # nspawn's helper, gone meanwhile
            if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                self.leader = int(child)
        return self.leader > 0

    def is_up(self) -> bool:
        asked = self.run("systemctl is-system-running", check=False, timeout=10)
        return asked.stdout.strip() in ("running", "degraded")

    def enter_network(self) -> None:
        """Move this thread, and the threads it starts, into the server's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.leader}/ns/net", "rb") as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET) != 0:
                raise CannotBootError(f"setns: {os.strerror(ctypes.get_errno())}")

    def run(self, script: str, user: str = "root", check: bool = True, timeout: float = 60,
            stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a shell script in the server; FailedError has its output unless it ends with 0."""
        home = "/root" if user == "root" else f"/home/{user}"
        inside = ["runuser", "-u", user, "--"] if user != "root" else []
        command = ["nsenter", "-t", str(self.leader), "-a", "env", "-i", f"PATH={PATH}",
                   f"HOME={home}", "LANG=C.UTF-8", *inside, "sh", "-c", script]
        try:
            done = subprocess.run(command, input=stdin, timeout=timeout, text=True, check=False,
                                  errors="replace", capture_output=True)
        except subprocess.TimeoutExpired:
            raise FailedError(f"`{script}` took more than {timeout:g} s") from None
        if check and done.returncode != 0:
            printed = done.stdout + done.stderr
            raise FailedError(f"`{script}` ended with {done.returncode}:\n{printed}")
        return done

    def out(self, script: str, user: str = "root", timeout: float = 60) -> str:
        return self.run(script, user, timeout=timeout).stdout.rstrip("\n")

    def write(self, path: str, text: str, mode: int = 0o644, owner: str = "root") -> None:
        """Write a file of the server, its directory made if missing."""
        self.run(f'mkdir -p "$(dirname {path})" && cat >{path} && chmod {mode:o} {path} '
                 f"&& chown {owner}: {path}", stdin=text)

    def read(self, path: str) -> str:
        return self.run(f"cat {path}").stdout

    def cut_power(self) -> None:
        """End every process of the server at once, as when the plug is pulled."""
        assert self.nspawn
        if self.leader:
            os.kill(self.leader, signal.SIGKILL)
        else:
            self.nspawn.terminate()  # killed, it would leave the container running
        self.nspawn.wait(30)
        self.leader = 0

    def stop(self) -> None:
        """Throw the server away, with all that it left on this machine."""
        if self.nspawn and self.nspawn.poll() is None:
            self.cut_power()
        for group in self.cgroups():
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)
        shutil.rmtree(self.place, ignore_errors=True)
