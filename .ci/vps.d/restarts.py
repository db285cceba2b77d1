"""No connection is ever refused: restarts, kills and reloads under 100 pushes a second."""

from __future__ import annotations

import threading
import time

from github import GitHub, Sent, push, sha
from github import Load as Pushes
from scene import Scene, wait_until
from server import accepted, block, expect

BRANCHES = [f"b{number}" for number in range(8)]
# The ledger names what ran; the lock in the script notices two runs in one directory.
INI = """
[hookd]
keep = 100000
jobs = 3
[octo/load]
command =
    exec 9>lock
    flock -n 9 || echo "$HOOKD_BRANCH" >>/srv/load/overlaps
    echo "$HOOKD_BRANCH $HOOKD_DELIVERY $HOOKD_COMMIT" >>/srv/load/ledger
[octo/load every]
queue = every
[octo/load b*]
"""
RATE = 100


class Load(Scene):
    """One load of pushes; what is done to hookd meanwhile are the checks."""

    pushes: Pushes
    thread: threading.Thread
    kills: list[float]

    def setup(self) -> None:
        self.server.run("install -d /srv/load")
        self.server.install(INI)
        self.server.run("chown hookd: /srv/load")
        self.kills = []
        every = [branch for pair in zip(BRANCHES, ["every"] * 8) for branch in pair]
        mixed = [b for b in every if b != "every"] + ["every"]  # one push in nine
        self.pushes = Pushes(self.server.webhook(), "octo/load", mixed, RATE)
        self.thread = threading.Thread(target=self.pushes.run, daemon=True)
        self.thread.start()
        wait_until("200 pushes", lambda: len(self.pushes.sent) > 200)

    def ten_restarts(self) -> None:
        """systemctl restart, ten times."""
        for _ in range(10):
            before = self.server.main_pid()
            self.server.run("systemctl restart hookd")
            expect(self.server.main_pid() != before, "the same process")
            time.sleep(0.5)

    def five_kills(self) -> None:
        """SIGKILL, five times, each after systemd has started the next one."""
        for _ in range(5):
            before = self.server.main_pid()
            self.kills.append(time.monotonic())
            self.server.run(f"kill -KILL {before}")
            self.kills.append(time.monotonic())
            self._replaced(before)
            time.sleep(0.5)

    def _replaced(self, before: int) -> None:
        """Wait until systemd has another process running."""
        wait_until("a new process", lambda: self.server.main_pid() not in (0, before)
                   and self.server.is_active(), 30)

    def a_reload_with_a_good_ini(self) -> None:
        """A new hook is known afterwards, by the same process."""
        before = self.server.main_pid()
        self.server.configure(INI + "[octo/new main]\ncommand = true\n")
        accepted(self.server.webhook().deliver(push("octo/new", "main", sha("x"))))
        expect(self.server.main_pid() == before, "another process")

    def a_reload_with_a_bad_ini(self) -> None:
        """It fails, and the old configuration goes on."""
        before = self.server.main_pid()
        self.server.write("/opt/hookd/hookd.ini", INI + "[octo/new main]\ncommnd = true\n")
        expect(self.server.run("systemctl reload hookd", check=False).returncode != 0, "succeeded")
        accepted(self.server.webhook().deliver(push("octo/new", "main", sha("y"), sha("x"))))
        expect(self.server.main_pid() == before, "another process")
        self.server.write("/opt/hookd/hookd.ini", INI)

    def every_push_was_answered_202(self) -> None:
        """Except those that were in flight in the moment of a SIGKILL."""
        self.pushes.stopping = True
        self.thread.join(90)
        expect(not self.thread.is_alive(), "some pushes have no answer after 90 s")
        sent = self.pushes.sent
        unanswered = [one for one in sent if not one.status]
        wrong = [one for one in sent if one.status not in (0, 202)]
        expect(not wrong, f"{len(wrong)} other answers, first: {wrong[:2]}")
        refused = [one for one in unanswered if "Refused" in one.error]
        lost = [one for one in unanswered if not self._in_flight_at_a_kill(one)]
        expect(not refused, f"{len(refused)} connections refused")
        expect(not lost, f"{len(lost)} without an answer, no kill near: {lost[:2]}")
        times = sorted(one.ended - one.began for one in sent if one.status)
        expect(times[-1] < 10, f"GitHub would not have waited {times[-1]:.1f} s")
        self.note(f"{len(sent)} pushes, {len(unanswered)} cut off by SIGKILL; median answer"
                  f" {times[len(times) // 2] * 1000:.1f} ms, 99 % in"
                  f" {times[len(times) * 99 // 100]:.2f} s, slowest {times[-1]:.2f} s")

    def _in_flight_at_a_kill(self, one: Sent) -> bool:
        """Tell whether the push was under way between a kill's beginning and its end."""
        pairs = zip(self.kills[::2], self.kills[1::2])
        return any(one.began <= after + 0.05 and one.ended >= before for before, after in pairs)

    def every_202_is_deployed(self) -> None:
        """The newest of each branch ran last; with queue = every, each of them ran, in order."""
        done = [one for one in self.pushes.sent if one.status == 202]
        began = time.monotonic()
        wait_until("nothing waits", lambda: all(
            not one["waiting"] and not one["running"] for one in self.server.status()), 90)
        self.note(f"converged {time.monotonic() - began:.1f} s after the last answer")
        ran = [tuple(line.split()) for line in self.server.read("/srv/load/ledger").splitlines()]
        for branch in BRANCHES:
            accepted_here = [one.number for one in done if one.branch == branch]
            last = [ledger[1] for ledger in ran if ledger[0] == branch][-1]
            number = int(last.partition("load-")[2])
            expect(number >= accepted_here[-1], f"{branch} ends with push {number},"
                   f" not {accepted_here[-1]}")
        names = {ledger[1] for ledger in ran}
        missing = [one.number for one in done
                   if one.branch == "every" and f"load-{one.number}" not in names]
        expect(not missing, f"queue = every: {len(missing)} never ran, first {missing[:3]}")
        self.note(f"{len(ran)} runs")

    def no_two_runs_shared_a_directory(self) -> None:
        """The scripts' own lock never met another."""
        overlaps = self.server.run("cat /srv/load/overlaps", check=False).stdout
        expect(not overlaps, f"overlaps: {overlaps}")


