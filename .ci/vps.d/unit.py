"""The unit under systemd: what it allows, how it starts and stops, the watchdog, a power cut."""

import re
import time

from github import GitHub, push, sha
from server import REPOSITORY, Scene, accepted, block, expect, readme, wait_until

SITE = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >commit
"""
EVIL = """[octo/evil main]
command =
    for f in /opt/hookd/x /etc/x /usr/local/bin/x /home/laptop/x /root/x /srv/other/x; do
        if (echo x >"$f") 2>/dev/null; then echo "WROTE $f"; fi
    done
    if su''do -n true; then echo WROTE as root; fi
    echo x >"$XDG_CACHE_HOME/x" && echo "cached in $XDG_CACHE_HOME, npm in $npm_config_cache"
    echo "files: $(ulimit -Sn)"
    env
"""
PRIVATE = (r"^(NOTIFY_SOCKET|WATCHDOG_\w+|LISTEN_\w+|CREDENTIALS_DIRECTORY|\w+_DIRECTORY"
           r"|INVOCATION_ID|JOURNAL_STREAM|HOOKD_STOP_SECONDS)=")


class Site(Scene):
    """hookd with one hook, which writes the pushed commit to /srv/site/commit."""

    pushed = ""

    def setup(self) -> None:
        self.server.run("install -d /srv/other")
        self.server.install(SITE, "/srv/site")

    def _deploys(self) -> None:
        before, self.pushed = self.pushed, sha(f"after {self.pushed}")
        accepted(self.server.webhook().deliver(push("octo/site", "main", self.pushed, before)))
        self.server.wait_for_state("octo/site", "main", self.pushed)
        expect(self.server.read("/srv/site/commit").strip() == self.pushed, "not written")

    def _fails(self, script: str, *words: str) -> None:
        """Expect a script to fail and hookd to say the words in the one line that it logs."""
        before = len(self.server.log_lines("hookd.ini: "))
        done = self.server.run(f"{script} 2>&1", check=False)
        expect(done.returncode != 0, f"`{script}` succeeded")
        told = self.server.log_lines("hookd.ini: ")[before:]
        expect(len(told) == 1 and all(word in told[0] for word in words), f"logged: {told}")


class Unit(Site):
    """What `systemctl` and `systemd-analyze` say, and what a reload takes and refuses."""

    def systemd_analyze_has_nothing_to_say(self) -> None:
        """No unknown or contradictory line; of the hardening, lower is better (9.6 is none)."""
        told = self.server.out("systemd-analyze verify /etc/systemd/system/hookd.service 2>&1")
        expect(not told, told)
        told = self.server.out("systemd-analyze security --no-pager hookd.service")
        match = re.search(r"exposure level for hookd.service: ([\d.]+)", told)
        expect(match and float(match.group(1)) <= 2.0, told[-200:])
        self.note(f"exposure {match.group(1) if match else '?'}")

    def builds_end_before_the_rest_of_the_server_and_the_boot_does_not_wait(self) -> None:
        """A limit of processes, the kernel's choice, no IPC left behind; no network-online."""
        names = ("OOMScoreAdjust", "TasksMax", "RemoveIPC", "Documentation")
        shown = [self.server.shows(name) for name in names]
        expect(shown == ["300", "2048", "yes", "file:/opt/hookd/hookd.ini"], f"{shown}")
        shown = [self.server.shows(name) for name in ("After", "Wants", "Requires")]
        expect("network-online" not in " ".join(shown), f"{shown}")

    def a_deploy_may_write_where_the_administrator_says_and_nowhere_else(self) -> None:
        """Caches lie apart from the secret; the soft limit of files is the one programs know."""
        self._deploys()
        self.server.run("echo 'hookd ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/hookd")
        self.server.configure(SITE + EVIL)
        accepted(self.server.webhook().deliver(push("octo/evil", "main", sha("2"))))
        self.server.wait_for_state("octo/evil", "main")
        output = self.server.hookd("log octo/evil main")
        expect("WROTE" not in output and not re.findall(PRIVATE, output, re.MULTILINE), output)
        expect("cached in /var/cache/hookd, npm in /var/cache/hookd/npm" in output, output)
        expect("files: 1024\n" in output and "HOME=/var/lib/hookd\n" in output, output)
        limits = self.server.read(f"/proc/{self.server.main_pid()}/limits")
        soft = re.search(r"Max open files +(\d+)", limits)
        expect(soft and int(soft.group(1)) >= 4096, f"hookd itself: {limits}")

    def code_that_a_deploy_leaves_at_home_does_not_run_inside_hookd(self) -> None:
        """A usercustomize.py where Python looks for one of its user."""
        self.server.run("d=$(runuser -u hookd -- env HOME=/var/lib/hookd python3 -m site"
                        " --user-site); install -d -o hookd $d"
                        " && echo 'open(\"/var/lib/hookd/owned\", \"w\")' >$d/usercustomize.py")
        self.server.run("systemctl restart hookd; systemctl reload hookd")
        expect(self.server.run("test -e /var/lib/hookd/owned", check=False).returncode, "it ran")

    def a_secret_may_be_systemd_s_credential(self) -> None:
        """LoadCredential= and a relative secret_file; a reload finds it too."""
        self.server.write("/etc/blog.secret", "credential-of-the-blog\n", 0o600)
        ini = SITE + "[octo/blog main]\nsecret_file = blog\ncommand = true\n"
        self.server.write("/opt/hookd/hookd.ini", ini)
        self.server.drop_in("LoadCredential=blog:/etc/blog.secret")
        hook = GitHub("credential-of-the-blog")
        accepted(hook.deliver(push("octo/blog", "main", sha("b"))))
        self.server.wait_for_state("octo/blog", "main", sha("b"))
        self.server.configure(ini)
        accepted(hook.deliver(push("octo/blog", "main", sha("c"), sha("b"))))
        self.server.write("/opt/hookd/hookd.ini", SITE)
        self.server.drop_in("")

    def a_reload_that_hookd_would_refuse_fails(self) -> None:
        """A mistake, or what only a restart can change: systemctl says so, the old ini stays."""
        pid = self.server.main_pid()
        for ini, words in ((SITE + "timout = 5m\n", ("timout", "timeout")),
                           ("[hookd]\nstate = /srv/site\n" + SITE, ("state", "restart")),
                           ("[hookd]\nlog = stderr\n" + SITE, ("log", "restart"))):
            self.server.write("/opt/hookd/hookd.ini", ini)
            self._fails("systemctl reload hookd", *words)
            self.server.write("/opt/hookd/hookd.ini", SITE)
            self._deploys()
        expect(self.server.main_pid() == pid, "another process")
        self.server.configure(SITE)

    def what_a_start_accepts_a_reload_accepts(self) -> None:
        """A secret that others may read is a warning to both, not an error to one."""
        self.server.write("/etc/blog.secret", "of-the-blog\n", 0o644)
        ini = SITE + "secret_file = /etc/blog.secret\n"
        self.server.configure(ini, restart=True)
        self.server.configure(ini)
        expect("/etc/blog.secret" in self.server.hookd("check"), "check does not warn")
        self.server.configure(SITE)

    def a_place_made_after_the_start_is_judged_as_the_daemon_sees_it(self) -> None:
        """/var/www was not there at the start: read-only inside until a restart."""
        self.server.run("rm -rf /var/www && systemctl restart hookd"
                        " && install -d -o hookd /var/www/site")
        ini = SITE.replace("/srv/site", "/var/www/site")
        self.server.write("/opt/hookd/hookd.ini", ini)
        self._fails("systemctl reload hookd", "/var/www/site", "systemctl restart hookd")
        self.server.run("systemctl restart hookd && systemctl reload hookd")
        self.server.hookd("check")
        self.server.hookd("run octo/site main")
        expect(self.server.out("ls /var/www/site") == "commit", "not deployed there")
        self.server.configure(SITE)


