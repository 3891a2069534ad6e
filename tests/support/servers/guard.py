"""The parent of one server: it ends that server when the test process is gone.

Called as ``python -m tests.support.servers.guard TESTER STOP_SIGNAL USER COMMAND…``. It watches the
test process by its id, so that even a SIGKILL of it leaves no server behind, and it passes
SIGTERM on to the server as STOP_SIGNAL. Daemons that the server starts stay below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from tests.support.servers import processes
from tests.support.servers.programs import identity

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SECONDS_BETWEEN_LOOKS = 0.05


def guard(tester: int, stop_signal: int, user: str | None, command: list[str]) -> None:
    """Run *command* until it ends or the process *tester* does; then kill what is left."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Kept by its name until the end: a forgotten Popen collects its own child, unseen by us.
    server = subprocess.Popen(command, start_new_session=True, **identity(user))

    def stop(_signal: int, _frame: FrameType | None) -> None:
        os.kill(server.pid, stop_signal)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while server.pid not in _collect(os.WNOHANG) and os.getppid() == tester:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    processes.kill(os.getpid())
    _collect()


def _collect(options: int = 0) -> set[int]:
    """Collect children that have ended, adopted ones too; waits for all but with WNOHANG."""
    ended: set[int] = set()
    with contextlib.suppress(ChildProcessError):
        while pid := os.waitpid(-1, options)[0]:
            ended.add(pid)
    return ended


if __name__ == "__main__":
    _, _tester, _stop_signal, _user, *_command = sys.argv
    guard(int(_tester), int(_stop_signal), _user or None, _command)
