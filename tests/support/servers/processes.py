"""All processes below one process: frozen, thawed or killed as a whole.

They are found by descent, not by process group: PostgreSQL's backends and Erlang's
daemons leave the group they were started in.
"""

from __future__ import annotations

import contextlib

import psutil

GONE = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}


def below(pid: int) -> list[psutil.Process]:
    """Every living descendant of *pid*, which itself is not included."""
    try:
        descendants = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [each for each in descendants if _status(each) not in GONE]


def freeze(pid: int) -> None:
    """SIGSTOP all descendants, also those that are started meanwhile."""
    stopped: set[psutil.Process] = set()
    while running := [each for each in below(pid) if each not in stopped]:
        for each in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.suspend()
        stopped.update(running)


def thaw(pid: int) -> None:
    """SIGCONT all descendants."""
    for each in below(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.resume()


def kill(pid: int) -> None:
    """SIGKILL all descendants; none of them does anything after the first one died."""
    freeze(pid)
    for each in below(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()


def frozen(pid: int) -> bool:
    """Whether a descendant is stopped."""
    return any(_status(each) == psutil.STATUS_STOPPED for each in below(pid))


def _status(candidate: psutil.Process) -> str:
    try:
        return str(candidate.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_DEAD)
