"""The unit under systemd: what it allows, how it starts and stops, the watchdog, a power cut."""

import re
import time

from machine import expect, wait_until
from server import INI, REPOSITORY, GitHub, Scene, block, readme

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

    pushes = 0

    def setup(self):
        self.run("install -d /srv/other")
        self.install(SITE, "/srv/site")

    def _deploys(self):
        self.pushes += 1
        commit = self.deploy("octo/site main", f"push {self.pushes}")
        expect(self.read("/srv/site/commit").strip() == commit, "not written")

    def _refuses(self, ini, *words):
        """Expect a reload to fail and hookd to say the words in the one line that it logs."""
        before = len(self.log_lines("hookd.ini: "))
        self.write(INI, ini)
        expect(self.fails("systemctl reload hookd"), "the reload succeeded")
        told = self.log_lines("hookd.ini: ")[before:]
        expect(len(told) == 1 and all(word in told[0] for word in words), f"logged: {told}")


class Unit(Site):
    """What `systemctl`, `systemd-analyze` and `check` say, and what a reload takes and refuses."""

    def systemd_analyze_has_nothing_to_say(self):
        """No unknown or contradictory line; of the hardening, lower is better (9.6 is none)."""
        told = self.out("systemd-analyze verify /etc/systemd/system/hookd.service 2>&1")
        expect(not told, told)
        told = self.out("systemd-analyze security --no-pager hookd.service")
        level = re.search(r"exposure level for hookd.service: ([\d.]+)", told)[1]
        expect(float(level) <= 2.0, told[-200:])
        self.note(f"exposure {level}")

    def builds_end_before_the_rest_of_the_server_and_the_boot_does_not_wait(self):
        """A limit of processes, the kernel's choice, no IPC left behind; no network-online."""
        names = ("OOMScoreAdjust", "TasksMax", "RemoveIPC", "Documentation")
        shown = [self.shows(name) for name in names]
        expect(shown == ["300", "2048", "yes", "file:/opt/hookd/hookd.ini"], f"{shown}")
        shown = " ".join(self.shows(name) for name in ("After", "Wants", "Requires"))
        expect("network-online" not in shown, shown)

    def a_deploy_may_write_where_the_administrator_says_and_nowhere_else(self):
        """Caches lie apart from the secret; the soft limit of files is the one programs know."""
        self._deploys()
        self.run("echo 'hookd ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/hookd")
        self.configure(SITE + EVIL)
        self.deploy("octo/evil main", "evil")
        output = self.verb("log octo/evil main")
        expect("WROTE" not in output and not re.findall(PRIVATE, output, re.MULTILINE), output)
        for words in ("cached in /var/cache/hookd, npm in /var/cache/hookd/npm", "files: 1024\n",
                      "HOME=/var/lib/hookd\n"):
            expect(words in output, output)
        limits = self.read(f"/proc/{self.main_pid()}/limits")
        expect(int(re.search(r"Max open files +(\d+)", limits)[1]) >= 4096, f"hookd: {limits}")

    def code_that_a_deploy_leaves_at_home_does_not_run_inside_hookd(self):
        """A usercustomize.py where Python looks for one of its user."""
        self.run("d=$(runuser -u hookd -- env HOME=/var/lib/hookd python3 -m site --user-site)"
                 " && install -d -o hookd $d"
                 " && echo 'open(\"/var/lib/hookd/owned\", \"w\")' >$d/usercustomize.py")
        self.run("systemctl restart hookd; systemctl reload hookd")
        expect(self.fails("test -e /var/lib/hookd/owned"), "it ran")

    def a_secret_may_be_systemd_s_credential(self):
        """LoadCredential= and a relative secret_file; a reload finds it too."""
        self.write("/etc/blog.secret", "credential-of-the-blog\n", 0o600)
        ini, shared = SITE + "[octo/blog main]\nsecret_file = blog\ncommand = true\n", self.hook
        self.write(INI, ini)
        self.drop_in("LoadCredential=blog:/etc/blog.secret")
        self.hook = GitHub("credential-of-the-blog")
        self.deploy("octo/blog main", "b")
        self.configure(ini)
        self.deploy("octo/blog main", "c")
        self.hook = shared
        self.write(INI, SITE)
        self.drop_in("")

    def a_reload_that_hookd_would_refuse_fails(self):
        """A mistake, or what only a restart can change: systemctl says so, the old ini stays."""
        pid = self.main_pid()
        for ini, words in ((SITE + "timout = 5m\n", ("timout", "timeout")),
                           ("[hookd]\nstate = /srv/site\n" + SITE, ("state", "restart")),
                           ("[hookd]\nlog = stderr\n" + SITE, ("log", "restart"))):
            self._refuses(ini, *words)
            self.write(INI, SITE)
            self._deploys()
        expect(self.main_pid() == pid, "another process")
        self.configure(SITE)

    def a_place_made_after_the_start_is_judged_as_the_daemon_sees_it(self):
        """/var/www was not there at the start: read-only inside until a restart."""
        self.run("rm -rf /var/www && systemctl restart hookd"
                 " && install -d -o hookd /var/www/site")
        self._refuses(SITE.replace("/srv/site", "/var/www/site"), "/var/www/site",
                      "systemctl restart hookd")
        self.run("systemctl restart hookd && systemctl reload hookd")
        self.verb("check")
        self.verb("run octo/site main")
        expect(self.out("ls /var/www/site") == "commit", "not deployed there")
        self.configure(SITE)

    def check_names_the_mend_for_a_place_that_the_unit_closes(self):
        """Root could write there; the daemon cannot, whoever owns it. Nor does sudo work."""
        self.run("install -d -o hookd /opt/site /home/www && chmod 755 /home/www"
                 " && install -d -o hookd /home/me/site && chmod 700 /home/me")
        for line, code, *words in (
                ("directory = /opt/site/source", 78, "ReadWritePaths="),
                ("directory = /home/www/source", 78, "ProtectHome="),
                ("directory = /home/me/site/source", 78, "setfacl -m u:hookd:x /home/me"),
                ("on_success = sudo systemctl restart blog", 0, "warning", "sudo", "polkit")):
            self.write(INI, f"[octo/blog main]\ncommand = true\n{line}\n")
            self.note(self.verb("check", code, words).splitlines()[0].strip())
        self.write(INI, SITE)


