#!/usr/bin/env python3
"""hookd: deploy what is pushed to GitHub on your own server, a moment later.

    hookd.py [-c FILE] [serve | check | run | send | status | log | secret]    (--help says more)

The life of a delivery:

 1. GitHub POSTs a push. One loop in the main thread reads it, strictly and with a deadline.
 2. The HMAC of its raw bytes is checked against the secrets; only then is anything parsed.
 3. Judgement, pure functions, finds the hook: the first section of the ini that matches.
 4. The push becomes a row in SQLite, on disk before the sender reads 202.
 5. A waiting run of the same target steps back: the newest push stands for all before it.
 6. When one of the `jobs` and the directory's lock are free, a thread takes the run.
 7. With `git`, the directory becomes the branch's newest commit, whatever the push said.
 8. The command runs under `sh -e` in a session of its own, its output and its time bounded.
 9. How it ended goes into history and log; on_success or on_failure follow.
10. What a crash or a stop cut off runs again at the next start, once.

Exit status: 0 done; 1 failed; 2 wrong usage; 78 the ini or the state needs mending. `run` and
`send --wait` exit as the command did: 124 after a timeout, 128+N after signal N.
"""

from __future__ import annotations

import configparser
import contextlib
import errno
import fcntl
import hashlib
import hmac
import json
import logging
import os
import pwd
import re
import resource
import select
import selectors
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property, partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NamedTuple, Union

if TYPE_CHECKING:
    import argparse
    import ssl

VERSION = "1.0"
NEVER = float("inf")
REQUEST_SECONDS = 10.0  # GitHub hangs up after as long
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
DRAIN_SECONDS = 60.0  # for running commands at a stop; the unit's TimeoutStopSec= is longer
CLOSE_SECONDS = 2.0  # at a stop, for requests that have begun
GIT_SECONDS = 60.0  # for a question to git
QUIET_SECONDS, BURST_SECONDS = 0.05, 1.0  # after a run: a burst is over, or has to wait no more
LOCK_SECONDS = 0.5  # before a lock that somebody has is tried again
BUSY_SECONDS = 1.0  # for a database that another program has locked
NOISE_SECONDS = 60.0  # before what goes wrong over and over is told, or tried, again
LINE_MAX, HEAD_MAX, FIELDS_MAX = 8 * 1024, 16 * 1024, 100  # GitHub's heads have about 1 KB
BODIES_MAX = 32 * 1024**2  # all bodies in flight together
CONNECTIONS_MAX = 4000
SPARE_FILES = 64  # descriptors for all but connections and jobs
CHUNK = 256 * 1024
OUTPUT_HEAD, OUTPUT_TAIL = 1024**2, 256 * 1024  # what is kept of a run's output
VARIABLE_MAX = 64 * 1024
TOLD_LINES = 10  # of a failed run's output, in the log

Body = Union[bytes, bytearray]
log = logging.getLogger("hookd")


# ======================================================================================= errors
# One class for each audience. SystemExit is for who typed a verb; OSError and sqlite3.Error are the
# machine's, ValueError is a parser's. Anything else that is raised is our bug.


class ConfigError(Exception):
    """Tell the administrator every problem at once; `main` prints them and exits 78."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Refusal(Exception):
    """Tell the sender no: an HTTP status and one line with nothing in it that the sender wrote."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


# ======================================================================================= values
# Frozen, complete and valid when built. Secrets never show in a repr.


def short_name(ref: str) -> str:
    return re.sub(r"^refs/(heads|tags)/", "", ref, count=1)


def slug(branch: str) -> str:
    """Spell a branch, or a folder, UTF-8 or not, as a DNS label that no other shares.

    A hash ends it where spelling lost something, or where the name itself ends like a hash.
    """
    label = re.sub(r"[^a-z0-9]", "-", branch.lower()).strip("-")
    if label == branch and len(label) <= 63 and not re.search(r"(^|-)[0-9a-f]{8}$", label):
        return label
    digest = hashlib.sha256(branch.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{label[:54].rstrip('-')}-{digest}".lstrip("-")


def fill(template: str, repo: str, branch: str) -> str:
    """Replace {repo} {owner} {name} {branch} {slug}; all five have been checked before."""
    owner, _, name = repo.partition("/")
    values = {"repo": repo, "owner": owner, "name": name, "branch": branch, "slug": slug(branch)}
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def escape(text: str) -> str:
    """Make strangers' text fit for a log line or a terminal: what is not printable is spelled."""
    spelled = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if text.isprintable() else "".join(spelled)


class Request(NamedTuple):
    """Hold the head of an HTTP request; field names in lower case, values as latin-1 text."""

    method: str
    url: str
    fields: Mapping[str, str]
    length: int
    keep_alive: bool

    @property
    def delivery(self) -> str:
        return escape(self.fields.get("x-github-delivery", "")[:100]) or "-"


class Push(NamedTuple):
    """Hold what one event says of one ref; a deletion and a release have no commit."""

    event: str
    repo: str
    ref: str
    commit: str
    before: str = ""
    pusher: str = ""
    deleted: bool = False
    order: int = 0  # among the pushes of a target; 0 where GitHub tells none

    @property
    def place(self) -> str:
        return escape(f"{self.repo} {short_name(self.ref)}")

    def __str__(self) -> str:
        at = f" at {self.commit[:7]}" if self.commit else " (deleted)" if self.deleted else ""
        return self.place + at


class Target(NamedTuple):
    """Name what a hook resolves to for one ref: the unit of queue and history."""

    hook: str
    repo: str
    ref: str
    directory: str


class Decision(NamedTuple):
    """Hold what judgement made of a signed delivery."""

    status: int  # 202: the push is to be queued; 200 with a hook: to be noted as passed over
    text: str
    hook: Hook | None = None
    push: Push | None = None
    payload: Body = b""


class Run(NamedTuple):
    """Hold a row of the history: what is to be done, where, for whom."""

    id: int
    target: Target
    push: Push
    delivery: str
    state: str
    attempts: int
    pid: int  # of a foreground run
    exit: int | None
    note: str
    last_good: str  # commit of the target's last run that ended ok
    last_state: str  # of the target's last run


class Outcome(NamedTuple):
    """Hold how a run ended: state, exit status and, for a person, why."""

    state: str
    exit: int
    note: str = ""


# ================================================================================ configuration
# Text to values. Each key of the ini but SECRETS is a field of Hook or Config with its default and
# a parser, which raises ValueError("fault; remedy"). A setting is parsed once, where it stands,
# used or not. All problems are collected and told in one go.

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "K": 1024, "M": 1024**2, "G": 1024**3}
BOOLEANS = configparser.RawConfigParser.BOOLEAN_STATES
REPOSITORY = re.compile(r"(?!\.\.?/)[\w.-]{1,100}/(?:(?!\.\.?$)[\w.-]{1,100}|\*)", re.ASCII)
NUMBER = "0*[1-9][0-9]{0,8}"
PORT = "(?:[0-9]{1,4}|[1-5][0-9]{4}|6(?:[0-4][0-9]{3}|5(?:[0-4][0-9]{2}|5(?:[0-2][0-9]|3[0-5]))))"
WORK = "work/{repo}/{slug}"


def quantity(text: str) -> int:
    return 0 if text == "no" else int(text.rstrip("smhdKMG")) * UNITS.get(text[-1], 1)


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def networks(text: str) -> tuple[Any, ...]:
    if not text:
        return ()
    import ipaddress
    try:
        return tuple(ipaddress.ip_network(word) for word in text.split())
    except ValueError as error:
        raise ValueError(f"{error}; write networks like 192.30.252.0/22 2a0a:a440::/29") from None


def variables(text: str) -> tuple[tuple[str, str], ...]:
    pairs = [line.partition("=") for line in lines(text)]
    bad = [repr(name) for name, equals, _ in pairs
           if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)]
    if bad:
        raise ValueError(f"{', '.join(bad)} is no variable; write lines NAME=value")
    return tuple((name, value) for name, _, value in pairs)


def template(known: str, text: str) -> str:
    for word in re.findall(r"\{[^{}]*\}", text):
        if word not in known:
            raise ValueError(f"{word} is not known here; use {known}")
    return text


def matching(pattern: str, convert: Callable[[str], Any], what: str, text: str) -> Any:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text!r} is not {what}")
    return convert(text)


def one_of(*words: str) -> Callable[[str], Any]:
    return partial(matching, "|".join(words), str, f"one of {', '.join(words)}; write one of these")


A_DURATION = "a duration; write it like 90s, 15m, 2h or 1d"
duration = partial(matching, f"{NUMBER}[smhd]", quantity, A_DURATION)
no_or_duration = partial(matching, f"no|{NUMBER}[smhd]", quantity, f"no or {A_DURATION}")
count = partial(matching, NUMBER, int, "a number from 1 up; write it like 2")
size = partial(matching, f"{NUMBER}[KMG]?", quantity, "a size; write it like 64K or 25M")
yes_or_no = partial(matching, f"(?i:{'|'.join(BOOLEANS)})", lambda text: BOOLEANS[text.lower()],
                    "yes or no; write one of these")
address = partial(matching, rf"unix:/.+|(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):{PORT}", str,
                  "an address; write 127.0.0.1:9000, [::1]:9000 or unix:/path")
url_path = partial(matching, r'/[!-"$->@-~]*', str,
                   "a URL path; begin with / and use no space, ? or #")
of_repo = partial(template, "{repo} {owner} {name}")
of_branch = partial(template, "{repo} {owner} {name} {branch} {slug}")


def key(default: str, parse: Callable[[str], Any], secret: bool = False) -> Any:
    return field(default=parse(default), repr=not secret, metadata={"parse": parse})


@dataclass(frozen=True)
class Hook:
    """Hold a section of the ini: repository, branch pattern, what to do. Durations in seconds."""

    section: str
    repo: str
    pattern: str
    secrets: tuple[bytes, ...] = field(repr=False)
    command: str = key("", str)
    directory: str = key("", of_branch)
    git: str = key("", of_repo)
    deploy_key: str = key("", str)
    environment: tuple[tuple[str, str], ...] = key("", variables, secret=True)
    timeout: int = key("15m", duration)
    queue: str = key("newest", one_of("newest", "every", "replace"))
    event: str = key("push", one_of("push", "workflow_run", "release"))
    paths: tuple[str, ...] = key("", lines)
    lock: str = key("", of_branch)
    catch_up: int = key("1h", no_or_duration)  # 0: never
    on_success: str = key("", str)
    on_failure: str = key("", str)
    on_delete: str = key("", str)

    def matches(self, push: Push) -> bool:
        if self.event != push.event:
            return False
        if self.pattern.startswith("refs/"):
            return fnmatchcase(push.ref, self.pattern)
        plain = push.ref.startswith("refs/heads/") or push.event == "release"
        return plain and fnmatchcase(short_name(push.ref), self.pattern)

    def named(self, repo: str) -> str:
        """Spell a repository one way whatever the sender's case: as the ini does, if it does."""
        return repo.lower() if self.repo.endswith("/*") else self.repo

    def target(self, push: Push) -> Target:
        directory = fill(self.directory, push.repo, short_name(push.ref))
        return Target(self.section, push.repo, push.ref, directory)


@dataclass(frozen=True)
class Config:
    """Hold the whole ini, hooks by section; `secrets` speak for repositories that have no hook."""

    name: str  # of the file
    hooks: Mapping[str, Hook]
    secrets: tuple[bytes, ...] = field(repr=False)
    all_secrets: tuple[bytes, ...] = field(repr=False)
    listen: str = key("127.0.0.1:9000", address)
    path: str = key("/", url_path)
    state: str = key("", str)
    jobs: int = key("2", count)
    keep: int = key("50", count)
    max_body: int = key("25M", size)
    log: str = key("auto", one_of("auto", "syslog", "stderr"))
    tls_cert: str = key("", str)
    tls_key: str = key("", str)
    quiet: bool = key("no", yes_or_no)
    allow_from: tuple[Any, ...] = key("", networks)

    @cached_property
    def by_repo(self) -> Mapping[str, Mapping[int, Hook]]:
        found: dict[str, dict[int, Hook]] = {}
        for index, hook in enumerate(self.hooks.values()):
            found.setdefault(hook.repo.lower(), {})[index] = hook
        return found

    def hooks_for(self, repo: str) -> list[Hook]:
        """Return a repository's hooks and its owner's, in the order of the ini."""
        own, owners = repo.lower(), repo.lower().split("/")[0] + "/*"
        found = {**self.by_repo.get(own, {}), **self.by_repo.get(owners, {})}
        return [found[index] for index in sorted(found)]


DAEMON_KEYS = {one.name: one for one in fields(Config) if one.metadata}
HOOK_KEYS = {one.name: one for one in fields(Hook) if one.metadata}
KEYS = DAEMON_KEYS | HOOK_KEYS
SECRETS = ("secret", "secret_file")
FILES = ("state", "tls_cert", "tls_key", "deploy_key", "directory")


def ini_parser(strict: bool) -> configparser.RawConfigParser:
    # No section is the default one: it has a name that no ini can spell.
    parser = configparser.RawConfigParser(strict=strict, default_section="\n")
    parser.SECTCRE = re.compile(r"\[(?P<header>.+)\]")  # as from 3.11 on: [octo/site v[0-9]]
    return parser


