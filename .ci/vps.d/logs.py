"""Syslog: hookd's lines in the journal and in rsyslog's file; both of them failing."""

from __future__ import annotations

import socket
import threading
import time

from github import GitHub, push, sha
from scene import Scene, wait_until
from server import accepted, block_with, expect

INI = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >>ledger
[octo/site bad]
command =
    echo the reason why
    exit 3
"""
JOURNALD = "systemd-journald.socket systemd-journald-dev-log.socket systemd-journald.service"


def take_mail(listener: socket.socket, inbox: list[str]) -> None:
    """Be a mail server for one message; keep its lines."""
    with listener, listener.accept()[0] as connection, connection.makefile("rw") as stream:
        reply, body = "220 here", False
        while reply:
            print(reply, end="\r\n", file=stream, flush=True)
            line = stream.readline().strip()
            while body and line != ".":
                inbox.append(line)
                line = stream.readline().strip()
            body = line.upper() == "DATA"
            reply = "354 go on" if body else "221 bye" if line.upper() == "QUIT" else "250 well"
            if reply == "221 bye" or not line:
                return


class Syslog(Scene):
    """Where an administrator looks, and that a broken log stops nothing."""

    hook: GitHub
    sent = 0

    def setup(self) -> None:
        self.server.run("install -d /srv/site")
        self.server.install(INI)
        self.server.run("chown hookd: /srv/site")
        self.hook = self.server.webhook()

    def lines_arrive_in_the_journal_with_their_priorities(self) -> None:
        """info for what began and ended, warning for what was refused or failed."""
        accepted(self.hook.deliver(push("octo/site", "main", sha("1"))))
        self.server.wait_for_state("octo/site", "main", sha("1"))
        accepted(self.hook.deliver(push("octo/site", "bad", sha("2"))))
        self.server.wait_for_state("octo/site", "bad", sha("2"), "failed")
        wrong = GitHub("not the secret").deliver(push("octo/site", "main", sha("3")))
        expect(wrong.status == 403, f"a wrong signature: {wrong}")
        self.server.wait_for_log("signature")
        self._priority(("listening on",), ("6", "5"))
        self._priority(("octo/site main", "ok"), ("6", "5"))
        self._priority(("signature",), ("4",))
        self._priority(("octo/site bad", "failed"), ("4",))
        self._priority(("the reason why",), ("4", "5", "6"))

    def _priority(self, words: tuple[str, ...], allowed: tuple[str, ...]) -> None:
        """Expect each journal line with these words to have one of these priorities."""
        lines = [entry for entry in self.server.journal()
                 if all(word in str(entry["MESSAGE"]) for word in words)]
        expect(lines, f"no line with {words}")
        for entry in lines:
            expect(entry["PRIORITY"] in allowed,
                   f"priority {entry['PRIORITY']}, not {allowed}: {entry['MESSAGE']}")

    def no_line_arrives_twice(self) -> None:
        """Not by syslog and by standard error both."""
        lines = self.server.log_lines("listening on")
        expect(len(lines) == 1, f"{len(lines)} lines: {lines}")

    def lines_arrive_in_rsyslog_s_file(self) -> None:
        """/var/log/syslog has `hookd[PID]: ...`."""
        wait_until("a line in /var/log/syslog", lambda: f"hookd[{self.server.main_pid()}]: "
                   in self.server.read("/var/log/syslog"))

    def restarting_rsyslog_loses_nothing(self) -> None:
        """Pushes all the while, each deployed."""
        self._push_while("systemctl restart rsyslog", 2)

    def stopping_journald_for_ten_seconds_loses_nothing(self) -> None:
        """/dev/log is gone; afterwards the lines come again."""
        self._push_while(f"systemctl stop {JOURNALD} 2>&1", 10)
        self.server.run(f"systemctl start {JOURNALD}")
        self._logs_again()

    def a_journald_that_is_stuck_for_ten_seconds_stops_nothing(self) -> None:
        """SIGSTOP: /dev/log fills up and would block who writes to it."""
        pid = self.server.out("systemctl show -P MainPID systemd-journald")
        self._push_while(f"kill -STOP {pid}", 10, 400)
        began = time.monotonic()
        try:
            self.server.run("systemctl restart hookd")
        finally:
            self.server.run(f"kill -CONT {pid}")
        self.note(f"a restart meanwhile took {time.monotonic() - began:.1f} s")
        expect(time.monotonic() - began < 15, f"restarted after {time.monotonic() - began:.0f} s")
        self._logs_again()

    def it_starts_where_no_syslog_answers(self) -> None:
        """Restarted while journald is stopped, and logging again when it is back."""
        self.server.run(f"systemctl stop {JOURNALD} 2>&1")
        self._push_while("systemctl --job-mode=ignore-dependencies restart hookd", 1)
        self.server.run(f"systemctl start {JOURNALD}")
        self._logs_again()

    def a_failed_deploy_is_mailed(self) -> None:
        """The README's on_failure, with a mail server that the driver plays."""
        inbox: list[str] = []
        listener = socket.create_server(("127.0.0.1", 25))
        thread = threading.Thread(target=take_mail, args=(listener, inbox), daemon=True)
        thread.start()
        self.server.configure(block_with("smtp://") + INI, restart=True)
        accepted(self.hook.deliver(push("octo/site", "bad", sha("mail"))))
        self.server.wait_for_state("octo/site", "bad", sha("mail"), "failed")
        thread.join(10)
        mail = "\n".join(inbox)
        expect("Subject: octo/site bad failed" in mail and "the reason why" in mail,
               f"mailed: {mail}")

    def _push_while(self, script: str, seconds: float, atleast: int = 10) -> None:
        """Do something to the log, then push for so long; every push is answered and deployed."""
        self.server.run(script)
        ends, slowest, count, name = time.monotonic() + seconds, 0.0, 0, ""
        while time.monotonic() < ends or count < atleast:
            Syslog.sent += 1
            count += 1
            name = sha(f"log{Syslog.sent}")
            slowest = max(slowest, accepted(self.hook.deliver(
                push("octo/site", "main", name))).seconds)
            time.sleep(seconds / atleast / 4)
        wait_until("deployed", lambda: name in self.server.read("/srv/site/ledger"))
        self.note(f"{count} pushes, slowest answer {slowest * 1000:.0f} ms")
        expect(slowest < 1, f"the slowest answer took {slowest:.1f} s")

    def _logs_again(self) -> None:
        """Expect a line of a new push in the journal."""
        Syslog.sent += 1
        name = sha(f"log{Syslog.sent}")
        accepted(self.hook.deliver(push("octo/site", "main", name)))
        self.server.wait_for_log(name[:7])