class Starting(Site):
    """What keeps hookd from starting, and that it comes back by itself when it is mended."""

    def _comes_back(self, mend):
        """Expect systemd to try, and not to give up, until a script has mended the cause."""
        before = int(self.shows("NRestarts"))
        wait_until("tried twice", lambda: int(self.shows("NRestarts")) >= before + 2, 30)
        expect(self.shows("ActiveState") == "activating", self.shows("ActiveState"))
        self.run(mend)
        wait_until("it came back", lambda: self.shows("ActiveState") == "active")
        self.hook = self.webhook()  # a new disk has a new secret
        self._deploys()

    def a_file_that_hookd_cannot_read(self):
        """Sixty-five tries in a row; then the mode is mended."""
        self.run("chmod 600 /opt/hookd/hookd.py; for i in $(seq 65); do"
                 " systemctl restart hookd; done 2>/dev/null; true")
        self._comes_back("chmod 644 /opt/hookd/hookd.py")

    def a_port_that_is_taken(self):
        self.run("systemctl stop hookd; setsid python3 -m http.server -b 127.0.0.1 9000"
                 " >/dev/null 2>&1 & echo $! >/tmp/pid")
        wait_until("the port is taken", lambda: self.out("ss -Hltn 'sport = 9000'"))
        self.run("systemctl start hookd", check=False)
        self._comes_back("kill $(cat /tmp/pid)")

    def a_disk_that_is_full_at_the_first_start(self):
        """No exit with 78: nobody has to come when there is room again."""
        self.fill_disk(first=True)
        self._comes_back("rm /var/lib/hookd/zero")
        expect(self.log_lines("no space"), "it does not say why")
        self.run("systemctl stop hookd && umount /var/lib/hookd && systemctl start hookd")

    def an_ini_that_only_a_person_can_mend(self):
        """Exit 78, once; with journalctl -u the reason stands beside systemd's words."""
        self.write(INI, SITE + "timout = 5m\n")
        self.run("systemctl restart hookd", check=False)
        wait_until("failed", lambda: self.shows("ActiveState") == "failed")
        expect(self.shows("ExecMainStatus") == "78", self.shows("ExecMainStatus"))
        told = self.out("journalctl -u hookd -n 20 -o cat")
        expect("did you mean timeout" in told and "Failed with result" in told, told)
        self.write(INI, SITE)
        self.run("systemctl start hookd")

    def a_unix_socket_stays_through_restarts_and_goes_with_a_stop(self):
        """One inode through restart and SIGKILL; no dead socket for nginx to wait at."""
        path = "/run/hookd/hookd.sock"
        self.configure(f"[hookd]\nlisten = unix:{path}\n{SITE}", restart=True)
        inode = self.out(f"stat -c %i {path}")
        for script in ("systemctl restart hookd", "systemctl kill -s KILL --kill-whom=main hookd"):
            before = self.main_pid()
            self.run(script)
            self.wait_for_another_process(before)
            expect(self.out(f"stat -c %i {path}") == inode, f"another one after {script}")
        self.run("systemctl stop hookd")
        expect(self.fails(f"test -e {path}"), "it is still there")


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

    def setup(self):
        rule = block("polkit").replace("myapp", "hookd").replace("reload-or-", "")
        self.write("/etc/polkit-1/rules.d/50-hookd.rules", rule)
        self.install(SLOW, "/srv/slow")
        self.run("install -o hookd /dev/null /srv/slow/ledger")

    def _began(self, name):
        """Push, and wait until the command has begun."""
        commit = self.push("octo/slow main", name)
        wait_until("it began", lambda: f"began {commit}" in self._ledger())
        return commit

    def _ledger(self):
        return self.read("/srv/slow/ledger")

    def a_stop_waits_for_the_running_command(self):
        """As long as HOOKD_STOP_SECONDS says, whatever TimeoutStopSec has."""
        self.drop_in("TimeoutStopSec=1")
        commit = self._began("1")
        self.run("systemctl stop hookd")
        expect(f"ended {commit}" in self._ledger(), f"cut off: {self._ledger()}")
        expect(self.shows("Result") == "success", self.shows("Result"))

    def a_shorter_wait_can_be_set(self):
        """HOOKD_STOP_SECONDS=0: TERM at once, and the run begins again at the next start."""
        self.drop_in("Environment=HOOKD_STOP_SECONDS=0")
        commit, began = self._began("2"), time.monotonic()
        self.run("systemctl stop hookd")
        self.note(f"stopped in {time.monotonic() - began:.1f} s")
        expect("term" in self._ledger() and f"ended {commit}" not in self._ledger(),
               self._ledger())
        self.drop_in("")
        self.wait_for_state("octo/slow main", commit)
        expect(f"ended {commit}" in self._ledger(), self._ledger())

    def what_setsid_left_lives_until_hookd_ends_as_is_said(self):
        """Through the run's end and a reload; a restart takes it by SIGKILL."""
        self.deploy("octo/slow left", "3")
        self.run("systemctl reload hookd && kill -0 $(cat /srv/slow/pid)")
        self.run("systemctl restart hookd && ! kill -0 $(cat /srv/slow/pid) 2>&1")
        expect(not self.read("/srv/slow/left"), "it got SIGTERM: the unit says that it does not")
        unit = (REPOSITORY / "hookd.service").read_text(encoding="utf-8")
        comment = unit.partition("\nKillMode=")[0].rpartition("\n# Once ")[2]
        expect("SIGKILL" in comment and "setsid" in comment, f"the unit says: {comment}")
        expect(re.search("setsid[^#]*unit of its own", readme()), "the README says nothing")

    def a_command_that_restarts_its_daemon_runs_at_most_twice(self):
        """With --no-block, as the README shows it, and without; neither loops nor hangs."""
        self.drop_in("Environment=HOOKD_STOP_SECONDS=3")
        for target in ("octo/slow noblock", "octo/slow plain"):
            pid, began = self.main_pid(), time.monotonic()
            self.push(target, target)
            self.wait_for_another_process(pid, 60)
            wait_until("it ended", lambda one=target: self.rests(one), 60)
            ended = self.target(target)
            time.sleep(2.5)  # a loop would go on in it
            expect(self.target(target) == ended, "it goes on")
            times = self.read(f"/srv/slow/{target.split()[1]}").count("x")
            self.note(f"{target}: {ended['state']} after {times} beginning(s),"
                      f" {time.monotonic() - began:.0f} s")
            expect(times <= 2, f"the command began {times} times")

    def what_was_accepted_before_a_power_cut_is_deployed_after_it(self):
        self.drop_in("")
        self.run(": >/srv/slow/ledger; sync")
        commits = [self.push("octo/slow main", f"cut{number}") for number in range(3)]
        wait_until("the command began", lambda: "began" in self._ledger())
        self.reboot()
        self.wait_for_state("octo/slow main", commits[-1])
        missing = [one for one in commits if f"ended {one}" not in self._ledger()]
        expect(not missing, f"never ended: {missing}\n{self._ledger()}")


