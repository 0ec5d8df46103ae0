"""The packet format a second time, by struct alone.

``python tests/vectors/make_packet.py > tests/vectors/packet.json`` writes the vectors, always the same.
"""

from __future__ import annotations

import json
import struct

MAGIC = b"tacit/packet/1\n\0"


def named(name: bytes) -> bytes:
    return bytes((len(name),)) + name


def config(name: bytes, *entries: bytes, count: int | None = None) -> bytes:
    return named(name) + struct.pack(">H", len(entries) if count is None else count) + b"".join(entries)


def array(name: bytes, *shape: int) -> bytes:
    return named(name) + struct.pack(f">B{len(shape)}I", len(shape), *shape)


def packet(configs: list[bytes], arrays: list[bytes], numbers: bytes = b"", *, filler: bytes = b"\0") -> bytes:
    head = bytes((len(configs), len(arrays))) + b"".join((*configs, *arrays))
    data = MAGIC + struct.pack(">I", len(head)) + head
    return data + filler * (-len(data) % 64) + numbers


TEXT = named(b"task") + b"s" + struct.pack(">I", 6) + b"digits"
ROUND = named(b"round") + b"i" + struct.pack(">q", -(2**63))
RATE = named(b"lr") + b"f" + struct.pack(">d", 0.1)
FLAG = named(b"test") + b"b\1"
BYTES = named(b"key") + b"x" + struct.pack(">I", 2) + b"\xff\0"
NUMBERS = struct.pack("<7f", 1, -2, 0.5, float("inf"), 0, 4, float("nan"))
JOB, MODEL = config(b"job", TEXT, ROUND, RATE, FLAG, BYTES), config(b"arrays", array(b"w", 2, 3), array(b"b", 1))

POSITIVE = {
    "nothing": packet([], []),
    "a request": packet([JOB], [MODEL], NUMBERS),
    "a refusal": packet([config(b"refusal", named(b"word") + b"s" + struct.pack(">I", 8) + b"declined")], []),
    "empty records and arrays": packet(
        [config(b"a")], [config(b"b"), config(b"c", array(b"x", 0, 5), array(b"y"))], b"1234"
    ),
    "a name that is not ASCII": packet([config("größe".encode(), FLAG)], []),
}
NEGATIVE = {
    "another version": b"tacit/packet/2\n\0" + packet([JOB], [MODEL], NUMBERS)[16:],
    "a byte too few": packet([JOB], [MODEL], NUMBERS)[:-1],
    "a byte too many": packet([JOB], [MODEL], NUMBERS) + b"\0",
    "filler that is not zero": packet([JOB], [MODEL], NUMBERS, filler=b"\1"),
    "no filler": packet([JOB], [])[:-20],
    "a record twice": packet([JOB, JOB], []),
    "a record of arrays named like a config": packet([config(b"job")], [config(b"job")]),
    "a key twice": packet([config(b"job", TEXT, TEXT)], []),
    "an array twice": packet([], [config(b"m", array(b"w", 1), array(b"w", 1))], bytes(8)),
    "more entries announced than there are": packet([config(b"job", TEXT, count=2)], []),
    "fewer entries announced than there are": packet([config(b"job", TEXT, FLAG, count=1)], []),
    "an empty name": packet([config(b"")], []),
    "an empty key": packet([config(b"job", b"\0b\1")], []),
    "an unknown type": packet([config(b"job", named(b"k") + b"l\1")], []),
    "a bool of 2": packet([config(b"job", named(b"k") + b"b\2")], []),
    "a float that is infinite": packet([config(b"job", named(b"k") + b"f" + struct.pack(">d", float("inf")))], []),
    "a float that is no number": packet([config(b"job", named(b"k") + b"f" + struct.pack(">d", float("nan")))], []),
    "a text that is not UTF-8": packet([config(b"job", named(b"k") + b"s\0\0\0\1\xff")], []),
    "a name that is not UTF-8": packet([config(b"\xff")], []),
    "a text longer than the head": packet([config(b"job", named(b"k") + b"s\xff\xff\xff\xff")], []),
    "nine dimensions": packet([], [config(b"m", array(b"w", *[1] * 9))], bytes(4)),
    "an array longer than the packet": packet([], [config(b"m", array(b"w", 2))], bytes(4)),
    "a shape whose product is beyond 64 bits": packet([], [config(b"m", array(b"w", *[2**32 - 1] * 8))], bytes(4)),
    "an array shorter than the packet": packet([], [config(b"m", array(b"w", 1))], bytes(8)),
    "seventeen records": packet([config(bytes((97 + at,))) for at in range(17)], []),
    "a head longer than the packet": MAGIC + b"\x00\x10\x00\x00" + bytes(44),
    "a head of four gigabytes": MAGIC + b"\xff\xff\xff\xff" + bytes(44),
    "nothing at all": b"",
    "a magic and no more": MAGIC,
}

if __name__ == "__main__":
    positive, negative = ({name: data.hex() for name, data in part.items()} for part in (POSITIVE, NEGATIVE))
    print(json.dumps({"positive": positive, "negative": negative}, indent=1))