class Ini:
    """Read an ini's text into a Config; callers call `config`, once.

    Relative names are under `base`; `read_secret(path, is_default)` returns the text of a secret
    file or raises OSError.
    """

    def __init__(self, name: str, base: str, read_secret: Callable[[str, bool], str]) -> None:
        self.name, self.base, self.read_secret = name, base, read_secret
        self.problems: list[str] = []
        self.found: dict[str, tuple[bytes, ...]] = {}  # secrets by the level that sets them
        self.ini = ini_parser(strict=False)

    def problem(self, section: str, key: str, fault: str) -> None:
        self.problems.append(escape(f"{self.name}: [{section}] {key}".rstrip() + f": {fault}"))

    def parse(self, text: str) -> None:
        """Let configparser read: leniently, and strictly once more to find a duplicate."""
        try:
            self.ini.read_string(text)
            ini_parser(strict=True).read_string(text)
        except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
            fault = f"is there twice (line {error.lineno}); keep one"
            self.problem(error.section, getattr(error, "option", ""), fault)
        except configparser.MissingSectionHeaderError as error:
            fault = "stands before the first [section]; begin with [hookd]"
            raise ConfigError(f"{self.name}: line {error.lineno} {fault}") from None
        except configparser.ParsingError as error:  # its own words would show a secret's line
            fault = "is no [section] and no `key = value`; indent it if it continues the one above"
            told = (f"{self.name}: line {number} {fault}" for number, _ in error.errors)
            raise ConfigError(*told) from None

    def value(self, section: str, key: str, text: str) -> Any:
        """Return what a setting says, where it stands; raise ValueError."""
        if key not in KEYS:
            import difflib
            known = [*(KEYS if section == "hookd" else HOOK_KEYS), *SECRETS]
            near = difflib.get_close_matches(key, known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "hookd.ini lists all there are"
            raise ValueError(f"unknown setting; {remedy}")
        if key in DAEMON_KEYS and section != "hookd":
            raise ValueError("is for the whole daemon; move it to [hookd]")
        if "\0" in text:
            raise ValueError("has a NUL in it; take it out")
        if key in FILES and text.startswith("~"):
            raise ValueError("begins with ~, which stays as it is; write the whole path")
        value = KEYS[key].metadata["parse"](text) if text else KEYS[key].default
        return os.path.join(self.base, text) if key in FILES and text else value

    def read(self, section: str, used: set[str]) -> dict[str, Any]:
        """Return what a section sets; tell what is wrong with its name and its keys."""
        words, values = section.split(), {}
        if section != "hookd":
            if len(words) not in (1, 2) or not REPOSITORY.fullmatch(words[0]):
                self.problem(section, "", "is no hook; write [hookd] or [owner/repo branch]")
            elif words[0].lower() not in used:
                self.problem(section, "", f"is used by no hook; add one like [{section} main]")
            elif len(words) == 1 and self.shared[words[0].lower()] != section:
                self.problem(section, "", "is there twice, in another case; keep one")
        for key, text in self.ini[section].items():
            try:
                if key not in SECRETS:
                    values[key] = self.value(section, key, text)
            except ValueError as error:
                self.problem(section, key, str(error))
                if key in HOOK_KEYS:
                    values[key] = text  # set, if only to be mended
        return values

    def secrets(self, levels: Sequence[str]) -> tuple[bytes, ...]:
        """Return the secrets of the nearest level that sets any, else the default file's."""
        sets = (name for name in levels for key in SECRETS if self.ini.has_option(name, key))
        level, default = next(sets, "hookd"), f"{self.state}/secret"
        if level in self.found:
            return self.found[level]
        given = self.ini.get(level, "secret", fallback=None)
        name = self.ini.get(level, "secret_file", fallback=default if given is None else "")
        found = list(lines(given or ""))
        try:
            text = self.read_secret(name, os.path.join(self.base, name) == default) if name else ""
            found += [line.rstrip("\r") for line in text.split("\n") if line.strip()]
            if not found:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            fault = f"cannot be used ({error}); put one secret on a line, where hookd may read it"
            self.problem(level, "secret_file" if name else "secret", fault)
        self.found[level] = tuple(line.encode() for line in found)
        return self.found[level]

    def hook(self, section: str, repo: str, pattern: str) -> Hook:
        """Return a section's Hook; settings come from it, from its repository's, from [hookd]."""
        levels = [section, self.shared.get(repo.lower(), section), "hookd"]
        values = ChainMap(*(self.values.get(level, {}) for level in levels))
        settings = {key: values[key] for key in values if key in HOOK_KEYS}
        settings["directory"] = settings.get("directory") or f"{self.state}/{WORK}"
        hook = Hook(section, repo, pattern, self.secrets(levels), **settings)
        if not hook.command and not hook.git:
            self.problem(section, "command", "is missing; set command, or git, or both")
        if hook.deploy_key and not hook.git:
            self.problem(section, "deploy_key", "is used by git alone; set git to the URL")
        return hook

    def config(self, text: str, state: str) -> Config:
        """Return the Config of a text; `state` is the default. Raise ConfigError."""
        self.parse(text)
        words = {name: name.split() for name in self.ini.sections()}
        used = {two[0].lower() for two in words.values() if len(two) == 2}
        self.shared = {name.strip().lower(): name for name in words}
        self.values = {name: self.read(name, used) for name in words}
        common = self.values.get("hookd", {})
        daemon = {key: common[key] for key in common if key in DAEMON_KEYS}
        daemon["state"] = self.state = daemon.get("state") or state
        if bool(daemon.get("tls_cert")) != bool(daemon.get("tls_key")):
            self.problem("hookd", "tls_cert", "goes with tls_key; set both or neither")
        hooks = {name: self.hook(name, *two) for name, two in words.items() if len(two) == 2}
        if not hooks or any(self.ini.has_option("hookd", name) for name in SECRETS):
            self.secrets(["hookd"])
        if self.problems:
            raise ConfigError(*self.problems)
        every = tuple(dict.fromkeys(one for level in self.found.values() for one in level))
        return Config(self.name, hooks, self.found.get("hookd", ()), every, **daemon)


# ==================================================================================== judgement
# Bytes and values in, a value or a Refusal out. Nothing here opens a file, a socket or a clock.
# What GitHub sends: https://docs.github.com/webhooks/webhook-events-and-payloads, and how it signs:
# https://docs.github.com/webhooks/using-webhooks/validating-webhook-deliveries

REQUEST_LINE = re.compile(rb"[A-Za-z][!#$%&'*+.^_`|~0-9A-Za-z-]* [!-~]+ HTTP/1\.[01]\r")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t -~\x80-\xff]*)")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT")
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
SIGNATURE = re.compile(r"sha256=([0-9a-f]{64})")
# What is read must not come twice: which of the two did the proxy in front of us believe?
SINGLE = ("host", "content-length", "transfer-encoding", "content-type", "content-encoding",
          "x-hub-signature-256", "x-github-event", "x-github-delivery")
COMMIT = re.compile("[0-9a-f]{40}(?:[0-9a-f]{24})?")
# git-check-ref-format(1). No part begins with a dot: refs name folders.
REF = re.compile(
    r"(?=.{1,1024}$)refs/(?:heads|tags)(?!.*(?://|\.\.|@\{|\.lock(?:/|$)|[/.]$))"
    r"(?:/[^\x00-\x20\x7f~^:?*\[\\/.\ud800-\udfff][^\x00-\x20\x7f~^:?*\[\\/\ud800-\udfff]*)+")


def refuse(*faults: tuple[Any, int, str]) -> None:
    """Raise the Refusal, status and reason, of the first fault that is one."""
    for fault, status, reason in faults:
        if fault:
            raise Refusal(status, reason)


def check_start(start: bytes) -> None:
    """Refuse a head, whole or not, once it can only end badly."""
    line, newline, _ = start.partition(b"\n")
    good = REQUEST_LINE.fullmatch(line) if newline else start[:1].isalpha()
    refuse((len(line) > LINE_MAX, 414, "request line too long"),
           (len(start) > HEAD_MAX, 431, "request head too large"),
           (not good, 400, "not HTTP/1.1 (TLS on a plain port?)"))


def body_length(method: str, fields: Mapping[str, str]) -> int:
    """Return how many bytes follow a head; what could be framed in two ways is refused."""
    coding, length = fields.get("transfer-encoding", ""), fields.get("content-length", "0")
    coded, sized = "transfer-encoding" in fields, "content-length" in fields
    refuse((coded and sized, 400, "both Content-Length and Transfer-Encoding"),
           (coded and coding.lower() != "chunked", 501, "Content-Length needed"),
           (coded or (method == "POST" and not sized), 411, "Content-Length needed"),
           (not re.fullmatch("[0-9]+", length), 400, "Content-Length is no number"))
    return int(length) if len(length) < 16 else 10**16  # int() would refuse thousands of digits


def read_head(head: bytes) -> Request:
    """Read a head up to its empty line, strictly (RFC 9112): one form, no repair."""
    check_start(head + b"\r\n")
    first, *rest = head.split(b"\r\n")
    if len(rest) > FIELDS_MAX:
        raise Refusal(431, "too many header fields")
    fields: dict[str, str] = {}
    for text in rest:
        match = FIELD.fullmatch(text)
        if not match:
            raise Refusal(400, "malformed header field")
        name = match[1].decode().lower()
        if name in fields and name in SINGLE:
            raise Refusal(400, f"{name} given twice")
        fields[name] = match[2].decode("latin-1").rstrip(" \t")
    method, url, version = first.decode().split(" ")
    connection = fields.get("connection", "").lower()
    keep_alive = "close" not in connection if version == "HTTP/1.1" else connection == "keep-alive"
    return Request(method, url, fields, body_length(method, fields), keep_alive)


def allowed(config: Config, client: str) -> bool:
    import ipaddress
    with contextlib.suppress(ValueError):
        host = ipaddress.ip_address(client.partition("%")[0])
        return any(host in network for network in config.allow_from)
    return False


def check_head(config: Config, request: Request, client: str) -> None:
    """Refuse what its head alone condemns, before the body is read; the first fault is told."""
    fields, signature = request.fields, request.fields.get("x-hub-signature-256", "")
    path = re.sub(r"^https?://[^/?#]*", "", request.url).partition("?")[0]
    coding = fields.get("content-encoding", "identity").lower()
    kind = fields.get("content-type", "").partition(";")[0].strip().lower()
    stranger = config.allow_from and client and not allowed(config, client)
    refuse((stranger, 403, "not allowed from this address"),
           (path != config.path, 404, "not found"),
           (request.method not in METHODS, 501, "unknown method"),
           (request.method != "POST", 405, "only POST"),
           (request.length > config.max_body, 413, "body too large"),
           (coding != "identity", 415, "Content-Encoding not supported"),
           (kind not in ("", JSON, FORM), 415, f"Content-Type must be {JSON} or {FORM}"),
           (not signature, 403, "signature missing"),
           (not SIGNATURE.fullmatch(signature), 403, "signature does not match"),
           (not kind, 415, "Content-Type missing"))


def authenticate(secrets: Iterable[bytes], signature: str, body: Body) -> bytes:
    """Return the secret that signed the raw body; refuse where none did."""
    given = SIGNATURE.fullmatch(signature)
    digest = bytes.fromhex(given[1]) if given else b""
    for secret in secrets:
        if secret and hmac.compare_digest(hmac.digest(secret, body, "sha256"), digest):
            return secret
    raise Refusal(403, "signature does not match")


