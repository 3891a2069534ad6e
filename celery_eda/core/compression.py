"""Bounded decompression: a small message cannot become gigabytes in a worker's memory.

Kombu decompresses a message as soon as it arrives. Here its decoders get a limit, beyond which they
raise, so that the message is refused like any other that cannot be decoded.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

from kombu import compression

from celery_eda.errors import TooLarge

#: Bytes of memory for an LZMA decoder: its highest preset needs 65 MiB.
LZMA_MEMORY = 100 * 2**20
#: Streams of a body; the rest of the body is copied after each one.
MOST_STREAMS = 100


def limit_decompression(limit: int, compressed: int) -> None:
    """Limit every message body in this process to *limit* bytes, and *compressed* ones before that.

    Decompression takes time for each byte of a body, and for each stream in it, however little
    comes out.
    """
    for content_type, make in _DECODERS.items():
        try:
            encoder, _ = compression.get_encoder(content_type)
        except KeyError:
            continue  # its library is not installed
        decompress = partial(_decompress, make, limit, compressed)
        compression.register(encoder, decompress, content_type)


def _decompress(make: Callable[[], Any], limit: int, compressed: int, data: bytes) -> bytes:
    """Decompress *data*, which may consist of several streams.

    Raises:
        TooLarge: there are more than *compressed* bytes, or the result would have more than *limit*
            bytes, or there are too many streams.
        ValueError: a stream is incomplete.
    """
    if len(data) > compressed:
        raise TooLarge(
            f"The compressed body has {len(data)} bytes; eda_max_message_bytes is {compressed}."
        )
    parts: list[bytes] = []
    room = limit
    for _ in range(MOST_STREAMS):
        decoder = make()
        part = decoder.decompress(data, room + 1)
        parts.append(part)
        room -= len(part)
        if room < 0:
            raise TooLarge(
                f"The body has more than {limit} bytes when decompressed, the limit set by "
                "eda_max_decompressed_bytes."
            )
        if not decoder.eof:
            raise ValueError("the compressed body is incomplete")
        data = decoder.unused_data
        if not data or isinstance(decoder, _ZLIB):
            return b"".join(parts)
    raise TooLarge(f"The compressed body consists of more than {MOST_STREAMS} streams.")


class _Brotli:
    """Brotli's decoder, with the interface of the others. Needs Brotli 1.2, which has a limit."""

    unused_data = b""

    def __init__(self) -> None:
        self._decoder = compression.brotli.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, limit: int) -> bytes:
        return bytes(self._decoder.process(data, output_buffer_limit=limit))


def _zstd() -> Any:
    return compression.zstd.ZstdDecompressor()


_ZLIB = type(zlib.decompressobj())
_DECODERS: dict[str, Callable[[], Any]] = {
    "application/x-gzip": zlib.decompressobj,
    "application/x-bz2": bz2.BZ2Decompressor,
    "application/x-lzma": partial(lzma.LZMADecompressor, memlimit=LZMA_MEMORY),
    "application/zstd": _zstd,
    "application/x-brotli": _Brotli,
}
