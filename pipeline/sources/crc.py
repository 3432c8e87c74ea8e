"""crc32c (Castagnoli) of long byte strings with numpy: lanes side by side, then folded together.

A CRC that starts at zero is linear over GF(2): crc(a + b) = crc(a followed by len(b) zero bytes) ^ crc(b), zero bytes
before a string change nothing, and starting at all ones equals inverting the first four bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]

POLYNOMIAL = 0x82F63B78
LANES = 4096
LEAST = 64
"""Below so many bytes a plain loop is faster."""


def crc32c(data: bytes | memoryview) -> int:
    """The crc32c of a byte string."""
    if len(data) < LEAST:
        crc = 0xFFFFFFFF
        for byte in data:
            crc = (crc >> 8) ^ int(TABLE[(crc ^ byte) & 255])
        return crc ^ 0xFFFFFFFF
    width = -(-len(data) // LANES)
    padded = np.zeros(LANES * width, np.uint8)
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    padded[start : start + 4] ^= 255
    lanes = np.zeros(LANES, np.uint32)
    for column in np.ascontiguousarray(padded.reshape(LANES, width).T):
        lanes = _step(lanes, column)
    skip = _zeros(width)
    while len(lanes) > 1:
        lanes = _applied(skip, lanes[0::2]) ^ lanes[1::2]
        skip = _applied(skip, skip)
    return int(lanes[0]) ^ 0xFFFFFFFF


def masked(crc: int) -> int:
    """The form in which TFRecord files store it."""
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> Words:
    one, table = np.uint32(1), np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> one) ^ (table & one) * np.uint32(POLYNOMIAL)
    return table


TABLE = _table()


def _step(crc: Words, byte: NDArray[np.uint8]) -> Words:
    return (crc >> np.uint32(8)) ^ TABLE[(crc ^ byte) & np.uint32(255)]


def _zeros(count: int) -> Words:
    """What `count` zero bytes do to each of the 32 bits of a CRC: a linear map as the images of its basis."""
    power, result = _step(np.uint32(1) << np.arange(32, dtype=np.uint32), np.zeros(32, np.uint8)), None
    while count:
        if count & 1:
            result = power if result is None else _applied(power, result)
        power, count = _applied(power, power), count >> 1
    return power if result is None else result


def _applied(linear: Words, words: Words) -> Words:
    """Apply a linear map to many words."""
    result = np.zeros_like(words)
    for bit in range(32):
        result ^= np.where((words >> np.uint32(bit)) & np.uint32(1), linear[bit], np.uint32(0))
    return result