def read_payload(body: Body, form: bool) -> tuple[Body, dict[str, Any]]:
    """Return the JSON in a body and its object; depth, huge numbers and NaN are refused."""
    try:
        text = body.decode("ascii" if form else "utf-8")
        if form:
            from urllib.parse import parse_qs
            (text,) = parse_qs(text, strict_parsing=True, errors="strict")["payload"]
            body = text.encode()
        data = json.loads(text, parse_constant=int)  # which NaN and Infinity are not
    except (ValueError, KeyError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Refusal(400, "the payload is no JSON object that hookd can read")
    return body, data


def pick(data: Any, *names: str) -> Any:
    """Follow names into nested objects; None where one is missing or no object."""
    for name in names:
        data = data.get(name) if isinstance(data, dict) else None
    return data


def text_of(data: Any, *names: str) -> str:
    """Return a string field that a database and a log can hold; empty where it is none."""
    value = pick(data, *names)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def order_of(data: Any, *names: str) -> int:
    """Return a number that orders pushes and that a database can hold; 0 where it is none."""
    value = pick(data, *names)
    return value if type(value) is int and 0 < value < 2**62 else 0


def needed(pattern: re.Pattern[str], text: str, name: str) -> str:
    """Return a field that has its form; `*` is for the ini alone."""
    if not pattern.fullmatch(text) or "*" in text:
        raise Refusal(400, f"signed, but hookd cannot read its {name}")
    return text


def read_push(data: Any, repo: str) -> Push:
    ref = needed(REF, text_of(data, "ref"), "ref")
    commit = needed(COMMIT, text_of(data, "after"), "commit")
    deleted = pick(data, "deleted") is True or not commit.strip("0")
    pusher = text_of(data, "pusher", "name") or text_of(data, "sender", "login")
    return Push("push", repo, ref, "" if deleted else commit, text_of(data, "before"), pusher,
                deleted, order_of(data, "repository", "pushed_at"))


def read_workflow_run(data: Any, repo: str) -> Push | None:
    """Take a workflow that succeeded for a push to this very repository, never a fork's."""
    run = pick(data, "workflow_run")
    good = (pick(data, "action"), pick(run, "conclusion"), pick(run, "event"))
    home = text_of(run, "head_repository", "full_name").lower()
    if good != ("completed", "success", "push") or home != repo.lower():
        return None
    ref = needed(REF, f"refs/heads/{text_of(run, 'head_branch')}", "branch")
    commit = needed(COMMIT, text_of(run, "head_sha"), "commit")
    # The id grows with each new run: the slow check of an old push comes late.
    return Push("workflow_run", repo, ref, commit, pusher=text_of(run, "actor", "login"),
                order=order_of(run, "id"))


def read_release(data: Any, repo: str) -> Push | None:
    """Take a published release; it names a tag and no commit."""
    if pick(data, "action") != "published":
        return None
    ref = needed(REF, f"refs/tags/{text_of(data, 'release', 'tag_name')}", "tag")
    return Push("release", repo, ref, "", pusher=text_of(data, "release", "author", "login"))


EVENTS = {"push": read_push, "workflow_run": read_workflow_run, "release": read_release}


def pong(config: Config, repo: str, secret: bytes) -> str:
    """Answer a ping with the hooks that this secret speaks for."""
    hooks = config.hooks_for(repo) if repo else config.hooks.values()
    mine = [hook for hook in hooks if secret in hook.secrets]
    names = ", ".join(hook.pattern if repo else hook.section for hook in mine[:20])
    who = f"pong: {repo} has" if repo else "pong:"
    return f"{who} hooks for {names}" if mine else f"{who} no hook"


def touches(patterns: Sequence[str], data: Any) -> bool:
    """Tell whether a push touches one of the patterns; where it cannot be known, it does."""
    commits = pick(data, "commits")
    whole = isinstance(commits, list) and 0 < len(commits) < 2048
    if not whole or pick(data, "created") is True or pick(data, "forced") is True:
        return True
    found = [pick(commit, key) for commit in commits for key in ("added", "modified", "removed")]
    if not all(isinstance(paths, list) for paths in found):
        return True
    paths = {path for paths in found for path in paths if isinstance(path, str)}
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def decide(config: Config, request: Request, body: Body, secret: bytes) -> Decision:
    """Judge a delivery signed with `secret`: what to answer, or for which hook to queue what."""
    fields = request.fields
    payload, data = read_payload(body, fields["content-type"].lower().startswith(FORM))
    event, repo = fields.get("x-github-event", ""), ""
    if not event:
        raise Refusal(400, "X-GitHub-Event missing")
    if pick(data, "repository") is not None:  # an organisation's ping has none
        repo = needed(REPOSITORY, text_of(data, "repository", "full_name"), "repository")
    hooks = config.hooks_for(repo)
    own = any(secret in hook.secrets for hook in hooks) if hooks else secret in config.secrets
    if repo and not own:
        raise Refusal(403, "the secret is another repository's")
    if event == "ping":
        return Decision(200, pong(config, repo, secret))
    push = EVENTS[event](data, needed(REPOSITORY, repo, "repository")) if event in EVENTS else None
    if push is None:
        return Decision(200, f"ignored: nothing to do for this {escape(event[:40])} event")
    hook = next((hook for hook in hooks if hook.matches(push)), None)
    if hook is None:
        return Decision(200, f"ignored: no hook for {push.place}")
    if secret not in hook.secrets:
        raise Refusal(403, "the secret is another repository's")
    push = push._replace(repo=hook.named(repo))
    if push.deleted and not hook.on_delete:
        return Decision(200, f"ignored: {push.place} was deleted")
    if hook.paths and not push.deleted and not touches(hook.paths, data):
        return Decision(200, f"ignored: {push} changed none of its paths", hook, push)
    return Decision(202, "", hook, push, payload)


def push_json(push: Push) -> bytes:
    """Write the payload of a push that GitHub did not send, in the shape of GitHub's."""
    name, zeros = short_name(push.ref), "0" * 40
    repo = {"full_name": push.repo, "name": push.repo.rpartition("/")[2]}
    run = {"conclusion": "success", "event": "push", "head_branch": name,
           "head_sha": push.commit, "head_repository": repo}
    shapes: dict[str, dict[str, Any]] = {
        "push": {"ref": push.ref, "before": zeros, "after": push.commit or zeros, "commits": [],
                 "deleted": push.deleted},
        "workflow_run": {"action": "completed", "workflow_run": run},
        "release": {"action": "published", "release": {"tag_name": name}}}
    data = {"repository": repo, "pusher": {"name": push.pusher}, **shapes.get(push.event, {})}
    return json.dumps(data).encode()


# ======================================================================================== store
# SQLite holds the queue and the history; no other part writes SQL that changes them.
#
# A push is a row, written in one transaction with what it supersedes, and that transaction is on
# disk (WAL, synchronous=FULL) before the sender hears 202. The payload stays in the row until the
# run has ended. A row only moves forward:
#
#     queued -> running -> ok | failed | timeout | cancelled
#       |          `-----> interrupted -> queued again at the next start, once
#       `----------------> superseded | cancelled
#
# The database may refuse at any moment (disk full, locked, read-only). What was begun then rolls
# back, and nothing is cached that could be wrong.

SCHEMA_VERSION = 1
SCHEMA = f"""BEGIN;
CREATE TABLE IF NOT EXISTS targets (
    id INTEGER PRIMARY KEY, hook TEXT, repo TEXT, ref TEXT, directory TEXT,
    newest TEXT DEFAULT '',       -- the newest commit considered, for catch-up
    pushed_at INTEGER DEFAULT 0,  -- order of the newest push taken
    last_run INTEGER, last_state TEXT DEFAULT '', last_good TEXT DEFAULT '',
    UNIQUE (repo, ref, hook, directory));
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, target INTEGER, state TEXT, event TEXT, delivery TEXT,
    commit_id TEXT, before_id TEXT, pusher TEXT, deleted INTEGER, attempts INTEGER DEFAULT 0,
    pid INTEGER DEFAULT 0,        -- of a foreground run
    exit INTEGER, note TEXT DEFAULT '', queued REAL, began REAL, ended REAL, duration REAL,
    payload BLOB);
CREATE INDEX IF NOT EXISTS runs_of_target ON runs (target, id, state);
CREATE INDEX IF NOT EXISTS runs_of_delivery ON runs (delivery);
CREATE INDEX IF NOT EXISTS runs_waiting ON runs (target) WHERE state = 'queued';
CREATE INDEX IF NOT EXISTS runs_open ON runs (target) WHERE state IN ('queued', 'running');
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;"""
# In the order of the fields of Run, Target and Push: see Store.runs.
RUNS = """SELECT r.id, t.hook, t.repo, t.ref, t.directory, r.event, t.repo, t.ref, r.commit_id,
    r.before_id, r.pusher, r.deleted, r.delivery, r.state, r.attempts, r.pid, r.exit, r.note,
    t.last_good, t.last_state FROM runs r JOIN targets t ON t.id = r.target """
STATUS = """SELECT repo, ref, hook, directory, r.id AS run, nullif(last_state, '') AS state, event,
    commit_id AS "commit", began, ended, duration, exit, nullif(last_good, '') AS last_good,
    deleted, (SELECT max(id) FROM runs WHERE target = t.id AND state = 'running') AS running,
    (SELECT group_concat(id) FROM runs WHERE target = t.id AND state = 'queued') AS waiting
    FROM targets t LEFT JOIN runs r ON r.id = t.last_run ORDER BY repo, ref"""


def killed(pid: int) -> bool:
    """Tell whether a foreground run is over although the history has it as running."""
    return pid > 0 and not os.path.exists(f"/proc/{pid}")


class Store:
    """Keep queue and history in one SQLite file; raise sqlite3.Error, OSError or ConfigError.

    One thread uses it. What writes stands inside `with transaction()`.
    """

    def __init__(self, state: str) -> None:
        self.state, self.path = state, os.path.join(state, "hookd.db")
        self.db: sqlite3.Connection | None = None

    def connect(self) -> sqlite3.Connection:
        """Return the connection, opened and its tables made if need be."""
        if self.db:
            return self.db
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        remedy = "move it away, hookd makes a new one"
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                remedy = "use that one"
                raise sqlite3.DatabaseError(f"is of a newer hookd (user_version {version})")
            if version < SCHEMA_VERSION:
                db.executescript(SCHEMA)
                # After a database that was moved away, no run gets the number of another.
                walk = os.walk(f"{self.state}/runs")
                last = max((int(n) for _, dirs, _ in walk for n in dirs if n.isdigit()), default=0)
                db.execute("INSERT INTO sqlite_sequence VALUES ('runs', ?)", (last,))
        except sqlite3.DatabaseError as error:
            db.close()
            if isinstance(error, sqlite3.OperationalError):
                raise
            raise ConfigError(f"{self.path}: {error}; {remedy}") from None
        self.db, self.stat = db, os.stat(self.path)
        return db

    def close(self) -> None:
        if self.db:
            self.db.close()
        self.db = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all that is written inside stand on disk together, or not at all."""
        if self.db and not (os.path.exists(self.path)
                            and os.path.samestat(os.stat(self.path), self.stat)):
            self.close()  # what is written has to stand under the name
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connect().commit()
        finally:
            if self.db and self.db.in_transaction:
                self.close()  # rolls back; a disk that came back gets a fresh start

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self.connect().execute(sql, values)

    def runs(self, where: str, *values: Any) -> list[Run]:
        """Return runs; `where` is SQL of ours, r for runs and t for targets."""
        rows = self.execute(RUNS + where, *values)
        return [Run(row[0], Target(*row[1:5]), Push(*row[5:12]), *row[12:]) for row in rows]

    def target_id(self, target: Target) -> int:
        sql = "SELECT id FROM targets WHERE hook = ? AND repo = ? AND ref = ? AND directory = ?"
        new = "INSERT INTO targets (hook, repo, ref, directory) VALUES (?, ?, ?, ?)"
        found = self.execute(sql, *target).fetchone()
        return int(found[0] if found else self.execute(new, *target).lastrowid or 0)

    def newest(self, target_id: int) -> str:
        """Return the newest commit considered for a target."""
        sql = "SELECT newest FROM targets WHERE id = ?"
        return str(self.execute(sql, target_id).fetchone()[0])

    def add(self, target_id: int, push: Push, delivery: str, payload: Body) -> int:
        """Queue a push of the target with this id; return its run's number."""
        self.consider(target_id, push)
        sql = """INSERT INTO runs (state, target, event, delivery, commit_id, before_id, pusher,
            deleted, queued, payload) VALUES ('queued', ?, ?, ?, ?, ?, ?, ?, ?, ?)"""
        row = (target_id, push.event, delivery, push.commit, push.before, push.pusher, push.deleted)
        return int(self.execute(sql, *row, time.time(), payload).lastrowid or 0)

    def consider(self, target_id: int, push: Push) -> None:
        """Note a push that is taken, or passed over for good: catch-up need not find it."""
        sql = "UPDATE targets SET newest = ?, pushed_at = max(pushed_at, ?) WHERE id = ?"
        self.execute(sql, push.commit, push.order, target_id)

    def supersede(self, target_id: int) -> list[int]:
        """Let the newest waiting run of a target stand for the others; return their numbers."""
        sql = """SELECT id FROM runs INDEXED BY runs_waiting
            WHERE target = ? AND state = 'queued' ORDER BY id"""
        waiting = [run for (run,) in self.execute(sql, target_id)]
        for old in waiting[:-1]:
            self.dismiss(old, "superseded", f"by run {waiting[-1]}")
        return waiting[:-1]

    def dismiss(self, run: int, state: str, note: str) -> None:
        """End a run that never began."""
        sql = "UPDATE runs SET state = ?, note = ?, ended = ?, payload = NULL WHERE id = ?"
        self.execute(sql, state, note, time.time(), run)

    def is_late(self, target_id: int, push: Push, delivery: str) -> bool:
        """Tell whether a newer push of the target was taken already.

        Where nothing orders them, a delivery that comes again is late behind another commit.
        """
        sql = "SELECT pushed_at FROM targets WHERE id = ?"
        (order,) = self.execute(sql, target_id).fetchone()
        if push.order and push.order != order:
            return bool(push.order < order)
        if push.commit == self.newest(target_id) or delivery == "-":
            return False
        sql = "SELECT 1 FROM runs WHERE delivery = ? AND target = ? AND commit_id = ?"
        return bool(self.execute(sql, delivery, target_id, push.commit).fetchone())

    def is_news(self, target_id: int, commit: str) -> bool:
        """Tell whether a branch's newest commit was never considered, and no run is open."""
        sql = """SELECT pid FROM runs INDEXED BY runs_open
            WHERE target = ? AND state IN ('queued', 'running')"""
        pids = [pid for (pid,) in self.execute(sql, target_id)]
        return commit != self.newest(target_id) and all(map(killed, pids))

    def repositories(self, hook: Hook) -> list[str]:
        """Return a hook's repositories: its own, or of its owner's those that pushed before."""
        if not hook.repo.endswith("/*"):
            return [hook.repo]
        sql = "SELECT DISTINCT repo FROM targets WHERE hook = ?"
        return [repo for (repo,) in self.execute(sql, hook.section)]

    def waiting(self) -> list[Run]:
        """Return the oldest waiting run of each target, oldest first."""
        # Left to itself, SQLite reads the whole history here.
        return self.runs("""WHERE r.id IN (SELECT min(id) FROM runs INDEXED BY runs_waiting
            WHERE state = 'queued' GROUP BY target) ORDER BY r.id""")

    def begin(self, run: int, pid: int = 0) -> bytes:
        """Mark a run as running and return its payload; a foreground run has a pid."""
        sql = """UPDATE runs SET state = 'running', attempts = attempts + 1, began = ?, pid = ?,
            exit = NULL, note = '', ended = NULL, duration = NULL WHERE id = ?"""
        self.execute(sql, time.time(), pid, run)
        return bytes(self.execute("SELECT payload FROM runs WHERE id = ?", run).fetchone()[0])

    def finish(self, run: int, outcome: Outcome, commit: str, duration: float) -> None:
        """Record how a run ended."""
        # What was considered while it ran stays the newest.
        sql = """UPDATE targets SET last_run = ?, last_state = ?, newest = CASE newest
            WHEN (SELECT commit_id FROM runs WHERE id = ?) THEN ? ELSE newest END,
            last_good = CASE WHEN ? THEN ? ELSE last_good END
            WHERE id = (SELECT target FROM runs WHERE id = ?)"""
        good = outcome.state == "ok" and commit != ""
        self.execute(sql, run, outcome.state, run, commit, good, commit, run)
        sql = """UPDATE runs SET state = ?, exit = ?, note = ?, commit_id = ?, ended = ?,
            duration = ?, payload = CASE ? WHEN 'interrupted' THEN payload END WHERE id = ?"""
        self.execute(sql, *outcome, commit, time.time(), duration, outcome.state, run)

    def prune(self, target_id: int, keep: int) -> list[int]:
        """Forget all but the newest finished runs of a target, and as many superseded ones."""
        gone: list[tuple[int]] = []
        for kind in ("= 'superseded'", "NOT IN ('superseded', 'queued', 'running')"):
            gone += self.execute(f"""SELECT id FROM runs WHERE target = ? AND state {kind}
                ORDER BY id DESC LIMIT -1 OFFSET ?""", target_id, keep)
        self.connect().executemany("DELETE FROM runs WHERE id = ?", gone)
        return [run for (run,) in gone]

    def cut_off(self, by_hand: bool) -> list[Run]:
        """Return the runs that a stop or a crash cut off: foreground runs, or all there are."""
        where = """WHERE r.id IN (SELECT id FROM runs INDEXED BY runs_open
            WHERE state IN ('queued', 'running') AND pid > 0)"""
        every = "WHERE state = 'running' OR state = 'interrupted' AND attempts = 1 AND pid = 0"
        return [run for run in self.runs(where if by_hand else every)
                if not run.pid or killed(run.pid)]

    def requeue(self, run: Run) -> str:
        """Queue again a run that was cut off, once; else return why not."""
        note = "begun by hand" if run.pid else "cut off twice" if run.attempts > 1 else ""
        if run.state == "running" or note:
            self.finish(run.id, Outcome("interrupted", 1, note), run.push.commit, 0.0)
        if not note:
            self.execute("UPDATE runs SET state = 'queued' WHERE id = ?", run.id)
        return note


# ========================================================================================= work
# Locks, git and children. Nothing here knows of HTTP.
#
# A run works under a flock(2) for its directory (and one for its `lock`). Its children inherit
# the descriptor: when hookd is killed, the lock is held for as long as anything of the run lives,
# so nobody starts beside it. When a run ends as it should, LOCK_UN frees the lock for all holders
# at once. Lock files are never removed: between one process's open and another's unlink, each
# could hold "the" lock.
#
# Every child leads a session, and so a process group, of its own; TERM and KILL go to the group.
# What left the group (setsid, a service manager) is meant to outlive the run. After a crash the
# survivors are known by HOOKD_PAYLOAD in their environment, a path that only their run has: a
# pid on disk could be another process's by now.
#
# Output goes through a pipe that is always read: no child blocks on it, and none fills the disk.
# The end of the leader ends the run, whoever still holds the pipe.

PRIVATE = re.compile(
    rb"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|.*_DIRECTORY|INVOCATION_ID|JOURNAL_STREAM|HOOKD_.*")
DAEMON_LOCK = "hookd\n"  # no `lock` of an ini ends in a newline
ADVICE = {
    "dubious ownership": "the directory is another user's; chown -R it to the user hookd runs as",
    "bad permissions": "ssh refuses a deploy_key that others can read; chmod 600 it",
    "Host key verification failed": "the remote's host key changed; compare, mend known_hosts",
    "Permission denied (publickey": "the remote does not know this key; add its .pub there",
    "could not read Username": "the remote wants a login; use an ssh URL and a deploy_key",
    "Authentication failed": "the remote refused the login; use an ssh URL and a deploy_key",
    "not appear to be a git repository": "there is no repository at that URL; check git",
    "epository not found": "no such repository for this key; check git and deploy_key",
    "couldn't find remote ref": "the remote has no such branch; was it deleted?",
    "Could not resolve host": "the remote's name is not known; check git and the network",
    "directory: 'git'": "no git in PATH; install git, or set PATH in environment",
    "No space left": "the disk is full; make room",
}


def run_file(state: str, run: int, name: str = "") -> str:
    return os.path.join(state, "runs", str(run), name)


def forget(state: str, run: int) -> None:
    """Remove a run's files."""
    with contextlib.suppress(OSError):
        for name in os.listdir(run_file(state, run)):
            os.unlink(run_file(state, run, name))
        os.rmdir(run_file(state, run))


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def lock_file(state: str, name: str) -> str:
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return os.path.join(state, "locks", f"{slug(os.path.basename(name))}-{digest}.lock")


def lock_names(hook: Hook, target: Target) -> list[str]:
    """Return what a run must have for itself: its directory, and `lock` where that is set."""
    directory = os.path.realpath(target.directory)
    lock = fill(hook.lock, target.repo, short_name(target.ref)) or directory
    # By both names, because a command may switch a link; the same twice would wait for itself.
    return list(dict.fromkeys([directory, target.directory, lock]))


def free_locks(files: list[int]) -> None:
    for file in files:
        fcntl.flock(file, fcntl.LOCK_UN)  # for the children that hold it, too
        os.close(file)


def sign_locks(files: Sequence[int], names: Sequence[str], holder: str) -> None:
    """Write into lock files who has them: for people, who do without on a full disk."""
    for file, name in zip(files, names):
        with contextlib.suppress(OSError):
            os.ftruncate(file, os.pwrite(file, os.fsencode(f"{holder} {name}\n"), 0))


def take_locks(state: str, names: Sequence[str], holder: str) -> list[int] | None:
    """Return descriptors that hold all these locks, None while somebody has one; never waits."""
    files: list[int] = []
    try:
        for name in names:
            os.makedirs(os.path.join(state, "locks"), 0o700, exist_ok=True)
            files.append(private(lock_file(state, name), os.O_RDWR | os.O_CREAT))
            fcntl.flock(files[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        free_locks(files)
        if isinstance(error, BlockingIOError):
            return None
        raise
    sign_locks(files, names, holder)
    return files


class Output:
    """Keep what a run prints, bounded: its beginning on disk as it comes, its end in memory."""

    def __init__(self) -> None:
        self.file, self.room = -1, 0  # until `open`
        self.tail, self.unsaved = bytearray(), 0  # the last of it; how much is not in the file
        self.echo: Callable[[bytes], None] | None = None

    def open(self, path: str) -> None:
        self.file = private(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.room = max(OUTPUT_HEAD - os.fstat(self.file).st_size, 0)

    def write(self, data: bytes) -> None:
        """Keep a piece of the output: in the file while that has room, else for its end."""
        if self.echo:
            try:
                self.echo(data)
            except OSError:  # nobody looks on any more; the run goes on
                self.echo = None
        self.tail += data
        del self.tail[:-OUTPUT_TAIL]
        saved = self.put(data[: self.room])
        self.room = self.room - saved if saved == len(data) else 0
        self.unsaved += len(data) - saved

    def put(self, data: Body) -> int:
        with contextlib.suppress(OSError):  # the disk is full
            return os.write(self.file, data)
        return 0

    def close(self) -> None:
        dropped = max(self.unsaved - len(self.tail), 0)
        if dropped:
            self.put(b"\n[hookd: %d bytes of output were dropped here]\n" % dropped)
        self.put(self.tail[len(self.tail) + dropped - self.unsaved :])
        with contextlib.suppress(OSError):
            os.close(self.file)


def variable(text: str) -> bytes:
    """Make an environment variable of any text: no NUL, no surrogate, at most 64 KB."""
    return text.replace("\0", "?").encode("utf-8", "replace")[:VARIABLE_MAX]


def base_environment(hook: Hook) -> dict[bytes, bytes]:
    own = {name: text for name, text in os.environb.items() if not PRIVATE.fullmatch(name)}
    given = {name.encode(): variable(text) for name, text in hook.environment}
    return own | given | {b"GIT_TERMINAL_PROMPT": b"0"}


def processes(fact: str) -> Iterator[tuple[int, bytes]]:
    """Yield the processes that we may look at, each with one of its files in proc(5)."""
    import glob
    for path in glob.glob(f"/proc/[0-9]*/{fact}"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            yield int(path.split("/")[2]), file.read()


def signal_group(group: int, number: int) -> bool:
    """Signal a process group; False where nothing of ours is left in it."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def lives(group: int) -> bool:
    """Tell whether more than zombies is left of a group: a PID 1 may reap them late or never."""
    if not signal_group(group, 0):
        return False
    facts = [text.rpartition(b")")[2].split() for _, text in processes("stat")]
    return not facts or any(int(one[2]) == group and one[0] not in (b"Z", b"X") for one in facts)


def end_group(group: int, patience: float = 0.0) -> bool:
    """End what is left of a process group, by TERM, then KILL; False if it went by itself."""
    signals, due = [signal.SIGTERM, signal.SIGKILL], time.monotonic() + patience
    while signals and lives(group):
        if time.monotonic() >= due:
            signal_group(group, signals.pop(0))
            due += GRACE_SECONDS
        time.sleep(0.01)
    return len(signals) < 2


def end_survivors(state: str, run: int) -> int:
    """End whatever still carries a run's environment after a crash; return how many groups."""
    mark = b"HOOKD_PAYLOAD=" + os.fsencode(run_file(state, run, "payload.json"))
    groups = set()
    for pid, environ in processes("environ"):
        if mark in environ.split(b"\0"):
            with contextlib.suppress(ProcessLookupError):
                groups.add(os.getpgid(pid))
    groups.discard(os.getpgrp())  # a run may have started this hookd
    for group in groups:
        end_group(group)
    return len(groups)


def git_environment(hook: Hook, state: str) -> dict[bytes, bytes]:
    """Return what lets git and ssh work without a person: no prompt, one key, known hosts."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
           "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=15",
           "-o", f'UserKnownHostsFile="{state}/known_hosts"']  # quoted: ssh splits it at spaces
    ssh += ["-o", "IdentitiesOnly=yes", "-i", hook.deploy_key] if hook.deploy_key else []
    return {b"GIT_SSH_COMMAND": os.fsencode(shlex.join(ssh)), b"LC_ALL": b"C",
            b"GIT_HTTP_LOW_SPEED_LIMIT": b"1", b"GIT_HTTP_LOW_SPEED_TIME": b"60"}


def ask_git(arguments: Sequence[str], environ: Mapping[bytes, bytes]) -> tuple[int, str, str]:
    """Return exit status, output and errors of a git command that only asks."""
    with subprocess.Popen(
            ["git", *arguments], cwd="/", env=environ, stdin=subprocess.DEVNULL, encoding="utf-8",
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True) as child:
        try:
            output, errors = child.communicate(timeout=GIT_SECONDS)
        except subprocess.TimeoutExpired:
            signal_group(child.pid, signal.SIGKILL)  # git alone would leave its ssh
            return 1, "", "no answer in time"
    return child.returncode, output, errors


def advice(words: str) -> str:
    """Say what to do about git's or the system's words; empty where we know nothing."""
    return next((what for said, what in ADVICE.items() if said in words), "")


def remote_branches(hook: Hook, repo: str, state: str) -> dict[str, str]:
    """Ask a remote for its branches; return commit by ref; raise OSError with the cause."""
    environ = base_environment(hook) | git_environment(hook, state)
    url = fill(hook.git, repo, "")
    code, output, errors = ask_git(["ls-remote", "--heads", "--", url], environ)
    if code:
        first = next((line for line in errors.splitlines() if line[:8] != "Warning:"), "")
        raise OSError(f"{url}: {advice(errors) or first or f'git ended with {code}'}")
    pairs = (line.partition("\t") for line in output.splitlines())
    return {ref: commit for commit, _, ref in pairs}


def git_steps(directory: str, ref: str, new_url: str) -> Iterator[list[str]]:
    """Yield what git is to do to make a directory a ref's newest commit, with its submodules."""
    yield ["init", "-q"]  # makes what is missing, and nothing else
    if new_url:
        yield ["config", "remote.origin.url", new_url]
    yield ["fetch", "-q", "--force", "--no-tags", "--recurse-submodules=no", "origin", ref]
    yield ["checkout", "-q", "--force", "--detach", "FETCH_HEAD"]
    if os.path.exists(os.path.join(directory, ".gitmodules")):  # asked after the checkout
        yield ["submodule", "-q", "sync", "--recursive"]
        yield ["submodule", "-q", "update", "--init", "--recursive", "--force"]


def break_locks(dot_git: str) -> None:
    """Remove the lock files of a killed git: under our lock, nobody else works here."""
    for folder, folders, files in os.walk(dot_git):
        folders[:] = [name for name in folders if name not in ("objects", "lfs")]
        for name in files:
            if name.endswith(".lock"):
                os.unlink(os.path.join(folder, name))


class Job:
    """Carry out one run under its locks; `perform` is called once, `end` from any thread.

    What is left in `commit` is what was deployed.
    """

    def __init__(self, run: Run, hook: Hook, state: str, locks: list[int]) -> None:
        self.run, self.hook, self.state, self.locks = run, hook, state, locks
        self.commit, self.directory = run.push.commit, run.target.directory
        self.folder = run_file(state, run.id)  # with a slash at its end
        self.payload, self.output = b"", Output()
        self.through = False  # it has ended, though the history may not know yet
        self.verdict: tuple[str, str] | None = None  # state and why, if it is not to end by itself

    def end(self, state: str, why: str) -> None:
        """Have the run end in `state`: its process group is ended within GRACE_SECONDS."""
        self.verdict = self.verdict or (state, why)

    def outcome(self, code: int, note: str = "") -> Outcome:
        """Name the end of a run whose last child exited with `code`."""
        state, why = self.verdict or ("failed" if code else "ok", note)
        return Outcome(state, 124 if state == "timeout" else code, why)

    def perform(self) -> Outcome:
        """Do all that the hook says; an error of the system is an Outcome too."""
        began = time.monotonic()
        self.deadline = began + self.hook.timeout
        with contextlib.closing(self.output):
            try:
                outcome = self.deploy()
            except OSError as error:
                outcome = Outcome("failed", 1, advice(str(error)) or str(error))
            if outcome.note:
                self.say(f"{outcome.state}: {outcome.note}")
            if outcome.state in ("ok", "failed", "timeout"):
                self.afterwards(outcome, time.monotonic() - began)
        return outcome

    def say(self, text: str) -> None:
        self.output.write(f"hookd: {text}\n".encode())

    def deploy(self) -> Outcome:
        """Make the directory the newest commit, where git is set, and run the command in it."""
        os.makedirs(self.folder, 0o700, exist_ok=True)
        with open(f"{self.folder}payload.json", "wb", opener=private) as file:
            file.write(self.payload)
        self.payload = b""  # up to 25 MB, for as long as the run may take
        self.output.open(f"{self.folder}output.log")
        os.makedirs(self.directory, exist_ok=True)
        if self.run.push.deleted:
            return self.outcome(self.script(self.hook.on_delete))
        failure = self.check_out() if self.hook.git else None
        return failure or self.outcome(self.script(self.hook.command))

    def check_out(self) -> Outcome | None:
        """Make the directory the newest commit of the run's ref; None when done, else the failure.

        Tracked files become the commit's; untracked and ignored ones stay. HEAD is detached, so
        that branches like `a` and `a/b` can share a working copy.
        """
        directory, url = self.directory, fill(self.hook.git, self.run.push.repo, "")
        environ = self.environment() | git_environment(self.hook, self.state)
        # A repository that is no more must not have git find the one around it.
        above = os.path.dirname(os.path.realpath(directory))
        environ[b"GIT_CEILING_DIRECTORIES"] = os.fsencode(above)
        inside, dot_git = os.listdir(directory), os.path.join(directory, ".git")
        if inside and ".git" not in inside:
            remedy = "empty it, or set another directory"
            return Outcome("failed", 1, f"{directory} is not empty and no git repository; {remedy}")
        question = ["config", "--file", f"{dot_git}/config", "remote.origin.url"]
        have = ask_git(question, environ)[1].strip()
        if have != url and (have or inside not in ([], [".git"])):
            remedy = shlex.join(["git", "-C", directory, "config", "remote.origin.url", url])
            fault = f"{directory} is a clone of {have or 'nothing'}, not of {url}"
            return Outcome("failed", 1, f"{fault}; if it may become one: {remedy}")
        break_locks(dot_git)
        for step in git_steps(directory, self.run.push.ref, "" if have else url):
            # A gc that detaches would leave the run's process group and work on without its lock.
            command = ["git", "-c", "gc.autoDetach=false", *step]
            code = self.child(command, environ, directory)
            if code and step[0] == "checkout" and b"index file" in self.output.tail:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{dot_git}/index")  # cut short by a crash: git makes it anew
                code = self.child(command, environ, directory)
            if code or self.verdict:
                words = self.output.tail.decode("utf-8", "replace")
                return self.outcome(code or 1, f"git {step[0]}: {advice(words) or 'failed'}")
        code, head, errors = ask_git(["-C", directory, "rev-parse", "HEAD"], environ)
        self.commit = head.strip() or self.commit
        return Outcome("failed", code, f"git rev-parse: {errors.strip()}") if code else None

    def afterwards(self, outcome: Outcome, duration: float) -> None:
        """Run on_success or on_failure; if that fails it is told and changes nothing."""
        name = "on_success" if outcome.state == "ok" else "on_failure"
        self.verdict, self.deadline = None, time.monotonic() + self.hook.timeout
        try:
            code = self.script(
                getattr(self.hook, name), STATE=outcome.state, EXIT=outcome.exit,
                DURATION=round(duration), LOG=f"{self.folder}output.log",
                PREVIOUS_STATE=self.run.last_state)
            failure = self.outcome(code, f"exit {code}" if code else "").note
        except OSError as error:
            failure = str(error)
        if failure:
            self.say(f"{name} failed: {failure}")
            log.warning("%s of run %d failed: %s: %s", name, self.run.id, failure, self.run.push)

    def script(self, text: str, **facts: Any) -> int:
        """Run a script of the hook, if there is one; return its exit status."""
        cwd = self.directory if os.path.isdir(self.directory) else "/"  # on_delete removed it
        arguments = ["/bin/sh", "-e", "-c", text, "sh"]
        return self.child(arguments, self.environment(**facts), cwd) if text else 0

    def environment(self, **facts: Any) -> dict[bytes, bytes]:
        """Return what a child finds: hookd's own without private names, the hook's, HOOKD_*."""
        run, push, branch = self.run, self.run.push, short_name(self.run.push.ref)
        facts = {
            "EVENT": push.event, "REPO": push.repo, "REF": push.ref, "BRANCH": branch,
            "SLUG": slug(branch), "COMMIT": self.commit, "BEFORE": push.before, "RUN": run.id,
            "PUSHER": push.pusher, "DELIVERY": run.delivery, "LAST_GOOD": run.last_good,
            "PAYLOAD": f"{self.folder}payload.json", **facts}
        own = {f"HOOKD_{name}".encode(): variable(str(fact)) for name, fact in facts.items()}
        return base_environment(self.hook) | own

    def child(self, arguments: Sequence[str], environ: Mapping[bytes, bytes], cwd: str) -> int:
        """Run a child to its end, or to the run's; return its exit status, 128+N after signal N."""
        child = subprocess.Popen(
            arguments, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, pass_fds=self.locks)
        with child:
            try:
                self.follow(child, child.stdout.fileno())  # type: ignore[union-attr]
            finally:
                if child.returncode is None:
                    signal_group(child.pid, signal.SIGKILL)
        if end_group(child.pid, 0.25) and not self.verdict and arguments[0] != "git":
            self.say("ended the processes that the script left behind in its process group")
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def follow(self, child: subprocess.Popen[bytes], pipe: int) -> None:
        """Copy the pipe until the child is gone, ending its group when it is time to."""
        poll, kill_at = select.poll(), 0.0
        poll.register(pipe, select.POLLIN)
        while child.poll() is None:
            if poll.poll(250):
                data = os.read(pipe, CHUNK)
                self.output.write(data)
                if not data:  # closed; the child may go on for long
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(0.25)
            now = time.monotonic()
            if now >= self.deadline:
                self.end("timeout", f"took longer than {self.hook.timeout:g}s")
            if self.verdict and now >= kill_at:
                signal_group(child.pid, signal.SIGKILL if kill_at else signal.SIGTERM)
                kill_at = now + GRACE_SECONDS
        if poll.poll(0):  # its last words; a background child's would never end
            self.output.write(os.read(pipe, CHUNK))


# ========================================================================================= HTTP
# Sockets only: bytes become whole requests, answers become bytes. One loop in one thread serves
# every connection, so two thousand slow senders cost two thousand small buffers and no more.
#
# Three bounds hold whatever is sent. A request has REQUEST_SECONDS. All bodies together have
# `room` bytes, and when these are used up the largest unfinished one gives way. There are at most
# CONNECTIONS_MAX connections; the one that waited longest gives way. A small push is rarely either.
#
# What a sender sends behind a request, before its answer, is thrown away, and the connection is
# closed with that answer: nothing that was not judged as a head is ever taken for one.

SSL_WANT_READ = 2  # ssl.SSL_ERROR_WANT_READ; ssl is imported only where it is used
LOOPBACK = re.compile(r"127\.|::1$|$")  # a unix socket's peer has no name


def open_socket(wanted: str) -> socket.socket:
    """Bind and listen; raise OSError. A unix socket that a killed hookd left is replaced."""
    family, name = socket.AF_UNIX, wanted[5:]  # type: int, Any
    try:
        if wanted.startswith("unix:"):
            with socket.socket(family) as probe:
                if probe.connect_ex(name) == errno.ECONNREFUSED:
                    os.unlink(name)
        else:
            host, _, port = wanted.rpartition(":")
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            family, *_, name = found[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "stop who has it, or change listen" if taken else "change listen"
        raise OSError(f"cannot listen on {wanted}: {error.strerror or error}; {remedy}") from None
    if family == socket.AF_UNIX:
        os.chmod(name, 0o666)  # as open as 127.0.0.1 is; the signature is the guard
    sock.listen(4096)  # enough of a queue for a restart
    return sock


def bound_address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def tls_context(config: Config) -> ssl.SSLContext | None:
    """Return what serves tls_cert, None without; raise OSError."""
    if not config.tls_cert:
        return None
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except OSError as error:
        raise OSError(f"tls_cert and tls_key cannot be used: {error}") from None
    return context


class Connection:
    """Hold one sender's socket, what it has sent, and until when it may go on."""

    __slots__ = ("body", "deadline", "head", "lingers", "peer", "sock")

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.sock, self.peer, self.deadline = sock, peer, 0.0
        self.head: Any = None  # Request
        self.body = bytearray()  # while there is no head, what has come of one
        self.lingers = False  # no request is taken any more; what still comes is thrown away

    @property
    def whole(self) -> bool:
        return bool(self.head) and len(self.body) == self.head.length

    @property
    def client(self) -> str:
        """Name who sends the request: whoever a proxy on this machine says, else the peer."""
        head = self.head
        if not head or "x-forwarded-for" not in head.fields or not LOOPBACK.match(self.peer):
            return self.peer
        last: str = head.fields["x-forwarded-for"].rpartition(",")[2].strip()
        # What cannot be read as an address is one that is allowed nowhere.
        readable = re.fullmatch("[0-9A-Fa-f.:]+", last)
        return last.removeprefix("::ffff:") if readable else "unreadable"


class Server:
    """Serve HTTP; callers call `poll` and give each whole request a `reply` before the next.

    `check(request, client)` refuses a head before its body is read; `refused` gets every Refusal
    made in here, to be answered with `reply` too. `wake` is a socket that ends a `poll`.
    """

    def __init__(self, check: Callable[[Request, str], None],
                 refused: Callable[[Connection, Refusal], None], wake: socket.socket) -> None:
        self.check, self.refused, self.wake = check, refused, wake
        self.selector = selectors.DefaultSelector()
        self.selector.register(wake, selectors.EVENT_READ)
        self.listeners: list[socket.socket] = []
        self.tls: ssl.SSLContext | None = None
        self.room, self.held, self.most = BODIES_MAX, 0, CONNECTIONS_MAX
        # In the order of deadlines: who gets a new one moves to the end.
        self.connections: OrderedDict[Connection, None] = OrderedDict()

    def listen(self, listeners: Sequence[socket.socket]) -> None:
        """Accept on these sockets from now on, and on no others."""
        for old in self.listeners:
            self.selector.unregister(old)
        self.listeners = list(listeners)
        for new in listeners:
            new.setblocking(False)
            self.selector.register(new, selectors.EVENT_READ)

    def poll(self, timeout: float) -> list[Connection]:
        """Wait for something to happen; return those whose requests are whole now."""
        now = time.monotonic()
        while (oldest := next(iter(self.connections), None)) and oldest.deadline <= now:
            if oldest.head or oldest.body:
                self.refused(oldest, Refusal(408, "request took too long"))
            self.drop(oldest)
            timeout = 0.0  # what the caller waits for may be another now
        if oldest:
            timeout = min(timeout, oldest.deadline - now)
        events = self.selector.select(min(timeout, 86400.0))  # epoll refuses 25 days
        for key, _ in events:
            if key.data:
                self.receive(key.data)
            elif key.fileobj is self.wake:
                self.wake.recv(CHUNK)
            else:
                self.accept(key.fileobj)
        return [key.data for key, _ in events if key.data and key.data.whole]

    def accept(self, listener: Any) -> None:
        """Welcome who has come, at the cost of who has waited longest where there is no room."""
        for _ in range(100):  # then it is the turn of those who are here
            try:
                sock, peer = listener.accept()
                sock.setblocking(False)
                if self.tls:
                    sock = self.tls.wrap_socket(sock, True, do_handshake_on_connect=False)
            except OSError as error:  # mostly: no more for now
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    if self.connections:
                        self.drop(next(iter(self.connections)))
                    else:
                        time.sleep(0.1)  # who waits outside would wake us at once
                return
            if len(self.connections) >= self.most:
                self.drop(next(iter(self.connections)))
            host = peer[0].removeprefix("::ffff:") if isinstance(peer, tuple) else ""
            connection = Connection(sock, host)
            self.selector.register(sock, selectors.EVENT_READ, connection)
            self.rearm(connection)

    def rearm(self, connection: Connection) -> None:
        connection.deadline = time.monotonic() + REQUEST_SECONDS
        self.connections[connection] = None
        self.connections.move_to_end(connection)

    def clear(self, connection: Connection) -> None:
        """Let go of a request."""
        self.held -= len(connection.body)
        connection.head, connection.body = None, bytearray()

    def drop(self, connection: Connection) -> None:
        self.clear(connection)
        if connection in self.connections:
            del self.connections[connection]
            self.selector.unregister(connection.sock)
            connection.sock.close()

    def receive(self, connection: Connection) -> None:
        """Read what has come."""
        try:
            # At least a record of TLS, 16 KB: what is left of one would not wake the selector.
            data = connection.sock.recv(CHUNK if connection.head else HEAD_MAX)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, SSL_WANT_READ):
                self.drop(connection)
            return
        begun = connection.head or connection.body
        if not data:
            if begun:
                self.refused(connection, Refusal(400, "request ended too early"))
            self.drop(connection)
        elif not connection.lingers:
            if not begun:
                self.rearm(connection)
            self.feed(connection, data)

    def feed(self, connection: Connection, data: bytes) -> None:
        """Add to what a connection has sent; its request may be whole by that."""
        connection.body += data
        self.held += len(data)
        if self.held > self.room:
            # Who is whole already is judged next; this one has yet to find room.
            found = (one for one in self.connections if one is connection or not one.whole)
            largest = max(found, key=lambda one: len(one.body))
            self.refused(largest, Refusal(503, "too much in flight, send it again later"))
        try:
            if connection.body and not connection.head:
                self.take_head(connection)
        except Refusal as refusal:
            self.refused(connection, refusal)
        head = connection.head
        if head and len(connection.body) > head.length:
            connection.lingers = True
            self.held -= len(connection.body) - head.length
            del connection.body[head.length :]

    def take_head(self, connection: Connection) -> None:
        """Take a head out of what a connection has sent, once it is whole, and have it checked."""
        end = connection.body.find(b"\r\n\r\n", 0, HEAD_MAX + 4)
        if end < 0:
            check_start(bytes(connection.body))
            return
        connection.head = head = read_head(bytes(connection.body[:end]))
        del connection.body[: end + 4]
        self.held -= end + 4
        self.check(head, connection.client)
        if head.fields.get("expect", "").lower() == "100-continue" and not connection.body:
            self.send(connection, b"HTTP/1.1 100 Continue\r\n\r\n")

    def reply(self, connection: Connection, status: int, text: str) -> None:
        """Answer in one write, then keep, close or linger: an unread body is never a request."""
        head = connection.head
        connection.lingers |= not connection.whole
        keep = not connection.lingers and head.keep_alive and self.listeners  # at a stop: none
        body = b"" if head and head.method == "HEAD" else f"{text}\n".encode()
        answer = (f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
                  f"Content-Type: text/plain; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
                  + "Allow: POST\r\n" * (status == 405)
                  + ("\r\n" if keep else "Connection: close\r\n\r\n"))
        self.clear(connection)
        self.send(connection, answer.encode() + body)
        if connection.lingers:  # a close would be a reset, and take the answer from the sender
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
        elif keep and connection in self.connections:
            self.rearm(connection)
        else:
            self.drop(connection)

    def send(self, connection: Connection, data: bytes) -> None:
        """Send a few bytes at once; who has no room for them does not listen."""
        with contextlib.suppress(OSError):
            if connection.sock.send(data) == len(data):
                return
        self.drop(connection)


# ============================================================================== systemd and log
# What hookd tells the machine it runs on. A stuck syslog or terminal must not delay a delivery:
# a line that cannot be written at once is dropped, counted, and told of later.


def datagram(path: str, patience: float, text: str, *files: int) -> bool:
    """Send a datagram to whoever has that name now: a restarted syslog has another socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(patience)
        sock.connect(path)
        return socket.send_fds(sock, [text.encode("utf-8", "replace")], list(files)) > 0
    return False


def notify(text: str, *files: int) -> None:
    """Tell systemd, where it listens (sd_notify(3)); descriptors go with FDSTORE=1."""
    if "NOTIFY_SOCKET" in os.environ:
        datagram(re.sub("^@", "\0", os.environ["NOTIFY_SOCKET"]), 1.0, text, *files)


class LogHandler(logging.Handler):
    """Write one event a line to the syslog at `path` while it answers, else to stderr.

    Unlike logging.handlers.SysLogHandler it waits for neither.
    """

    def __init__(self, path: str, stderr: bool) -> None:
        super().__init__()
        self.path, self.stderr, self.lost = path, stderr, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, its traceback in the same line, with nothing that a terminal obeys."""
        lost = f" (lost {self.lost} lines before this one)" if self.lost else ""
        text = escape(self.format(record) + lost)
        priority = {"INFO": 30, "WARNING": 28}.get(record.levelname, 27)  # of daemon.*, syslog(3)
        line = f"<{priority}>hookd[{os.getpid()}]: {text}"
        told = bool(self.path) and datagram(self.path, 0, line)
        with contextlib.suppress(OSError):
            if not told and self.stderr and select.select([], [2], [], 0)[1]:
                line = f"{logging.Formatter().formatTime(record)} {record.levelname}: {text}"
                room = select.PIPE_BUF - 1  # a pipe has as much (pipe(7))
                told = os.write(2, line.encode("utf-8", "replace")[:room] + b"\n") > 0
        self.lost = 0 if told else self.lost + 1


def open_log(wanted: str, syslog: str = "/dev/log") -> None:
    """Send the log where the ini says; `auto` is stderr on a terminal, else what answers."""
    terminal = wanted == "stderr" or (wanted == "auto" and sys.stderr.isatty())
    log.addHandler(LogHandler("" if terminal else syslog, wanted != "syslog"))
    log.setLevel(logging.INFO)


class Noise:
    """Tell the first refusal of each kind at once and the others once a minute, counted."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.until, self.client = NEVER, ""

    def add(self, refusal: Refusal, client: str) -> None:
        kind, self.client = f"{refusal.reason} status={refusal.status}", client or "unix"
        self.until = min(self.until, time.monotonic() + NOISE_SECONDS)
        if kind not in self.counts:
            log.warning("refused a request: %s client=%s", kind, self.client)
        self.counts[kind] = self.counts.get(kind, -1) + 1

    def settle(self) -> None:
        """Sum up a minute that is over."""
        if time.monotonic() >= self.until:
            more = ", ".join(f"{n} x {kind}" for kind, n in self.counts.items() if n)
            if more:
                log.warning("refused more in a minute: %s, the last client=%s", more, self.client)
            # What goes on is not told singly again.
            self.counts = {kind: 0 for kind, n in self.counts.items() if n}
            self.until = time.monotonic() + NOISE_SECONDS if self.counts else NEVER


def passed_count() -> int:
    """Return how many sockets systemd passed, from descriptor 3 on (sd_listen_fds(3))."""
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return int(os.environ.get("LISTEN_FDS", "0")) if ours else 0


def passed_sockets() -> dict[str, list[socket.socket]]:
    """Take the listening sockets that systemd passed, by name."""
    found: dict[str, list[socket.socket]] = {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    for index in range(passed_count()):
        os.set_inheritable(3 + index, False)
        name = names[index] if index < len(names) else ""
        found.setdefault(name, []).append(socket.socket(fileno=3 + index))
    return found


# ======================================================================================= daemon
# The one part that knows all the others: deliveries come in, rows are written, jobs go out. Only
# the main thread decides, and only it touches the database, the sockets and `jobs`. A turn of its
# loop is at most one transaction (`advance`): the steps that threads left in `inbox`, the pushes
# that came, the runs that begin. What follows from these waits in `after` until they are on disk.
#
# A job's thread carries out one run; others ask the remotes and clean up after a crash. Each
# leaves a step in `inbox` and wakes the main thread through a socket. So do signals.


def start_thread(target: Callable[..., None], *arguments: Any) -> bool:
    """Start a thread that dies with the process; False where there is no room for it."""
    try:
        threading.Thread(target=target, args=arguments, daemon=True).start()
    except RuntimeError:
        return False
    return True


def report(job: Job, outcome: Outcome, duration: float) -> None:
    """Tell the log how a run ended, with its last words where it failed."""
    run, note = job.run, f" ({outcome.note})" if outcome.note else ""
    level = logging.INFO if outcome.state == "ok" else logging.WARNING
    log.log(level, "run %d %s%s: %s exit=%d seconds=%.1f delivery=%s", run.id, outcome.state, note,
            run.push, outcome.exit, duration, run.delivery)
    if outcome.state in ("failed", "timeout"):
        for line in job.output.tail[-4096:].decode("utf-8", "replace").splitlines()[-TOLD_LINES:]:
            log.warning("run %d said: %s", run.id, line)


class Remotes:
    """Find what no delivery told of: ask the remotes at start and every `catch_up`."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon, self.at = daemon, 0.0  # when the next is to be asked
        self.next: dict[str, float] = {}  # by section
        self.down: set[str] = set()  # those that did not answer, which is told once

    def start(self) -> None:
        """Ask those whose time has come, in a thread of their own."""
        now, store = time.monotonic(), self.daemon.store
        hooks = [hook for hook in self.daemon.config.hooks.values()
                 if hook.git and hook.catch_up and hook.event == "push"]
        due = [hook for hook in hooks if self.next.get(hook.section, 0.0) <= now]
        try:
            pairs = [(hook, repo) for hook in due for repo in store.repositories(hook)]
        except (sqlite3.Error, OSError, ConfigError) as error:
            log.error("remotes cannot be asked now: %s", error)
            self.at = now + NOISE_SECONDS
            return
        later = {name: at for name, at in self.next.items() if at > now}
        self.next = {hook.section: now + hook.catch_up for hook in hooks} | later
        self.at = NEVER  # until the thread is through
        if not start_thread(self.ask, pairs):
            self.next, self.at = {}, now + NOISE_SECONDS

    def ask(self, pairs: Sequence[tuple[Hook, str]]) -> None:
        """Ask for the branches of one hook after the other: the root of a thread."""
        for hook, repo in pairs:
            try:
                self.ask_one(hook, repo)
            except Exception:
                log.exception("a bug in hookd, in catch-up; please report this")
        self.at = min([self.at, *self.next.values()])  # a reload may have asked for now
        self.daemon.wake()

    def ask_one(self, hook: Hook, repo: str) -> None:
        """Hand on the newest commit of each branch that is this hook's."""
        remote, config = fill(hook.git, repo, ""), self.daemon.config
        try:
            branches = remote_branches(hook, repo, config.state)
        except OSError as error:
            if remote not in self.down:
                log.warning("a remote cannot be asked: %s", error)
            self.down.add(remote)
            return
        if remote in self.down:
            log.info("a remote can be asked again: %s", remote)
        self.down.discard(remote)
        for ref, commit in branches.items():
            push = Push("push", repo, ref, commit)
            if hook == next((h for h in config.hooks_for(repo) if h.matches(push)), None):
                self.daemon.inbox.append(partial(self.daemon.catch_up, hook, push))


class Daemon:
    """Serve until told to stop; callers call `serve`, once. `load` reads the ini anew."""

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        self.config, self.load = config, load
        self.store = Store(config.state)
        self.jobs: dict[int, Job] = {}
        self.inbox: list[Callable[[], None]] = []  # steps for the next transaction
        self.after: list[Callable[[], Any]] = []  # what waits for it to be on disk
        self.calm: dict[Target, tuple[float, float]] = {}  # first and newest push behind a run
        self.waits: set[int] = set()  # the runs of which it was told that they wait for a lock
        self.signals: list[int] = []
        self.look_at = 0.0  # when the queue is looked at next
        self.stop_at = NEVER  # when running jobs are ended
        self.complain_at = 0.0  # when a sick database is told of again
        self.recovered = False  # what a crash cut off is in the queue again
        self.recovering = False  # a thread ends what is left of it
        self.noise, self.remotes = Noise(), Remotes(self)
        usec = os.environ.get("WATCHDOG_USEC", "")
        self.beat, self.beat_at = (int(usec) / 2e6, 0.0) if usec.isdigit() else (NEVER, NEVER)
        self.where = self.told = self.stored = ""  # address, STATUS= line, stored socket's name
        self.given = False  # whether a .socket unit gave us sockets
        ear, self.waker = socket.socketpair()
        ear.setblocking(False)
        self.waker.setblocking(False)
        self.server = Server(lambda *head: check_head(self.config, *head), self.refused, ear)

    def serve(self) -> int:
        """Listen, answer and run until a signal says stop; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.signals.append(number))
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        self.apply(self.config, passed_sockets())
        log.info("listening on %s", self.where)
        notify("READY=1")
        while self.stop_at == NEVER or not all(job.through for job in self.jobs.values()):
            try:
                self.turn()
            except Exception:
                log.exception("a bug in hookd; it goes on, please report this")
                for sender in [one for one in self.server.connections if one.whole]:
                    self.answer(sender, 500, "a bug in hookd")
                self.look_at = time.monotonic() + 1
        self.close()
        return 0

    def turn(self) -> None:
        """Wait for the next thing to do, then do all there is."""
        due = min(self.look_at, self.stop_at, self.beat_at, self.noise.until, self.remotes.at)
        senders = self.server.poll(due - time.monotonic())
        while self.signals:
            self.obey(self.signals.pop(0))
        self.noise.settle()
        accepted = [(one, decision) for one in senders if (decision := self.judge(one))]
        if accepted or time.monotonic() >= self.look_at:
            self.advance(accepted)
        now = time.monotonic()
        if now >= self.remotes.at:
            self.remotes.start()
        if now >= self.stop_at:
            for job in self.jobs.values():
                job.end("interrupted", "hookd was stopped")
            self.stop_at = now + 1  # again: on_failure may have begun since
        if now >= self.beat_at:
            notify("WATCHDOG=1")
            self.beat_at = now + self.beat

    def leave(self, step: Callable[[], None]) -> None:
        """Leave a step for the main thread's next transaction; called from any thread."""
        self.inbox.append(step)
        self.wake()

    def wake(self) -> None:
        """Make the main thread look at the queue; called from any thread."""
        self.look_at = 0.0
        with contextlib.suppress(OSError):  # full: it is awake
            self.waker.send(b"\0")

    # ---- deliveries

    def refused(self, connection: Connection, refusal: Refusal) -> None:
        self.noise.add(refusal, connection.client)
        self.answer(connection, refusal.status, refusal.reason)

    def answer(self, connection: Connection, status: int, text: str) -> None:
        readable = connection.whole or (connection.head and status not in (400, 408))
        quiet = self.config.quiet and readable
        self.server.reply(connection, 200 if quiet else status, "ok" if quiet else text)

    def judge(self, sender: Connection) -> Decision | None:
        """Judge a delivery; answer it unless it is for the queue, then return the decision."""
        config, request = self.config, sender.head
        try:
            signature = request.fields["x-hub-signature-256"]
            secret = authenticate(config.all_secrets, signature, sender.body)
        except Refusal as refusal:
            self.refused(sender, refusal)
            return None
        try:
            decision = decide(config, request, sender.body, secret)
        except Refusal as refusal:  # of a sender who is known
            decision = Decision(refusal.status, refusal.reason)
        if decision.hook:
            return decision
        self.tell(sender, decision.status, decision.text)
        return None

    def tell(self, sender: Connection, status: int, text: str) -> None:
        """Answer a signed delivery and log the same."""
        client, delivery = sender.client or "unix", sender.head.delivery  # the answer clears them
        self.answer(sender, status, text)
        level = {2: logging.INFO, 4: logging.WARNING}.get(status // 100, logging.ERROR)
        log.log(level, "%s delivery=%s client=%s", text, delivery, client)

    def advance(self, accepted: Sequence[tuple[Connection, Decision]]) -> None:
        """Take a step of the queue, in one transaction: what ended, what came, what begins.

        Inside it nothing is done that a rollback would make wrong, but for locks: see `undo`. The
        rest stands in `after` until it is on disk: answers, runs that begin, most of the log.
        """
        self.look_at, now = NEVER, time.monotonic()
        steps, self.after = self.inbox[:], []
        try:
            with contextlib.ExitStack() as undo:
                with self.store.transaction():
                    for step in steps:
                        step()
                    for sender, decision in accepted:
                        answer = self.enqueue(sender.head.delivery, decision)
                        self.after.append(partial(self.tell, sender, *answer))
                    self.dispatch(undo)
                undo.pop_all()
            del self.inbox[: len(steps)]
        except (sqlite3.Error, OSError, ConfigError) as error:
            if accepted or now >= self.complain_at:
                log.error("the queue cannot be written: %s state=%s", error, self.config.state)
                self.complain_at = now + NOISE_SECONDS
            answer = 503, "it cannot be kept now, send it again later"
            self.after = [partial(self.tell, sender, *answer) for sender, _ in accepted]
            self.look_at = time.monotonic() + 1
        for effect in self.after:
            effect()
        self.tell_systemd()

    def enqueue(self, delivery: str, decision: Decision) -> tuple[int, str]:
        """Write one delivery into the queue; return its answer, good once it is committed."""
        hook, push = decision.hook, decision.push
        if hook is None or push is None:
            return decision.status, decision.text
        target = hook.target(push)
        target_id, now = self.store.target_id(target), time.monotonic()
        # With git, whatever comes late deploys the newest commit all the same.
        guarded = hook.queue != "every" and (push.deleted or not hook.git)
        if guarded and self.store.is_late(target_id, push, delivery):
            return 200, f"ignored: {push.place} had a newer push already"
        if decision.status != 202:
            # It must not make an older push late that does touch the paths.
            self.store.consider(target_id, push._replace(order=0))
            return decision.status, decision.text
        number = self.store.add(target_id, push, delivery, decision.payload)
        replaced = self.store.supersede(target_id) if hook.queue != "every" else []
        running = [job for job in self.jobs.values() if job.run.target == target]
        if hook.queue != "every" and (running or target in self.calm):
            self.calm[target] = (self.calm.get(target, (now, now))[0], now)
        for job in running if hook.queue == "replace" else ():
            self.after.append(partial(job.end, "cancelled", f"by run {number}"))
            replaced.append(job.run.id)
        place = "".join(f", in place of run {old}" for old in replaced)
        return 202, f"queued run {number}: {push}{place}"

    def catch_up(self, hook: Hook, push: Push) -> None:
        """Queue a branch's newest commit, if it was never considered."""
        target_id = self.store.target_id(hook.target(push))
        if self.store.is_news(target_id, push.commit):
            number = self.store.add(target_id, push, "catch-up", push_json(push))
            told = ("queued run %d: %s, found by catch-up", number, push)
            self.after.append(partial(log.info, *told))

    # ---- runs

    def recover(self) -> None:
        """Look for what a killed hookd left: the daemon before this one, or a `run` by hand."""
        if not self.recovering:
            cut = self.store.cut_off(by_hand=self.recovered)
            if cut or not self.recovered:
                self.after.append(partial(self.begin_recovery, cut))

    def begin_recovery(self, cut: Sequence[Run]) -> None:
        self.recovering = start_thread(self.clean_up, cut)
        if not self.recovering:
            self.look_at = time.monotonic() + 1  # there may be room for a thread then

    def clean_up(self, cut: Sequence[Run]) -> None:
        """End the survivors of a crash: the root of a thread."""
        try:
            for run in cut:
                if end_survivors(self.config.state, run.id):
                    log.warning("run %d had outlived hookd and was ended: %s", run.id, run.push)
        except Exception:
            log.exception("a bug in hookd, at recovery; please report this")
        # Safe in any case: what survives holds its lock.
        self.leave(partial(self.requeue, cut))

    def requeue(self, cut: Sequence[Run]) -> None:
        """Queue again what was cut off, before any newer push of its target can begin."""
        for run in cut:
            note = self.store.requeue(run)
            told = f"stays so, {note}" if note else "runs again"
            level = logging.ERROR if note else logging.WARNING
            line = ("run %d was interrupted and %s: %s", run.id, told, run.push)
            self.after.append(partial(log.log, level, *line))
            hook = self.config.hooks.get(run.target.hook)
            if hook and hook.queue != "every":
                self.store.supersede(self.store.target_id(run.target))
        self.recovered, self.recovering = True, False

    def dispatch(self, undo: contextlib.ExitStack) -> None:
        """Choose what begins: oldest first, one a target, while jobs and locks are free."""
        now, busy = time.monotonic(), {job.run.target for job in self.jobs.values()}
        free = self.config.jobs - len(busy)
        if not self.recovered:
            self.recover()
        if not self.recovered or self.stop_at != NEVER or free <= 0:
            return
        for run in self.store.waiting():
            hook = self.config.hooks.get(run.target.hook)
            if hook is None:
                self.store.dismiss(run.id, "cancelled", "hookd.ini has no such hook any more")
                told = ("run %d cancelled, its hook is no more: %s", run.id, run.push)
                self.after.append(partial(log.warning, *told))
            elif free and run.target not in busy:
                # A burst is one run and one more: what comes behind a run waits for its end.
                first, newest = self.calm.get(run.target, (0.0, 0.0))
                due = min(first + BURST_SECONDS, newest + QUIET_SECONDS)
                if now < due:
                    self.look_at = min(self.look_at, due)
                elif job := self.job(run, hook):
                    undo.callback(free_locks, job.locks)
                    job.payload = self.store.begin(run.id)
                    self.after.append(partial(self.begin, job))
                    free -= 1
                else:
                    self.look_at = min(self.look_at, now + LOCK_SECONDS)
                    self.recover()

    def job(self, run: Run, hook: Hook) -> Job | None:
        """Return a run's Job with its locks; None while it cannot have them, which is told once."""
        state, names = self.config.state, lock_names(hook, run.target)
        try:
            locks, problem = take_locks(state, names, f"hookd {os.getpid()} run {run.id}"), "held"
        except (OSError, ValueError) as error:
            locks, problem = None, str(error)
        if locks is not None:
            return Job(run, hook, state, locks)
        if run.id not in self.waits:
            path = lock_file(state, names[0])
            log.info("run %d waits for a lock: %s: %s file=%s", run.id, problem, run.push, path)
            self.waits.add(run.id)
        return None

    def begin(self, job: Job) -> None:
        """Give a job its thread."""
        self.calm.pop(job.run.target, None)
        self.waits.discard(job.run.id)
        self.jobs[job.run.id] = job
        if not start_thread(self.work, job):
            self.conclude(job, Outcome("failed", 1, "no room for one more thread"), 0.0)

    def work(self, job: Job) -> None:
        """Carry out a run: the root of its thread."""
        run, began = job.run, time.monotonic()
        try:
            log.info("run %d began: %s delivery=%s", run.id, run.push, run.delivery)
            outcome = job.perform()
        except Exception:
            log.exception("a bug in hookd, in run %d; please report this", run.id)
            outcome = Outcome("failed", 1, "a bug in hookd; its log has it")
        self.conclude(job, outcome, time.monotonic() - began)

    def conclude(self, job: Job, outcome: Outcome, duration: float) -> None:
        """Tell how a run ended, free its locks and have it recorded; called from any thread."""
        report(job, outcome, duration)
        free_locks(job.locks)
        job.through = True
        self.leave(partial(self.record, job, outcome, duration))

    def record(self, job: Job, outcome: Outcome, duration: float) -> None:
        """Write how a run ended into the history, and forget what is too old for it."""
        self.jobs.pop(job.run.id, None)
        self.store.finish(job.run.id, outcome, job.commit, duration)
        for old in self.store.prune(self.store.target_id(job.run.target), self.config.keep):
            self.after.append(partial(forget, self.config.state, old))

    # ---- beginning, changing, ending

    def apply(self, config: Config, passed: Mapping[str, list[socket.socket]]) -> None:
        """Make a configuration the one in force; raise OSError and change nothing."""
        tls = tls_context(config)
        listeners = self.listeners(config.listen, passed)
        self.server.tls, self.config = tls, config
        self.server.room = max(BODIES_MAX, config.max_body + HEAD_MAX)
        spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES - 16 * config.jobs
        self.server.most = max(16, min(CONNECTIONS_MAX, spare))
        self.server.listen(listeners)
        self.where = bound_address(listeners[0])
        with contextlib.suppress(OSError), open(f"{config.state}/address", "w") as file:
            file.write(self.where)

    def listeners(self, wanted: str, passed: Mapping[str, list[socket.socket]],
                  ) -> list[socket.socket]:
        """Return a .socket unit's sockets, else the one we have or stored, else a new one."""
        name = f"hookd-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
        stored = [sock for one in passed if one.startswith("hookd-") for sock in passed[one]]
        given = [sock for one in passed.values() for sock in one if sock not in stored]
        self.given = self.given or bool(given)
        if given or (self.server.listeners and (self.given or self.config.listen == wanted)):
            return given or self.server.listeners
        gone = wanted.startswith("unix:") and not os.path.exists(wanted[5:])
        fit = [] if gone else passed.get(name, [])[:1]
        for sock in stored:
            if sock not in fit:
                sock.close()
        if not fit:
            fit = [open_socket(wanted)]
            for old in [*passed, self.stored]:
                notify(f"FDSTOREREMOVE=1\nFDNAME={old}")
            notify(f"FDSTORE=1\nFDNAME={name}", fit[0].fileno())
        self.stored = name
        return fit

    def obey(self, number: int) -> None:
        """Do what a signal asks: reload; stop when the running commands are done; stop now."""
        if number == signal.SIGHUP:
            notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            self.reload()
            notify("READY=1")
        elif self.stop_at != NEVER:
            self.stop_at = 0.0
        else:
            self.stop_at = time.monotonic() + DRAIN_SECONDS
            notify("STOPPING=1")
            most = f"in {DRAIN_SECONDS:.0f} s at most"
            log.info("stopping after %d running commands, %s", len(self.jobs), most)

    def reload(self) -> None:
        """Put the ini in force as it is now, or tell why not and go on with the old one."""
        try:
            config = self.load()
            for key in ("state", "log"):
                if getattr(config, key) != getattr(self.config, key):
                    fault = f"[hookd] {key}: changed; restart hookd for that"
                    raise ConfigError(f"{config.name}: {fault}")
            self.apply(config, {})
            self.remotes.next, self.remotes.at = {}, 0.0
            log.info("reloaded: listening on %s hooks=%d", self.where, len(config.hooks))
        except (ConfigError, OSError, SystemExit) as error:
            for problem in getattr(error, "problems", (str(error),)):
                log.error("not reloaded, the old configuration stays: %s", problem)
        self.wake()

    def close(self) -> None:
        """Answer those who are here; who comes now waits in the kernel for the next hookd."""
        listeners = self.server.listeners
        self.server.listen([])
        self.advance([])  # what ended last
        until = self.stop_at = time.monotonic() + CLOSE_SECONDS  # the last turn ends by then
        while self.server.connections and time.monotonic() < until:
            self.turn()
        if self.config.listen.startswith("unix:") and not os.environ.get("NOTIFY_SOCKET"):
            with contextlib.suppress(OSError):
                os.unlink(self.config.listen[5:])
        for sock in listeners:
            sock.close()
        self.store.close()
        log.info("stopped")

    def tell_systemd(self) -> None:
        """Keep the line in `systemctl status` true."""
        hooks, running = len(self.config.hooks), len(self.jobs)
        line = f"STATUS=listening on {self.where}, hooks: {hooks}, running: {running}"
        if line != self.told and self.server.listeners:
            notify(line)
            self.told = line


# ================================================================================= command line
# Verbs for people. They read the same ini, and touch the state as the user who owns it.


def default_state() -> str:
    """Return where the state is when the ini does not say."""
    given, common = os.environ.get("STATE_DIRECTORY", "").split(":")[0], "/var/lib/hookd"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return given or (common if os.path.isdir(common) else os.path.join(home, "hookd"))


def become_owner(state: str) -> None:
    """As root, become the owner of the state, so that no file there is root's."""
    if os.geteuid() or not os.path.isdir(state) or not os.stat(state).st_uid:
        return
    try:
        owner = pwd.getpwuid(os.stat(state).st_uid)
    except KeyError:
        raise SystemExit(f"hookd: {state} belongs to a user without a name; chown it") from None
    for module in ("ctypes", "encodings.idna", "glob", "http.client", "ipaddress", "pathlib", "ssl",
                   "urllib.parse", "uuid"):  # a Python in /root is not the owner's to read
        __import__(module)
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setgid(owner.pw_gid)
    os.setuid(owner.pw_uid)
    os.environ.update(HOME=owner.pw_dir, USER=owner.pw_name, LOGNAME=owner.pw_name)


def secret_path(name: str, base: str) -> str:
    """Return where a secret file is: among systemd's credentials, or beside the ini."""
    path = os.path.join(os.environ.get("CREDENTIALS_DIRECTORY", base), name)
    masked = os.path.join("/run/credentials/hookd.service", name)  # for the verbs of people
    return path if os.path.exists(path) or not os.path.exists(masked) else masked


def read_secret(base: str, verb: str, name: str, is_default: bool) -> str:
    """Return a secret file's text, made here if it is the default and missing."""
    path = os.path.join(base, name) if is_default else secret_path(name, base)
    nobody_knows = os.urandom(32).hex()
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        missing = is_default and isinstance(error, FileNotFoundError)
        if missing and verb in ("serve", "reload", "secret"):
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            with open(path, "x", encoding="utf-8", opener=private) as new:
                new.write(nobody_knows + "\n")
        # These verbs need no secret, and systemd shows ExecReload= no credentials.
        hidden = verb == "check" and "CREDENTIALS_DIRECTORY" in os.environ
        if missing or hidden or verb in ("run", "status", "log"):
            return nobody_knows
        if is_default:
            raise SystemExit(f"hookd: {error}; try it with sudo") from None
        raise


def load(file: str, verb: str) -> Config:
    """Read an ini and the secrets it names; as root, become the owner of its state first."""
    base, name = os.path.dirname(os.path.abspath(file)), os.path.basename(file)
    try:
        with open(file, encoding="utf-8-sig") as ini:
            text = ini.read()
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        remedy = "name the ini with -c FILE, or try it with sudo"
        raise ConfigError(f"{file}: cannot be read: {error}; {remedy}") from None
    rough, default = ini_parser(strict=False), default_state()
    with contextlib.suppress(configparser.Error):
        rough.read_string(text)
    state = rough.get("hookd", "state", fallback="")
    if verb != "reload":  # the daemon stays who it is
        become_owner(os.path.join(base, state) if state else default)
    return Ini(name, base, partial(read_secret, base, verb)).config(text, default)


def make_state(config: Config) -> None:
    for folder in ("", "runs", "locks", "work"):
        os.makedirs(os.path.join(config.state, folder), 0o700, exist_ok=True)
    with contextlib.suppress(PermissionError):
        os.chmod(config.state, 0o700)


def daemon_pid(config: Config) -> int:
    """Return the pid of the hookd that serves this state, 0 where none does."""
    with contextlib.suppress(OSError), open(lock_file(config.state, DAEMON_LOCK)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read().split()
            return int(holder[1]) if holder[1:] else 0
    return 0


def daemon_address(config: Config) -> str:
    """Return where the hookd that serves this state noted that it listens, else `listen`."""
    with contextlib.suppress(OSError), open(f"{config.state}/address") as file:
        return file.read() or config.listen
    return config.listen


def user_name() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's user may have none
        return str(os.geteuid())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    for row in (head, *rows):
        print("  ".join(map(str.ljust, row, widths)).rstrip())


def show(data: bytes) -> None:
    """Print a run's output; a terminal gets nothing that it obeys."""
    if sys.stdout.isatty():
        text = data.decode("utf-8", "replace")
        data = "".join(c if c in "\n\t" else escape(c) for c in text).encode()
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def show_while(job: Job, data: bytes) -> None:
    """Show a run's output to whoever reads it, until the run is to end; then raise OSError."""
    for start in range(0, len(data), select.PIPE_BUF):  # a pipe that is ready has so much room
        while not select.select([], [sys.stdout], [], 0.25)[1]:
            if job.verdict or time.monotonic() >= job.deadline:
                raise OSError("nobody reads it")
        show(data[start : start + select.PIPE_BUF])


def serve(config: Config, options: argparse.Namespace) -> int:
    """the daemon (the default verb)"""
    import ctypes
    os.closerange(3 + passed_count(), 1024)  # such as the lock of a run that started this hookd
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS_MAX + SPARE_FILES + 16 * config.jobs  # one for each connection
    wanted = max(soft, wanted if hard < 0 else min(wanted, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    make_state(config)
    if take_locks(config.state, [DAEMON_LOCK], f"hookd {os.getpid()}") is None:
        holder = daemon_pid(config)
        raise SystemExit(f"hookd: {config.state} is held by hookd {holder}; stop that one first")
    open_log(config.log)
    with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, CHUNK // 2)  # M_MMAP_THRESHOLD, mallopt(3): else it grows with each block
        libc.malloc_trim(0)  # what compiling took
    daemon = Daemon(config, lambda: load(options.file, "reload"))
    with contextlib.suppress(sqlite3.OperationalError):  # full, locked: it may yet become well
        daemon.store.connect()
    return daemon.serve()


def examine_hook(config: Config, hook: Hook) -> Iterator[str]:
    """Find what is wrong with what a hook names, or with its place below those before it."""
    user, mine = f"the user {user_name()}", config.hooks_for(hook.repo)
    for other in mine[: mine.index(hook)]:
        same = short_name(hook.pattern) == short_name(other.pattern)
        if other.event == hook.event and fnmatchcase(hook.pattern, other.pattern):
            yield f"can never match: [{other.section}] above takes all of it; move this one up"
        elif same and hook.directory == other.directory == f"{config.state}/{WORK}":
            yield f"directory: is that of [{other.section}] too; set directory in one of them"
    directory = re.sub(r"/[^/]*\{.*", "", hook.directory)
    while not os.path.exists(directory):
        directory = os.path.dirname(directory)
    if not os.access(directory, os.W_OK | os.X_OK):
        yield f"directory: {user} cannot write {directory}; chown it, see ReadWritePaths= too"
    dot_git, key = os.path.join(hook.directory, ".git"), hook.deploy_key
    if hook.git and os.path.exists(dot_git) and os.stat(dot_git).st_uid != os.geteuid():
        yield f"directory: git will not touch another user's {hook.directory}; chown -R it"
    if key and not os.access(key, os.R_OK):
        yield f"deploy_key: {user} finds no {key} to read; make it with ssh-keygen, or chown it"
    elif key and os.stat(key).st_mode & 0o077:
        yield f"deploy_key: ssh refuses a key others can read; chmod 600 {key}"
    scripts = " ".join((hook.command, hook.on_success, hook.on_failure, hook.on_delete))
    with contextlib.suppress(OSError), open(f"/proc/{daemon_pid(config) or 'self'}/status") as file:
        if re.search(r"\bsudo\b", scripts) and "NoNewPrivs:\t1" in file.read():
            yield "command: sudo cannot work under the unit's NoNewPrivileges=; README has polkit"


def examine(config: Config, options: argparse.Namespace) -> Iterator[str]:
    """Find what is wrong with what an ini names: section, key, fault and remedy of each."""
    from pathlib import Path
    ini, file = ini_parser(strict=False), os.path.abspath(options.file)
    ini.read(file, encoding="utf-8-sig")
    texts = [(name, key, ini[name][key]) for name in ini.sections() for key in SECRETS
             if key in ini[name]]
    for section, key, text in [*texts, ("hookd", "secret_file", f"{config.state}/secret")]:
        path = Path(file if key == "secret" else secret_path(text, os.path.dirname(file)))
        bits = [(path, 0o004), *((folder, 0o001) for folder in path.parents)]  # read and enter
        if os.path.exists(path) and all(one.stat().st_mode & bit for one, bit in bits):
            yield f"[{section}] {key}: every user can read {path}; chmod o-r {path}"
    asks: list[tuple[str, Callable[[], Any]]] = [("[hookd] tls_cert", partial(tls_context, config))]
    served = daemon_pid(config) and daemon_address(config)
    if not config.listen.startswith("unix:") and config.listen != served:
        asks.append(("[hookd] listen", lambda: open_socket(config.listen).close()))
    for hook in config.hooks.values():
        place = f"[{hook.section}]"
        yield from (f"{place} {problem}" for problem in examine_hook(config, hook))
        if hook.git and options.online and not hook.repo.endswith("*"):
            asks.append((f"{place} git", partial(remote_branches, hook, hook.repo, config.state)))
        elif hook.git:
            asks.append((f"{place} git", partial(ask_git, [], base_environment(hook))))
    for place, ask in asks:
        try:
            ask()
        except OSError as error:
            yield f"{place}: {advice(str(error)) or error}"


def check(config: Config, options: argparse.Namespace) -> int:
    """the ini and what it names: every problem, then a table of the hooks"""
    problems = list(examine(config, options))
    for problem in problems:
        print(f"{config.name}: {escape(problem)}", file=sys.stderr)
    rows = [[hook.section, hook.event, hook.directory] for hook in config.hooks.values()]
    table(["HOOK", "EVENT", "DIRECTORY"], rows)
    return 78 if problems else 0


def find_hook(config: Config, options: argparse.Namespace) -> tuple[Hook | None, Push]:
    """Return the hook of REPO BRANCH, None where there is none, and the push that starts it."""
    names = [f"refs/{kind}/{options.branch}" for kind in ("heads", "tags")]
    refs = [options.branch] if options.branch.startswith("refs/") else names
    if not REPOSITORY.fullmatch(options.repo) or not REF.fullmatch(refs[0]):
        raise SystemExit("hookd: REPO is written owner/repo, BRANCH as git knows it")
    event = "push" if options.event == "delete" else options.event
    push = Push(event or "push", options.repo, refs[0], "", pusher=user_name())
    for hook in config.hooks_for(options.repo):
        for ref in refs:
            mine = push._replace(event=event or hook.event, repo=hook.named(push.repo), ref=ref)
            if hook.matches(mine):
                return hook, mine
    return None, push


def run(config: Config, options: argparse.Namespace) -> int:
    """that run now, in the foreground, under the same lock, in the same history"""
    hook, push = find_hook(config, options)
    if hook is None:
        raise SystemExit(f"hookd: {config.name} has no hook for {options.repo} {options.branch}")
    make_state(config)
    store, target, told = Store(config.state), hook.target(push), False
    names, holder = lock_names(hook, target), f"hookd {os.getpid()} run"
    while (locks := take_locks(config.state, names, holder)) is None:
        if not told:
            print(f"hookd: waiting for the lock of {' and '.join(names)}", file=sys.stderr)
        told = True
        time.sleep(0.2)
    with store.transaction():
        target_id = store.target_id(target)
        push = push._replace(commit=store.newest(target_id))  # git may know better
        number = store.add(target_id, push, "run", push_json(push))
        payload = store.begin(number, os.getpid())
        (row,) = store.runs("WHERE r.id = ?", number)
        job = Job(row, hook, config.state, locks)
        # A signal ends hookd before this, and the transaction with it; from here on, the run.
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(sign) != signal.SIG_IGN:  # as nohup(1) wants it
                signal.signal(sign, lambda *_: job.end("cancelled", "by a signal"))
    sign_locks(locks, names, f"{holder} {number}")
    job.output.echo, job.payload, began = partial(show_while, job), payload, time.monotonic()
    outcome = job.perform()
    try:
        with store.transaction():
            store.finish(number, outcome, job.commit, time.monotonic() - began)
            gone = store.prune(target_id, config.keep)
        for old in gone:
            forget(config.state, old)
    except sqlite3.Error as error:  # the daemon notes later that it is over
        print(f"hookd: the history does not have how run {number} ended: {error}", file=sys.stderr)
    free_locks(locks)
    return outcome.exit


def post(config: Config, body: bytes, fields: Mapping[str, str]) -> tuple[int, str]:
    """POST to the running daemon, at the address that it noted; return status and text."""
    from http.client import HTTPConnection, HTTPException
    where, link = daemon_address(config), HTTPConnection("localhost")
    try:
        if where.startswith("unix:"):
            link.sock = socket.socket(socket.AF_UNIX)
            link.sock.settimeout(REQUEST_SECONDS)
            link.sock.connect(where[5:])
        else:  # 0.0.0.0 and :: lead to this machine
            host, _, port = where.rpartition(":")
            link.sock = socket.create_connection((host.strip("[]"), int(port)), REQUEST_SECONDS)
        if config.tls_cert:
            import ssl
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is ourselves
            link.sock = context.wrap_socket(link.sock)
        link.request("POST", config.path, body, fields)
        answer = link.getresponse()
        return answer.status, answer.read().decode().strip()
    except (OSError, HTTPException, ValueError) as error:
        raise SystemExit(f"hookd: nobody answers on {where} ({error}); is the daemon up?") from None


def watch(config: Config, number: int, follow: bool) -> int:
    """Print a run's output, with `follow` until it has ended; return its exit status."""
    store, shown = Store(config.state), 0
    while True:
        rows = store.runs("WHERE r.id = ?", number)
        path = run_file(config.state, number, "output.log")
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
            file.seek(shown)
            while data := file.read(CHUNK):
                shown += len(data)
                show(data)
        if not rows or not follow or rows[0].state not in ("queued", "running", "superseded"):
            return 1 if not rows or rows[0].exit is None else rows[0].exit
        if rows[0].state == "superseded":
            number, shown = int(rows[0].note.rpartition(" ")[2]), 0
            print(f"hookd: run {number} takes its place", file=sys.stderr)
        time.sleep(0.1)


def send(config: Config, options: argparse.Namespace) -> int:
    """a signed push to the running daemon, as GitHub would send it"""
    import uuid
    hook, push = find_hook(config, options)
    delivery, deleted = str(uuid.uuid4()), options.event == "delete"
    commit = "" if deleted else options.commit or os.urandom(20).hex()
    hooks = [hook] if hook else config.hooks_for(options.repo)
    secrets = hooks[0].secrets if hooks else config.secrets or config.all_secrets
    body = push_json(push._replace(commit=commit, deleted=deleted))
    status, text = post(config, body, {
        "Content-Type": JSON, "X-GitHub-Delivery": delivery,
        "X-GitHub-Event": push.event,
        "X-Hub-Signature-256": f"sha256={hmac.digest(secrets[0], body, 'sha256').hex()}"})
    print(text)
    if options.wait and (status == 202 or config.quiet):
        for row in Store(config.state).runs("WHERE r.delivery = ?", delivery):
            return watch(config, row.id, follow=True)
    return 0 if status == 202 or text == "ok" or text.startswith("pong") else 1


def has_history(config: Config) -> bool:
    """Tell, a person too, whether hookd ever ran here; raise PermissionError if we may not know."""
    with contextlib.suppress(FileNotFoundError):
        if "hookd.db" in os.listdir(config.state):
            return True
    print(f"hookd: nothing has run yet in {config.state}", file=sys.stderr)
    return False


def status_row(facts: Mapping[str, Any]) -> list[str]:
    took = "" if facts["duration"] is None else f"{facts['duration']:.1f}s"
    past = max(time.time() - (facts["ended"] or 0), 0)
    unit, seconds = next((u, s) for u, s in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
                         if past >= s or u == "s")
    ended = f"{past / seconds:.0f} {unit} ago" if facts["ended"] else ""
    now = [f"run {facts['running']} runs"] if facts["running"] else []
    now += [f"{len(facts['waiting'])} wait"] if facts["waiting"] else []
    name = escape(f"{facts['repo']} {facts['branch']}")
    name = name if len(name) <= 32 else name[:31] + "~"
    last = [str(facts["run"] or "-"), facts["state"] or "-", (facts["commit"] or "")[:7]]
    return [name, *last, ended, took, ", ".join(now)]


def status(config: Config, options: argparse.Namespace) -> int:
    """each target: last state, commit, when, how long, what waits; 1 if any is not ok"""
    found = []
    rows: Any = Store(config.state).execute(STATUS) if has_history(config) else ()
    for row in rows:
        facts = {name: value for (name, *_), value in zip(rows.description, row)}
        deleted, open_runs = facts.pop("deleted"), facts["running"] or facts["waiting"]
        gone = facts["hook"] not in config.hooks
        if open_runs or (facts["run"] and not gone and not (deleted and facts["state"] == "ok")):
            facts["waiting"] = [int(n) for n in (facts["waiting"] or "").split(",") if n]
            found.append({**facts, "branch": short_name(facts["ref"])})
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        head = ["TARGET", "RUN", "STATE", "COMMIT", "ENDED", "TOOK", "NOW"]
        table(head, list(map(status_row, found)))
    return 1 if any(facts["state"] not in (None, "ok") for facts in found) else 0


def show_log(config: Config, options: argparse.Namespace) -> int:
    """a run's output, by RUN or REPO BRANCH; the newest run's without"""
    words = [word for word in (options.run, options.branch) if word]
    where = ("r.began IS NOT NULL", "r.id = ?", """lower(t.repo) = lower(?)
        AND t.ref IN (?, 'refs/heads/' || ?, 'refs/tags/' || ?)""")[len(words)]
    sql = f"WHERE {where} ORDER BY r.began DESC, r.id DESC LIMIT 1"
    if not has_history(config):
        return 1
    for row in Store(config.state).runs(sql, *words, *words[1:] * 2):
        end = "" if row.exit is None else f", exit {row.exit}"
        line = f"hookd: run {row.id} {row.state}{end}: {row.push} {row.note}"
        print(line.rstrip(), file=sys.stderr)
        watch(config, row.id, options.follow)
        return 0
    remedy = "give the number of a run, or REPO BRANCH, see hookd.py status"
    raise SystemExit(f"hookd: no such run; {remedy}")


def secret(config: Config, options: argparse.Namespace) -> int:
    """the secret to paste into GitHub, made if there is none"""
    print("\n".join(one.decode() for one in config.secrets or config.all_secrets))
    return 0


VERBS = {"serve": serve, "check": check, "run": run, "send": send, "status": status,
         "log": show_log, "secret": secret}  # their docstrings are what --help says


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; usage errors exit 2."""
    import argparse
    top = argparse.ArgumentParser(prog="hookd.py", description=(__doc__ or "").split("\n")[0])
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hookd.ini")
    top.add_argument("-c", metavar="FILE", dest="file", default=beside,
                     help="the ini; hookd.ini beside hookd.py unless given")
    top.add_argument("--version", action="version", version=f"hookd {VERSION}")
    verbs = top.add_subparsers(metavar="VERB", dest="verb")
    of = {name: verbs.add_parser(name, help=verb.__doc__, description=verb.__doc__)
          for name, verb in VERBS.items()}
    for name in ("run", "send"):
        of[name].add_argument("repo", metavar="REPO", help="owner/repo")
        of[name].add_argument("branch", metavar="BRANCH", help="a branch, or a whole refs/...")
    of["check"].add_argument("--online", action="store_true", help="also ask each git remote")
    of["send"].add_argument("--event", default="", help="instead of the hook's own",
                            choices=("push", "delete", "workflow_run", "release", "ping"))
    of["send"].add_argument("--commit", help="40 hex digits; made up unless given")
    of["send"].add_argument("--wait", action="store_true", help="follow the run, exit by its end")
    of["status"].add_argument("--json", action="store_true", help="for programs")
    of["log"].add_argument("run", nargs="?", metavar="RUN|REPO", help="a run's number, owner/repo")
    of["log"].add_argument("branch", nargs="?", metavar="BRANCH")
    of["log"].add_argument("-f", dest="follow", action="store_true", help="until the run has ended")
    top.set_defaults(event="", verb="serve")
    return top.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Do what a command line asks; return the exit status."""
    options = arguments(argv)
    try:
        config = load(options.file, options.verb)
        return VERBS[options.verb](config, options)
    except ConfigError as error:
        print("\n".join(error.problems), file=sys.stderr)
        return 78
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `hookd.py log | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except (OSError, sqlite3.Error) as error:
        remedy = "; try it with sudo" if isinstance(error, PermissionError) else ""
        print(f"hookd: {error}{remedy}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
