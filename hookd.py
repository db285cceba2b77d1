#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""hookd: deploy to your own server when you push to GitHub.

    hookd.py [-c FILE] [VERB]       (--help lists the verbs; without one, the daemon runs)

The life of a delivery:

 1. GitHub POSTs a push. One loop in the main thread reads it, strictly and with a deadline.
 2. The HMAC of its raw bytes is checked; only then is anything parsed.
 3. Judgement, pure functions, picks the hook: the first section of the ini that matches.
 4. The push becomes a row in SQLite, on disk before GitHub reads 202.
 5. A waiting run of the same branch is superseded: the newest push includes all earlier ones.
 6. When a job slot and the directory are free, a thread takes the run and its flock(2).
 7. With `git`, the directory is reset to the branch tip, or a release is built beside the live one.
 8. The command runs under `sh -e` in a session of its own, its output and its time bounded.
 9. The outcome goes into history and log; on_success or on_failure follows.
10. A run that a crash or a stop cut off runs again at the next start, once.

Exit status: 0 done; 1 failed; 2 wrong usage; 78 fix the ini first. `run`, `rollback` and
`send --wait` exit as the command did: 124 after a timeout, 128+N after signal N.
"""
# No newer syntax than Python 3.6 has, so that an old Python can print the sentence below.

import sys

if sys.version_info < (3, 9):  # noqa: UP036
    found = sys.version_info[:2]
    sys.exit("hookd needs Python 3.9 or later; this is Python %d.%d" % found)  # noqa: UP031

import configparser
import contextlib
import errno
import fcntl
import glob
import grp
import hashlib
import hmac
import html
import io
import json
import logging
import os
import pwd
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import string
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from email.utils import formatdate
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache, partial
from http.server import BaseHTTPRequestHandler
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

if TYPE_CHECKING:
    import argparse
    import ssl

VERSION = "2.0"
NEVER = float("inf")
REQUEST_SECONDS = 10.0  # GitHub hangs up after as long
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
STOP_SECONDS = 60.0  # for running commands at a stop, unless HOOKD_STOP_SECONDS says otherwise
CLOSE_SECONDS = 2.0  # at a stop, for requests that have begun
GIT_SECONDS = 60.0  # for a question to git
QUIET_SECONDS, BURST_SECONDS = 0.05, 1.0  # quiet that ends a burst; longest wait for it
LOCK_SECONDS = 0.5  # how long to wait before retrying a lock held elsewhere
STUCK_SECONDS = 5.0  # before an unresponsive directory or file is reported
RETRY_SECONDS = (60.0, 300.0, 900.0)  # before each retry of a remote that could not be reached
ATTEMPTS_MAX = 2  # attempts at a run that a stop or crash interrupts
BUSY_SECONDS = 1.0  # how long to wait for a database lock
NOISE_SECONDS = 60.0  # interval between repeated warnings, and between retries
LINE_MAX, HEAD_MAX, FIELDS_MAX = 8 * 1024, 16 * 1024, 100  # GitHub's heads have about 1 KB
BODIES_MAX = 32 * 1024**2  # all bodies in flight together
HASHED_MAX = 256 * 1024**2  # bytes hashed for one signature, over all secrets
CONNECTIONS_MAX = 4000
SPARE_FILES = 64  # descriptors for everything but connections and jobs
JOB_FILES = 32
CHUNK = 256 * 1024
OUTPUT_HEAD, OUTPUT_TAIL = 1024**2, 256 * 1024  # kept of a run's output
VARIABLE_MAX = 64 * 1024
QUOTED_LINES = 10  # of a failed run's output, in the log

DAEMON_LOCK = "hookd-697c2ba9-697c2ba9cac2592c.lock"  # version 1.0 sees it, too
log = logging.getLogger("hookd")


# ======================================================================================= errors
# One class for each audience. SystemExit is for the person who typed a verb; OSError and
# sqlite3.Error are the machine's, ValueError is a parser's. Anything else is our bug.


class ConfigError(Exception):
    """Report every problem of an ini at once, each an argument; `main` exits 78."""


class Refusal(Exception):
    """Refuse a request: an HTTP status and a one-line reason that never quotes the request."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


# ======================================================================================= values
# Frozen, complete and valid when built. Secrets never show in a repr.


def short_name(ref: str) -> str:
    return re.sub(r"^refs/(heads|tags)/", "", ref, count=1)


def slug(ref: str) -> str:
    """Return a branch as a DNS label that no other branch has; a tag's ends in a hash."""
    branch = short_name(ref)
    label = re.sub(r"[^a-z0-9]", "-", branch.lower()).strip("-")
    tag = ref.startswith("refs/tags/")
    hashed = tag or len(label) > 63 or re.search("[0-9a-f]{32}$", label)
    if label == branch and not hashed:
        return label  # lossless, and cannot be mistaken for a hashed label
    name = ref if tag else branch
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return f"{label[:30].rstrip('-')}-{digest}".lstrip("-")


def fill(template: str, repo: str, ref: str, run: int = 0) -> str:
    """Replace {repo} {owner} {name} {branch} {slug} {run}; the values need no quoting."""
    owner, _, name = repo.partition("/")
    values = {"repo": repo, "owner": owner, "name": name, "branch": short_name(ref),
              "slug": slug(ref), "run": str(run)}
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), template)


def escape(text: str) -> str:
    """Spell out what is not printable, so that it is safe in a log or on a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# A password may contain an @. In http a user name alone is often a token.
LOGIN = re.compile(r"(?<=://)[^\s/?#@:]*:[^\s/?#]*@|((?<=http://)|(?<=https://))[^\s/?#@:]+@")


def redact(text: str, hidden: Iterable[str]) -> str:
    """Put *** for each hidden text of 8 characters or more, and for the logins in URLs."""
    words = [word for word in hidden if len(word) >= 8]
    for word in sorted(words, key=len, reverse=True):  # one may contain another
        text = text.replace(word, "***")
    return LOGIN.sub("***@", text)


class Push(NamedTuple):
    """What one event says of one ref; a deletion and a release have no commit."""

    event: str
    repo: str  # as the sender spells it
    ref: str
    commit: str
    before: str = ""
    pusher: str = ""
    subject: str = ""  # first line of the newest commit's message
    deleted: bool = False
    order: int = 0  # among the pushes of an event; 0 where GitHub gives none

    @property
    def place(self) -> str:
        return escape(f"{self.repo} {short_name(self.ref)}")

    def __str__(self) -> str:
        deleted = " (deleted)" if self.deleted else ""
        return self.place + (f" at {self.commit[:7]}" if self.commit else deleted)


class Target(NamedTuple):
    """What a hook resolves to: the unit of history. Tags, and releases, share one per directory."""

    id: int
    hook: str
    repo: str
    ref: str  # "" where refs share it
    directory: str
    event: str = ""  # of the newest push that was taken
    order: int = 0
    newest: str = ""  # its commit
    signature: str = ""


class Run(NamedTuple):
    """One run: its row of the history, and what the history says around it."""

    id: int
    target: Target
    push: Push
    state: str
    cause: str
    delivery: str
    goal: str  # the commit asked for; "" is the branch tip
    release: str  # rollback: the release to go back to, if it is still there
    attempts: int  # how often its script was cut off
    tries: int  # how often its remote could not be reached
    wish: str  # reason for a requested cancellation
    owed: int  # what a cut-off left to do: 1 the way back and on_failure, 2 the way back alone
    note: str
    last_state: str  # of the target's last run
    last_good: str  # commit that stands
    live: str  # release that stands


class Outcome(NamedTuple):
    """How a run ended, or why it has to wait: then its state is `queued`."""

    state: str
    exit: int = 0
    note: str = ""
    delay: float = 0.0  # seconds until it is tried again
    unreachable: bool = False  # git never reached the remote


class Decision(NamedTuple):
    """What judgement made of a signed delivery."""

    status: int  # 202: queue the push; 200 with a hook: note it as passed over
    text: str
    hook: Optional["Hook"] = None
    push: Optional[Push] = None
    payload: bytes = b""
    signature: str = ""


# ================================================================================ configuration
# Text to values. Each key of the ini is a field of Hook or Config with its default and a parser,
# which raises ValueError("fault; remedy"). All problems are reported at once; `check` also warns.

REPOSITORY = re.compile(r"(?!\.\.?/)[\w.-]{1,100}/(?:(?!\.\.?$)[\w.-]{1,100}|\*)", re.ASCII)
NAME = "[A-Za-z_][A-Za-z0-9_]*"
URL = r"https?://[^\s/?#]+(?:[/?#]\S*)?"
COUNT = "[1-9][0-9]{0,8}"
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "K": 1024, "M": 1024**2, "G": 1024**3}
PLACES = "{repo} {owner} {name} {branch} {slug}"
WORK = "work/{repo}/{slug}"
SCRIPTS = ("command", "activate", "on_success", "on_failure", "on_delete")
SECRETS = ("secret", "secret_file")
NEEDS = {"releases": ("git", "URL"), "deploy_key": ("git", "URL"), "shared": ("releases", "5"),
         "workflows": ("event", "workflow_run")}
FILES = ("state", "tls_cert", "tls_key", "page", "deploy_key", "directory", "environment_file",
         "report_token_file")
# systemd.exec(5), EnvironmentFile=: quoted parts, which may span lines, then plain text.
QUOTED = r"""[ \t]*(?:'([^']*)'|"((?:[^"\\]|\\[\s\S])*)")"""
VARIABLE = re.compile(rf"^[ \t]*({NAME})[ \t]*=((?:{QUOTED})*)[ \t]*((?:[^\\\n]|\\[\s\S])*)",
                      re.MULTILINE)


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def form(what: str, pattern: str = r"[\s\S]*",
         convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """Return the parser of texts that match a pattern and that `convert` takes, or of none."""
    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError, KeyError):
            if not text or re.fullmatch(pattern, text):
                return convert(text)
        raise ValueError(f"invalid {redact(text, ())!r}; use {what}")
    return parse


def places(names: str) -> Callable[[str], str]:
    """Return the parser of texts with no other name in braces than these."""
    return form(names, rf"([^{{]|{'|'.join(map(re.escape, names.split()))})*")


def amount(text: str) -> int:
    """Return a number in its unit; `no` is 0."""
    if text == "no":
        return 0
    number = text.rstrip("".join(UNITS))
    return int(number) * UNITS.get(text[len(number):], 1)


def truth(text: str) -> bool:
    return configparser.RawConfigParser.BOOLEAN_STATES[text.lower()]


def address(text: str) -> str:
    if not text.startswith("unix:") and int(text.rpartition(":")[2]) > 65535:
        raise ValueError("no port")
    return text


def networks(text: str) -> tuple[Any, ...]:
    if not text:
        return ()
    import ipaddress
    try:
        return tuple(map(ipaddress.ip_network, text.split()))
    except ValueError as error:
        raise ValueError(f"{error}; write networks like 192.30.252.0/22 2a0a:a440::/29") from None


def variables(text: str) -> tuple[tuple[str, str], ...]:
    bad = [f"line {number}" for number, line in enumerate(lines(text), 1)
           if not re.match(f"{NAME}=", line)]
    if bad:  # do not quote it: it may be part of a private key
        raise ValueError(f"{', '.join(bad)} is no variable; write lines NAME=value")
    return tuple((name, value) for name, _, value in (line.partition("=") for line in lines(text)))


def read_variables(text: str) -> dict[str, str]:
    """Return the variables of an environment file; raise ValueError for a name that is hookd's."""
    found = {}
    for name, quoted, _, _, plain in VARIABLE.findall(text):
        if name.startswith("HOOKD_"):
            raise ValueError(f"it sets {name}; take that out, HOOKD_* are hookd's own")
        found[name] = "".join(single + re.sub(r'\\(?:\n|(["\\`$]))', r"\1", double)
                              for single, double in re.findall(QUOTED, quoted))
        found[name] += re.sub(r"\\(?:\n|([\s\S]))", r"\1", plain.rstrip())
    return found


def inner_paths(text: str) -> tuple[str, ...]:
    bad = [line for line in lines(text)
           if {"", ".", "..", ".git"} & set(line.rstrip("/").split("/"))]
    if bad:
        raise ValueError(f"{', '.join(bad)} leads out of the release; write paths inside it, like "
                         "uploads/ or .env")
    return lines(text)


def key(default: str, parse: Callable[[str], Any] = str, secret: bool = False) -> Any:
    value = parse(default)
    metadata = {"parse": parse, "text": default, "default": value}
    return field(default=value, repr=not secret, metadata=metadata)


duration = form("a duration like 90s, 15m, 2h or 1d", f"{COUNT}[smhd]", amount)
positive = form("a number from 1 up", COUNT, amount)
yes_or_no = form("yes or no", convert=truth)


@dataclass(frozen=True)
class Hook:
    """A section of the ini: repository, branch pattern, what to do. Durations in seconds."""

    section: str
    repo: str
    pattern: str
    levels: tuple[str, ...]  # the sections in which its settings are looked up
    secret: tuple[str, ...] = key("", lines, secret=True)
    secret_file: str = key("")
    command: str = key("")
    directory: str = key("", places(PLACES))
    git: str = key("", places("{repo} {owner} {name}"))
    deploy_key: str = key("")
    environment: tuple[tuple[str, str], ...] = key("", variables, secret=True)
    environment_file: str = key("")
    timeout: int = key("15m", duration)
    queue: str = key("newest", form("newest, every or replace", "newest|every|replace"))
    event: str = key("push", form("push, workflow_run or release", "push|workflow_run|release"))
    workflows: tuple[str, ...] = key("", lines)
    paths: tuple[str, ...] = key("", lines)
    lock: str = key("", places(PLACES))
    catch_up: int = key("1h", form("no or a duration like 15m", f"no|{COUNT}[smhd]", amount))
    releases: int = key("no", form("no or a number from 2 up", f"no|(?!1$){COUNT}", amount))
    shared: tuple[str, ...] = key("", inner_paths)
    activate: str = key("")
    healthcheck: str = key("", form("http://127.0.0.1:8000/ or unix:/run/app.sock:/",
                                    rf"{URL}|unix:/[^:]+:/\S*"))
    healthcheck_timeout: int = key("30s", duration)
    skip: tuple[str, ...] = key("[skip deploy]", lines)
    on_success: str = key("")
    on_failure: str = key("")
    on_delete: str = key("")
    report_token: str = key("", secret=True)
    report_token_file: str = key("")
    report_api: str = key("https://api.github.com", form(
        "the API's URL with https://; a token must not travel unencrypted",
        rf"(?!http:(?!//(127\.[0-9.]+|localhost|\[::1\])([:/]|$))){URL}"))
    report_url: str = key("", places(PLACES + " {run}"))

    @property
    def ref_pattern(self) -> str:
        """Return the pattern that whole refs are matched against."""
        kind = "tags" if self.event == "release" else "heads"
        return self.pattern if self.pattern.startswith("refs/") else f"refs/{kind}/{self.pattern}"

    @property
    def is_pattern(self) -> bool:
        return bool(re.search(r"[*?\[]", self.repo + self.pattern))

    def matches(self, push: Push) -> bool:
        return self.event == push.event and fnmatchcase(push.ref, self.ref_pattern)


@dataclass(frozen=True)
class Config:
    """The whole ini, hooks by section; `common` is what [hookd] sets for all hooks."""

    name: str  # of the file
    hooks: Mapping[str, Hook]
    common: Hook = field(repr=False)
    levels: Mapping[str, Mapping[str, str]] = field(repr=False)  # section -> key -> text
    base: str  # folder of relative names
    listen: str = key("127.0.0.1:9000", form(
        "127.0.0.1:9000, [::1]:9000 or unix:/path",
        r"unix:/.+|(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]]+):[0-9]{1,5}", address))
    path: str = key("/", form("a path like /hook, without space, ? and #", r'/[!-"$->@-~]*'))
    state: str = key("")
    jobs: int = key("2", positive)
    keep: int = key("50", positive)
    max_body: int = key("25M", form("a size like 64K or 25M", f"{COUNT}[KMG]?", amount))
    log: str = key("auto", form("auto, syslog or stderr", "auto|syslog|stderr"))
    tls_cert: str = key("")
    tls_key: str = key("")
    quiet: bool = key("no", yes_or_no)
    page: str = key("")
    page_output: bool = key("no", yes_or_no)
    allow_from: tuple[Any, ...] = key("", networks)

    @cached_property
    def secrets(self) -> tuple[str, ...]:
        hooks = (*self.hooks.values(), self.common)
        return tuple(dict.fromkeys(word for hook in hooks for word in hook.secret))

    @cached_property
    def hidden(self) -> list[str]:
        """What a run's log shows as ***; see also hidden_words."""
        return [*self.secrets, *(hook.report_token for hook in self.hooks.values())]

    @cached_property
    def places(self) -> dict[str, list[tuple[int, str]]]:
        """The sections of each repository and each owner, with their places in the ini."""
        found: dict[str, list[tuple[int, str]]] = {}
        for place, (section, hook) in enumerate(self.hooks.items()):
            found.setdefault(hook.repo.lower(), []).append((place, section))
        return found

    def hooks_for(self, repo: str) -> list[Hook]:
        """Return a repository's hooks and its owner's, in the order of the ini."""
        name = repo.lower()
        both = self.places.get(name, []) + self.places.get(name.partition("/")[0] + "/*", [])
        return [self.hooks[section] for _, section in sorted(both)]

    def hook_for(self, push: Push) -> Optional[Hook]:
        """Return the hook that takes a push: the first match wins."""
        return next((hook for hook in self.hooks_for(push.repo) if hook.matches(push)), None)

    def level_of(self, hook: Hook, key: str) -> str:
        """Return the section that a hook has a setting from, "" where none sets it."""
        return next((level for level in hook.levels if key in self.levels[level]), "")


HOOK_KEYS = {item.name: item.metadata for item in fields(Hook) if item.metadata}
KEYS = {**HOOK_KEYS, **{item.name: item.metadata for item in fields(Config) if item.metadata}}


class Ini:
    """An ini's text as read by configparser; `state` is the directory where it names none."""

    def __init__(self, name: str, base: str, text: str, state: str) -> None:
        self.name, self.base = name, base  # of the file; of relative names
        self.problems: list[str] = []
        self.warnings: list[str] = []  # what only looks wrong
        for strict in (True, False):  # a duplicate ends strict parsing: look for other problems
            # No section is the default one: it has a name that no ini can spell.
            ini = configparser.RawConfigParser(strict=strict, default_section="\n")
            ini.SECTCRE = re.compile(r"\[(?P<header>.+)\]")  # as in Python 3.11: [octo/site v[0-9]]
            try:
                ini.read_string(text)
                break
            except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
                fault = f"duplicate (line {error.lineno}); keep one"
                self.problem(error.section, getattr(error, "option", ""), fault)
            except configparser.ParsingError as error:  # its own words would show a secret's line
                for number, _ in getattr(error, "errors", [(getattr(error, "lineno", 0), "")]):
                    fault = "is no [section], nor a `key = value` in one; close its bracket, or "
                    self.problems.insert(0, f"{name}: line {number} {fault}indent it")
        self.levels = {"hookd": {}, **{name: dict(ini[name]) for name in ini.sections()}}
        self.state = os.path.join(base, self.levels["hookd"].get("state") or state)
        self.default = Hook("", "", "", (), directory=f"{self.state}/{WORK}",
                            secret_file=f"{self.state}/secret")

    def problem(self, section: str, key: str, fault: str, warns: bool = False) -> None:
        known = self.warnings if warns else self.problems
        place = escape(f"{self.name}: [{section}]{' ' + key if key else ''}: ")
        if fault and not (key and any(line.startswith(place) for line in known)):
            known.append(place + escape(fault))

    def value(self, section: str, key: str, text: str) -> Any:
        """Return what a setting says, where it stands; raise ValueError."""
        known = KEYS if section == "hookd" else HOOK_KEYS
        if key not in KEYS:
            import difflib
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise ValueError(f"unknown setting; did you mean {near[0]}?")
        if key not in known:
            raise ValueError("is for the whole daemon; move it to [hookd]")
        if key in FILES and text.startswith("~"):
            raise ValueError("begins with ~, which stays as it is; write the whole path")
        if not text and key != "skip":  # none at all is a choice
            return getattr(self.default, key, KEYS[key]["default"])
        parsed = KEYS[key]["parse"](text)
        return os.path.join(self.base, text) if key in FILES else parsed

    def read(self, section: str) -> dict[str, Any]:
        """Return what a section sets; report what is wrong, or looks so, with its settings."""
        values: dict[str, Any] = {}
        for key, text in self.levels[section].items():
            try:
                values[key] = self.value(section, key, text)
            except ValueError as error:
                self.problem(section, key, str(error))
                if key in ("git", "releases", "event"):
                    values[key] = text  # present but invalid: one problem is enough
            script = rf"(?m)^\s*({'|'.join(KEYS)})\s+="
            taken = re.search(script if key in SCRIPTS else r"\s[#;]", text)
            if taken:
                fault = f"has `{taken[0].strip()}` in its value; put a comment on a line of its own"
                self.problem(section, key, f"{fault}, do not indent a setting", warns=True)
        if set(SECRETS) & set(values):  # the two are one setting
            file = "" if values.get("secret") else self.default.secret_file
            values = {"secret": (), "secret_file": file, **values}
        return values

    def hook(self, above: Hook, section: str, repo: str = "", pattern: str = "") -> Hook:
        """Return a section's Hook: what the section sets, else what is set above it."""
        own = {key: value for key, value in self.values[section].items() if key in HOOK_KEYS}
        levels = (section, *above.levels)
        return replace(above, section=section, repo=repo, pattern=pattern, levels=levels, **own)

    def judge(self, hook: Hook) -> None:
        """Report what does not go together in a hook."""
        own = self.levels[hook.section]  # a default need not concern every hook
        if not hook.command and not hook.git:
            self.problem(hook.section, "command", "is missing; set command, or git, or both")
        for key, (other, value) in NEEDS.items():
            given, met = (getattr(hook, name) != KEYS[name]["default"] for name in (key, other))
            if given and not met and (key in own or key == "releases"):
                self.problem(hook.section, key, f"needs {other}; set {other} = {value}")
        if hook.event == "workflow_run" and not hook.workflows:
            fault = "is not set, so any green workflow deploys; name the one that tests"
            self.problem(hook.section, "workflows", fault, warns=True)

    def config(self, strict: bool = True) -> Config:
        """Return the Config; with problems raise ConfigError, or leave out what is wrong."""
        self.values = {name: self.read(name) for name in self.levels}
        common = self.hook(self.default, "hookd")
        words = {name: name.split() for name in self.levels if name != "hookd"}
        shared = {pair[0].lower(): self.hook(common, name, *pair)
                  for name, pair in words.items() if len(pair) == 1}
        hooks = {name: self.hook(shared.get(pair[0].lower(), common), name, *pair)
                 for name, pair in words.items() if len(pair) == 2}
        used = {name for hook in hooks.values() for name in hook.levels}
        for name, pair in words.items():
            if len(pair) not in (1, 2) or not REPOSITORY.fullmatch(pair[0]):
                self.problem(name, "", "is no hook; write [hookd] or [owner/repo branch]")
            elif name not in used:
                self.problem(name, "", f"no hook uses this section; add one like [{name} main]")
        for hook in hooks.values():
            self.judge(hook)
        own = self.values["hookd"]
        if bool(own.get("tls_cert")) != bool(own.get("tls_key")):
            self.problem("hookd", "tls_cert", "goes with tls_key; set both or neither")
        if self.problems and strict:
            raise ConfigError(*dict.fromkeys(self.problems))
        daemon = {key: value for key, value in own.items() if key not in HOOK_KEYS}
        return Config(self.name, hooks, common, self.levels, self.base,
                      **{**daemon, "state": self.state})


# ==================================================================================== judgement
# Bytes and values in, a value or a Refusal out. Nothing here opens a file, a socket or a clock, and
# no pattern can match the same bytes in two ways: backtracking would cost more than the bytes.
# What GitHub sends: https://docs.github.com/webhooks/webhook-events-and-payloads

REQUEST_LINE = re.compile(rb"([A-Za-z][!#$%&'*+.^_`|~0-9A-Za-z-]*) ([!-~]+) HTTP/1\.([01])")
FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t -~\x80-\xff]*)")
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT")
JSON, FORM = "application/json", "application/x-www-form-urlencoded"
# What hookd reads must not come twice: a proxy in front may have used the other value.
SINGLE = ("host", "content-length", "transfer-encoding", "content-type", "content-encoding",
          "x-hub-signature-256", "x-github-event", "x-github-delivery")
COMMIT = re.compile("[0-9a-f]{40}(?:[0-9a-f]{24})?")
# git-check-ref-format(1). No part begins with a dot: refs name folders.
REF = re.compile(
    r"(?=.{1,1024}$)refs/(?:heads|tags)(?!.*(?://|\.\.|@\{|\.lock(?:/|$)|[/.]$))"
    r"(?:/[^\x00-\x20\x7f~^:?*\[\\/.\ud800-\udfff][^\x00-\x20\x7f~^:?*\[\\/\ud800-\udfff]*)+")
SPACES = " \t"


def refuse(*faults: tuple[Any, int, str]) -> None:
    """Raise the Refusal, status and reason, of the first fault that is one."""
    for fault, status, reason in faults:
        if fault:
            raise Refusal(status, reason)


