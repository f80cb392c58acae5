"""Damaged files, quickly: bytes that are changed at random from a seed, with a liking for headers and their numbers."""

import random
import re
from collections.abc import Callable

LANDMARKS = re.compile(rb"PK\x01\x02|PK\x03\x04|PK\x05\x06|PK\x06\x06|\x93NUMPY|\{")
NUMBERS = (0, 1, 2, 8, 127, 255, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)


def _region(content: bytes, rng: random.Random) -> tuple[int, int]:
    """A part of the content, more often short than long."""
    start = rng.randrange(len(content) + 1)
    return start, min(len(content), start + rng.choice((1, 2, 4, 8, 30, 100, len(content) // 2)))


def flip(content: bytearray, other: bytes, rng: random.Random) -> None:
    """One bit."""
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def set_byte(content: bytearray, other: bytes, rng: random.Random) -> None:
    content[rng.randrange(len(content))] = rng.choice((0, 255, 127, 10, 48, rng.randrange(256)))


def truncate(content: bytearray, other: bytes, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def insert(content: bytearray, other: bytes, rng: random.Random) -> None:
    start, end = _region(content, rng)
    content[start:start] = rng.randbytes(end - start)


def delete(content: bytearray, other: bytes, rng: random.Random) -> None:
    start, end = _region(content, rng)
    del content[start:end]


def duplicate(content: bytearray, other: bytes, rng: random.Random) -> None:
    start, end = _region(content, rng)
    place = rng.randrange(len(content) + 1)
    content[place:place] = content[start:end]


def splice(content: bytearray, other: bytes, rng: random.Random) -> None:
    """A part of the other file, at its place or another, instead of what is there or before it."""
    start, end = _region(other, rng)
    place = start if rng.random() < 0.5 else rng.randrange(len(content) + 1)
    content[place : place + (end - start) * rng.randrange(2)] = other[start:end]


def append(content: bytearray, other: bytes, rng: random.Random) -> None:
    """All of the other file, before or behind."""
    place = rng.choice((0, len(content)))
    content[place:place] = other


def zeros(content: bytearray, other: bytes, rng: random.Random) -> None:
    start, end = _region(content, rng)
    content[start:end] = bytes(end - start)


def header(content: bytearray, other: bytes, rng: random.Random) -> None:
    """A number in a header: of the zip's, of an array's, or of the length with which a .safetensors file begins."""
    landmarks = [0, *(found.start() for found in LANDMARKS.finditer(content))]
    place, size = rng.choice(landmarks) + rng.randrange(48), rng.choice((1, 2, 4, 8))
    if rng.random() < 0.3:
        place = 0
    old = int.from_bytes(content[place : place + size], "little")
    number = rng.choice((*NUMBERS, old + 1, old - 1, old * 2, len(content)))
    content[place : place + size] = (number % 256**size).to_bytes(size, "little")


def digits(content: bytearray, other: bytes, rng: random.Random) -> None:
    """A number in a text: a shape, an offset."""
    found = list(re.finditer(rb"\d+", content))
    if found:
        chosen = rng.choice(found)
        number = rng.choice((*NUMBERS, -1, 10**12, 10**30, int(chosen[0][:9]) + 1))
        content[chosen.start() : chosen.end()] = str(number).encode()


MUTATIONS: tuple[Callable[[bytearray, bytes, random.Random], None], ...] = (
    *(flip, set_byte, truncate, insert, delete, duplicate, splice, append, zeros, header, header, digits),
)


def mutated(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """The content with one to four changes; ``other`` is another file of its kind."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if changed:
            rng.choice(MUTATIONS)(changed, other, rng)
    return bytes(changed)
