"""What an encrypted head will be, and what it will cost, before anything runs.

A plan fixes scheme, ring, primes, packing and split from the head's size, the batch, the wanted precision and the link.
It is public, canonical and has a digest; both ends must hold the same one. It knows the exact size of every query and
answer, so that a receiver can refuse all other sizes before it reads a byte.

Packings, with N the ring's dimension, d features and c classes:

    SINGLE   Coefficients (Huang et al. 2022, "Cheetah"): s features a ciphertext at X**0 .. X**(s-1), the weights of
             N/s classes reversed in blocks of s, so that the product has one logit at the end of each block. No
             rotation, hence no key at the server. d/s ciphertexts go up, c s/N come down, dc/N products.
    BULK     One ciphertext a feature, one sample a coefficient: a matrix product over residues.

Modes:

    EXACT    Integers (BFV). The answer equals the integer head's, always or up to a failure probability of 2**-100.
    FLOAT    Approximate (CKKS): wider features and weights, and an error that depends on keys and noise.

Failure bounds (guarantee G24). SEAL's errors are centred binomial, at most 21 in magnitude, variance 21/2. With W the
weights' polynomial, q the modulus, q' the answer's and t the plaintext's, decryption of a logit is right if

    (21.5 ||W||_1 + 0.5) q'/q + (N + 1)/2  <  q'/(2 t)                          (certain)

where 21.5 is an error and the rounding of a scaled message, 0.5 the bias' rounding, and (N + 1)/2 the rounding to q'
under a ternary key. The binomial part is a sum of independent terms, sub-Gaussian with variance proxy 21/2 ||W||_2**2,
so that instead

    (x ||W||_2 + 0.5 ||W||_1 + 0.5) q'/q + (N + 1)/2  <  q'/(2 t),   2 c exp(-x**2 / 21) <= 2**-100    (likely)

The bounds are checked twice: here for the widest weights there can be, and when a head is loaded for its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator
from enum import StrEnum
from typing import Any, Final, Self, final

from privacy.errors import PlanError
from privacy.he import stream
from privacy.he.parameters import MOST_BITS, SECURITY_BITS, Parameters
from privacy.plan import canonical, require

MOST_FEATURES: Final = 16_384
MOST_CLASSES: Final = 1_000
MOST_BATCH: Final = 4_096

# Bytes before the ciphertexts: a mark and the first half of the description's digest.
MARK: Final = b"tq1\n"
HEAD_BYTES: Final = len(MARK) + 16

FAILURE_BITS: Final = 100
_ERROR: Final = stream.LARGEST_ERROR
_ERROR_VARIANCE: Final = 10.5
# What floods an answer's noise is so many bits wider than it: at most 2**-48 of a bias for each logit.
FLOOD_BITS: Final = 48
# How much of the room for integer logits a head in FLOAT takes, bias included, when it is loaded.
FILLED: Final = 0.9
# Width of what an encryption of zero is multiplied by to hide weights; see `head`.
MASK_BITS: Final = 16
_MOST_HIDDEN_ROWS: Final = 64
_FEW_FEATURES: Final = 64
_ANSWER_BITS: Final = (32, 40, 48)
# SEAL's own stream as it is, with room for what zstd adds to what it cannot compress.
_SLACK: Final = 512
_MOST_JSON: Final = 4_096


class Scheme(StrEnum):
    """How numbers are encoded: integers that come out exact, or approximate numbers."""

    EXACT = "exact"
    FLOAT = "float"


class Packing(StrEnum):
    """Where features go: many features of one sample in a ciphertext, or one feature of many samples."""

    SINGLE = "single"
    BULK = "bulk"


class Wire(StrEnum):
    """How ciphertexts travel: in our exact layout, or as SEAL's own streams where the layout is not what we know."""

    PACKED = "packed"
    SEAL = "seal"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a plan is expected to cost, from figures measured on a 2-core AMD EPYC at about 3 GHz, one thread.

    Attributes:
        client_s: Encrypting and decrypting one query, seconds.
        server_s: Answering it, seconds.
        link_s: Moving its bytes over the stated link, seconds, without round trips.
        query_bytes: Bytes up, exact.
        answer_bytes: Bytes down, exact.
        error: Largest error of a logit, in units of (largest weight x half the features' range): quantisation, and in
            FLOAT also noise, for the widest weights and for biases (with what the range's centre adds to them) of at
            most one such unit for each feature. Larger biases leave less room for weights in FLOAT, so more error.
        certain: Whether decryption cannot fail; else it fails with a probability of at most 2**-100. None in FLOAT.
        security_bits: Bits of security, classical.
        quantum_secure: Whether it has as many against a quantum computer.
    """

    client_s: float
    server_s: float
    link_s: float
    query_bytes: int
    answer_bytes: int
    error: float
    certain: bool | None
    security_bits: int
    quantum_secure: bool

    @property
    def latency_s(self) -> float:
        """All of it together, seconds."""
        return self.client_s + self.server_s + self.link_s


@final
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPlan:
    """How a head is evaluated under encryption; public. Made by `plan_head`, read by `from_bytes`.

    Attributes:
        features: d, from 1 to 16,384.
        classes: c, from 1 to 1,000.
        batch: Samples in one query.
        scheme: EXACT or FLOAT.
        packing: SINGLE or BULK.
        wire: PACKED, or SEAL where the installed library writes another layout.
        feature_bits: Width of a quantised feature, with its sign.
        weight_bits: Width of a quantised weight, with its sign; in FLOAT the most it may be.
        hide_weights: Whether answers are re-randomised and flooded (guarantee G23).
        parameters: Ring, primes and plaintext modulus.
        block: s, the features in one ciphertext (SINGLE); 1 in BULK.
        answer_bits: log2 of the answer's modulus q'.
    """

    features: int
    classes: int
    batch: int
    scheme: Scheme
    packing: Packing
    wire: Wire
    feature_bits: int
    weight_bits: int
    hide_weights: bool
    parameters: Parameters
    block: int
    answer_bits: int

    def __post_init__(self) -> None:
        """Checks every field; a plan that exists can be carried out."""
        for name, value, most in (
            ("features", self.features, MOST_FEATURES),
            ("classes", self.classes, MOST_CLASSES),
            ("batch", self.batch, MOST_BATCH),
        ):
            require(
                type(value) is int and 1 <= value <= most,
                f"expected 1 to {most:,} {name}, got {value}; use a smaller head or split the batch",
            )
        for name, value, most in (("feature", self.feature_bits, 30), ("weight", self.weight_bits, 30)):
            require(
                type(value) is int and 2 <= value <= most,
                f"expected 2 to {most} bits of {name}, got {value}; plan again",
            )
        require(type(self.hide_weights) is bool, "expected hide-weights to be true or false; plan again")
        require(
            type(self.answer_bits) is int and self.answer_bits in _ANSWER_BITS,
            f"expected an answer of 32, 40 or 48 bits, got {self.answer_bits}; plan again",
        )
        n, primes = self.parameters.ring, len(self.parameters.primes)
        require(primes <= 2, f"expected one or two primes, got {primes}; plan again")
        if self.packing is Packing.BULK:
            require(self.block == 1, f"expected blocks of 1 in bulk, got {self.block}; plan again")
            require(self.batch <= n, f"expected at most {n:,} samples in bulk, got {self.batch:,}; split the batch")
        else:
            most = min(n, self.features)
            require(
                type(self.block) is int and 1 <= self.block <= most,
                f"expected blocks of 1 to {most} features, got {self.block}; plan again",
            )
        require(
            not self.hide_weights or (primes == 2 and self.packing is Packing.SINGLE and self.wire is Wire.PACKED),
            "expected two primes, single packing and the packed wire for a head that hides its weights; plan again",
        )
        require(
            self.wire is Wire.PACKED
            or (self.packing is Packing.SINGLE and self.scheme is Scheme.EXACT and primes == 1),
            "expected exact mode, single packing and one prime for SEAL's own streams; plan again",
        )

    # Shape.

    @property
    def inputs(self) -> int:
        """Ciphertexts that go up for one sample (SINGLE) or for the whole batch (BULK)."""
        return -(-self.features // self.block)

    @property
    def rows(self) -> int:
        """Classes in one ciphertext that comes down."""
        if self.packing is Packing.BULK:
            return 1
        most = min(self.parameters.ring // self.block, self.classes)
        return min(most, _MOST_HIDDEN_ROWS) if self.hide_weights else most

    @property
    def outputs(self) -> int:
        """Ciphertexts that come down for one sample (SINGLE) or for the whole batch (BULK)."""
        return -(-self.classes // self.rows)

    @property
    def rounds(self) -> int:
        """How often a query repeats its layout: once a sample in SINGLE, once in BULK."""
        return 1 if self.packing is Packing.BULK else self.batch

    @property
    def sample_bytes(self) -> int:
        """Bytes of one ciphertext that goes up: a seed and the residues of one polynomial."""
        residues = len(self.parameters.primes) * self.parameters.ring
        if self.wire is Wire.SEAL:
            return 4 + 256 + 8 * residues + _SLACK
        return stream.SEED_BYTES + self.parameters.residue_bytes * residues

    @functools.cached_property
    def query_bytes(self) -> int:
        """The exact size of a query."""
        return HEAD_BYTES + self.rounds * (self.inputs + self.hide_weights) * self.sample_bytes

    @functools.cached_property
    def answer_bytes(self) -> int:
        """The exact size of an answer."""
        n = self.parameters.ring
        if self.wire is Wire.SEAL:
            return HEAD_BYTES + self.rounds * self.outputs * (4 + 256 + 16 * n + _SLACK)
        firsts = self.classes * n if self.packing is Packing.BULK else self.classes
        return HEAD_BYTES + self.rounds * (firsts + self.outputs * n) * (self.answer_bits // 8)

    # Bounds.

    @property
    def largest_feature(self) -> int:
        """Largest magnitude of a quantised feature."""
        return (1 << (self.feature_bits - 1)) - 1

    @property
    def largest_weight(self) -> int:
        """Largest magnitude of a quantised weight."""
        return (1 << (self.weight_bits - 1)) - 1

    def rounding(self) -> float:
        """Bounds what the change to the answer's modulus adds to a phase, in units of q'."""
        # The second term is what float64 loses beside the rounding itself; see `wire.switch`.
        return (self.parameters.ring + 1) * (0.5 + 2.0 ** (self.answer_bits - 51))

    def flood(self, absolute: float) -> int:
        """Returns the bits of the noise that hides weights whose polynomials sum to ``absolute`` in magnitude."""
        return FLOOD_BITS + math.ceil(math.log2((_ERROR + 0.5) * absolute + 1)) if self.hide_weights else 0

    def noise(self, absolute: float, norm: float, *, certain: bool) -> float:
        """Bounds the error of a phase, in units of the answer's modulus.

        Args:
            absolute: Largest ||W||_1 of the weights that make one output.
            norm: Largest ||W||_2 of them.
            certain: Whether the bound must hold always, or may fail with a probability of 2**-100.
        """
        per_unit = 2.0**self.answer_bits / self.parameters.modulus
        if certain:
            error = (_ERROR + 0.5) * absolute
        else:
            logits = self.classes * self.batch
            spread = math.sqrt(2 * _ERROR_VARIANCE * math.log(2) * (FAILURE_BITS + 1 + math.log2(logits)))
            error = spread * norm + 0.5 * absolute
        if self.hide_weights:
            error += 2.0 ** self.flood(absolute) + _ERROR * self.parameters.ring * (2.0**MASK_BITS + 1)
        return (error + 0.5) * per_unit + self.rounding()

    def holds(self, absolute: float, norm: float) -> bool | None:
        """Says whether decryption is always right (True), right but for 2**-100 (False), or neither (None)."""
        most = 2.0 ** (self.answer_bits - self.parameters.plain_bits - 1)
        if self.noise(absolute, norm, certain=True) < most:
            return True
        return False if self.noise(absolute, norm, certain=False) < most else None

    def widest(self) -> tuple[float, float]:
        """Returns ||W||_1 and ||W||_2 for the widest weights there can be."""
        count = self.features * self.rows
        return float(self.largest_weight * count), self.largest_weight * math.sqrt(count)

    # What it costs.

    def predict(self, *, link_bits_per_s: float = 1e8) -> Prediction:
        """Predicts one query's cost.

        Args:
            link_bits_per_s: Speed of the link, both ways.
        """
        scale = self.parameters.ring / 2048 * len(self.parameters.primes)
        ups = self.rounds * (self.inputs + self.hide_weights)
        downs = self.rounds * self.outputs
        if self.packing is Packing.BULK:
            server = 90e-6 * scale * self.inputs + 0.2e-9 * scale * 2048 * self.features * self.classes
            server += 200e-6 * scale * self.outputs
            back = 250e-6 * scale * self.outputs
        else:
            server = 1e-4 + 9e-5 * scale * ups + 5e-5 * scale * downs + 8e-6 * scale * ups * self.outputs
            back = 4e-5 + 2e-5 * scale * downs
        if self.hide_weights:
            server += 5e-4 * scale * downs
        elif self.wire is Wire.SEAL:
            server, back = 2.5 * server, 4 * back
        absolute, norm = self.widest()
        return Prediction(
            client_s=4e-4 * scale * ups + back,
            server_s=server,
            link_s=8 * (self.query_bytes + self.answer_bytes) / link_bits_per_s,
            query_bytes=self.query_bytes,
            answer_bytes=self.answer_bytes,
            error=self._error(),
            certain=None if self.scheme is Scheme.FLOAT else self.holds(absolute, norm),
            security_bits=SECURITY_BITS,
            quantum_secure=self.parameters.quantum_secure,
        )

    def modulus_room(self) -> float:
        """Returns how large an integer logit may be in FLOAT, so that with all noise it stays below q/2."""
        return 0.98 * self.parameters.modulus / 2

    def _error(self) -> float:
        """Bounds a logit's error, in units of (largest weight x half the features' range); see `Prediction`."""
        widest, noise = float(self.largest_weight), 0.0
        if self.scheme is Scheme.FLOAT:
            # What `EncryptedHead.load` does: where logits and biases would not fit the modulus, weights get fewer
            # steps. Narrower weights than the widest get more of them, and every term below only falls.
            widest = min(widest, FILLED * self.modulus_room() / (2 * self.features * self.largest_feature))
            # The bits of a flood are whole, so it may be twice as wide for weights that are a little wider.
            absolute = widest * self.features * self.rows * (1 + self.hide_weights)
            noise = self.noise(absolute, absolute, certain=True) * self.parameters.modulus / 2.0**self.answer_bits
        # A feature's rounding meets a weight, a weight's a feature, the bias' and the noise neither.
        error = self.features * (0.5 / self.largest_feature + 0.5 / widest)
        error += (noise + 0.5) / (self.largest_feature * widest)
        # Float64 rounds scales, sums and the result: far less than the slack.
        return error * (1 + 2.0**-16)

    # Bytes.

    def fields(self) -> dict[str, Any]:
        """Returns what the plan is, as plain values."""
        return {
            "v": 1,
            "features": self.features,
            "classes": self.classes,
            "batch": self.batch,
            "scheme": self.scheme.value,
            "packing": self.packing.value,
            "wire": self.wire.value,
            "feature-bits": self.feature_bits,
            "weight-bits": self.weight_bits,
            "hide-weights": self.hide_weights,
            "parameters": self.parameters.fields(),
            "block": self.block,
            "answer-bits": self.answer_bits,
        }

    def to_bytes(self) -> bytes:
        """Returns the plan's one canonical text."""
        return canonical(self.fields())

    @classmethod
    def from_fields(cls, fields: Any) -> Self:
        """Reads a plan from plain values, and checks all of it.

        Raises:
            PlanError: It is no plan, not a safe one, or one that cannot be carried out.
        """
        names = {field.name.replace("_", "-") for field in dataclasses.fields(cls)} | {"v"}
        require(
            type(fields) is dict and fields.keys() == names and fields["v"] == 1,
            "expected the plan of a head, version 1, got other fields; take the plan from the server",
        )
        words = {name.replace("-", "_"): value for name, value in fields.items() if name != "v"}
        words["parameters"] = Parameters.from_fields(words["parameters"])
        for name, kind in (("scheme", Scheme), ("packing", Packing), ("wire", Wire)):
            try:
                words[name] = kind(words[name])
            except ValueError:
                raise PlanError(f"expected a known {name}, got another; take the plan from the server") from None
        return cls(**words)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a plan's text, and checks all of it.

        Raises:
            PlanError: It is no plan, not its canonical form, not a safe one, or one that cannot be carried out.
        """
        plan = cls.from_fields(read_json(data))
        require(plan.to_bytes() == data, "expected a plan in canonical form, got another; take it from the server")
        return plan

    @property
    def digest(self) -> str:
        """SHA-256 of the plan's text, 64 hexadecimal digits."""
        return hashlib.sha256(b"tacit/he/plan/1\n" + self.to_bytes()).hexdigest()


def read_json(data: bytes) -> Any:
    """Reads a small JSON text.

    Raises:
        PlanError: It is none, or a long one.
    """
    require(len(data) <= _MOST_JSON, f"expected at most {_MOST_JSON} bytes of plan, got {len(data)}; take another")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise PlanError("expected a plan as JSON, got other bytes; take it from the server") from None


def plan_head(
    *,
    features: int,
    classes: int,
    batch: int = 1,
    feature_bits: int | None = None,
    weight_bits: int | None = None,
    scheme: Scheme = Scheme.EXACT,
    hide_weights: bool = False,
    plain_bits: int | None = None,
    link_bits_per_s: float = 1e8,
    wire: Wire | None = None,
    packing: Packing | None = None,
    quantum: bool = False,
) -> HeadPlan:
    """Chooses ring, primes, packing and split for a head: the plan with the lowest predicted latency that is safe.

    Args:
        features: d, from 1 to 16,384.
        classes: c, from 1 to 1,000.
        batch: Samples in one query.
        feature_bits: Width of a quantised feature with its sign (default 10 in EXACT, 26 in FLOAT).
        weight_bits: Width of a quantised weight with its sign (default 10 in EXACT, 26 in FLOAT).
        scheme: EXACT or FLOAT.
        hide_weights: Whether to re-randomise and flood the answers; costs a larger ring.
        plain_bits: log2 of the plaintext modulus (EXACT); by default enough for the widest weights, and for a bias
            where they are not all the widest.
        link_bits_per_s: Speed of the link, both ways.
        wire: How ciphertexts travel; by default PACKED where SEAL's layout is the known one.
        packing: By default the faster one.
        quantum: Whether the modulus must leave 128 bits of security against quantum computers too.

    Raises:
        PlanError: No safe parameters carry such a head.
    """
    exact = scheme is Scheme.EXACT
    feature_bits = feature_bits or (10 if exact else 26)
    weight_bits = weight_bits or (10 if exact else 26)
    require(
        not exact or (feature_bits >= 10 and weight_bits >= 8),
        f"expected at least 10 bits of feature and 8 of weight, got {feature_bits} and {weight_bits}; ask for more",
    )
    require(
        type(features) is int and type(classes) is int and features >= 1 and classes >= 1,
        f"expected whole numbers of features and classes, got {features} and {classes}",
    )
    if exact:
        largest = features * ((1 << (feature_bits - 1)) - 1) * ((1 << (weight_bits - 1)) - 1)
        # All weights at their widest leave no room for a bias; real ones do, unless there are few of them.
        plain_bits = plain_bits or (2 * largest + 1).bit_length() + (features <= _FEW_FEATURES)
    else:
        require(plain_bits is None, "expected no plaintext modulus in float mode, got one; leave plain_bits out")
        # SEAL wants one; nothing is scaled by it.
        plain_bits = 20
    wire = wire or (Wire.PACKED if stream.sound() else Wire.SEAL)
    best: HeadPlan | None = None
    for ring, primes in ((4096, 2),) if hide_weights else ((2048, 1), (4096, 2)):
        if plain_bits + 2 >= MOST_BITS[ring]:
            continue
        parameters = Parameters.widest(ring, primes, plain_bits, quantum=quantum)
        for pack, block in _splits(features, batch, ring, packing):
            for answer_bits in _ANSWER_BITS:
                try:
                    plan = HeadPlan(
                        features=features,
                        classes=classes,
                        batch=batch,
                        scheme=scheme,
                        packing=pack,
                        wire=wire,
                        feature_bits=feature_bits,
                        weight_bits=weight_bits,
                        hide_weights=hide_weights,
                        parameters=parameters,
                        block=block,
                        answer_bits=answer_bits,
                    )
                except PlanError:
                    if best is None and (ring, block) == (4096, min(features, 4096)) and answer_bits == 48:
                        raise
                    continue
                if _serves(plan):
                    here = plan.predict(link_bits_per_s=link_bits_per_s).latency_s
                    if best is None or here < best.predict(link_bits_per_s=link_bits_per_s).latency_s:
                        best = plan
                    break
    if best is None:
        raise PlanError(
            f"expected a head that 128-bit parameters carry, got {features} features of {feature_bits} bits and "
            f"weights of {weight_bits}; use fewer bits"
        )
    return best


def _splits(features: int, batch: int, ring: int, packing: Packing | None) -> Iterator[tuple[Packing, int]]:
    """Yields every packing and block size worth trying: one block for each number of ciphertexts."""
    if packing is not Packing.BULK:
        last = 0
        fewest = -(-features // ring)
        for inputs in range(fewest, min(features, 8 * fewest + 64) + 1):
            block = -(-features // inputs)
            if block != last:
                last = block
                yield Packing.SINGLE, block
    if (packing is Packing.BULK or (packing is None and batch > 1)) and batch <= ring:
        yield Packing.BULK, 1


def _serves(plan: HeadPlan) -> bool:
    """Says whether a plan's bounds hold for the widest weights."""
    absolute, norm = plan.widest()
    if plan.scheme is Scheme.EXACT:
        return plan.holds(absolute, norm) is not None
    # What the answer's modulus rounds away must be far below one part in a million of the largest logit.
    return plan.rounding() < 2.0 ** (plan.answer_bits - 26)
