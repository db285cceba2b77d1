"""The two systems that hookd has to replace, rebuilt from the README's recipes.

Both were written up by the people who ran them: a blog that publishes itself, and a Flask app
that updates itself.  What a visitor sees over HTTP is what is asserted.
"""

import re
import time

from front import CERTIFICATE, found, trusting
from github import GitHub, get, push
from server import Repository, Scene, Server, accepted, block, expect, wait_until

BUILD = """#!/bin/sh -e
# The page says which branch's text it is, when, and with what PATH; a staged one shows drafts.
mkdir -p public
{ cat text.html; [ "$1" != --drafts ] || cat draft.html; echo "$LANG $PATH"; } >public/index.html
"""
# 300 equal lines, written in pieces: what is served half is seen.
LONG = """#!/bin/sh -e
mkdir -p public
for part in 1 2 3; do
    for line in $(seq 100); do cat text.html; done >>public/index.html
    sleep 0.05
done
"""
# wrk notes every answer that is not 200 or whose lines are not 300 of one kind.
WHOLE = """local count, wrong, seen = 0, 0, {}
function response(status, headers, body)
    count = count + 1
    local line = body:match("^[^\\n]*\\n") or ""
    if status ~= 200 or body ~= line:rep(300) then wrong = wrong + 1 end
    seen[line] = true
    if count % 100 == 0 then report() end
end
function report()
    local kinds = 0
    for _ in pairs(seen) do kinds = kinds + 1 end
    local file = io.open("/tmp/wrk", "w")
    file:write(count, " ", wrong, " ", kinds)
    file:close()
end
"""
APP = """from pathlib import Path
from flask import Flask
application = app = Flask(__name__)
updated = (Path(__file__).parent / "updated.txt").read_text()

@app.route("/")
def page():
    return VERSION + " updated " + updated, STATUS

VERSION, STATUS = "one", 200
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
    path = found(r"deploy_key = (\S+)", ini)
    server.type_on_server(re.sub(r"/var/lib/hookd/[\w.-]+?\.key", path, block("deploy-key")))
    repository.deploy_key(server.read(f"{path}.pub"))


class Blog(Scene):
    """System A: staging and master of one repository as releases, other branches as previews."""

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
        self.server.configure(block("blog-ini") + block("preview-ini"))
        self.hook = self.server.webhook()

    def _sees(self, host: str, words: str) -> str:
        """Return the page of a site once it has these words."""
        wait_until(f"{host} shows {words!r}", lambda: words in get(host).text, 30)
        return get(host).text

    def a_push_to_staging_shows_on_staging_only(self) -> None:
        self.blog.push(self.hook, "staging", {
            "build.sh": BUILD, "text.html": "first post", "draft.html": "a draft"})
        self._sees("staging.example.com", "first post")
        expect("a draft" in get("staging.example.com").text, "no draft on staging")
        expect(get("blog.example.com").status == 404, f"{get('blog.example.com')}")

    def merging_it_into_master_publishes(self) -> None:
        self._merge()
        page = self._sees("blog.example.com", "first post")
        expect("a draft" not in page, f"a draft is live: {page}")
        self.blog.push(self.hook, "staging", {"text.html": "second post"})
        expect("first post" in get("blog.example.com").text, "published before it was merged")
        self._merge()
        self._sees("blog.example.com", "second post")

    def _merge(self) -> None:
        before = self.blog.tip("master")
        after = self.blog.merge("staging", "master")
        accepted(self.hook.deliver(push("octo/blog", "master", after, before)))

    def a_build_that_fails_leaves_the_old_page(self) -> None:
        """The failure is in the status and, with its last lines, in the log."""
        broken = "#!/bin/sh\necho no disk\nexit 9\n"
        name = self.blog.push(self.hook, "master", {"build.sh": broken})
        self.server.wait_for_state("octo/blog", "master", name, "failed")
        expect("second post" in get("blog.example.com").text, "the page changed")
        self.server.wait_for_log("no disk")

    def a_visitor_sees_whole_pages_through_twenty_deploys(self) -> None:
        """nginx under wrk all the while: no answer but 200, each page of one release."""
        first = self.blog.push(self.hook, "master", {"build.sh": LONG, "text.html": "version 0\n"})
        self.server.wait_for_state("octo/blog", "master", first)
        self.server.write("/tmp/whole.lua", WHOLE)
        self.server.run("setsid wrk -t1 -c8 -d300s -s /tmp/whole.lua -H 'Host: blog.example.com'"
                        " http://127.0.0.1:80/ >/tmp/wrk.log 2>&1 & echo $! >/tmp/wrk.pid")
        began = time.monotonic()
        for number in range(1, 21):
            name = self.blog.push(self.hook, "master", {"text.html": f"version {number}\n"})
            self.server.wait_for_state("octo/blog", "master", name)
        took = time.monotonic() - began
        wait_until("20 versions were seen", lambda: self._told()[2] >= 20)
        self.server.run("kill -INT $(cat /tmp/wrk.pid)")
        count, wrong, seen = self._told()
        self.note(f"{count} answers, {seen} versions, {took:.0f} s")
        expect(count > 1000 and not wrong, f"{wrong} of {count} answers were wrong")
        kept = self.server.out("ls /srv/blog/live/releases").split()
        expect(5 <= len(kept) <= 6, f"kept releases: {kept}")

    def _told(self) -> list[int]:
        words = self.server.run("cat /tmp/wrk", check=False).stdout.split()
        return [int(word) for word in words] if len(words) == 3 else [0, 0, 0]

    def a_rollback_is_seen_at_once_and_stays(self) -> None:
        """To the release before, without git or build; a push waits until the branch is resumed."""
        self.server.run("mv /srv/git/octo/blog.git /srv/git/away")
        began = time.monotonic()
        self.server.hookd("rollback octo/blog master")
        self.note(f"{time.monotonic() - began:.1f} s with the start of the verb")
        self.server.run("mv /srv/git/away /srv/git/octo/blog.git")
        expect("version 19" in get("blog.example.com").text, get("blog.example.com").text[:99])
        name = self.blog.push(self.hook, "master", {"text.html": "version 21\n"})
        self.server.hookd("resume octo/blog master")
        self.server.wait_for_state("octo/blog", "master", name)
        self._sees("blog.example.com", "version 21")

    def a_branch_gets_its_own_name(self) -> None:
        """feature/dark and feature-dark are two branches with two names; a push updates one."""
        files = {"build.sh": BUILD, "draft.html": ""}
        slugs = {}
        for branch in ("feature-dark", "feature/dark", "Wip"):
            name = self.blog.push(self.hook, branch, dict(files, **{"text.html": f"of {branch}."}))
            one = self.server.wait_for_state("octo/blog", branch, name)
            slugs[branch] = one["directory"].rpartition("/")[2]
            self._sees(f"{slugs[branch]}.preview.example.com", f"of {branch}.")
        expect(len(set(slugs.values())) == 3 and "feature-dark" in slugs.values(), f"{slugs}")
        self.blog.push(self.hook, "feature-dark", {"text.html": "darker"})
        self._sees("feature-dark.preview.example.com", "darker")
        self.note(", ".join(slugs.values()))

    def a_deleted_branch_disappears(self) -> None:
        accepted(self.blog.push_deletion(self.hook, "feature-dark"))
        wait_until("404", lambda: get("feature-dark.preview.example.com").status == 404)
        wait_until("the directory is gone", lambda: not self.server.out(
            "ls -d /srv/preview/feature-dark 2>/dev/null || true"))


class Copy(Scene):
    """System A as it was: staging and master of one repository, built in one working copy."""

    def both_pushed_at_once_end_each_with_its_own_page(self) -> None:
        blog = Repository(self.server, "octo/blog")
        self.server.install(block("copy-ini"), "/srv/blog")
        allow_key(self.server, blog, block("copy-ini"))
        hook = self.server.webhook()
        for number in range(3):
            for branch in ("staging", "master"):
                blog.push(hook, branch, {"build.sh": BUILD, "draft.html": "a draft",
                                         "text.html": f"{branch} {number}"})
        for branch, folder in (("staging", "staging"), ("master", "live")):
            self.server.wait_for_state("octo/blog", branch, blog.tip(branch))
            page = self.server.read(f"/srv/blog/{folder}/index.html")
            draft = "a draft" if folder == "staging" else ""
            expect(page == f"{branch} 2{draft}C.UTF-8 /usr/local/bin:/usr/bin:/bin\n", page)


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
        self.server.write("/etc/systemd/system/myapp.service", block("flask-unit"))
        make = CERTIFICATE.format("/etc/nginx/cert.pem", "/etc/nginx/key.pem")
        self.server.run(f"systemctl daemon-reload; rm /etc/nginx/sites-enabled/*; {make}")
        location = block("nginx-tcp")
        self.path = found(r"location = (\S+)", location)
        self.server.write("/etc/nginx/sites-enabled/myapp", APP_SITE % location)
        self.server.run("nginx -t && systemctl start nginx")
        self.head = f"[hookd]\npath = {self.path}\n"
        self.server.configure(self.head + block("flask-ini"), restart=True)
        self.hook = self.server.webhook(address=("127.0.0.1", 443), tls=trusting(),
                                        path=self.path, host="myapp.example.com")

    def _page(self) -> str:
        visitor = GitHub("", ("127.0.0.1", 443), host="myapp.example.com", tls=trusting())
        return visitor.get().text

    def _push(self, *changes: tuple[str, str], state: str = "ok") -> str:
        """Push a changed app; return its commit once the run ended so."""
        text = APP
        for old, new in changes:
            text = text.replace(old, new)
        name = self.app.push(self.hook, "main", {"app.py": text})
        self.server.wait_for_state("octo/myapp", "main", name, state, 60)
        return name

    def the_first_deploy_starts_the_app(self) -> None:
        """By catch-up: the branch's newest commit was never run."""
        wait_until("the page", lambda: "one updated" in self._page(), 40)

    def a_push_updates_the_app_and_restarts_it(self) -> None:
        """A visitor sees the new version and the time of its update when the run is ok."""
        pid = self.server.out("systemctl show -P MainPID myapp")
        self._push(('"one"', '"two"'))
        expect(self._page().startswith("two updated "), self._page())
        expect(time.strftime("%Y-%m-%d", time.gmtime()) in self._page(), self._page())
        expect(self.server.out("systemctl show -P MainPID myapp") != pid, "the same process")

    def an_app_that_answers_500_or_does_not_start_is_taken_back(self) -> None:
        """The healthcheck fails; the release before is live again, and the log says so."""
        ini = self.head + block("flask-ini") + "healthcheck_timeout = 4s\n"
        self.server.configure(ini)
        for broken in (('"one", 200', '"bad", 500'), ("VERSION, STATUS", "import nothing")):
            name = self._push(broken, state="failed")
            wait_until("version two again", lambda: self._page().startswith("two updated "))
            self.server.wait_for_log("failed", name[:7])
        self.note(self.server.hookd("log octo/myapp main").strip().splitlines()[-1][:100])
        self.server.configure(self.head + block("flask-ini"))

    def it_was_polkit_that_let_it_and_it_allows_nothing_else(self) -> None:
        """Not to stop the app, nor to restart another unit, nor another user."""
        for user, what in (("hookd", "stop myapp"), ("hookd", "reload-or-restart nginx"),
                           ("laptop", "reload-or-restart myapp")):
            done = self.server.run(f"runuser -u {user} -- systemctl --no-ask-password {what}",
                                   check=False)
            expect(done.returncode != 0, f"{user} may {what}")
