"""Installing, first push, update, way back and removal: the README's blocks, as typed."""

import json
import re
import subprocess
import time

from machine import expect, wait_until
from server import FILES, INI, REPOSITORY, Scene, block, get

PLACES = """/opt/hookd /var/lib/hookd /var/cache/hookd /run/hookd /etc/systemd/system/hookd.service
    /etc/systemd/system/hookd.service.d /etc/systemd/system/hookd.socket
    /etc/systemd/system/*.wants/hookd.*"""
UPDATED = ("/opt/hookd/hookd.py", "/etc/systemd/system/hookd.service")


class Install(Scene):
    """From a fresh server to a deployed push, to a newer version and back, to nothing left."""

    user = "root"

    def setup(self):
        self.began = time.monotonic()

    def _copy(self, name):
        """Type a block with scp on the laptop, its files 0600; `user@server` as the README says."""
        self.type_on_laptop(block(name).replace("root@server", f"{self.user}@server"))

    def _type(self, name, stop=True):
        return self.type_on_server(block(name), self.user, stop)

    def it_starts_with_the_shipped_ini(self):
        """scp on the laptop; install, useradd and systemctl enable --now on the server."""
        self._copy("install-copy")
        self._type("install")
        expect(self.shows("ActiveState") == "active", "hookd is not active")
        self.wait_for_log("listening on 127.0.0.1:9000")
        home = self.out("getent passwd hookd").split(":")[5]
        expect(home == "/var/lib/hookd", f"home is {home}")
        line = self.shows("StatusText")
        expect(len(line.split()) >= 2, f"the status line is {line!r}")
        self.note(line)

    def the_umask_of_the_laptop_does_not_matter(self):
        shown = self.out("stat -c '%a %U %n' /opt/hookd /opt/hookd/hookd.* /etc/systemd/"
                         "system/hookd.service /var/lib/hookd /var/lib/hookd/secret")
        modes = [" ".join(line.split()[:2]) for line in shown.splitlines()]
        expect(modes == ["755 root", *["644 root"] * 3, "700 hookd", "600 hookd"], shown)

    def the_readme_s_first_push_is_deployed(self):
        """hookd.py send, status and secret, as the README has them; then one from outside."""
        printed = self._type("first-push")
        self.hook = self.webhook()
        expect(len(self.hook.secret) >= 32 and self.hook.secret in printed, f"printed {printed}")
        expect("queued run 1: octo/site main at" in printed, f"send was not answered: {printed}")
        expect(max(map(len, self.verb("status").splitlines())) <= 80, "over 80 columns")
        self.note(f"{time.monotonic() - self.began:.1f} s from the first scp")
        self.commit = self.deploy("octo/site main", "b")

    def it_can_be_turned_off_and_on_again(self):
        """The unit is a file of /etc/systemd/system, not a link that `disable` deletes."""
        self.run("systemctl disable --now hookd && systemctl enable --now hookd")
        expect(self.out("systemctl is-enabled hookd") == "enabled", "not enabled")

    def an_update_runs_the_new_file(self):
        self.run("cd /home/laptop/hookd && echo '# a newer one' | tee -a hookd.py hookd.service")
        self._copy("install-copy")
        self._replaced("update", "644 newer")

    def _replaced(self, name, expected):
        """Type a block; expect another process of these files, which knows the history."""
        before = self.main_pid()
        self._type(name)
        self.wait_for_another_process(before)
        self._are(expected)
        expect(self.target("octo/site main")["commit"] == self.commit, "history is gone")

    def _are(self, expected):
        for path in UPDATED:
            version = "newer" if "# a newer one" in self.read(path) else "older"
            shown = f"{self.out(f'stat -c %a {path}')} {version}"
            expect(shown == expected, f"{path} is {shown}")

    def the_way_back_runs_the_file_before(self):
        self._replaced("back", "644 older")

    def an_update_with_a_broken_file_changes_nothing(self):
        """The update checks first: the running hookd goes on, and would start again."""
        before = self.main_pid()
        self.run("echo 'def half(' >>/home/laptop/hookd/hookd.py")
        self._copy("install-copy")
        try:
            self._type("update")
        except AssertionError:
            expect(self.main_pid() == before, "it was restarted")
            self._are("644 older")
            self.run("systemctl restart hookd")
            return
        raise AssertionError("the update succeeded")

    def removal_leaves_nothing(self):
        """Unit, socket unit, changes, files, caches, state and user; it lists what it leaves."""
        self.run("install -d -o hookd /srv/blog")
        self.drop_in("MemoryHigh=1G")
        self.write("/etc/systemd/system/hookd.socket", block("socket-unit"))
        self.run("systemctl daemon-reload && systemctl stop hookd"
                 " && systemctl enable --now hookd.socket && systemctl start hookd")
        printed = self._type("remove", stop=False)
        expect("/srv/blog" in printed, f"the user's own is not listed:\n{printed}")
        left = self.out(f"ls -d {' '.join(PLACES.split())} 2>/dev/null; getent passwd hookd;"
                        " pgrep -a python3; systemctl list-units --all --plain --no-legend"
                        " 'hookd*'; ss -Hltn 'sport = 9000 or sport = 443'", check=False)
        expect(not left, f"left: {left}")


