"""Real remotes: a read-only deploy key over a real sshd, and pushes that never came."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator

from github import push
from scene import Scene, wait_until
from server import Repository, accepted, block, expect

KEY = "/var/lib/hookd/blog_key"
BLOG = f"""
[octo/blog main]
git = git@github.com:octo/blog.git
deploy_key = {KEY}
directory = /srv/blog
timeout = 30s
catch_up = no
command = cp page shown
"""


class DeployKey(Scene):
    """One repository, reading only, as GitHub's page makes it."""

    blog: Repository
    ini = ""

    def setup(self) -> None:
        self.blog = Repository(self.server, "octo/blog")
        Repository(self.server, "octo/other").commit("main", {"page": "other"})
        self.server.run("install -d /srv/blog")
        self.server.install()
        self.server.run("chown hookd: /srv/blog")

    def it_is_made_as_the_readme_says(self) -> None:
        """ssh-keygen as the user hookd; the public half is pasted into GitHub's page."""
        printed = self.server.type_on_server(block("deploy-key"))
        public = re.search(r"ssh-ed25519 \S+[^\n]*", printed)
        expect(public, f"no public key was printed:\n{printed}")
        self.blog.deploy_key(public.group(0) if public else "")
        private = re.search(r"-f\s+(\S+)", block("deploy-key"))
        path = private.group(1) if private else KEY
        shown = self.server.out(f"stat -c '%U %a' {path}")
        expect(shown == "hookd 600", f"{path}: {shown}")
        self.ini = BLOG.replace(KEY, path)
        self.server.configure(self.ini)

    def a_push_is_fetched_with_it(self) -> None:
        """The host key is accepted the first time and kept in the state."""
        name = self.blog.push(self.server.webhook(), "main", {"page": "one"})
        self.server.wait_for_state("octo/blog", "main", name)
        expect(self.server.read("/srv/blog/shown") == "one", "another page")
        known = self.server.read("/var/lib/hookd/known_hosts")
        expect("github.com" in known or known.startswith("|1|"), f"known hosts: {known[:80]}")

    def it_cannot_push_nor_read_another_repository(self) -> None:
        """So much for the key; hookd tells what git told."""
        path = re.search(r"deploy_key = (\S+)", self.server.read("/opt/hookd/hookd.ini"))
        ssh = (f"GIT_SSH_COMMAND='ssh -i {path.group(1) if path else KEY} -o BatchMode=yes"
               " -o UserKnownHostsFile=/var/lib/hookd/known_hosts'")
        for what in ("clone -q git@github.com:octo/other.git /tmp/other",
                     "-C /srv/blog push -q git@github.com:octo/blog.git HEAD:refs/heads/x"):
            done = self.server.run(f"runuser -u hookd -- env {ssh} git {what} 2>&1", check=False)
            expect(done.returncode != 0 and "ERROR" in done.stdout, f"{what}: {done.stdout}")

    def a_wrong_key_is_told_with_what_to_do(self) -> None:
        """The run fails at once, nothing asks for a password."""
        self.server.run("runuser -u hookd -- ssh-keygen -q -t ed25519 -N '' -f"
                        " /var/lib/hookd/strange")
        strange = re.sub(r"deploy_key = \S+", "deploy_key = /var/lib/hookd/strange", self.ini)
        with self._meanwhile(strange, "two", "failed") as output:
            self.note(output.strip().splitlines()[-1][:120])
            expect("key" in output and ".pub" in output, output)

    def a_changed_host_key_is_refused_and_told(self) -> None:
        """Somebody else answers as github.com: no fetch, and what to do in words."""
        before = self.server.read("/srv/blog/shown")
        self.server.run("mkdir /root/keys && cp /etc/ssh/ssh_host_* /root/keys/"
                        " && rm /etc/ssh/ssh_host_* && ssh-keygen -A && systemctl restart ssh")
        with self._meanwhile(self.ini, "three", "failed") as output:
            self.server.run("cp /root/keys/* /etc/ssh/ && systemctl restart ssh")
            expect("known_hosts" in output and "host key" in output.lower(), output)
            expect(self.server.read("/srv/blog/shown") == before, "it was deployed")

    def a_fetch_that_a_power_cut_ends_heals(self) -> None:
        """60 MB come over ssh when the plug is pulled; after the boot they are deployed."""
        self.server.run(f"cd {self.blog.desk} && head -c 60000000 /dev/urandom"
                        " | split -b 200000 -a 3 - big. && sync")
        name = self.blog.push(self.server.webhook(), "main", {"page": "big"})
        self.server.run("until ls /srv/blog/.git/objects/pack/tmp_pack_* 2>/dev/null;"
                        " do sleep 0.01; done", timeout=30)
        self.server.cut_power()
        self.server.reboot()
        self.server.wait_for_state("octo/blog", "main", name, seconds=60)
        expect(self.server.read("/srv/blog/shown") == "big", "another page")

    @contextlib.contextmanager
    def _meanwhile(self, ini: str, page: str, state: str) -> Iterator[str]:
        """Push with another ini, give the log of the run that ends so; then it is mended."""
        self.server.configure(ini)
        name = self.blog.push(self.server.webhook(), "main", {"page": page})
        try:
            self.server.wait_for_state("octo/blog", "main", state=state, seconds=40)
            yield self.server.hookd("log octo/blog main")
        finally:
            self.server.configure(self.ini)
        self.server.hookd("run octo/blog main")
        self.server.wait_for_state("octo/blog", "main", name)

    def a_git_killed_in_the_middle_heals(self) -> None:
        """index.lock is left behind, the next run is ok."""
        self.server.run("touch /srv/blog/.git/index.lock && chown hookd: /srv/blog/.git/index.lock")
        name = self.blog.push(self.server.webhook(), "main", {"page": "four"})
        self.server.wait_for_state("octo/blog", "main", name)

    def a_remote_that_asks_for_a_password_fails_at_once(self) -> None:
        """Nobody is there to type one; the log says so."""
        self.server.write("/etc/nginx/sites-enabled/default", "server { listen 80 default_server;"
                          " auth_basic private; auth_basic_user_file /dev/null; }")
        self.server.run("systemctl start nginx")
        self.server.configure(self.ini + "[octo/web main]\ngit = http://127.0.0.1/octo/web.git\n"
                              "timeout = 60s\ncatch_up = no\n")
        began = time.monotonic()
        accepted(self.server.webhook().deliver(push("octo/web", "main", "1" * 40)))
        self.server.wait_for_state("octo/web", "main", state="failed")
        self.note(f"after {time.monotonic() - began:.1f} s: "
                  + self.server.hookd("log octo/web main").strip().splitlines()[-1][:120])

    def a_host_that_never_answers_ends_with_the_timeout(self) -> None:
        """sshd is stopped in the middle: git hangs, the run does not."""
        self.server.run("pkill -STOP -x sshd -o")
        began = time.monotonic()
        short = self.ini.replace("timeout = 30s", "timeout = 3s")
        with self._meanwhile(short, "five", "timeout"):
            self.server.run("pkill -CONT -x sshd -o")
            self.note(f"timeout = 3s ended after {time.monotonic() - began:.0f} s")


