"""The unit under systemd: verify, hardening, exits, watchdog, self-restart, power cut."""

from __future__ import annotations

import re
import time

from github import Answer, GitHub, push, sha
from scene import FailedError, Scene, wait_until
from server import Server, accepted, expect

SITE = """
[octo/site main]
directory = /srv/site
command =
    echo "$HOOKD_COMMIT" >commit
"""
SELF = """
[octo/self plain]
directory = /srv/self
command =
    echo x >>plain
    systemctl restart hookd
    echo done >>plain
[octo/self noblock]
directory = /srv/self
command =
    echo x >>noblock
    systemctl --no-block restart hookd
    echo done >>noblock
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >commit
"""
POLKIT = """polkit.addRule(function (action, subject) {
  if (action.id == "org.freedesktop.systemd1.manage-units" && subject.user == "hookd"
      && action.lookup("unit") == "hookd.service" && action.lookup("verb") == "restart")
    return polkit.Result.YES;
});
"""
SLOW = """
[octo/slow main]
directory = /srv/slow
queue = every
command =
    echo "began $HOOKD_COMMIT" >>../ledger
    sleep 2
    echo "ended $HOOKD_COMMIT" >>../ledger
"""


def drop_in(server: Server, text: str) -> None:
    """Change the unit as an administrator does, and restart hookd."""
    server.write("/etc/systemd/system/hookd.service.d/check.conf", text)
    server.run("systemctl daemon-reload && systemctl restart hookd")


