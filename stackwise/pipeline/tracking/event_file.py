"""TensorBoard's event files, written without its package."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from pathlib import Path

from stackwise.files import open_to_write

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bits reversed
_LARGEST = 3.4028234663852886e38  # of float32


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()


def masked_crc32c(data: bytes) -> int:
    """CRC-32C, turned by 15 bits and shifted by a constant, as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


class EventFile:
    """One of TensorBoard's event files, appended to; scalars alone: TFRecords of Event messages.

    A record is its length (8 bytes), the masked CRC-32C of that, the message, and the masked CRC-32C of the message.
    The messages are protocol buffers (tensorflow/core/util/event.proto, framework/summary.proto), of which four fields
    are needed: an import of the packages that have them all is an import of torch.

    Args:
        suffix: Ends its name; files of one second and directory need different ones.
    """

    def __init__(self, directory: Path, suffix: str) -> None:
        now = time.time()
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}{suffix}"
        self._file = open_to_write(directory / name, append=True)
        self._write(_double(1, now) + _bytes(3, b"brain.Event:2"))

    def scalar(self, tag: str, value: float, step: int, wall_time: float) -> None:
        """Append a value of a series; `value`: kept as float32, in which it may be infinite."""
        kept = value if math.isnan(value) or abs(value) <= _LARGEST else math.copysign(math.inf, value)
        summary = _bytes(1, _bytes(1, tag.encode()) + _key(2, 5) + struct.pack("<f", kept))
        self._write(_double(1, wall_time) + _key(2, 0) + _varint(step) + _bytes(5, summary))

    def flush(self) -> None:
        """Have what was appended on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, message: bytes) -> None:
        length = struct.pack("<Q", len(message))
        checks = (struct.pack("<I", masked_crc32c(part)) for part in (length, message))
        self._file.write(length + next(checks) + message + next(checks))


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _varint(len(value)) + value


def _double(field: int, value: float) -> bytes:
    return _key(field, 1) + struct.pack("<d", value)
