"""Installing, first push, update, way back and removal: the README's blocks, as typed."""

import json
import re
import subprocess
import time

from github import get, push, sha
from server import REPOSITORY, FailedError, Scene, accepted, block, expect, wait_until

PLACES = """/opt/hookd /var/lib/hookd /var/cache/hookd /run/hookd /etc/systemd/system/hookd.service
    /etc/systemd/system/hookd.service.d /etc/systemd/system/hookd.socket
    /etc/systemd/system/*.wants/hookd.*"""


class Install(Scene):
    """From a fresh server to a deployed push, to a newer version and back, to nothing left."""

    user = "root"

    def setup(self) -> None:
        self.began = time.monotonic()

    def _copy(self, name: str) -> None:
        """Type a block with scp on the laptop, its files 0600; `user@server` as the README says."""
        self.server.type_on_laptop(block(name).replace("root@server", f"{self.user}@server"))

    def _type(self, name: str, stop: bool = True) -> str:
        return self.server.type_on_server(block(name), self.user, stop)

    def it_starts_with_the_shipped_ini(self) -> None:
        """scp on the laptop; install, useradd and systemctl enable --now on the server."""
        self._copy("install-copy")
        self._type("install")
        expect(self.server.shows("ActiveState") == "active", "hookd is not active")
        self.server.wait_for_log("listening on 127.0.0.1:9000")
        home = self.server.out("getent passwd hookd").split(":")[5]
        expect(home == "/var/lib/hookd", f"home is {home}")
        line = self.server.shows("StatusText")
        expect(len(line.split()) >= 2, f"the status line is {line!r}")
        self.note(line)

    def the_umask_of_the_laptop_does_not_matter(self) -> None:
        shown = self.server.out("stat -c '%a %U %n' /opt/hookd /opt/hookd/hookd.* /etc/systemd/"
                                "system/hookd.service /var/lib/hookd /var/lib/hookd/secret")
        modes = [" ".join(line.split()[:2]) for line in shown.splitlines()]
        expect(modes == ["755 root", *["644 root"] * 3, "700 hookd", "600 hookd"], shown)

    def the_readme_s_first_push_is_deployed(self) -> None:
        """hookd.py send, status, log and secret, as the README has them."""
        printed = self._type("first-push")
        secret = self.server.read("/var/lib/hookd/secret").strip()
        expect(len(secret) >= 32 and secret in printed, f"no secret was printed: {printed}")
        expect("queued run 1: octo/site main at" in printed, f"send was not answered: {printed}")
        expect(max(map(len, self.server.hookd("status").splitlines())) <= 80, "over 80 columns")
        self.note(f"{time.monotonic() - self.began:.1f} s from the first scp")

    def a_push_from_github_with_that_secret_is_deployed(self) -> None:
        """The same from outside, signed with what was pasted into GitHub's page."""
        hook = self.server.webhook()
        ping = hook.deliver(push("octo/site", "main", sha("a")), X_GitHub_Event="ping")
        expect(ping.text.startswith("pong: octo/site"), f"ping: {ping}")
        accepted(hook.deliver(push("octo/site", "main", sha("b"), sha("a"))))
        self.server.wait_for_state("octo/site", "main", sha("b"))

    def it_can_be_turned_off_and_on_again(self) -> None:
        """The unit is a file of /etc/systemd/system, not a link that `disable` deletes."""
        self.server.run("systemctl disable --now hookd && systemctl enable --now hookd")
        expect(self.server.out("systemctl is-enabled hookd") == "enabled", "not enabled")

    def an_update_runs_the_new_file(self) -> None:
        self.server.run("cd /home/laptop/hookd && printf '\\n# a newer one\\n' >>hookd.py"
                        " && printf '\\n# a newer one\\n' >>hookd.service")
        before = self.server.main_pid()
        self._update()
        wait_until("a new process", lambda: self.server.main_pid() not in (0, before))
        self._is("newer", "/opt/hookd/hookd.py /etc/systemd/system/hookd.service")
        expect(self.server.target("octo/site", "main")["commit"] == sha("b"), "history is gone")

    def _update(self) -> None:
        self._copy("install-copy")
        self._type("update")

    def _is(self, version: str, files: str) -> None:
        for path in files.split():
            newer = "# a newer one" in self.server.read(path)
            mode = self.server.out(f"stat -c %a {path}")
            expect(newer == (version == "newer") and mode == "644", f"{path}: {newer} {mode}")

    def the_way_back_runs_the_file_before(self) -> None:
        before = self.server.main_pid()
        self._type("back")
        wait_until("a new process", lambda: self.server.main_pid() not in (0, before))
        self._is("older", "/opt/hookd/hookd.py /etc/systemd/system/hookd.service")
        expect(self.server.target("octo/site", "main")["commit"] == sha("b"), "history is gone")

    def an_update_with_a_broken_file_changes_nothing(self) -> None:
        """The update checks first: the running hookd goes on, and would start again."""
        before = self.server.main_pid()
        self.server.run("echo 'def half(' >>/home/laptop/hookd/hookd.py")
        try:
            self._update()
        except FailedError:
            expect(self.server.main_pid() == before, "it was restarted")
            self._is("older", "/opt/hookd/hookd.py /etc/systemd/system/hookd.service")
            self.server.run("systemctl restart hookd")
            return
        raise FailedError("the update succeeded")

    def removal_leaves_nothing(self) -> None:
        """Unit, socket unit, changes, files, caches, state and user; it lists what it leaves."""
        self.server.run("install -d -o hookd /srv/blog")
        self.server.drop_in("MemoryHigh=1G")
        self.server.write("/etc/systemd/system/hookd.socket", block("socket-unit"))
        self.server.run("systemctl daemon-reload && systemctl stop hookd"
                        " && systemctl enable --now hookd.socket && systemctl start hookd")
        printed = self._type("remove", stop=False)
        expect("/srv/blog" in printed, f"the user's own is not listed:\n{printed}")
        left = self.server.out(f"ls -d {' '.join(PLACES.split())} 2>/dev/null;"
                               " getent passwd hookd; pgrep -a python3; systemctl list-units"
                               " --all --plain --no-legend 'hookd*'; true")
        expect(not left, f"left: {left}")
        for port in (9000, 443):
            try:
                raise FailedError(f"port {port}: {get('localhost', '/', port)}")
            except ConnectionRefusedError:
                pass