class Unit(Scene):
    """What `systemctl` and `systemd-analyze` say, and what ends and restarts hookd."""

    def setup(self) -> None:
        self.server.run("install -d /srv/site /srv/other")
        self.server.install(SITE)
        self.server.run("chown hookd: /srv/site")

    def systemd_analyze_verify_is_silent(self) -> None:
        """No unknown or contradictory line."""
        done = self.server.run("systemd-analyze verify /opt/hookd/hookd.service 2>&1")
        expect(not done.stdout.strip(), done.stdout)

    def systemd_analyze_security_is_at_most_5(self) -> None:
        """Lower is better; a unit with no hardening has 9.6."""
        shown = self.server.out("systemd-analyze security --no-pager hookd.service")
        match = re.search(r"exposure level for hookd.service: ([\d.]+)", shown)
        expect(match and float(match.group(1)) <= 5.0, shown[-200:])
        self.note(f"exposure {match.group(1) if match else '?'}")

    def a_deploy_may_write_where_the_administrator_says(self) -> None:
        """/srv/site belongs to hookd."""
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("1"))))
        self.server.wait_for_state("octo/site", "main", sha("1"))
        expect(self.server.read("/srv/site/commit").strip() == sha("1"), "not written")

    def a_deploy_may_not_write_elsewhere(self) -> None:
        """Neither the program, nor its ini, nor the system, nor homes; and no sudo."""
        ini = SITE + ("[octo/evil main]\nlock = evil\ncommand =\n  for f in /opt/hookd/x /etc/x"
                      " /usr/local/bin/x /home/laptop/x /root/x /srv/other/x; do\n"
                      '    if (echo x >"$f") 2>/dev/null; then echo "WROTE $f"; fi\n  done\n'
                      "  if su''do -n true; then echo WROTE as root; fi\n  echo all tried\n")
        self.server.run("echo 'hookd ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/hookd")
        self.server.configure(ini)
        accepted(self.server.webhook().deliver(push("octo/evil", "main", sha("2"))))
        self.server.wait_for_state("octo/evil", "main")
        output = self.server.hookd("log octo/evil main")
        expect("all tried" in output and "WROTE" not in output, output)

    def a_script_sees_nothing_of_systemd_s_private_variables(self) -> None:
        """No socket to notify, no watchdog, no credentials; and an empty input."""
        self.server.configure(SITE + "[octo/env main]\ncommand =\n  env\n  cat\n  ls /proc/$$/fd\n")
        accepted(self.server.webhook().deliver(push("octo/env", "main", sha("e"))))
        self.server.wait_for_state("octo/env", "main", sha("e"))
        output = self.server.hookd("log octo/env main")
        private = re.findall(r"^(NOTIFY_SOCKET|WATCHDOG_\w+|LISTEN_\w+|CREDENTIALS_DIRECTORY"
                             r"|\w+_DIRECTORY|INVOCATION_ID|JOURNAL_STREAM)=", output, re.MULTILINE)
        expect(not private and "HOOKD_COMMIT=" + sha("e") in output, f"{private}:\n{output}")
        expect("GIT_TERMINAL_PROMPT=0" in output and "HOME=/var/lib/hookd" in output, output)

    def a_secret_may_be_systemd_s_credential(self) -> None:
        """LoadCredential= and a relative secret_file; reload and restart find it too."""
        self.server.write("/etc/blog.secret", "credential-of-the-blog\n", 0o600)
        ini = SITE + "[octo/blog main]\nsecret_file = blog\ncommand = true\n"
        self.server.write("/opt/hookd/hookd.ini", ini)
        drop_in(self.server, "[Service]\nLoadCredential=blog:/etc/blog.secret\n")
        accepted(GitHub("credential-of-the-blog").deliver(push("octo/blog", "main", sha("b"))))
        self.server.wait_for_state("octo/blog", "main", sha("b"))
        wrong = self.server.webhook().deliver(push("octo/blog", "main", sha("c"), sha("b")))
        expect(wrong.status == 403, f"the default secret opens it too: {wrong}")
        try:
            self.server.configure(ini)
        finally:
            self.server.write("/opt/hookd/hookd.ini", SITE)
            drop_in(self.server, "")

    def a_reload_with_a_wrong_ini_fails_visibly(self) -> None:
        """systemctl says so, the same process goes on with what it had."""
        pid = self.server.main_pid()
        self.server.write("/opt/hookd/hookd.ini", SITE + "timout = 5m\n")
        done = self.server.run("systemctl reload hookd 2>&1", check=False)
        expect(done.returncode != 0, "systemctl reload succeeded")
        self.server.wait_for_log("timout", "timeout")
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("3"), sha("1"))))
        wait_until("deployed", lambda: sha("3") in self.server.read("/srv/site/commit"))
        expect(self.server.main_pid() == pid, "another process")

    def a_start_with_a_wrong_ini_is_not_repeated(self) -> None:
        """Exit 78, once."""
        self.server.run("systemctl restart hookd", check=False)
        wait_until("the unit is failed", lambda: self.server.out(
            "systemctl is-failed hookd || true") == "failed")
        code = self.server.out("systemctl show -P ExecMainStatus hookd")
        restarts = self.server.out("systemctl show -P NRestarts hookd")
        expect(code == "78", f"exit {code}")
        time.sleep(2.5)  # longer than RestartSec: nothing may happen in it
        expect(self.server.out("systemctl show -P NRestarts hookd") == restarts, "it was repeated")
        self.server.write("/opt/hookd/hookd.ini", SITE)
        self.server.run("systemctl start hookd")

    def a_crash_loop_ends_and_says_so(self) -> None:
        """The unit's start limit; mended, it starts again."""
        self.server.run("mv /opt/hookd/hookd.py /opt/hookd/good"
                        " && echo 'raise SystemExit(1)' >/opt/hookd/hookd.py")
        self.server.run("systemctl restart hookd", check=False)
        wait_until("systemd gives up", lambda: self.server.out(
            "systemctl is-failed hookd || true") == "failed", 60)
        self.note(f"after {self.server.out('systemctl show -P NRestarts hookd')} restarts")
        self.server.run("mv /opt/hookd/good /opt/hookd/hookd.py && systemctl reset-failed hookd"
                        " && systemctl start hookd")

    def a_changed_listen_is_noticed(self) -> None:
        """The stored socket is not used for another address; the old one is closed."""
        self.server.configure("[hookd]\nlisten = 127.0.0.1:9001\n" + SITE, restart=True)
        hook = self.server.webhook(address=("127.0.0.1", 9001))
        accepted(hook.deliver(push("octo/site", "main", sha("4"), sha("3"))))
        try:
            self.server.webhook().deliver(push("octo/site", "main", sha("5"), sha("4")))
        except ConnectionRefusedError:
            self.server.configure(SITE, restart=True)
            accepted(self.server.webhook().deliver(push("octo/site", "main", sha("6"), sha("4"))))
            return
        raise FailedError("port 9000 still answers")

    def a_reload_may_change_listen_too(self) -> None:
        """SIGHUP with another address: served there, or said that a restart is needed."""
        self.server.configure("[hookd]\nlisten = 127.0.0.1:9002\n" + SITE)
        try:
            hook = self.server.webhook(address=("127.0.0.1", 9002))
            accepted(hook.deliver(push("octo/site", "main", sha("7"), sha("6"))))
            self.note("served there")
        except ConnectionRefusedError:
            expect(self.server.log_lines("listen", "restart"), "neither served nor said")
            self.note("said that a restart is needed")
        self.server.configure(SITE, restart=True)

    def a_second_hookd_on_the_same_state_says_who_holds_it(self) -> None:
        """Started by hand beside the service."""
        self.server.write("/tmp/second.ini", "[hookd]\nlisten = 127.0.0.1:9005\n"
                          "state = /var/lib/hookd\n[octo/site main]\ncommand = true\n")
        done = self.server.run("timeout 10 python3 /opt/hookd/hookd.py -c /tmp/second.ini 2>&1",
                               check=False)
        expect(done.returncode == 1 and str(self.server.main_pid()) in done.stdout,
               f"exit {done.returncode}: {done.stdout}")


