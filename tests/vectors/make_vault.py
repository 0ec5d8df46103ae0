"""Makes ``vault.json``: sealed files with fixed keys, from primitives alone and by the page of the protocol.

Nothing of Tacit is imported, and Cobblestone is put together here from HKDF and AES-GCM by its own specification
(c2sp.org/chunked-encryption), so the vectors are another path to the same bytes. Run it to write them anew; a test
runs it and compares.

A file is a length and the stretches of it that are not zero, as ``[offset, hex]``: two thirds of a small sealed file
are padding. ``good`` files open to their content. ``bad`` files have one fault each, and the right checksums, MACs and
tags wherever the fault lets them have any: no other check may be what refuses them.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import hmac
import json
import struct
import sys
import unicodedata
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA512
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

Json = dict[str, Any]

FILE_KEY = bytes(range(32))
KEY_ID, KEY = "00112233445566778899aabbccddeeff", bytes(range(100, 132))
PHRASE = "pferd batterie heftklammer gru\u0308n"
STRETCH = {"lanes": 1, "memory_kib": 19456, "passes": 2, "salt": "0f0e0d0c0b0a09080706050403020100"}
RECOVERY_ID, RECOVERY_SEEDS = "ffeeddccbbaa99887766554433221100", (bytes(range(64)), bytes(range(64, 96)))
HEADER: Json = {
    "content": "file",
    "created": 1_700_000_000,
    "generation": 3,
    "object": "a1b2c3d4e5f60718293a4b5c6d7e8f90",
    "purpose": "checkpoint",
    "run": "run-7",
}
CHUNK = 16384


def text_of(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def cobblestone(key: bytes, context: bytes, content: bytes, salt: bytes, last: bool = True) -> bytes:
    """Cobblestone-256; ``last`` is False for the fault of a message without its last chunk."""
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    derived = HKDFExpand(SHA512(), 32 + 12 + 32, info).derive(key)
    nonce, cipher, out = int.from_bytes(derived[32:44], "big"), AESGCM(derived[:32]), salt + derived[44:]
    for number in range(len(content) // CHUNK + last):
        chunk = content[number * CHUNK : (number + 1) * CHUNK]
        out += cipher.encrypt((nonce ^ number).to_bytes(12, "big"), chunk, None)
    return out


def kid_of(identifier: str) -> str:
    return hashlib.sha256(b"tacit/vault/1/kid\n" + bytes.fromhex(identifier)).hexdigest()[:32]


def wrap(block: bytes, label: Json, key: bytes, file_key: bytes = FILE_KEY, salt: int = 0x55) -> Json:
    context = b"tacit/vault/1/wrap\n" + hashlib.sha256(block).digest() + text_of(label)
    wrapped = cobblestone(key, context, file_key, bytes([salt]) * 24)
    return label | {"wrapped": base64.b64encode(wrapped).decode()}


def key_wrap(block: bytes, **other: Any) -> Json:
    return wrap(block, {"kid": kid_of(KEY_ID), "kind": "key"}, KEY, **other)


def passphrase_wrap(block: bytes, stretch: Json = STRETCH, **other: Any) -> Json:
    phrase = unicodedata.normalize("NFC", PHRASE).encode()
    salt, rounds, lanes, memory = (stretch[name] for name in ("salt", "passes", "lanes", "memory_kib"))
    key = Argon2id(salt=bytes.fromhex(salt), length=32, iterations=rounds, lanes=lanes, memory_cost=int(memory)).derive(
        phrase
    )
    return wrap(block, {"kdf": stretch, "kind": "passphrase"}, key, **other)


def block_of(header: Any = HEADER, *, text: bytes | None = None, **other: Any) -> bytes:
    text = text_of(header) if text is None else text
    magic, version, suite = other.get("magic", b"\x89TACIT\r\n"), other.get("version", 1), other.get("suite", 1)
    prefix = struct.pack(">8sHHI", magic, version, suite, other.get("length", len(text)))
    return (prefix + text + other.get("after", b"")).ljust(4096, b"\0")


def keys_of(block: bytes) -> tuple[bytes, bytes]:
    info = b"tacit/vault/1/file\n" + hashlib.sha256(block).digest()
    both = HKDFExpand(SHA256(), 64, info).derive(FILE_KEY)
    return both[:32], both[32:]


def slot_of(block: bytes, wraps: Any, *, text: bytes | None = None, after: bytes = b"", length: int = -1) -> bytes:
    text = text_of({"wraps": wraps}) if text is None else text
    content = ((len(text) if length < 0 else length).to_bytes(4, "big") + text + after).ljust(4064, b"\0")[:4064]
    return content + hmac.digest(keys_of(block)[1], content, "sha256")


def body_of(block: bytes, content: bytes, *, last: bool = True) -> bytes:
    context = b"tacit/vault/1/body\n" + hashlib.sha256(block).digest()
    return cobblestone(keys_of(block)[0], context, content, bytes([0xAA]) * 24, last)


def file_of(content: bytes, wraps: str = "key", block: bytes | None = None) -> bytes:
    block = block_of() if block is None else block
    made = {"key": key_wrap, "passphrase": passphrase_wrap}
    return block + slot_of(block, [made[name](block) for name in wraps.split()]) + bytes(4096) + body_of(block, content)


FOLDER = {"images/Größe \U0001d538.txt": b"x" * 20_000, "schema.toml": b'target = "ill"', "train/empty": b""}


def folder_of(files: dict[str, bytes]) -> bytes:
    index = text_of([[name, len(content)] for name, content in sorted(files.items())])
    return b"tacit/folder/1\n" + len(index).to_bytes(4, "big") + index + b"".join(files[name] for name in sorted(files))


def good() -> dict[str, tuple[bytes, bytes]]:
    """Files that open, each with its content."""
    long, block = bytes(i * 7 % 251 for i in range(2 * CHUNK + 5)), block_of()
    slot = slot_of(block, [key_wrap(block)])
    return {
        "empty": (file_of(b""), b""),
        "short": (file_of(b"the weights of clinic 7"), b"the weights of clinic 7"),
        "one whole chunk": (file_of(long[:CHUNK]), long[:CHUNK]),
        "three chunks": (file_of(long), long),
        "passphrase": (file_of(b"by heart", "passphrase"), b"by heart"),
        "two recipients": (file_of(b"either", "key passphrase"), b"either"),
        "folder": (file_of(folder_of(FOLDER), block=block_of(HEADER | {"content": "folder"})), folder_of(FOLDER)),
        "change of keys torn in the spare slot": (
            block + slot + slot[:1000].ljust(4096, b"\0") + body_of(block, b"x"),
            b"x",
        ),
        "change of keys torn in its own slot": (
            block + (slot[:100] + bytes(3996)) + slot + body_of(block, b"x"),
            b"x",
        ),
    }


def bad() -> dict[str, bytes]:
    """Files that must be refused, for one reason each."""
    content, block = b"the weights of clinic 7", block_of()
    whole = file_of(content)
    slot, spare, body = slot_of(block, [key_wrap(block)]), bytes(4096), body_of(block, content)
    long = body_of(block, bytes(2 * CHUNK + 5))
    first, second = long[56 : 56 + CHUNK + 16], long[56 + CHUNK + 16 : 56 + 2 * (CHUNK + 16)]

    def with_block(**other: Any) -> bytes:
        return file_of(content, block=block_of(**other))

    def with_slot(changed: bytes) -> bytes:
        return block + changed + spare + body

    def header(**changes: Any) -> bytes:
        return with_block(header=HEADER | changes)

    def kdf(**changes: Any) -> bytes:
        return with_slot(slot_of(block, [passphrase_wrap(block, STRETCH | changes)]))

    def said(**changes: Any) -> bytes:
        """Parameters that nobody could run: the wrap is one of others."""
        entry = copy.deepcopy(passphrase_wrap(block))
        entry["kdf"] |= changes
        return with_slot(slot_of(block, [entry]))

    entry = key_wrap(block)
    raw = base64.b64decode(entry["wrapped"])
    flipped = base64.b64encode(raw[:-1] + bytes([raw[-1] ^ 1])).decode()
    loose = entry["wrapped"][:-2] + chr(ord(entry["wrapped"][-2]) + 1) + "="
    nested = b"[" * 4000
    other_block = block_of(HEADER | {"generation": 4})
    return {
        "magic": with_block(magic=b"\x89TACIS\r\n"),
        "magic after a text transfer": with_block(magic=b"\x89TACIT\n\0"),
        "format 2": with_block(version=2),
        "format 0": with_block(version=0),
        "suite 2": with_block(suite=2),
        "suite 0": with_block(suite=0),
        "header length beyond its block": with_block(length=4096),
        "header length of 4 GiB": with_block(length=2**32 - 1),
        "header length 0": with_block(length=0),
        "header padding not zero": with_block(after=b"\0x"),
        "header with a space": with_block(text=text_of(HEADER).replace(b":3,", b": 3,")),
        "header keys out of order": with_block(text=json.dumps(HEADER, separators=(",", ":")).encode()[:-1].replace(
            b'{"content":"file",', b'{') + b',"content":"file"}'),
        "header key twice": with_block(text=text_of(HEADER).replace(b'"run":', b'"run":"a","run":')),
        "header key unknown": header(extra=1),
        "header key missing": with_block(header={name: HEADER[name] for name in HEADER if name != "run"}),
        "header is a list": with_block(header=[HEADER]),
        "header nested too deep": with_block(text=nested),
        "header number with 4000 digits": with_block(text=b'{"generation":' + b"9" * 4000 + b"}"),
        "header number not a number": with_block(text=text_of(HEADER).replace(b":3,", b":NaN,")),
        "header not UTF-8": with_block(text=text_of(HEADER).replace(b"run-7", b"run\xff7")),
        "generation 0": header(generation=0),
        "generation true": header(generation=True),
        "generation 2**53": header(generation=2**53),
        "generation a float": header(generation=3.0),
        "purpose with a capital": header(purpose="Checkpoint"),
        "purpose a list": header(purpose=["checkpoint"]),
        "object too short": header(object="a1b2"),
        "object in capitals": header(object=HEADER["object"].upper()),
        "run with a slash": header(run="../x"),
        "run too long": header(run="x" * 65),
        "content unknown": header(content="link"),
        "created negative": header(created=-1),
        "slot length 0": with_slot(slot_of(block, [], length=0)),
        "slot length of 4 GiB": with_slot(slot_of(block, [key_wrap(block)], length=2**32 - 1)),
        "slot padding not zero": with_slot(slot_of(block, [key_wrap(block)], after=b"\0x")),
        "slot MAC flipped": with_slot(slot[:-1] + bytes([slot[-1] ^ 1])),
        "slot MAC missing": with_slot(slot[:-32] + bytes(32)),
        "slot without wraps": with_slot(slot_of(block, [])),
        "slot with nine wraps": with_slot(slot_of(block, [key_wrap(block)] * 9)),
        "slot with two passphrases": with_slot(slot_of(block, [passphrase_wrap(block)] * 2)),
        "slot with an unknown key": with_slot(slot_of(block, [], text=text_of({"more": 1, "wraps": [entry]}))),
        "slot with a space": with_slot(slot_of(block, [], text=text_of({"wraps": [entry]}).replace(b":[", b": ["))),
        "slot nested too deep": with_slot(slot_of(block, [], text=b'{"wraps":' + b"[" * 3900)),
        "slot kind unknown": with_slot(slot_of(block, [entry | {"kind": "sealed"}])),
        "slot kind a list": with_slot(slot_of(block, [entry | {"kind": []}])),
        "slot key's name too short": with_slot(slot_of(block, [entry | {"kid": "ab"}])),
        "slot of another file": with_slot(slot_of(other_block, [key_wrap(other_block)])),
        "wrap bound to another file": with_slot(slot_of(block, [key_wrap(other_block)])),
        "wrap of another file key": with_slot(slot_of(block, [key_wrap(block, file_key=bytes(32))])),
        "wrap flipped": with_slot(slot_of(block, [entry | {"wrapped": flipped}])),
        "wrap one byte short": with_slot(slot_of(block, [entry | {"wrapped": base64.b64encode(raw[:-1]).decode()}])),
        "wrap in base64 with spare bits": with_slot(slot_of(block, [entry | {"wrapped": loose}])),
        "wrap in loose base64": with_slot(slot_of(block, [entry | {"wrapped": entry["wrapped"] + "\n"}])),
        "wrap's name of another key": with_slot(slot_of(block, [entry | {"kid": kid_of("00" * 16)}])),
        "Argon2id memory of a tebibyte": said(memory_kib=2**30),
        "Argon2id memory above the bound": kdf(memory_kib=262_145),
        "Argon2id memory below the bound": kdf(memory_kib=19_455),
        "Argon2id memory a float": kdf(memory_kib=19456.0),
        "Argon2id passes above the bound": kdf(passes=9),
        "Argon2id passes below the bound": kdf(passes=1),
        "Argon2id lanes above the bound": kdf(lanes=9),
        "Argon2id lanes 0": said(lanes=0),
        "Argon2id salt too long": kdf(salt="00" * 17),
        "Argon2id parameter unknown": kdf(version=19),
        "body missing": whole[:12288],
        "body cut in its salt": whole[: 12288 + 20],
        "body cut by one byte": whole[:-1],
        "body without its last chunk": block + slot + spare + body_of(block, bytes(CHUNK), last=False),
        "body with a byte after it": whole + b"\0",
        "body with a chunk after it": block + slot + spare + body + body[56:],
        "body with chunks swapped": block + slot + spare + long[:56] + second + first + long[-21:],
        "body with a chunk twice": block + slot + spare + long[:56] + first + first + long[-21:],
        "body of another file": block + slot + spare + body_of(other_block, content),
        "body commitment flipped": whole[:12288 + 40] + bytes([whole[12288 + 40] ^ 1]) + whole[12288 + 41 :],
        "body content flipped": whole[:-20] + bytes([whole[-20] ^ 128]) + whole[-19:],
        "header of another generation": other_block + whole[4096:],
        "cut in the slot": whole[:6000],
        "cut in the header": whole[:100],
        "nothing": b"",
    }  # fmt: skip


def sparse(data: bytes) -> Json:
    """A file as its length and its stretches between runs of 16 zeros or more."""
    stretches, at = [], 0
    while at < len(data):
        if data[at] == 0:
            at += 1
            continue
        end = data.find(bytes(16), at)
        end = len(data) if end < 0 else end
        stretches.append([at, data[at:end].hex()])
        at = end
    return {"length": len(data), "bytes": stretches}


def dense(entry: Json) -> bytes:
    """A file again, from what `sparse` made of it."""
    out = bytearray(entry["length"])
    for at, text in entry["bytes"]:
        out[at : at + len(text) // 2] = bytes.fromhex(text)
    return bytes(out)


def vectors() -> Json:
    """All of it."""
    public = b"".join(
        key.public_key().public_bytes_raw()
        for key in (
            MLKEM768PrivateKey.from_seed_bytes(RECOVERY_SEEDS[0]),
            X25519PrivateKey.from_private_bytes(RECOVERY_SEEDS[1]),
        )
    )
    return {
        "keyring": {"format": 1, "keys": [{"created": 1, "id": KEY_ID, "key": KEY.hex(), "state": "active"}]},
        "passphrase": PHRASE,
        "recovery": {
            "format": 1, "id": RECOVERY_ID, "mlkem768": RECOVERY_SEEDS[0].hex(), "x25519": RECOVERY_SEEDS[1].hex(),
        },
        "recovery_public": f"tacit-recovery-1 {RECOVERY_ID} {base64.b64encode(public).decode()}\n",
        "header": HEADER,
        "folder": {name: hashlib.sha256(content).hexdigest() for name, content in FOLDER.items()},
        "good": {
            name: sparse(data) | {"content_bytes": len(content), "content_sha256": hashlib.sha256(content).hexdigest()}
            for name, (data, content) in good().items()
        },
        "bad": {name: sparse(data) for name, data in bad().items()},
    }  # fmt: skip


if __name__ == "__main__":
    place = Path(__file__).with_name("vault.json")
    made = json.dumps(vectors(), indent=1, ensure_ascii=False)
    place.write_text(made + "\n", encoding="utf-8")
    sys.stdout.write(f"{place.name}: {len(made)} bytes\n")
