"""What stands in front: nginx over a unix socket and over TCP, Caddy, or hookd's own TLS."""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading

from github import Answer, GitHub, push, sha
from server import VISITOR, Scene, accepted, block, expect, wait_until

SITE = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >commit
"""
CERTIFICATE = ("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=server.example.com"
               " -addext 'subjectAltName=DNS:server.example.com,DNS:*.example.com'"
               " -out {0} -keyout {1} 2>&1")
MEGABYTE = 1 << 20


def trusting() -> ssl.SSLContext:
    """Return a TLS client that takes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def found(pattern: str, text: str, otherwise: str = "") -> str:
    """Return what a pattern's group finds in a block of the README."""
    match = re.search(pattern, text, re.MULTILINE)
    expect(match or otherwise, f"no {pattern} in {text}")
    return match.group(1) if match else otherwise


class Front(Scene):
    """The README's block for a proxy: a push through it, its bodies, restarts behind it."""

    hook: GitHub
    name = page = ""
    tls: ssl.SSLContext | None = None

    def setup(self) -> None:
        self.server.install(SITE, "/srv/site /var/www/hookd")
        text = block(self.name)
        listen = found(r"(unix/?/?:?/[\w./-]+|127\.0\.0\.1:\d+)", text).replace("unix//", "unix:/")
        path = found(r"location\s+(?:=\s+)?(\S+) {", text, "/")
        host = found(r"(?:server_name |^)([\w.]+\.example\.com)", text, "hooks.example.com")
        self.server.configure(f"[hookd]\nlisten = {listen}\npath = {path}\npage = /var/www/hookd\n"
                              + SITE, restart=True)
        self.server.run(f"echo 127.0.0.1 {host} >>/etc/hosts")
        self._start(text, block(self.page))
        self.hook = self.server.webhook(address=("127.0.0.1", 443 if self.tls else 80), path=path,
                                        tls=self.tls, host=host, source=VISITOR)
        wait_until("the proxy serves", self._serves)

    def _start(self, text: str, page: str) -> None:
        """Start the proxy with the block, and the block for the page."""
        raise NotImplementedError

    def _serves(self) -> bool:
        try:
            return self.hook.deliver(push("octo/site", "none", sha("0"))).status == 200
        except OSError:
            return False

    def a_push_is_deployed_and_its_sender_logged(self) -> None:
        """The visitor's address, not the proxy's, and not what the visitor claims."""
        accepted(self.hook.deliver(push("octo/site", "main", sha("1")),
                                   X_Forwarded_For="198.51.100.1, 192.0.2.9"))
        self.server.wait_for_state("octo/site", "main", sha("1"))
        line = self.server.wait_for_log(sha("1")[:7], VISITOR)
        expect("192.0.2.9" not in line, line)
        liar = GitHub("wrong", self.hook.address, self.hook.path, self.hook.host, VISITOR, self.tls)
        expect(liar.deliver(push("octo/site", "main", sha("2"))).status == 403, "not refused")
        self.server.wait_for_log("signature", VISITOR)

    def bodies_of_every_kind_arrive(self) -> None:
        """A form and 25 MB; over 25 MB is 413, or cut off while it is sent."""
        payload = push("octo/site", "main", sha("form"))
        accepted(self.hook.deliver(payload, as_form=True))
        self.server.wait_for_state("octo/site", "main", sha("form"))
        payload = push("octo/site", "main", sha("long"))
        payload["filler"] = "x" * (25 * MEGABYTE - len(json.dumps(payload)) - 14)
        accepted(self.hook.deliver(payload))
        self.server.wait_for_state("octo/site", "main", sha("long"))
        payload["filler"] += "x" * 4096
        try:
            answer = self.hook.deliver(payload)
            expect(answer.status == 413, f"over 25 MB: {answer}")
        except OSError:  # cut off while it was sending
            pass

    def restarts_refuse_nothing(self) -> None:
        answers: list[Answer] = []
        stop = threading.Event()

        def pushes() -> None:
            while not stop.is_set():
                answers.append(self.hook.deliver(push("octo/site", "main", sha(f"{len(answers)}"))))

        thread = threading.Thread(target=pushes, daemon=True)
        thread.start()
        for number in range(3):
            self.server.run("systemctl restart hookd")
            wait_until("an answer", lambda after=number: len(answers) > 5 * (after + 1))
        stop.set()
        thread.join(30)
        self.note(f"{len(answers)} pushes, slowest {max(one.seconds for one in answers):.2f} s")
        wrong = [one for one in answers if one.status != 202]
        expect(not wrong, f"{len(wrong)} not 202, first {wrong[:1]}")

    def the_page_is_served_to_who_has_the_password(self) -> None:
        """To nobody else, and never by hookd's own port."""
        self._deployed_page("HEAD")
        for path, words in (("/", "octo/site"), ("/status.json", '"repo"'),
                            ("/metrics.prom", "hookd_up 1"), ("/badge/octo/site/main.svg", "<svg")):
            answer = self._ask(path, "secret")
            expect(answer.status == 200 and words in answer.text, f"{path}: {answer}")
            answer = self._ask(path, "wrong")
            expect(answer.status == 401 or path.startswith("/badge/"), f"{path}: {answer}")
        answer = self.hook.get(self.hook.path)
        expect(answer.status in (404, 405), f"hookd itself: {answer}")

    def _deployed_page(self, word: str) -> None:
        accepted(self.hook.deliver(push("octo/site", "main", sha(word))))
        wait_until("the page has it", lambda: sha(word)[:7] in self._ask("/", "secret").text)

    def _ask(self, path: str, password: str) -> Answer:
        host = found(r"(?:server_name |^)([\w.]+\.example\.com)", block(self.page))
        encoded = base64.b64encode(f"me:{password}".encode()).decode()
        visitor = GitHub("", self.hook.address, host=host, tls=self.tls)
        return visitor.get(path, Authorization=f"Basic {encoded}")


class Nginx(Front):
    """Over a unix socket, a host of its own."""

    name, page = "nginx-unix", "page-nginx"

    def _start(self, text: str, page: str) -> None:
        if "server {" not in text:
            text = f"server {{\n  listen 80;\n  server_name hooks.example.com;\n{text}}}\n"
        self.server.run("rm -f /etc/nginx/sites-enabled/*")
        self.server.write("/etc/nginx/sites-enabled/hookd", text + page)
        secret = found(r"auth_basic_user_file (\S+);", page)
        self.server.run(f'echo "me:$(openssl passwd -apr1 secret)" >{secret}'
                        " && nginx -t && systemctl restart nginx")


class NginxTcp(Front):
    """Over TCP, one path of a site."""

    name, page, _start = "nginx-tcp", "page-nginx", Nginx._start


class Caddy(Front):
    """Debian's Caddy, with certificates of its own."""

    name, page, tls = "caddy", "page-caddy", trusting()

    def _start(self, text: str, page: str) -> None:
        digest = self.server.out("caddy hash-password --plaintext secret")
        self.server.write("/etc/caddy/Caddyfile", "{\n  local_certs\n  skip_install_trust\n}\n"
                          + text + re.sub(r"(me )\S+", lambda m: m[1] + digest, page))
        self.server.run("systemctl start caddy")
