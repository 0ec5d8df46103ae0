"""Attacks on encrypted heads: on the weights through both parts of an answer, on the key, and on the reader of bytes.

What they show, with and without hidden weights (guarantee G23):

    honest queries        d + 1 of them give W and b, always: that is what a linear head is
    whole products        one answer of full precision gives all of W through c1: so answers are never that
    our c1                rounded; where few weights make an output they are found by trying, where many do a division
                          fails (learning with rounding; nobody proved it for these numbers). Hidden: nothing
    chosen c0             a few weights for each class and query at once; hidden: as many, the flood leaves the top bits
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.errors import HeadError, PlanError, TacitError
from privacy.he import EncryptedHead, HeadDescription, Packing, Parameters, QueryKey, Wire, plan_head, stream, wire
from privacy.he import head as head_module
from privacy.he.planner import HEAD_BYTES

RANGE = (-4.0, 4.0)


def head_of(features: int, classes: int, seed: int = 0, **words: Any) -> tuple[EncryptedHead, np.ndarray]:
    """Makes a head with Gaussian weights; also its integer weights, int64 of shape ``(c, d)``."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((classes, features))
    plan = plan_head(features=features, classes=classes, **words)
    head = EncryptedHead.load(plan, weights, rng.standard_normal(classes) / 10, RANGE)
    return head, np.rint(weights * head.public.weight_scale).astype(np.int64)


# Arithmetic of an attacker: transforms modulo a prime in Python's own integers.


