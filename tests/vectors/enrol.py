"""Makes enrol.json from the text of docs/protocol-enrol.md: python tests/vectors/enrol.py > tests/vectors/enrol.json

It shares nothing with Tacit: SHA-256 is written out here after FIPS 180-4, HMAC after RFC 2104, base32 and the double
after their definitions. A fault in the program and the same fault here would be two faults.
"""

import json

PRIMES = [n for n in range(2, 312) if all(n % d for d in range(2, n))]


def root_bits(n: int, power: int) -> int:
    """The first 32 bits of the fractional part of a square (2) or cube (3) root."""
    low, high, target = 0, 1 << 40, n << (32 * power)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle**power <= target else (low, middle)
    return low & 0xFFFFFFFF


K = [root_bits(p, 3) for p in PRIMES]
H = [root_bits(p, 2) for p in PRIMES[:8]]


def rotate(x: int, n: int) -> int:
    return (x >> n | x << (32 - n)) & 0xFFFFFFFF


def sha256(data: bytes) -> bytes:
    data_bits = len(data) * 8
    data += b"\x80" + bytes((55 - len(data)) % 64) + data_bits.to_bytes(8, "big")
    state = list(H)
    for start in range(0, len(data), 64):
        w = [int.from_bytes(data[start + i : start + i + 4], "big") for i in range(0, 64, 4)]
        for t in range(16, 64):
            s0 = rotate(w[t - 15], 7) ^ rotate(w[t - 15], 18) ^ w[t - 15] >> 3
            s1 = rotate(w[t - 2], 17) ^ rotate(w[t - 2], 19) ^ w[t - 2] >> 10
            w.append((w[t - 16] + s0 + w[t - 7] + s1) & 0xFFFFFFFF)
        a, b, c, d, e, f, g, h = state
        for t in range(64):
            one = h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + (e & f ^ ~e & g) + K[t] + w[t]
            two = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + (a & b ^ a & c ^ b & c)
            a, b, c, d, e, f, g, h = (one + two) & 0xFFFFFFFF, a, b, c, (d + one) & 0xFFFFFFFF, e, f, g
        state = [(x + y) & 0xFFFFFFFF for x, y in zip(state, (a, b, c, d, e, f, g, h), strict=True)]
    return b"".join(x.to_bytes(4, "big") for x in state)


def hmac(key: bytes, data: bytes) -> bytes:
    key = (key if len(key) <= 64 else sha256(key)).ljust(64, b"\0")
    return sha256(bytes(x ^ 0x5C for x in key) + sha256(bytes(x ^ 0x36 for x in key) + data))


def base32(data: bytes) -> str:
    bits = "".join(f"{byte:08b}" for byte in data)
    bits += "0" * (-len(bits) % 5)
    return "".join("abcdefghijklmnopqrstuvwxyz234567"[int(bits[i : i + 5], 2)] for i in range(0, len(bits), 5))


def double(value: float) -> bytes:
    """IEEE 754 binary64 of a value >= 0 that is 0 or normal."""
    if value == 0:
        return bytes(8)
    exponent = 0
    while value >= 2:
        value, exponent = value / 2, exponent + 1
    while value < 1:
        value, exponent = value * 2, exponent - 1
    return ((exponent + 1023) << 52 | int((value - 1) * 2**52)).to_bytes(8, "big")


D = b"tacit/enrol/1/"


def text(word: str) -> bytes:
    return bytes([len(word)]) + word.encode()


def sealed(body: bytes, version: int = 1) -> bytes:
    whole = bytes([version]) + len(body).to_bytes(2, "big") + body
    return whole + sha256(D + b"checksum\n" + whole)[:4]


def invitation(secret, authority, server, expires, epsilon, delta, name, addresses):  # type: ignore[no-untyped-def]
    fixed = secret + authority + server + expires.to_bytes(8, "big") + double(epsilon) + double(delta)
    return fixed + text(name) + bytes([len(addresses)]) + b"".join(text(address) for address in addresses)


