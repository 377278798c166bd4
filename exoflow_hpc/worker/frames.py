"""Length-prefixed msgpack frames over a stream socket."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgpack

__all__ = ["FrameReader", "decode", "encode"]

_HEADER = struct.Struct("<Q")


def encode(message: Any) -> bytes:
    """Return the frame of a msgpack-able *message*; ValueError if a part of it has 4 GiB or more."""
    try:
        body = msgpack.packb(message)
    except UnicodeEncodeError:  # lone surrogates in a user's message: they shall not cost the message
        body = msgpack.packb(message, unicode_errors="surrogatepass")
    return _HEADER.pack(len(body)) + body


def decode(frame: bytes) -> Any:
    """Return the message of one whole frame."""
    return _unpack(memoryview(frame)[_HEADER.size :], len(frame) - _HEADER.size)


class FrameReader:
    """Cut a byte stream into messages, however the bytes arrive."""

    def __init__(self) -> None:
        #: starts at the header of a frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Take bytes and yield each message that is complete now."""
        if not self._buffer and len(data) >= _HEADER.size:
            (nbytes,) = _HEADER.unpack_from(data)
            if len(data) == _HEADER.size + nbytes:  # as most of them come
                yield _unpack(memoryview(data)[_HEADER.size :], nbytes)
                return
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (nbytes,) = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + nbytes
            if len(self._buffer) < end:
                return
            with memoryview(self._buffer) as view:
                message = _unpack(view[_HEADER.size : end], nbytes)
            del self._buffer[:end]
            yield message


def _unpack(body: memoryview, nbytes: int) -> Any:
    return msgpack.unpackb(
        body, strict_map_key=False, unicode_errors="surrogatepass", max_bin_len=nbytes, max_str_len=nbytes
    )
