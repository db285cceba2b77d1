"""The server of a scene: a Machine with its people, its names and hookd, and GitHub outside."""

import dataclasses
import json
import re
import socket
import ssl
import time
import traceback
from pathlib import Path

from harness import ZERO, Answer, push_of, read_answer, request, sha
from machine import Machine, expect, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = ("hookd.py", "hookd.ini", "hookd.service")
INI = "/opt/hookd/hookd.ini"
VISITOR = "203.0.113.77"
ADDRESSES = f"ip address add 203.0.113.10/32 dev lo; ip address add {VISITOR}/32 dev lo"

# laptop is the administrator's own machine, me a user of the server who may use sudo.
PEOPLE = f"""
hostname server; echo server >/etc/hostname
echo 127.0.0.1 localhost server server.example.com github.com hooks.example.com >/etc/hosts
{ADDRESSES}
for user in laptop me git; do
    useradd -m -s /bin/sh $user; install -d -m 700 -o $user /home/$user/.ssh
done
chmod 755 /home/git
echo 'me ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/me
install -d -m 700 -o laptop /home/laptop/hookd
install -d -m 700 /root/.ssh; install -d -o git /srv/git /srv/desk
ssh-keygen -q -t ed25519 -N '' -f /home/laptop/.ssh/id_ed25519
for home in /root /home/me; do
    cp /home/laptop/.ssh/id_ed25519.pub $home/.ssh/authorized_keys
done
printf 'Host *\\nHostName 127.0.0.1\\nStrictHostKeyChecking accept-new\\n' >/home/laptop/.ssh/config
chown -R laptop: /home/laptop; chown -R me: /home/me
git config --system user.name Mona; git config --system user.email mona@example.com
git config --system init.defaultBranch main
"""

# What GitHub does with a deploy key: this one repository, reading only.
SERVE = """#!/bin/sh
case "$SSH_ORIGINAL_COMMAND" in
"git-upload-pack '$1.git'" | "git-upload-pack '$1'" | "git-upload-pack '/$1.git'")
    exec git-upload-pack "/srv/git/$1.git" ;;
git-receive-pack*) echo "ERROR: The key you are authenticating with is read only." >&2; exit 1 ;;
*) echo "ERROR: Repository not found." >&2; exit 1 ;;
esac
"""


@dataclasses.dataclass(frozen=True)
class GitHub:
    """A webhook as set up on GitHub's page, or a visitor of a site."""

    secret: str = ""
    address: tuple = ("127.0.0.1", 9000)
    path: str = "/"
    host: str = "server.example.com"
    source: str = ""
    tls: ssl.SSLContext = None

    def send(self, payload=b"", **more):
        """Send one request on a connection of its own; return the answer, 0 where none came."""
        data = request(payload, self.secret, path=self.path, Host=self.host, **more)
        source = (self.source, 0) if self.source else None
        try:
            with socket.create_connection(self.address, 30, source) as connected:
                if self.tls:
                    connected = self.tls.wrap_socket(connected, server_hostname=self.host)
                with connected, connected.makefile("rb") as stream:
                    connected.sendall(data)
                    return read_answer(stream)
        except OSError as error:
            return Answer(0, f"{type(error).__name__}: {error}")

    def get(self, path="/", **headers):
        return dataclasses.replace(self, path=path).send(method="GET", **headers)

    def push(self, target, commit, before=ZERO, **fields):
        """Send the push of a commit to `octo/site main`."""
        repo, branch = target.split()
        return self.send(push_of(branch, commit, repo, before=before, created=before == ZERO,
                                 **fields))


def get(host, port=80):
    """Return what a visitor of a site sees."""
    return GitHub(address=("127.0.0.1", port), host=host).get()


def accepted(answer):
    """Return the answer if it is 202, else fail with it."""
    expect(answer.status == 202, f"not 202: {answer}")
    return answer


