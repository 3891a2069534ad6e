"""Programs on this machine: where they are, and one run of one of them."""

from __future__ import annotations

import importlib.util
import pwd
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.servers.errors import ServerFailed


def identity(user: str | None) -> dict[str, Any]:
    """What ``subprocess`` must be told to start a program as *user*; None is ourselves."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def run(
    command: Sequence[str | Path],
    *,
    text: str = "",
    user: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """What *command* printed, given *text*; raises ``ServerFailed`` if it fails or takes 60 s."""
    try:
        ran = subprocess.run(
            command,
            check=False,
            cwd="/",
            env=environment,
            input=text,
            capture_output=True,
            text=True,
            timeout=60,
            **identity(user),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerFailed(f"{command[0]} did not run: {error}") from error
    if ran.returncode:
        raise ServerFailed(f"{command} failed, given {text!r}:\n{ran.stdout}{ran.stderr}")
    return str(ran.stdout)


def beside(program: str) -> list[Path]:
    """The folder of the program that the shell finds by this name, links followed, if any."""
    found = shutil.which(program)
    return [Path(found).resolve().parent] if found else []


def packaged(package: str, pattern: str) -> list[Path]:
    """What a package installed by pip holds at *pattern*."""
    found = importlib.util.find_spec(package)
    return sorted(Path(found.origin).parent.glob(pattern)) if found and found.origin else []


def first(folders: Iterable[Path], *names: str, user: str | None = None) -> Path | None:
    """The first folder whose programs of these names tell *user* their version."""
    for folder in folders:
        try:
            for name in names:
                run([folder / name, "--version"], user=user)
        except ServerFailed:
            continue
        return folder
    return None
