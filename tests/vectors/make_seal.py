"""The sealing protocol a second time, from primitives alone: RFC 9180, 5869, 8032 and SP 800-38D by their formulas.

It imports nothing of Tacit and shares no code with it. ``python tests/vectors/make_seal.py > tests/vectors/seal.json``
writes vectors; encapsulation is random, so each run writes others. Tests use its functions as an attacker who holds
every key, for what only such a one could send.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"tacit/seal/1\n"
TO_SERVER, TO_CLIENT = 1, 2
HELLO, OFFER, ACCEPT, MESSAGE, WRAP, BROADCAST = range(1, 7)


# -- RFC 5869 and RFC 9180 -------------------------------------------------------------------------------------------


def extract(salt: bytes, key: bytes) -> bytes:
    return hmac.new(salt or bytes(32), key, hashlib.sha256).digest()


def expand(key: bytes, info: bytes, length: int) -> bytes:
    out = block = b""
    while len(out) < length:
        block = hmac.new(key, block + info + bytes((len(out) // 32 + 1,)), hashlib.sha256).digest()
        out += block
    return out[:length]


def hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    return expand(extract(salt, key), info, length)


# MLKEM768-X25519 (0x647a), HKDF-SHA256 (1), AES-256-GCM (2).
SUITE_ID = b"HPKE" + bytes.fromhex("647a00010002")


def hpke_key(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Key schedule of RFC 9180, section 5.1, base mode: key and nonce."""

    def labeled_extract(salt: bytes, label: bytes, key: bytes) -> bytes:
        return extract(salt, b"HPKE-v1" + SUITE_ID + label + key)

    def labeled_expand(key: bytes, label: bytes, context: bytes, length: int) -> bytes:
        return expand(key, length.to_bytes(2, "big") + b"HPKE-v1" + SUITE_ID + label + context, length)

    context = b"\0" + labeled_extract(b"", b"psk_id_hash", b"") + labeled_extract(b"", b"info_hash", info)
    secret = labeled_extract(shared, b"secret", b"")
    return labeled_expand(secret, b"key", context, 32), labeled_expand(secret, b"base_nonce", context, 12)


def combined(mlkem: bytes, x25519: bytes, theirs: bytes, ours: bytes) -> bytes:
    """The combiner of X-Wing: ML-KEM secret, X25519 secret, X25519 ciphertext, X25519 key, label."""
    return hashlib.sha3_256(mlkem + x25519 + theirs + ours + b"\\.//^\\").digest()


def hpke_seal(secret: bytes, public: bytes, info: bytes, ephemeral: bytes) -> bytes:
    shared, first = MLKEM768PublicKey.from_public_bytes(public[:1184]).encapsulate()
    key = X25519PrivateKey.from_private_bytes(ephemeral)
    second = key.public_key().public_bytes_raw()
    exchanged = key.exchange(X25519PublicKey.from_public_bytes(public[1184:]))
    sealing, nonce = hpke_key(combined(shared, exchanged, second, public[1184:]), info)
    return first + second + AESGCM(sealing).encrypt(nonce, secret, b"")


def hpke_open(sealed: bytes, mlkem_seed: bytes, x25519: bytes, info: bytes) -> bytes:
    shared = MLKEM768PrivateKey.from_seed_bytes(mlkem_seed).decapsulate(sealed[:1088])
    key = X25519PrivateKey.from_private_bytes(x25519)
    exchanged = key.exchange(X25519PublicKey.from_public_bytes(sealed[1088:1120]))
    ours = key.public_key().public_bytes_raw()
    sealing, nonce = hpke_key(combined(shared, exchanged, sealed[1088:1120], ours), info)
    return AESGCM(sealing).decrypt(nonce, sealed[1120:], b"")


# -- the handshake ---------------------------------------------------------------------------------------------------