class CatchUp(Scene):
    """Deliveries that were missed are found by asking the remote."""

    blog: Repository

    def setup(self) -> None:
        self.blog = Repository(self.server, "octo/blog")
        self.server.run("install -d /srv/blog")
        self.server.install()
        self.server.run("chown hookd: /srv/blog && runuser -u hookd -- ssh-keygen -q -t ed25519"
                        f" -N '' -f {KEY}")
        self.blog.deploy_key(self.server.read(f"{KEY}.pub"))
        self.blog.commit("main", {"page": "one"})
        self.ini = BLOG.replace("catch_up = no", "catch_up = 2s")

    def at_start_the_branch_is_deployed_without_any_push(self) -> None:
        self.server.configure(self.ini, restart=True)
        self.server.wait_for_state("octo/blog", "main", self.blog.tip("main"))

    def a_push_missed_while_hookd_was_down_is_found(self) -> None:
        self.server.run("systemctl stop hookd")
        name = self.blog.commit("main", {"page": "two"})
        self.server.run("systemctl start hookd")
        self.server.wait_for_state("octo/blog", "main", name)
        expect(self.server.read("/srv/blog/shown") == "two", "another page")

    def a_delivery_that_never_came_is_found_later(self) -> None:
        began = time.monotonic()
        name = self.blog.commit("main", {"page": "three"})
        self.server.wait_for_state("octo/blog", "main", name)
        self.note(f"after {time.monotonic() - began:.1f} s, catch_up = 2s")

    def a_remote_that_is_down_is_told_once_and_once_when_back(self) -> None:
        """Three tries fail, one line; then one more line and the deploy."""
        before = len(self.server.log_lines("github.com"))
        self.server.run("systemctl stop ssh")
        wait_until("it is told", lambda: len(self.server.log_lines("github.com")) > before)
        time.sleep(6)
        told = self.server.log_lines("github.com")[before:]
        expect(len(told) == 1, f"{len(told)} lines while it was down: {told}")
        self.server.run("systemctl start ssh")
        name = self.blog.commit("main", {"page": "four"})
        self.server.wait_for_state("octo/blog", "main", name)
        self.note(told[0][:100])

    def a_failing_commit_is_not_tried_again_and_again(self) -> None:
        self.server.configure(self.ini.replace("cp page shown", "exit 1"))
        name = self.blog.commit("main", {"page": "five"})
        self.server.wait_for_state("octo/blog", "main", name, "failed")
        run = self.server.target("octo/blog", "main")["run"]
        time.sleep(5)
        expect(self.server.target("octo/blog", "main")["run"] == run, "it was tried again")
