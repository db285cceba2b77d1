"""The two systems that hookd has to replace, rebuilt from the README's recipes.

Both were written up by the people who ran them: a blog that publishes itself, and a Flask app
that updates itself.  What a visitor sees over HTTP is what is asserted.
"""

from __future__ import annotations

import re
import time
from typing import Any

from front import CERTIFICATE, trusting
from github import Answer, GitHub, get, push
from scene import Scene, wait_until
from server import Repository, Server, accepted, block, expect

BUILD = """#!/bin/sh -e
# The page says which branch's text it is, when, and with what PATH; a staged one shows drafts.
mkdir -p public
{ cat text.html; [ "$1" != --drafts ] || cat draft.html; echo "$LANG $PATH"; } >public/index.html
"""
APP = """from flask import Flask
application = Flask(__name__)

@application.route("/")
def page():
    return VERSION + " updated " + open("/srv/myapp/updated.txt").read()

VERSION = "one"
"""
APP_UNIT = """[Service]
User=www-data
WorkingDirectory=/srv/myapp
RuntimeDirectory=myapp
UMask=0
ExecStart=/usr/bin/gunicorn --bind unix:/run/myapp/myapp.sock app:application
Restart=always
"""
APP_SITE = """server {
  listen 443 ssl;
  server_name myapp.example.com;
  ssl_certificate /etc/nginx/cert.pem;
  ssl_certificate_key /etc/nginx/key.pem;
  location / { proxy_pass http://unix:/run/myapp/myapp.sock; }
%s
}
"""


def allow_key(server: Server, repository: Repository, ini: str) -> None:
    """Make the deploy key that an ini names, as the README does, and give it to the git host."""
    key = re.search(r"deploy_key = (\S+)", ini)
    expect(key, "the ini names no deploy_key")
    path = key.group(1) if key else ""
    server.type_on_server(re.sub(r"/var/lib/hookd/[\w.-]+?\.key", path, block("deploy-key")))
    repository.deploy_key(server.read(f"{path}.pub"))


class Blog(Scene):
    """System A: staging and master of one repository, built in one working copy."""

    blog: Repository
    hook: GitHub

    def setup(self) -> None:
        self.blog = Repository(self.server, "octo/blog")
        self.server.install()
        self.server.run("install -d -o hookd -g hookd /srv/blog /srv/preview")
        allow_key(self.server, self.blog, block("blog-ini"))
        self.server.run("rm /etc/nginx/sites-enabled/*")
        self.server.write("/etc/nginx/sites-enabled/blog", block("preview-nginx"))
        self.server.run("nginx -t && systemctl start nginx")
        self.server.configure("[hookd]\nlisten = unix:/run/hookd/hookd.sock\n"
                              + block("blog-ini") + block("preview-ini"), restart=True)
        self.hook = self.server.webhook(address=f"{self.server.root}/run/hookd/hookd.sock")

    def _sees(self, host: str, words: str) -> str:
        """Return the page of a site once it has these words."""
        wait_until(f"{host} shows {words!r}", lambda: words in get(host).text, 30)
        return get(host).text

    def a_push_to_staging_shows_on_staging_only(self) -> None:
        """With its drafts; live is not there yet."""
        self.blog.push(self.hook, "staging", {
            "build.sh": BUILD, "text.html": "first post", "draft.html": "a draft"})
        self._sees("staging.example.com", "first post")
        expect("a draft" in get("staging.example.com").text, "no draft on staging")
        expect(get("blog.example.com").status == 404, f"{get('blog.example.com')}")

    def merging_it_into_master_publishes(self) -> None:
        """The push that a merged pull request makes."""
        self._merge()
        page = self._sees("blog.example.com", "first post")
        self.blog.push(self.hook, "staging", {"text.html": "second post"})
        expect("first post" in get("blog.example.com").text, "published before it was merged")
        self._merge()
        self._sees("blog.example.com", "second post")
        expect("a draft" not in page, f"a draft is live: {page}")

    def _merge(self) -> None:
        """Merge staging into master on the git host, which sends a push of master."""
        before = self.blog.tip("master")
        after = self.blog.merge("staging", "master")
        accepted(self.hook.deliver(self._push("master", after, before)))

    def _push(self, branch: str, after: str, before: str) -> dict[str, Any]:
        """Return the payload of a push to the blog."""
        return push("octo/blog", branch, after, before)

    def its_environment_is_the_ini_s(self) -> None:
        """PATH and LANG as written there."""
        page = get("blog.example.com").text
        expect("C.UTF-8 /usr/local/bin:/usr/bin:/bin" in page, page)

    def both_pushed_at_once_end_each_with_its_own_page(self) -> None:
        """One working copy: the runs do not overlap, and neither page has the other's text."""
        for number in range(3):
            self.blog.push(self.hook, "staging", {"text.html": f"staged {number}"})
            self.blog.push(self.hook, "master", {"text.html": f"published {number}"})
        self._sees("staging.example.com", "staged 2")
        self._sees("blog.example.com", "published 2")

    def a_file_that_vanished_from_the_branch_vanishes_from_the_site(self) -> None:
        """rsync --delete of what is built."""
        self.server.run("echo old >/srv/blog/live/old.html; chown hookd: /srv/blog/live/old.html")
        expect(get("blog.example.com", "/old.html").status == 200, "not there")
        self.blog.push(self.hook, "master", {"text.html": "published 3"})
        self._sees("blog.example.com", "published 3")
        expect(get("blog.example.com", "/old.html").status == 404, "still there")

    def a_build_that_fails_leaves_the_old_page(self) -> None:
        """The failure is in the status and, with its last lines, in the log."""
        broken = "#!/bin/sh\necho no disk\nexit 9\n"
        name = self.blog.push(self.hook, "master", {"build.sh": broken})
        self.server.wait_for_state("octo/blog", "master", name, "failed")
        expect("published 3" in get("blog.example.com").text, "the page changed")
        self.server.wait_for_log("no disk")
        done = self.server.run("python3 /opt/hookd/hookd.py status", check=False)
        expect(done.returncode == 1, f"status exits with {done.returncode}")
        self.blog.push(self.hook, "master", {"build.sh": BUILD, "text.html": "mended"})
        self._sees("blog.example.com", "mended")


