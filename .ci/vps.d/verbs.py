"""Every verb under the real unit: with a run at work, with the daemon down, as another user."""

import json
import subprocess
import threading

from github import GitHub, push, sha
from server import FailedError, Repository, Scene, accepted, block, expect, wait_until

INI = """
[octo/slow main]
directory = /srv/slow
queue = every
timeout = 2m
command =
    echo "began $HOOKD_CAUSE $HOOKD_COMMIT" >>ledger
    echo "output of run $HOOKD_RUN"
    until [ -e go ]; do sleep 0.05; done
    echo "ended $HOOKD_CAUSE $HOOKD_COMMIT" >>ledger
[octo/blog main]
git = git@github.com:octo/blog.git
deploy_key = /var/lib/hookd/octo-blog.key
directory = /srv/blog
catch_up = no
"""
VERBS = ("run octo/slow main", "rollback octo/blog main", "cancel octo/slow main", "pause -m x",
         "resume", "status", "status octo/slow main", "status --json", "log octo/slow main",
         "log 1", "secret", "secret octo/blog", "send octo/slow main")


class Verbs(Scene):
    """A command that runs until /srv/slow/go is there, and a blog with git and three deploys."""

    hook: GitHub
    commits: list[str]

    def setup(self) -> None:
        blog = Repository(self.server, "octo/blog")
        self.server.install(INI, "/srv/slow /srv/blog")
        blog.deploy_key(self.server.type_on_server(block("deploy-key")).splitlines()[-1])
        self.hook, self.commits = self.server.webhook(), []
        for page in ("one", "two", "three"):
            self.commits.append(blog.push(self.hook, "main", {"page": page}))
            self.server.wait_for_state("octo/blog", "main", self.commits[-1])
        self.server.run("touch /srv/slow/ledger; chown hookd: /srv/slow/*")

    def _verb(self, arguments: str, code: int, *words: str, user: str = "root") -> str:
        """Run a verb; expect its exit status and these words; return what it printed."""
        done = self.server.run(f"python3 /opt/hookd/hookd.py {arguments} 2>&1", user, check=False)
        wrong = [word for word in words if word.lower() not in done.stdout.lower()]
        expect(done.returncode == code and not wrong and "Traceback" not in done.stdout,
               f"`{arguments}` as {user}: exit {done.returncode} (not {code}), without {wrong}:\n"
               f"{done.stdout}")
        return done.stdout

    def _ledger(self) -> str:
        return self.server.read("/srv/slow/ledger")

    def _shown(self) -> str:
        return self.server.read("/srv/blog/page")