def body_length(method: str, headers: Mapping[str, str]) -> int:
    """Return how many bytes follow a head; refuse what could be framed in two ways."""
    coding, length = headers.get("transfer-encoding", ""), headers.get("content-length", "0")
    coded, sized = "transfer-encoding" in headers, "content-length" in headers
    refuse((coded and sized, 400, "both Content-Length and Transfer-Encoding"),
           (coded and coding.lower() != "chunked", 501, "Content-Length needed"),
           (coded or (method == "POST" and not sized), 411, "Content-Length needed"),
           (not (length.isascii() and length.isdigit()), 400, "Content-Length is no number"))
    return int(length) if len(length) < 16 else 10**16  # int() would refuse thousands of digits


def read_headers(text: bytes) -> dict[str, str]:
    """Return header fields by lower-case name, strictly (RFC 9112): one form, no repair."""
    rows = text.split(b"\r\n") if text else []
    refuse((len(rows) > FIELDS_MAX, 431, "too many header fields"))
    headers: dict[str, str] = {}
    for row in rows:
        match = FIELD.fullmatch(row)
        if not match:
            raise Refusal(400, "malformed header field")
        name = match[1].decode().lower()
        if name in headers and name in SINGLE:
            raise Refusal(400, f"{name} given twice")
        headers[name] = match[2].decode("latin-1").strip(SPACES)
    return headers


def allowed(config: Config, client: str) -> bool:
    import ipaddress
    with contextlib.suppress(ValueError):
        host = ipaddress.ip_address(client.partition("%")[0])
        return any(host in network for network in config.allow_from)
    return False


def content_type(headers: Mapping[str, str]) -> str:
    return headers.get("content-type", "").partition(";")[0].strip(SPACES).lower()


def check_head(config: Config, request: BaseHTTPRequestHandler, length: int) -> None:
    """Refuse what can be refused from the head alone, before the body is read."""
    headers: Mapping[str, str] = request.headers  # type: ignore[assignment]
    signature = headers.get("x-hub-signature-256", "")
    path = re.sub(r"^https?://[^/?#]*", "", request.path).partition("?")[0]
    coding, kind = headers.get("content-encoding", "identity").lower(), content_type(headers)
    stranger = config.allow_from and not allowed(config, request.address_string())
    refuse((stranger, 403, "not allowed from this address"),
           (path != config.path, 404, "not found"),
           (request.command not in METHODS, 501, "unknown method"),
           (request.command != "POST", 405, "only POST"),
           (length > config.max_body, 413, "body too large"),
           (coding != "identity", 415, "Content-Encoding not supported"),
           (kind not in ("", JSON, FORM), 415, f"Content-Type must be {JSON} or {FORM}"),
           (not signature, 403, "signature missing"),
           (not kind, 415, "Content-Type missing"))


def authenticate(secrets: Sequence[str], signature: str, body: bytes) -> str:
    """Return the secret that signed the raw body; callers put the likeliest first."""
    # Hashing 25 MB from a stranger once for each secret could take seconds.
    for secret in secrets[: HASHED_MAX // (len(body) + 1)]:
        right = f"sha256={hmac.digest(secret.encode(), body, 'sha256').hex()}"
        if secret and hmac.compare_digest(right.encode(), signature.encode()):
            return secret
    raise Refusal(403, "signature does not match")


def read_payload(body: bytes, form: bool) -> tuple[bytes, dict[str, Any]]:
    """Return the JSON in a body and its object; every number in it is a float."""
    import binascii
    try:
        if form:
            match = re.search(rb"(?:^|&)payload=([!-%'-<>-~]*)(?:&|\s*$)", body)
            text = match[1] if match else b""
            # As quoted-printable: urllib.parse would make an object of each %, 80 times the body.
            body = binascii.a2b_qp(text.replace(b"%", b"=").replace(b"+", b" "))
        # int() takes minutes for a long number before Python 3.9.14; it refuses the word NaN.
        data = json.loads(str(body, "utf-8"), parse_int=float, parse_constant=int)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise Refusal(400, "the payload is no JSON object that hookd can read")
    return body, data


def pick(data: Any, path: str) -> Any:
    """Follow a dotted path into nested objects; None where a name is missing."""
    for name in path.split("."):
        data = data.get(name) if isinstance(data, dict) else None
    return data


def text_of(data: Any, path: str, most: int = 256) -> str:
    """Return a string field, cut to `most`, that a database and a log can hold."""
    value = pick(data, path)
    return value[:most].encode("utf-8", "replace").decode() if isinstance(value, str) else ""


def needed(pattern: "re.Pattern[str]", text: str, name: str) -> str:
    """Return a field that has its form; `*` is for the ini alone."""
    if not pattern.fullmatch(text) or "*" in text:
        raise Refusal(400, f"signed, but hookd cannot read its {name}")
    return text


def first_line(message: str) -> str:
    return (message.strip().splitlines() or [""])[0][:256]


# Where an event has its ref, behind what prefix, its commit, who pushed, its subject, and what
# orders it: a workflow's id grows with each run, so the slow check of an old push comes late.
SHAPES = {
    "push": ("", "ref", "after", "pusher.name", "head_commit.message", "repository.pushed_at"),
    "workflow_run": ("refs/heads/", "workflow_run.head_branch", "workflow_run.head_sha",
                     "workflow_run.actor.login", "workflow_run.head_commit.message",
                     "workflow_run.id"),
    "release": ("refs/tags/", "release.tag_name", "", "release.author.login", "release.name",
                "release.id")}


def counts(event: str, data: Any, repo: str) -> bool:
    """Tell whether an event can deploy; a workflow only for a push to this very repository."""
    action, run = pick(data, "action"), pick(data, "workflow_run")
    home = text_of(run, "head_repository.full_name")
    if event == "workflow_run" and home.lower() == repo.lower():
        good = (action, pick(run, "conclusion"), pick(run, "event"))
        return good == ("completed", "success", "push")
    return event == "push" or (event == "release" and action == "published")


def read_push(event: str, data: Any, repo: str) -> Push:
    """Return the push that an event stands for; refuse what has no ref or no commit."""
    prefix, ref_at, commit_at, pusher_at, subject_at, order_at = SHAPES[event]
    ref = needed(REF, prefix + text_of(data, ref_at, 1025), "ref")
    commit = needed(COMMIT, text_of(data, commit_at), "commit") if commit_at else ""
    before, order = text_of(data, "before"), pick(data, order_at)
    deleted = event == "push" and (pick(data, "deleted") is True or not commit.strip("0"))
    return Push(event, repo, ref, "" if deleted else commit,
                before if COMMIT.fullmatch(before) and before.strip("0") else "",
                text_of(data, pusher_at) or text_of(data, "sender.login"),
                first_line(text_of(data, subject_at, 4096)), deleted,
                int(order) if isinstance(order, float) and 0 < order < 2**53 else 0)


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


def passed_over(hook: Hook, push: Push, data: Any) -> str:
    """Return why a hook does not run for a push that it takes; "" where it does."""
    workflow = {text_of(data, "workflow_run.name"),
                text_of(data, "workflow_run.path").partition("@")[0].rpartition("/")[2]}
    if push.event == "workflow_run" and hook.workflows and not workflow & set(hook.workflows):
        return f"ignored: {push}: another workflow than those of its hook"
    if not push.commit:  # a deletion or a release
        return ""
    message = text_of(data, SHAPES[push.event][4], 2**25)
    for word in hook.skip:
        if word in message:
            return f"ignored: {push}: its message has {word}"
    if hook.paths and push.event == "push" and not touches(hook.paths, data):
        return f"ignored: {push} changed none of its paths"
    return ""


def decide(config: Config, headers: Mapping[str, str], body: bytes, secret: str) -> Decision:
    """Judge a delivery signed with `secret`: what to answer, or for which hook to queue what."""
    payload, data = read_payload(body, content_type(headers) == FORM)
    event, repo = headers.get("x-github-event", ""), ""
    if not event:
        raise Refusal(400, "X-GitHub-Event missing")
    if event in SHAPES or pick(data, "repository") is not None:  # an organisation's ping has none
        repo = needed(REPOSITORY, text_of(data, "repository.full_name"), "repository")
    hooks = config.hooks_for(repo) if repo else list(config.hooks.values())
    mine = [hook for hook in hooks if secret in hook.secret]
    if repo and not (mine if hooks else secret in config.common.secret):
        raise Refusal(403, "the secret is another repository's")
    if event == "ping":
        names = ", ".join(hook.pattern if repo else hook.section for hook in mine[:20])
        found = f"hooks for {names}" if names else "no hook"
        return Decision(200, f"pong: {repo or 'hookd'} has {found}")
    if not counts(event, data, repo):
        return Decision(200, f"ignored: nothing to do for this {escape(event[:40])} event")
    push = read_push(event, data, repo)
    hook = config.hook_for(push)
    if hook is None:
        return Decision(200, f"ignored: no hook for {push.place}")
    if hook not in mine:
        raise Refusal(403, "the secret is another repository's")
    why = passed_over(hook, push, data)
    return Decision(200 if why else 202, why, hook, push, b"" if why else payload,
                    headers.get("x-hub-signature-256", ""))


def push_json(push: Push) -> bytes:
    """Write the payload of a push that GitHub did not send, in the shape of GitHub's."""
    name, zeros, repo = short_name(push.ref), "0" * 40, {"full_name": push.repo}
    data: dict[str, Any] = {"repository": repo, "pusher": {"name": push.pusher}}
    if push.event == "push":
        data.update(ref=push.ref, before=zeros, after=push.commit or zeros, commits=[],
                    deleted=push.deleted)
    elif push.event == "workflow_run":
        run = {"conclusion": "success", "event": "push", "head_branch": name,
               "head_sha": push.commit, "head_repository": repo}
        data.update(action="completed", workflow_run=run)
    elif push.event == "release":
        data.update(action="published", release={"tag_name": name})
    return json.dumps(data).encode()


# ======================================================================================== store
# SQLite holds the queue and the history. Each transaction is on disk (WAL, synchronous=FULL) before
# anything that follows from it happens. Verbs open the same database: a run that they want begun,
# ended or held back is a row too.
#
# A run is a row, and its state moves by one function, `Store.move`, along MOVES: nothing else
# knows, or caches, what a run is. The payload stays in the row until the run has ended.
#
# A queued run that may begin has waits = ''. Else it waits for exactly one thing: a time
# (not_before), the end of a pause, or a lock, its directory or its `lock`, that another run holds.
# When a lock becomes free the first run that waits for it is woken, and no other; a woken run
# that does not take the lock after all wakes the next. So what can begin is found in one look
# at an index, however many runs wait.

MOVES = {  # all other states are ends
    "queued": ("running", "superseded", "cancelled"),
    "running": ("ok", "failed", "timeout", "cancelled", "interrupted",
                "superseded",  # git showed that what stands is newer
                "queued")}  # it did not begin, could not reach the remote, or was cut off
BY_VERB, EXACT, PATTERN = 0, 1, 2  # a run's rank: lower ranks begin first
SCHEMA_VERSION = 2
SCHEMA = """
CREATE TABLE targets (
    id INTEGER PRIMARY KEY, hook TEXT, repo TEXT COLLATE NOCASE, ref TEXT, directory TEXT,
    event TEXT DEFAULT '', ordinal INTEGER DEFAULT 0,  -- order of the newest push, of that event
    newest TEXT DEFAULT '', signature TEXT DEFAULT '',  -- its commit, and the name of its body
    gone INTEGER DEFAULT 0,                            -- its branch was deleted
    UNIQUE (hook, repo, ref, directory));
CREATE TABLE heads (  -- the last commit of a branch that a delivery, catch-up or a run saw
    target INTEGER, ref TEXT, commit_id TEXT, PRIMARY KEY (target, ref)) WITHOUT ROWID;
CREATE TABLE taken (  -- bodies before the newest, where GitHub's order does not tell them apart
    target INTEGER, signature TEXT, PRIMARY KEY (target, signature)) WITHOUT ROWID;
CREATE TABLE asked (  -- pattern hooks whose branches catch-up has noted
    hook TEXT, repo TEXT COLLATE NOCASE, PRIMARY KEY (hook, repo)) WITHOUT ROWID;
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, target INTEGER, state TEXT, cause TEXT,
    event TEXT, repo TEXT COLLATE NOCASE, ref TEXT, commit_id TEXT, before_id TEXT, pusher TEXT,
    subject TEXT, deleted INTEGER, delivery TEXT DEFAULT '',
    rank INTEGER, lock TEXT,                    -- which kind begins first; its `lock`
    waits TEXT DEFAULT '', not_before REAL DEFAULT 0, burst_end REAL DEFAULT 0,
    goal TEXT DEFAULT '', release TEXT DEFAULT '',
    restores INTEGER DEFAULT 0,                 -- the run that a rollback goes back to
    attempts INTEGER DEFAULT 0, tries INTEGER DEFAULT 0, wish TEXT DEFAULT '',
    owed INTEGER DEFAULT 0,                     -- see Run; 3 while a job settles it
    reported INTEGER DEFAULT 0,                 -- its commit is shown as pending
    seq INTEGER,                                -- the order in which runs began
    exit INTEGER, note TEXT DEFAULT '', queued REAL, began REAL, ended REAL, duration REAL,
    payload BLOB);
CREATE TABLE pauses (
    id INTEGER PRIMARY KEY, repo TEXT COLLATE NOCASE, ref TEXT, target INTEGER,
    run INTEGER,                                -- the rollback that made it
    why TEXT, UNIQUE (repo, ref));
CREATE TABLE reports (id INTEGER PRIMARY KEY AUTOINCREMENT, run INTEGER, state TEXT);
CREATE TABLE totals (repo TEXT, branch TEXT, state TEXT, runs INTEGER, ended REAL,
    PRIMARY KEY (repo, branch, state)) WITHOUT ROWID;
CREATE INDEX targets_gone ON targets (id) WHERE gone;
CREATE INDEX runs_of_target ON runs (target, seq);
CREATE INDEX runs_waiting ON runs (waits, rank, id) WHERE state = 'queued';
CREATE INDEX runs_timed ON runs (not_before) WHERE state = 'queued' AND waits = 'time';
CREATE INDEX runs_open ON runs (target, ref) WHERE state IN ('queued', 'running');
CREATE INDEX runs_busy ON runs (id) WHERE state = 'running' OR owed > 0;
CREATE INDEX runs_good ON runs (target, seq) WHERE state = 'ok' AND deleted = 0;
"""
MIGRATION = """
INSERT INTO targets (id, hook, repo, ref, directory, event, ordinal, newest)
    SELECT id, hook, repo, ref, directory, 'push', pushed_at, newest FROM old.targets;
INSERT INTO heads SELECT id, ref, newest FROM old.targets WHERE newest != '';
INSERT INTO runs (id, target, state, cause, event, repo, ref, commit_id, before_id, pusher, subject,
        deleted, delivery, rank, lock, attempts, seq, exit, note, queued, began, ended, duration,
        payload)
    SELECT r.id, target, CASE WHEN pid AND state = 'running' THEN 'interrupted' ELSE state END,
        CASE delivery WHEN 'run' THEN 'run' WHEN 'catch-up' THEN 'catch-up' ELSE 'delivery' END,
        event, t.repo, t.ref, commit_id, before_id, pusher, '', deleted, delivery, 1, '', attempts,
        CASE WHEN began THEN r.id END, exit, note, queued, began, ended, duration, payload
    FROM old.runs r JOIN old.targets t ON t.id = r.target;
"""
PUSH_COLUMNS = ("event", "repo", "ref", "commit_id", "before_id", "pusher", "subject", "deleted")
REPLACEABLE = "cause IN ('delivery', 'catch-up')"
STANDS = "FROM runs g WHERE g.target = {} AND g.state = 'ok' AND g.deleted = 0 ORDER BY g.seq DESC"
# In the order of the fields of Run, Target and Push: see Store.runs.
RUNS = f"""SELECT r.id, t.id, t.hook, t.repo, t.ref, t.directory, t.event, t.ordinal, t.newest,
    t.signature, {", ".join(f"r.{name}" for name in PUSH_COLUMNS)},
    r.state, r.cause, r.delivery, r.goal, r.release, r.attempts, r.tries, r.wish, r.owed, r.note,
    coalesce((SELECT l.state FROM runs l WHERE l.target = t.id AND l.seq IS NOT NULL
        AND l.ended IS NOT NULL AND l.id != r.id ORDER BY l.seq DESC LIMIT 1), ''),
    coalesce((SELECT g.commit_id {STANDS.format("t.id")} LIMIT 1), ''),
    coalesce((SELECT g.release {STANDS.format("t.id")} LIMIT 1), '')
    FROM runs r JOIN targets t ON t.id = r.target """
PAUSED = "(p.repo IN ('', r.repo) AND p.ref IN ('', r.ref) OR p.target = r.target)"


def lock_names(directory: str, lock: str) -> list[str]:
    """Return what a run must hold, as its `waits` names it."""
    return [f"directory {directory}"] + ([f"lock {lock}"] if lock else [])


class Store:
    """Keep queue and history in one SQLite file; raise sqlite3.Error, OSError or ConfigError.

    One thread uses it. What writes stands inside `with transaction()`.
    """

    def __init__(self, state: str, serves: bool = False) -> None:
        self.state, self.path, self.serves = state, os.path.join(state, "hookd.db"), serves
        self.db: Optional[sqlite3.Connection] = None
        self.files: list[os.stat_result] = []

    # ---- the file

    def connect(self) -> sqlite3.Connection:
        """Return the connection, opened and its tables made if need be."""
        if self.db:
            return self.db
        db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version != SCHEMA_VERSION:
                self.make_tables(db, version)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("SELECT id FROM runs LIMIT 1").fetchone()  # makes the write-ahead log
        except BaseException as error:
            db.close()
            if type(error) is sqlite3.DatabaseError:  # damaged; its subclasses pass by themselves
                fault = f"{error}; move it away, hookd makes a new one"
                raise ConfigError(f"{self.path}: {fault}") from None
            raise
        self.db, self.files = db, self.look()
        return db

    def make_tables(self, db: sqlite3.Connection, version: int) -> None:
        """Make the tables; fill them from those of an older hookd, and keep a copy of it."""
        fault = "is of an older hookd; start hookd, which brings it up to date"
        if version > SCHEMA_VERSION:
            fault = f"is of a newer hookd (user_version {version}); use that one"
        if version > SCHEMA_VERSION or (version and not self.serves):
            raise ConfigError(f"{self.path}: {fault}")
        os.makedirs(f"{self.state}/runs", 0o700, exist_ok=True)
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # for `prune`
        # After a database that was moved away, no run gets the number of another.
        numbers = [int(name) for name in os.listdir(f"{self.state}/runs") if name.isdigit()]
        script = (f"{SCHEMA} INSERT INTO sqlite_sequence VALUES ('runs', "
                  f"{max(numbers, default=0)}); PRAGMA user_version = {SCHEMA_VERSION};")
        kept = f"{self.path}.{version}"
        if version:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(kept)
            db.execute("VACUUM INTO ?", (kept,))
            db.execute("ATTACH ? AS old", (kept,))
            script = f"DROP TABLE main.targets; DROP TABLE main.runs; {script} {MIGRATION}"
        db.executescript(f"BEGIN IMMEDIATE; {script} COMMIT;")
        if version:
            db.execute("DETACH old")
            db.execute("VACUUM")  # auto_vacuum takes effect
            log.info("the database is up to date now; the old one is kept: %s", kept)

    def look(self) -> list[os.stat_result]:
        return [os.stat(self.path), os.stat(f"{self.path}-wal")]

    def watch(self) -> None:
        """Open the database anew where somebody removed or replaced one of its files.

        What was committed has to stand under the name: closing moves the write-ahead log, also
        one without a name, into the database.
        """
        with contextlib.suppress(FileNotFoundError):
            if all(map(os.path.samestat, self.look(), self.files)):
                return
        self.close()

    def close(self) -> None:
        if self.db:
            self.db.close()
        self.db = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all that is written inside stand on disk together, or not at all."""
        self.watch()
        self.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.connect().commit()
        finally:
            if self.db and self.db.in_transaction:
                self.close()  # rolls back; reopening clears the errors of a disk that came back

    @contextlib.contextmanager
    def savepoint(self) -> Iterator[None]:
        """Undo what is written inside if it raises, and nothing else."""
        self.execute("SAVEPOINT event")
        try:
            yield
        except BaseException:
            if self.db and self.db.in_transaction:
                self.execute("ROLLBACK TO event")
            raise
        self.execute("RELEASE event")

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        return self.connect().execute(sql, values)

    def value(self, sql: str, *values: Any) -> Any:
        """Return the first column of the first row, None where there is none."""
        row = self.execute(sql, *values).fetchone()
        return row and row[0]

    def dicts(self, sql: str, *values: Any) -> list[dict[str, Any]]:
        """Return rows by the names of their columns."""
        cursor = self.execute(sql, *values)
        names = [name for name, *_ in cursor.description]
        return [dict(zip(names, row)) for row in cursor]

    # ---- targets, and the order of pushes

    def target(self, hook: Hook, repo: str, ref: str) -> Target:
        """Return the target of a hook for a ref, made if need be; two spellings are one."""
        shares = hook.releases or ref.startswith("refs/tags/")  # one for each directory
        key = (hook.section, repo, "" if shares else ref)
        sql = """SELECT id, hook, repo, ref, directory, event, ordinal, newest, signature
            FROM targets WHERE hook = ? AND repo = ? AND ref = ?"""
        for row in self.execute(sql, *key):
            known = Target(*row)
            if known.directory == fill(hook.directory, known.repo, ref):
                return known
        values = (*key, fill(hook.directory, repo, ref))
        sql = "INSERT INTO targets (hook, repo, ref, directory) VALUES (?, ?, ?, ?)"
        return Target(self.execute(sql, *values).lastrowid or 0, *values)

    def spelling(self, repo: str) -> str:
        """Return a repository's name as its newest delivery spelled it."""
        sql = "SELECT repo FROM targets WHERE repo = ? ORDER BY id DESC LIMIT 1"
        return self.value(sql, repo) or repo

    def is_late(self, target: Target, push: Push, signature: str) -> bool:
        """Tell whether a newer push of the target was taken already.

        GitHub's order decides, within one event; where it is equal or missing, `before` and
        `after` do. A body that was taken before is only repeated while it is the newest.
        """
        ordered = push.order and target.order and push.event == target.event
        if ordered and push.order != target.order:
            return push.order < target.order
        if signature == target.signature:
            return False
        sql = "SELECT 1 FROM taken WHERE target = ? AND signature = ?"
        if self.value(sql, target.id, signature):
            return True
        if push.before == target.newest:
            return False
        known, name = ("commit_id", push.before) if push.deleted else ("before_id", push.commit)
        sql = f"SELECT 1 FROM runs WHERE target = ? AND {known} = ? AND event = ?"
        return bool(name and self.value(sql, target.id, name, push.event))

    def take(self, target: Target, push: Push, signature: str) -> None:
        """Note a push as the newest of its target."""
        if push.order and (target.event, target.order) != (push.event, push.order):
            self.execute("DELETE FROM taken WHERE target = ?", target.id)  # their order is lower
        else:
            self.execute("INSERT OR IGNORE INTO taken VALUES (?, ?)", target.id, target.signature)
        sql = """UPDATE targets SET event = ?, ordinal = ?, newest = ?, signature = ?, gone = 0
            WHERE id = ?"""
        self.execute(sql, push.event, push.order, push.commit, signature, target.id)

    def see(self, target: int, ref: str, commit: str) -> None:
        """Note the newest commit of a branch: catch-up need not report it."""
        self.execute("INSERT OR REPLACE INTO heads VALUES (?, ?, ?)", target, ref, commit)

    def seen(self, target: int, ref: str) -> Any:
        """Return the commit that was noted last, "" after a deletion, None where none was."""
        sql = "SELECT commit_id FROM heads WHERE target = ? AND ref = ?"
        return self.value(sql, target, ref)

    def repositories(self, hook: Hook) -> list[str]:
        """Return a hook's repositories: its own, or of its owner's those that pushed before."""
        if not hook.repo.endswith("/*"):
            return [hook.repo]
        sql = "SELECT DISTINCT repo FROM targets WHERE hook = ?"
        return [repo for (repo,) in self.execute(sql, hook.section)]

    # ---- the queue

    def runs(self, where: str, *values: Any) -> list[Run]:
        """Return runs; `where` is SQL of ours, r for runs and t for targets."""
        rows = self.execute(RUNS + where, *values)
        return [Run(row[0], Target(*row[1:10]), Push(*row[10:18]), *row[18:]) for row in rows]

    def add(self, target: Target, push: Push, cause: str, hook: Hook, **facts: Any) -> int:
        """Queue a run; return its number. `facts` are columns that not every run has."""
        rank = PATTERN if hook.is_pattern else EXACT
        facts.update(
            zip(PUSH_COLUMNS, push), state="queued", queued=time.time(), target=target.id,
            cause=cause, rank=BY_VERB if cause in ("run", "rollback") else rank,
            lock=fill(hook.lock, push.repo, push.ref))
        marks = ", ".join("?" * len(facts))
        sql = f"INSERT INTO runs ({', '.join(facts)}) VALUES ({marks})"
        return self.execute(sql, *facts.values()).lastrowid or 0

    def supersede(self, hook: Hook, target: int, ref: str, replaces: bool = False) -> list[int]:
        """Let a branch's newest waiting push take the place of older ones, unless each is to run.

        With `replaces` it also has the running one end. Behind a run it waits for the end of the
        burst, so that a burst costs two runs. Return the numbers of those replaced.
        """
        sql = f"""SELECT id, state, tries, burst_end, {REPLACEABLE} FROM runs INDEXED BY runs_open
            WHERE target = ? AND ref = ? AND state IN ('queued', 'running') ORDER BY id"""
        rows = self.execute(sql, target, ref).fetchall()
        running = [row for row in rows if row[1] == "running"]
        waiting = [row for row in rows if row[1] == "queued" and row[4]]
        if hook.queue == "every" or not waiting:
            return []
        *older, (newest, *_) = waiting
        for number, *_ in older:
            self.move(number, "superseded", note=f"by run {newest}")
        ends = [end for _, _, tries, end, _ in older if end and not tries]
        if running or ends:
            now = time.time()
            end = max(ends, default=now + BURST_SECONDS)
            sql = """UPDATE runs SET waits = 'time', not_before = ?, burst_end = ?, note = ''
                WHERE id = ?"""
            self.execute(sql, min(now + QUIET_SECONDS, end), end, newest)
        ended = [row[0] for row in running if replaces and row[4]
                 and self.wish(row[0], f"by run {newest}")]
        return [row[0] for row in older] + ended

    def wish(self, number: int, why: str) -> bool:
        """Ask for the end of a running run; False where somebody did before."""
        sql = "UPDATE runs SET wish = ? WHERE id = ? AND wish = ''"
        return self.execute(sql, why, number).rowcount > 0

    def move(self, number: int, state: str, **facts: Any) -> None:
        """Make one move of a run, and write what follows; refuse a move that is not in MOVES."""
        sql = """SELECT r.state, r.waits, r.cause, r.lock, t.directory, r.repo, r.ref, r.reported
            FROM runs r JOIN targets t ON t.id = r.target WHERE r.id = ?"""
        row = self.execute(sql, number).fetchone()
        old, waits, cause, lock, directory, repo, ref, reported = row
        if state not in MOVES.get(old, ()):
            raise ValueError(f"run {number} cannot go from {old} to {state}")
        ends, now = state not in MOVES, time.time()
        if ends:
            facts.update(payload=None, ended=now, waits="", wish="")
        changes = ", ".join(f"{name} = ?" for name in ("state", *facts))
        self.execute(f"UPDATE runs SET {changes} WHERE id = ?", state, *facts.values(), number)
        if state != "running" and not waits:  # else it was not next for its locks
            self.wake(*lock_names(directory, lock))
        if ends and (reported or (old == "running" and state != "superseded")):
            self.execute("INSERT INTO reports (run, state) VALUES (?, ?)", number, state)
        if ends and old == "running":
            sql = """INSERT INTO totals VALUES (?, ?, ?, 1, ?) ON CONFLICT (repo, branch, state)
                DO UPDATE SET runs = runs + 1, ended = excluded.ended"""
            self.execute(sql, repo.lower(), short_name(ref), state, now)
        elif ends and cause == "rollback":
            self.lift("run = ?", number)  # it changed nothing

    def holders(self) -> dict[str, int]:
        """Return which run holds each lock that is not free."""
        sql = """SELECT t.directory, r.lock, r.id FROM runs r INDEXED BY runs_busy
            JOIN targets t ON t.id = r.target WHERE r.state = 'running' OR r.owed > 0"""
        return {name: number for directory, lock, number in self.execute(sql)
                for name in lock_names(directory, lock)}

    def wake(self, *names: str) -> None:
        """Let the first run that waits for each lock begin, where the lock is free."""
        sql = """UPDATE runs SET waits = '' WHERE id = (SELECT id FROM runs INDEXED BY runs_waiting
            WHERE state = 'queued' AND waits = ? ORDER BY rank, id LIMIT 1)"""
        holders = self.holders()
        for name in names:
            if name not in holders:
                self.execute(sql, name)

    def wake_timed(self) -> None:
        """Let the runs begin that waited for a time that has come."""
        sql = """UPDATE runs SET waits = '' WHERE state = 'queued' AND waits = 'time'
            AND (not_before <= ? OR not_before > ? + CASE note WHEN '' THEN ? ELSE ? END)"""
        now = time.time()  # do not wait for ever if the clock was set back
        self.execute(sql, now, now, BURST_SECONDS, RETRY_SECONDS[-1])

    def next_run(self, rank: int) -> int:
        """Return the run that begins next, of at most this rank; 0 where none can."""
        sql = """SELECT r.id, t.directory, r.lock FROM runs r INDEXED BY runs_waiting
            JOIN targets t ON t.id = r.target
            WHERE r.state = 'queued' AND r.waits = '' AND r.rank <= ?
            ORDER BY r.rank, r.id LIMIT 1"""
        row = self.execute(sql, rank).fetchone()
        while row:
            number, directory, lock = row
            names, holders = lock_names(directory, lock), self.holders()
            blocker = next((name for name in names if name in holders), "")
            if not blocker and self.paused(number) is None:
                return int(number)
            self.execute("UPDATE runs SET waits = ? WHERE id = ?", blocker or "pause", number)
            self.wake(*names)
            row = self.execute(sql, rank).fetchone()
        return 0

    def next_time(self) -> float:
        """Return when the first run that waits for a time may begin, in seconds from now."""
        sql = """SELECT min(at) FROM (SELECT min(not_before) AS at FROM runs INDEXED BY runs_timed
                WHERE state = 'queued' AND waits = 'time'
            UNION ALL SELECT min(not_before) FROM runs INDEXED BY runs_busy
                WHERE owed > 0 AND owed < 3)"""
        at = self.value(sql)
        return NEVER if at is None else max(at - time.time(), 0.0)

    # ---- pauses

    def paused(self, number: int) -> Optional[str]:
        """Return why a run is held back, None where it is not: a verb's never is."""
        why: Optional[str] = self.value(f"""SELECT p.why FROM runs r JOIN pauses p ON {PAUSED}
            WHERE r.id = ? AND r.cause NOT IN ('run', 'rollback')
            ORDER BY p.id LIMIT 1""", number)
        return why

    def pause(self, words: tuple[str, str], why: str, run: int = 0, target: int = 0) -> None:
        """Hold back runs of a repository and ref, "" for any; a person's pause keeps its reason."""
        sql = """INSERT INTO pauses (repo, ref, target, run, why) VALUES (?, ?, ?, ?, ?)
            ON CONFLICT (repo, ref) DO UPDATE SET why = excluded.why WHERE run"""
        self.execute(sql, *words, target or None, run, why)

    def lift(self, where: str, *values: Any) -> int:
        """Lift the pauses that match; what waited for one may begin. Return how many."""
        lifted = self.execute(f"DELETE FROM pauses WHERE {where}", *values).rowcount
        if lifted:
            self.execute("UPDATE runs SET waits = '' WHERE state = 'queued' AND waits = 'pause'")
        return lifted

    # ---- the history

    def prune(self, target: int, keep: int) -> list[int]:
        """Forget all but the newest finished runs of a target, and as many superseded ones.

        What stands is kept, and every release on disk. Deleted branches share one history.
        """
        gone: list[tuple[int]] = []
        for kind in ("= 'superseded'", "NOT IN ('superseded', 'queued', 'running')"):
            gone += self.execute(f"""SELECT id FROM (SELECT id, release, owed, target FROM runs
                WHERE (target = ? OR target IN (SELECT id FROM targets WHERE gone)
                    AND (SELECT gone FROM targets WHERE id = ?))
                AND state {kind} ORDER BY id DESC LIMIT -1 OFFSET ?) o
                WHERE o.owed = 0 AND o.release = '' AND o.id NOT IN (SELECT g.id
                {STANDS.format("o.target")} LIMIT 1)""", target, target, keep)
        self.connect().executemany("DELETE FROM runs WHERE id = ?", gone)
        if self.value("PRAGMA freelist_count") > 256:  # pages; the disk gets some back
            self.execute("PRAGMA incremental_vacuum(256)").fetchall()
        return [run for (run,) in gone]

    def good(self, target: int) -> list[tuple[int, str, str, int]]:
        """Return a target's ok runs, newest first: number, commit, release, the run it restored."""
        sql = f"SELECT id, commit_id, release, restores {STANDS.format('?')}"
        return self.execute(sql, target).fetchall()

    def overview(self) -> list[dict[str, Any]]:
        """Return the targets as `status --json` has them, and `target` and `gone`."""
        rows = self.dicts(f"""SELECT *, (SELECT p.why FROM pauses p WHERE {PAUSED} ORDER BY p.id
                LIMIT 1) AS paused
            FROM (SELECT t.id AS target, t.repo AS repo, t.hook AS hook, t.directory AS directory,
                t.gone AS gone, coalesce(nullif(t.ref, ''), l.ref, (SELECT o.ref FROM runs o
                    WHERE o.target = t.id ORDER BY o.id DESC LIMIT 1)) AS ref, t.ref AS line,
                l.id AS run, l.state AS state, l.event AS event, l.cause AS cause,
                l.commit_id AS "commit", l.subject AS subject, l.pusher AS pusher,
                l.began AS began, l.ended AS ended, l.duration AS duration, l.exit AS exit,
                l.note AS note, (SELECT g.commit_id {STANDS.format("t.id")} LIMIT 1) AS last_good
                FROM targets t LEFT JOIN runs l ON l.id = (SELECT id FROM runs WHERE target = t.id
                    AND seq IS NOT NULL AND state NOT IN ('queued', 'running', 'superseded')
                    ORDER BY seq DESC LIMIT 1)) r
            WHERE ref IS NOT NULL ORDER BY repo, line, target""")
        for facts in rows:
            opened = self.execute("""SELECT id, state FROM runs INDEXED BY runs_open
                WHERE target = ? AND state IN ('queued', 'running') ORDER BY rank, id""",
                                  facts["target"]).fetchall()
            facts["branch"] = short_name(facts["ref"])
            facts["waiting"] = [number for number, state in opened if state == "queued"]
            running = [number for number, state in opened if state == "running"]
            facts["running"] = running[0] if running else None
        return rows

    def why(self, number: int) -> str:
        """Say what a queued run waits for, or what holds a running one up; "" where nothing."""
        sql = "SELECT state, waits, not_before, note FROM runs WHERE id = ?"
        row = self.execute(sql, number).fetchone()
        state, waits, until, note = row or ("running", "", 0.0, "")
        if state == "running":
            return str(note)
        if waits == "time":
            at = time.strftime("%H:%M:%S", time.localtime(until))
            return f"next try at {at}: {note}" if note else ""
        if waits in ("", "pause"):
            why = self.paused(number)
            return "for a free job" if why is None else f"paused: {why}"
        holder = self.holders().get(waits)
        if holder == number:
            return "for what its cut-off left to do"
        lock = f" ({waits})" if waits.startswith("lock ") else ""
        return f"behind run {holder}{lock}" if holder else f"for the {waits}"


TARGET_FACTS = ("repo", "ref", "branch", "hook", "directory", "run", "state", "event", "cause",
                "commit", "subject", "pusher", "began", "ended", "duration", "exit", "last_good",
                "running", "waiting", "paused")
RUN_FACTS = ("run", "state", "event", "cause", "commit", "subject", "pusher", "queued", "began",
             "ended", "duration", "exit", "note")


def listed(row: Mapping[str, Any], hooks: Mapping[str, Hook]) -> bool:
    """Tell whether `status` lists a target: it is at work, or has a run, a branch and a hook."""
    if row["running"] or row["waiting"]:
        return True
    if row["gone"] or not row["run"]:
        return False
    hook = hooks.get(row["hook"])
    place = fill(hook.directory, row["repo"], row["ref"]) if hook else ""
    return not hooks or row["directory"] == place  # without hooks: the ini is broken


def clean(facts: Mapping[str, Any], names: Sequence[str], hidden: Sequence[str]) -> dict[str, Any]:
    """Return the named facts as `status --json` has them: None where unknown, no secrets."""
    found: dict[str, Any] = {name: None if facts[name] == "" else facts[name] for name in names}
    told = [name for name in ("subject", "pusher", "note", "paused") if found.get(name)]
    return {**found, **{name: redact(found[name], hidden) for name in told}}


def history(store: Store, target: int, most: int = -1) -> list[dict[str, Any]]:
    """Return a target's runs as `status REPO BRANCH --json` has them, newest first."""
    rows = store.dicts("""SELECT id AS run, state, event, cause, commit_id AS "commit", subject,
        pusher, queued, began, ended, duration, exit, note FROM runs WHERE target = ?
        ORDER BY id DESC LIMIT ?""", target, most)
    for facts in rows:
        if facts["state"] in MOVES:  # it has not ended
            facts["note"] = store.why(facts["run"])
    return rows


def reason(outcome: Outcome) -> str:
    """Say why a run did not end ok, "" where nothing is to be said."""
    code = f"exit {outcome.exit}" if outcome.exit and outcome.state == "failed" else ""
    return "; ".join(filter(None, [code, outcome.note]))


def summary(run: Run, outcome: Outcome, seconds: float) -> str:
    """Return one line about a run for a person."""
    push, why = run.push, reason(outcome)
    words = [push.place, outcome.state, why and f"({why})", push.commit and f"at {push.commit[:7]}",
             push.subject and f'"{push.subject}"', push.pusher and f"by {push.pusher}"]
    return escape(f"{' '.join(filter(None, words))}, run {run.id}, {seconds:.0f} s")


# ========================================================================================= work
# Locks, git, releases and children, in a run's own thread. Nothing here knows of HTTP or SQLite.
#
# A run works under a flock(2) for its directory, shared ones for the directories above it, and one
# for its `lock`. Its children inherit the descriptors: when hookd is killed, the locks are held for
# as long as anything of the run lives. When a run ends as it should, LOCK_UN frees them for all
# holders at once. Lock files are never removed: between one process's open and another's unlink,
# each could hold "the" lock.
#
# Every child leads a session, and so a process group, of its own; TERM and KILL go to the group.
# What left the group (setsid, a service manager) is meant to outlive the run. After a crash the
# survivors are known by HOOKD_PAYLOAD in their environment, a path that only their run has: a
# pid on disk could be another process's by now.
#
# A step of a run returns None when the next may follow, else the Outcome that ends the run.

PRIVATE = re.compile(
    rb"NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|.*_DIRECTORY|INVOCATION_ID|JOURNAL_STREAM|HOOKD_.*|"
    # git rev-parse --local-env-vars: they would point git at another repository
    rb"GIT_(ALTERNATE_OBJECT_DIRECTORIES|CONFIG|CONFIG_PARAMETERS|CONFIG_COUNT|OBJECT_DIRECTORY|"
    rb"DIR|WORK_TREE|IMPLICIT_WORK_TREE|GRAFT_FILE|INDEX_FILE|NO_REPLACE_OBJECTS|COMMON_DIR|"
    rb"REPLACE_REF_BASE|PREFIX|SHALLOW_FILE|INTERNAL_SUPER_PREFIX|NAMESPACE)")
FILES_SOFT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]  # for scripts; hookd raises its own
ADVICE = {
    "dubious ownership": "the directory is another user's; chown -R it to the user hookd runs as",
    "bad permissions": "ssh refuses a deploy_key that others can read; chmod 600 it",
    "Host key verification failed": "the remote's host key changed; compare, then ssh-keygen -R",
    "Permission denied .publickey": "the remote does not know this key; add its .pub there",
    "epository not found": "no such repository for this key; check git and deploy_key",
    "could not read Username|Authentication failed":
        "the remote wants a login that it knows; use an ssh URL and a deploy_key",
    "couldn't find remote ref": "the remote has no such branch; was it deleted?",
    "Could not resolve host": "the remote's name is not known; check git and the network",
    "No space left": "the disk is full; make room",
    "git: (command )?not found|directory: 'git'":
        "no git in PATH; install git, or set PATH in environment",
}
UNREACHABLE = re.compile(  # git's, curl's and ssh's words for a remote that cannot be reached
    "Could not resolve host|[Uu]nable to look up|Connection refused|timed out|"
    "Network is unreachable|No route to host|Failed to connect|Couldn't connect|Connection reset|"
    "Connection closed by|Operation too slow|returned error: 5|unable to connect|early EOF|"
    "unexpected disconnect|remote end hung up unexpectedly|Recv failure|[Cc]annot fork")

