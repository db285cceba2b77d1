"""Syslog: hookd's lines in the journal and in rsyslog's file; journald stuck; a mail."""

import socket
import threading
import time

from github import GitHub, push, sha
from server import Scene, accepted, block, expect, wait_until

INI = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >>ledger
[octo/site bad]
command =
    echo the reason why
    exit 3
"""


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

    def setup(self) -> None:
        self.server.install(INI, "/srv/site")
        self.hook = self.server.webhook()

    def lines_arrive_once_and_in_rsyslog_s_file_too(self) -> None:
        """Not by syslog and by standard error both; /var/log/syslog has `hookd[PID]: ...`."""
        pid = self.server.main_pid()
        wait_until("a line in /var/log/syslog", lambda: f"hookd[{pid}]: "
                   in self.server.read("/var/log/syslog"))
        lines = self.server.out(f"journalctl -q _PID={pid} -o cat -g 'listening on'").splitlines()
        expect(len(lines) == 1, f"{len(lines)} lines: {lines}")

    def a_stuck_journald_stops_nothing(self) -> None:
        """SIGSTOP: /dev/log fills up and would block who writes to it; pushes and a restart."""
        pid, slowest, name = self.server.out("systemctl show -P MainPID systemd-journald"), 0.0, ""
        self.server.run(f"kill -STOP {pid}")
        try:
            for number in range(600):
                name = sha(f"log{number}")
                answer = accepted(self.hook.deliver(push("octo/site", "main", name)))
                slowest = max(slowest, answer.seconds)
            wait_until("deployed", lambda: name in self.server.read("/srv/site/ledger"))
            began = time.monotonic()
            self.server.run("systemctl restart hookd")
        finally:
            self.server.run(f"kill -CONT {pid}")
        self.note(f"600 pushes, slowest answer {slowest * 1000:.0f} ms; a restart meanwhile took"
                  f" {time.monotonic() - began:.1f} s")
        expect(slowest < 1 and time.monotonic() - began < 15, "too slow")
        accepted(self.hook.deliver(push("octo/site", "main", sha("again"))))
        self.server.wait_for_log(sha("again")[:7])

    def a_failed_deploy_is_mailed(self) -> None:
        """The README's on_failure, with a mail server that the driver plays."""
        inbox: list[str] = []
        listener = socket.create_server(("127.0.0.1", 25))
        thread = threading.Thread(target=take_mail, args=(listener, inbox), daemon=True)
        thread.start()
        self.server.write("/opt/hookd/message", block("message-mail"))
        self.server.configure("[hookd]\non_failure = sh -e /opt/hookd/message\n" + INI)
        accepted(self.hook.deliver(push("octo/site", "bad", sha("mail"))))
        self.server.wait_for_state("octo/site", "bad", sha("mail"), "failed")
        thread.join(10)
        mail = "\n".join(inbox)
        expect("Subject: octo/site bad failed" in mail and "the reason why" in mail,
               f"mailed: {mail}")