def public_of(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def sign(seed: bytes, label: bytes, message: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).sign(MAGIC + label + b"\n" + message)


def head(step: int, way: int, *, suite: int = 1, magic: bytes = MAGIC) -> bytes:
    return magic + bytes((step, way, suite))


def binding(job: bytes, run: int, server: bytes, client: bytes, bundle: bytes, terms: bytes) -> bytes:
    return job + struct.pack(">Q", run) + server + client + bundle + terms


def hello(server_seed: bytes, bound: bytes, nonce: bytes, *, start: bytes = head(HELLO, TO_CLIENT)) -> bytes:
    unsigned = start + bound + nonce
    return unsigned + sign(server_seed, b"hello", unsigned)


def ephemeral_public(mlkem_seed: bytes, x25519: bytes) -> bytes:
    mlkem = MLKEM768PrivateKey.from_seed_bytes(mlkem_seed).public_key().public_bytes_raw()
    return mlkem + X25519PrivateKey.from_private_bytes(x25519).public_key().public_bytes_raw()


def offer(
    client_seed: bytes, hello: bytes, nonce: bytes, public: bytes, *, start: bytes = head(OFFER, TO_SERVER)
) -> bytes:
    unsigned = start + hashlib.sha256(hello).digest() + nonce + public
    return unsigned + sign(client_seed, b"offer", hello + unsigned)


def accept(
    server_seed: bytes,
    hello: bytes,
    offer: bytes,
    secret: bytes,
    ephemeral: bytes,
    *,
    start: bytes = head(ACCEPT, TO_CLIENT),
) -> bytes:
    answered = hashlib.sha256(MAGIC + b"answered\n" + hello + offer).digest()
    sealed = hpke_seal(secret, offer[-64 - 1216 : -64], MAGIC + b"secret\n" + answered, ephemeral)
    unsigned = start + answered + sealed
    return unsigned + sign(server_seed, b"accept", hello + offer + unsigned)


def keys(secret: bytes, hello: bytes, offer: bytes, accept: bytes) -> dict[str, bytes]:
    whole = hashlib.sha256(MAGIC + b"transcript\n" + hello + offer + accept).digest()
    out = hkdf(secret, whole, MAGIC + b"keys\n", 112)
    return {"to_server": out[:32], "to_client": out[32:64], "wrap": out[64:96], "session": out[96:]}


# -- messages --------------------------------------------------------------------------------------------------------


def sealed(key: bytes, start: bytes, number: int, salt: bytes, plaintext: bytes) -> bytes:
    header = start + struct.pack(">Q", number) + salt
    once = hkdf(key, salt, header[:-32], 32)
    return header + AESGCM(once).encrypt(bytes(12), plaintext, header)


def framed(kind: bytes, round: int, content: bytes, pad_to: int = 0) -> bytes:
    length = max(len(content), pad_to)
    length += -length % 1024
    return struct.pack(">16sQQ", kind, round, len(content)) + content.ljust(length, b"\0")


def statement(job: bytes, run: int, bundle: bytes, round: int, length: int, digest: bytes) -> bytes:
    return job + struct.pack(">Q", run) + bundle + struct.pack(">QQ", round, length) + digest


def broadcast(key: bytes, content: bytes) -> bytes:
    both = hkdf(key, bytes(32), MAGIC + b"broadcast key\n", 64)
    header = head(BROADCAST, TO_CLIENT) + both[32:]
    return header + AESGCM(both[:32]).encrypt(bytes(12), content, header)


def ticket(server_seed: bytes, signed: bytes, length: int, body: bytes, key: bytes) -> bytes:
    digest = hashlib.sha256(body).digest()
    return struct.pack(">Q", length) + digest + key + sign(server_seed, b"broadcast", signed)


# -- the vectors -----------------------------------------------------------------------------------------------------


def filled(name: str, length: int = 32) -> bytes:
    """Returns bytes that anyone can make again."""
    return hashlib.shake_256(b"tacit vector " + name.encode()).digest(length)


def vectors() -> dict[str, Any]:
    """Returns one whole epoch with one client, and for each step faults of one thing each."""
    server, client, other = filled("server"), filled("client"), filled("other client")
    job, run, bundle, terms = filled("job", 16), 2**63 + 5, filled("bundle"), filled("terms")
    bound = binding(job, run, public_of(server), public_of(client), bundle, terms)
    first = hello(server, bound, filled("hello nonce"))
    mlkem, x25519 = filled("mlkem", 64), filled("x25519")
    public = ephemeral_public(mlkem, x25519)
    second = offer(client, first, filled("offer nonce"), public)
    secret, ephemeral = filled("secret"), filled("ephemeral")
    third = accept(server, first, second, secret, ephemeral)
    derived = keys(secret, first, second, third)

    def start(step: int, way: int, *, suite: int = 1, session: bytes = b"") -> bytes:
        return head(step, way, suite=suite) + (session or derived["session"])

    to_client = [
        {"kind": "round", "round": 1, "number": 1, "pad_to": 0, "content": b""},
        {"kind": "round", "round": 1, "number": 2, "pad_to": 0, "content": filled("a request", 1025)},
        # One was lost.
        {"kind": "terms", "round": 2**62, "number": 4, "pad_to": 0, "content": b"{}"},
    ]
    to_server = [
        {"kind": "reply", "round": 1, "number": 1, "pad_to": 2000, "content": filled("a release", 1999)},
        {"kind": "reply", "round": 1, "number": 2, "pad_to": 2000, "content": b"declined"},
    ]
    for way, name, messages in ((TO_CLIENT, "to_client", to_client), (TO_SERVER, "to_server", to_server)):
        for message in messages:
            salt = filled(f"salt {name} {message['number']}")
            plaintext = framed(message["kind"].encode(), message["round"], message["content"], message["pad_to"])
            message["salt"] = salt
            message["sealed"] = sealed(derived[name], start(MESSAGE, way), message["number"], salt, plaintext)

    model, key, round = filled("a model", 500), filled("broadcast key"), 3
    body = broadcast(key, model)

    def wrapped(number: int, **changed: Any) -> bytes:
        """A wrap of the body whose statement says something else."""
        says = {"job": job, "run": run, "bundle": bundle, "round": round, "length": len(model)} | changed
        signer, about, tail = says.pop("signer", server), says.pop("body", body), says.pop("tail", b"")
        kind, marked = says.pop("kind", b"broadcast"), says.pop("marked", round)
        signed = statement(**says, digest=hashlib.sha256(about).digest())
        plaintext = framed(kind, marked, ticket(signer, signed, says["length"], about, key) + tail)
        return sealed(derived["wrap"], start(WRAP, TO_CLIENT), number, filled(f"wrap {number}"), plaintext)

    def faulty(text: str, plaintext: bytes, *, number: int = 5, key: bytes = b"", begin: bytes = b"") -> dict[str, Any]:
        salt = filled(f"salt of {text}")
        data = sealed(key or derived["to_client"], begin or start(MESSAGE, TO_CLIENT), number, salt, plaintext)
        return {"step": "message", "fault": text, "data": data}

    def bound_to(**changed: Any) -> bytes:
        fields = {"job": job, "run": run, "server": public_of(server), "client": public_of(client)}
        return binding(**{**fields, "bundle": bundle, "terms": terms, **changed})

    nonce, fine = filled("hello nonce"), framed(b"round", 5, b"content")
    negative: list[dict[str, Any]] = [
        # Hellos, each validly signed by the pinned server unless that is the fault.
        {"step": "hello", "fault": text, "data": data}
        for text, data in {
            "another job": hello(server, bound_to(job=filled("job 2", 16)), nonce),
            "another run": hello(server, bound_to(run=run + 1), nonce),
            "another server key": hello(server, bound_to(server=public_of(other)), nonce),
            "another client": hello(server, bound_to(client=public_of(other)), nonce),
            "another app": hello(server, bound_to(bundle=filled("bundle 2")), nonce),
            "other terms": hello(server, bound_to(terms=filled("terms 2")), nonce),
            "signed by a client": hello(client, bound, nonce),
            "another suite": hello(server, bound, nonce, start=head(HELLO, TO_CLIENT, suite=0)),
            "another version": hello(server, bound, nonce, start=head(HELLO, TO_CLIENT, magic=b"tacit/seal/0\n")),
            "the other direction": hello(server, bound, nonce, start=head(HELLO, TO_SERVER)),
            "another step": hello(server, bound, nonce, start=head(ACCEPT, TO_CLIENT)),
            "a byte too many": first + b"\0",
            "a byte too few": first[:-1],
        }.items()
    ]
    elsewhere = hello(server, bound, filled("another hello nonce"))
    weak = public[:1184] + bytes(32)
    negative += [
        {"step": "offer", "fault": text, "data": data}
        for text, data in {
            "for another hello": offer(client, elsewhere, nonce, public),
            "signed by another client": offer(other, first, nonce, public),
            "signed by the server": offer(server, first, nonce, public),
            "another suite": offer(client, first, nonce, public, start=head(OFFER, TO_SERVER, suite=2)),
            "another step": offer(client, first, nonce, public, start=head(HELLO, TO_SERVER)),
            "the other direction": offer(client, first, nonce, public, start=head(OFFER, TO_CLIENT)),
            "an X25519 key of small order": offer(client, first, nonce, weak),
            "an ML-KEM key that is not reduced": offer(client, first, nonce, b"\xff" * 1184 + public[1184:]),
            "a byte too few": second[:-1],
        }.items()
    ]
    again = offer(client, first, filled("another offer nonce"), public)
    short = accept(server, first, second, filled("secret", 31), ephemeral)
    negative += [
        {"step": "accept", "fault": text, "data": data}
        for text, data in {
            "of another offer": accept(server, first, again, secret, ephemeral),
            "signed by a client": accept(client, first, second, secret, ephemeral),
            "another suite": accept(server, first, second, secret, ephemeral, start=head(ACCEPT, TO_CLIENT, suite=2)),
            "encrypted to other keys": _misdirected(server, first, second, secret, ephemeral),
            "a secret that is too short": short,
            "a byte too few": third[:-1],
        }.items()
    ]
    negative += [
        faulty("the key of the other direction", fine, key=derived["to_server"]),
        faulty("the key of wraps", fine, key=derived["wrap"]),
        faulty("reflected", fine, key=derived["to_server"], begin=start(MESSAGE, TO_SERVER)),
        faulty("marked as the other direction", fine, begin=start(MESSAGE, TO_SERVER)),
        faulty("marked as another session", fine, begin=start(MESSAGE, TO_CLIENT, session=filled("session", 16))),
        faulty("another suite", fine, begin=start(MESSAGE, TO_CLIENT, suite=2)),
        faulty("marked as a wrap", fine, begin=start(WRAP, TO_CLIENT)),
        faulty("number 0", fine, number=0),
        faulty("a kind in capitals", framed(b"ROUND", 5, b"content")),
        faulty("no kind", framed(b"", 5, b"content")),
        faulty("a length beyond the content", struct.pack(">16sQQ", b"round", 5, 1025) + bytes(1024)),
        faulty("a length that overflows", struct.pack(">16sQQ", b"round", 5, 2**64 - 1) + bytes(1024)),
    ]
    fellow = broadcast(key, filled("another model", len(model)))
    negative += [
        {"step": "broadcast", "fault": text, "wrapped": data, "body": with_body}
        for text, data, with_body in [
            ("a fellow client's body under the same key", wrapped(1), fellow),
            ("a body cut short", wrapped(1), body[:-1]),
            ("a statement for another job", wrapped(1, job=filled("job 2", 16)), body),
            ("a statement for another run", wrapped(1, run=run + 1), body),
            ("a statement for another app", wrapped(1, bundle=filled("bundle 2")), body),
            ("a statement for another round", wrapped(1, round=round + 1), body),
            ("a statement signed by a client", wrapped(1, signer=other), body),
            ("a statement about another body", wrapped(1, body=fellow), body),
            ("a length that is not the body's", wrapped(1, length=len(model) + 1), body),
            ("a wrap of another kind", wrapped(1, kind=b"round"), body),
            ("a wrap of another round", wrapped(1, marked=round + 1), body),
            ("a ticket with a byte more", wrapped(1, tail=b"\0"), body),
        ]
    ]
    return {
        "server_seed": server,
        "client_seed": client,
        "job": job,
        "run": run,
        "bundle": bundle,
        "terms": terms,
        "hello_nonce": nonce,
        "hello": first,
        "mlkem_seed": mlkem,
        "x25519": x25519,
        "offer_nonce": filled("offer nonce"),
        "offer": second,
        "secret": secret,
        "accept": third,
        "keys": derived,
        "to_client": to_client,
        "to_server": to_server,
        "broadcast": {
            "round": round,
            "content": model,
            "key": key,
            "body": body,
            "salt": filled("wrap 1"),
            "wrapped": wrapped(1),
        },
        "negative": negative,
    }


def _misdirected(server: bytes, first: bytes, second: bytes, secret: bytes, ephemeral: bytes) -> bytes:
    """A validly signed answer whose secret nobody but its maker can read."""
    whole = accept(server, first, second, secret, ephemeral)
    unsigned = whole[:-65] + bytes((whole[-65] ^ 1,))
    return unsigned + sign(server, b"accept", first + second + unsigned)


def as_text(value: Any) -> Any:
    """Returns a value with all bytes as hex."""
    match value:
        case bytes():
            return value.hex()
        case dict():
            return {key: as_text(one) for key, one in value.items()}
        case list():
            return [as_text(one) for one in value]
    return value


if __name__ == "__main__":
    print(json.dumps(as_text(vectors()), indent=1))