class Watchdog(Scene):
    """A hookd that hangs is restarted; one that is idle sleeps."""

    def setup(self) -> None:
        self.server.run("install -d /srv/site")
        self.server.install(SITE)
        self.server.run("chown hookd: /srv/site")

    def an_idle_hookd_wakes_only_for_the_watchdog(self) -> None:
        """Voluntary switches of all its threads in 10 s, WatchdogSec=30."""
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("0"))))
        self.server.wait_for_state("octo/site", "main", sha("0"))
        script = f"grep -h ^voluntary /proc/{self.server.main_pid()}/task/*/status"

        def wakes() -> int:
            return sum(int(line.split()[1]) for line in self.server.out(script).splitlines())

        time.sleep(2)  # what ends a run may still be under way
        before = wakes()
        time.sleep(10)
        woken = wakes() - before
        self.note(f"{woken} in 10 s")
        expect(woken <= 3, f"woke {woken} times in 10 s")

    def a_stopped_process_is_replaced_and_the_push_deployed(self) -> None:
        """SIGSTOP, a push, and systemd's watchdog (4 s here, by a drop-in)."""
        drop_in(self.server, "[Service]\nWatchdogSec=4\n")
        pid = self.server.main_pid()
        began = time.monotonic()
        self.server.run(f"kill -STOP {pid}")
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("1"), sha("0"))))
        self.note(f"answered after {time.monotonic() - began:.1f} s, WatchdogSec=4")
        expect(self.server.main_pid() != pid, "the same process goes on")
        self.server.wait_for_state("octo/site", "main", sha("1"))
        expect(self.server.read("/srv/site/commit").strip() == sha("1"), "not deployed")

    def a_locked_database_is_no_reason_to_restart(self) -> None:
        """Another program holds it for 12 s, WatchdogSec=10: an honest answer, the same process."""
        drop_in(self.server, "[Service]\nWatchdogSec=10\n")
        hold = ("import sqlite3, time; db = sqlite3.connect('/var/lib/hookd/hookd.db',"
                " isolation_level=None); db.execute('BEGIN EXCLUSIVE'); time.sleep(12)")
        self.server.run(f'setsid runuser -u hookd -- python3 -c "{hold}" >/dev/null 2>&1 &')
        pid, hook = self.server.main_pid(), self.server.webhook()
        answers: list[Answer] = []
        ends = time.monotonic() + 12
        while time.monotonic() < ends:
            name = sha(f"locked{len(answers)}")
            answers.append(hook.deliver(push("octo/site", "main", name)))
            time.sleep(0.5)
        expect(self.server.main_pid() == pid, "it was restarted")
        self.note(f"{len(answers)} pushes: " + ", ".join(sorted({str(a.status) for a in answers})))
        expect({answer.status for answer in answers} <= {202, 503}, f"{answers}")
        accepted(hook.deliver(push("octo/site", "main", sha("free"))))
        self.server.wait_for_state("octo/site", "main", sha("free"))
        drop_in(self.server, "[Service]\nWatchdogSec=4\n")

    def one_stopped_run_does_not_stop_the_watchdog(self) -> None:
        """A command that takes longer than WatchdogSec is nothing to restart for."""
        self.server.configure(SITE.replace("echo", "sleep 6; echo"))
        pid = self.server.main_pid()
        accepted(self.server.webhook().deliver(push("octo/site", "main", sha("2"), sha("1"))))
        self.server.wait_for_state("octo/site", "main", sha("2"))
        expect(self.server.main_pid() == pid, "it was restarted")


