"""Installing, first push, update and removal: the README's own blocks, typed by a person."""

from __future__ import annotations

import time

from github import get, push, sha
from scene import FailedError, Scene, wait_until
from server import accepted, block, expect


class Install(Scene):
    """From a fresh server to a deployed push, and back to a server without hookd."""

    began = 0.0

    def setup(self) -> None:
        self.began = time.monotonic()

    def the_three_files_are_copied_with_scp(self) -> None:
        """The laptop's side: a folder on the server and three files in it."""
        self.server.type_on_laptop(block("install-copy"))
        listed = self.server.out("ls /opt/hookd")
        expect(listed.split() == ["hookd.ini", "hookd.py", "hookd.service"], f"there: {listed}")

    def it_starts_with_the_shipped_ini(self) -> None:
        """The server's side: one useradd, one systemctl enable --now."""
        self.server.type_on_server(block("install-start"))
        expect(self.server.is_active(), "hookd is not active")
        self.server.wait_for_log("listening on 127.0.0.1:9000")
        enabled = self.server.out("systemctl is-enabled hookd || true")
        expect(enabled.splitlines()[0] in ("enabled", "linked"), f"is-enabled: {enabled}")
        home = self.server.out("getent passwd hookd").split(":")[5]
        expect(home == "/var/lib/hookd", f"home is {home}")

    def systemctl_status_shows_a_line_for_people(self) -> None:
        """STATUS= says in words what the daemon does."""
        line = self.server.out("systemctl show -P StatusText hookd")
        expect(len(line.split()) >= 2, f"the status line is {line!r}")
        self.note(line)

    def the_state_is_private_to_its_user(self) -> None:
        """0700 the directory, 0600 the secret, both hookd's own."""
        shown = self.server.out("stat -c '%a %U' /var/lib/hookd /var/lib/hookd/secret").split("\n")
        expect(shown == ["700 hookd", "600 hookd"], f"mode and owner: {shown}")

    def the_readme_s_first_push_is_deployed(self) -> None:
        """hookd.py secret, send, status and log, as the README has them."""
        printed = self.server.type_on_server(block("first-push"))
        secret = self.server.read("/var/lib/hookd/secret").strip()
        expect(len(secret) >= 32 and secret in printed, f"no secret was printed: {printed}")
        expect("queued run 1: octo/site main at" in printed, f"send was not answered: {printed}")
        one = self.server.wait_for_state("octo/site", "main")
        expect("octo/site main is at" in self.server.hookd("log octo/site main"), str(one))
        self.note(f"{time.monotonic() - self.began:.1f} s from the first scp")

    def a_push_from_github_with_that_secret_is_deployed(self) -> None:
        """The same from outside, signed with what was pasted into GitHub's page."""
        hook = self.server.webhook()
        ping = hook.deliver(push("octo/site", "main", sha("a")), "ping")
        expect(ping.text.startswith("pong: octo/site"), f"ping: {ping}")
        accepted(hook.deliver(push("octo/site", "main", sha("b"), sha("a"))))
        self.server.wait_for_state("octo/site", "main", sha("b"))

    def status_fits_a_terminal_of_80_columns(self) -> None:
        """What a person sees over ssh."""
        table = self.server.hookd("status")
        widest = max(len(line) for line in table.splitlines())
        expect(widest <= 80 and "octo/site" in table, f"{widest} columns:\n{table}")

    def root_looking_at_it_leaves_no_file_of_root_s(self) -> None:
        """Verbs run as root become hookd first: the daemon can still write."""
        for verb in ("status", "log", "run octo/site main", "secret", "check"):
            self.server.hookd(verb)
        owners = self.server.out("find /var/lib/hookd ! -user hookd")
        expect(not owners, f"not hookd's: {owners}")
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("c"), sha("b"))))
        self.server.wait_for_state("octo/site", "main", sha("c"))

    def another_user_is_told_to_use_sudo(self) -> None:
        """A person without rights learns what to type."""
        done = self.server.run("python3 /opt/hookd/hookd.py status 2>&1", "laptop", check=False)
        expect(done.returncode == 1 and "sudo" in done.stdout,
               f"exit {done.returncode}: {done.stdout}")
        expect("Traceback" not in done.stdout, done.stdout)

    def an_update_runs_the_new_file(self) -> None:
        """A new hookd.py is copied, hookd restarted; history stays."""
        path = "/home/laptop/hookd/hookd.py"
        self.server.run(f"printf '\\n# a newer one\\n' >>{path}")
        before = self.server.main_pid()
        text = block("update")
        if "scp" in text:
            self.server.type_on_laptop(text)
        else:
            self.server.type_on_server(text)
        wait_until("a new process", lambda: self.server.main_pid() not in (0, before))
        same = self.server.run(f"cmp {path} /opt/hookd/hookd.py", check=False)
        expect(same.returncode == 0, "/opt/hookd/hookd.py is not the new one")
        expect(self.server.target("octo/site", "main")["commit"] == sha("c"), "history is gone")

    def an_update_with_a_broken_file_restarts_nothing(self) -> None:
        """The README's update checks first: the running hookd goes on."""
        before = self.server.main_pid()
        self.server.run("cp /home/laptop/hookd/hookd.py /tmp/good"
                        " && echo 'def half(' >>/home/laptop/hookd/hookd.py")
        try:
            self.server.type_on_laptop(block("update"))
        except FailedError:
            expect(self.server.main_pid() == before, "it was restarted")
            self.server.run("cp /tmp/good /home/laptop/hookd/hookd.py")
            self.server.type_on_laptop(block("update"))
            return
        raise FailedError("the update succeeded")

    def removal_leaves_nothing(self) -> None:
        """Unit, files, state and user are gone."""
        self.server.type_on_server(block("remove"))
        left = self.server.out(
            "for f in /opt/hookd /var/lib/hookd /run/hookd /etc/systemd/system/hookd.service"
            " /etc/systemd/system/multi-user.target.wants/hookd.service;"
            " do [ ! -e $f ] && [ ! -L $f ] || echo $f; done; getent passwd hookd || true;"
            " pgrep -u hookd -f hookd 2>/dev/null || true")
        expect(not left, f"left: {left}")
        try:
            get("localhost", "/", ("127.0.0.1", 9000))
        except ConnectionRefusedError:
            return
        raise FailedError("something still answers on port 9000")
