"""Every verb under the real unit: with a run at work, with the daemon down, as another user."""

import threading

from machine import expect, wait_until
from server import Repository, Scene

SLOW = """
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

    def setup(self):
        blog = Repository(self, "octo/blog")
        self.install(SLOW, "/srv/slow /srv/blog")
        blog.allow_key(SLOW)
        self.commits = [blog.deploy("main", {"page": page})["commit"]
                        for page in ("one", "two", "three")]
        self.run("touch /srv/slow/ledger; chown hookd: /srv/slow/*")

    def _verbs(self, *rows):
        """Run verbs, each with its exit status and words that it prints."""
        for arguments, code, *words in rows:
            self.verb(arguments, code, words)

    def _ledger(self):
        return self.read("/srv/slow/ledger")

    def _shows(self, page):
        shown = self.read("/srv/blog/page")
        expect(shown == page, f"shown: {shown}, not {page}")

    def another_user_is_told_to_use_sudo_and_changes_nothing(self):
        before = self.status()
        for verb in VERBS:
            self.verb(verb, 1, ["sudo"], user="laptop")
        for one, now in zip(before, self.status()):
            one.update(duration=now["duration"])  # of what runs
            expect(now == one, f"{one} became {now}")


class AtWork(Verbs):
    """A run of `sudo hookd.py run` is at work all the while, and ends as if nothing had been."""

    def setup(self):
        """Follow it as in a terminal; five pushes are queued behind it."""
        super().setup()
        self.followed = []
        follow = "sudo python3 /opt/hookd/hookd.py run octo/slow main 2>&1"
        self.thread = threading.Thread(target=lambda: self.followed.append(
            self.run(follow, "me", check=False, timeout=120)))
        self.thread.start()
        wait_until("it began", lambda: "began run" in self._ledger())
        self.pushed = [self.push("octo/slow main", number) for number in range(5)]

    def every_verb_serves_meanwhile(self):
        one, first, last = self.target("octo/slow main"), self.commits[0], self.commits[2]
        run, waiting = one["running"], one["waiting"]
        expect(run and len(waiting) == 5, f"{one}")
        self._verbs(
            ("check", 0, "octo/slow", "octo/blog"),
            ("check octo/blog main", 0, "/srv/blog", "octo-blog.key"),
            ("status", 0, "octo/slow", "octo/blog"),
            ("status octo/slow main", 0, "running", f"{run}"),
            ("log octo/slow main", 0, f"output of run {run}"),
            (f"log {run}", 0, f"output of run {run}"),
            ("secret", 0, self.hook.secret), ("pause octo/blog -m 'moving house'", 0),
            ("status", 0, "moving house"), ("resume octo/blog", 0),
            (f"run octo/blog main --commit {first[:10]}", 0, first[:7]))
        self._shows("one")
        self._verbs(("run octo/blog main", 0, "ok", last[:7]),
                    ("rollback octo/blog main", 0, first[:7], "resume"))
        self._shows("one")
        self._verbs(("resume octo/blog main", 0), ("send --wait octo/blog main", 0, "queued run"),
                    (f"cancel {waiting[-1]}", 0, "cancel"))

    def the_run_and_those_behind_it_end_ok(self):
        """Exit 0, its output and its outcome followed; four of the five pushes ran, in order."""
        expect(self.thread.is_alive(), f"it ended: {self.followed}")
        self.run("touch /srv/slow/go")
        self.thread.join(30)
        expect(self.followed, "run does not end")
        done = self.followed[0]
        expect(done.returncode == 0 and "output of run" in done.stdout and " ok" in done.stdout,
               f"exit {done.returncode}: {done.stdout}")
        self.wait_for_state("octo/slow main", self.pushed[3])
        words = [line.split()[:2] for line in self._ledger().splitlines()]
        expect(words == [[word, cause] for cause in ["run"] + ["delivery"] * 4
                         for word in ("began", "ended")], f"{words}")
        owners = self.out("find /var/lib/hookd ! -user hookd")
        expect(not owners, f"not hookd's: {owners}")

    def cancel_ends_what_runs(self):
        """Its process group is gone when the verb returns."""
        self.run("rm /srv/slow/go")
        commit = self.push("octo/slow main", "5")
        wait_until("it began", lambda: f"began delivery {commit}" in self._ledger())
        self.verb("cancel octo/slow main", 0, ["cancelled"])
        expect(not self.out("pgrep -fa '[u]ntil.*go' || true"), "the command goes on")


class Down(Verbs):
    """The daemon is stopped: what can be done is done, the rest waits for it and says so."""

    def setup(self):
        super().setup()
        self.run("touch /srv/slow/go && systemctl stop hookd")

    def what_needs_no_daemon_serves_and_the_rest_says_that_it_is_down(self):
        self._verbs(("status", 1, "not running", "octo/blog"), ("log octo/blog main", 0),
                    ("status octo/blog main", 1, self.commits[2][:7]),
                    ("check octo/blog main", 0), ("secret", 0),
                    ("send octo/slow main", 1, "no answer"), ("pause octo/slow -m house", 0),
                    ("run octo/slow main", 1, "begins when"))
        waiting = self.target("octo/slow main")["waiting"]
        self._verbs((f"cancel {waiting[0]}", 0, "cancelled"), ("resume octo/slow", 0))

    def run_and_rollback_begin_when_hookd_starts(self):
        self._verbs(("run octo/slow main", 1, "begins when"),
                    ("rollback octo/blog main", 1, "begins when"))
        expect(not self._ledger(), "it ran without the daemon")
        self._shows("three")
        self.run("systemctl start hookd")
        self.wait_for_state("octo/slow main")
        self.wait_for_state("octo/blog main", self.commits[1])
        self._shows("two")

    def with_a_full_disk_verbs_that_read_serve_and_others_say_why(self):
        self.fill_disk()
        self._verbs(("status", 0), ("log octo/blog main", 0), ("check octo/blog main", 0),
                    ("run octo/slow main", 1, "disk"), ("pause", 1, "disk"),
                    ("rollback octo/blog main", 1, "disk"))
        self.run("rm /var/lib/hookd/zero")
        self._verbs(("run octo/slow main", 0, "ok"))
