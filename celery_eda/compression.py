"""Decompression that ends: a few bytes cannot become gigabytes in a worker's memory.

Kombu decompresses a message as soon as it comes. Here its decoders get a bound, beyond which they
raise instead, so that the message is treated as one that cannot be decoded.
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

#: Bytes that a decoder of LZMA may use itself: the highest of its presets needs 65 MiB.
LZMA_MEMORY = 100 * 2**20


def bound(most: int) -> None:
    """Let no message of this process become larger than *most* bytes by decompression."""
    for content_type, make in _DECODERS.items():
        try:
            encoder, _ = compression.get_encoder(content_type)
        except KeyError:
            continue  # not there
        compression.register(encoder, partial(_decompress, make, most), content_type)


def _decompress(make: Callable[[], Any], most: int, data: bytes) -> bytes:
    """*data*, of one stream or several, decompressed.

    Raises:
        TooLarge: it would have more than *most* bytes.
        ValueError: it ends too early.
    """
    parts: list[bytes] = []
    room = most
    while True:
        decoder = make()
        part = decoder.decompress(data, room + 1)
        parts.append(part)
        room -= len(part)
        if room < 0:
            raise TooLarge(
                f"The body has more than {most} bytes when decompressed, the most that "
                "eda_max_decompressed_bytes allows."
            )
        if not decoder.eof:
            raise ValueError("the compressed body ends too early")
        data = decoder.unused_data
        if not data or isinstance(decoder, _ZLIB):
            return b"".join(parts)


class _Brotli:
    """Brotli's decoder, to be used as the others are. Before its version 1.2 it had no bound."""

    unused_data = b""

    def __init__(self) -> None:
        self._decoder = compression.brotli.Decompressor()

    @property
    def eof(self) -> bool:
        return bool(self._decoder.is_finished())

    def decompress(self, data: bytes, most: int) -> bytes:
        return bytes(self._decoder.process(data, output_buffer_limit=most))


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
