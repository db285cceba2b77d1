"""Syslog: hookd's lines in the journal and in rsyslog's file; journald stuck; a mail."""

import time

from machine import expect, wait_until
from server import Scene, block, sha

SITE = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >>ledger
[octo/site bad]
command =
    echo the reason why
    exit 3
"""


class Syslog(Scene):
    """Where an administrator looks, and that a broken log stops nothing."""

    def setup(self):
        self.install(SITE, "/srv/site")

    def lines_arrive_once_and_in_rsyslog_s_file_too(self):
        """Not by syslog and by standard error both; /var/log/syslog has `hookd[PID]: ...`."""
        pid = self.main_pid()
        wait_until("a line in /var/log/syslog",
                   lambda: f"hookd[{pid}]: " in self.read("/var/log/syslog"))
        lines = self.out(f"journalctl -q _PID={pid} -o cat -g 'listening on'").splitlines()
        expect(len(lines) == 1, f"{len(lines)} lines: {lines}")

    def a_stuck_journald_stops_nothing(self):
        """SIGSTOP: /dev/log fills up and would block who writes to it; pushes and a restart."""
        pid, slowest = self.shows("MainPID", "systemd-journald"), 0.0
        self.run(f"kill -STOP {pid}")
        try:
            for number in range(600):
                began = time.monotonic()
                self.push("octo/site main", number)
                slowest = max(slowest, time.monotonic() - began)
            wait_until("deployed", lambda: sha(599) in self.read("/srv/site/ledger"))
            began = time.monotonic()
            self.run("systemctl restart hookd")
            took = time.monotonic() - began
        finally:
            self.run(f"kill -CONT {pid}")
        self.note(f"600 pushes, slowest answer {slowest * 1000:.0f} ms; restart: {took:.1f} s")
        expect(slowest < 1 and took < 15, "too slow")
        self.wait_for_log(self.push("octo/site main", "again")[:7])

    def a_failed_deploy_is_mailed(self):
        """The recipe's on_failure, with a mail server that prints what it takes."""
        self.run("setsid python3 -um smtpd -n -c DebuggingServer localhost:25 >/tmp/mail 2>&1 &")
        wait_until("the mail server listens", lambda: self.out("ss -Hltn 'sport = 25'"))
        self.write("/opt/hookd/message", block("message-mail"))
        self.configure("[hookd]\non_failure = sh -e /opt/hookd/message\n" + SITE)
        self.deploy("octo/site bad", "mail", "failed")
        mail = self.read("/tmp/mail")
        expect("Subject: octo/site bad failed" in mail and "the reason why" in mail,
               f"mailed: {mail}")
