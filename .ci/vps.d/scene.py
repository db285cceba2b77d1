"""A scene: checks that share one server, run in the order in which they are written."""

from __future__ import annotations

import textwrap
import traceback
from typing import Callable

from machine import FailedError, wait_until
from server import Server


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


__all__ = ["FailedError", "Scene", "wait_until"]
