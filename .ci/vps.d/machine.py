"""A Debian server in a container: its tree, its boot, and commands inside it.

The tree is built once with debootstrap and kept; every boot puts an overlay on top of it, in a
mount namespace of its own, so that nothing has to be unmounted afterwards. systemd-nspawn starts
systemd as the first process. The network is the container's own, with loopback only; the driver
moves into it (`Machine.enter_network`) and is then a client like any other.
"""

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
from pathlib import Path

KEPT = Path(os.environ.get("HOOKD_VPS", "/var/tmp/hookd-vps"))
BASE = "systemd systemd-sysv dbus ca-certificates"
# The first is the server of nearly every scene, the others see an install and a first push.
NEEDED = "openssh-server openssh-client git python3 sudo procps iproute2 libpam-systemd"
PACKAGES = {"bookworm": NEEDED + """ nginx-light caddy rsyslog polkitd libnss-systemd
                python3-flask gunicorn curl openssl rsync cron tini wrk""",
            "bullseye": NEEDED, "trixie": NEEDED}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RECIPE = "4"  # change it when the way the tree is built changes
CGROUPS = Path("/sys/fs/cgroup")


class CannotBootError(Exception):
    """This machine cannot have the container; the reason is one line."""


# ---------------------------------------------------------------- The tree


@contextlib.contextmanager
def locked(name):
    """Keep a second `.ci/vps`, or a second one that builds this tree, waiting until we are done."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def tree(suite):
    """Return the directory of a suite's tree, built now if it is missing or outdated."""
    recipe = " ".join([RECIPE, *BASE.split(), *PACKAGES[suite].split()])
    place = KEPT / f"{suite}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with locked(suite):
        if not place.is_dir():
            for old in KEPT.glob(f"{suite}-*"):
                shutil.rmtree(old, ignore_errors=True)
            build_tree(suite, place.with_suffix(".new"))
            place.with_suffix(".new").rename(place)
    return place


def build_tree(suite, root):
    """Make a minimal Debian in `root`, then install the rest of the packages inside it."""
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends"]
    if not (shutil.which("debootstrap") and shutil.which("systemd-nspawn")):
        logged(["apt-get", "update", "-qq"], 120)
        logged([*install, "debootstrap", "systemd-container"], 300)
    include = "--include=" + ",".join(BASE.split())
    logged(["debootstrap", "--variant=minbase", include, suite, root], 400)
    policy = root / "usr/sbin/policy-rc.d"  # no daemon is started while packages are installed
    policy.write_text("#!/bin/sh\nexit 101\n", encoding="ascii")
    policy.chmod(0o755)
    (root / "etc/dpkg/dpkg.cfg.d/unsafe").write_text("force-unsafe-io\n", encoding="ascii")
    logged(["chroot", root, *install, *PACKAGES[suite].split()], 400)
    logged(["chroot", root, "apt-get", "clean"], 30)
    policy.unlink()
    for service in ("nginx", "caddy"):  # a check starts the one it is about
        if service in PACKAGES[suite]:
            logged(["chroot", root, "systemctl", "disable", service], 30)


