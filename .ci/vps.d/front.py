"""What stands in front: nginx over a unix socket and over TCP, or Caddy."""

import base64
import json
import re
import ssl

from harness import push_of, sha
from machine import expect, wait_until
from server import VISITOR, GitHub, Scene, accepted, block, found
from unit import SITE

CERTIFICATE = ("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=server.example.com"
               " -addext 'subjectAltName=DNS:server.example.com,DNS:*.example.com'"
               " -out {0} -keyout {1} 2>&1")
TRUSTING = ssl.create_default_context()
TRUSTING.check_hostname, TRUSTING.verify_mode = False, ssl.CERT_NONE
HOST = r"(?:server_name |^)([\w.]+\.example\.com)"


class Front(Scene):
    """The README's block for a proxy; _start() starts it with that and the block for the page."""

    name = page = ""
    tls = None

    def setup(self):
        self.install(SITE, "/srv/site /var/www/hookd")
        text = block(self.name)
        listen = found(r"(unix/?/?:?/[\w./-]+|127\.0\.0\.1:\d+)", text).replace("unix//", "unix:/")
        path = found(r"location\s+(?:=\s+)?(\S+) {", text, "/")
        host = found(HOST, text, "hooks.example.com")
        self.configure(f"[hookd]\nlisten = {listen}\npath = {path}\npage = /var/www/hookd\n{SITE}",
                       restart=True)
        self.run(f"echo 127.0.0.1 {host} >>/etc/hosts")
        self._start(text, block(self.page))
        self.hook = self.webhook(address=("127.0.0.1", 443 if self.tls else 80), path=path,
                                 tls=self.tls, host=host, source=VISITOR)
        wait_until("the proxy serves", lambda: self.hook.push(
            "octo/site none", sha("0")).status == 200)

    def a_push_is_deployed_and_its_sender_logged(self):
        """The visitor's address, not the proxy's, and not what the visitor claims."""
        accepted(self.hook.send(push_of(commit=sha("1")),
                                X_Forwarded_For="198.51.100.1, 192.0.2.9"))
        self.wait_for_state("octo/site main", sha("1"))
        line = self.wait_for_log(sha("1")[:7], VISITOR)
        expect("192.0.2.9" not in line, line)

    def a_body_of_25_mb_arrives(self):
        payload = push_of(commit=sha("long"))
        payload["filler"] = "x" * ((25 << 20) - len(json.dumps(payload)) - 14)
        accepted(self.hook.send(payload))
        self.wait_for_state("octo/site main", sha("long"))

    def the_page_is_served_to_who_has_the_password(self):
        """To nobody else, and never by hookd's own port."""
        commit = self.push("octo/site main", "HEAD")
        wait_until("the page has it", lambda: commit[:7] in self._ask("/", "secret").text)
        for path, words in (("/", "octo/site"), ("/status.json", '"repo"'),
                            ("/metrics.prom", "hookd_up 1"), ("/badge/octo/site/main.svg", "<svg")):
            answer = self._ask(path, "secret")
            expect(answer.status == 200 and words in answer.text, f"{path}: {answer}")
            answer = self._ask(path, "wrong")
            expect(answer.status == 401, f"{path}: {answer}")
        answer = self.hook.get(self.hook.path)
        expect(answer.status in (404, 405), f"hookd itself: {answer}")

    def _ask(self, path, password):
        encoded = base64.b64encode(f"me:{password}".encode()).decode()
        visitor = GitHub("", self.hook.address, host=found(HOST, block(self.page)), tls=self.tls)
        return visitor.get(path, Authorization=f"Basic {encoded}")


class Nginx(Front):
    """Over a unix socket, a host of its own."""

    name, page = "nginx-unix", "page-nginx"

    def _start(self, text, page):
        if "server {" not in text:
            text = f"server {{\n  listen 80;\n  server_name hooks.example.com;\n{text}}}\n"
        self.run("rm -f /etc/nginx/sites-enabled/*")
        self.write("/etc/nginx/sites-enabled/hookd", text + page)
        secret = found(r"auth_basic_user_file (\S+);", page)
        self.run(f'echo "me:$(openssl passwd -apr1 secret)" >{secret}'
                 " && nginx -t && systemctl restart nginx")


class NginxTcp(Front):
    """Over TCP, one path of a site."""

    name, page, _start = "nginx-tcp", "page-nginx", Nginx._start


class Caddy(Front):
    """Debian's Caddy, with certificates of its own."""

    name, page, tls = "caddy", "page-caddy", TRUSTING

    def _start(self, text, page):
        digest = self.out("caddy hash-password --plaintext secret")
        self.write("/etc/caddy/Caddyfile", "{\n  local_certs\n  skip_install_trust\n}\n"
                   + text + re.sub(r"(me )\S+", lambda m: m[1] + digest, page))
        self.run("systemctl start caddy")
