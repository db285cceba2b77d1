"""What stands in front: nginx, Caddy, or nothing but hookd's own TLS."""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator

from github import FORM, JSON, Address, GitHub, open_socket, push, sha
from scene import FailedError, Scene, wait_until
from server import REPOSITORY, VISITOR, Server, accepted, block, expect

SITE = """
[octo/site main]
directory = /srv/site
command = echo "$HOOKD_COMMIT" >commit
"""
CERTIFICATE = ("openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=server.example.com"
               " -addext 'subjectAltName=DNS:server.example.com,DNS:*.example.com'"
               " -out {0} -keyout {1} 2>&1")
SERVED = "/var/lib/hookd/fullchain.pem"
MEGABYTE = 1 << 20


def make_certificates(server: Server, nginx: str) -> None:
    """Make a certificate wherever an nginx configuration names one."""
    pairs = zip(re.findall(r"ssl_certificate\s+(\S+);", nginx),
                re.findall(r"ssl_certificate_key\s+(\S+);", nginx))
    for certificate, key in dict(pairs).items():
        server.run(f"mkdir -p $(dirname {certificate}) $(dirname {key})"
                   f" && {CERTIFICATE.format(certificate, key)}")


def trusting() -> ssl.SSLContext:
    """Return a TLS client that takes any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def site_of(server: Server, nginx: str) -> None:
    """Put a server block where Debian's nginx reads it, and start or reload nginx."""
    if "server {" not in nginx:
        nginx = f"server {{\n  listen 80;\n  server_name hooks.example.com;\n{nginx}}}\n"
    make_certificates(server, nginx)
    server.run("rm -f /etc/nginx/sites-enabled/*")
    server.write("/etc/nginx/sites-enabled/hookd", nginx)
    server.run("nginx -t && systemctl restart nginx")


def webhook_of(server: Server, nginx: str, **settings: object) -> GitHub:
    """Return GitHub's side of what a server block answers: its scheme, name and path."""
    name = re.search(r"server_name\s+(\S+?)[;\s]", nginx)
    location = re.search(r"location\s+(?:=\s+)?(\S+)\s*{", nginx)
    secure = "ssl" in nginx
    return server.webhook(
        address=("127.0.0.1", 443 if secure else 80), tls=trusting() if secure else None,
        host=name.group(1) if name else "hooks.example.com",
        path=location.group(1) if location else "/", source=VISITOR, **settings)