class Watchdog(Site):
    """A hookd that hangs is restarted; one that is idle sleeps; a slow disk ends no deploy."""

    def an_idle_hookd_wakes_only_for_the_watchdog(self):
        """Voluntary switches of all its threads in 10 s; a disk may stall for over a minute."""
        seconds = int(self.shows("WatchdogUSec").replace("min", "") or 0) * 60
        expect(seconds >= 120, f"WatchdogUSec={self.shows('WatchdogUSec')}")
        self._deploys()
        script = (f"cat /proc/{self.main_pid()}/task/*/status"
                  " | awk '/^voluntary/ { sum += $2 } END { print sum }'")
        time.sleep(2)  # what ends a run may still be under way
        before = int(self.out(script))
        time.sleep(10)
        woken = int(self.out(script)) - before
        self.note(f"{woken} in 10 s")
        expect(woken <= 3, f"woke {woken} times in 10 s")

    def a_stopped_process_is_replaced_and_the_push_deployed(self):
        """SIGSTOP, a push, and systemd's watchdog (4 s here, by a drop-in)."""
        self.drop_in("WatchdogSec=4")
        pid, began = self.main_pid(), time.monotonic()
        self.run(f"kill -STOP {pid}")
        self._deploys()
        self.note(f"deployed after {time.monotonic() - began:.1f} s, WatchdogSec=4")
        expect(self.main_pid() != pid, "the same process goes on")
