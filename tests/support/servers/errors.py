"""What can go wrong with a test server.

Server errors
├── ServerUnavailable   there is none here: the test is skipped, or fails where servers are required
└── ServerFailed        it is here and did not do its part: the test fails
"""

from __future__ import annotations


class ServerUnavailable(Exception):
    """No such server can be had, or it is not ours to kill; says how to get one."""


class ServerFailed(Exception):
    """A server did not start, did not answer or did not stop; shows the end of its log."""