class Nginx(Scene):
    """The README's two snippets, with the real nginx."""

    hook: GitHub

    def setup(self) -> None:
        self.server.run("install -d /srv/site")
        self.server.install(SITE)
        self.server.run("chown hookd: /srv/site")

    def _front(self, name: str, listen: str) -> None:
        """Set hookd and nginx up as one of the snippets has it."""
        nginx = block(name)
        site_of(self.server, nginx)
        self.hook = webhook_of(self.server, nginx)
        self.server.configure(f"[hookd]\nlisten = {listen}\npath = {self.hook.path}\n{SITE}",
                              restart=True)
        wait_until("it answers", lambda: self.hook.deliver(
            push("octo/site", "none", sha("0"))).status == 200)

    def over_a_unix_socket_a_push_is_deployed(self) -> None:
        """From the snippet as it stands."""
        upstream = re.search(r"unix:([\w/.-]+)", block("nginx-unix"))
        expect(upstream, "the snippet names no unix socket")
        self._front("nginx-unix", f"unix:{upstream.group(1) if upstream else ''}")
        self._deployed("unix")

    def over_a_unix_socket_the_client_s_address_is_logged(self) -> None:
        self._real_address()

    def over_a_unix_socket_every_kind_of_body_arrives(self) -> None:
        self._bodies("u")

    def over_a_unix_socket_restarts_refuse_nothing(self) -> None:
        self._restarts("ur")

    def over_tcp_a_push_is_deployed(self) -> None:
        """From the other snippet."""
        upstream = re.search(r"127\.0\.0\.1:\d+", block("nginx-tcp"))
        self._front("nginx-tcp", upstream.group(0) if upstream else "127.0.0.1:9000")
        self._deployed("tcp")

    def over_tcp_the_client_s_address_is_logged(self) -> None:
        self._real_address()

    def over_tcp_every_kind_of_body_arrives(self) -> None:
        self._bodies("t")

    def over_tcp_restarts_refuse_nothing(self) -> None:
        self._restarts("tr")

    def _deployed(self, word: str) -> None:
        """One push, from the last byte to the file."""
        accepted(self.hook.deliver(push("octo/site", "main", sha(word))))
        self.server.wait_for_state("octo/site", "main", sha(word))

    def _real_address(self) -> None:
        """The visitor's, not nginx's, and not what the visitor claims."""
        name = sha(f"address {time.time()}")
        accepted(self.hook.deliver(push("octo/site", "main", name),
                                   X_Forwarded_For="198.51.100.1, 192.0.2.9"))
        line = self.server.wait_for_log(name[:7], VISITOR)
        expect("192.0.2.9" not in line, line)
        self.server.wait_for_state("octo/site", "main", name)
        liar = GitHub("wrong", self.hook.address, self.hook.path, self.hook.host, VISITOR,
                      self.hook.tls)
        expect(liar.deliver(push("octo/site", "main", name)).status == 403, "not refused")
        self.server.wait_for_log("signature", VISITOR)

    def _bodies(self, word: str) -> None:
        """A form, 25 MB, over 25 MB, chunked, and one that takes 12 s (over TCP 2 s) to arrive."""
        for kind, filler in ((FORM, 0), (JSON, 25 * MEGABYTE)):
            payload = push("octo/site", "main", sha(word + kind))
            size = len(json.dumps(payload)) + len(', "filler": ""')
            if filler:
                payload["filler"] = "x" * (filler - size)
            accepted(self.hook.deliver(payload, kind=kind))
            self.server.wait_for_state("octo/site", "main", sha(word + kind))
        payload["filler"] += "x" * 4096
        try:
            answer = self.hook.deliver(payload)
            expect(answer.status == 413, f"over 25 MB: {answer}")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was cut off while it was sending
        for way, wait in (("chunked", 0.0), ("slow", 1.0 if word == "u" else 0.2)):
            self._in_pieces(sha(word + way), way == "chunked", wait)

    def _in_pieces(self, name: str, chunked: bool, wait: float) -> None:
        """Send a push in twelve pieces, so many seconds apart, and see it deployed."""
        body = json.dumps(push("octo/site", "main", name)).encode()
        step = len(body) // 11

        def pieces() -> Iterator[bytes]:
            for start in range(0, len(body), step):
                time.sleep(wait)
                yield body[start:start + step]

        headers = self.hook.headers(body)
        headers.update({"Transfer-Encoding": "chunked"} if chunked
                       else {"Content-Length": str(len(body))})
        accepted(self.hook.send(pieces(), headers, chunked=chunked))
        self.server.wait_for_state("octo/site", "main", name)

    def _restarts(self, word: str) -> None:
        """Pushes through nginx while hookd restarts three times: no 502."""
        failures: list[str] = []
        stop = threading.Event()
        hook = webhook_of(self.server, block("nginx-unix" if word == "ur" else "nginx-tcp"))

        def pushes() -> None:
            while not stop.is_set():
                answer = hook.deliver(push("octo/site", "main", sha(f"{word}{len(hook.answers)}")))
                if answer.status != 202:
                    failures.append(f"{answer.status} {answer.text[:80]}")

        thread = threading.Thread(target=pushes, daemon=True)
        thread.start()
        for _ in range(3):
            self.server.run("systemctl restart hookd")
            time.sleep(0.3)
        stop.set()
        thread.join(30)
        self.note(f"{len(hook.answers)} pushes, slowest"
                  f" {max(answer.seconds for answer in hook.answers):.2f} s")
        expect(not failures, f"{len(failures)} not 202, first {failures[:1]}")


class Caddy(Scene):
    """The README's Caddyfile, with Debian's Caddy and certificates of its own."""

    def setup(self) -> None:
        self.server.run("install -d /srv/site")
        self.server.install(SITE)
        self.server.run("chown hookd: /srv/site")

    def a_push_through_caddy_is_deployed(self) -> None:
        """Over HTTPS, with the visitor's address in the log."""
        caddyfile = block("caddy")
        name = re.search(r"^([\w.-]+)[\s{]", caddyfile, re.MULTILINE)
        path = re.search(r"(?:handle|reverse_proxy|handle_path|route)\s+(/\S*)", caddyfile)
        upstream = re.search(r"unix/+(/[\w/.-]+)|(127\.0\.0\.1|localhost):(\d+)", caddyfile)
        expect(name and upstream, "the snippet names no site or no upstream")
        listen = ""
        if upstream:
            listen = f"unix:{upstream[1]}" if upstream[1] else f"127.0.0.1:{upstream[3]}"
        at = path.group(1) if path else "/"
        self.server.configure(f"[hookd]\nlisten = {listen}\npath = {at}\n{SITE}", restart=True)
        globals_ = "{\n  local_certs\n  skip_install_trust\n}\n"
        self.server.write("/etc/caddy/Caddyfile", globals_ + caddyfile)
        self.server.run("systemctl start caddy")
        hook = self.server.webhook(address=("127.0.0.1", 443), tls=trusting(), path=at,
                                   host=name.group(1) if name else "", source=VISITOR)
        wait_until("Caddy serves HTTPS", lambda: self._answers(hook))
        accepted(hook.deliver(push("octo/site", "main", sha("1")), X_Forwarded_For="192.0.2.9"))
        self.server.wait_for_state("octo/site", "main", sha("1"))
        line = self.server.wait_for_log(sha("1")[:7], VISITOR)
        expect("192.0.2.9" not in line, line)

    def _answers(self, hook: GitHub) -> bool:
        """Tell whether anything is answered over HTTPS."""
        try:
            return hook.deliver(push("octo/site", "none", sha("0"))).status == 200
        except OSError:
            return False