class AtWork(Verbs):
    """A run of `sudo hookd.py run` is at work all the while, and ends as if nothing had been."""

    followed: list[subprocess.CompletedProcess[str]]

    def a_run_begun_by_root_is_not_ended_by_pushes(self) -> None:
        """Followed in a terminal; five pushes are queued behind it."""
        self.followed = []
        follow = "sudo python3 /opt/hookd/hookd.py run octo/slow main 2>&1"
        self.thread = threading.Thread(target=lambda: self.followed.append(
            self.server.run(follow, "me", check=False, timeout=120)))
        self.thread.start()
        wait_until("it began", lambda: "began run" in self._ledger())
        for number in range(5):
            accepted(self.hook.deliver(push("octo/slow", "main", sha(str(number)))))
        waiting = self.server.target("octo/slow", "main")["waiting"]
        expect(len(waiting) == 5 and self.thread.is_alive(), f"waiting {waiting}")

    def every_verb_serves_meanwhile(self) -> None:
        run = self.server.target("octo/slow", "main")["running"]
        self._verb("check", 0, "octo/slow", "octo/blog")
        self._verb("check octo/blog main", 0, "/srv/blog", "octo-blog.key")
        self._verb("status", 0, "octo/slow", "octo/blog")
        self._verb("status octo/slow main", 0, "running", f"{run}")
        json.loads(self._verb("status --json octo/slow main", 0))
        self._verb("log octo/slow main", 0, f"output of run {run}")
        self._verb(f"log {run}", 0, f"output of run {run}")
        self._verb("secret", 0, self.server.read("/var/lib/hookd/secret").strip())
        self._verb("pause octo/blog -m 'moving house'", 0)
        self._verb("status", 0, "moving house")
        self._verb("resume octo/blog", 0)
        self._verb(f"run octo/blog main --commit {self.commits[0][:10]}", 0, self.commits[0][:7])
        expect(self._shown() == "one", f"shown: {self._shown()}")
        self._verb("run octo/blog main", 0, "ok", self.commits[2][:7])
        self._verb("rollback octo/blog main", 0, self.commits[0][:7], "resume")
        expect(self._shown() == "one", f"shown: {self._shown()}")
        self._verb("resume octo/blog main", 0)
        self._verb("send --wait octo/blog main", 0, "queued run")
        last = self.server.target("octo/slow", "main")["waiting"][-1]
        self._verb(f"cancel {last}", 0, "cancel")

    def another_user_is_told_to_use_sudo_and_changes_nothing(self) -> None:
        before = self.server.status()
        for verb in VERBS:
            self._verb(verb, 1, "sudo", user="laptop")
        for one, now in zip(before, self.server.status()):
            one.update(duration=now["duration"])  # of what runs
            expect(now == one, f"{one} became {now}")

    def the_run_and_those_behind_it_end_ok(self) -> None:
        """Exit 0, its output and its outcome followed; four of the five pushes ran, in order."""
        expect(self.thread.is_alive(), f"it ended: {self.followed}")
        self.server.run("touch /srv/slow/go")
        self.thread.join(30)
        expect(self.followed, "run does not end")
        done = self.followed[0]
        expect(done.returncode == 0 and "output of run" in done.stdout and " ok" in done.stdout,
               f"exit {done.returncode}: {done.stdout}")
        self.server.wait_for_state("octo/slow", "main", sha("3"))
        words = [line.split()[:2] for line in self._ledger().splitlines()]
        expect(words == [[word, cause] for cause in ["run"] + ["delivery"] * 4
                         for word in ("began", "ended")], f"{words}")
        owners = self.server.out("find /var/lib/hookd ! -user hookd")
        expect(not owners, f"not hookd's: {owners}")

    def cancel_ends_what_runs(self) -> None:
        """Its process group is gone when the verb returns; history says who."""
        self.server.run("rm /srv/slow/go")
        accepted(self.hook.deliver(push("octo/slow", "main", sha("5"))))
        wait_until("it began", lambda: f"began delivery {sha('5')}" in self._ledger())
        self._verb("cancel octo/slow main", 0, "cancelled")
        expect(not self.server.out("pgrep -fa '[u]ntil.*go' || true"), "the command goes on")
        expect(self.server.target("octo/slow", "main")["state"] == "cancelled", "another state")