# What git does in a clone, as a person would type it; with a command's environment, so HOOKD_*.
GIT = """
git() {
    command git -c gc.autoDetach=false -c maintenance.autoDetach=false \\
        -c init.defaultBranch=main "$@"
}
"""
FETCH = """
remote=$1 tip=$2 goal=$3
bring() { git fetch -q --force --no-tags --recurse-submodules=no origin "$@"; }
has_goal() { git cat-file -e "$goal^{commit}" 2> /dev/null; }
if [ "$remote" ]; then  # there is no clone yet
    git init -q
    git config remote.origin.url "$remote"
fi
if [ -z "$goal" ]; then
    bring "+$HOOKD_REF:$tip"  # a ref of our own makes the next fetch small
elif [ "$HOOKD_CAUSE" != rollback ] || ! has_goal; then
    bring --prune '+refs/heads/*:refs/hookd/heads/*' '+refs/tags/*:refs/hookd/tags/*'
    has_goal || bring "+$goal:refs/hookd/asked" || {
        echo "hookd: the remote has no commit $goal, or does not give it"
        exit 1
    }
    known=$(git for-each-ref --count=1 --contains "$goal" refs/hookd/heads refs/hookd/tags)
    [ "$known" ] || echo "hookd: warning: commit $goal is on no branch or tag of the remote"
fi
"""
CHECK_OUT = """
# A power cut may leave the index short: git makes it anew.
git ls-files .git > /dev/null 2>&1 || rm -f .git/index
# Detached, so that branches like `a` and `a/b` can share a working copy.
git checkout -q --force --detach "$HOOKD_COMMIT" --
if [ -e .gitmodules ]; then
    git submodule -q sync --recursive
    git submodule -q update --init --recursive --force
fi
"""
BUILD = """
has_modules() { git cat-file -e "$HOOKD_COMMIT:.gitmodules" 2> /dev/null; }
if has_modules; then
""" + CHECK_OUT + """
fi
plant='set -e; tree=$HOOKD_RELEASE/$displaypath
    git init -q --template= "$tree"
    objects=$(git rev-parse --absolute-git-dir)/objects
    printf "%s\\n" "$objects" > "$tree/.git/objects/info/alternates"
    git -C "$tree" checkout -q --force --detach "$sha1" --'
sha1=$HOOKD_COMMIT displaypath=
eval "$plant"
if has_modules; then git submodule --quiet foreach --recursive "$plant"; fi
"""


def run_file(state: str, run: int, name: str = "") -> str:
    return os.path.join(state, "runs", str(run), name)


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def discard(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


class Output:
    """Keep what a run prints, bounded: its beginning on disk as it comes, its end in memory."""

    def __init__(self, path: str) -> None:
        self.file = io.FileIO(path, "ab", opener=private)
        self.tail, self.missing = bytearray(), 0  # the last of all; how much the file lacks

    def write(self, data: bytes) -> None:
        room = 0 if self.missing else max(OUTPUT_HEAD - self.file.tell(), 0)
        self.tail += data
        del self.tail[:-OUTPUT_TAIL]
        self.missing += len(data)
        with contextlib.suppress(OSError):  # the disk is full
            self.missing -= self.file.write(data[:room])

    def close(self) -> None:
        dropped = max(self.missing - len(self.tail), 0)
        with contextlib.suppress(OSError), self.file:
            if dropped:
                self.file.write(b"\n[hookd: %d bytes were dropped here]\n" % dropped)
            self.file.write(self.tail[len(self.tail) - self.missing + dropped:])


def variable(text: str) -> bytes:
    """Make an environment variable of any text: no NUL, no surrogate, at most 64 KB."""
    return text.replace("\0", "?").encode("utf-8", "replace")[:VARIABLE_MAX]


def file_variables(hook: Hook) -> dict[str, str]:
    """Return the variables of a hook's environment_file; raise OSError."""
    path = hook.environment_file
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("it is no plain file")  # a FIFO without a writer would block
        with open(path or os.devnull, encoding="utf-8") as file:
            return read_variables(file.read())
    except OSError as error:
        fault = f"{error.strerror}; make it readable by hookd's user"
        raise OSError(f"cannot read {path}: {fault}") from None
    except ValueError as error:
        raise OSError(f"cannot read {path}: {error}") from None


def base_environment(hook: Hook, more: Iterable[tuple[str, str]] = ()) -> dict[bytes, bytes]:
    """Return hookd's own environment without private names, with what the hook sets and `more`."""
    own = {name: text for name, text in os.environb.items() if not PRIVATE.fullmatch(name)}
    given = {name.encode(): variable(text) for name, text in (*hook.environment, *more)}
    return {**own, **given, b"GIT_TERMINAL_PROMPT": b"0"}


def signal_group(group: int, number: int) -> bool:
    """Signal a process group; False where nothing of ours is left in it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)
        return True
    return False


def kill_survivors(state: str, runs: Iterable[int]) -> list[int]:
    """Kill what still carries a run's environment after a crash; return the runs that had any."""
    marks = {b"HOOKD_PAYLOAD=" + os.fsencode(run_file(state, run, "payload.json")): run
             for run in runs}
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc") if marks else ())):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            for mark in marks.keys() & set(file.read().split(b"\0")):
                if os.getpgid(pid) != os.getpgrp():  # a run may have started this hookd
                    signal_group(os.getpgid(pid), signal.SIGKILL)
                    found.add(marks[mark])
    return sorted(found)


def git_environment(hook: Hook, state: str, cwd: str = "/") -> dict[bytes, bytes]:
    """Return what lets git and ssh work without a person: no prompt, one key, known hosts."""
    ssh = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
           "-o", "ConnectTimeout=30", "-o", "ServerAliveInterval=15",
           "-o", f'UserKnownHostsFile="{state}/known_hosts"']  # quoted: ssh splits it at spaces
    ssh += ["-o", "IdentitiesOnly=yes", "-i", hook.deploy_key] if hook.deploy_key else []
    remote = re.match(r"([a-z][a-z0-9+.-]*)(?:::|://)|[^/]+:", hook.git)  # or host:path, by ssh
    own = (remote[1] or "ssh") if remote else "file"
    above = os.path.dirname(os.path.realpath(cwd))
    return {b"GIT_SSH_COMMAND": os.fsencode(shlex.join(ssh)), b"LC_ALL": b"C",
            b"GIT_HTTP_LOW_SPEED_LIMIT": b"1", b"GIT_HTTP_LOW_SPEED_TIME": b"60",
            # Who may push chooses a submodule's URL: none may lead to an internal http service.
            b"GIT_ALLOW_PROTOCOL": f"https:ssh:{own}".encode(),
            # Without a repository here, git must not use one in a parent directory.
            b"GIT_CEILING_DIRECTORIES": os.fsencode(above)}


def ask_git(arguments: Sequence[str], environ: Mapping[bytes, bytes],
            cwd: str = "/") -> tuple[int, str, str]:
    """Return the exit status, the output and the errors of a quick git command."""
    with subprocess.Popen(
            ["git", *arguments], cwd=cwd, env=environ, encoding="utf-8", errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True) as child:
        try:
            output, errors = child.communicate(timeout=GIT_SECONDS)
        except subprocess.TimeoutExpired:
            signal_group(child.pid, signal.SIGKILL)  # git alone would leave its ssh
            return 1, "", "no answer in time"
    return child.returncode, output.strip(), errors


def advice(words: str) -> str:
    """Say what to do about git's or the system's words; empty where we know nothing."""
    return next((remedy for words_of, remedy in ADVICE.items() if re.search(words_of, words)), "")


def remote_refs(hook: Hook, repo: str, state: str, *kinds: str) -> dict[str, str]:
    """Ask a remote for its refs of kinds like --heads; return commit by ref; raise OSError."""
    environ = {**base_environment(hook, file_variables(hook).items()),
               **git_environment(hook, state)}
    remote = fill(hook.git, repo, "")
    code, output, errors = ask_git(["ls-remote", *kinds, "--", remote], environ)
    if code:
        first = next((line for line in errors.splitlines() if line[:8] != "Warning:"), "")
        raise OSError(redact(f"{remote}: {advice(errors) or first}", ()))
    return {line.partition("\t")[2]: line.partition("\t")[0] for line in output.splitlines()}


def break_locks(dot_git: str) -> None:
    """Remove the lock files of a killed git: under our lock, nobody else works here."""
    for folder, _, files in os.walk(dot_git):
        for name in files:
            if name.endswith(".lock"):
                os.unlink(os.path.join(folder, name))


