"""The contestant's side of the protocol: runs and times the calls read from standard input.

A line is ``["verb", [arguments]]``; the answer has the value, the seconds and the seconds of CPU.
All other output goes to standard error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import psutil

#: The payload of the messages of all contestants: about 1 KB of JSON.
PAYLOAD = "x" * 1000


def environment(name: str) -> str:
    """A variable set by the stage, e.g. ``DATABASE``, ``BROKER``, ``QUEUE``; empty if unset."""
    return os.environ.get(f"BENCH_{name}", "")


def serve(verbs: Mapping[str, Callable[..., Any]]) -> None:
    """Serve calls until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = _timed(verbs[verb], arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": repr(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _timed(act: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    gc.collect()
    machine, cpu, begun = _machine(), time.process_time(), time.perf_counter()
    value = act(*arguments)
    seconds, used = time.perf_counter() - begun, time.process_time() - cpu
    return {"value": value, "seconds": seconds, "cpu": used, "machine": _machine() - machine}


def _machine() -> float:
    """Seconds of CPU that all processes together have used, on all cores."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq + times.steal)