class Bullseye(Install):
    """Debian 11: Python 3.9, systemd 247."""

    SUITE = "bullseye"


class Trixie(Install):
    """Debian 13, where root may not log in: the blocks are typed after `sudo -s`."""

    SUITE, user = "trixie", "me"


class Linked(Scene):
    """Version 1.0 was linked from /opt/hookd; it goes on working, and an update makes it a file."""

    def setup(self):
        for name in FILES:  # those of today, where the repository has no history
            shown = subprocess.run(["git", "-C", REPOSITORY, "show", f"85dd90c:{name}"],
                                   capture_output=True, text=True, check=False).stdout
            self.write(f"/opt/hookd/{name}", shown or (REPOSITORY / name).read_text())
        self.run("useradd --system --user-group --home-dir /var/lib/hookd hookd"
                 " && systemctl enable --now /opt/hookd/hookd.service")
        self.hook = self.webhook()

    def a_linked_unit_goes_on_working(self):
        self.run("systemctl reload hookd && systemctl restart hookd")
        self.deploy("octo/site main", "1")

    def an_update_keeps_the_history_and_its_way_back_too(self):
        """The unit becomes a file; the old database serves the old version again."""
        self.type_on_laptop(block("install-copy"))
        self.type_on_server(block("update"))
        self.deploy("octo/site main", "2")
        runs = json.loads(self.verb("status --json octo/site main"))
        expect(len(runs) == 2, f"the history: {runs}")
        self.type_on_server(block("back-state"), stop=False)
        self.type_on_server(block("back"))
        self.deploy("octo/site main", "3")
        self.type_on_server(block("update"))
        shown = self.out("stat -c '%F %a' /etc/systemd/system/hookd.service")
        expect(shown == "regular file 644", shown)

    def it_can_be_turned_off_and_on_and_runs_after_a_boot(self):
        self.run("rm /opt/hookd/hookd.service && systemctl disable --now hookd 2>&1"
                 " && systemctl enable --now hookd && sync")
        self.reboot()
        wait_until("hookd runs after a boot", lambda: self.shows("ActiveState") == "active")


class NoSystemd(Scene):
    """The README's lines for a system without systemd, and for a container."""

    def _answers(self):
        return get("localhost", 9000).status > 0

    def _daemon(self):
        return self.out("pgrep -u hookd -x python3 || true")

    def cron_starts_it_and_it_comes_back(self):
        """Typed as root; the daemon killed; a push; cron has the same line."""
        lines = block("no-systemd")
        self.run(f"set -e; cd /home/laptop/hookd; {lines}")
        wait_until("hookd answers", self._answers)
        first = self._daemon()
        self.run(f"kill -KILL {first}")
        wait_until("another process", lambda: self._daemon() not in ("", first))
        wait_until("hookd answers", self._answers)
        self.verb("send --wait octo/site main", 0, ["octo/site main is at"])
        entry = self.out("crontab -u hookd -l")
        expect(entry.startswith("@reboot ") and entry[8:] in lines, entry)

    def in_a_container_it_is_stopped_cleanly_and_leaves_no_zombie(self):
        """The image's USER and CMD below tini in a process namespace, which is Docker's --init."""
        text = block("container")
        expect("USER hookd" in text and "COPY --chmod=644 hookd.py" in text, text)
        words = " ".join(json.loads(re.search(r"^CMD (\[.*\])", text, re.MULTILINE)[1]))
        self.run("kill $(pgrep -u hookd -x sh) $(pgrep -u hookd -x python3)")
        wait_until("nobody answers", lambda: not self._answers())
        self.write(INI, "[octo/site main]\ncommand = (setsid sleep 0 &)\n")
        self.run("setsid unshare -fp --mount-proc tini -- runuser -u hookd --"
                 f" env HOME=/var/lib/hookd {words} >/tmp/log 2>&1 & echo $! >/tmp/pid")
        wait_until("hookd answers", self._answers)
        self.verb("send --wait octo/site main")
        wait_until("no zombie", lambda: " Z" not in self.out("ps -eo user,stat"), 5)
        self.run(f"kill {self._daemon()}")
        wait_until("it ended", lambda: not self.out("pgrep -x tini || true"))