def logged(command, timeout):
    """Run a command with its output in the build log; a failure is CannotBootError."""
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with open(KEPT / "build.log", "ab") as log:
        try:
            subprocess.run(command, env=environment, timeout=timeout, check=True,
                           stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        except (OSError, subprocess.SubprocessError) as error:
            raise CannotBootError(f"{error}; see {KEPT}/build.log") from None


# ---------------------------------------------------------------- The running server


def expect(true, otherwise):
    """Fail with what was found instead, unless `true`."""
    if not true:
        raise AssertionError(otherwise)


def wait_until(what, condition, seconds=20.0):
    """Wait until the condition is true, and fail with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        expect(time.monotonic() < deadline, f"after {seconds:g} s still not: {what}")
        time.sleep(0.1)  # asking hookd costs a process each time


class Machine:
    """One server: boot() it, run() commands in it, stop() it."""

    def __init__(self, base):
        self.place, self.base = KEPT / f"run-{os.getpid()}", base
        self.leader, self.nspawn = 0, None
        for name in ("upper", "work", "root"):
            (self.place / name).mkdir(parents=True, exist_ok=True)

    def boot(self):
        """Start systemd on the overlay and wait until it says that it runs."""
        place = self.place
        overlay = f"lowerdir={self.base},upperdir={place}/upper,workdir={place}/work"
        nspawn = ("env SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1"  # cgroups as on a Debian of its own
                  f" systemd-nspawn -q -D {place}/root -b --register=no --keep-unit"
                  " --machine=server --private-network --console=read-only --resolv-conf=off"
                  " --timezone=off --link-journal=no")
        mount = f"mount -t overlay overlay -o {overlay} {place}/root"
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in self.cgroups())
        script = f"{mount} && {{ {join}exec setsid {nspawn}; }}"
        with open(place / "console", "ab") as console:
            self.nspawn = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "unshare", "-m", "sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        try:
            wait_until("the container started", self.find_leader, 30)
            asked = "systemctl is-system-running"
            wait_until("systemd runs", lambda: self.out(asked, check=False, timeout=10) in (
                "running", "degraded"), 60)
        except AssertionError as failure:
            self.stop()
            console_text = (place / "console").read_text(encoding="utf-8", errors="replace")
            raise CannotBootError(f"{failure}; {' '.join(console_text.split())[-300:]}") from None
        self.enter_network()

    def cgroups(self):
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

    def find_leader(self):
        """Note the container's first process: nspawn's child that is process 1 inside."""
        ended = self.nspawn.poll()
        expect(ended is None, f"systemd-nspawn ended with {ended}")
        task = Path(f"/proc/{self.nspawn.pid}/task/{self.nspawn.pid}")
        for child in (task / "children").read_text(encoding="ascii").split():
            with contextlib.suppress(OSError):  # nspawn's helper, gone meanwhile
                status = Path(f"/proc/{child}/status").read_text(encoding="ascii")
                if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE):
                    self.leader = int(child)
        return self.leader > 0

    def enter_network(self):
        """Move this thread, and the threads it starts, into the server's network."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/proc/{self.leader}/ns/net", "rb") as namespace:
            if libc.setns(namespace.fileno(), 0) != 0:
                raise CannotBootError(f"setns: {os.strerror(ctypes.get_errno())}")

    def run(self, script, user="root", check=True, timeout=60, stdin=""):
        """Run a shell script in the server; fail with its output unless it ends with 0."""
        home = "/root" if user == "root" else f"/home/{user}"
        inside = ["runuser", "-u", user, "--"] if user != "root" else []
        command = ["nsenter", "-t", str(self.leader), "-a", "env", "-i", f"PATH={PATH}",
                   f"HOME={home}", "LANG=C.UTF-8", *inside, "sh", "-c", script]
        try:
            done = subprocess.run(command, input=stdin, timeout=timeout, text=True, check=False,
                                  errors="replace", capture_output=True)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"`{script}` took more than {timeout:g} s") from None
        expect(done.returncode == 0 or not check,
               f"`{script}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def out(self, script, user="root", check=True, timeout=60):
        return self.run(script, user, check, timeout).stdout.rstrip("\n")

    def fails(self, script, user="root"):
        """Say whether a script ends with another status than 0."""
        return self.run(script, user, check=False).returncode != 0

    def write(self, path, text, mode=0o644, owner="root"):
        """Write a file of the server, its directory made if missing."""
        self.run(f'mkdir -p "$(dirname {path})" && cat >{path} && chmod {mode:o} {path} '
                 f"&& chown {owner}: {path}", stdin=text)

    def read(self, path):
        """Return the text of a file of the server, empty where there is none."""
        return self.run(f"cat {path}", check=False).stdout

    def cut_power(self):
        """End every process of the server at once, as when the plug is pulled."""
        if self.leader:
            os.kill(self.leader, signal.SIGKILL)
        else:
            self.nspawn.terminate()  # killed, it would leave the container running
        self.nspawn.wait(30)
        self.leader = 0

    def stop(self):
        """Throw the server away, with all that it left on this machine."""
        if self.nspawn and self.nspawn.poll() is None:
            self.cut_power()
        for group in self.cgroups():
            for folder, _, _ in os.walk(group, topdown=False):
                os.rmdir(folder)
        shutil.rmtree(self.place, ignore_errors=True)