class Starting(Site):
    """What keeps hookd from starting, and that it comes back by itself when it is mended."""

    def _restarts(self) -> int:
        return int(self.server.shows("NRestarts"))

    def _tried_again(self, times: int = 2) -> None:
        """Wait until systemd has tried so often, and expect it not to have given up."""
        before = self._restarts()
        wait_until("tried again", lambda: self._restarts() >= before + times, 30)
        expect(self.server.shows("ActiveState") == "activating", self.server.shows("ActiveState"))

    def a_file_that_hookd_cannot_read(self) -> None:
        """Sixty-five tries in a row; then the mode is mended."""
        self.server.run("chmod 600 /opt/hookd/hookd.py; for i in $(seq 65); do"
                        " systemctl restart hookd; done 2>/dev/null; true")
        self._tried_again()
        self.server.run("chmod 644 /opt/hookd/hookd.py")
        wait_until("it came back", lambda: self.server.shows("ActiveState") == "active")
        self._deploys()

    def a_port_that_is_taken(self) -> None:
        self.server.run("systemctl stop hookd; setsid python3 -m http.server -b 127.0.0.1 9000"
                        " >/dev/null 2>&1 & echo $! >/tmp/pid")
        wait_until("the port is taken", lambda: self.server.out("ss -Hltn 'sport = 9000'"))
        self.server.run("systemctl start hookd 2>&1", check=False)
        self._tried_again()
        self.server.wait_for_log("127.0.0.1:9000")
        self.server.run("kill $(cat /tmp/pid)")
        wait_until("it came back", lambda: self.server.shows("ActiveState") == "active")
        self._deploys()

    def a_disk_that_is_full_at_the_first_start(self) -> None:
        """No exit with 78: nobody has to come when there is room again."""
        self.server.fill_disk(first=True)
        self._tried_again()
        self.server.wait_for_log("no space")
        self.server.run("rm /var/lib/hookd/zero")
        wait_until("it came back", lambda: self.server.shows("ActiveState") == "active")
        self.pushed = ""
        self._deploys()
        self.server.run("systemctl stop hookd && umount /var/lib/hookd && systemctl start hookd")

    def an_ini_that_only_a_person_can_mend(self) -> None:
        """Exit 78, once; with journalctl -u the reason stands beside systemd's words."""
        self.server.write("/opt/hookd/hookd.ini", SITE + "timout = 5m\n")
        self.server.run("systemctl restart hookd", check=False)
        wait_until("failed", lambda: self.server.shows("ActiveState") == "failed")
        expect(self.server.shows("ExecMainStatus") == "78", self.server.shows("ExecMainStatus"))
        told = self.server.out("journalctl -u hookd -n 20 -o cat")
        expect("did you mean timeout" in told and "Failed with result" in told, told)
        self.server.write("/opt/hookd/hookd.ini", SITE)
        self.server.run("systemctl start hookd")

    def a_unix_socket_stays_through_restarts_and_goes_with_a_stop(self) -> None:
        """One inode through restart and SIGKILL; no dead socket for nginx to wait at."""
        path = "/run/hookd/hookd.sock"
        self.server.configure(f"[hookd]\nlisten = unix:{path}\n{SITE}", restart=True)
        inode = self.server.out(f"stat -c %i {path}")
        for script in ("systemctl restart hookd",
                       "systemctl kill -s KILL --kill-whom=main hookd"):
            pid = self.server.main_pid()
            self.server.run(script)
            wait_until("another process", lambda was=pid: self.server.main_pid() not in (0, was))
            expect(self.server.out(f"stat -c %i {path}") == inode, f"another one after {script}")
        self.server.run("systemctl stop hookd")
        expect(self.server.run(f"test -e {path}", check=False).returncode, "it is still there")
        self.server.configure(SITE, restart=True)