def length(part: bytes) -> bytes:
    return len(part).to_bytes(4, "big") + part


def messages() -> dict[str, tuple[str, str]]:
    """Messages as they stand on the wire, without their lengths: what kind each is, or "" for none, and why."""
    ssh = "ecdsa-sha2-nistp384 " + "A" * 182 + "=="
    join = (
        f'{{"application":"{"0a" * 32}","invitation":"{"0b" * 16}","kind":"join","name":"hospital-a",'
        f'"request":"AAAA","supernode":"{ssh}","tacit":"0.1.0","v":1}}'
    )
    proofs = f'{{"application":"{"0c" * 64}","proof":"{"0d" * 32}","supernode":"{"0e" * 100}"}}'
    whole = f"{join}\n{proofs}"
    renew = (
        '{"kind":"renew","name":"hospital-a","request":"AAAA","serial":"1f","tacit":"0.1.0","v":1}\n'
        f'{{"application":"{"0c" * 64}","certificate":"{"0e" * 70}"}}'
    )
    enrolled = (
        '{"addresses":["server.example:9443"],"certificate":"AAAA","federation":"demo","kind":"enrolled",'
        f'"name":"hospital-a","v":1}}\n{{"mac":"{"0d" * 32}"}}'
    )
    refused = '{"kind":"refused","v":1,"word":"used"}\n{}'
    return {
        "a join": (whole, "join"),
        "a renewal": (renew, "renew"),
        "an answer": (enrolled, "enrolled"),
        "an answer to a renewal": (enrolled.replace("0d" * 32, ""), "enrolled"),
        "a refusal": (refused, "refused"),
        "no second line": (join, ""),
        "a line behind": (whole + "\n", ""),
        "two spaces": (whole.replace('":"', '": "', 1), ""),
        "fields in another order": (refused.replace('"v":1,"word":"used"', '"word":"used","v":1'), ""),
        "a field twice": (refused.replace('"word":"used"', '"word":"used","word":"used"'), ""),
        "a field more": (refused.replace('"word"', '"wish":1,"word"'), ""),
        "a field less": (whole.replace('"tacit":"0.1.0",', ""), ""),
        "a proof more": (refused.replace("{}", '{"mac":""}'), ""),
        "a proof less": (whole.replace(f'"proof":"{"0d" * 32}",', ""), ""),
        "version 2": (refused.replace('"v":1', '"v":2'), ""),
        "version true": (refused.replace('"v":1', '"v":true'), ""),
        "version 1.0": (refused.replace('"v":1', '"v":1.0'), ""),
        "an unknown word": (refused.replace("used", "lost"), ""),
        "an unknown kind": (refused.replace("refused", "denied"), ""),
        "hex in capitals": (whole.replace("0a", "0A"), ""),
        "a key that is short": (whole.replace("0a" * 32, "0a" * 31), ""),
        "a name in capitals": (whole.replace("hospital-a", "Hospital-a"), ""),
        "base64 without its padding": (whole.replace('"AAAA"', '"AA"'), ""),
        "a SuperNode key of another kind": (whole.replace("nistp384", "nistp256"), ""),
        "an address without a port": (enrolled.replace(":9443", ""), ""),
        "no address": (enrolled.replace('"server.example:9443"', ""), ""),
        "an escaped letter": (refused.replace("used", "\\u0075sed"), ""),
    }


