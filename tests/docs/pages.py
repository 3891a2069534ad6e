"""Follows a page of the documentation like a reader: saves its files, types its commands."""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import SkipTest

from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, SkipParser

from tests.support import PROJECT
from tests.support.servers import ports

#: Seconds until an output that a page shows has to be there.
PATIENCE = 120.0
#: Commands that a person repeats until they succeed and print what the page shows.
LOOKS = ("python check.py", "kill ")
#: Exit codes of commands that do what they should; some pages kill a process.
ENDS = (0, -signal.SIGKILL, 128 + signal.SIGKILL)
#: The port in the pages, in place of which each test has one of its own.
PORT = "6399"


@dataclass
class Reader:
    """A person with a terminal in an empty folder, where this package is installed."""

    folder: Path
    port: str = field(default_factory=lambda: str(ports.claim()))
    environment: Mapping[str, str] = field(default_factory=dict)
    background: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def follow(self, page: Path) -> int:
        """Do what *page* says; return the number of its blocks."""
        parsers = [
            CodeBlockParser(language="python", evaluator=self._save),
            CodeBlockParser(language="console", evaluator=self._type),
            SkipParser(),
        ]
        examples = list(Sybil(parsers=parsers).parse(page).examples())
        for example in examples:
            with suppress(SkipTest):  # of this block alone, with the reason that stands there
                example.evaluate()
        return len(examples)

    def leave(self) -> None:
        """End all processes that the page has started."""
        for process in self.background:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            process.wait()

    def _save(self, example: Example) -> None:
        """Save a block with a caption as a file; a block without one has to be Python."""
        text = self._mine(example.parsed)
        caption = re.search(r"^:caption: (\S+)$", self._source(example), re.MULTILINE)
        if caption is None:
            ast.parse(text)
            return
        path = self.folder / caption[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def _type(self, example: Example) -> None:
        """Run the commands of a block, and compare what they print."""
        for command, expected in commands(self._mine(example.parsed)):
            where = f"{example.path}:{example.line}: {command}"
            if command.endswith("&"):
                self._start(command.removesuffix("&"))
            else:
                self._run(command, expected, where)

    def _run(self, command: str, expected: list[str], where: str) -> None:
        """Run a command; look again while it does not print what the page shows."""
        until = time.monotonic() + PATIENCE
        while True:
            done = self._popen(command, stdout=subprocess.PIPE)
            output = done.communicate(timeout=PATIENCE)[0].decode()
            if done.returncode in ENDS and is_shown(expected, output):
                return
            if time.monotonic() > until or not command.startswith(LOOKS):
                shown = "\n".join(expected)
                raise AssertionError(
                    f"{where}\nexpected:\n{shown}\nprinted:\n{output}{self._logs()}"
                )
            time.sleep(0.5)

    def _start(self, command: str) -> None:
        self.background.append(self._popen(f"exec {command}", stdout=None))

    def _popen(self, command: str, stdout: int | None) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._variables(),
            stdout=stdout,
            stderr=subprocess.STDOUT if stdout else None,
            start_new_session=True,
        )

    def _variables(self) -> dict[str, str]:
        programs = str(Path(sys.executable).parent)
        return {
            **os.environ,
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(PROJECT),
            **self.environment,
        }

    def _mine(self, text: str) -> str:
        return text.replace(PORT, self.port)

    def _source(self, example: Example) -> str:
        return str(example.document.text[example.start : example.end])

    def _logs(self) -> str:
        return "".join(
            f"\n── {log.name}\n{log.read_text()[-4000:]}" for log in self.folder.glob("*.log")
        )


def commands(block: str) -> Iterator[tuple[str, list[str]]]:
    """The commands of a console block, each with the lines that it is shown to print."""
    command: str | None = None
    expected: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield command, expected
            command, expected = line[2:].strip(), []
        elif command is not None and command.endswith("\\"):
            command = command[:-1] + line.strip()
        elif line.strip():
            expected.append(line.rstrip())
    if command is not None:
        yield command, expected


def is_shown(expected: list[str], output: str) -> bool:
    """True if *output* has the *expected* lines, in this order; ``…`` stands for anything."""
    lines = iter(output.splitlines())
    return all(
        any(re.fullmatch(re.escape(shown).replace("…", ".*"), line.rstrip()) for line in lines)
        for shown in expected
    )
