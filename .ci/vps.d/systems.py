"""The two systems that hookd has to replace, a blog and a Flask app, rebuilt from the README's
recipes. What a visitor sees over HTTP is what is asserted.
"""

import time

from front import CERTIFICATE, TRUSTING
from machine import expect, wait_until
from server import ZERO, GitHub, Repository, Scene, accepted, block, found, get

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
# wrk counts the answers, those that are not 200 or whose lines are not 300 of one kind, and kinds.
WHOLE = """local thread, seen = nil, {}
count, wrong, kinds = 0, 0, 0
function setup(one) thread = one end
function response(status, headers, body)
    local line = body:match("^[^\\n]*\\n") or ""
    count = count + 1
    if status ~= 200 or body ~= line:rep(300) then wrong = wrong + 1 end
    if not seen[line] then seen[line], kinds = true, kinds + 1 end
end
function done()
    print("SAID", thread:get("count"), thread:get("wrong"), thread:get("kinds"))
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


class Blog(Scene):
    """System A: staging and master of one repository as releases, other branches as previews."""

    def setup(self):
        self.blog = Repository(self, "octo/blog")
        self.install()
        self.run("install -d -o hookd -g hookd /srv/blog /srv/preview")
        self.blog.allow_key(block("blog-ini"))
        self.run("rm /etc/nginx/sites-enabled/*")
        self.write("/etc/nginx/sites-enabled/blog", block("preview-nginx"))
        self.run("nginx -t && systemctl start nginx")
        self.configure(block("blog-ini") + block("preview-ini"))

    def _sees(self, host, words):
        """Return the page of a site once it has these words."""
        wait_until(f"{host} shows {words!r}", lambda: words in get(host).text, 30)
        return get(host).text

    def a_push_to_staging_shows_on_staging_only(self):
        self.blog.push("staging", {"build.sh": BUILD, "text.html": "first post",
                                   "draft.html": "a draft"})
        page = self._sees("staging.example.com", "first post")
        expect("a draft" in page, f"no draft on staging: {page}")
        expect(get("blog.example.com").status == 404, f"{get('blog.example.com')}")

    def merging_it_into_master_publishes(self):
        """As a pull request does."""
        before = self.blog.tip("master")
        after = self.blog.publish("master", "git merge -q --no-ff -m 'Merge pull request #1"
                                  " from octo/staging' staging", "staging")
        accepted(self.hook.push("octo/blog master", after, before))
        page = self._sees("blog.example.com", "first post")
        expect("a draft" not in page, f"a draft is live: {page}")

    def a_visitor_sees_whole_pages_through_twenty_deploys(self):
        """nginx under wrk all the while: no answer but 200, each page of one release."""
        self.blog.deploy("master", {"build.sh": LONG, "text.html": "version 0\n"})
        self.write("/tmp/whole.lua", WHOLE)
        self.run("setsid wrk -t1 -c8 -d300s -s /tmp/whole.lua -H 'Host: blog.example.com'"
                 " http://127.0.0.1:80/ >/tmp/wrk.log 2>&1 & echo $! >/tmp/wrk.pid")
        began = time.monotonic()
        for number in range(1, 21):
            self.blog.deploy("master", {"text.html": f"version {number}\n"})
        took = time.monotonic() - began
        self.run("kill -INT $(cat /tmp/wrk.pid)")
        wait_until("wrk ends", lambda: "SAID" in self.read("/tmp/wrk.log"))
        count, wrong, seen = map(int, found("^SAID(.*)", self.read("/tmp/wrk.log")).split())
        self.note(f"{count} answers, {seen} versions, {took:.0f} s")
        expect(count > 1000 and seen > 20 and not wrong, f"{wrong} of {count} answers were wrong")
        kept = self.out("ls /srv/blog/live/releases").split()
        expect(5 <= len(kept) <= 6, f"kept releases: {kept}")

    def a_rollback_is_seen_at_once_and_stays(self):
        """To the release before, without git or build; a push waits until the branch is resumed."""
        self.run("mv /srv/git/octo/blog.git /srv/git/away")
        began = time.monotonic()
        self.verb("rollback octo/blog master")
        self.note(f"{time.monotonic() - began:.1f} s with the start of the verb")
        self.run("mv /srv/git/away /srv/git/octo/blog.git")
        expect("version 19" in get("blog.example.com").text, get("blog.example.com").text[:99])
        self.blog.push("master", {"text.html": "version 21\n"})
        self.verb("resume octo/blog master")
        self._sees("blog.example.com", "version 21")

    def a_branch_gets_its_own_name_until_it_is_deleted(self):
        """feature/dark and feature-dark are two branches with two names."""
        files = {"build.sh": BUILD, "draft.html": ""}
        for branch in ("feature/dark", "feature-dark"):
            one = self.blog.deploy(branch, {**files, "text.html": f"of {branch}."})
            slug = one["directory"].rpartition("/")[2]
            self._sees(f"{slug}.preview.example.com", f"of {branch}.")
            self.note(slug)
        expect(slug == "feature-dark", f"the slug is {slug}")
        answer = self.hook.push("octo/blog feature-dark", ZERO, deleted=True, commits=[],
                                head_commit=None)
        accepted(answer)
        wait_until("404", lambda: get("feature-dark.preview.example.com").status == 404)
        wait_until("the directory is gone", lambda: self.fails("test -e /srv/preview/feature-dark"))


class Copy(Scene):
    """System A as it was: staging and master of one repository, built in one working copy."""

    def both_pushed_at_once_end_each_with_its_own_page(self):
        blog = Repository(self, "octo/blog")
        self.install(block("copy-ini"), "/srv/blog")
        blog.allow_key(block("copy-ini"))
        for number in range(3):
            for branch in ("staging", "master"):
                blog.push(branch, {"build.sh": BUILD, "draft.html": "a draft",
                                   "text.html": f"{branch} {number}"})
        for branch, folder, draft in (("staging", "staging", "a draft"), ("master", "live", "")):
            self.wait_for_state(f"octo/blog {branch}", blog.tip(branch))
            page = self.read(f"/srv/blog/{folder}/index.html")
            expect(page == f"{branch} 2{draft}C.UTF-8 /usr/local/bin:/usr/bin:/bin\n", page)


class App(Scene):
    """System B: a Flask app under gunicorn, updated and restarted by its own push."""

    def setup(self):
        self.app = Repository(self, "octo/myapp")
        self.app.commit("main", {"app.py": APP})
        self.install()
        self.run("install -d -o hookd -g hookd /srv/myapp")
        self.app.allow_key(block("flask-ini"))
        self.write("/etc/polkit-1/rules.d/50-hookd.rules", block("polkit"))
        self.write("/etc/systemd/system/myapp.service", block("flask-unit"))
        make = CERTIFICATE.format("/etc/nginx/cert.pem", "/etc/nginx/key.pem")
        self.run(f"systemctl daemon-reload; rm /etc/nginx/sites-enabled/*; {make}")
        location = block("nginx-tcp")
        path = found(r"location = (\S+)", location)
        self.write("/etc/nginx/sites-enabled/myapp", APP_SITE % location)
        self.run("nginx -t && systemctl start nginx")
        self.ini = f"[hookd]\npath = {path}\n" + block("flask-ini")
        self.configure(self.ini, restart=True)
        self.hook = self.webhook(address=("127.0.0.1", 443), tls=TRUSTING, path=path,
                                 host="myapp.example.com")

    def _page(self):
        return GitHub("", ("127.0.0.1", 443), host="myapp.example.com", tls=TRUSTING).get().text

    def _deploy(self, old, new, state="ok"):
        """Push a changed app, and wait until the run has ended so."""
        return self.app.deploy("main", {"app.py": APP.replace(old, new)}, state)

    def the_first_deploy_starts_the_app(self):
        """By catch-up: the branch's newest commit was never run."""
        wait_until("the page", lambda: "one updated" in self._page(), 40)

    def a_push_updates_the_app_and_restarts_it(self):
        """A visitor sees the new version and the time of its update when the run is ok."""
        pid = self.shows("MainPID", "myapp")
        self._deploy('"one"', '"two"')
        expect(self._page().startswith("two updated "), self._page())
        expect(time.strftime("%Y-%m-%d", time.gmtime()) in self._page(), self._page())
        expect(self.shows("MainPID", "myapp") != pid, "the same process")

    def an_app_that_answers_500_or_does_not_start_is_taken_back(self):
        """The healthcheck fails; the release before is live again, and the log says so."""
        self.configure(self.ini + "healthcheck_timeout = 4s\n")
        for broken in (('"one", 200', '"bad", 500'), ("VERSION, STATUS", "import nothing")):
            one = self._deploy(*broken, state="failed")
            wait_until("version two again", lambda: self._page().startswith("two updated "))
            self.wait_for_log("failed", one["commit"][:7])
        self.note(self.verb("log octo/myapp main").strip().splitlines()[-1][:100])
        self.configure(self.ini)

    def it_was_polkit_that_let_it_and_it_allows_nothing_else(self):
        """Not to stop the app, nor to restart another unit, nor another user."""
        for user, what in (("hookd", "stop myapp"), ("hookd", "reload-or-restart nginx"),
                           ("laptop", "reload-or-restart myapp")):
            expect(self.fails(f"runuser -u {user} -- systemctl --no-ask-password {what}"),
                   f"{user} may {what}")