def point(link: str, name: str) -> None:
    """Make a link lead to `name` by one rename(2), with all before it, and itself, on disk."""
    import ctypes
    folder = os.open(os.path.dirname(link), os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(folder)
        discard(f"{link}.new")
        os.symlink(name, f"{link}.new")
        os.rename(f"{link}.new", link)
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_tree(path: str) -> None:
    with contextlib.suppress(OSError):
        for folder, _, _ in os.walk(path):
            os.chmod(folder, 0o700)  # a build leaves some read-only, as Go's cache of modules
    shutil.rmtree(path, ignore_errors=True)


def ask_http(url: str, seconds: float, body: str = "", **headers: str) -> bytes:
    """GET a URL, or POST `body`; return the head of the answer; raise OSError or ValueError.

    `unix:/path:/url` asks a socket. The library's getresponse() would allow each byte `seconds`.
    """
    from http.client import HTTPConnection, HTTPSConnection
    from urllib.parse import quote, urlsplit
    unix, end, head = re.match("unix:([^:]+):", url), time.monotonic() + seconds, b""
    parts = urlsplit(f"http://localhost{url[unix.end():]}" if unix else url)
    connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    link = connect(parts.hostname or "", parts.port or connect.default_port,
                   timeout=seconds / 2)  # for each address: a name mostly has two, v6 and v4
    with contextlib.closing(link):
        if unix:
            link.sock = socket.socket(socket.AF_UNIX)
            link.sock.settimeout(seconds)
            link.sock.connect(unix[1])
        path = parts._replace(scheme="", netloc="", path=parts.path or "/", fragment="").geturl()
        link.request("POST" if body else "GET", quote(path, safe="/?%:@!$&'()*+,;=~"), body or None,
                     {"User-Agent": f"hookd/{VERSION}", **headers})
        while not re.search(rb"\n\r?\n", head) and len(head) < HEAD_MAX:
            link.sock.settimeout(max(end - time.monotonic(), 0.001))
            head += link.sock.recv(4096) or b"\r\n\r\n"  # at its end
    return re.split(rb"\n\r?\n", head)[0]


class Named(NamedTuple):
    """What a run deploys, once it is known."""

    job: "Job"
    commit: str
    subject: str


class Ended(NamedTuple):
    """How a job's thread ended."""

    job: "Job"
    outcome: Outcome
    seconds: float


class Job:
    """Carry out one run under its locks: `work` is a thread's root, `end` is for other threads.

    It hands Named and Ended to `tell`. With `run.owed` it only cleans up after a cut-off.
    Subclasses override `prepare` and `finish`.
    """

    def __init__(self, run: Run, hook: Hook, state: str, tell: Callable[[Any], None]) -> None:
        self.run, self.hook, self.state, self.tell = run, hook, state, tell
        self.payload: bytes = b""
        self.releases: Sequence[tuple[str, str]] = ()  # and the states of their runs, newest first
        self.held: set[int] = set()  # runs whose commits are held
        self.hidden: Sequence[str] = ()  # what the log shows as ***
        self.output: Any = None
        self.began = self.complaint = ""  # lines of the log: that it began, what held it up
        self.through = False  # it has ended, though the history may not know yet
        self.commit, self.subject = run.push.commit, run.push.subject
        self.directory = self.clone = self.cwd = run.target.directory
        self.current = f"{self.directory}/current"
        self.folder = run_file(state, run.id)  # with a slash at its end
        self.doing = f"its directory {self.directory}"  # what a dead disk could hold up
        self.since = time.monotonic()
        self.release = ""  # the one that it builds, or goes back to
        self.dropped: list[str] = []  # releases that it removed
        self.begun = self.changed = False  # a script has begun; what is deployed has changed
        self.goes_back = False  # to the release that was live before, whatever `end` says
        self.variables: Mapping[str, str] = {}  # of environment_file
        self.deadline = NEVER
        self.verdict: Optional[tuple[str, str]] = None  # state and why, unless it ends by itself
        self.locks: list[int] = []

    # ---- for the main thread

    def end(self, state: str, why: str) -> None:
        """Have the run end in `state`: its process group is ended within GRACE_SECONDS."""
        if not self.goes_back:
            self.verdict = self.verdict or (state, why)

    @property
    def push(self) -> Push:
        """The push with the commit that is deployed."""
        return self.run.push._replace(commit=self.commit, subject=self.subject)

    def quoted(self, outcome: Outcome) -> list[str]:
        """Return the last words of a run that failed, without secrets."""
        if not self.output or outcome.state not in ("failed", "timeout"):
            return []
        text = redact(self.output.tail.decode("utf-8", "replace"), self.hidden)
        return text[-4096:].splitlines()[-QUOTED_LINES:]

    def held_up(self) -> str:
        """Say what a run waits for that should have answered at once; "" where nothing."""
        late = time.monotonic() - self.since > STUCK_SECONDS
        return f"{self.doing} does not answer" if self.doing and late else ""

    # ---- a run from its beginning to its end

    def work(self) -> None:
        """Carry out the run: the root of its thread."""
        try:
            outcome = self.perform()
        except Exception:
            log.exception("a bug in hookd, in run %d; please report this", self.run.id)
            outcome = Outcome("failed", 1, "a bug in hookd; its log has it")
        for file in self.locks:
            fcntl.flock(file, fcntl.LOCK_UN)  # for the children that hold it, too
            os.close(file)
        self.tell(Ended(self, outcome, time.monotonic() - self.since))
        self.through = True  # not before: a stop may follow at once, and must not miss the end

    def perform(self) -> Outcome:
        """Take the locks, then do all that the hook says."""
        try:
            self.take_locks()
            os.makedirs(self.folder, 0o700, exist_ok=True)
            self.output = Output(f"{self.folder}output.log")
        except OSError as error:
            return Outcome("queued", 0, str(error), LOCK_SECONDS)
        log.info(self.began)
        with contextlib.closing(self.output):
            return self.settle() if self.run.owed else self.carry_out()

    def take_locks(self) -> None:
        """Take the run's locks; raise OSError, at once where one is held elsewhere."""
        real, push, lock = os.path.realpath(self.directory), self.run.push, self.hook.lock
        names = {real[: slash.start()] or "/": fcntl.LOCK_SH for slash in re.finditer("/", real)}
        names[real] = fcntl.LOCK_EX
        if lock:
            names["lock " + fill(lock, push.repo, push.ref)] = fcntl.LOCK_EX
        os.makedirs(f"{self.state}/locks", 0o700, exist_ok=True)
        for name, kind in names.items():
            digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
            file = private(f"{self.state}/locks/{digest}.lock", os.O_RDWR | os.O_CREAT)
            self.locks.append(file)
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(file, 256, 0).decode("utf-8", "replace").strip()
                raise BlockingIOError(f"the lock of {name} is held: {holder}") from None
            with contextlib.suppress(OSError):  # for people, who do without on a full disk
                text = os.fsencode(f"hookd {os.getpid()} run {self.run.id} {name}\n")
                os.ftruncate(file, os.pwrite(file, text, 0))

    def mark(self, name: str, text: str = "") -> None:
        """Leave a mark in the run's folder, for the start after a crash."""
        with open(f"{self.folder}{name}", "a", opener=private) as file:
            file.write(f"{text}\n")

    def marked(self, name: str) -> list[str]:
        """Return the texts of a mark."""
        with contextlib.suppress(OSError), open(f"{self.folder}{name}") as file:
            return file.read().splitlines()
        return []

    def carry_out(self) -> Outcome:
        """Deploy, go back where that failed behind the switch, run what follows."""
        self.deadline = time.monotonic() + self.hook.timeout
        outcome = self.guarded(self.deploy) or Outcome("ok")
        outcome = self.finish(outcome)
        if outcome.state == "queued":
            return outcome
        if outcome.state == "ok" and self.hook.git and self.commit:
            self.hold_commit()
        if outcome.note:
            self.say(f"{outcome.state}: {reason(outcome)}")
        if outcome.state in ("ok", "failed", "timeout"):
            self.afterwards(outcome)
        return outcome

    def guarded(self, part: Callable[[], Optional[Outcome]]) -> Optional[Outcome]:
        """Do a part of the run; what the system refuses ends it, or has it wait."""
        try:
            return part()
        except OSError as error:
            if isinstance(error, BlockingIOError) and not self.begun:
                return Outcome("queued", 0, "no room for one more process", 1.0)
            return Outcome("failed", 1, advice(str(error)) or str(error))

    def deploy(self) -> Optional[Outcome]:
        """Do all that `ok` stands for."""
        for name in ("begun", "switched"):  # of an attempt that was cut off
            discard(f"{self.folder}{name}")
        with open(f"{self.folder}payload.json", "wb", opener=private) as file:
            file.write(self.payload)
        self.payload = b""  # up to 25 MB, for as long as the run may take
        os.makedirs(self.directory, exist_ok=True)
        os.listdir(self.directory)  # block here on a dead disk, not in a child before exec
        self.read_environment()
        if self.run.push.deleted:
            return self.step("on_delete")
        return self.prepare() or self.go_live()

    def read_environment(self) -> None:
        self.doing = f"environment_file {self.hook.environment_file}"
        self.variables = file_variables(self.hook)
        self.doing = ""
        self.hidden = [*self.hidden, *lines("\n".join(self.variables.values()))]

    def prepare(self) -> Optional[Outcome]:
        """Make the directory what is to be deployed, and run `command` in it."""
        failure = self.fetch() if self.hook.git else None
        if self.hook.git and not failure:
            self.changed = True
            failure = self.git("checkout", CHECK_OUT)
        return failure or self.step("command")

    def go_live(self) -> Optional[Outcome]:
        """Activate what was deployed, then ask for its health once a second."""
        failure, answer = self.step("activate"), ""
        url, seconds = self.hook.healthcheck, self.hook.healthcheck_timeout
        until = time.monotonic() + seconds
        while url and not failure and not self.verdict:
            now = time.monotonic()
            if now >= until:
                return self.ending(1, f"healthcheck: {answer} after {seconds} s")
            try:
                head = ask_http(url, min(5.0, until - now))
                answer = head.partition(b"\r\n")[0].decode("latin-1")
            except (OSError, ValueError) as error:
                answer = f"no answer: {error}"
            if re.match(r"HTTP/1\.[01] 2[0-9][0-9]\b", answer):
                break
            time.sleep(max(min(now + 1, until) - time.monotonic(), 0))
        return failure or self.ending(0)

    def finish(self, outcome: Outcome) -> Outcome:
        """Clean up behind a deploy; return its outcome with what stands."""
        return outcome

    def settle(self) -> Outcome:
        """Do what a crash left to do: go back from a switch that was not confirmed, on_failure."""
        with contextlib.suppress(OSError):  # the scripts do what they can without it
            self.read_environment()
        outcome = self.finish(Outcome(self.run.state, 1, self.run.note))
        log.warning("run %d: %s: %s", self.run.id, outcome.note, self.run.push)
        if self.run.state == "interrupted" and self.run.owed == 1:
            self.afterwards(outcome)
        return outcome

    def afterwards(self, outcome: Outcome) -> None:
        """Run on_success or on_failure; its own failure is reported and changes nothing."""
        name = "on_success" if outcome.state == "ok" else "on_failure"
        seconds, self.verdict = time.monotonic() - self.since, None
        failure = self.guarded(lambda: self.step(
            name, STATE=outcome.state, EXIT=outcome.exit, DURATION=round(seconds),
            LOG=f"{self.folder}output.log", PREVIOUS_STATE=self.run.last_state,
            SUMMARY=summary(self.run._replace(push=self.push), outcome, seconds)))
        if failure:
            self.say(f"{name} failed: {reason(failure)}")
            log.warning("%s of run %d failed: %s: %s", name, self.run.id, reason(failure),
                        self.run.push)

    def say(self, text: str) -> None:
        self.output.write(f"hookd: {text}\n".encode("utf-8", "replace"))

    def ending(self, code: int, note: str = "") -> Optional[Outcome]:
        """Return how the run ends after a step that exited with `code`; None if it goes on."""
        if self.verdict:
            state, why = self.verdict
            return Outcome(state, 124 if state == "timeout" else code, why)
        return Outcome("failed", code, note) if code else None

    # ---- git

    def git(self, name: str, script: str, *arguments: str) -> Optional[Outcome]:
        """Let git work in the clone; what could not reach the remote is to be tried again."""
        environ = {**self.environment(), **git_environment(self.hook, self.state, self.clone)}
        failure = self.ending(self.child(GIT + script, environ, self.clone, *arguments), "failed")
        if not failure or failure.state not in ("failed", "timeout"):
            return failure
        words = self.output.tail[-4096:].decode("utf-8", "replace")
        causes = UNREACHABLE.findall(words)
        if failure.state == "timeout":
            causes.append("no answer in time")
        note = f"git {name}: {next(filter(None, [advice(words), *causes]), 'failed')}"
        failure = failure._replace(state="failed", note=note, unreachable=bool(causes))
        if causes and self.run.tries < len(RETRY_SECONDS):
            return failure._replace(state="queued", delay=RETRY_SECONDS[self.run.tries])
        return failure

    def ask(self, *arguments: str) -> Optional[str]:
        """Return the output of a quick git command in the clone; None where it fails."""
        environ = {**self.environment(), **git_environment(self.hook, self.state, self.clone)}
        code, output, _ = ask_git(arguments, environ, self.clone)
        return None if code else output

    def fetch(self) -> Optional[Outcome]:
        """Bring the commit to be deployed into the clone, and name it."""
        run, push = self.run, self.run.push
        remote, dot_git = fill(self.hook.git, push.repo, ""), f"{self.clone}/.git"
        have = self.ask("config", "--file", f"{dot_git}/config", "remote.origin.url")
        empty = os.listdir(self.clone) in ([], [".git"])
        if have != remote and (have or not empty):
            become = shlex.join(["git", "-C", self.clone, "config", "remote.origin.url", remote])
            fault = (f"{self.clone} is no clone of {remote}, but has {have or 'other files'}; set "
                     "another directory, empty this one, or have it become one, as hookd's user: "
                     + become)
            return Outcome("failed", 1, redact(fault, ()))
        break_locks(dot_git)
        tip = f"refs/hookd/tip/{slug(push.ref)}"
        checked = push.event == "workflow_run" and run.cause == "delivery"
        failure = self.git("fetch", FETCH, "" if have else remote, tip, run.goal)
        if checked:
            failure = failure or self.needless(push.commit, tip)
        return failure or self.name_commit(run.goal or (push.commit if checked else tip))

    def needless(self, commit: str, tip: str) -> Optional[Outcome]:
        """End a run whose commit passed its checks too late to be deployed."""
        def is_in(line: str) -> bool:
            return self.ask("merge-base", "--is-ancestor", commit, line) is not None

        stands = self.run.last_good
        if not is_in(tip):
            return Outcome("superseded", 0, f"the branch does not contain {commit[:7]} any more")
        if stands not in ("", commit) and is_in(stands):
            return Outcome("superseded", 0, f"what stands is newer: {stands[:7]}")
        return None

    def name_commit(self, name: str) -> Optional[Outcome]:
        """Learn and tell which commit is deployed; a missed push may ask to be skipped."""
        text = self.ask("log", "-1", "--format=%H%n%B", name, "--")
        if not text:
            return Outcome("failed", 1, f"git log: there is no commit {name}")
        self.commit, _, message = text.partition("\n")
        self.subject = first_line(message)
        self.tell(Named(self, self.commit, self.subject))
        words = [word for word in self.hook.skip if word in message]
        if words and self.run.cause == "catch-up":
            return Outcome("superseded", 0, f"passed over: its message has {words[0]}")
        return None

    def hold_commit(self) -> None:
        """Keep git from losing the commit: no forced push or clean-up takes the way back."""
        self.ask("update-ref", f"refs/hookd/{self.run.id}", self.commit)
        runs = self.ask("for-each-ref", "--format=%(refname:lstrip=2)", "refs/hookd/[0-9]*") or ""
        for run in {*map(int, runs.split())} - {*self.held, self.run.id}:
            self.ask("update-ref", "-d", f"refs/hookd/{run}")

    # ---- children

    def step(self, name: str, **facts: Any) -> Optional[Outcome]:
        """Run a script of the hook, if there is one; `facts` are what follows a run must know."""
        text = getattr(self.hook, name)
        if not text:
            return self.ending(0)
        if not facts:
            self.changed = self.changed or not self.hook.releases  # `switch` changes what is live
            self.mark("begun")  # a crash from here on counts as an attempt
        if name != "command":  # which shares its time with git
            self.deadline = time.monotonic() + self.hook.timeout
        # on_delete removes its directory; what follows must not run in the root directory.
        cwd = next(filter(os.path.isdir, (self.cwd, self.directory)), self.folder)
        text = f"ulimit -S -n {FILES_SOFT} 2> /dev/null; {text}"
        code, self.begun = self.child(text, self.environment(**facts), cwd), True
        return self.ending(code, "" if name == "command" or facts else f"{name} exited with {code}")

    def environment(self, **facts: Any) -> dict[bytes, bytes]:
        """Return what a child finds: hookd's own without private names, the hook's, HOOKD_*."""
        run, push, commit, release = self.run, self.run.push, self.commit, self.release
        if self.goes_back:
            commit, release = run.last_good, run.live
        facts = {
            "EVENT": push.event, "REPO": push.repo, "REF": push.ref, "RUN": run.id,
            "BRANCH": short_name(push.ref), "SLUG": slug(push.ref), "COMMIT": commit,
            "BEFORE": push.before, "PUSHER": push.pusher, "DELIVERY": run.delivery,
            "LAST_GOOD": run.last_good, "PAYLOAD": f"{self.folder}payload.json",
            "CAUSE": run.cause, "SUBJECT": self.subject, **facts}
        if self.hook.releases:
            path = f"{self.directory}/releases/{release or run.live}"
            facts.update(CURRENT=self.current, RELEASE=path)
        own = {f"HOOKD_{name}": str(fact) for name, fact in facts.items()}
        return base_environment(self.hook, {**self.variables, **own}.items())

    def child(self, script: str, environ: Mapping[bytes, bytes], cwd: str, *arguments: str) -> int:
        """Run a script to its end, or to the run's; return its exit status, 128+N for signal N."""
        with subprocess.Popen(
                ["/bin/sh", "-e", "-c", script, "sh", *arguments], cwd=cwd, env=environ,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=self.locks) as child:
            while child.poll() is None and not self.verdict:
                if time.monotonic() >= self.deadline:
                    self.verdict = "timeout", f"took longer than {self.hook.timeout}s"
                self.copy(child, 0.25)
            # Let the group end by itself, then TERM, then KILL it; signal 0 only asks.
            patience = 0.0 if self.verdict else 0.25  # for what is about to end by itself
            for number, seconds in ((0, patience), (signal.SIGTERM, GRACE_SECONDS),
                                    (signal.SIGKILL, GRACE_SECONDS)):
                until, left = time.monotonic() + seconds, signal_group(child.pid, number)
                while left and time.monotonic() < until:
                    self.copy(child, 0.0)
                    time.sleep(0.02)
                    child.poll()  # a zombie is left, too
                    left = signal_group(child.pid, 0)
                if not left:
                    break  # the group id may be reused
            self.copy(child, 0.0)  # once: a background child could hold the pipe open
        return child.returncode if child.returncode >= 0 else 128 - child.returncode

    def copy(self, child: "subprocess.Popen[bytes]", seconds: float) -> None:
        """Copy what a child prints; wait so long for it, or for the child's end."""
        pipe, poll = child.stdout.fileno(), select.poll()  # type: ignore[union-attr]
        poll.register(pipe, select.POLLIN)
        if poll.poll(seconds * 1000):
            data = os.read(pipe, CHUNK)
            self.output.write(data)
            if not data:  # closed; the child may go on for long
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(seconds)


class ReleaseJob(Job):
    """Carry out a run whose hook has `releases`: build beside the live one, switch, go back."""

    def live(self) -> str:
        """Return the release that `current` leads to, if any."""
        return os.path.basename(os.readlink(self.current)) if os.path.islink(self.current) else ""

    def prepare(self) -> Optional[Outcome]:
        """Build a release and switch to it; or switch to one that is kept."""
        if os.path.lexists(self.current) and not os.path.islink(self.current):
            return Outcome("failed", 1, f"{self.current} is no link; move it away")
        # Where the history knows none, what is live was another hook's, or a lost history's.
        self.run = self.run._replace(live=self.run.live or self.live())
        for folder in ("repo", "releases", "shared"):
            os.makedirs(f"{self.directory}/{folder}", exist_ok=True)
        releases, self.clone = f"{self.directory}/releases", f"{self.directory}/repo"
        self.release = self.run.release
        if self.release and os.path.isdir(f"{releases}/{self.release}"):
            return self.switch(self.release)
        attempt, self.release = self.run.attempts, ""
        while not self.release or os.path.lexists(f"{releases}/{self.release}"):
            attempt += 1
            self.release = f"{self.run.id}-{attempt}" if attempt > 1 else str(self.run.id)
        self.cwd = f"{releases}/{self.release}"
        return (self.fetch() or self.build() or self.share() or self.step("command")
                or self.switch(self.release))

    def build(self) -> Optional[Outcome]:
        """Check the commit out as a new release, whose objects are those of the clone."""
        self.mark("made", self.release)
        return self.git("checkout", BUILD)

    def share(self) -> Optional[Outcome]:
        """Link what all releases share into the new one; what is shared wins over the commit's."""
        for name in self.hook.shared:
            source, link = f"{self.directory}/shared/{name}", f"{self.cwd}/{name}".rstrip("/")
            if name.endswith("/"):
                os.makedirs(source, exist_ok=True)
            elif not os.path.exists(source):
                return Outcome("failed", 1, f"shared file {source} is missing; put it there")
            folder = os.path.realpath(os.path.dirname(link))  # it may be, or lie behind, a link
            if not f"{folder}/".startswith(f"{os.path.realpath(self.cwd)}/"):
                return Outcome("failed", 1, f"shared {name} leads out of the release by a link")
            if os.path.lexists(link):
                self.say(f"{name} is in the repository too; the shared one is used")
                linked = os.path.islink(link) or os.path.isfile(link)
                (discard if linked else remove_tree)(link)
            os.makedirs(folder, exist_ok=True)
            os.symlink(os.path.relpath(source, folder), link)
        return None

    def switch(self, release: str) -> Optional[Outcome]:
        """Make a release the live one, unless the run has to end."""
        if self.goes_back or not self.verdict:
            self.mark("switched", self.run.live)  # a crash from here on has to go back
            self.cwd, self.changed = self.current, True
            point(self.current, f"releases/{release}")
        return self.ending(0)

    def finish(self, outcome: Outcome) -> Outcome:
        """Go back where a switch was not confirmed, remove what is too old, say what stands."""
        if outcome.state not in ("ok", "superseded") and not outcome.delay:
            note = f"{outcome.note}; {self.go_back()}".lstrip("; ")
            outcome = outcome._replace(note=note)
        self.clean(outcome.state)
        return outcome

    def go_back(self) -> str:
        """Make the release that stood before a switch the live one again; return what stands."""
        switched = self.marked("switched")  # survives the loss of the database
        self.run = self.run._replace(live=self.run.live or "".join(switched[-1:]))
        live, commit = self.run.live, f" ({self.run.last_good[:7]})" if self.run.last_good else ""
        stands = f"release {live}{commit}" if live else "no release"
        # A power cut may leave the switch without its mark.
        unmarked = self.run.owed and live not in ("", self.live())
        if not switched and not unmarked:
            return f"{stands} stands"
        if not live or not os.path.isdir(f"{self.directory}/releases/{live}"):
            return f"nothing to go back to, release {self.live()} stays"
        self.say(f"going back to {stands}")
        self.goes_back, self.verdict = True, None
        failure = self.guarded(lambda: self.switch(live) or self.go_live())
        self.goes_back, self.verdict, self.changed = False, None, self.live() != live
        fault = failure.note if failure else ""
        if self.changed:
            return f"could not go back to {stands} ({fault}), release {self.live()} stays"
        discard(f"{self.folder}switched")
        return f"went back to {stands}, " + (f"but {fault}; it stays" if fault else "which stands")

    def clean(self, state: str) -> None:
        """Keep the newest good releases, the newest failed one, the live and the previous one."""
        if not os.path.isdir(f"{self.directory}/releases/{self.release}"):
            self.release = ""
        known = [pair for pair in [(self.release, state), *self.releases] if pair[0]]
        good = list(dict.fromkeys(name for name, how in known if how == "ok"))
        bad = [name for name, how in known if how in ("failed", "timeout")]
        keep = {*good[: self.hook.releases], *bad[:1], self.run.live, self.live()}
        for name in {*self.marked("made"), *(name for name, _ in self.releases)} - keep:
            remove_tree(f"{self.directory}/releases/{name}")
            self.dropped.append(name)


# ========================================================================================= HTTP
# Sockets only: bytes become whole requests, answers become bytes.
#
# One loop in one thread serves every connection, instead of http.server's thread or turn for each:
# two thousand slow senders then cost two thousand small buffers, not two thousand stacks, a
# stranger cannot use up the threads that runs need, and one deadline bounds a whole request. A
# connection still is a BaseHTTPRequestHandler, whose `handle` the loop calls when bytes have come.
#
# A request has REQUEST_SECONDS. All bodies together have `room` bytes; when these are used up the
# oldest unfinished one gives way, as the oldest connection does where there are too many. A genuine
# push is small and arrives quickly, so it is almost never the one dropped. What a client sends
# behind a request, before its answer, is thrown away, and the connection closed with that answer.

SSL_WANT_READ = 2  # ssl.SSL_ERROR_WANT_READ; ssl is imported only where it is used
LOOPBACK = re.compile(r"127\.|::1$|$")  # a unix socket's peer has no name
http_date = lru_cache(1)(partial(formatdate, usegmt=True))  # costs as much as the rest of an answer


def open_socket(wanted: str) -> socket.socket:
    """Bind and listen; raise OSError. A unix socket that a killed hookd left is replaced."""
    family: int = socket.AF_UNIX
    name: Any = wanted[5:]  # behind unix:
    try:
        if wanted.startswith("unix:"):
            with socket.socket(family) as probe:
                if probe.connect_ex(name) == errno.ECONNREFUSED:
                    os.unlink(name)
        else:
            host, _, port = wanted.rpartition(":")
            found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
            family, _, _, _, name = found[0]
        sock = socket.socket(family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(name)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        remedy = "stop the program that has it, or change listen" if taken else "change listen"
        raise OSError(f"cannot listen on {wanted}: {error.strerror or error}; {remedy}") from None
    if family == socket.AF_UNIX:
        os.chmod(name, 0o666)  # as accessible as 127.0.0.1; requests are signed
    sock.listen(4096)  # enough of a queue for a restart
    return sock


def bound_address(sock: socket.socket) -> str:
    name = sock.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"


def tls_context(config: Config) -> "Optional[ssl.SSLContext]":
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


class Connection(BaseHTTPRequestHandler):
    """One client connection: its socket, and what was received of its request so far.

    `headers` is a dict with names in lower case, `rfile` holds the body only, `wfile` the answer
    until it is sent in one piece. What reads from the socket as if it could wait is overridden.
    """

    server: "Server"  # type: ignore[assignment]
    request: socket.socket
    rfile: io.BytesIO
    protocol_version = request_version = "HTTP/1.1"  # the base's default answers without a head

    def setup(self) -> None:
        """Prepare; the base would make files of the socket, which keep its descriptor open."""
        self.clear()
        self.lingers = False  # accept no further request; discard input
        self.server.selector.register(self.request, selectors.EVENT_READ, self.handle)
        self.server.rearm(self)

    def finish(self) -> None:
        """Do nothing: the base's constructor calls this, and the connection goes on."""

    def clear(self) -> None:
        """Prepare for the next request."""
        self.start = bytearray()  # of a head that is not whole yet
        self.headers = None  # type: ignore[assignment]
        self.command = self.path = ""
        self.rfile = io.BytesIO()
        self.length = 0  # of the body

    @property
    def whole(self) -> bool:
        return self.headers is not None and self.rfile.tell() == self.length

    @property
    def begun(self) -> bool:
        return self.headers is not None or bool(self.start)

    def address_string(self) -> str:
        """Name the client: whoever a proxy on this machine says it is, else the peer."""
        peer: str = self.client_address[0]
        headers: Mapping[str, str] = self.headers or {}  # type: ignore[assignment]
        forwarded = headers.get("x-forwarded-for")
        if forwarded is None or not LOOPBACK.match(peer):
            return peer
        last = forwarded.rpartition(",")[2].strip()
        # What cannot be read as an address is one that is allowed nowhere.
        readable = re.fullmatch("[0-9A-Fa-f.:]{1,64}", last)
        return last.removeprefix("::ffff:") if readable else "unreadable"

    def handle(self) -> None:
        """Read what has come; the server calls this whenever something has."""
        try:
            # At least a record of TLS, 16 KB: data left inside TLS would not wake select().
            data = self.request.recv(CHUNK if self.headers is not None else HEAD_MAX)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, SSL_WANT_READ):
                self.server.drop(self)
            return
        try:
            refuse((not data and self.begun and not self.whole, 400, "request ended too early"))
            if data and not self.lingers:
                self.feed(data)
        except Refusal as refusal:
            self.server.refused(self, refusal)
        if not data:
            self.server.drop(self)

    def feed(self, data: bytes) -> None:
        """Add to what the client has sent; this may complete the head, then the body."""
        fresh = self.headers is None
        if fresh:
            if not self.start:
                self.server.rearm(self)
            self.start += data
            if not self.parse_request():
                return
            data, self.start = bytes(self.start), bytearray()
        body = data[: self.length - self.rfile.tell()]
        self.rfile.write(body)
        self.lingers = len(data) > len(body)
        self.server.make_room(self, len(body))
        if fresh and self.headers is not None:
            self.server.check(self, self.length)
            if self.headers.get("expect", "").lower() == "100-continue" and not body:
                with contextlib.suppress(OSError):
                    self.request.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.whole:
            self.server.ready.append(self)

    def parse_request(self) -> bool:
        """Take a head off `start` once it is whole; refuse it as soon as it cannot become valid."""
        # The base's own costs eight times as much, and reads a bare CR, a missing colon and a space
        # before one otherwise than RFC 9112.
        start = self.start
        end = start.find(b"\r\n\r\n", 0, HEAD_MAX + 4)
        line, newline, _ = bytes(start[: LINE_MAX + 1]).partition(b"\r\n")
        match = REQUEST_LINE.fullmatch(line)
        refuse((not newline and len(start) > LINE_MAX, 414, "request line too long"),
               ((newline and not match) or b"\n" in line or not line[:1].isalpha(), 400,
                "not HTTP/1.1 (TLS on a plain port?)"),
               (end < 0 and len(start) > HEAD_MAX, 431, "request head too large"))
        if match:
            self.command, self.path = match[1].decode(), match[2].decode()
        if not match or end < 0:
            return False
        headers = read_headers(bytes(start[len(line) + 2 : end]))
        self.length = body_length(self.command, headers)
        self.headers = headers  # type: ignore[assignment]
        wish = headers.get("connection", "").lower()
        self.close_connection = "close" in wish
        if match[3] == b"0":
            self.close_connection = wish != "keep-alive"
        del start[: end + 4]
        return True

    def answer(self, status: int, text: str) -> None:
        """Answer in one write, then keep, close or linger: an unread body is never a request."""
        self.lingers |= not self.whole
        keep = not (self.lingers or self.close_connection) and self.server.listeners
        body = b"" if self.command == "HEAD" else f"{text}\n".encode()
        self.wfile = io.BytesIO()
        self.send_response_only(status)
        self.send_header("Date", http_date(int(time.time())))
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if status == 405:
            self.send_header("Allow", "POST")
        if not keep:
            self.send_header("Connection", "close")
        self.end_headers()
        data, sent = self.wfile.getvalue() + body, 0
        self.server.forget(self)
        with contextlib.suppress(OSError):  # a peer with no room for these few bytes does not read
            sent = self.request.send(data)
            if self.lingers:  # closing with unread input sends RST, which may discard the answer
                self.request.shutdown(socket.SHUT_WR)
        if sent < len(data) or not (keep or self.lingers):
            self.server.drop(self)
        elif keep:
            self.server.rearm(self)


class Server:
    """Serve HTTP; callers call `poll` and give each whole request an `answer` before the next.

    `check` refuses a head before its body is read; `refused` is to answer each Refusal.
    """

    def __init__(self, check: Callable[[Connection, int], None],
                 refused: Callable[[Connection, Refusal], None]) -> None:
        self.check, self.refused = check, refused
        self.selector = selectors.DefaultSelector()  # its keys hold what is to be called
        self.listeners: list[socket.socket] = []
        self.tls: Optional[ssl.SSLContext] = None
        self.room, self.held, self.most = BODIES_MAX, 0, CONNECTIONS_MAX
        # In the order of deadlines: a connection that gets a new one moves to the end.
        self.connections: dict[Connection, float] = {}
        self.ready: list[Connection] = []

    def listen(self, listeners: Sequence[socket.socket]) -> None:
        """Accept on these sockets from now on, and on no others."""
        for old in self.listeners:
            self.selector.unregister(old)
        self.listeners = list(listeners)
        for new in listeners:
            new.setblocking(False)
            self.selector.register(new, selectors.EVENT_READ, partial(self.accept, new))

    def poll(self, timeout: float) -> list[Connection]:
        """Wait for something to happen; return the connections whose requests are whole now."""
        now = time.monotonic()
        while self.connections:
            oldest, deadline = next(iter(self.connections.items()))
            if deadline > now:
                timeout = min(timeout, deadline - now)
                break
            if oldest.begun and not oldest.lingers:
                self.refused(oldest, Refusal(408, "request took too long"))
            self.drop(oldest)
            timeout = 0.0  # what the caller waits for may be another now
        for key, _ in self.selector.select(max(min(timeout, 86400.0), 0.0)):  # 25 days are refused
            key.data()
        ready, self.ready = self.ready, []
        return [connection for connection in ready if connection.whole]

    def accept(self, listener: socket.socket) -> None:
        """Take new connections, dropping the one closest to its deadline where there is no room."""
        for _ in range(100):  # then serve the existing connections
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
                        time.sleep(0.1)  # the pending connection would wake select() at once
                return
            if len(self.connections) >= self.most:
                self.drop(next(iter(self.connections)))
            host = peer[0] if isinstance(peer, tuple) else ""
            Connection(sock, (host.removeprefix("::ffff:"), 0), self)  # type: ignore[arg-type]

    def rearm(self, connection: Connection) -> None:
        self.connections.pop(connection, None)
        self.connections[connection] = time.monotonic() + REQUEST_SECONDS

    def make_room(self, connection: Connection, more: int) -> None:
        """Count what came of a body; the oldest unfinished ones give way where there is no room."""
        self.held += more
        if self.held <= self.room:
            return
        unfinished = [other for other in self.connections if not other.whole]
        for oldest in (*unfinished, connection):
            if self.held > self.room and oldest.rfile.tell():
                self.refused(oldest, Refusal(503, "too much in flight, send it again later"))

    def forget(self, connection: Connection) -> None:
        """Free the room that a request takes."""
        self.held -= connection.rfile.tell()
        connection.clear()

    def drop(self, connection: Connection) -> None:
        if connection in self.connections:
            self.forget(connection)
            connection.lingers = True
            del self.connections[connection]
            self.selector.unregister(connection.request)
            connection.request.close()


# ============================================================================== systemd and log
# What hookd shares with the machine it runs on. A stuck syslog or terminal must not delay a
# delivery: a line that cannot be written at once is dropped, and counted in the next.


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
    """Write to the syslog at `path`, else to stderr; unlike SysLogHandler, wait for neither."""

    def __init__(self, path: str, stderr: bool) -> None:
        super().__init__()
        self.path, self.stderr, self.lost = path, stderr, 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, its traceback in the same line, with control characters escaped."""
        lost = f" (lost {self.lost} lines before this one)" if self.lost else ""
        text = escape(self.format(record) + lost)
        priority = {"INFO": 30, "WARNING": 28}.get(record.levelname, 27)  # of daemon.*, syslog(3)
        self.lost += 1
        with contextlib.suppress(OSError):
            if self.path and datagram(self.path, 0, f"<{priority}>hookd[{os.getpid()}]: {text}"):
                self.lost = 0
            elif self.stderr and select.select([], [2], [], 0)[1]:
                line = f"{logging.Formatter().formatTime(record)} {record.levelname}: {text}"
                room = select.PIPE_BUF - 1  # a pipe has as much (pipe(7))
                os.write(2, line.encode("utf-8", "replace")[:room] + b"\n")
                self.lost = 0


def open_log(wanted: str, syslog: str = "/dev/log") -> None:
    """Send the log where the ini says; `auto` is stderr on a terminal, else what answers."""
    terminal = wanted == "stderr" or (wanted == "auto" and sys.stderr.isatty())
    log.addHandler(LogHandler("" if terminal else syslog, wanted != "syslog"))
    log.setLevel(logging.INFO)


class Noise:
    """Log a refusal of each kind once a minute at most, with how many were not logged."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[float, int]] = {}  # until when each is silent; how many were

    def add(self, refusal: Refusal, client: str) -> None:
        kind, now = f"{refusal.reason} status={refusal.status}", time.monotonic()
        until, silent = self.kinds.get(kind, (0.0, 0))
        if now < until:
            self.kinds[kind] = until, silent + 1
            return
        more = f" (and {silent} more since the last such line)" if silent else ""
        log.warning("refused a request: %s client=%s%s", kind, client or "unix", more)
        self.kinds[kind] = now + NOISE_SECONDS, 0


def passed_count() -> int:
    """Return how many sockets systemd passed, from descriptor 3 on (sd_listen_fds(3))."""
    ours = os.environ.get("LISTEN_PID") == str(os.getpid())
    return int(os.environ.get("LISTEN_FDS", "0")) if ours else 0


def passed_sockets() -> dict[str, list[socket.socket]]:
    """Take the listening sockets that systemd passed, by name."""
    found: dict[str, list[socket.socket]] = {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":") + [""] * passed_count()
    for number, name in zip(range(3, 3 + passed_count()), names):
        os.set_inheritable(number, False)
        found.setdefault(name, []).append(socket.socket(fileno=number))
    return found


def secret_path(name: str) -> str:
    """Return where a secret file is: among systemd's credentials, if it is there, or as it says."""
    unit = "/run/credentials/hookd.service"  # for the verbs; ExecReload= sees it through the daemon
    for folder in (os.environ.get("CREDENTIALS_DIRECTORY") or unit,
                   f"/proc/{os.environ.get('MAINPID', 'self')}/root{unit}"):
        path = os.path.join(folder, os.path.basename(name))
        if os.path.exists(path):
            return path
    return name


def hidden_words(config: Config) -> list[str]:
    """Return what is shown as ***: the secrets, tokens and environment files of an ini, as text."""
    found, files = [], {f"{config.state}/secret"}
    for values in config.levels.values():
        found += [*lines(values.get("secret", "")), values.get("report_token", "")]
        files |= {secret_path(os.path.join(config.base, values[name]))
                  for name in ("secret_file", "report_token_file", "environment_file")
                  if values.get(name)}
    for path in filter(os.path.isfile, files):  # a FIFO might never end
        with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
            text = file.read(CHUNK).decode("utf-8", "replace")
            found += lines(text)
            found += lines("\n".join(read_variables(text).values()))  # output is shown line by line
    return found


# ============================================================================= reports and page
# What hookd shows elsewhere: commit statuses, the page, badges, metrics. Nothing here touches the
# database or a run.
#
# A forge or a disk may be slow for ever, so the main thread asks neither. A dead forge delays
# other reports, never a run or the page. A report that is not sent yet is still in the outbox.
#
# A page cannot know that hookd died after writing it. So it says when it was written, and hookd
# rewrites it every minute even where nothing changes.

REPORT_SECONDS = 15.0  # for one try
REPORT_DELAYS = (0.0, 1.0, 10.0, 60.0, 300.0)  # before each try
PAGE_SECONDS = 60.0
RIGHTS = ('it needs from GitHub "Commit statuses: write" (fine-grained) or repo:status (classic), '
          "from Gitea or Forgejo write:repository")
REMEDIES = {401: "the forge does not know the token; it may have expired: make a new one",
            403: f"the token may not report on this repository; {RIGHTS}",
            404: f"there is no such repository for this token; {RIGHTS}",
            422: "the forge refuses a status for this commit; is it in this repository?"}
SIGNS = {"ok": "✓", "failed": "✗", "timeout": "✗", "running": "▸", "queued": "…"}
BADGE_COLOURS = {"ok": "#23693b", "failed": "#ab2f27", "timeout": "#ab2f27"}
BADGE_MARK = "<!-- a badge of hookd --></svg>\n"  # what lacks it is not ours to remove
Facts = dict[str, Any]  # an object of `status --json`


@dataclass(frozen=True)
class Report:
    """One commit status; the outbox keeps it until it was sent or given up."""

    id: int
    api: str
    token: str = field(repr=False)
    repo: str
    commit: str
    body: Mapping[str, str]


class Snapshot(NamedTuple):
    """What the page shows, redacted; `up` is False for the page that a stop leaves behind."""

    now: float
    up: bool
    targets: Sequence[Facts]
    runs: Sequence[Sequence[Facts]]  # of each target, the newest first
    totals: Sequence[tuple[str, str, str, int, float]]  # repo, branch, state, runs, last ended
    output: Mapping[int, str]  # by run


def send_report(report: Report) -> tuple[str, float]:
    """Try once; return the fault, never with the token, and the least wait before a retry.

    The fault is "" where there is none; the wait is NEVER where a retry is of no use.
    """
    url = f"{report.api.rstrip('/')}/repos/{report.repo}/statuses/{report.commit}"
    # GitHub, Gitea and Forgejo all take the word "token".
    headers = {"Authorization": f"token {report.token}", "Content-Type": "application/json"}
    try:
        head = ask_http(url, REPORT_SECONDS, json.dumps(report.body), **headers)
    except OSError as error:
        return f"no answer: {error.strerror or error}", 0.0
    except ValueError:  # whose text has the token
        return "the token has a character that no request can carry; copy it again", NEVER
    match = re.match(rb"HTTP/1\.[01] ([2-5][0-9][0-9])\b", head)
    if not match:
        return "what answers does not speak HTTP", 0.0
    status = int(match[1])
    if status < 300:
        return "", NEVER
    if status in (408, 429) or status >= 500:
        after = re.search(rb"(?i)\nretry-after:[ \t]*([0-9]{1,9})[ \t]*(\r|$)", head)
        return f"the forge answers {status}", min(float(after[1]), 3600.0) if after else 0.0
    return f"{status}, {REMEDIES.get(status, 'is report_api right?')}", NEVER


def token_fault(api: str, token: str, repo: str) -> str:
    """Ask for a status of a commit that cannot exist; return why reports cannot be shown, or "".

    Forges judge the token first; then GitHub answers 422, Gitea 500.
    """
    body = {"state": "error", "context": "hookd/check"}
    fault, _ = send_report(Report(0, api, token, repo, "0" * 40, body))
    return "" if fault.startswith(("422", "the forge answers 500")) else fault


def mark_up(text: str) -> str:
    """Make strangers' text plain in HTML: no markup, no control character, isolated direction."""
    return f"<bdi>{html.escape(escape(text))}</bdi>"


def ago(at: float, now: float) -> str:
    """Say how long ago, by the largest unit of which there are two: `3 days ago`."""
    seconds = int(max(now - at, 0))
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return "1 second ago" if seconds == 1 else f"{seconds} seconds ago"


def moment(at: float, now: float = 0.0) -> str:
    """Return a <time> whose title is exact: how long before `now`, or without it the date."""
    exact = time.strftime("%d %B %Y, %H:%M:%S %Z", time.localtime(at)).lstrip("0")
    iso, words = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)), ago(at, now)
    return f'<time datetime="{iso}" title="{exact}">{words if now else exact}</time>'