class Bullseye(Install):
    """Debian 11: Python 3.9, systemd 247."""

    SUITE = "bullseye"


class Trixie(Install):
    """Debian 13, where root may not log in: the blocks are typed after `sudo -s`."""

    SUITE, user = "trixie", "me"


class Linked(Scene):
    """Version 1.0 was linked from /opt/hookd; it goes on working, and an update makes it a file."""

    def setup(self) -> None:
        for name in ("hookd.py", "hookd.ini", "hookd.service"):
            self.server.write(f"/opt/hookd/{name}", self._version_1(name))
        self.server.run("useradd --system --user-group --home-dir /var/lib/hookd hookd"
                        " && systemctl enable --now /opt/hookd/hookd.service")

    def _version_1(self, name: str) -> str:
        """Return a file of version 1.0; of today, where the repository has no history."""
        done = subprocess.run(["git", "-C", str(REPOSITORY), "show", f"85dd90c:{name}"],
                              capture_output=True, text=True, check=False)
        return done.stdout or (REPOSITORY / name).read_text(encoding="utf-8")

    def _pushed(self, word: str) -> None:
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha(word))))
        self.server.wait_for_state("octo/site", "main", sha(word))

    def a_linked_unit_goes_on_working(self) -> None:
        self.server.run("systemctl reload hookd && systemctl restart hookd")
        self._pushed("1")

    def an_update_keeps_the_history_and_its_way_back_too(self) -> None:
        """The unit becomes a file; the old database serves the old version again."""
        self.server.type_on_laptop(block("install-copy"))
        self.server.type_on_server(block("update"))
        self._pushed("2")
        runs = json.loads(self.server.hookd("status --json octo/site main"))
        expect(len(runs) == 2, f"the history: {runs}")
        self.server.type_on_server(block("back-state"), stop=False)
        self.server.type_on_server(block("back"))
        self._pushed("3")
        self.server.type_on_server(block("update"))
        shown = self.server.out("stat -c '%F %a' /etc/systemd/system/hookd.service")
        expect(shown == "regular file 644", shown)

    def it_can_be_turned_off_and_on_and_runs_after_a_boot(self) -> None:
        self.server.run("rm /opt/hookd/hookd.service && systemctl disable --now hookd 2>&1"
                        " && systemctl enable --now hookd && sync")
        self.server.cut_power()
        self.server.reboot()
        wait_until("hookd runs after a boot", lambda: self.server.shows("ActiveState") == "active")


class NoSystemd(Scene):
    """The README's lines for a system without systemd, and for a container."""

    def _answers(self) -> bool:
        try:
            return get("localhost", "/", 9000).status > 0
        except OSError:
            return False

    def cron_starts_it_and_it_comes_back(self) -> None:
        """Typed as root; the daemon killed; a push; cron has the same line."""
        lines = block("no-systemd")
        self.server.run(f"set -e; cd /home/laptop/hookd; {lines}")
        wait_until("hookd answers", self._answers)
        first = self._daemon()
        self.server.run(f"kill -KILL {first}")
        wait_until("another process", lambda: self._daemon() not in ("", first))
        wait_until("hookd answers", self._answers)
        printed = self.server.hookd("send --wait octo/site main")
        expect("octo/site main is at" in printed, printed)
        entry = self.server.out("crontab -u hookd -l")
        expect(entry.startswith("@reboot ") and entry[8:] in lines, entry)

    def _daemon(self) -> str:
        return self.server.out("pgrep -u hookd -x python3 || true")

    def in_a_container_it_is_stopped_cleanly_and_leaves_no_zombie(self) -> None:
        """The image's USER and CMD below tini in a process namespace, which is Docker's --init."""
        text = block("container")
        command = re.search(r"^CMD (\[.*\])", text, re.MULTILINE)
        expect(command and "USER hookd" in text and "COPY --chmod=644 hookd.py" in text, text)
        words = " ".join(json.loads(command.group(1)))
        self.server.run("kill $(pgrep -u hookd -x sh) $(pgrep -u hookd -x python3)")
        wait_until("nobody answers", lambda: not self._answers())
        self.server.write("/opt/hookd/hookd.ini",
                          "[octo/site main]\ncommand = (setsid sleep 0 &)\n")
        self.server.run("setsid unshare -fp --mount-proc tini -- runuser -u hookd --"
                        f" env HOME=/var/lib/hookd {words} >/tmp/log 2>&1 & echo $! >/tmp/pid")
        wait_until("hookd answers", self._answers)
        self.server.hookd("send --wait octo/site main")
        wait_until("no zombie", lambda: " Z" not in self.server.out("ps -eo user,stat"), 5)
        self.server.run(f"kill {self._daemon()}")
        wait_until("it ended", lambda: not self.server.out("pgrep -x tini || true"))