class Down(Verbs):
    """The daemon is stopped: what can be done is done, the rest waits for it and says so."""

    def setup(self) -> None:
        super().setup()
        self.server.run("touch /srv/slow/go && systemctl stop hookd")

    def status_and_log_serve_and_say_that_it_is_down(self) -> None:
        self._verb("status", 1, "not running", "octo/blog")
        self._verb("status octo/blog main", 1, self.commits[2][:7])
        self._verb("log octo/blog main", 0)
        self._verb("check octo/blog main", 0)
        self._verb("secret", 0)
        self._verb("send octo/slow main", 1, "no answer")

    def another_user_is_told_to_use_sudo(self) -> None:
        for verb in VERBS:
            self._verb(verb, 1, "sudo", user="laptop")

    def pause_resume_and_cancel_take_effect_at_once(self) -> None:
        self._verb("pause octo/slow -m house", 0)
        self._verb("run octo/slow main", 1, "begins when")
        waiting = self.server.target("octo/slow", "main")["waiting"]
        self._verb(f"cancel {waiting[0]}", 0, "cancelled")
        self._verb("resume octo/slow", 0)

    def run_and_rollback_begin_when_hookd_starts(self) -> None:
        self._verb("run octo/slow main", 1, "begins when")
        self._verb("rollback octo/blog main", 1, "begins when")
        expect(self._ledger() == "" and self._shown() == "three", "it ran without the daemon")
        self.server.run("systemctl start hookd")
        self.server.wait_for_state("octo/slow", "main")
        self.server.wait_for_state("octo/blog", "main", self.commits[1])
        expect(self._shown() == "two" and "ended run" in self._ledger(), self._ledger())

    def with_a_full_disk_verbs_that_read_serve_and_others_say_why(self) -> None:
        self.server.fill_disk()
        for verb in ("status", "log octo/blog main"):
            self._verb(verb, 0)
        self._verb("check octo/blog main", 0)
        for verb in ("run octo/slow main", "pause", "rollback octo/blog main"):
            self._verb(verb, 1, "disk")
        self.server.run("rm /var/lib/hookd/zero")
        self._verb("run octo/slow main", 0, "ok")

    def with_a_broken_ini_the_state_can_still_be_seen_and_braked(self) -> None:
        """The problems on standard error; the hooks are not needed."""
        self.server.run("echo 'timout = 5m' >>/opt/hookd/hookd.ini")
        for verb, code in (("status", 0), ("log octo/blog main", 0), ("pause octo/slow", 0),
                           ("resume octo/slow", 0)):
            self._verb(verb, code, "did you mean timeout")
        try:
            self._verb("run octo/slow main", 78, "did you mean timeout")
        finally:
            self.server.write("/opt/hookd/hookd.ini", INI)
        if self.server.target("octo/slow", "main")["paused"] is not None:
            raise FailedError("the pause stayed")


GOOD = "[octo/blog main]\ngit = git@github.com:octo/blog.git\n"
KEY = GOOD + "deploy_key = /var/lib/hookd/octo-blog.key\n"


class Doctor(Scene):
    """Each check breaks one thing; the report must name it and the command that mends it."""

    def setup(self) -> None:
        self.server.install()
        self.blog = Repository(self.server, "octo/blog")
        self.blog.commit("main", {"page": "one"})
        self.blog.deploy_key(self.server.type_on_server(block("deploy-key")).splitlines()[-1])

    def _told(self, ini: str, *words: str, online: bool = False, code: int = 78) -> None:
        self.server.write("/opt/hookd/hookd.ini", ini)
        verb = "check --online" if online else "check"
        done = self.server.run(f"python3 /opt/hookd/hookd.py {verb} 2>&1", check=False)
        lines = [line for line in done.stdout.splitlines()
                 if all(word.lower() in line.lower() for word in words)]
        expect(lines, f"no line with {words} in:\n{done.stdout}")
        expect(done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout}")
        self.note(lines[0].strip())

    def _place(self, directory: str, *words: str) -> None:
        self._told(f"[octo/blog main]\ndirectory = {directory}/source\ncommand = true\n", *words)

    def what_is_installed_is_healthy(self) -> None:
        """Exit 0 and a table of the hooks; the remote answers with the README's key."""
        expect("octo/site" in self.server.hookd("check"), "no table")
        self._told(KEY, "octo/blog main", online=True, code=0)

    def a_place_that_has_to_be_made(self) -> None:
        """Not `chown /srv`: the folder of the site, made for hookd."""
        self._place("/srv/site", "install -d -o hookd -g hookd /srv/site")
        self.server.run("install -d /srv/locked/source")
        self._place("/srv/locked", "chown", "hookd", "/srv/locked/source")

    def a_place_that_the_unit_closes(self) -> None:
        """Root could write there; the daemon cannot, whoever owns it."""
        self.server.run("install -d -o hookd /opt/site /home/www && chmod 755 /home/www"
                        " && install -d -o hookd /home/me/site && chmod 700 /home/me")
        self._place("/opt/site", "ReadWritePaths=")
        self._place("/home/www", "ProtectHome=")
        self._place("/home/me/site", "ProtectHome=", "setfacl -m u:hookd:x /home/me")

    def sudo_where_nothing_may_gain_privileges(self) -> None:
        self._told("[octo/blog main]\ncommand = sudo systemctl restart blog\n",
                   "warning", "sudo", "polkit", code=0)