def item_html(facts: Facts, link: str, output: str, now: float, *notes: tuple[str, Any]) -> str:
    """Return a run, or with a link a target, with those notes whose value is known."""
    state = facts["state"] or ("running" if facts["running"] else "queued")
    sign, anchor = SIGNS.get(state, "–"), "" if link else f' id="run-{facts["run"]}"'
    commit, subject = mark_up((facts["commit"] or "")[:7]), mark_up(facts["subject"] or "")
    known = [words.format(mark_up(value) if isinstance(value, str) else value)
             for words, value in notes if value not in (None, "")]
    text = html.escape("\n".join(map(escape, output.expandtabs().splitlines())))
    details = f"<details><summary>Output</summary><pre>{text}</pre></details>" if text else ""
    at = facts["ended"] or facts["began"] or facts.get("queued")
    return (f'<li{anchor}><b class="{state}"><i aria-hidden="true">{sign}</i> {state}</b>'
            f"<div>{link}<p><code>{commit}</code> {subject}</p>"
            f"<p class=soft>{' · '.join(known)}</p>{details}</div>"
            f"{moment(at, now) if at else ''}</li>")


def target_html(target: Facts, runs: Sequence[Facts], shown: Snapshot) -> tuple[str, str]:
    """Return a target's line in the overview, with a link to its newest run, and its runs."""
    running, waiting = target["running"], target["waiting"]
    now = shown.now if shown.up else 0.0  # relative times would go stale
    name = re.sub("^refs/(heads/)?", "", target["ref"])
    place = f"{mark_up(target['repo'])} {mark_up(name)}"
    link = f'<a href="#run-{max(target["run"] or 0, running or 0, *waiting)}">{place}</a>'
    line = item_html(target, link, "", now, ("run {} is running", running),
                     ("{} waiting", len(waiting) or None), ("paused: {}", target["paused"]))
    items = [item_html(
        run, "", shown.output.get(run["run"], ""), now, ("run {}", run["run"]),
        ("{}", run["cause"] or run["event"]), ("by {}", run["pusher"]),
        ("took {:.0f} s", run["duration"]), ("exit {}", run["exit"] or None), ("{}", run["note"]))
        for run in runs]
    return line, "\n".join([f"<h2>{place}</h2><ol>", *items, "</ol>"])


def page_html(snapshot: Snapshot) -> str:
    """Build index.html: no script, nothing from elsewhere; what is not ok comes first."""
    ended = [target["state"] for target in snapshot.targets if target["state"]]
    good = ended.count("ok")
    state = "ok" if snapshot.up and good == len(ended) else "failed"
    words = f"{good} of {len(ended)} targets ok" if ended else "No run has ended yet"
    meaning = "Rewritten every minute: if this is older, hookd is not running."
    if not snapshot.up:
        words, meaning = "hookd is stopped", "Nothing is deployed until it is started again."
    pairs = sorted(zip(snapshot.targets, snapshot.runs),
                   key=lambda pair: pair[0]["state"] in (None, "ok"))
    parts = [target_html(target, runs, snapshot) for target, runs in pairs]
    return PAGE.substitute(
        sign=SIGNS[state], state=state, words=words, meaning=meaning, written=moment(snapshot.now),
        colour="%2323693b" if state == "ok" else "%23ab2f27",
        overview="\n".join(line for line, _ in parts), runs="\n".join(runs for _, runs in parts))


PAGE = string.Template("""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$sign $words - hookd</title>
<link rel="icon" href="data:image/svg+xml,<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'
><circle cx='4' cy='4' r='4' fill='$colour'/><text x='4' y='6' font-size='6' fill='white'
 text-anchor='middle'>$sign</text></svg>">
<style>
:root { --paper: #fdfcfa; --ink: #24262a; --soft: #62666e; --ok: #23693b; --bad: #ab2f27;
  --odd: #7d5400 }
@media (prefers-color-scheme: dark) { :root { --paper: #17181b; --ink: #e3e2de; --soft: #9a9ea6;
  --ok: #7fcb98; --bad: #f2958b; --odd: #dfb562 } }
* { margin: 0; padding: 0; box-sizing: border-box }
body { font: 1rem/1.5 system-ui, sans-serif; background: var(--paper); color: var(--ink);
  max-width: 50rem; margin: auto; padding: 3rem 1.25rem; overflow-wrap: anywhere }
h1 { font-size: 1.75rem }
h2, ul { font-size: 1rem; margin: 2.5rem 0 .75rem }
a { color: inherit; font-weight: 600; text-underline-offset: .25em }
li { display: grid; grid-template-columns: 7rem 1fr auto; column-gap: 1rem; padding: .75rem 0;
  border-top: 1px solid #8884; scroll-margin-top: 5rem }
li:target { background: #8882 }
b { color: var(--odd); font-weight: 400 }
i { font-style: normal; display: inline-block; width: 1.1em }
.ok { color: var(--ok) }
.failed, .timeout { color: var(--bad) }
.soft, time, summary, code, pre { color: var(--soft); font-size: .875rem }
pre { white-space: pre-wrap; padding: .25rem 0 .25rem 1rem }
@media (max-width: 36rem) { li { grid-template-columns: 1fr auto }
  li div { grid-area: 2 / 1 / auto / -1 } }
</style>
<main><h1><b class="$state"><i aria-hidden="true">$sign</i></b> $words</h1>
<p class=soft>Written $written. $meaning</p>
<ul>$overview</ul>
$runs</main></html>
""")


def badge_svg(target: Facts) -> str:
    """Build a badge: a branch, and how its last run ended."""
    state, name = target["state"] or "no run yet", escape(target["branch"][:40])
    left, right = 7 * len(name), 7 * len(state)  # textLength makes any font fit
    title = html.escape(escape(f"{target['repo']} {name}: {state}"))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right + 24}" height="20"
 role="img" aria-label="{title}"><title>{title}</title>
