"""No connection is ever refused: restarts, kills and reloads under 100 pushes a second."""

import threading
import time
from types import SimpleNamespace

from harness import push_of, sha
from machine import expect, wait_until
from server import INI, Scene, block

BRANCHES = ["every", *(f"b{number}" for number in range(8))]
RATE = 11  # pushes a second of each
# The ledger names what ran; the lock in the script notices two runs in one directory.
HOOKS = """
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

    def setup(self):
        self.install(HOOKS, "/srv/load")
        self.kills, self.sent, self.stopping = [], [], False
        self.threads = [threading.Thread(target=self._pushes, args=[branch], daemon=True)
                        for branch in BRANCHES]
        for thread in self.threads:
            thread.start()
        self._more(200)

    def _pushes(self, branch):
        first, number = time.monotonic(), 0
        while not self.stopping:
            time.sleep(max(0.0, first + number / RATE - time.monotonic()))
            began, number = time.monotonic(), number + 1
            payload = push_of(branch, sha(f"{branch}{number}"), "octo/load", created=True)
            answer = self.hook.send(payload, X_GitHub_Delivery=f"{branch}-{number}")
            self.sent.append(SimpleNamespace(branch=branch, number=number, began=began,
                                             seconds=time.monotonic() - began, answer=answer))

    def _more(self, pushes=50):
        goal = len(self.sent) + pushes
        wait_until(f"{pushes} pushes more", lambda: len(self.sent) > goal)

    def ten_restarts(self):
        for _ in range(10):
            before = self.main_pid()
            self.run("systemctl restart hookd")
            expect(self.main_pid() != before, "the same process")
            self._more()

    def five_kills(self):
        """SIGKILL, five times, each after systemd has started the next one."""
        for _ in range(5):
            before, began = self.main_pid(), time.monotonic()
            self.run(f"kill -KILL {before}")
            self.kills.append((began, time.monotonic()))
            self.wait_for_another_process(before, 30)
            self._more()

    def reloads_with_a_good_and_a_bad_ini(self):
        before = self.main_pid()
        self.configure(HOOKS + "[octo/new main]\ncommand = true\n")
        self.write(INI, HOOKS + "[octo/new main]\ncommnd = true\n")
        expect(self.fails("systemctl reload hookd"), "the bad one succeeded")
        self.push("octo/new main", "y")
        expect(self.main_pid() == before, "another process")
        self.write(INI, HOOKS)

    def every_push_was_answered_202(self):
        """Except those that were in flight in the moment of a SIGKILL."""
        self.stopping = True
        for thread in self.threads:
            thread.join(60)
        expect(not any(thread.is_alive() for thread in self.threads), "some have no answer")
        wrong = [one for one in self.sent if one.answer.status != 202
                 and not (one.answer.status == 0 and self._in_flight_at_a_kill(one))]
        expect(not wrong, f"{len(wrong)} other answers, first: {wrong[:2]}")
        refused = [one for one in self.sent if "Refused" in one.answer.text]
        expect(not refused, f"{len(refused)} connections refused")
        times = sorted(one.seconds for one in self.sent if one.answer.status)
        expect(times[-1] < 10, f"GitHub would not have waited {times[-1]:.1f} s")
        self.note(f"{len(self.sent)} pushes, {len(self.sent) - len(times)} cut off by SIGKILL;"
                  f" median answer {times[len(times) // 2] * 1000:.1f} ms, 99 % in"
                  f" {times[len(times) * 99 // 100]:.2f} s, slowest {times[-1]:.2f} s")

    def _in_flight_at_a_kill(self, one):
        return any(one.began <= after + 0.05 and one.began + one.seconds >= before
                   for before, after in self.kills)

    def every_202_is_deployed(self):
        """The newest of each branch ran last; with queue = every each ran; none shared a lock."""
        began = time.monotonic()
        wait_until("nothing waits", lambda: all(
            not one["waiting"] and not one["running"] for one in self.status()), 90)
        self.note(f"converged {time.monotonic() - began:.1f} s after the last answer")
        ran = [line.split()[1] for line in self.read("/srv/load/ledger").splitlines()]
        taken = [one for one in self.sent if one.answer.status == 202]
        for branch in BRANCHES:
            newest = max(one.number for one in taken if one.branch == branch)
            last = [name for name in ran if name.startswith(f"{branch}-")][-1]
            expect(int(last.split("-")[1]) >= newest, f"{branch} ends with {last}, not {newest}")
        missing = [one.number for one in taken
                   if one.branch == "every" and f"every-{one.number}" not in ran]
        expect(not missing, f"queue = every: {len(missing)} never ran, first {missing[:3]}")
        overlaps = self.read("/srv/load/overlaps")
        expect(not overlaps, f"overlaps: {overlaps}")
        self.note(f"{len(ran)} runs")


class SocketUnit(Scene):
    """The README's hookd.socket instead of a listen of its own."""

    def setup(self):
        self.install(HOOKS, "/srv/load")
        self.write("/etc/systemd/system/hookd.socket", block("socket-unit"))
        self.run("systemctl daemon-reload && systemctl stop hookd"
                 " && systemctl enable --now hookd.socket && systemctl start hookd")
        port = int(self.shows("Listen", "hookd.socket").split()[0].rpartition(":")[2])
        self.hook = self.webhook(address=("127.0.0.1", port))

    def it_stays_served_through_reloads_and_a_restart(self):
        self.deploy("octo/load b1", "1")
        for number, verb in enumerate(("reload", "restart", "reload")):
            listen = f"[hookd]\nlisten = 127.0.0.1:910{number}"
            self.configure(HOOKS.replace("[hookd]", listen), verb == "restart")
            self.deploy("octo/load b1", f"{verb} {number}")
        self.write(INI, HOOKS)

    def a_push_starts_a_stopped_hookd(self):
        self.run("systemctl stop hookd.service", check=False)
        self.deploy("octo/load b1", "2")
