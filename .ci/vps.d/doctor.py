"""`hookd.py check` as a doctor: what it finds on this server, and the remedy it names."""

from __future__ import annotations

from scene import Scene
from server import Repository, expect

GOOD = "[octo/blog main]\ngit = git@github.com:octo/blog.git\ncommand = true\n"


class Doctor(Scene):
    """Each check breaks one thing; the report must name it and say what would be right."""

    def setup(self) -> None:
        self.server.install()
        self.blog = Repository(self.server, "octo/blog")
        self.blog.commit("main", {"page": "one"})

    def _told(self, ini: str, *words: str, online: bool = False, code: int = 78) -> None:
        """Expect check to exit so and to print one line that has all the words."""
        self.server.write("/opt/hookd/hookd.ini", ini)
        verb = "check --online" if online else "check"
        done = self.server.run(f"python3 /opt/hookd/hookd.py {verb} 2>&1", check=False)
        lines = [line for line in done.stdout.splitlines()
                 if all(word.lower() in line.lower() for word in words)]
        expect(lines, f"no line with {words} in:\n{done.stdout}")
        expect(done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout}")
        self.note(lines[0].strip())

    def the_shipped_ini_is_healthy(self) -> None:
        """Exit 0, and a table of the hooks."""
        expect("octo/site" in self.server.hookd("check"), "no table")

    def every_mistake_of_the_ini_at_once(self) -> None:
        """Place, fault, remedy; two mistakes, two lines."""
        ini = "[hookd]\nlisten = nowhere\n[octo/site main]\ncommand = true\ntimout = 5m\n"
        self._told(ini, "octo/site main", "timout", "timeout")
        self._told(ini, "[hookd]", "listen", "nowhere")

    def a_directory_the_user_cannot_write(self) -> None:
        self.server.run("install -d /srv/locked")
        self._told("[octo/blog main]\ndirectory = /srv/locked\ncommand = true\n",
                   "/srv/locked", "hookd")

    def a_key_readable_by_others(self) -> None:
        self.server.run("runuser -u hookd -- ssh-keygen -q -t ed25519 -N '' -f /var/lib/hookd/k"
                        " && chmod 644 /var/lib/hookd/k")
        self._told(GOOD + "deploy_key = /var/lib/hookd/k\n", "/var/lib/hookd/k", "chmod 600")
        self.server.run("chmod 600 /var/lib/hookd/k")

    def a_key_that_is_missing(self) -> None:
        self._told(GOOD + "deploy_key = /var/lib/hookd/none\n", "/var/lib/hookd/none")

    def a_remote_that_answers_is_healthy_online(self) -> None:
        key = self.server.read("/var/lib/hookd/k.pub")
        self.blog.deploy_key(key)
        self._told(GOOD + "deploy_key = /var/lib/hookd/k\n", "octo/blog main", online=True, code=0)
        self.server.run("rm /home/git/.ssh/authorized_keys")

    def a_key_that_the_remote_does_not_know(self) -> None:
        self._told(GOOD + "deploy_key = /var/lib/hookd/k\n", "octo/blog main", "key", ".pub",
                   online=True)

    def a_host_key_that_changed(self) -> None:
        self.server.run("ssh-keygen -q -t ed25519 -N '' -f /tmp/other;"
                        " echo github.com $(cat /tmp/other.pub)"
                        " >/var/lib/hookd/known_hosts; chown hookd: /var/lib/hookd/known_hosts")
        self._told(GOOD + "deploy_key = /var/lib/hookd/k\n", "octo/blog main", "known_hosts",
                   online=True)
        self.server.run("rm /var/lib/hookd/known_hosts")

    def a_working_copy_of_another_user(self) -> None:
        """git's "dubious ownership", before git says it."""
        self.server.run("install -d -o git /srv/dubious && runuser -u git -- git clone -q"
                        " /srv/git/octo/blog.git /srv/dubious && chmod -R a+rwX /srv/dubious")
        self._told(GOOD + "directory = /srv/dubious\n", "/srv/dubious", "chown")

    def a_secret_that_everybody_can_read(self) -> None:
        self.server.write("/etc/blog.secret", "of the blog\n", 0o644)
        self._told("[octo/blog main]\nsecret_file = /etc/blog.secret\ncommand = true\n",
                   "/etc/blog.secret", "chmod")

    def a_secret_in_an_ini_that_everybody_can_read(self) -> None:
        self._told("[octo/blog main]\nsecret = kept-by-nobody\ncommand = true\n",
                   "hookd.ini", "chmod")
        shown = self.server.run("python3 /opt/hookd/hookd.py check 2>&1", check=False).stdout
        expect("kept-by-nobody" not in shown, "the secret is printed")

    def a_hook_that_can_never_match(self) -> None:
        self._told("[octo/blog *]\ncommand = true\n[octo/blog main]\ncommand = false\n",
                   "octo/blog main", "octo/blog *")

    def two_hooks_with_one_default_directory(self) -> None:
        self._told("[octo/blog main]\ncommand = true\n[octo/blog refs/tags/main]\ncommand = true\n",
                   "octo/blog", "directory")

    def sudo_where_nothing_may_gain_privileges(self) -> None:
        self._told("[octo/blog main]\ncommand = sudo systemctl restart blog\n",
                   "octo/blog main", "sudo", "polkit")

    def a_listen_that_is_taken(self) -> None:
        """By a program that is not hookd, while hookd runs and while it does not."""
        self.server.write("/etc/nginx/sites-enabled/x", "server { listen 127.0.0.1:8088; }")
        self.server.run("systemctl start nginx")
        for state in ("start", "stop"):
            self.server.write("/opt/hookd/hookd.ini", "[octo/blog main]\ncommand = true\n")
            self.server.run(f"systemctl {state} hookd")
            self._told("[hookd]\nlisten = 127.0.0.1:8088\n[octo/blog main]\ncommand = true\n",
                       "listen", "8088")
        self.server.run("systemctl start hookd", check=False)

    def its_own_daemon_is_not_a_listen_that_is_taken(self) -> None:
        self._told("[octo/blog main]\ncommand = true\n", "octo/blog", code=0)