class SocketUnit(Scene):
    """The README's hookd.socket instead of a listen of its own."""

    def setup(self) -> None:
        self.server.install(INI)
        self.server.run("systemctl stop hookd; install -d -o hookd /srv/load")

    def a_push_is_taken_over_the_socket_unit(self) -> None:
        """systemd listens, hookd takes that socket."""
        self.server.write("/etc/systemd/system/hookd.socket", block("socket-unit"))
        self.server.run("systemctl daemon-reload && systemctl enable --now hookd.socket"
                        " && systemctl start hookd")
        self.note(self.server.out("systemctl show hookd.socket -P Listen"))
        accepted(self._hook().deliver(push("octo/load", "b1", sha("1"))))
        self.server.wait_for_state("octo/load", "b1", sha("1"))

    def a_reload_and_a_restart_keep_it(self) -> None:
        """Also when `listen` changed in the ini meanwhile: systemd's socket stays served."""
        for number, verb in enumerate(("reload", "restart", "reload")):
            self.server.write("/opt/hookd/hookd.ini", INI.replace(
                "[hookd]", f"[hookd]\nlisten = 127.0.0.1:{9100 + number}"))
            self.server.run(f"systemctl {verb} hookd")
            if verb == "reload":
                self.server.wait_for_log("reloaded", times=1 + number // 2)
            name = sha(f"kept{number}")
            accepted(self._hook().deliver(push("octo/load", "b1", name)))
            self.server.wait_for_state("octo/load", "b1", name)
        self.server.write("/opt/hookd/hookd.ini", INI)

    def _hook(self) -> GitHub:
        """Return a webhook to where hookd.socket listens."""
        told = self.server.out("systemctl show hookd.socket -P Listen")
        return self.server.webhook(address=("127.0.0.1", int(told.split()[0].rpartition(":")[2])))

    def it_waits_while_hookd_is_stopped(self) -> None:
        """With a socket unit even a stopped service refuses nothing: a push starts it."""
        hook = self._hook()
        self.server.run("systemctl stop hookd.service", check=False)
        accepted(hook.deliver(push("octo/load", "b2", sha("2"))))
        self.server.wait_for_state("octo/load", "b2", sha("2"))