class Restarting(Scene):
    """A command that restarts the daemon which runs it; hookd waits 6 s for it here, not 60."""

    def setup(self) -> None:
        self.server.run("sed -i 's/^DRAIN_SECONDS = 60.0/DRAIN_SECONDS = 6.0/'"
                        " /home/laptop/hookd/hookd.py"
                        " && grep -q '^DRAIN_SECONDS = 6.0' /home/laptop/hookd/hookd.py")
        self.server.run("install -d /srv/self /srv/site")
        self.server.write("/etc/polkit-1/rules.d/10-self.rules", POLKIT)
        self.server.install(SELF)
        self.server.run("chown hookd: /srv/self /srv/site")

    def with_no_block_it_runs_at_most_twice_and_ends(self) -> None:
        """The form that the README shows."""
        self._restarts_itself("noblock")

    def without_no_block_it_neither_loops_nor_hangs(self) -> None:
        """systemctl waits for the stop, the stop waits for the command."""
        self._restarts_itself("plain")

    def _restarts_itself(self, branch: str) -> None:
        """Push, and look how often the command began and what is told in the end."""
        pid = self.server.main_pid()
        hook = self.server.webhook()
        accepted(hook.deliver(push("octo/self", branch, sha("1"))))
        began = time.monotonic()
        wait_until("another process", lambda: self.server.main_pid() not in (0, pid), 100)

        def ended() -> bool:
            one = self.server.target("octo/self", branch)
            return bool(one) and not one["running"] and not one["waiting"]

        wait_until("the run ended", ended, 100)
        took = time.monotonic() - began
        time.sleep(3)  # a loop would go on in it
        wait_until("the run ended", ended, 60)
        times = self.server.read(f"/srv/self/{branch}").count("x")
        one = self.server.target("octo/self", branch)
        self.note(f"{one['state']} after {times} start(s), {took:.0f} s")
        expect(times <= 2, f"the command began {times} times")
        accepted(hook.deliver(push("octo/site", "main", sha("2" + branch))))
        self.server.wait_for_state("octo/site", "main", sha("2" + branch))


class Power(Scene):
    """Stop, reboot, and the plug pulled."""

    hook: GitHub

    def setup(self) -> None:
        self.server.run("install -d /srv/slow; install -m 666 /dev/null /srv/ledger")
        self.server.install(SLOW)
        self.server.run("chown hookd: /srv/slow")
        self.hook = self.server.webhook()

    def a_stop_lets_the_running_command_finish(self) -> None:
        """systemctl stop waits for two seconds of command; the unit ends clean."""
        accepted(self.hook.deliver(push("octo/slow", "main", sha("1"))))
        wait_until("the command began", lambda: "began" in self.server.read("/srv/ledger"))
        self.server.run("systemctl stop hookd")
        expect(f"ended {sha('1')}" in self.server.read("/srv/ledger"), "it was cut off")
        result = self.server.out("systemctl show -P Result hookd")
        expect(result == "success", f"the unit's result is {result}")
        self.server.run("systemctl start hookd")

    def a_killed_daemon_leaves_no_second_run_beside_the_first(self) -> None:
        """SIGKILL of the daemon alone while a command runs."""
        self.server.run(": >/srv/ledger")
        accepted(self.hook.deliver(push("octo/slow", "main", sha("2"), sha("1"))))
        wait_until("the command began", lambda: "began" in self.server.read("/srv/ledger"))
        self.server.run(f"kill -KILL {self.server.main_pid()}")
        self.server.wait_for_state("octo/slow", "main", sha("2"))
        ledger = self.server.read("/srv/ledger").split("\n")
        words = [line.split()[0] for line in ledger if line]
        expect(words in (["began", "began", "ended"], ["began", "ended"]), f"ledger: {words}")

    def what_was_accepted_before_a_power_cut_is_deployed_after_it(self) -> None:
        """Three pushes, the plug is pulled in the first command, the server boots again."""
        self.server.run(": >/srv/ledger; sync")
        names = [sha(f"cut{number}") for number in range(3)]
        for name in names:
            accepted(self.hook.deliver(push("octo/slow", "main", name)))
        wait_until("the command began", lambda: "began" in self.server.read("/srv/ledger"))
        self.server.cut_power()
        self.server.reboot()
        self.server.wait_for_state("octo/slow", "main", names[-1])
        ledger = self.server.read("/srv/ledger")
        missing = [name for name in names if f"ended {name}" not in ledger]
        expect(not missing, f"never ended: {missing}\n{ledger}")