<rect width="100%" height="20" fill="{BADGE_COLOURS.get(state, '#7d5400')}"/>
<rect width="{left + 12}" height="20" fill="#4a4d52"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="6" y="14" textLength="{left}" lengthAdjust="spacingAndGlyphs">{html.escape(name)}</text>
<text x="{left + 18}" y="14" textLength="{right}">{state}</text></g>{BADGE_MARK}"""


def metrics_text(snapshot: Snapshot) -> str:
    """Build metrics.prom; of several targets of a branch, the one with the newest run counts."""
    newest = sorted(snapshot.targets, key=lambda target: target["run"] or 0)
    targets = {(one["repo"].lower(), one["branch"]): one for one in newest}
    good = {total[:2]: total[4] for total in snapshot.totals if total[2] == "ok"}
    metrics: tuple[tuple[str, str, str, Mapping[Any, Any]], ...] = (
        ("up", "gauge", "1 while hookd runs, 0 once it was stopped", {(): int(snapshot.up)}),
        ("page_written_timestamp_seconds", "gauge", "When hookd, if up, last wrote this",
         {(): round(snapshot.now, 3)}),
        ("runs_total", "counter", "Runs by how they ended",
         {total[:3]: total[3] for total in snapshot.totals}),
        ("last_run_duration_seconds", "gauge", "How long the last run took",
         {place: one["duration"] for place, one in targets.items()}),
        ("last_success_timestamp_seconds", "gauge", "When the last run that was ok ended",
         {place: good.get(place) for place in targets}),
        ("waiting", "gauge", "Waiting runs",
         {place: len(one["waiting"]) for place, one in targets.items()}),
        ("paused", "gauge", "1 while the branch is paused",
         {place: int(one["paused"] is not None) for place, one in targets.items()}))
    text = ""
    for name, kind, words, values in metrics:
        text += f"# HELP hookd_{name} {words}\n# TYPE hookd_{name} {kind}\n"
        for place, value in values.items():
            labels = ",".join(f"{label}={json.dumps(said, ensure_ascii=False)}"
                              for label, said in zip(("repo", "branch", "state"), place))
            where = f"{{{labels}}}" if place else ""
            text += "" if value is None else f"hookd_{name}{where} {value}\n"
    return text


def replace_file(path: str, text: str) -> None:
    """Replace a file by a rename, unless it says the same already."""
    data = text.encode("utf-8", "replace")
    with contextlib.suppress(OSError), open(path, "rb") as file:
        if file.read() == data:
            return
    discard(f"{path}.new")
    with open(f"{path}.new", "xb") as file:  # which follows no link
        file.write(data)
    os.replace(f"{path}.new", path)


def write_page(directory: str, snapshot: Snapshot) -> None:
    """Replace what changed in a directory, remove stale badges; raise OSError."""
    os.makedirs(directory, exist_ok=True)
    replace_file(f"{directory}/status.json", json.dumps(snapshot.targets, indent=1) + "\n")
    replace_file(f"{directory}/metrics.prom", metrics_text(snapshot))
    badges = {f"{directory}/badge/{target['repo']}/{slug(target['ref'])}.svg": badge_svg(target)
              for target in sorted(snapshot.targets, key=lambda target: target["run"] or 0)}
    for path, text in badges.items():
        os.makedirs(os.path.dirname(path), exist_ok=True)
        replace_file(path, text)
    replace_file(f"{directory}/index.html", page_html(snapshot))
    for stale in set(glob.glob(f"{glob.escape(directory)}/badge/*/*/*.svg")) - badges.keys():
        with open(stale, "rb") as file:
            ours = file.read(CHUNK).endswith(BADGE_MARK.encode())
        if ours:
            os.unlink(stale)


def start_thread(work: Callable[..., None], *arguments: Any) -> Optional[threading.Thread]:
    """Start a thread that dies with the process; None where there is no room for it."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    with contextlib.suppress(RuntimeError):
        thread.start()
        return thread
    return None


def note_fault(known: dict[str, set[str]], what: str, done: str, fault: str) -> None:
    """Log each fault of something once, until it works again: then the fault is ""."""
    if fault and fault not in known.setdefault(what, set()):
        known[what].add(fault)
        log.warning("%s cannot be %s: %s", what, done, fault)
    elif not fault and known.pop(what, set()):
        log.info("%s can be %s again", what, done)


class Messenger:
    """Send reports and hand each to `done`; call `write` for the page. Each has a thread."""

    def __init__(self, done: Callable[[Report], None], write: Callable[[], None]) -> None:
        self.done, self.write = done, write
        self.reports: SimpleQueue[Optional[Report]] = SimpleQueue()
        self.changed, self.closing = threading.Event(), threading.Event()
        self.threads: dict[Callable[[], None], Optional[threading.Thread]] = {}
        self.faults: dict[str, set[str]] = {}

    def send(self, report: Report) -> None:
        self.reports.put(report)
        self.start(self.deliver)

    def show(self) -> None:
        """Have the page written, soon."""
        self.changed.set()
        self.start(self.paint)

    def start(self, work: Callable[[], None]) -> None:
        """Start a thread once; where there is no room for it, the next call does."""
        self.threads[work] = self.threads.get(work) or start_thread(work)

    def close(self, seconds: float) -> None:
        """Send what is left and write the page a last time; wait for that so long at most."""
        until = time.monotonic() + seconds
        self.closing.set()
        self.changed.set()
        self.reports.put(None)
        for thread in filter(None, self.threads.values()):
            thread.join(max(until - time.monotonic(), 0.0))

    def deliver(self) -> None:
        """Send the reports in their order: the root of a thread."""
        for report in iter(self.reports.get, None):
            fault, wait = "", 0.0
            try:
                for delay in REPORT_DELAYS:
                    if wait < NEVER:
                        time.sleep(max(delay, wait))
                        fault, wait = send_report(report)
                note_fault(self.faults, f"a report on {report.repo} to {report.api}", "sent", fault)
                self.done(report)
            except Exception:
                log.exception("a bug in hookd, in a report; please report this")

    def paint(self) -> None:
        """Write the page at most once a second, at least once a minute: the root of a thread."""
        closing = False
        while not closing:
            self.changed.wait(PAGE_SECONDS)
            self.changed.clear()
            closing, began, fault = self.closing.is_set(), time.monotonic(), ""
            try:
                self.write()
            except (OSError, sqlite3.Error, ConfigError) as error:
                fault = str(error)
            except Exception:
                log.exception("a bug in hookd, in the page; please report this")
            note_fault(self.faults, "the page", "written", fault)
            # Limit rendering to about 5 percent of a processor.
            self.closing.wait(max(1.0, 20 * (time.monotonic() - began)))


# ===================================================================================== decisions
# The scheduler: what happened comes in as small named values, one transaction applies them and
# chooses what begins, and what follows goes out as small named values, after the commit. No socket,
# thread or process: a test feeds values to `turn` and reads values and rows.


class Delivered(NamedTuple):
    """A signed delivery that a hook takes, and the connection that waits for its answer."""

    connection: Any
    delivery: str
    decision: Decision


class Found(NamedTuple):
    """The branches of a remote, as catch-up found them."""

    hook: Hook
    repo: str
    heads: Mapping[str, str]


class Answer(NamedTuple):
    """Answer a delivery."""

    connection: Any
    delivery: str
    status: int
    text: str


class End(NamedTuple):
    """Cancel a running run."""

    run: int
    why: str


class Done(NamedTuple):
    """Let go of a job whose end is on disk, and of the files of runs that are forgotten."""

    job: Job
    forgotten: Sequence[int]


class Line(NamedTuple):
    """Write a line of the log."""

    level: int
    text: str


Event = Union[Delivered, Named, Ended, Found, Report]  # a Report that was sent, or given up
Effect = Union[Answer, Job, End, Done, Line, Report]  # a Job to begin, a Report to send
REPORTED = {"pending": "pending", "ok": "success", "failed": "failure", "timeout": "failure"}


class Dispatcher:
    """Apply events to the store and choose what begins; callers call `recover`, then `turn`.

    `tell` is what a job's thread calls with Named and Ended.
    """

    def __init__(self, config: Config, store: Store, tell: Callable[[Any], None]) -> None:
        self.config, self.store, self.tell = config, store, tell
        self.handed = 0  # the newest row of the outbox that was handed on
        self.steps: Mapping[type, Callable[[Any], Iterator[Effect]]] = {
            Delivered: self.delivered, Named: self.named, Ended: self.ended, Found: self.found,
            Report: self.reported}

    def turn(self, events: Sequence[Event], begins: bool) -> list[Effect]:
        """Apply events and, with `begins`, start what can begin; raise what the database raises."""
        effects: list[Effect] = []
        with self.store.transaction():
            for event in events:
                effects += self.guarded(self.steps[type(event)](event), event)
            effects += self.guarded(self.follow(begins))
        handed = [effect.id for effect in effects if isinstance(effect, Report)]
        self.handed = max([self.handed, *handed])  # only now: a failed commit frees their numbers
        return effects

    def guarded(self, step: Iterator[Effect], event: Optional[Event] = None) -> list[Effect]:
        """Take one step; one that raises is undone alone, logged and dropped."""
        try:
            with self.store.savepoint():
                return list(step)
        except (sqlite3.Error, OSError, ConfigError):
            raise
        except Exception:
            log.exception("a bug in hookd; it goes on, please report this")
            if isinstance(event, Delivered):
                return [Answer(event.connection, event.delivery, 500, "a bug in hookd")]
            return [Done(event.job, ())] if isinstance(event, Ended) else []

    def follow(self, begins: bool) -> Iterator[Effect]:
        """Yield what follows from all events together, and from what verbs have written."""
        sql = "SELECT id, wish FROM runs WHERE state = 'running' AND wish != ''"
        for number, wish in self.store.execute(sql).fetchall():
            yield End(number, wish)
        if begins:
            yield from self.settle()  # a crash's leftovers come first
            yield from self.begin()
        yield from self.outbox()

    def hook(self, run: Run) -> Optional[Hook]:
        return self.config.hooks.get(run.target.hook)

    # ---- deliveries and catch-up

    def delivered(self, event: Delivered) -> Iterator[Effect]:
        """Queue a push, or say why not."""
        (status, text, hook, push, payload, signature), store = event.decision, self.store
        if hook is None or push is None:
            raise TypeError("a delivery that no hook takes")
        target = store.target(hook, push.repo, push.ref)
        late = store.is_late(target, push, signature)
        if not late:
            store.see(target.id, push.ref, push.commit)
        # With git, a branch's late push deploys the newest commit all the same.
        deploys_tip = hook.git and target.ref and push.event == "push" and not push.deleted
        if late and not deploys_tip:
            status, text = 200, f"ignored: {push.place} had a newer push already"
        elif status == 202:
            if not late:
                store.take(target, push, signature)
            if push.deleted:
                self.delete(hook, target, push.ref)
            if push.deleted and not hook.on_delete:
                status, text = 200, f"ignored: {push.place} was deleted"
            else:
                text = self.enqueue(hook, target, push, payload, event.delivery)
        yield Answer(event.connection, event.delivery, status, text)

    def enqueue(self, hook: Hook, target: Target, push: Push, payload: bytes,
                delivery: str) -> str:
        """Put a push into the queue; return the answer, good once it is committed."""
        store = self.store
        number = store.add(target, push, "delivery", hook, payload=payload, delivery=delivery)
        why = store.paused(number)
        ends = hook.queue == "replace" and why is None
        replaced = store.supersede(hook, target.id, push.ref, ends)
        place = "".join(f", in place of run {old}" for old in replaced)
        held = "" if why is None else f"; paused: {escape(why)}"
        return f"queued run {number}: {push}{place}{held}"

    def delete(self, hook: Hook, target: Target, ref: str) -> None:
        """Cancel what waits for a branch that is no more, and lift its pauses."""
        store = self.store
        sql = "SELECT id FROM runs WHERE target = ? AND ref = ? AND state = 'queued'"
        for (number,) in store.execute(sql, target.id, ref).fetchall():
            store.move(number, "cancelled", note="the branch was deleted")
        store.lift("repo = ? AND ref = ?", target.repo, ref)
        if target.ref or not hook.is_pattern:
            store.execute("UPDATE targets SET gone = 1 WHERE id = ?", target.id)

    def found(self, event: Found) -> Iterator[Effect]:
        """Queue the newest commits that nothing saw; a pattern's are only noted the first time."""
        store, hook = self.store, event.hook
        sql = "SELECT 1 FROM asked WHERE hook = ? AND repo = ?"
        is_first = hook.is_pattern and not store.value(sql, hook.section, event.repo)
        store.execute("INSERT OR IGNORE INTO asked VALUES (?, ?)", hook.section, event.repo)
        repo = store.spelling(event.repo)
        for ref, commit in event.heads.items():
            push = Push("push", repo, ref, commit)
            if not REF.fullmatch(ref) or self.config.hook_for(push) != hook:
                continue
            target = store.target(hook, repo, ref)
            if store.seen(target.id, ref) == commit:
                continue
            store.see(target.id, ref, commit)
            if not is_first:
                number = store.add(target, push, "catch-up", hook, payload=push_json(push))
                store.supersede(hook, target.id, ref)
                yield Line(logging.INFO, f"queued run {number}: {push}, found by catch-up")

    # ---- what begins

    def begin(self) -> Iterator[Effect]:
        """Choose what begins, while there are free jobs."""
        store, jobs = self.store, self.config.jobs
        running = store.value("SELECT count(*) FROM runs WHERE state = 'running'")
        store.wake_timed()
        while running < jobs:
            # A pattern's run never takes the last of several jobs: a preview holds nothing up.
            is_last = jobs > 1 and running + 1 == jobs
            number = store.next_run(EXACT if is_last else PATTERN)
            if not number:
                break
            run = store.runs("WHERE r.id = ?", number)[0]
            hook = self.hook(run)
            if hook is None:
                note = "hookd, as it runs, has no such hook; reload it after a change of hookd.ini"
                store.move(number, "cancelled", note=note)
                yield Line(logging.WARNING,
                           f"run {number} cancelled, its hook is no more: {run.push}")
                continue
            target = store.target(hook, run.target.repo, run.push.ref)
            if target.id != run.target.id:  # the ini in force names another directory
                store.execute("UPDATE runs SET target = ? WHERE id = ?", target.id, number)
                continue
            running += 1
            seq = (store.value("SELECT max(seq) FROM runs") or 0) + 1
            store.move(number, "running", began=time.time(), seq=seq, note="", exit=None)
            if not hook.git and run.push.commit:
                self.report_pending(number)
            commit = run.push.place if hook.git else run.push
            yield self.job(run, hook, f"run {number} began: {commit}{self.words(run)}")

    def settle(self) -> Iterator[Effect]:
        """Have jobs do what cut-off runs left to do."""
        store = self.store
        for run in store.runs("WHERE r.owed > 0 AND r.owed < 3 AND r.not_before <= ?", time.time()):
            hook = self.hook(run)
            store.execute("UPDATE runs SET owed = ? WHERE id = ?", 3 if hook else 0, run.id)
            if hook:
                yield self.job(run, hook, f"run {run.id} was cut off; cleaning up: {run.push}")
            elif os.path.exists(run_file(store.state, run.id, "switched")):
                yield Line(logging.ERROR, f"run {run.id}: the ini has no [{run.target.hook}] any "
                           f"more, so {run.target.directory}/current stays unconfirmed: {run.push}")

    def job(self, run: Run, hook: Hook, began: str) -> Job:
        """Return a run's Job, with what it must know of the history."""
        kind, store = ReleaseJob if hook.releases and not run.push.deleted else Job, self.store
        job = kind(run, hook, self.config.state, self.tell)
        job.began, job.hidden = began, self.config.hidden
        job.payload = store.value("SELECT payload FROM runs WHERE id = ?", run.id) or b""
        sql = "SELECT release, state FROM runs WHERE target = ? AND release != '' ORDER BY seq DESC"
        job.releases = store.execute(sql, run.target.id).fetchall()
        sql = "SELECT id FROM runs WHERE target = ? AND state = 'ok' ORDER BY id DESC LIMIT ?"
        job.held = {number for (number,) in store.execute(sql, run.target.id, self.config.keep)}
        return job

    def words(self, run: Run) -> str:
        """Return who and what is behind a run, for its lines in the log."""
        pusher, subject = (escape(redact(text, self.config.hidden))
                           for text in (run.push.pusher, run.push.subject))
        facts = {"pusher": pusher, "subject": subject and f'"{subject}"', "cause": run.cause,
                 "delivery": escape(run.delivery)}
        return "".join(f" {name}={fact}" for name, fact in facts.items() if fact)

    # ---- what a job's thread tells

    def named(self, event: Named) -> Iterator[Effect]:
        """Note which commit a run deploys, as soon as it is known."""
        run = event.job.run
        sql = "UPDATE runs SET commit_id = ?, subject = ? WHERE id = ? AND state = 'running'"
        if self.store.execute(sql, event.commit, event.subject, run.id).rowcount:
            self.report_pending(run.id)
            push = run.push._replace(commit=event.commit)
            yield Line(logging.INFO, f"run {run.id} deploys {event.commit}: {push}")

    def ended(self, event: Ended) -> Iterator[Effect]:
        """Record what became of a job; here every run that began ends, or waits again."""
        run, state = event.job.run, event.outcome.state
        if not self.store.value("SELECT 1 FROM runs WHERE id = ?", run.id):
            fault = f"run {run.id} {state}, but its database was removed: {run.push}"
            yield Line(logging.WARNING, fault)
        elif run.owed:
            self.settled(run, event.outcome)
        elif state == "queued":
            yield from self.waits_again(event)
        elif state == "interrupted":
            fresh = self.store.runs("WHERE r.id = ?", run.id)[0]
            yield from self.cut_off(fresh, event.job.begun, event.seconds)
        else:
            yield from self.finished(event)
        yield Done(event.job, self.store.prune(run.target.id, self.config.keep))

    def settled(self, run: Run, outcome: Outcome) -> None:
        """Note that nothing of a cut-off run is left to do, or that it is tried again."""
        sql = "UPDATE runs SET owed = ?, not_before = ?, note = ? WHERE id = ?"
        if outcome.delay:
            self.store.execute(sql, run.owed, time.time() + outcome.delay, run.note, run.id)
        else:
            self.store.execute(sql, 0, 0, outcome.note, run.id)
            lock = self.store.value("SELECT lock FROM runs WHERE id = ?", run.id)
            self.store.wake(*lock_names(run.target.directory, lock))

    def waits_again(self, event: Ended) -> Iterator[Effect]:
        """Queue again a run that did not begin, or could not reach its remote."""
        run, (_, _, note, delay, unreachable) = event.job.run, event.outcome
        self.store.move(run.id, "queued", tries=run.tries + unreachable, note=note, waits="time",
                        not_before=time.time() + delay)
        seconds = f" {delay:.0f} s" if unreachable else ""
        if unreachable or note != run.note:  # a lock is tried every LOCK_SECONDS, and logged once
            yield Line(logging.WARNING if unreachable else logging.INFO,
                       f"run {run.id} waits{seconds}: {note}: {event.job.push}")
        self.keep_newest(run)

    def keep_newest(self, run: Run) -> None:
        """Let a branch's newest push take the place of a run that waits again."""
        hook = self.hook(run)
        if hook:
            self.store.supersede(hook, run.target.id, run.push.ref)

    def finished(self, event: Ended) -> Iterator[Effect]:
        """Record how a run ended."""
        job, outcome, store = event.job, event.outcome, self.store
        run, push, state = job.run, job.push, outcome.state
        if run.cause == "rollback" and state != "ok" and not job.changed:
            store.lift("run = ?", run.id)
        self.note_head(job, outcome)
        store.move(run.id, state, note=outcome.note, exit=outcome.exit, duration=event.seconds,
                   commit_id=job.commit, subject=job.subject, release=job.release)
        for name in job.dropped:
            store.execute("UPDATE runs SET release = '' WHERE target = ? AND release = ?",
                          run.target.id, name)
        why = f" ({outcome.note})" if outcome.note else ""
        level = logging.INFO if state in ("ok", "superseded") else logging.WARNING
        yield Line(level, f"run {run.id} {state}{why}: {push} exit={outcome.exit} "
                   f"seconds={event.seconds:.1f}{self.words(run._replace(push=push))}")
        for line in job.quoted(outcome):
            yield Line(logging.WARNING, f"run {run.id} said: {line}")

    def note_head(self, job: Job, outcome: Outcome) -> None:
        """Note which commit of its branch a run saw; where it saw none, catch-up asks again."""
        store, run, push = self.store, job.run, job.run.push
        place = run.target.id, push.ref
        before = push.before if run.cause == "run" else push.commit
        if outcome.unreachable:
            store.execute("DELETE FROM heads WHERE target = ? AND ref = ?", *place)
        elif (job.commit and not run.goal and not push.deleted
                and store.seen(*place) in (None, push.commit, before)):
            store.see(*place, job.commit)  # nothing newer was seen while it ran

    # ---- a stop or a crash

    def cut_off(self, run: Run, begun: bool, seconds: float) -> Iterator[Effect]:
        """Queue a run that was cut off, unless it was twice or is to be cancelled."""
        attempts, hook = run.attempts + begun, self.hook(run)
        state, note = "queued", "was cut off, runs again"
        if run.wish:
            state, note = "cancelled", run.wish
        elif attempts >= ATTEMPTS_MAX:
            state, note = "interrupted", "cut off twice"
        has_way_back = hook and hook.releases and not run.push.deleted
        owes = not hook or state == "interrupted" or has_way_back
        facts: dict[str, Any] = {"note": note, "attempts": attempts, "owed": 1 if owes else 0}
        if state != "queued":
            facts.update(exit=1, duration=seconds)
        self.store.move(run.id, state, **facts)
        level = logging.ERROR if state == "interrupted" else logging.WARNING
        yield Line(level, f"run {run.id} was cut off and is {state}: {run.push}{self.words(run)}")

    def recover(self) -> list[Effect]:
        """Kill what a crash left running and queue it again; before anything else happens."""
        store, effects = self.store, []  # type: Store, list[Effect]
        with store.transaction():
            store.execute("UPDATE runs SET owed = 2 WHERE owed = 3")
            store.execute("UPDATE runs SET waits = '' WHERE state = 'queued' AND waits != 'time'")
            left = store.runs("WHERE r.state = 'running' OR r.owed > 0")
            for number in kill_survivors(store.state, [run.id for run in left]):
                effects.append(Line(logging.WARNING, f"run {number} had outlived hookd; killed"))
            for run in left:
                if run.state == "running":
                    begun = os.path.exists(run_file(store.state, run.id, "begun"))
                    effects += self.cut_off(run, begun, 0.0)
                self.keep_newest(run)
        return effects

    # ---- reports

    def report_pending(self, number: int) -> None:
        self.store.execute("UPDATE runs SET reported = 1 WHERE id = ?", number)
        self.store.execute("INSERT INTO reports (run, state) VALUES (?, 'pending')", number)

    def reported(self, report: Report) -> Iterator[Effect]:
        self.store.execute("DELETE FROM reports WHERE id = ?", report.id)
        yield from ()

    def outbox(self) -> Iterator[Effect]:
        """Hand on the commit statuses that moves have put into the outbox."""
        sql = "SELECT id, run, state FROM reports WHERE id > ? ORDER BY id"
        for number, run, state in self.store.execute(sql, self.handed).fetchall():
            report = self.report(number, run, state)
            if report:
                yield report
            else:
                self.store.execute("DELETE FROM reports WHERE id = ?", number)

    def report(self, number: int, run_id: int, state: str) -> Optional[Report]:
        """Return the commit status for one state of a run; None without a token or a commit."""
        for run in self.store.runs("WHERE r.id = ?", run_id):
            hook, push = self.hook(run), run.push
            if not hook or not hook.report_token or not push.commit:
                break
            words = f"run {run.id} is running" if state == "pending" else f"run {run.id} {state}"
            note = f": {run.note}" if run.note and state != "pending" else ""
            body = {"state": REPORTED.get(state, "error"),
                    "context": f"hookd/{short_name(push.ref)}",
                    "description": escape(words + note)[:140]}
            if hook.report_url:
                body["target_url"] = fill(hook.report_url, push.repo, push.ref, run.id)
            return Report(number, hook.report_api, hook.report_token, push.repo, push.commit,
                          body)
        return None


# ======================================================================================= daemon
# The one part that knows all the others. Only the main thread writes the database and answers.
# A turn of its loop waits for something to happen, has the dispatcher decide in one transaction,
# and carries out what follows, each effect on its own. Threads leave events in `inbox`; they, the
# verbs and signals wake the main thread through the FIFO `wake` of the state directory.

LOOK, ASK = b"\0", b"?"  # into the FIFO: look at the queue; ask the remotes, too (`resume`)


class Remotes:
    """Ask the remotes for what no delivery announced: at start, and every `catch_up`."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        self.tell = tell
        self.next: dict[str, float] = {}  # by section, when its remotes are to be asked
        self.faults: dict[str, set[str]] = {}  # of remotes, each logged once
        self.rest_until = 0.0  # after a try that failed; NEVER while a thread asks

    @property
    def at(self) -> float:
        """When the next is to be asked."""
        return max(self.rest_until, min(self.next.values(), default=NEVER))

    def plan(self, config: Config, first: float) -> None:
        """Take a configuration's hooks; those that are new are asked `first` seconds from now."""
        now = time.monotonic()
        self.next = {name: min(self.next.get(name, now + first), now + hook.catch_up)
                     for name, hook in config.hooks.items()
                     if hook.git and hook.catch_up and hook.event == "push"}

    def hurry(self) -> None:
        """Ask all remotes now."""
        self.next = dict.fromkeys(self.next, 0.0)

    def start(self, config: Config, store: Store) -> None:
        """Ask those whose time has come, in a thread of their own."""
        now = time.monotonic()
        hooks = [config.hooks[name] for name, at in self.next.items() if at <= now]
        self.rest_until = NEVER  # before the thread, which may be through at once
        with contextlib.suppress(sqlite3.Error, OSError, ConfigError):  # which `advance` reports
            pairs = [(hook, repo) for hook in hooks for repo in store.repositories(hook)]
            if start_thread(self.ask, pairs, config.state):
                self.next.update((hook.section, now + hook.catch_up) for hook in hooks)
                return
        self.rest_until = now + NOISE_SECONDS

    def ask(self, pairs: Sequence[tuple[Hook, str]], state: str) -> None:
        """Hand on the newest commits of the branches of each remote: the root of a thread."""
        for hook, repo in pairs:
            fault, remote = "", redact(fill(hook.git, repo, ""), ())
            try:
                self.tell(Found(hook, repo, remote_refs(hook, repo, state, "--heads")))
            except OSError as error:
                fault = str(error)
            except Exception:
                log.exception("a bug in hookd, in catch-up; please report this")
            note_fault(self.faults, f"the remote {remote}", "asked", fault)
        self.rest_until = 0.0
        self.tell(None)