class Server(Machine):
    """A Debian server that a person rents, with hookd installed by install()."""

    def prepare(self):
        """Boot, and make the laptop's user, the git host's user, and the names."""
        self.boot()
        self.run(PEOPLE)
        self.write("/usr/local/bin/git-serve", SERVE, 0o755)
        for name in FILES:  # as with umask 077
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            self.write(f"/home/laptop/hookd/{name}", text, 0o600, "laptop")

    def reboot(self):
        """Cut the power and boot; the addresses of the interface have to be given again."""
        self.cut_power()
        self.boot()
        self.run(ADDRESSES)

    def install(self, ini="", places=""):
        """Type README's block, and make places; `hook` is then the webhook."""
        if ini:
            self.write("/home/laptop/hookd/hookd.ini", ini)
        self.run(f"set -e; cd /home/laptop/hookd\n{block('install')}")
        if places:
            self.run(f"install -d -o hookd -g hookd {places} && systemctl restart hookd")
        self.hook = self.webhook()

    def type_on_laptop(self, script):
        """Type a block of the README on the laptop, in the folder with the three files."""
        return self.out(f"cd /home/laptop/hookd && exec sh -ex <<'BLOCK'\n{script}\nBLOCK",
                        "laptop")

    def type_on_server(self, script, user="root", stop=True):
        """Type a block of the README on the server, as root over ssh or after `sudo -s`."""
        shell = "sh -s" if user == "root" else "sudo -s"
        return self.run(f"exec ssh {user}@server.example.com '{shell} 2>&1'", "laptop",
                        stdin=("set -e\n" if stop else "") + script).stdout

    def drop_in(self, text):
        """Change the unit as `systemctl edit hookd` does."""
        self.write("/etc/systemd/system/hookd.service.d/override.conf", f"[Service]\n{text}\n")
        self.run("systemctl daemon-reload && systemctl restart hookd")

    # hookd on it

    def verb(self, arguments, code=0, says=(), user="root"):
        """Run a verb of hookd.py; check its exit status and its words; return what it printed."""
        done = self.run(f"python3 /opt/hookd/hookd.py {arguments} 2>&1", user, check=False)
        wrong = [word for word in says if word.lower() not in done.stdout.lower()]
        expect(done.returncode == code and not wrong and "Traceback" not in done.stdout,
               f"`{arguments}` as {user}: exit {done.returncode} (not {code}), without {wrong}:\n"
               f"{done.stdout}")
        return done.stdout

    def configure(self, ini, restart=False):
        """Replace the ini and let hookd read it."""
        self.write(INI, ini)
        before = len(self.log_lines("reloaded"))
        self.run("systemctl restart hookd" if restart else "systemctl reload hookd")
        if not restart:  # systemctl ends when the signal is sent
            self.wait_for_log("reloaded", times=before + 1)

    def fill_disk(self, first=False):
        """Put the state, or the `first` start without any, on a disk of 8 MB, and fill it."""
        change = "rm -r /tmp/state/*" if first else "true"
        verb = "stop" if first else "start"
        self.run(f"set -e; cd /var/lib; systemctl stop hookd; cp -a hookd /tmp/state; {change}\n"
                 "mount -t tmpfs -o size=8M tmpfs hookd; cp -a /tmp/state/. hookd\n"
                 f"systemctl {verb} hookd; ! cat /dev/zero >hookd/zero")
        self.run("systemctl start hookd", check=False)

    def webhook(self, **settings):
        return GitHub(self.read("/var/lib/hookd/secret").strip(), **settings)

    def push(self, target, word, before=ZERO):
        """Deliver the push of a made-up commit, which must be taken; return the commit."""
        accepted(self.hook.push(target, sha(word), before))
        return sha(word)

    def deploy(self, target, word, state="ok"):
        """Push, and wait until the run has ended so; return the commit."""
        commit = self.push(target, word)
        self.wait_for_state(target, commit, state)
        return commit

    def main_pid(self):
        return int(self.shows("MainPID") or 0)

    def wait_for_another_process(self, before, seconds=20):
        """Wait until hookd runs in another process than before."""
        wait_until("a new process", lambda: self.main_pid() not in (0, before)
                   and self.shows("ActiveState") == "active", seconds)

    def shows(self, name, unit="hookd"):
        return self.out(f"systemctl show -P {name} {unit}")

    def log_lines(self, *words):
        """Return hookd's lines that have all these words, whatever their case."""
        lines = self.out("journalctl --sync; journalctl -q -t hookd -o cat").splitlines()
        return [line for line in lines if all(w.lower() in line.lower() for w in words)]

    def wait_for_log(self, *words, times=1):
        """Return the newest line with these words once there are so many of them."""
        what = f"{times} line(s) in hookd's log with {' and '.join(words)}"
        wait_until(what, lambda: len(self.log_lines(*words)) >= times)
        return self.log_lines(*words)[-1]

    def status(self):
        """Return what `status --json` says; asked often, so hookd.py is compiled only once."""
        return json.loads(self.out(
            "cd /opt/hookd && PYTHONPYCACHEPREFIX=/tmp/pyc runuser -u hookd -- python3 -m hookd"
            " -c hookd.ini status --json", check=False))

    def target(self, target):
        """Return one target of `status --json`, empty where there is none."""
        found = [one for one in self.status() if f"{one['repo']} {one['branch']}" == target]
        return found[0] if found else {}

    def rests(self, target):
        """Return a target when nothing of it runs or waits."""
        one = self.target(target)
        return one and not one["running"] and not one["waiting"] and one

    def wait_for_state(self, target, commit="", state="ok", seconds=60):
        """Return the target once its last run ended so (for this commit) and nothing waits."""
        def reached():
            one = self.rests(target)
            return one and one["state"] == state and (not commit or one["commit"] == commit)
        wait_until(f"{target} is {state} {commit[:7]}", reached, seconds)
        return self.target(target)