SLOW = """
[octo/slow]
command =
    echo "began $HOOKD_COMMIT" >>/srv/slow/ledger
    trap 'echo term >>/srv/slow/ledger; exit 1' TERM
    for i in 1 2 3 4 5 6 7 8; do sleep 0.25; done
    echo "ended $HOOKD_COMMIT" >>/srv/slow/ledger
[octo/slow main]
queue = every
[octo/slow left]
command =
    setsid sh -c 'trap "echo term >>/srv/slow/left" TERM; while sleep 0.1; do :; done' &
    echo $! >/srv/slow/pid
[octo/slow plain]
command =
    echo x >>/srv/slow/plain
    systemctl restart hookd
[octo/slow noblock]
command =
    echo x >>/srv/slow/noblock
    systemctl --no-block restart hookd
"""


class Stopping(Scene):
    """What a stop waits for, what it ends, and a command that restarts its own daemon."""

    hook: GitHub

    def setup(self) -> None:
        rule = block("polkit").replace("myapp", "hookd").replace("reload-or-", "")
        self.server.write("/etc/polkit-1/rules.d/50-hookd.rules", rule)
        self.server.install(SLOW, "/srv/slow")
        self.server.run("install -o hookd /dev/null /srv/slow/ledger")
        self.hook = self.server.webhook()

    def _began(self, name: str, branch: str = "main") -> None:
        """Push, and wait until the command has begun."""
        self.server.run("systemctl start hookd")
        accepted(self.hook.deliver(push("octo/slow", branch, sha(name))))
        wait_until("it began", lambda: f"began {sha(name)}" in self._ledger())

    def _ledger(self) -> str:
        return self.server.read("/srv/slow/ledger")

    def a_stop_waits_for_the_running_command(self) -> None:
        """As long as HOOKD_STOP_SECONDS says, whatever TimeoutStopSec has."""
        self.server.drop_in("TimeoutStopSec=1")
        self._began("1")
        self.server.run("systemctl stop hookd")
        expect(f"ended {sha('1')}" in self._ledger(), f"cut off: {self._ledger()}")
        expect(self.server.shows("Result") == "success", self.server.shows("Result"))

    def a_shorter_wait_can_be_set(self) -> None:
        """HOOKD_STOP_SECONDS=0: TERM at once, and the run begins again at the next start."""
        self.server.drop_in("Environment=HOOKD_STOP_SECONDS=0")
        self._began("2")
        began = time.monotonic()
        self.server.run("systemctl stop hookd")
        self.note(f"stopped in {time.monotonic() - began:.1f} s")
        expect("term" in self._ledger() and f"ended {sha('2')}" not in self._ledger(),
               self._ledger())
        self.server.drop_in("")
        self.server.wait_for_state("octo/slow", "main", sha("2"))
        expect(f"ended {sha('2')}" in self._ledger(), self._ledger())

    def what_setsid_left_lives_until_hookd_ends_as_is_said(self) -> None:
        """Through the run's end and a reload; a restart takes it by SIGKILL."""
        self.server.run("systemctl start hookd")
        accepted(self.hook.deliver(push("octo/slow", "left", sha("3"))))
        self.server.wait_for_state("octo/slow", "left", sha("3"))
        self.server.run("systemctl reload hookd && kill -0 $(cat /srv/slow/pid)")
        self.server.run("systemctl restart hookd && ! kill -0 $(cat /srv/slow/pid) 2>&1")
        term = self.server.run("cat /srv/slow/left", check=False).stdout
        expect(not term, "it got SIGTERM: the unit says that it does not")
        unit = (REPOSITORY / "hookd.service").read_text(encoding="utf-8")
        comment = unit.partition("\nKillMode=")[0].rpartition("\n# Once ")[2]
        expect("SIGKILL" in comment and "setsid" in comment, f"the unit says: {comment}")
        expect(re.search("setsid[^#]*unit of its own", readme()), "the README says nothing")

    def a_command_that_restarts_its_daemon_runs_at_most_twice(self) -> None:
        """With --no-block, as the README shows it, and without; neither loops nor hangs."""
        self.server.drop_in("Environment=HOOKD_STOP_SECONDS=3")
        for branch in ("noblock", "plain"):
            pid, began = self.server.main_pid(), time.monotonic()
            accepted(self.hook.deliver(push("octo/slow", branch, sha(branch))))
            wait_until("a new process", lambda was=pid: self.server.main_pid() not in (0, was), 60)
            wait_until("it ended", lambda which=branch: self._rests(which), 60)
            ended = self.server.target("octo/slow", branch)
            time.sleep(2.5)  # a loop would go on in it
            expect(self.server.target("octo/slow", branch) == ended, "it goes on")
            times = self.server.read(f"/srv/slow/{branch}").count("x")
            self.note(f"{branch}: {ended['state']} after {times} beginning(s),"
                      f" {time.monotonic() - began:.0f} s")
            expect(times <= 2, f"the command began {times} times")

    def what_was_accepted_before_a_power_cut_is_deployed_after_it(self) -> None:
        self.server.drop_in("")
        self.server.run(": >/srv/slow/ledger; sync")
        names = [sha(f"cut{number}") for number in range(3)]
        for name in names:
            accepted(self.hook.deliver(push("octo/slow", "main", name)))
        wait_until("the command began", lambda: "began" in self._ledger())
        self.server.cut_power()
        self.server.reboot()
        self.server.wait_for_state("octo/slow", "main", names[-1])
        missing = [name for name in names if f"ended {name}" not in self._ledger()]
        expect(not missing, f"never ended: {missing}\n{self._ledger()}")

    def _rests(self, branch: str) -> bool:
        one = self.server.target("octo/slow", branch)
        return bool(one) and not one["running"] and not one["waiting"]


class Watchdog(Site):
    """A hookd that hangs is restarted; one that is idle sleeps; a slow disk ends no deploy."""

    def an_idle_hookd_wakes_only_for_the_watchdog(self) -> None:
        """Voluntary switches of all its threads in 10 s; a disk may stall for over a minute."""
        seconds = int(self.server.shows("WatchdogUSec").replace("min", "") or 0) * 60
        expect(seconds >= 120, f"WatchdogUSec={self.server.shows('WatchdogUSec')}")
        self._deploys()
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
        self.server.drop_in("WatchdogSec=4")
        pid = self.server.main_pid()
        self.server.run(f"kill -STOP {pid}")
        began = time.monotonic()
        self._deploys()
        self.note(f"deployed after {time.monotonic() - began:.1f} s, WatchdogSec=4")
        expect(self.server.main_pid() != pid, "the same process goes on")