def main() -> None:
    assert sha256(b"abc").hex() == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4
    assert hmac(b"Jefe", b"what do ya want for nothing?").hex()[:16] == "5bdcc146bf60754e"  # RFC 4231, 2
    secret, authority, server = bytes(range(16)), sha256(b"authority"), sha256(D + b"application\n" + bytes(range(32)))
    fields = (secret, authority, server, 1_800_000_000, 3.0, 1e-5, "hospital-a", ["server.example:9444", "[::1]:9444"])
    good = "tacit1-" + base32(sealed(invitation(*fields)))
    plain = (secret, authority, server, 1_800_000_000, 0.0, 0.0, "a", ["10.0.0.1:1"])

    def broken(**changed):  # type: ignore[no-untyped-def]
        names = ("secret", "authority", "server", "expires", "epsilon", "delta", "name", "addresses")
        body = invitation(**(dict(zip(names, plain, strict=True)) | changed))
        return "tacit1-" + base32(sealed(body))

    swap = "b" if good[40] != "b" else "c"
    bodies = sealed(invitation(*plain))
    negative = {
        "cut after 100 characters": (good[:100], "cut"),
        "cut by one character": (good[:-1], "cut"),
        "nothing but the prefix": ("tacit1-", "cut"),
        "one character more": (good + "a", "copy it alone"),
        "one character replaced": (good[:40] + swap + good[41:], "mistyped"),
        "two characters swapped": (good[:60] + good[61] + good[60] + good[62:], "mistyped"),
        "a digit outside the alphabet": (good[:50] + "1" + good[51:], "place 51"),
        "another prefix": ("tacit2-" + good[7:], "begins with"),
        "version 2 with a sound checksum": ("tacit1-" + base32(sealed(invitation(*plain), 2)), "version"),
        "a name in capitals": (broken(name="A"), "out of range"),
        "an empty name": (broken(name=""), "out of range"),
        "no address": (broken(addresses=[]), "out of range"),
        "nine addresses": (broken(addresses=[f"10.0.0.{i}:1" for i in range(9)]), "out of range"),
        "an address without a port": (broken(addresses=["server.example"]), "out of range"),
        "an address in a second spelling": (broken(addresses=["[0:0::1]:1"]), "out of range"),
        "a delta of 1": (broken(delta=1.0), "out of range"),
        "bytes behind the last address": ("tacit1-" + base32(sealed(invitation(*plain) + b"x")), "out of range"),
        "a body that ends in a field": ("tacit1-" + base32(sealed(invitation(*plain)[:110])), "out of range"),
        "a checksum of zeros": ("tacit1-" + base32(bodies[:-4] + bytes(4)), "mistyped"),
    }
    hello, leaf, body = b'{"kind":"hello","v":1}\n{}', b"leaf", b'{"kind":"join","v":1}'
    over = sha256(D + b"transcript\n" + length(b"join") + length(hello) + length(leaf) + length(body))
    client = hmac(secret, D + b"client")
    stored = sha256(client)
    mask = hmac(stored, D + b"proof\n" + over)
    answer = b'{"kind":"enrolled","v":1}'
    vectors = {
        "invitation": {
            "secret": secret.hex(),
            "authority": authority.hex(),
            "server": server.hex(),
            "application": bytes(range(32)).hex(),
            "expires": 1_800_000_000,
            "epsilon": 3.0,
            "delta": 1e-5,
            "name": "hospital-a",
            "addresses": ["server.example:9444", "[::1]:9444"],
            "token": good,
        },
        "refused": [{"what": what, "token": token, "says": says} for what, (token, says) in negative.items()],
        "messages": [{"what": what, "data": data, "kind": kind} for what, (data, kind) in messages().items()],
        "proof": {
            "secret": secret.hex(),
            "id": hmac(secret, D + b"invitation")[:16].hex(),
            "stored_key": stored.hex(),
            "server_key": hmac(secret, D + b"server").hex(),
            "kind": "join",
            "hello": hello.decode(),
            "leaf": leaf.decode(),
            "body": body.decode(),
            "transcript": over.hex(),
            "proof": bytes(x ^ y for x, y in zip(client, mask, strict=True)).hex(),
            "answer": answer.decode(),
            "mac": hmac(hmac(secret, D + b"server"), D + b"answer\n" + over + answer).hex(),
            "signed_application": (D + b"application\n" + over).hex(),
        },
    }
    print(json.dumps(vectors, indent=1))


if __name__ == "__main__":
    main()