def transformed(values: list[int], prime: int) -> list[int]:
    """Evaluates a polynomial at the odd powers of a primitive root, in some order that is always the same."""
    n = len(values)
    root = next(
        candidate
        for candidate in (pow(g, (prime - 1) // (2 * n), prime) for g in range(2, 200))
        if pow(candidate, n, prime) == prime - 1
    )
    twisted, power = [], 1
    for value in values:
        twisted.append(value * power % prime)
        power = power * root % prime

    def recursive(part: list[int], base: int) -> list[int]:
        if len(part) == 1:
            return part
        even, odd = recursive(part[::2], base * base % prime), recursive(part[1::2], base * base % prime)
        low, high, power = [], [], 1
        for one, other in zip(even, odd, strict=True):
            product = power * other
            low.append((one + product) % prime)
            high.append((one - product) % prime)
            power = power * base % prime
        return low + high

    return recursive(twisted, root * root % prime)


def quotient(product: list[int], factor: list[int], prime: int) -> list[int]:
    """Divides in the ring, signed result: by values at the roots, and back by the transform's own inverse."""
    n = len(product)
    values = [
        a * pow(b, -1, prime) % prime
        for a, b in zip(transformed(product, prime), transformed(factor, prime), strict=True)
    ]
    # values[i] = w(r**(2 i + 1)); the inverse sums over i, which is a transform of the values and a twist.
    root = next(
        candidate
        for candidate in (pow(g, (prime - 1) // (2 * n), prime) for g in range(2, 200))
        if pow(candidate, n, prime) == prime - 1
    )

    def recursive(part: list[int], base: int) -> list[int]:
        if len(part) == 1:
            return part
        even, odd = recursive(part[::2], base * base % prime), recursive(part[1::2], base * base % prime)
        low, high, power = [], [], 1
        for one, other in zip(even, odd, strict=True):
            moved = power * other
            low.append((one + moved) % prime)
            high.append((one - moved) % prime)
            power = power * base % prime
        return low + high

    back = pow(root, -1, prime)
    sums, scale = recursive(values, back * back % prime), pow(n, -1, prime)
    found = [sums[j] * pow(back, j, prime) * scale % prime for j in range(n)]
    return [value - prime if value > prime // 2 else value for value in found]


def weights_of_output(head: EncryptedHead, whole: np.ndarray, output: int) -> list[int]:
    """The polynomial that one output is multiplied by, written down from the packing's definition."""
    plan = head.public.plan
    found = [0] * plan.parameters.ring
    for row in range(plan.rows):
        label = output * plan.rows + row
        for feature in range(plan.features if label < plan.classes else 0):
            found[row * plan.block + plan.block - 1 - feature] = int(whole[label, feature])
    return found


def seconds_of(head: EncryptedHead, query: bytes, answer: bytes) -> tuple[np.ndarray, np.ndarray]:
    """What a querier knows: c1 of its query, from its seed, and c1 of the answer, ``(outputs, n)``."""
    plan = head.public.plan
    known = wire.read_samples(memoryview(query)[HEAD_BYTES:], plan.parameters)[0, 1, 0]
    values = wire.unpack(memoryview(answer)[HEAD_BYTES:], plan.answer_bits)
    return known, values[plan.classes :].reshape(plan.outputs, plan.parameters.ring)


# The weights, guarantee G23.


def test_g23_d_plus_one_honest_queries_give_the_head_hidden_or_not() -> None:
    for hide in (False, True):
        head, whole = head_of(6, 3, hide_weights=hide)
        key = QueryKey.fresh(head.public)
        records = np.vstack((np.zeros(6), 4.0 * np.eye(6)))
        got = np.array([key.integers(head.answer(key.encrypt(x)))[0] for x in records])
        assert ((got[1:] - got[0]).T == whole * head.public.plan.largest_feature).all()


def test_g23_one_whole_product_gives_every_weight_and_our_answer_does_not() -> None:
    head, whole = head_of(512, 10)
    plan, prime = head.public.plan, head.public.plan.parameters.primes[0]
    key = QueryKey.fresh(head.public)
    query = key.encrypt(np.zeros(512))
    samples = wire.read_samples(memoryview(query)[HEAD_BYTES:], plan.parameters)
    # The planted bug: an answer that holds c1 as it is. One honest query, one division.
    _, seconds = head._evaluator.evaluate(samples)  # type: ignore[union-attr]
    known = samples[0, 1, 0].tolist()
    truth = weights_of_output(head, whole, 0)
    assert quotient([int(value) % prime for value in seconds[0, 0]], known, prime) == truth
    # Our answer: what the rounding took away, the division spreads over everything.
    _, rounded = seconds_of(head, query, head.answer(query))
    lifted = [(int(value) * prime + (1 << (plan.answer_bits - 1))) >> plan.answer_bits for value in rounded[0]]
    found = np.array(quotient(lifted, known, prime))
    assert (found == truth).mean() < 0.01
    assert np.median(np.abs(found)) > 2**48


def guesses(head: EncryptedHead, query: bytes, answer: bytes) -> list[tuple[int, int]]:
    """Tries every pair of 8-bit weights of a head with two features and one class against one answer's c1."""
    plan = head.public.plan
    known, rounded = seconds_of(head, query, answer)
    q, scale = plan.parameters.primes[0], 2.0**plan.answer_bits
    # Coefficient j of (w0 X + w1) c1 is w0 c1[j - 1] + w1 c1[j]; ten coefficients are enough to know the pair.
    left, right = known[99:109].astype(float) / q, known[100:110].astype(float) / q
    values = np.arange(-127, 128)
    tried = values[:, None, None] * left + values[None, :, None] * right - rounded[0, 100:110] / scale
    distance = np.abs(tried - np.rint(tried)).max(2)
    return [(int(values[a]), int(values[b])) for a, b in np.argwhere(distance < 1e-9)]


def test_g23_few_weights_are_found_from_one_answers_c1_by_trying_unless_they_are_hidden() -> None:
    head, whole = head_of(2, 1, weight_bits=8)
    key = QueryKey.fresh(head.public)
    query = key.encrypt(np.zeros(2))
    assert guesses(head, query, head.answer(query)) == [tuple(whole[0])]
    # The same attack, and the same one without masks as the planted bug.
    hidden, whole = head_of(2, 1, weight_bits=8, hide_weights=True)
    key = QueryKey.fresh(hidden.public)
    query = key.encrypt(np.zeros(2))
    answer = hidden.answer(query)
    plan = hidden.public.plan
    known = wire.read_samples(memoryview(query)[HEAD_BYTES:], plan.parameters)[0, 1]

    def tried(answer: bytes) -> int:
        seconds = wire.unpack(memoryview(answer)[HEAD_BYTES:], plan.answer_bits)[plan.classes :]
        q, found = plan.parameters.modulus, 0
        exact = [
            sum(int(known[row, j]) * (q // p) * pow(q // p, -1, p) for row, p in enumerate(plan.parameters.primes)) % q
            for j in range(99, 110)
        ]
        for a, b in itertools.product(range(-127, 128), repeat=2):
            for j in range(10):
                value = (a * exact[j] + b * exact[j + 1]) % q
                far = (value * 2**plan.answer_bits // q - int(seconds[100 + j])) % 2**plan.answer_bits
                if min(far, 2**plan.answer_bits - far) > 2:
                    break
            else:
                found += (a, b) == tuple(whole[0])
        return found

    assert tried(answer) == 0
    hidden._evaluator._hidden = lambda first, second, zero: (first, second)  # type: ignore[union-attr, method-assign]
    assert tried(hidden.answer(query)) == 1


def chosen(head: EncryptedHead, positions: list[int], shifts: list[int]) -> bytes:
    """Writes a query whose c0 is a sum of powers of two at chosen places; its c1 comes from a seed like any other."""
    plan = head.public.plan
    first = np.zeros((len(plan.parameters.primes), plan.parameters.ring), dtype=np.int64)
    for place, shift in zip(positions, shifts, strict=True):
        for row, prime in enumerate(plan.parameters.primes):
            first[row, place] = (1 << shift) % prime
    body = wire.write_sample(stream.Sample(first, os.urandom(64)), plan.parameters)
    # The encryption of zero is crafted too: zero itself, so that nothing masks the first polynomial but the flood.
    zero = wire.write_sample(stream.Sample(first * 0, os.urandom(64)), plan.parameters) if plan.hide_weights else b""
    return head.public.mark + body + zero


@pytest.mark.parametrize("hide", [False, True])
def test_g23_a_chosen_c0_reads_a_few_weights_of_each_class_a_query(hide: bool) -> None:
    head, whole = head_of(300, 4, weight_bits=8, hide_weights=hide)
    plan = head.public.plan
    q, bits = plan.parameters.modulus, plan.answer_bits
    # Three digits of nine bits below q/2; what the flood hides is far below the lowest of them.
    top = q.bit_length() - 10
    shifts = [top, top - 9, top - 18]
    # The coefficient at the end of a block is W's coefficient there times c0's at 0, plus the one before times X's ...
    answer = head.answer(chosen(head, [0, 1, 2], shifts))
    firsts = wire.unpack(memoryview(answer)[HEAD_BYTES:], bits)[: plan.classes]
    bias = wire.unpack(memoryview(head.answer(chosen(head, [0], [0])))[HEAD_BYTES:], bits)[: plan.classes]
    for label in range(plan.classes):
        value = (int(firsts[label]) - int(bias[label]) + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
        digits = round(value * q / 2**bits / 2 ** shifts[2])
        read = []
        for _ in range(3):
            digit = (digits + 256) % 512 - 256
            read.append(digit)
            digits = (digits - digit) >> 9
        # Block ends hold feature 0; then come features 1 and 2.
        assert read == [int(whole[label, feature]) for feature in (2, 1, 0)]


def test_g23_hidden_answers_to_one_query_share_nothing_and_others_repeat() -> None:
    head, _ = head_of(30, 3)
    query = QueryKey.fresh(head.public).encrypt(np.zeros(30))
    assert head.answer(query) == head.answer(query)
    head, _ = head_of(30, 3, hide_weights=True)
    query = QueryKey.fresh(head.public).encrypt(np.zeros(30))
    one, other = (np.frombuffer(head.answer(query)[HEAD_BYTES:], dtype=np.uint8) for _ in range(2))
    assert (one == other).mean() < 0.02


def test_g23_the_flood_is_as_wide_as_promised_and_uniform() -> None:
    head, _ = head_of(30, 3, hide_weights=True)
    plan = head.public.plan
    q = plan.parameters.modulus
    absolute = head_module.output_norms(plan, np.full((3, 30), plan.largest_weight))[0]
    bits = plan.flood(absolute)
    assert 2.0**bits >= 2.0**48 * 21.5 * absolute
    drawn = head_module._flood(4000, bits, plan.parameters)
    back = [
        sum(int(row[j]) * (q // p) * pow(q // p, -1, p) for row, p in zip(drawn, plan.parameters.primes, strict=True))
        % q
        for j in range(4000)
    ]
    signed = np.array([float(value - q if value > q // 2 else value) for value in back]) / 2.0 ** (bits - 1)
    assert -1 <= signed.min() < -0.99
    assert 0.99 < signed.max() < 1
    # Kolmogorov's statistic of 4,000 uniform draws exceeds 2.5/sqrt(4000) with a probability of 1e-5.
    assert np.abs(np.sort(signed) / 2 + 0.5 - np.arange(4000) / 4000).max() < 2.5 / math.sqrt(4000)
    errors = head_module._binomial((100, 400))
    assert (np.abs(errors).max() <= 21, abs(errors.var() / 10.5 - 1) < 0.04) == (True, True)
    masks = head_module._masks((100, 400))
    assert (masks.min() >= -(2**15), masks.max() < 2**15, abs(masks.mean()) < 500) == (True, True, True)


# The key, guarantee G25.


def test_g25_a_shared_approximate_decryption_gives_the_key_away() -> None:
    """Li & Micciancio's attack on what a careless client does: it sends CKKS results back."""
    import tenseal.sealapi as seal

    n = 2048
    wanted = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    wanted.set_poly_modulus_degree(n)
    wanted.set_coeff_modulus([seal.Modulus(Parameters.widest(n, 1, 20).primes[0])])
    of = seal.SEALContext(wanted, True, seal.SEC_LEVEL_TYPE.TC128)
    secret, encoder, plain = seal.KeyGenerator(of).secret_key(), seal.CKKSEncoder(of), seal.Plaintext()
    encoder.encode([0.5, -1.0, 2.0], 2.0**40, plain)
    ciphertext, got = seal.Ciphertext(), seal.Plaintext()
    seal.Encryptor(of, secret).encrypt_symmetric(plain, ciphertext)
    seal.Decryptor(of, secret).decrypt(ciphertext, got)
    shared = encoder.decode_complex(got)
    # The server: encode what came back, subtract, divide. It saw the ciphertext and nothing else.
    again = seal.Plaintext()
    encoder.encode(shared, 2.0**40, again)
    prime = Parameters.widest(n, 1, 20).primes[0]
    stolen = [(again[i] - ciphertext[i]) * pow(ciphertext[n + i], -1, prime) % prime for i in range(n)]
    truth = [secret.data()[i] for i in range(n)]
    assert stolen == truth


def test_g25_shared_exact_results_give_the_same_attack_nothing() -> None:
    # The worst a careless client can do with exact results: send them all back. They are the integers that anybody
    # could compute from record and head; the noise, which is what the attack solves with, was rounded away.
    head, _ = head_of(8, 8)
    plan = head.public.plan
    key = QueryKey.fresh(head.public)
    secret = key._QueryKey__ternary.astype(int)  # type: ignore[attr-defined]
    rows, sides = [], []
    half = 1 << (plan.answer_bits - 1)
    for _ in range(30):
        answer = head.answer(key.encrypt(np.zeros(8)))
        shared = key.integers(answer)[0]
        values = wire.unpack(memoryview(answer)[HEAD_BYTES:], plan.answer_bits)
        for label in range(8):
            place = label * plan.block + plan.block - 1
            shifts = place - np.arange(plan.parameters.ring)
            second = values[plan.classes :]
            # c1 s = scaled result - c0, if the result told the phase exactly; it tells it up to the noise.
            row = np.where(shifts >= 0, second[shifts], -second[shifts])
            side = (int(shared[label]) << (plan.answer_bits - plan.parameters.plain_bits)) - int(values[label])
            rows.append(row)
            sides.append(side)
    errors = np.array(
        [
            (int(row.astype(object) @ secret.astype(object)) - side + half) % (2 * half) - half
            for row, side in zip(rows, sides, strict=True)
        ]
    )
    # Every equation carries noise of its own, so that they are learning-with-errors samples and nothing to solve.
    assert (errors != 0).mean() > 0.9
    assert errors.std() > 5


def test_g25_a_crafted_answer_reads_the_key_off_a_client_that_tells_results() -> None:
    # Why nothing may go back: the "server" answers with c1 = q'/t, and the client's numbers are its key.
    head, _ = head_of(2048, 1)
    plan = head.public.plan
    key = QueryKey.fresh(head.public)
    values = np.zeros(plan.classes + plan.parameters.ring, dtype=np.int64)
    values[plan.classes + 7] = 1 << (plan.answer_bits - plan.parameters.plain_bits)
    crafted = head.public.mark + wire.pack(values, plan.answer_bits)
    told = int(key.integers(crafted)[0, 0])
    assert told == key._QueryKey__ternary[plan.block - 1 - 7]  # type: ignore[attr-defined]


def test_g25_no_answer_of_the_right_size_is_refused_whatever_it_holds() -> None:
    # An error that depends on the content would be an oracle; size and mark are all that anybody may learn from.
    for words in ({}, {"hide_weights": True}, {"batch": 40, "packing": Packing.BULK}):
        head, _ = head_of(6, 3, **words)
        plan, key = head.public.plan, QueryKey.fresh(head.public)
        for data in (b"\0", b"\xff", None):
            size = plan.answer_bytes - HEAD_BYTES
            body = os.urandom(size) if data is None else data * size
            got = key.decrypt(head.public.mark + body)
            assert np.isfinite(got).all()
        stranger = QueryKey.fresh(head.public)
        x = np.zeros((plan.batch, 6)) if plan.batch > 1 else np.zeros(6)
        wrong = stranger.integers(head.answer(key.encrypt(x)))
        assert (wrong != key.integers(head.answer(key.encrypt(x)))).any()


def test_g25_the_key_has_no_way_out_for_what_it_decrypted() -> None:
    # The whole surface: what takes an answer gives numbers to the caller, and what gives bytes takes no answer.
    public = {name for name in dir(QueryKey) if not name.startswith("_")}
    assert public == {"fresh", "restore", "save", "encrypt", "decrypt", "integers", "remaining"}
    for name in ("decrypt", "integers"):
        assert "answer" in inspect.signature(getattr(QueryKey, name)).parameters
    head, _ = head_of(6, 3)
    key = QueryKey.fresh(head.public, queries=3)
    before = key.save()
    key.decrypt(head.answer(key.encrypt(np.zeros(6))))
    spent = key.save()
    key.decrypt(head.public.mark + bytes(head.public.plan.answer_bytes - HEAD_BYTES))
    # Decrypting leaves no trace in the key: only encryption counts down.
    assert key.save() == spent != before


# Bytes from a stranger.


def mutated(message: bytes, rng: np.random.Generator) -> bytes:
    """Changes a message in one of the ways that a network or an attacker might."""
    data = bytearray(message)
    way = rng.integers(8)
    if way == 0:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif way == 1:
        del data[rng.integers(len(data)) :]
    elif way == 2:
        data += rng.bytes(int(rng.integers(1, 100)))
    elif way == 3:
        start = int(rng.integers(len(data)))
        data[start : start + 64] = rng.bytes(len(data[start : start + 64]))
    elif way == 4:
        start = int(rng.integers(len(data)))
        data[start : start + 8] = b"\xff" * len(data[start : start + 8])
    elif way == 5:
        return rng.bytes(int(rng.integers(0, 2 * len(data))))
    elif way == 6:
        data[HEAD_BYTES:] = rng.bytes(len(data) - HEAD_BYTES)
    else:
        start = int(rng.integers(0, 120))
        data[start : start + 4] = struct.pack("<I", int(rng.choice([0, 1, 2**31, 2**32 - 1])))
    return bytes(data)


def fuzz(count: int, words: dict[str, Any], seed: int) -> tuple[int, int]:
    """Feeds a head mutated queries, and its answers, mutated, to a key; returns how many were refused and answered."""
    head, _ = head_of(20, 3, **words)
    plan, key = head.public.plan, QueryKey.fresh(head.public)
    x = np.zeros((plan.batch, 20)) if plan.batch > 1 else np.zeros(20)
    query = key.encrypt(x)
    answer = head.answer(query)
    rng, refused, answered = np.random.default_rng(seed), 0, 0
    for _ in range(count // 2):
        try:
            assert len(head.answer(mutated(query, rng))) == plan.answer_bytes
            answered += 1
        except HeadError:
            refused += 1
        try:
            assert np.isfinite(key.decrypt(mutated(answer, rng))).all()
            answered += 1
        except HeadError:
            refused += 1
    return refused, answered


KINDS: list[dict[str, Any]] = [{}, {"wire": Wire.SEAL}, {"hide_weights": True}, {"batch": 8, "packing": Packing.BULK}]


@pytest.mark.parametrize("words", KINDS, ids=["packed", "seal", "hidden", "bulk"])
def test_mutated_messages_are_refused_or_give_wrong_numbers(words: dict[str, Any]) -> None:
    refused, answered = fuzz(120, words, 1)
    assert refused + answered == 120
    assert refused > 20


# Twenty thousand messages in a process that may take 300 MB more than it has, and must end well.
_PROGRAM = """
import resource, sys
sys.path[:0] = {paths!r}
import numpy as np
from test_he_attacks import KINDS, fuzz
fuzz(8, KINDS[0], 0), fuzz(8, KINDS[1], 0)
now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = answered = 0
for seed, words in enumerate(KINDS):
    one, two = fuzz({count}, words, seed)
    refused, answered = refused + one, answered + two
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - now
print(refused, answered, grown // 1024)
"""


@pytest.mark.slow
def test_ten_thousand_mutated_messages_neither_crash_nor_grow() -> None:
    here = Path(__file__).parent
    program = _PROGRAM.format(paths=[str(here), str(here.parents[1])], count=3000)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, answered, grown_mb = map(int, done.stdout.split())
    assert refused + answered == 12_000
    assert min(refused, answered) > 500
    assert grown_mb < 300


def bomb(size: int) -> bytes:
    """A zstd frame of a few kilobytes that becomes ``size`` zeros, behind SEAL's header."""
    block, count = 128 * 1024, size // (128 * 1024)
    # Magic, a descriptor without content size, a window of 128 kB, then blocks of one repeated byte (RFC 8878).
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([7 << 3])
    for index in range(count):
        frame += (((block << 3) | 2 | (index == count - 1)).to_bytes(3, "little")) + b"\0"
    return struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(frame)) + frame


def test_a_compressed_bomb_is_refused_before_it_is_inflated() -> None:
    head, _ = head_of(20, 3, wire=Wire.SEAL)
    plan = head.public.plan
    data = bomb(400 * 2**20)
    assert len(data) < plan.sample_bytes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query = head.public.mark + (struct.pack("<I", len(data)) + data).ljust(plan.sample_bytes, b"\0")
    with pytest.raises(HeadError):
        head.answer(query)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024
    # The same frame, short enough, inflates: it is a frame that zstd reads.
    assert stream.bounded(bomb(256 * 1024), 256 * 1024)
    with pytest.raises(HeadError):
        stream.bounded(bomb(256 * 1024), 256 * 1024 - 1)


def test_messages_for_another_head_version_or_plan_are_refused() -> None:
    head, _ = head_of(20, 3)
    newer, _ = head_of(20, 3, seed=1)
    other, _ = head_of(21, 3)
    key = QueryKey.fresh(head.public)
    query = key.encrypt(np.zeros(20))
    for wrong in (newer, other):
        with pytest.raises(HeadError, match=r"for this head and version|of exactly"):
            wrong.answer(query)
        with pytest.raises(HeadError):
            key.decrypt(wrong.answer(QueryKey.fresh(wrong.public).encrypt(np.zeros(wrong.public.plan.features))))
    for junk in (None, "text", 7, [1], b""):
        with pytest.raises(HeadError):
            head.answer(junk)  # type: ignore[arg-type]
    # A residue at its prime is refused, one below it is not.
    prime, bits = head.public.plan.parameters.primes[0], 8 * head.public.plan.parameters.residue_bytes
    for value, good in ((prime - 1, True), (prime, False), (2**53, False), (2**56 - 1, False)):
        first = np.full(2048, 0)
        first[1000] = value
        crafted = head.public.mark + bytes(64) + wire.pack(first, bits)
        if good:
            head.answer(crafted)
        else:
            with pytest.raises(HeadError, match="below their prime"):
                head.answer(crafted)


def test_descriptions_from_a_stranger_are_checked_like_our_own() -> None:
    fields = json.loads(head_of(20, 3)[0].public.to_bytes())
    # A server that asks for a modulus which is not safe would read every record.
    fields["plan"]["parameters"]["primes"] = [*fields["plan"]["parameters"]["primes"], 9007199254429697]
    with pytest.raises(PlanError, match="128-bit"):
        HeadDescription.from_bytes(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())
    assert issubclass(HeadError, TacitError)
    assert HeadError.exit_code == 11