class Previews(Blog):
    """System A's wish: every other branch on a name of its own."""

    def a_branch_gets_its_own_name(self) -> None:
        """feature/dark and feature-dark are two branches with two names."""
        files = {"build.sh": BUILD, "draft.html": ""}
        slugs = {}
        for branch in ("feature-dark", "feature/dark", "Wip"):
            name = self.blog.push(self.hook, branch, dict(files, **{"text.html": f"of {branch}."}))
            one = self.server.wait_for_state("octo/blog", branch, name)
            slugs[branch] = one["directory"].rpartition("/")[2]
            self._sees(f"{slugs[branch]}.preview.example.com", f"of {branch}.")
        expect(len(set(slugs.values())) == 3, f"slugs: {slugs}")
        expect(slugs["feature-dark"] == "feature-dark", f"slugs: {slugs}")
        self.note(", ".join(slugs.values()))

    def a_push_updates_it(self) -> None:
        self.blog.push(self.hook, "feature-dark", {"text.html": "darker"})
        self._sees("feature-dark.preview.example.com", "darker")

    def ten_branches_at_once_are_all_built(self) -> None:
        """Up to `jobs` at the same time, each in its own directory."""
        began = time.monotonic()
        for number in range(10):
            self.blog.push(self.hook, f"many{number}", {"text.html": f"many {number}."})
        for number in range(10):
            self._sees(f"many{number}.preview.example.com", f"many {number}.")
        self.note(f"{time.monotonic() - began:.1f} s with the commits")

    def a_deleted_branch_disappears(self) -> None:
        """Its name answers 404, its directory is gone, others stay."""
        answer: Answer = self.blog.push_deletion(self.hook, "feature-dark")
        expect(answer.status == 202, f"{answer}")
        wait_until("404", lambda: get("feature-dark.preview.example.com").status == 404)
        wait_until("the directory is gone", lambda: not self.server.out(
            "ls -d /srv/preview/feature-dark 2>/dev/null || true"))
        expect("many 3." in get("many3.preview.example.com").text, "another one went too")

    def a_hostile_branch_name_stays_text(self) -> None:
        """$(id) and ;reboot are legal in git; here they are only names."""
        for branch in ("x$(touch${IFS}/tmp/pwned)", "a;touch${IFS}/srv/preview/pwned", "`id`"):
            answer = self.hook.deliver(self._push(branch, "1" * 40, ""))
            expect(answer.status in (200, 202), f"{branch}: {answer}")
        wait_until("nothing runs", lambda: all(not one["running"] and not one["waiting"]
                                               for one in self.server.status()), 40)
        left = self.server.out("find / -xdev -name 'pwned*' 2>/dev/null || true")
        expect(not left, left)


