"""A wire between a process and its server, which a test can cut, block, mute or slow down."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from typing_extensions import Self

from tests.support.servers import ports

Direction = Literal["up", "down"]  # up: from the client to the server

RESET_WHEN_CLOSED = struct.pack("ii", 1, 0)  # SO_LINGER on, for 0 s


class Proxy:
    """A port of its own that leads to *target_port*; whatever is done to it, ``heal`` undoes."""

    def __init__(self, target_port: int) -> None:
        self.port = ports.claim()
        self._target_port = target_port
        self._passing: set[Direction] = {"up", "down"}
        self._delay = 0.0
        self._links: set[_Link] = set()
        self._listener: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.accept()

    def through(self, url: str) -> str:
        """The same URL, by way of this proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    def cut(self) -> None:
        """Reset all connections, on both sides; new ones are taken as before."""
        self._call(self._cut, lambda _: True)

    def refuse(self) -> None:
        """Refuse new connections; those that exist go on."""
        self._call(self._refuse)

    def accept(self) -> None:
        """Take new connections again."""
        self._await(self._accept())

    def black_hole(self) -> None:
        """Swallow what either side sends, and that it left; connections stay, new ones too."""
        self._call(self._pass)

    @property
    def lossy(self) -> bool:
        """Whether a connection that is still there has lost bytes, not only its end."""
        return any(link.lost_bytes for link in tuple(self._links))

    def one_way(self, direction: Direction) -> None:
        """Let bytes through in this direction, and swallow the others."""
        self._call(self._pass, direction)

    def delay(self, seconds: float) -> None:
        """Hold all bytes for so long, in both directions."""
        self._delay = seconds

    def heal(self) -> None:
        """Be a plain wire again; connections that lost bytes meanwhile are reset."""
        self.delay(0)
        self._call(self._pass, "up", "down")
        self._call(self._cut, lambda link: link.lossy)
        self.accept()

    def close(self) -> None:
        """Reset all connections and give the port back."""
        self.refuse()
        self.cut()
        self._await(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        ports.release(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # What follows runs in the loop's own thread.

    def _pass(self, *directions: Direction) -> None:
        self._passing = set(directions)

    def _cut(self, which: Callable[[_Link], bool]) -> None:
        for link in filter(which, self._links):
            link.reset()

    def _refuse(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None

    async def _accept(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(self._connect, "127.0.0.1", self.port)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server = await asyncio.open_connection("127.0.0.1", self._target_port)
        except OSError:
            return _reset(writer)
        link = _Link(writer, server[1])
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump("up", reader, server[1], link),
                self._pump("down", server[0], writer, link),
            )
        finally:
            self._links.discard(link)
            link.close()

    async def _pump(
        self,
        direction: Direction,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        link: _Link,
    ) -> None:
        while True:
            try:
                chunk = await source.read(65_536)
                await asyncio.sleep(self._delay)
                if direction not in self._passing:
                    link.lossy = True
                    link.lost_bytes |= bool(chunk)
                elif chunk:
                    sink.write(chunk)
                    await sink.drain()
                else:
                    sink.write_eof()
            except OSError:
                if direction in self._passing:
                    return link.reset()
                link.lossy = True
                return None
            if not chunk:
                return None

    async def _finish(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    # What follows is called from other threads.

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        async def call() -> None:
            function(*arguments)

        self._await(call())

    def _await(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=10)


class _Link:
    """One client's connection and the one to the server that belongs to it."""

    def __init__(self, client: asyncio.StreamWriter, server: asyncio.StreamWriter) -> None:
        self.lossy = self.lost_bytes = False
        self._sides = (client, server)

    def reset(self) -> None:
        for side in self._sides:
            _reset(side)

    def close(self) -> None:
        for side in self._sides:
            side.close()


def _reset(side: asyncio.StreamWriter) -> None:
    if not side.is_closing():
        link = side.get_extra_info("socket")
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_WHEN_CLOSED)
        side.transport.abort()