class Tls(Scene):
    """tls_cert and tls_key."""

    hook: GitHub
    address: Address = ("127.0.0.1", 9443)

    def setup(self) -> None:
        self.server.install(SITE)
        self.server.run("install -d -o hookd /srv/site")
        self._renew()
        readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
        ini = "[hookd]\n"
        for line in ("listen = 0.0.0.0:9443", f"tls_cert = {SERVED}",
                     "tls_key = /var/lib/hookd/privkey.pem"):
            expect(line in readme, f"README.md has no {line}")
            ini += line + "\n"
        self.server.configure(ini + SITE, restart=True)
        self.hook = self.server.webhook(address=self.address, tls=self._verifying())

    def _renew(self) -> None:
        """Do what certbot does: a new certificate where only root reads, then the deploy hook."""
        live = "/etc/letsencrypt/live/hooks.example.com"
        make = CERTIFICATE.format(f"{live}/fullchain.pem", f"{live}/privkey.pem")
        self.server.run(f"mkdir -p {live} && chmod 700 /etc/letsencrypt && {make}"
                        f" && install -o hookd -m 600 {live}/*.pem /var/lib/hookd/")

    def _verifying(self) -> ssl.SSLContext:
        """Return a client that trusts the present certificate, and only that."""
        return ssl.create_default_context(cadata=self.server.read(SERVED))

    def _certificate(self) -> bytes:
        """Return the certificate that is served."""
        with trusting().wrap_socket(open_socket(self.address)) as connected:
            return connected.getpeercert(True) or b""

    def a_push_over_https_is_deployed(self) -> None:
        accepted(self.hook.deliver(push("octo/site", "main", sha("1"))))
        self.server.wait_for_state("octo/site", "main", sha("1"))

    def handshakes_that_stall_block_nobody(self) -> None:
        """Forty that say nothing, forty that stop in the middle of their hello."""
        stalled: list[socket.socket] = []
        for number in range(80):
            stalled.append(open_socket(self.address))
            if number % 2:
                stalled[-1].sendall(b"\x16\x03\x01\x02\x00\x01\x00")
        slowest = 0.0
        for number in range(5):
            slowest = max(slowest, accepted(self.hook.deliver(
                push("octo/site", "main", sha(f"stall{number}")))).seconds)
        self.note(f"slowest of 5 beside 80 stalled: {slowest * 1000:.0f} ms")
        expect(slowest < 1, f"{slowest:.1f} s")
        began = time.monotonic()
        for one in stalled:
            one.settimeout(15)
            try:
                while one.recv(1000):
                    pass
            except ConnectionResetError:
                pass
            except OSError as error:
                raise FailedError(f"a stalled handshake is held: {error}") from None
        self.note(f"all dropped after {time.monotonic() - began:.0f} s")

    def a_plain_request_on_the_tls_port_hurts_nobody(self) -> None:
        try:
            GitHub("x", self.address).deliver(push("octo/site", "main", sha("p")))
        except (OSError, ValueError, Exception):  # any ending is good; the next push is the test
            pass
        accepted(self.hook.deliver(push("octo/site", "main", sha("after plain"))))

    def a_renewed_certificate_is_picked_up_by_a_reload(self) -> None:
        """New connections get it, the process is the same."""
        before, pid = self._certificate(), self.server.main_pid()
        self._renew()
        self.server.run("systemctl reload hookd")
        wait_until("another certificate", lambda: self._certificate() != before)
        self.hook.tls = self._verifying()
        accepted(self.hook.deliver(push("octo/site", "main", sha("renewed"))))
        expect(self.server.main_pid() == pid, "another process")

    def a_broken_certificate_fails_the_reload_and_the_old_one_stays(self) -> None:
        before = self._certificate()
        self.server.run(f"cp {SERVED} /tmp/good.pem; echo no >{SERVED}")
        done = self.server.run("systemctl reload hookd", check=False)
        expect(done.returncode != 0, "systemctl reload succeeded")
        expect(self._certificate() == before, "another certificate")
        self.server.run(f"cat /tmp/good.pem >{SERVED} && systemctl reload hookd")

    def tls_1_2_and_1_3_are_served_and_nothing_older(self) -> None:
        """An old client, which would accept any cipher, is refused by its version."""
        old, new = ssl.TLSVersion.TLSv1, ssl.TLSVersion
        for version in (new.TLSv1_2, new.TLSv1_3, new.TLSv1_1, old):
            context = trusting()
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            try:
                with context.wrap_socket(open_socket(self.address)) as connected:
                    spoken = connected.version()
            except (ssl.SSLError, OSError):
                spoken = None
            served = version in (new.TLSv1_2, new.TLSv1_3)
            expect((spoken is not None) == served, f"{version.name}: {spoken}")
