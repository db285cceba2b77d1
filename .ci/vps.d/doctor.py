"""`hookd.py check` as a doctor: what only a real server with the real unit can show it."""

from __future__ import annotations

from scene import Scene
from server import Repository, block, expect

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
        """Expect check to exit so and to print one line that has all the words."""
        self.server.write("/opt/hookd/hookd.ini", ini)
        verb = "check --online" if online else "check"
        done = self.server.run(f"python3 /opt/hookd/hookd.py {verb} 2>&1", check=False)
        lines = [line for line in done.stdout.splitlines()
                 if all(word.lower() in line.lower() for word in words)]
        expect(lines, f"no line with {words} in:\n{done.stdout}")
        expect(done.returncode == code, f"exit {done.returncode}, not {code}:\n{done.stdout}")
        self.note(lines[0].strip())

    def _place(self, directory: str, *words: str) -> None:
        """Expect the words about a directory."""
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

    def a_working_copy_of_another_user(self) -> None:
        """git's "dubious ownership", before git says it."""
        self.server.run("install -d -o git /srv/dubious && runuser -u git -- git clone -q"
                        " /srv/git/octo/blog.git /srv/dubious && chmod -R a+rwX /srv/dubious")
        self._told(GOOD + "directory = /srv/dubious\n", "/srv/dubious", "chown")

    def sudo_where_nothing_may_gain_privileges(self) -> None:
        self._told("[octo/blog main]\ncommand = sudo systemctl restart blog\n",
                   "warning", "sudo", "polkit", code=0)

    def a_host_key_that_changed(self) -> None:
        self.server.run("mkdir /root/keys && mv /etc/ssh/ssh_host_* /root/keys && ssh-keygen -A"
                        " && systemctl restart ssh")
        self._told(KEY, "octo/blog main", "known_hosts", online=True)
        self.server.run("cp /root/keys/* /etc/ssh && systemctl restart ssh")

    def a_key_that_the_remote_does_not_know(self) -> None:
        self.server.run("rm /home/git/.ssh/authorized_keys")
        self._told(KEY, "octo/blog main", "key", ".pub", online=True)

    def a_listen_that_is_taken(self) -> None:
        """By a program that is not hookd, while hookd runs and while it does not."""
        self.server.write("/etc/nginx/sites-enabled/x", "server { listen 127.0.0.1:8088; }")
        self.server.run("systemctl start nginx")
        for state in ("start", "stop"):
            self.server.write("/opt/hookd/hookd.ini", GOOD)
            self.server.run(f"systemctl {state} hookd")
            self._told("[hookd]\nlisten = 127.0.0.1:8088\n" + GOOD, "listen", "8088")