def read_page(config: Config, up: bool) -> Snapshot:
    """Read what the page shows over a connection of its own: the messenger's thread calls it."""
    hidden, output = hidden_words(config), {}
    with contextlib.closing(Store(config.state)) as store:
        store.execute("BEGIN")  # all of one instant
        rows = [row for row in store.overview() if listed(row, config.hooks)]
        runs = [[clean(facts, RUN_FACTS, hidden) for facts in history(store, row["target"], 10)]
                for row in rows]
        totals = store.execute("SELECT * FROM totals").fetchall()
    targets = [clean(row, TARGET_FACTS, hidden) for row in rows]
    for run in [target["run"] for target in targets if config.page_output]:
        path = run_file(config.state, run or 0, "output.log")
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
            output[run] = redact("".join(deque(file, 100)), hidden)[-OUTPUT_TAIL:]
    return Snapshot(time.time(), up, targets, runs, totals, output)


class Daemon:
    """Serve until told to stop; callers call `serve`, once. `load` reads the ini anew."""

    def __init__(self, config: Config, load: Callable[[], Config]) -> None:
        self.config, self.load = config, load
        self.store = Store(config.state, serves=True)
        self.dispatcher = Dispatcher(config, self.store, self.leave)
        self.jobs: dict[int, Job] = {}
        self.inbox: list[Event] = []  # for the next transaction
        self.signals: list[int] = []
        self.look_at = 0.0  # when the queue is looked at next
        self.stop_at = NEVER  # when running jobs are ended
        self.complain_at = 0.0  # when a sick database is logged again
        self.hints: dict[str, str] = {}  # which secret a GitHub webhook signed with last
        self.noise, self.remotes = Noise(), Remotes(self.leave)
        self.messenger = Messenger(self.leave, self.write_page)
        self.up = True
        usec = os.environ.get("WATCHDOG_USEC", "")
        self.beat = self.beat_at = NEVER
        if usec.isdigit():
            self.beat, self.beat_at = int(usec) / 2e6, 0.0  # half of the watchdog's time
        self.where = self.status = self.stored = ""  # address, STATUS= line, stored socket's name
        self.given = False  # whether a .socket unit gave us sockets
        with contextlib.suppress(FileExistsError):
            os.mkfifo(f"{config.state}/wake", 0o600)
        self.wake_pipe = os.open(f"{config.state}/wake", os.O_RDWR | os.O_NONBLOCK)
        self.server = Server(lambda *head: check_head(self.config, *head), self.refused)
        self.server.selector.register(self.wake_pipe, selectors.EVENT_READ, self.woken)

    def serve(self) -> int:
        """Listen, answer and run until a signal says stop; return the exit status."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: self.signals.append(number))
        signal.set_wakeup_fd(self.wake_pipe, warn_on_full_buffer=False)
        for effect in self.dispatcher.recover():
            self.carry_out(effect)
        self.apply(self.config, passed_sockets())
        self.remotes.plan(self.config, 0.0)
        log.info("listening on %s", self.where)
        notify("READY=1")
        while not self.is_over():
            try:
                self.turn()
            except Exception:
                log.exception("a bug in hookd; it goes on, please report this")
                self.look_at = time.monotonic() + NOISE_SECONDS
                self.server.poll(1.0)
        self.close()
        return 0

    def is_over(self) -> bool:
        """Tell whether hookd is to stop and nothing runs that could be waited for."""
        if self.stop_at == NEVER:
            return False
        late = time.monotonic() - self.stop_at
        # A thread that waits for a dead file system never ends.
        return late > 3 * GRACE_SECONDS or all(job.through or (late > 0 and job.held_up())
                                               for job in self.jobs.values())

    def turn(self) -> None:
        """Wait for the next thing to do, then do all there is."""
        until = min(self.look_at, self.stop_at, self.beat_at, self.remotes.at)
        connections = self.server.poll(0.0 if self.inbox else until - time.monotonic())
        while self.signals:
            self.obey(self.signals.pop(0))
        self.advance(list(filter(None, map(self.judge, connections))))
        now = time.monotonic()
        if now >= self.remotes.at:
            self.remotes.start(self.config, self.store)
        if now >= self.stop_at:
            for job in list(self.jobs.values()):
                job.end("interrupted", "hookd was stopped")
        if now >= self.beat_at:
            notify("WATCHDOG=1")
            self.beat_at = now + self.beat

    def leave(self, event: Any) -> None:
        """Leave an event for the main thread's next turn; called from any thread."""
        if event is not None:
            self.inbox.append(event)
        with contextlib.suppress(OSError):  # a full pipe wakes it anyway
            os.write(self.wake_pipe, LOOK)

    def woken(self) -> None:
        """Take note that a thread, a verb or a signal wants the queue looked at."""
        if ASK in os.read(self.wake_pipe, CHUNK):
            self.remotes.hurry()
        self.look_at = 0.0

    # ---- deliveries

    def refused(self, connection: Connection, refusal: Refusal) -> None:
        self.noise.add(refusal, connection.address_string())
        self.answer(connection, refusal.status, refusal.reason)

    def answer(self, connection: Connection, status: int, text: str) -> None:
        readable = connection.headers is not None and status not in (400, 408)
        quiet = self.config.quiet and (readable or connection.whole)
        connection.answer(200 if quiet else status, "ok" if quiet else text)

    def judge(self, connection: Connection) -> Optional[Delivered]:
        """Judge a delivery; answer it, unless a hook takes it: then return it."""
        headers: Mapping[str, str] = connection.headers  # type: ignore[assignment]
        try:
            decision = self.decide(headers, connection.rfile.getvalue())  # which copies nothing
        except Refusal as refusal:
            self.refused(connection, refusal)
            return None
        delivery = escape(headers.get("x-github-delivery", "")[:100]) or "-"
        if decision.hook:
            return Delivered(connection, delivery, decision)
        self.reply(Answer(connection, delivery, decision.status, decision.text))
        return None

    def decide(self, headers: Mapping[str, str], body: bytes) -> Decision:
        """Return what judgement makes of a request; raise Refusal for a signature of nobody."""
        webhook = headers.get("x-github-hook-id", "")[:20]
        likeliest = self.hints.get(webhook)
        secrets = sorted(self.config.secrets, key=lambda secret: secret != likeliest)
        secret = authenticate(secrets, headers["x-hub-signature-256"], body)
        if len(self.hints) < 1000:
            self.hints[webhook] = secret
        try:
            return decide(self.config, headers, body, secret)
        except Refusal as refusal:  # of a sender who is known
            return Decision(refusal.status, refusal.reason)

    def reply(self, answer: Answer) -> None:
        """Answer a signed delivery and log the same."""
        client = answer.connection.address_string() or "unix"  # the answer clears it
        self.answer(answer.connection, answer.status, answer.text)
        level = {2: logging.INFO, 4: logging.WARNING}.get(answer.status // 100, logging.ERROR)
        log.log(level, "%s delivery=%s client=%s", answer.text, answer.delivery, client)

    # ---- the queue

    def advance(self, delivered: Sequence[Delivered]) -> None:
        """Have the dispatcher take what has come, then carry out what follows."""
        now = time.monotonic()
        if not delivered and not self.inbox and now < self.look_at:
            return
        inbox, begins = list(self.inbox), self.stop_at == NEVER  # threads go on adding to it
        self.look_at = now + NOISE_SECONDS
        try:
            effects = self.dispatcher.turn([*inbox, *delivered], begins)
            del self.inbox[: len(inbox)]
            if begins:
                self.look_at = min(self.look_at, now + self.store.next_time())
        except (sqlite3.Error, OSError, ConfigError) as error:
            if delivered or now >= self.complain_at:
                log.error("the queue cannot be written: %s state=%s", error, self.config.state)
                self.complain_at = now + NOISE_SECONDS
            text = "it cannot be kept now, send it again later"
            effects = [Answer(event.connection, event.delivery, 503, text) for event in delivered]
            self.look_at = now + 1
        for effect in effects:
            self.carry_out(effect)
        if self.config.page:
            self.messenger.show()
        self.look_after()

    def carry_out(self, effect: Effect) -> None:
        """Do what follows from a transaction; an exception in one does not affect the others."""
        try:
            if isinstance(effect, Answer):
                self.reply(effect)
            elif isinstance(effect, Line):
                log.log(effect.level, "%s", effect.text)
            elif isinstance(effect, Job):
                self.begin(effect)
            elif isinstance(effect, End) and effect.run in self.jobs:
                self.jobs[effect.run].end("cancelled", effect.why)
            elif isinstance(effect, Done):
                self.jobs.pop(effect.job.run.id, None)
                for run in effect.forgotten:
                    remove_tree(run_file(self.config.state, run))
            elif isinstance(effect, Report):
                self.messenger.send(effect)
        except Exception:
            log.exception("a bug in hookd; it goes on, please report this")

    def begin(self, job: Job) -> None:
        """Give a job its thread; without room for one it waits."""
        self.jobs[job.run.id] = job
        if not start_thread(job.work):
            job.through = True
            self.leave(Ended(job, Outcome("queued", 0, "no room for one more thread", 1.0), 0.0))

    def look_after(self) -> None:
        """Note jobs that are held up; update systemd's STATUS= line."""
        for job in list(self.jobs.values()):
            why = job.held_up()
            if why == job.complaint:
                continue
            sql = "UPDATE runs SET note = ? WHERE id = ? AND state = 'running'"
            with contextlib.suppress(sqlite3.Error, OSError, ConfigError):
                with self.store.transaction():
                    self.store.execute(sql, why, job.run.id)
                job.complaint = why
                if why:
                    log.warning("run %d is held up: %s: %s", job.run.id, why, job.run.push.place)
        if any(job.doing for job in self.jobs.values()):
            self.look_at = min(self.look_at, time.monotonic() + 1)
        hooks, running = len(self.config.hooks), len(self.jobs)
        line = f"STATUS=listening on {self.where}, hooks: {hooks}, running: {running}"
        if line != self.status and self.server.listeners:
            notify(line)
            self.status = line

    def write_page(self) -> None:
        """Write the page as things stand, if there is one; the messenger's thread calls it."""
        config = self.config
        if config.page:
            write_page(config.page, read_page(config, self.up))

    # ---- beginning, changing, ending

    def apply(self, config: Config, passed: Mapping[str, list[socket.socket]]) -> None:
        """Make a configuration the one in force; raise OSError and change nothing."""
        tls = tls_context(config)
        listeners = self.listeners(config.listen, passed)
        self.server.tls, self.config, self.dispatcher.config = tls, config, config
        self.server.room = max(BODIES_MAX, config.max_body + HEAD_MAX)
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        spare = files - SPARE_FILES - JOB_FILES * config.jobs
        self.server.most = max(16, min(CONNECTIONS_MAX, spare))
        self.server.listen(listeners)
        self.where = bound_address(listeners[0])
        with contextlib.suppress(OSError), open(f"{config.state}/address", "w") as file:
            file.write(self.where)

    def listeners(self, wanted: str, passed: Mapping[str, list[socket.socket]],
                  ) -> list[socket.socket]:
        """Return a .socket unit's sockets, else the one we have or stored, else a new one."""
        name = f"hookd-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"
        stored = [sock for key in passed if key.startswith("hookd-") for sock in passed[key]]
        given = [sock for socks in passed.values() for sock in socks if sock not in stored]
        self.given |= bool(given)
        if given or (self.server.listeners and (self.given or self.config.listen == wanted)):
            return given or self.server.listeners
        gone = wanted.startswith("unix:") and not os.path.exists(wanted[5:])
        fit = [] if gone else passed.get(name, [])[:1]
        for sock in stored:
            if sock not in fit:
                sock.close()
        if not fit:
            fit = [open_socket(wanted)]
            for old in filter(None, [*passed, self.stored]):
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
            self.stop_at = min(self.stop_at, time.monotonic())
        else:
            text = os.environ.get("HOOKD_STOP_SECONDS", "")
            seconds = int(text) if text.isascii() and text.isdigit() else STOP_SECONDS
            self.stop_at = time.monotonic() + seconds
            # systemd waits as long, and then for TERM, KILL and the way back of a release.
            notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int((seconds + 20) * 1e6)}")
            log.info("stopping after %d running commands, in %.0f s at most", len(self.jobs),
                     seconds)

    def reload(self) -> None:
        """Put the ini in force as it is now, or tell why not and keep the old one."""
        try:
            config = self.load()
            for key in ("state", "log"):
                if getattr(config, key) != getattr(self.config, key):
                    fault = f"[hookd] {key}: changed; restart hookd for that"
                    raise ConfigError(f"{config.name}: {fault}")
            self.apply(config, {})
            self.remotes.plan(config, NEVER)
            log.info("reloaded: listening on %s hooks=%d", self.where, len(config.hooks))
        except (ConfigError, OSError, SystemExit) as error:
            for problem in error.args if isinstance(error, ConfigError) else [error]:
                log.error("reload failed; keeping the old configuration: %s", problem)
        self.look_at = 0.0

    def close(self) -> None:
        """Answer who is here; a new connection waits in the kernel for the next hookd."""
        listeners = self.server.listeners
        self.server.listen([])
        self.look_at = 0.0
        self.advance([])  # what ended last
        until = self.stop_at = time.monotonic() + CLOSE_SECONDS  # the last turn ends by then
        while self.server.connections and time.monotonic() < until:
            self.turn()
        self.up = False
        self.messenger.close(CLOSE_SECONDS)
        if self.config.listen.startswith("unix:") and not os.environ.get("NOTIFY_SOCKET"):
            with contextlib.suppress(OSError):
                os.unlink(self.config.listen[5:])
        for sock in listeners:
            sock.close()
        self.store.close()
        log.info("stopped")


# ================================================================================= command line
# Verbs for people. They read the same ini, and touch the state as the user who owns it. What
# starts, ends or holds back a run is written into the queue, and a byte into the FIFO wakes the
# daemon, which alone runs commands.

STATE_VERBS = ("status", "log", "cancel", "pause", "resume")  # they need the state, not the hooks


def default_state() -> str:
    """Return where the state is when the ini does not say."""
    given, common = os.environ.get("STATE_DIRECTORY", "").split(":")[0], "/var/lib/hookd"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return given or (common if os.path.isdir(common) else os.path.join(home, "hookd"))


def become_owner(state: str, argv: Sequence[str]) -> None:
    """As root, start again as the owner of the state, so that no file there is root's.

    Not by setuid alone: such a process is not dumpable, and ProtectProc= hides it (proc(5)).
    """
    if os.geteuid() or not os.path.isdir(state) or not os.stat(state).st_uid:
        return
    try:
        owner = pwd.getpwuid(os.stat(state).st_uid)
    except KeyError:
        raise SystemExit(f"hookd: {state} belongs to a user without a name; chown it") from None
    os.initgroups(owner.pw_name, owner.pw_gid)
    os.setgid(owner.pw_gid)
    os.setuid(owner.pw_uid)
    os.environ.update(HOME=owner.pw_dir, HOOKD_USER=os.environ.get("SUDO_USER", "root"))
    again = [os.path.abspath(__file__), *argv]
    with contextlib.suppress(PermissionError):  # a Python in /root is not the owner's to run
        os.execv(sys.executable, [sys.executable, *again])
    os.execv("/usr/bin/python3", ["/usr/bin/python3", *again])


def read_ini(file: str) -> Ini:
    """Read an ini; what cannot be read is a problem in it."""
    base, name = os.path.split(os.path.abspath(file))
    try:
        with open(file, encoding="utf-8-sig") as text:
            return Ini(name, base, text.read(), default_state())
    except FileNotFoundError:
        fault = "cannot be read: there is no such file; name the ini with -c FILE"
    except (OSError, ValueError) as error:
        fault = (f"cannot be read: {error}; it has to be UTF-8 text that hookd may read (chmod "
                 "640, chgrp hookd): try it with sudo")
    ini = Ini(name, base, "", default_state())
    ini.problems.append(f"{file}: {fault}")
    return ini