class App(Scene):
    """System B: a Flask app under gunicorn, updated and restarted by its own push."""

    app: Repository
    hook: GitHub

    def setup(self) -> None:
        self.app = Repository(self.server, "octo/myapp")
        self.app.commit("main", {"app.py": APP})
        self.server.install()
        self.server.run("install -d -o hookd -g hookd /srv/myapp")
        allow_key(self.server, self.app, block("flask-ini"))
        self.server.write("/etc/polkit-1/rules.d/50-hookd.rules", block("polkit"))
        self.server.write("/etc/systemd/system/myapp.service", APP_UNIT)
        self.server.run(f"rm /etc/nginx/sites-enabled/*; {CERTIFICATE}".format(
            "/etc/nginx/cert.pem", "/etc/nginx/key.pem"))
        location = block("nginx-tcp")
        path = re.search(r"location\s+(?:=\s+)?(\S+)", location)
        self.server.write("/etc/nginx/sites-enabled/myapp", APP_SITE % location)
        self.server.run("nginx -t && systemctl start nginx")
        self.path = path.group(1) if path else "/"
        self.head = f"[hookd]\npath = {self.path}\n"
        self.server.configure(self.head + block("flask-ini"), restart=True)
        self.hook = self.server.webhook(address=("127.0.0.1", 443), tls=trusting(),
                                        path=self.path, host="myapp.example.com")

    def _page(self) -> str:
        """Return what a visitor sees."""
        visitor = GitHub("", ("127.0.0.1", 443), "/", "myapp.example.com", tls=trusting())
        return visitor.send(None, {"Host": "myapp.example.com"}, "GET").text

    def the_first_deploy_starts_the_app(self) -> None:
        """By catch-up: the branch's newest commit was never run."""
        wait_until("the page", lambda: "one updated" in self._page(), 40)

    def a_push_updates_the_app_and_restarts_it(self) -> None:
        """A visitor sees the new version and the time of its update."""
        pid = self.server.out("systemctl show -P MainPID myapp")
        self.server.run("echo 2001-01-01 00:00 UTC >/srv/myapp/updated.txt")
        name = self.app.push(self.hook, "main", {"app.py": APP.replace('"one"', '"two"')})
        self.server.wait_for_state("octo/myapp", "main", name)
        wait_until("version two", lambda: self._page().startswith("two updated "))
        today = time.strftime("%Y-%m-%d", time.gmtime())
        expect(today in self._page(), self._page())
        expect(self.server.out("systemctl show -P MainPID myapp") != pid, "the same process")

    def the_unit_s_hardening_is_on(self) -> None:
        """It was polkit that let it, not root."""
        shown = self.server.out("systemctl show hookd -p User,NoNewPrivileges,ProtectSystem")
        for line in ("User=hookd", "NoNewPrivileges=yes", "ProtectSystem=strict"):
            expect(line in shown, shown)

    def local_changes_are_discarded_and_other_files_kept(self) -> None:
        """git reset --hard of what is tracked; updated.txt and uploads stay."""
        self.server.run("cd /srv/myapp && echo broken >app.py && echo mine >upload.txt"
                        " && chown hookd: *")
        name = self.app.push(self.hook, "main", {"app.py": APP.replace('"one"', '"three"')})
        self.server.wait_for_state("octo/myapp", "main", name)
        wait_until("version three", lambda: self._page().startswith("three updated "))
        expect(self.server.read("/srv/myapp/upload.txt") == "mine\n", "upload.txt is gone")

    def the_rule_allows_nothing_else(self) -> None:
        """Not to stop the app, nor to restart another unit, nor another user."""
        for user, what in (("hookd", "stop myapp"), ("hookd", "restart nginx"),
                           ("laptop", "restart myapp")):
            done = self.server.run(f"runuser -u {user} -- systemctl --no-ask-password {what}",
                                   check=False)
            expect(done.returncode != 0, f"{user} may {what}")

    def the_key_is_outside_the_app_and_private(self) -> None:
        """The app's user cannot read it."""
        key = re.search(r"deploy_key = (\S+)", block("flask-ini"))
        path = key.group(1) if key else ""
        expect(not path.startswith("/srv/myapp"), path)
        done = self.server.run(f"runuser -u www-data -- cat {path}", check=False)
        expect(done.returncode != 0, "the app can read the deploy key")

    def other_paths_and_sha_1_are_refused(self) -> None:
        """The app answers the first, hookd the second."""
        stray = GitHub(self.hook.secret, ("127.0.0.1", 9000), "/", "myapp.example.com")
        expect(stray.deliver(self._any()).status == 404, f"{stray.answers}")
        old = self.hook.headers(b"{}")
        del old["X-Hub-Signature-256"]
        old["X-Hub-Signature"] = "sha1=" + "0" * 40
        answer = self.hook.send(b"{}", old)
        expect((answer.status, answer.text) == (403, "signature missing"), f"{answer}")

    def _any(self) -> dict[str, Any]:
        """Return a push of the app that changes nothing."""
        return push("octo/myapp", "main", "1" * 40)

    def quiet_answers_ok_to_everyone(self) -> None:
        """The wrong signature, the unknown branch and the real push; the log has the truth."""
        self.server.configure(self.head + "quiet = yes\n" + block("flask-ini"))
        liar = GitHub("wrong", self.hook.address, self.path, self.hook.host, tls=self.hook.tls)
        name = self.app.commit("main", {"app.py": APP.replace('"one"', '"four"')})
        answers = [liar.deliver(self._any()),
                   self.hook.deliver(dict(self._any(), ref="refs/heads/x")),
                   self.hook.deliver(dict(self._any(), after=name))]
        told = {(answer.status, answer.text) for answer in answers}
        expect(told == {(200, "ok")}, f"answers: {told}")
        self.server.wait_for_log("signature does not match")
        wait_until("version four", lambda: self._page().startswith("four updated "))
