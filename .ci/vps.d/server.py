"""The server of the checks: a Machine with its people, its names, and hookd on it."""

import json
import re
import textwrap
import traceback
from pathlib import Path
from typing import Any, Callable

from github import ZERO, Answer, GitHub, push
from machine import FailedError, Machine, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
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


class Server(Machine):
    """A Debian server that a person rents, with hookd installed by install()."""

    def prepare(self) -> None:
        """Boot, and make the laptop's user, the git host's user, and the names."""
        self.boot()
        self.run(PEOPLE)
        self.write("/usr/local/bin/git-serve", SERVE, 0o755)
        for name in ("hookd.py", "hookd.ini", "hookd.service"):  # as with umask 077
            text = (REPOSITORY / name).read_text(encoding="utf-8")
            self.write(f"/home/laptop/hookd/{name}", text, 0o600, "laptop")

    def reboot(self) -> None:
        """Boot again after cut_power; the addresses of the interface have to be given again."""
        self.boot()
        self.run(ADDRESSES)

    def install(self, ini: str = "", places: str = "") -> None:
        if ini:
            self.write("/home/laptop/hookd/hookd.ini", ini)
        self.run(f"set -e; cd /home/laptop/hookd\n{block('install')}")
        if places:
            self.run(f"install -d -o hookd -g hookd {places} && systemctl restart hookd")

    def type_on_laptop(self, script: str) -> str:
        """Type a block of the README on the laptop, in the folder with the three files."""
        return self.out(f"cd /home/laptop/hookd && exec sh -ex <<'BLOCK'\n{script}\nBLOCK",
                        "laptop", timeout=60)

    def type_on_server(self, script: str, user: str = "root", stop: bool = True) -> str:
        """Type a block of the README on the server, as root over ssh or after `sudo -s`."""
        shell = "sh -s" if user == "root" else "sudo -s"
        done = self.run(f"exec ssh {user}@server.example.com '{shell} 2>&1'", "laptop", check=False,
                        stdin=("set -e\n" if stop else "") + script)
        if done.returncode != 0:
            raise FailedError(f"typed on the server, ended with {done.returncode}:\n{script}\n"
                              f"it printed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def drop_in(self, text: str, restart: bool = True) -> None:
        """Change the unit as `systemctl edit hookd` does."""
        self.write("/etc/systemd/system/hookd.service.d/override.conf", f"[Service]\n{text}\n")
        self.run("systemctl daemon-reload" + " && systemctl restart hookd" * restart)

    # --- hookd on it

    def hookd(self, arguments: str, check: bool = True, timeout: float = 60) -> str:
        """Run a verb of hookd.py as root; return what it prints."""
        script = f"python3 /opt/hookd/hookd.py {arguments} 2>&1"
        return self.run(script, check=check, timeout=timeout).stdout

    def configure(self, ini: str, restart: bool = False) -> None:
        """Replace the ini and let hookd read it."""
        self.write("/opt/hookd/hookd.ini", ini)
        before = len(self.log_lines("reloaded"))
        self.run("systemctl restart hookd" if restart else "systemctl reload hookd")
        if not restart:  # systemctl ends when the signal is sent
            self.wait_for_log("reloaded", times=before + 1)

    def fill_disk(self, first: bool = False) -> None:
        """Put the state, or the `first` start without any, on a disk of 8 MB, and fill it."""
        change = "rm -r /tmp/state/*" if first else "true"
        verb = "stop" if first else "start"
        self.run(f"set -e; cd /var/lib; systemctl stop hookd; cp -a hookd /tmp/state; {change}\n"
                 "mount -t tmpfs -o size=8M tmpfs hookd; cp -a /tmp/state/. hookd\n"
                 f"systemctl {verb} hookd; ! cat /dev/zero >hookd/zero")
        self.run("systemctl start hookd", check=False)

    def webhook(self, **settings: Any) -> GitHub:
        return GitHub(self.read("/var/lib/hookd/secret").strip(), **settings)

    def main_pid(self) -> int:
        return int(self.shows("MainPID") or 0)

    def shows(self, name: str) -> str:
        return self.out(f"systemctl show -P {name} hookd")

    def log_lines(self, *words: str) -> list[str]:
        """Return hookd's lines that have all these words, whatever their case."""
        lines = self.out("journalctl --sync; journalctl -q -t hookd -o cat").splitlines()
        return [line for line in lines if all(w.lower() in line.lower() for w in words)]

    def wait_for_log(self, *words: str, seconds: float = 20, times: int = 1) -> str:
        """Return the newest line with these words once there are so many of them."""
        what = f"{times} line(s) in hookd's log with {' and '.join(words)}"
        wait_until(what, lambda: len(self.log_lines(*words)) >= times, seconds)
        return self.log_lines(*words)[-1]

    def status(self) -> list[dict[str, Any]]:
        """Return what `status --json` says; asked often, so hookd.py is compiled only once."""
        python = "PYTHONPYCACHEPREFIX=/tmp/pyc runuser -u hookd -- python3 -m hookd -c hookd.ini"
        text = self.run(f"cd /opt/hookd && {python} status --json", check=False).stdout
        try:
            told: list[dict[str, Any]] = json.loads(text)
        except ValueError:
            raise FailedError(f"status --json printed:\n{text}") from None
        return told

    def target(self, repo: str, branch: str) -> dict[str, Any]:
        """Return one target of `status --json`, empty where there is none."""
        for one in self.status():
            if one["repo"].lower() == repo.lower() and one["branch"] == branch:
                return one
        return {}

    def wait_for_state(self, repo: str, branch: str, commit: str = "", state: str = "ok",
                       seconds: float = 30) -> dict[str, Any]:
        """Return the target once its last run ended so (for this commit) and nothing waits."""

        def reached() -> bool:
            one = self.target(repo, branch)
            done = bool(one) and one["state"] == state and not one["running"]
            return done and not one["waiting"] and (not commit or one["commit"] == commit)

        wait_until(f"{repo} {branch} is {state} {commit[:7]}", reached, seconds)
        return self.target(repo, branch)


class Repository:
    """A repository on the git host, and the desk of the person who works in it."""

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self.bare, self.desk = f"/srv/git/{name}.git", f"/srv/desk/{name}"
        server.run(f"git init -q --bare {self.bare} && git init -q {self.desk}"
                   f" && git -C {self.desk} remote add origin {self.bare}", "git")

    def commit(self, branch: str, files: dict[str, str]) -> str:
        """Commit files on a branch and push them; return the commit's name."""
        write = "".join(f"cat >{name} <<'THE-END'\n{text}\nTHE-END\ntruncate -s -1 {name}\n"
                        f"chmod 755 {name}\n" for name, text in files.items())
        switch = f"git switch -q {branch} 2>/dev/null || git switch -q -c {branch}"
        return self.publish(branch, f"{{ {switch}; }}\n{write}"
                            "git add -A && git commit -q -m 'a change'")

    def merge(self, source: str, branch: str) -> str:
        """Merge one branch into another, as a pull request does; return the merge commit."""
        switch = f"git switch -q {branch} 2>/dev/null || git switch -q -c {branch} {source}"
        merge = f"git merge -q --no-ff -m 'Merge pull request #1 from octo/{source}' {source}"
        return self.publish(branch, f"{{ {switch}; }} && {merge}")

    def publish(self, branch: str, script: str) -> str:
        return self.server.out(f"cd {self.desk} && {script} && git push -q -f origin {branch}"
                               " && git rev-parse HEAD", "git")

    def tip(self, branch: str) -> str:
        """Return the branch's newest commit on the git host, or nothing."""
        return self.server.out(f"git -C {self.bare} rev-parse -q --verify refs/heads/{branch}"
                               " || true", "git")

    def deploy_key(self, public: str) -> None:
        """Accept a public key as GitHub's page does: for this repository, to read."""
        line = f'restrict,command="git-serve {self.name}" {public.strip()}\n'
        self.server.run("cat >>/home/git/.ssh/authorized_keys && chown git:"
                        " /home/git/.ssh/authorized_keys", stdin=line)

    def push(self, hook: GitHub, branch: str, files: dict[str, str]) -> str:
        """Commit, push, and deliver the webhook; return the commit once it was answered 202."""
        before = self.tip(branch)
        after = self.commit(branch, files)
        accepted(hook.deliver(push(self.name, branch, after, before)))
        return after

    def push_deletion(self, hook: GitHub, branch: str) -> Answer:
        """Delete a branch and deliver the webhook of that."""
        before = self.tip(branch)
        self.server.run(f"git -C {self.desk} push -q origin :{branch}", "git")
        return hook.deliver(push(self.name, branch, ZERO, before))


def accepted(answer: Answer) -> Answer:
    """Return the answer if it is 202, else raise FailedError with it."""
    if answer.status != 202:
        raise FailedError(f"answered {answer.status} {answer.text!r}, not 202")
    return answer


def readme() -> str:
    """Return the README and the pages of recipes that it points to."""
    pages = (REPOSITORY / "README.md", *sorted(REPOSITORY.glob(".ci/*.md")))
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def block(name: str) -> str:
    """Return the text of the fence below `<!-- vps: NAME -->`."""
    marked = re.search(rf"<!-- vps: {name} -->\n+```\w*\n(.*?\n)```", readme(), re.DOTALL)
    if not marked:
        raise FailedError(f"README.md has no block marked <!-- vps: {name} -->")
    return marked[1]


def expect(true: object, otherwise: str) -> None:
    """Raise FailedError with what was found instead, unless `true`."""
    if not true:
        raise FailedError(otherwise)


class Scene:
    """Subclasses write setup() and checks: every other public method, its name a sentence."""

    SUITE = "bookworm"

    def __init__(self, server: Server) -> None:
        self.server = server
        self.noted: list[str] = []

    def setup(self) -> None:
        """Bring the server to where the checks begin."""

    def note(self, figure: str) -> None:
        """Add a measured figure to the line of the running check."""
        self.noted.append(figure)

    def run(self) -> tuple[int, int]:
        """Run setup and the checks; print a line for each; return how many passed and failed."""
        names = [name for kind in type(self).__mro__[-3::-1] for name, value in vars(kind).items()
                 if callable(value) and not name.startswith("_") and name != "setup"]
        if not self.judge("setup", self.setup):
            return 0, len(names)
        results = [self.judge(name, getattr(self, name)) for name in names]
        return sum(results), len(results) - sum(results)

    def judge(self, name: str, check: Callable[[], None]) -> bool:
        """Run one check and print its line, with hookd's journal when it failed."""
        title = f"{type(self).__name__.lower()}: {name.replace('_', ' ')}"
        self.noted = []
        before = self.cursor()
        try:
            check()
        except Exception as error:  # whatever went wrong, the next check is still of use
            first, _, rest = str(error).partition("\n")
            if not isinstance(error, FailedError):
                first, rest = repr(error), traceback.format_exc()
            print(f"FAIL {title}: {first}")
            print(textwrap.indent(rest, "     "), end="\n" if rest else "")
            print(textwrap.indent(self.journal_since(before), "     | "), flush=True)
            return False
        if name != "setup":
            print(f"ok {title}" + "".join(f" ({figure})" for figure in self.noted), flush=True)
        return True

    def cursor(self) -> str:
        """Return the journal's present end."""
        shown = self.server.run("journalctl -q -n 0 --show-cursor", check=False).stdout
        return shown.partition("cursor: ")[2].strip()

    def journal_since(self, cursor: str) -> str:
        """Return hookd's journal since then, at most its last 40 lines."""
        after = f"--after-cursor='{cursor}'" if cursor else ""
        script = f"journalctl -q --no-hostname -o short-precise -u hookd {after} | tail -40"
        return self.server.run(script, check=False).stdout