def make_secret(path: str) -> None:
    """Make the default secret where it is missing, or a full disk left it empty."""
    if not os.path.exists(path) or not os.path.getsize(path):
        with open(path, "a", encoding="utf-8", opener=private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # against a verb that does the same
            if not os.path.getsize(path):
                os.fchmod(file.fileno(), 0o600)
                file.write(os.urandom(32).hex() + "\n")


def read_secrets(config: Config) -> Config:
    """Return a config with all secrets and tokens that it names; raise ConfigError or OSError."""
    default, problems, full = f"{config.state}/secret", [], {}
    for hook in (*config.hooks.values(), config.common):
        found = {"secret_file": [*hook.secret], "report_token_file": [*lines(hook.report_token)]}
        for key, words in found.items():
            path = getattr(hook, key)
            if path == default and os.path.isdir(config.state):
                make_secret(path)
            if not path or (path == default and not os.path.exists(path)):
                continue
            try:
                with open(secret_path(path), encoding="utf-8") as file:
                    words += lines(file.read())
                if not words:
                    raise ValueError("it is empty")
            except (OSError, ValueError) as error:
                level = config.level_of(hook, key) or "hookd"
                problems.append(f"{config.name}: [{level}] {key}: cannot be used ({error}); put it "
                                "in a file that hookd may read (chgrp hookd, chmod 640)")
        full[hook.section] = replace(hook, secret=tuple(found["secret_file"]),
                                     report_token="".join(found["report_token_file"][:1]))
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return replace(config, common=full.pop("hookd"), hooks=full)


def daemon_words(state: str) -> list[str]:
    """Return name, pid and log of the hookd that serves this state; nothing where none does."""
    with contextlib.suppress(OSError), open(os.path.join(state, "locks", DAEMON_LOCK)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().split()
    return []


def daemon_address(config: Config) -> str:
    """Return where the hookd that serves this state noted that it listens, else `listen`."""
    with contextlib.suppress(OSError), open(f"{config.state}/address") as file:
        return file.read() or config.listen
    return config.listen


def wake_daemon(state: str, word: bytes = LOOK) -> None:
    """Have the daemon, if it is up, look at its queue, or ask the remotes as well."""
    flags = os.O_WRONLY | os.O_NONBLOCK
    with contextlib.suppress(OSError), open(os.open(f"{state}/wake", flags), "wb", 0) as pipe:
        pipe.write(word)


def own_names() -> tuple[str, str]:
    """Return the user and the group of this process; in a container they may have no names."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(os.getegid()).gr_name
    except KeyError:
        return str(os.geteuid()), str(os.getegid())


def user_name() -> str:
    """Return who types: before sudo, and before a verb became the owner of the state."""
    return os.environ.get("HOOKD_USER") or os.environ.get("SUDO_USER") or own_names()[0]


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table, cut only to fit a terminal, control characters escaped."""
    cells = [head, *([escape("" if cell is None else str(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    room = os.get_terminal_size(1).columns if sys.stdout.isatty() else 10**6
    while sum(widths) + 2 * len(widths) - 2 > room and max(widths) > 8:
        widths[widths.index(max(widths))] -= 1
    for row in cells:
        shown = (text if len(text) <= width else text[: width - 1] + "~"
                 for text, width in zip(row, widths))
        print("  ".join(map(str.ljust, shown, widths)).rstrip())


def show(data: bytes, hidden: Sequence[str]) -> None:
    """Print a run's output without secrets; a terminal gets nothing that it obeys."""
    text = redact(data.decode("utf-8", "surrogateescape"), hidden)
    if sys.stdout.isatty():
        text = "".join(c if c in "\n\t" else escape(c) for c in text)
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()


def writable(path: str, root: str) -> str:
    """Return the fault and remedy of a directory that hookd cannot make or write, or ""."""
    above = path
    while not os.path.exists(root + above):
        above = os.path.dirname(above)
    if not os.path.isdir(root + above):
        return f"{above} is no directory; name another, or move it away"
    if os.access(root + above, os.W_OK | os.X_OK):
        return ""
    (user, group), home = own_names(), re.match("/home/[^/]+", path)
    remedy = f"install -d -o {user} -g {group} {path} (if it exists: chown -R {user}: {path})"
    if home and not os.access(root + home[0], os.X_OK):
        remedy = (f"setfacl -m u:{user}:x {home[0]}, then set ProtectHome=read-only and "
                  "ReadWritePaths= with systemctl edit hookd")
    elif root and os.access(above, os.W_OK | os.X_OK):
        remedy = f"ReadWritePaths={above} with systemctl edit hookd, then systemctl restart hookd"
    return f"{user} cannot write {above}; as root: {remedy}"


def fault_of(question: Callable[..., Any], *arguments: Any) -> str:
    """Return what a question that opens or asks something fails with, or ""."""
    try:
        question(*arguments)
    except OSError as error:
        return advice(str(error)) or str(error)
    return ""


def shell_fault(script: str) -> str:
    done = subprocess.run(["/bin/sh", "-n", "-c", script], check=False, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", errors="replace")
    words = done.stderr.strip().splitlines() or [""]
    return f"sh cannot read it: {words[0]}" if done.returncode else ""


class Command:
    """A command line: its options, the ini and the state; each verb is a method."""

    def __init__(self, options: "argparse.Namespace", argv: Sequence[str]) -> None:
        """Read the ini and become the owner of its state; raise ConfigError or SystemExit."""
        self.options, self.ini = options, read_ini(options.file)
        self.state = self.ini.state
        self.config = self.ini.config(options.verb not in (*STATE_VERBS, "check"))
        if options.verb in STATE_VERBS and self.ini.problems:
            self.config = replace(self.config, hooks={})  # any may be missing
        known = os.path.isdir(self.state)
        if not known and options.verb not in ("serve", "check"):
            raise SystemExit(f"hookd: there is no {self.state} yet; start hookd first, or try it "
                             "with sudo")
        become_owner(self.state, argv)
        if known and not os.access(self.state, os.R_OK | os.X_OK):
            raise SystemExit(f"hookd: {self.state}: permission denied; try it with sudo")
        for problem in dict.fromkeys(self.ini.problems if options.verb in STATE_VERBS else ()):
            print(problem, file=sys.stderr)
        self.store = Store(self.state)

    @cached_property
    def hidden(self) -> list[str]:
        """What is shown as ***; waits for no dead file system."""
        # In a child: a process one of whose threads such a file system holds cannot even exit.
        reader, writer = os.pipe()
        if not os.fork():
            try:
                os.closerange(0, 3)
                os.write(writer, json.dumps(hidden_words(self.config)).encode())
            finally:
                os._exit(0)
        os.close(writer)
        with open(reader, encoding="utf-8") as pipe:
            ready = select.select([pipe], [], [], 2)[0]
            return list(json.loads(pipe.read() or "[]")) if ready else []

    def say(self, text: str, file: Any = None) -> None:
        """Print a line with strangers' text in it."""
        print(escape(redact(text, self.hidden)), file=file, flush=True)

    # ---- what REPO, BRANCH and RUN name

    @property
    def place(self) -> str:
        words = filter(None, [self.options.repo, self.options.branch])
        return escape(" ".join(words)) or "everything"

    @property
    def refs(self) -> list[str]:
        """The refs that BRANCH may mean."""
        branch = self.options.branch
        return [branch if branch.startswith("refs/") else f"refs/{kind}/{branch}"
                for kind in ("heads", "tags")]

    def runs(self, condition: str = "") -> list[Run]:
        """Return the runs of RUN, REPO BRANCH or REPO, or all, that meet a condition of SQL."""
        repo = self.options.repo
        if self.options.branch:
            sql, refs = f"WHERE r.repo = ? AND r.ref IN (?, ?) {condition}", self.refs
            return self.store.runs(sql, repo, *refs)
        name = "id" if not repo or repo.isdecimal() else "repo"
        return self.store.runs(f"WHERE r.{name} = coalesce(?, r.{name}) {condition}", repo)

    def targets(self) -> list[dict[str, Any]]:
        """Return the targets of REPO BRANCH, those of REPO that `status` lists, or all of them."""
        rows, repo = self.store.overview(), self.options.repo
        if self.options.branch:  # tags share one target
            named = {run.target.id for run in self.runs()}
            return [row for row in rows if row["target"] in named]
        return [row for row in rows if listed(row, self.config.hooks)
                and (not repo or row["repo"].lower() == repo.lower())]

    def find_hook(self, event: str = "") -> tuple[Optional[Hook], Push]:
        """Return the hook of REPO BRANCH, None where there is none, and the push that starts it."""
        push = Push(event or "push", self.options.repo, self.refs[0], "", pusher=user_name())
        for hook in self.config.hooks_for(push.repo):
            for ref in self.refs:
                mine = push._replace(event=event or hook.event, ref=ref)
                if self.config.hook_for(mine) is hook:
                    return hook, mine
        return None, push

    def no_hook(self) -> SystemExit:
        return SystemExit(f"hookd: {self.ini.name} has no hook for {self.place}; `hookd.py check` "
                          "lists them")

    def needed_hook(self) -> tuple[Hook, Push]:
        hook, push = self.find_hook()
        if hook is None:
            raise self.no_hook()
        return hook, push

    def secrets(self, hook: Optional[Hook] = None) -> tuple[str, ...]:
        """Return the secrets of a hook, of REPO's first one, or without REPO the common ones."""
        config, repo = read_secrets(self.config), self.options.repo or ""
        hook = hook or next(iter(config.hooks_for(repo)), None)
        if repo and not hook:
            raise self.no_hook()
        return config.hooks[hook.section].secret if hook else config.common.secret

    def pause_place(self) -> tuple[str, str]:
        """Return repository and ref of a pause, "" where any will do."""
        return self.options.repo or "", self.find_hook()[1].ref if self.options.branch else ""

    def full_commit(self, hook: Hook, push: Push, text: str) -> str:
        """Return the whole id of a commit: from the history, the clone, or as it is typed.

        Not within a transaction: a clone on a dead file system would hold the write lock.
        """
        text = text.lower()
        if COMMIT.fullmatch(text):
            return text
        if re.fullmatch("[0-9a-f]{4,63}", text):
            sql = """SELECT DISTINCT commit_id FROM runs
                WHERE repo = ? AND substr(commit_id, 1, ?) = ?"""
            known = self.store.execute(sql, push.repo, len(text), text).fetchall()
            if len(known) == 1:
                return str(known[0][0])
            clone = fill(hook.directory, push.repo, push.ref) + ("/repo" if hook.releases else "")
            question = ["-C", clone, "rev-parse", "--verify", "-q", f"{text}^{{commit}}"]
            code, commit, _ = ask_git(question, base_environment(hook))
            if hook.git and not code:
                return commit
        raise SystemExit(f"hookd: {text!r} is no run here and no commit that hookd knows; give "
                         "all 40 digits of a commit")

    # ---- following a run

    def watch(self, number: int, following: bool) -> int:
        """Print a run's output, and with `following` its end; return its exit status."""
        shown, last, up_at = 0, b"\n", -NEVER
        sql = "SELECT state, exit, duration FROM runs WHERE id = ?"
        while True:
            state, code, seconds = self.store.execute(sql, number).fetchone() or ("", 1, 0.0)
            path = run_file(self.state, number, "output.log")
            with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(shown)
                for data in iter(partial(file.readline, CHUNK), b""):
                    if state == "running" and len(data) < CHUNK and data[-1:] != b"\n":
                        break  # a partial line could show part of a secret
                    shown, last = shown + len(data), data[-1:]
                    show(data, self.hidden)
            if not following or state not in MOVES:
                break
            if daemon_words(self.state):
                up_at = time.monotonic()
            elif time.monotonic() > up_at + GRACE_SECONDS:
                print("hookd is not running; this run begins when it starts", file=sys.stderr)
                return 1
            time.sleep(0.1)
        for run in self.store.runs("WHERE r.id = ?", number) if following else ():
            print("" if last == b"\n" else "\n", end="")
            self.say(summary(run, Outcome(state, code or 0, run.note), seconds or 0.0))
        if state == "ok":
            return 0
        return code or 1

    def follow(self, number: int, push: Push) -> int:
        """Follow a run that a verb queued: print its output and its end; return its exit status."""
        wake_daemon(self.state)
        print(f"queued run {number}: {push}", flush=True)
        return self.watch(number, True)

    # ---- verbs

    def serve(self) -> int:
        """run the daemon (the default verb)"""
        import ctypes
        config, state = self.config, self.state
        os.closerange(3 + passed_count(), 1024)  # such as the lock of a run that started this hookd
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = CONNECTIONS_MAX + SPARE_FILES + JOB_FILES * config.jobs  # one for each connection
        wanted = max(soft, wanted if hard < 0 else min(wanted, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        for folder in ("", "runs", "locks", "work"):
            os.makedirs(os.path.join(state, folder), 0o700, exist_ok=True)
        with contextlib.suppress(PermissionError):
            os.chmod(state, 0o700)
        config = read_secrets(config)
        lock = private(os.path.join(state, "locks", DAEMON_LOCK), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = " ".join(daemon_words(state)[:2])
            raise SystemExit(f"hookd: {state} is held by {holder}; stop that one first") from None
        os.ftruncate(lock, os.pwrite(lock, f"hookd {os.getpid()} log={config.log}\n".encode(), 0))
        open_log(config.log)
        with contextlib.suppress(OSError, AttributeError):  # another libc than glibc
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, CHUNK // 2)  # M_MMAP_THRESHOLD, mallopt(3): else each block grows it
            libc.malloc_trim(0)  # what compiling took
        file = os.path.abspath(self.options.file)
        return Daemon(config, lambda: read_secrets(read_ini(file).config())).serve()

    def check(self) -> int:
        """the ini and what it names: every problem, then a table of the hooks"""
        if self.options.branch:
            return self.explain()
        ini, words = self.ini, daemon_words(self.state)
        root = f"/proc/{words[1]}/root" if words else ""  # as the unit shows it to hookd
        root = root if os.access(f"{root}/", os.X_OK) else ""
        config = self.check_daemon(words, root)
        places = {name: os.path.normpath(fill(hook.directory, hook.repo.lower(), hook.ref_pattern))
                  for name, hook in config.hooks.items()}
        for hook in config.hooks.values():
            for key, fault in self.faults(hook, root):
                own = key in ("git", "directory")  # another place for each hook
                level = "" if own else config.level_of(hook, key)  # one problem where it stands
                ini.problem(level or hook.section, key, fault)
            for key, fault in self.clashes(hook, places):
                ini.problem(hook.section, key, fault)
        self.warn_of_sudo(words[1] if words else "self")
        for line in dict.fromkeys([*ini.problems, *(f"warning: {line}" for line in ini.warnings)]):
            self.say(line, sys.stderr)
        table(["HOOK", "EVENT", "DIRECTORY"], (
            [hook.section, hook.event, hook.directory] for hook in self.config.hooks.values()))
        return 78 if ini.problems else 0

    def check_daemon(self, words: Sequence[str], root: str) -> Config:
        """Try what [hookd] names, compare it with the hookd that runs; return it with secrets."""
        ini, config = self.ini, self.config
        restart = "differs from the running hookd's; systemctl restart hookd"
        try:
            config = read_secrets(config)
        except ConfigError as error:
            ini.problems += error.args
        ini.problem("hookd", "tls_cert", fault_of(tls_context, config))
        noted = [word for word in words if word.startswith("log=")]  # version 1.0 notes none
        if noted not in ([], [f"log={config.log}"]):
            ini.problem("hookd", "log", restart)
        if "MAINPID" in os.environ and os.environ["MAINPID"] not in words:
            ini.problem("hookd", "state", restart)
        elif not config.listen.startswith("unix:") and not (
                words and config.listen == daemon_address(config)):
            ini.problem("hookd", "listen", fault_of(open_socket, config.listen))
        ini.problem("hookd", "page", config.page and writable(config.page, root))
        for section, texts in config.levels.items():
            for key in texts.keys() & {*SECRETS, "report_token", "report_token_file"}:
                path = os.path.join(ini.base, texts[key] if key.endswith("_file") else ini.name)
                path = secret_path(path) if key.endswith("_file") else path
                if os.path.isfile(path) and os.stat(path).st_mode & 0o004:
                    fault = f"every user can read {path}; chmod o-r {path}"
                    ini.problem(section, key, fault, warns=True)
        return config

    def faults(self, hook: Hook, root: str) -> Iterator[tuple[str, str]]:
        """Try what a hook names; yield each key with its fault, or ""."""
        yield "directory", writable(re.sub(r"/[^/]*\{.*", "", hook.directory) or "/", root)
        key = hook.deploy_key
        if key and not os.access(key, os.R_OK):
            yield "deploy_key", f"hookd cannot read {key}; make it with ssh-keygen, or chown it"
        elif key and os.stat(key).st_mode & 0o077:
            yield "deploy_key", f"ssh refuses a key that others can read; chmod 600 {key}"
        for name in filter(partial(getattr, hook), SCRIPTS):  # those that are set
            yield name, shell_fault(getattr(hook, name))
        yield "environment_file", fault_of(file_variables, hook)
        online = self.options.online and not hook.repo.endswith("*")
        if hook.git and online:
            yield "git", fault_of(remote_refs, hook, hook.repo, self.state)
        elif hook.git:
            yield "git", fault_of(ask_git, ["--version"], base_environment(hook))
        if hook.report_token and online:
            yield "report_api", token_fault(hook.report_api, hook.report_token, hook.repo)

    def clashes(self, hook: Hook, places: Mapping[str, str]) -> Iterator[tuple[str, str]]:
        """Yield what the hooks above leave of this one, as `faults` does."""
        mine = {other.section for other in self.config.hooks_for(hook.repo)}
        default = hook.directory == self.ini.default.directory
        for section, other in self.config.hooks.items():
            if section == hook.section:
                return
            if other.event == hook.event and section in mine and (
                    fnmatchcase(hook.pattern, other.pattern)):
                yield "", f"can never match: [{section}] above takes all; move this one up"
            elif places[section] == places[hook.section] and (
                    default or (hook.releases and other.releases)):
                yield "directory", f"is that of [{section}] too; set directory in one of them"

    def warn_of_sudo(self, pid: str) -> None:
        fault, status = "sudo cannot work under NoNewPrivileges=; README has polkit", ""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status") as file:
            status = file.read()
        for section, hook in self.config.hooks.items() if "NoNewPrivs:\t1" in status else ():
            for key in SCRIPTS:
                if re.search(r"\bsudo\b", getattr(hook, key)):
                    self.ini.problem(section, key, fault, warns=True)

    def explain(self) -> int:
        """Print which hook takes REPO BRANCH, and each setting as it is for it; never a secret."""
        (hook, push), rows, ini = self.find_hook(), [], self.ini
        if hook is None:
            ini.problems.append(f"{ini.name}: no hook takes {self.place}; add [{self.place}]")
        if hook is None or ini.problems:
            raise ConfigError(*dict.fromkeys(ini.problems))
        for key in HOOK_KEYS:
            value, level = getattr(hook, key), self.config.level_of(hook, key)
            text = self.config.levels[level][key] if level else HOOK_KEYS[key]["text"]
            if key in ("directory", "git", "lock", "report_url", "secret_file"):
                text = fill(value, push.repo, push.ref)
            elif key == "environment":
                text = " ".join(f"{name}=***" for name, _ in value)
            elif key in ("secret", "report_token"):
                text = "***" if value else ""
            if key in SECRETS and not value:  # the two are one setting
                level = ""
            rows.append([key, redact(" ".join(text.split()), self.hidden),
                         f"[{level}]" if level else "default"])
        print(f"[{hook.section}] takes {escape(push.ref)}, whose slug is {slug(push.ref)}")
        table(["SETTING", "VALUE", "FROM"], rows)
        return 0

    def run(self) -> int:
        """deploy REPO BRANCH now"""
        (hook, push), store, commit = self.needed_hook(), self.store, self.options.commit
        if hook.git and hook.is_pattern and not commit:
            with contextlib.suppress(OSError):  # the run will say what is wrong
                if push.ref not in remote_refs(hook, push.repo, self.state, "--heads", "--tags"):
                    raise SystemExit(f"hookd: the remote has no {short_name(push.ref)}; nothing is "
                                     "queued")
        push = push._replace(repo=store.spelling(push.repo))
        goal = self.full_commit(hook, push, commit) if commit else ""
        with store.transaction():
            target = store.target(hook, push.repo, push.ref)
            seen = store.seen(target.id, push.ref) or ""
            push = push._replace(commit=goal or ("" if hook.git else seen), before=seen)
            number = store.add(target, push, "run", hook, payload=push_json(push),
                               goal=goal if hook.git else "")
        return self.follow(number, push)

    def way_back(self, target: Target, run: int, wanted: str) -> tuple[str, str, int]:
        """Return where a rollback goes: commit, release, and the run that it restores.

        To the run or commit that is named; else from what does not work to what stands; else from
        what stands to the newest ok run of another commit before the one that deployed it, where
        a rollback counts as the run that it restored.
        """
        store = self.store
        good = [(restores or number, number, commit, release)  # without git, some know no commit
                for number, commit, release, restores in store.good(target.id) if commit]
        last = store.value("""SELECT state FROM runs WHERE target = ? AND seq IS NOT NULL
            AND state != 'superseded' ORDER BY seq DESC LIMIT 1""", target.id)
        if run:
            sql = """SELECT CASE restores WHEN 0 THEN id ELSE restores END, id, commit_id,
                CASE state WHEN 'ok' THEN release ELSE '' END FROM runs
                WHERE id = ? AND target = ? AND seq IS NOT NULL AND commit_id != ''"""
            good = store.execute(sql, run, target.id).fetchall()
        elif wanted:
            good = [row for row in good if row[2] == wanted] or [(0, 0, wanted, "")]
        elif last == "ok" and good:
            origin, _, stands, _ = good[0]
            good = [row for row in good if row[1] < origin and row[2] != stands]
        if not good:
            why = (f"run {run} deployed no commit of this branch" if run else
                   "no other commit was ok before")
            raise SystemExit(f"hookd: there is nothing to go back to: {why}")
        origin, _, commit, release = good[0]
        return commit, release, origin

    def rollback(self) -> int:
        """go back to what worked, or to COMMIT or RUN; pauses the branch"""
        (hook, push), store, named = self.needed_hook(), self.store, self.options.goal or ""
        push = push._replace(repo=store.spelling(push.repo), event=hook.event)
        sql = "SELECT id FROM runs WHERE id = ? AND repo = ?"
        run = store.value(sql, named, push.repo) if named.isdecimal() else 0
        wanted = self.full_commit(hook, push, named) if named and not run else ""
        with store.transaction():
            target = store.target(hook, push.repo, push.ref)
            busy = store.value("""SELECT id FROM runs INDEXED BY runs_open WHERE target = ?
                AND state IN ('queued', 'running') AND cause = 'rollback'""", target.id)
            if busy:
                raise SystemExit(f"hookd: rollback run {busy} is not over; hookd.py log -f {busy}")
            commit, release, restores = self.way_back(target, run, wanted)
            stands = next((row[1] for row in store.good(target.id)), "")
            subject = store.value("SELECT subject FROM runs WHERE id = ?", restores) or ""
            push = push._replace(commit=commit, subject=subject)
            number = store.add(target, push, "rollback", hook, payload=push_json(push),
                               goal=commit if hook.git else "", release=release, restores=restores)
            why = f"rolled back to {commit[:7]} by {user_name()}"
            store.pause((push.repo, push.ref), why, number, target.id)
        moves = f"from {stands[:7] or 'nothing'}" if stands != commit else "back"
        print(f"{moves} to {commit[:7]}; {push.place} is paused, `hookd.py resume {push.place}` "
              "lets pushes deploy again", flush=True)
        return self.follow(number, push)

    def cancel(self) -> int:
        """end RUN, or what runs and waits for REPO BRANCH"""
        store, who = self.store, f"by {user_name()}"
        with store.transaction():
            rows = self.runs("AND r.state IN ('queued', 'running')")
            for row in rows:
                if row.state == "queued":
                    store.move(row.id, "cancelled", note=who)
                else:
                    store.wish(row.id, who)
        if not rows:
            ended = [f"run {row.id} ended {row.state}" for row in self.runs("LIMIT 1")]
            why = "".join(ended) if self.options.repo.isdecimal() else ""
            raise SystemExit(f"hookd: nothing to cancel: {why or 'nothing runs or waits there'}")
        wake_daemon(self.state)
        sql = "SELECT state FROM runs WHERE id = ?"
        for row in rows:
            while store.value(sql, row.id) == "running" and daemon_words(self.state):
                time.sleep(0.05)
            state = store.value(sql, row.id)
            print(f"run {row.id} {state}: {row.push}" if state != "running" else
                  f"hookd: hookd is not running; run {row.id} is cancelled when it starts")
        return 0

    def pause(self) -> int:
        """hold back the runs of a branch, a repository, or all"""
        place, store, config = self.pause_place(), self.store, self.config
        if place[0] and config.hooks and not config.hooks_for(place[0]):
            raise self.no_hook()
        with store.transaction():
            store.execute("DELETE FROM pauses WHERE repo = ? AND ref = ?", *place)
            store.pause(place, self.options.why or f"by {user_name()}")
        wake_daemon(self.state)
        words = f" {self.place}" if self.options.repo else ""
        print(f"paused {self.place}; `hookd.py resume{words}` lifts it")
        return 0

    def resume(self) -> int:
        """lift the pause that was made with the same words"""
        place, store = self.pause_place(), self.store
        with store.transaction():
            if not store.lift("repo = ? AND ref = ?", *place):
                raise SystemExit(f"hookd: no pause was made for {self.place}; `hookd.py status` "
                                 "lists the pauses")
        wake_daemon(self.state, ASK)
        print(f"resumed {self.place}")
        self.say_pauses("still paused")
        for row in self.targets():
            name = f"{row['repo']} {row['branch']}"
            seen = store.seen(row["target"], row["ref"])
            if seen and seen != row["last_good"] and not row["running"] and not row["waiting"]:
                self.say(f"{name}: {seen[:7]} stays undeployed; `hookd.py run {name}` deploys the "
                         "newest commit")
        return 0

    def send(self) -> int:
        """a signed push to the running daemon, as GitHub would send it"""
        import uuid
        options, delivery, deleted = self.options, str(uuid.uuid4()), self.options.event == "delete"
        hook, push = self.find_hook("push" if deleted else options.event)
        commit = "" if deleted else options.commit
        if hook and hook.git and commit is None and push.event == "push":
            with contextlib.suppress(OSError):
                commit = remote_refs(hook, push.repo, self.state, "--heads", "--tags").get(push.ref)
        commit = os.urandom(20).hex() if commit is None else commit
        body = push_json(push._replace(commit=commit, deleted=deleted))
        digest = hmac.digest(self.secrets(hook)[0].encode(), body, "sha256").hex()
        status, text = self.post(body, {
            "Content-Type": JSON, "X-GitHub-Delivery": delivery, "X-GitHub-Event": push.event,
            "X-Hub-Signature-256": f"sha256={digest}",
            "X-Forwarded-For": "127.0.0.1"})  # for allow_from, on a unix socket
        print(text, flush=True)
        if options.commit and hook and hook.git and push.event == "push" and not deleted:
            print("hookd: with git, the newest commit of the branch is deployed; hookd.py run "
                  "--commit deploys a specific one", file=sys.stderr)
        if options.wait and (status == 202 or self.config.quiet):
            for row in self.store.runs("WHERE r.delivery = ?", delivery):
                return self.watch(row.id, True)
        return 0 if status == 202 or text == "ok" or text.startswith("pong") else 1

    def post(self, body: bytes, headers: Mapping[str, str]) -> tuple[int, str]:
        """POST to the running daemon, at the address that it noted; return status and text."""
        from http.client import HTTPConnection, HTTPException
        where, link = daemon_address(self.config), HTTPConnection("localhost")
        host, _, port = where.rpartition(":")
        socket.setdefaulttimeout(REQUEST_SECONDS)
        try:
            if where.startswith("unix:"):
                link.sock = socket.socket(socket.AF_UNIX)
                link.sock.connect(where[5:])
            else:  # 0.0.0.0 and :: lead to this machine
                link.sock = socket.create_connection((host.strip("[]"), int(port)))
            if self.config.tls_cert:
                import ssl
                context = ssl._create_unverified_context()  # it is ourselves
                link.sock = context.wrap_socket(link.sock)
            link.request("POST", self.config.path, body, headers)
            answer = link.getresponse()
            return answer.status, answer.read().decode().strip()
        except (OSError, HTTPException, ValueError) as error:
            raise SystemExit(f"hookd: no answer on {where} ({error}); is hookd running?") from None

    def status(self) -> int:
        """each target: last run, when, by whom, what waits and why; with REPO BRANCH its runs"""
        options, store, rows = self.options, self.store, self.targets()
        up = daemon_words(self.state)
        if options.repo and not rows:
            print(f"hookd: nothing has run for {self.place}", file=sys.stderr)
        if options.branch:
            head = "RUN STATE CAUSE COMMIT BY SUBJECT QUEUED TOOK NOTE"
            found = [clean(facts, RUN_FACTS, self.hidden) for row in rows
                     for facts in history(store, row["target"])]
        else:
            head = "TARGET RUN STATE COMMIT BY SUBJECT ENDED TOOK NOW"
            found = [clean(row, TARGET_FACTS, self.hidden) for row in rows]
        if options.json:
            print(json.dumps(found, indent=1))
        else:
            cells = map(self.cells, found)
            table(head.split(), ([row[name] for name in head.split()] for row in cells))
            self.say_pauses("paused")
            print(f"hookd is running, pid {up[1]}" if up else "hookd is not running")
        good = all(row["state"] in (None, "ok") for row in rows)
        return 0 if up and good else 1

    def say_pauses(self, word: str) -> None:
        for repo, ref, why in self.store.execute("SELECT repo, ref, why FROM pauses"):
            place = f"{repo} {short_name(ref)}".strip() or "everything"
            self.say(f"{word}: {place}: {why}")

    def cells(self, facts: Facts) -> dict[str, Any]:
        """Return what the tables of `status` show of a target or a run, by column."""
        now, took, doing, store = time.time(), facts["duration"], [], self.store
        queued, ended, paused = facts.get("queued"), facts["ended"], facts.get("paused")
        running, waiting = facts.get("running"), facts.get("waiting")
        if running:
            began = store.value("SELECT began FROM runs WHERE id = ?", running)
            doing += [f"run {running} has been running for {now - began:.0f} s", store.why(running)]
        if waiting:
            more = f" and {len(waiting) - 1} more" if len(waiting) > 1 else ""
            doing.append(f"run {waiting[0]}{more} waits: {store.why(waiting[0])}".rstrip(": "))
        elif paused is not None:
            doing.append(f"paused: {paused}")
        return {
            "TARGET": f"{facts.get('repo')} {facts.get('branch')}", "RUN": facts["run"],
            "STATE": facts["state"], "CAUSE": facts["cause"], "COMMIT": (facts["commit"] or "")[:7],
            "BY": facts["pusher"], "SUBJECT": facts["subject"], "NOTE": facts.get("note"),
            "QUEUED": queued and ago(queued, now), "ENDED": ended and ago(ended, now),
            "TOOK": None if took is None else f"{took:.1f}s",
            "NOW": redact(", ".join(filter(None, doing)), self.hidden)}

    def log(self) -> int:
        """a run's output, by RUN or REPO BRANCH; the newest run's without"""
        for row in self.runs("ORDER BY r.seq DESC, r.id DESC LIMIT 1"):
            note = f" ({row.note})" if row.note else ""
            self.say(f"hookd: run {row.id} {row.state}{note}: {row.push}", sys.stderr)
            self.watch(row.id, self.options.follow)
            return 0
        raise SystemExit("hookd: no such run; `hookd.py status` lists them")

    def secret(self) -> int:
        """the secret to paste into GitHub, made if there is none"""
        print("\n".join(self.secrets()))
        return 0


VERBS = {  # their docstrings are what --help says
    "serve": "", "check": "[REPO] [BRANCH] --online", "run": "REPO BRANCH --commit",
    "rollback": "REPO BRANCH [COMMIT|RUN]", "cancel": "RUN|REPO [BRANCH]",
    "pause": "[REPO] [BRANCH] -m", "resume": "[REPO] [BRANCH]",
    "send": "REPO BRANCH --event --commit --wait", "status": "[REPO] [BRANCH] --json",
    "log": "[RUN|REPO] [BRANCH] -f", "secret": "[REPO]"}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "REPO": {"dest": "repo", "help": "owner/repo"},
    "RUN|REPO": {"dest": "repo", "help": "a run's number, or owner/repo"},
    "BRANCH": {"dest": "branch", "help": "a branch, or a full ref (refs/...)"},
    "COMMIT|RUN": {"dest": "goal", "help": "where to go back to"},
    "-f": {"dest": "follow", "action": "store_true", "help": "follow until the run ends"},
    "-m": {"dest": "why", "type": escape, "metavar": "WHY", "help": "reason, shown by status"},
    "--commit": {"metavar": "ID", "help": "deploy this commit"},
    "--event": {"default": "", "choices": ("push", "delete", "workflow_run", "release", "ping"),
                "help": "event to send (default: the hook's)"},
    "--json": {"action": "store_true", "help": "print JSON"},
    "--online": {"action": "store_true", "help": "also ask each git remote"},
    "--wait": {"action": "store_true", "help": "follow the run; exit with its status"}}


def arguments(argv: Sequence[str]) -> "argparse.Namespace":
    """Parse a command line; usage errors exit 2."""
    import argparse
    top = argparse.ArgumentParser(prog="hookd.py", description=(__doc__ or "").split("\n")[0])
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "hookd.ini")
    top.add_argument("-c", metavar="FILE", dest="file", default=beside,
                     help="the ini (default: hookd.ini beside hookd.py)")
    top.add_argument("--version", action="version",
                     version=f"hookd {VERSION}, for Python 3.9 or later")
    parsers = top.add_subparsers(metavar="VERB", dest="verb")
    top.set_defaults(verb="serve", repo=None, branch=None)
    for verb, words in VERBS.items():
        about = getattr(Command, verb).__doc__
        parser = parsers.add_parser(verb, help=about, description=about)
        for word in words.split():
            name = word.strip("[]")
            if name.startswith("-"):
                parser.add_argument(name, **ARGUMENTS[name])
            else:
                optional = "?" if name != word else None
                parser.add_argument(metavar=name, nargs=optional, **ARGUMENTS[name])
    options = top.parse_args(argv)
    repo, branch, by_run = options.repo, options.branch, options.verb in ("cancel", "log")
    if repo and not REPOSITORY.fullmatch(repo) and not (by_run and repo.isdecimal()):
        top.error("REPO must be owner/repo")
    if branch is not None and not REF.fullmatch(re.sub("^(?!refs/)", "refs/heads/", branch)):
        top.error("BRANCH must be a valid git branch name")
    if "/" in (repo or "") and not branch and (by_run or options.verb == "check"):
        top.error(f"{options.verb} takes a REPO with its BRANCH")
    return options


def main(argv: Sequence[str]) -> int:
    """Do what a command line asks; return the exit status."""
    options = arguments(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a locale without some letters
    try:
        return int(getattr(Command(options, argv), options.verb)())
    except ConfigError as error:
        print("\n".join(error.args), file=sys.stderr)
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
