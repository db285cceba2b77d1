"""No connection is ever refused: restarts, kills and reloads under 100 pushes a second."""

import threading
import time

from github import Answer, GitHub, push, sha
from github import Load as Pushes
from server import Scene, accepted, block, expect, wait_until

BRANCHES = ["every", *(f"b{number}" for number in range(8))]
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


class Load(Scene):
    """One load of pushes; what is done to hookd meanwhile are the checks."""

    pushes: Pushes
    threads: list[threading.Thread]
    kills: list[float]

    def setup(self) -> None:
        self.server.install(INI, "/srv/load")
        self.kills = []
        self.pushes = Pushes(self.server.webhook(), "octo/load", BRANCHES, 11)
        self.threads = self.pushes.start()
        wait_until("200 pushes", lambda: len(self.pushes.sent) > 200)

    def _more(self) -> None:
        before = len(self.pushes.sent)
        wait_until("50 pushes more", lambda: len(self.pushes.sent) > before + 50)

    def ten_restarts(self) -> None:
        for _ in range(10):
            before = self.server.main_pid()
            self.server.run("systemctl restart hookd")
            expect(self.server.main_pid() != before, "the same process")
            self._more()

    def five_kills(self) -> None:
        """SIGKILL, five times, each after systemd has started the next one."""
        for _ in range(5):
            before = self.server.main_pid()
            self.kills.append(time.monotonic())
            self.server.run(f"kill -KILL {before}")
            self.kills.append(time.monotonic())
            wait_until("a new process", lambda old=before: self.server.main_pid() not in (0, old)
                       and self.server.shows("ActiveState") == "active", 30)
            self._more()

    def reloads_with_a_good_and_a_bad_ini(self) -> None:
        """The same process; a new hook is known after the one, and still after the other."""
        before, new = self.server.main_pid(), INI + "[octo/new main]\ncommand = true\n"
        self.server.configure(new)
        accepted(self.server.webhook().deliver(push("octo/new", "main", sha("x"))))
        self.server.write("/opt/hookd/hookd.ini", INI + "[octo/new main]\ncommnd = true\n")
        expect(self.server.run("systemctl reload hookd", check=False).returncode != 0, "succeeded")
        accepted(self.server.webhook().deliver(push("octo/new", "main", sha("y"), sha("x"))))
        expect(self.server.main_pid() == before, "another process")
        self.server.write("/opt/hookd/hookd.ini", INI)

    def every_push_was_answered_202(self) -> None:
        """Except those that were in flight in the moment of a SIGKILL."""
        self.pushes.stopping = True
        for thread in self.threads:
            thread.join(60)
        expect(not any(thread.is_alive() for thread in self.threads), "some have no answer")
        sent = self.pushes.sent
        wrong = [one for one in sent if one.status != 202 and not self._in_flight_at_a_kill(one)]
        expect(not wrong, f"{len(wrong)} other answers, first: {wrong[:2]}")
        refused = [one for one in sent if "Refused" in one.text]
        expect(not refused, f"{len(refused)} connections refused")
        times = sorted(one.seconds for one in sent if one.status)
        expect(times[-1] < 10, f"GitHub would not have waited {times[-1]:.1f} s")
        self.note(f"{len(sent)} pushes, {len(sent) - len(times)} cut off by SIGKILL; median answer"
                  f" {times[len(times) // 2] * 1000:.1f} ms, 99 % in"
                  f" {times[len(times) * 99 // 100]:.2f} s, slowest {times[-1]:.2f} s")

    def _in_flight_at_a_kill(self, one: Answer) -> bool:
        """Tell whether a push without an answer was under way between a kill's begin and end."""
        pairs = zip(self.kills[::2], self.kills[1::2])
        return not one.status and any(one.began <= after + 0.05
                                      and one.began + one.seconds >= before
                                      for before, after in pairs)

    def every_202_is_deployed(self) -> None:
        """The newest of each branch ran last; with queue = every each ran; none shared a lock."""
        began = time.monotonic()
        wait_until("nothing waits", lambda: all(
            not one["waiting"] and not one["running"] for one in self.server.status()), 90)
        self.note(f"converged {time.monotonic() - began:.1f} s after the last answer")
        ran = [line.split()[1] for line in self.server.read("/srv/load/ledger").splitlines()]
        for branch in BRANCHES:
            newest = max(one.number for one in self.pushes.sent
                         if one.branch == branch and one.status == 202)
            last = [name for name in ran if name.startswith(f"{branch}-")][-1]
            expect(int(last.split("-")[1]) >= newest, f"{branch} ends with {last}, not {newest}")
        missing = [one.number for one in self.pushes.sent if one.branch == "every"
                   and one.status == 202 and f"every-{one.number}" not in ran]
        expect(not missing, f"queue = every: {len(missing)} never ran, first {missing[:3]}")
        overlaps = self.server.run("cat /srv/load/overlaps", check=False).stdout
        expect(not overlaps, f"overlaps: {overlaps}")
        self.note(f"{len(ran)} runs")


class SocketUnit(Scene):
    """The README's hookd.socket instead of a listen of its own."""

    hook: GitHub

    def setup(self) -> None:
        self.server.install(INI, "/srv/load")
        self.server.write("/etc/systemd/system/hookd.socket", block("socket-unit"))
        self.server.run("systemctl daemon-reload && systemctl stop hookd"
                        " && systemctl enable --now hookd.socket && systemctl start hookd")
        told = self.server.out("systemctl show hookd.socket -P Listen")
        port = int(told.split()[0].rpartition(":")[2])
        self.hook = self.server.webhook(address=("127.0.0.1", port))

    def _deploys(self, word: str) -> None:
        accepted(self.hook.deliver(push("octo/load", "b1", sha(word))))
        self.server.wait_for_state("octo/load", "b1", sha(word))

    def it_stays_served_through_reloads_and_a_restart(self) -> None:
        self._deploys("1")
        for number, verb in enumerate(("reload", "restart", "reload")):
            listen = f"[hookd]\nlisten = 127.0.0.1:910{number}"
            self.server.configure(INI.replace("[hookd]", listen), verb == "restart")
            self._deploys(verb + str(number))
        self.server.write("/opt/hookd/hookd.ini", INI)

    def a_push_starts_a_stopped_hookd(self) -> None:
        self.server.run("systemctl stop hookd.service", check=False)
        self._deploys("2")