class Repository:
    """A repository on the git host, and the desk of the person who works in it."""

    def __init__(self, server, name):
        self.server, self.name = server, name
        self.bare, self.desk = f"/srv/git/{name}.git", f"/srv/desk/{name}"
        server.run(f"git init -q --bare {self.bare} && git init -q {self.desk}"
                   f" && git -C {self.desk} remote add origin {self.bare}", "git")

    def commit(self, branch, files):
        """Commit files on a branch and push them; return the commit's name."""
        write = "".join(f"cat >{name} <<'THE-END'\n{text}\nTHE-END\ntruncate -s -1 {name}\n"
                        f"chmod 755 {name}\n" for name, text in files.items())
        return self.publish(branch, f"{write}git add -A && git commit -q -m 'a change'", "")

    def publish(self, branch, script, start):
        """Change a branch, made from `start` where it is new, and push it; return its commit."""
        switch = f"git switch -q {branch} 2>/dev/null || git switch -q -c {branch} {start}"
        return self.server.out(f"cd {self.desk} && {{ {switch}; }}\n{script} && git push -q -f"
                               f" origin {branch} && git rev-parse HEAD", "git")

    def tip(self, branch):
        """Return the branch's newest commit on the git host, or zeros."""
        ref = f"refs/heads/{branch}"
        return self.server.out(f"git -C {self.bare} rev-parse -q --verify {ref}"
                               f" || echo {ZERO}", "git")

    def allow_key(self, ini):
        """Make the deploy key that an ini names, as the README does, and accept it to read."""
        path = found(r"deploy_key = (\S+)", ini)
        self.server.type_on_server(re.sub(r"/var/lib/hookd/[\w.-]+?\.key", path,
                                          block("deploy-key")))
        line = f'restrict,command="git-serve {self.name}" {self.server.read(f"{path}.pub")}'
        self.server.run("cat >>/home/git/.ssh/authorized_keys && chown git:"
                        " /home/git/.ssh/authorized_keys", stdin=line)

    def push(self, branch, files):
        """Commit, push, and deliver the webhook; return the commit once it was answered 202."""
        before = self.tip(branch)
        after = self.commit(branch, files)
        accepted(self.server.hook.push(f"{self.name} {branch}", after, before))
        return after

    def deploy(self, branch, files, state="ok"):
        """Push, and wait until the run has ended so; return the target."""
        return self.server.wait_for_state(f"{self.name} {branch}", self.push(branch, files), state)


def readme():
    """Return the README and the pages of recipes that it points to."""
    pages = (REPOSITORY / "README.md", *sorted(REPOSITORY.glob(".ci/*.md")))
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def block(name):
    """Return the text of the fence below `<!-- vps: NAME -->`."""
    marked = re.search(rf"<!-- vps: {name} -->\n+```\w*\n(.*?\n)```", readme(), re.DOTALL)
    expect(marked, f"README.md has no block marked <!-- vps: {name} -->")
    return marked[1]


def found(pattern, text, otherwise=""):
    """Return what a pattern's group finds in a block of the README."""
    match = re.search(pattern, text, re.MULTILINE)
    expect(match or otherwise, f"no {pattern} in {text}")
    return match[1] if match else otherwise


class Scene(Server):
    """Subclasses write setup() and checks: every other public method, its name a sentence."""

    SUITE = "bookworm"

    def setup(self):
        """Bring the server to where the checks begin."""

    def note(self, figure):
        """Add a measured figure to the line of the running check."""
        self.noted += f" ({figure})"

    def play(self):
        """Run setup and the checks; print a line for each; return how many passed and failed."""
        kinds = [kind for kind in reversed(type(self).__mro__) if issubclass(kind, Scene)]
        names = {name: None for kind in kinds[1:] for name, value in vars(kind).items()
                 if callable(value) and not name.startswith("_") and name != "setup"}
        if not self.judge("setup"):
            return 0, len(names)
        results = [self.judge(name) for name in names]
        return sum(results), len(results) - sum(results)

    def judge(self, name):
        """Run one check and print its line, with hookd's journal when it failed."""
        title, self.noted = f"{type(self).__name__.lower()}: {name.replace('_', ' ')}", ""
        began = time.time()
        try:
            getattr(self, name)()
        except Exception:  # whatever went wrong, the next check is still of use
            journal = self.out(f"journalctl -q --no-hostname -o short-precise -u hookd --since"
                               f" @{began:.6f} | tail -40", check=False)
            print(f"FAIL {title}\n{traceback.format_exc()}{journal}", flush=True)
            return False
        if name != "setup":
            print(f"ok {title}{self.noted}", flush=True)
        return True
