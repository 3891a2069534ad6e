"""The test suites of Celery and kombu, taken from the package registry for one run.

They are unpacked into a folder of the test; this repository holds none of their code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as Xml
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support import PROJECT

#: Seconds for one run of a suite.
LONGEST = 3000
#: How often tests that failed are run again: several of them measure times.
REPETITIONS = 3
#: The folder of packages that a suite needs.
NEEDS = "needs"


@dataclass
class Outcomes:
    """The tests of a suite, by name, and the output of the last run."""

    passed: set[str]
    failed: set[str]
    output: str


@dataclass
class Suite:
    """The suite of the installed version of a package.

    Attributes:
        folder: has the package ``t`` of the suite, and nothing of the package that it tests.
    """

    folder: Path

    @classmethod
    def of(cls, package: str, folder: Path, *needs: str) -> Suite:
        """The suite of *package*, downloaded into *folder*; skips the test without a registry.

        Args:
            package: celery or kombu.
            folder: an empty folder.
            needs: packages that the suite imports and we do not.
        """
        wanted = f"{package}=={version(package)}"
        _pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), wanted)
        if needs:
            _pip("install", "--target", str(folder / NEEDS), *needs)
        (archive,) = folder.glob("*.tar.gz")
        root = archive.name.removesuffix(".tar.gz")
        with tarfile.open(archive) as packed:
            members = [
                each
                for each in packed.getmembers()
                if each.name.startswith(f"{root}/t/") or each.name == f"{root}/pyproject.toml"
            ]
            packed.extractall(folder, members, filter="data")
        return cls(folder / root)

    def run(
        self,
        tests: Iterable[str],
        *,
        plugin: str | None = None,
        environment: Mapping[str, str],
        options: Iterable[str] = (),
        clean: Callable[[], object] = lambda: None,
    ) -> Outcomes:
        """Run *tests*, and those that failed again, as both suites do on their own machines.

        Args:
            tests: files below the folder.
            plugin: a plugin of pytest that puts celery_eda into the suite.
            environment: variables beside those of this process.
            options: of pytest.
            clean: empties the broker before each run; several tests leave messages.
        """
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-W", "ignore"]
        command += ["--continue-on-collection-errors"]  # other brokers' tests need their libraries
        command += ["-p", plugin] if plugin else []
        command += [*options, *tests]
        clean()
        outcomes = self._run(command, environment)
        for _ in range(REPETITIONS):
            if not outcomes.failed:
                break
            clean()
            again = self._run([*command, "--last-failed"], environment)
            outcomes = Outcomes(outcomes.passed | again.passed, again.failed, again.output)
        return outcomes

    def _run(self, command: list[str], environment: Mapping[str, str]) -> Outcomes:
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        output = self.folder / "output"
        path = [str(PROJECT), str(self.folder.parent / NEEDS)]
        programs = [str(Path(sys.executable).parent), os.environ["PATH"]]  # `celery` is one
        with output.open("wb") as file:
            subprocess.run(
                [*command, f"--junit-xml={report}"],
                check=False,
                cwd=self.folder,
                env={
                    **os.environ,
                    "PATH": os.pathsep.join(programs),
                    "PYTHONPATH": os.pathsep.join(path),
                    **environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LONGEST,
            )
        text = output.read_text(errors="replace")
        assert report.exists(), f"The run ended without a report:\n{text[-5000:]}"
        passed, failed = set(), set()
        for case in Xml.parse(report).iter("testcase"):
            name = f"{case.get('classname')}.{case.get('name')}".removeprefix("t.integration.")
            if case.find("failure") is not None or case.find("error") is not None:
                failed.add(name)
            elif case.find("skipped") is None:
                passed.add(name)
        return Outcomes(passed - failed, failed, text)


def _pip(*words: str) -> None:
    """Run pip; skips the test if the registry does not give what it asks for."""
    command = [sys.executable, "-m", "pip", "--quiet", *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip {' '.join(words)} failed: {done.stderr[-500:]}")
