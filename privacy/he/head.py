"""A linear head that answers encrypted queries: weights in clear here, features and logits never.

    ciphertext of x (c0, c1)  --W-->  (W c0, W c1)  --bias, useful coefficients, modulus q'-->  answer

The server holds no key of any kind. Of the product's first polynomial only the coefficients that are logits leave; the
second one leaves whole, because decryption needs it, and it tells W to who knows c1 (guarantee G23: see `hidden`). Both
are rounded to a smaller modulus, so an answer to 512 features and 10 classes takes 31 kB and not 93.

A query's bytes never meet a parser: its size is exact, its layout fixed, each residue is checked to lie below its
prime, and the rest is arithmetic on arrays of known shape.
"""

from __future__ import annotations

import math
import os
from typing import Final, Self, final

import numpy as np
from numpy.typing import NDArray

from privacy.errors import PlanError
from privacy.he.bulk import BulkEvaluator
from privacy.he.description import HeadDescription, checked
from privacy.he.parameters import Parameters
from privacy.he.plain import PlainEvaluator
from privacy.he.planner import FILLED, MASK_BITS, HeadPlan, Packing, Scheme, Wire
from privacy.he.ring import Floats, Integers, join, limbs_for, ring, split
from privacy.he.stream import LARGEST_ERROR
from privacy.he.wire import pack, read_samples, switch, times

# Numbers in the matrix that computes logits' coefficients alone; beyond that a transform of all is faster.
_MOST_DIRECT: Final = 1 << 18


@final
class EncryptedHead:
    """A head, ready to answer. Made by `load`.

    Guarantees:
        Exact (EXACT): an honest query's answer decrypts to the integer head's logits, always or up to a failure
            probability of 2**-100; `load` refuses weights for which neither holds (guarantee G24).
        Safe to feed: bytes of another size, head or version, and residues outside their modulus, are a HeadError.
        Keyless: nothing here can decrypt.
    """

    def __init__(self, public: HeadDescription, weights: Integers, bias: tuple[int, ...], certain: bool | None) -> None:
        """Use `load`."""
        self.public: Final = public
        self.certain: Final = certain
        plan = public.plan
        self._shift = _scaled_bias(plan, bias)
        self._evaluator: _SingleEvaluator | BulkEvaluator | PlainEvaluator
        if plan.wire is Wire.SEAL:
            self._evaluator = PlainEvaluator(plan, weights, bias)
        elif plan.packing is Packing.BULK:
            self._evaluator = BulkEvaluator(plan, weights, self._shift)
        else:
            self._evaluator = _SingleEvaluator(plan, weights, self._shift)

    @classmethod
    def load(
        cls,
        plan: HeadPlan,
        weights: object,
        bias: object,
        feature_range: tuple[float, float],
    ) -> Self:
        """Quantises a head, checks that its answers come out exact, and encodes its weights once.

        Args:
            plan: Made for this size.
            weights: Numbers of shape ``(c, d)``.
            bias: Numbers of shape ``(c,)``.
            feature_range: Smallest and largest value a feature may have; public.

        Raises:
            PlanError: Shapes differ from the plan's, a number is not finite, all weights are zero, or the weights or
                the bias would break a bound of guarantee G24.
        """
        try:
            matrix, offset = np.asarray(weights, dtype=np.float64), np.asarray(bias, dtype=np.float64)
            low, high = (float(end) for end in feature_range)
        except (TypeError, ValueError):
            raise PlanError("expected weights, bias and range as numbers, got something else; check them") from None
        if matrix.shape != (plan.classes, plan.features) or offset.shape != (plan.classes,):
            raise PlanError(
                f"expected weights of shape ({plan.classes}, {plan.features}) and as many biases as classes, got "
                f"{matrix.shape} and {offset.shape}; plan for this head"
            )
        if not (np.isfinite(matrix).all() and np.isfinite(offset).all()):
            raise PlanError("expected finite weights and biases, got NaN or infinity; train the head again")
        largest = float(np.abs(matrix).max())
        if largest == 0:
            raise PlanError("expected a head with a weight that is not zero, got none; train it first")
        scale = plan.largest_weight / largest
        trial = HeadDescription(plan=plan, low=low, high=high, weight_scale=scale)
        # Python's own numbers, which overflow to infinity without a word, and then a check.
        centred = [value + trial.centre * math.fsum(row) for row, value in zip(matrix, offset.tolist(), strict=True)]
        if not all(math.isfinite(value * trial.feature_scale * scale) for value in centred):
            raise PlanError("expected biases that a head of these weights can have, got far larger ones; check them")
        if plan.scheme is Scheme.FLOAT:
            sums = np.abs(matrix).sum(1) * plan.largest_feature
            shifts = np.abs(centred) * trial.feature_scale
            scale = min(scale, FILLED * plan.modulus_room() / float((sums + shifts).max()))
            trial = HeadDescription(plan=plan, low=low, high=high, weight_scale=scale)
        integers = np.rint(matrix * scale).astype(np.int64)
        whole = tuple(round(value * trial.feature_scale * scale) for value in centred)
        return cls(trial, integers, whole, _check(plan, integers, whole))

    def answer(self, query: bytes | bytearray | memoryview) -> bytes:
        """Answers a query.

        Args:
            query: Exactly ``public.plan.query_bytes`` bytes.

        Returns:
            Exactly ``public.plan.answer_bytes`` bytes.

        Raises:
            HeadError: The query has another size, is for another head or version, or holds no residues.
        """
        body = checked(query, self.public.plan.query_bytes, self.public, "a query")
        return b"".join((self.public.mark, *self._evaluator.answer(body)))


def output_norms(plan: HeadPlan, weights: Integers) -> tuple[float, float]:
    """Returns the largest ||W||_1 and ||W||_2 of the weights that make one output ciphertext."""
    absolute, square = np.abs(weights).sum(1, dtype=np.float64), np.square(weights, dtype=np.float64).sum(1)
    edges = np.arange(0, plan.classes, plan.rows)
    return float(np.add.reduceat(absolute, edges).max()), float(np.sqrt(np.add.reduceat(square, edges).max()))


def _check(plan: HeadPlan, weights: Integers, bias: tuple[int, ...]) -> bool | None:
    """Checks both bounds of guarantee G24; returns whether the second holds always, or None in FLOAT.

    Raises:
        PlanError: A logit could leave the plaintext's range, or decryption could fail.
    """
    # Sums of up to 2**14 weights below 2**29 fit 64 bits; their product with a feature need not, so it is Python's.
    reach = np.abs(weights).sum(1).tolist()
    largest = max(total * plan.largest_feature + abs(offset) for total, offset in zip(reach, bias, strict=True))
    absolute, norm = output_norms(plan, weights)
    if plan.scheme is Scheme.FLOAT:
        noise = plan.noise(absolute, norm, certain=True) * plan.parameters.modulus / 2.0**plan.answer_bits
        if largest + noise >= plan.parameters.modulus / 2:
            raise PlanError("expected logits that fit the modulus, got larger ones; use fewer bits of feature")
        return None
    if 2 * largest >= plan.parameters.plain_modulus:
        bits = (2 * largest).bit_length()
        raise PlanError(
            f"expected integer logits below 2**{plan.parameters.plain_bits - 1}, got up to {largest} (bias included); "
            f"plan with plain_bits={bits}"
        )
    certain = plan.holds(absolute, norm)
    if certain is None:
        raise PlanError(
            f"expected noise that rounds away, got weights of absolute sum {absolute:.0f}, for which decryption could "
            "fail; plan with fewer bits or a larger ring"
        )
    return certain


def _scaled_bias(plan: HeadPlan, bias: tuple[int, ...]) -> Integers:
    """Scales integer biases as messages are scaled; int64 of shape ``(primes, c)``, reduced."""
    q, t = plan.parameters.modulus, plan.parameters.plain_modulus
    scaled = bias if plan.scheme is Scheme.FLOAT else tuple((q * value + t // 2) // t for value in bias)
    return np.array([[value % prime for value in scaled] for prime in plan.parameters.primes], dtype=np.int64)


class _SingleEvaluator:
    """The packing SINGLE: one product in the ring for each pair of a ciphertext that comes and one that goes.

    Args:
        plan: What to do.
        weights: int64 of shape ``(c, d)``.
        shift: The scaled bias, int64 of shape ``(primes, c)``.
    """

    def __init__(self, plan: HeadPlan, weights: Integers, shift: Integers) -> None:
        self._plan, self._ring, self._shift = plan, ring(plan.parameters.ring), shift
        n, block, rows, inputs, outputs = self._ring.n, plan.block, plan.rows, plan.inputs, plan.outputs
        padded = np.zeros((outputs * rows, inputs * block))
        padded[: plan.classes, : plan.features] = weights
        # Reversed within its block, so that the last coefficient of the block collects the whole logit.
        blocks = padded.reshape(outputs, rows, inputs, block)[..., ::-1].transpose(0, 2, 1, 3)
        polynomials = np.zeros((outputs, inputs, n))
        polynomials[..., : rows * block] = blocks.reshape(outputs, inputs, rows * block)
        norms = np.sqrt(np.square(polynomials).sum(2)).sum(1)
        bits = max(prime.bit_length() for prime in plan.parameters.primes)
        self._limbs = limbs_for(n, bits, float(norms.max()), inputs)
        spectra = self._ring.forward(polynomials)
        # One frequency after the other where many products are added: then each is a small matrix product.
        self._weights = spectra[:, 0] if inputs == 1 else np.ascontiguousarray(spectra.transpose(2, 0, 1))
        kept = np.arange(plan.classes)
        self._output, self._position = kept // rows, kept % rows * block + block - 1
        self._flood = plan.flood(output_norms(plan, weights)[0])
        self._direct: Floats | None = None
        if not plan.hide_weights and plan.classes * inputs * n <= _MOST_DIRECT:
            self._direct = self._useful_rows(polynomials)

    def _useful_rows(self, polynomials: Floats) -> Floats:
        """Returns the matrix that takes first polynomials, one after the other, to the useful coefficients.

        Of the first polynomials only so few coefficients are kept that a matrix is faster than a transform.

        Returns:
            float64 integers of shape ``(inputs * n, c)``.
        """
        n = self._ring.n
        shifts = self._position - np.arange(n)[:, np.newaxis]  # -> (n, c)
        signs = np.where(shifts >= 0, 1.0, -1.0)
        rows = polynomials[self._output].transpose(2, 1, 0)  # -> (n, inputs, c)
        picked = rows[shifts % n, :, np.arange(len(self._position))]  # -> (n, c, inputs)
        return np.ascontiguousarray((picked * signs[..., np.newaxis]).transpose(2, 0, 1).reshape(-1, shifts.shape[1]))

    def answer(self, body: memoryview) -> list[bytes]:
        """Answers the query's samples one after the other."""
        plan = self._plan
        parts, size = [], (plan.inputs + plan.hide_weights) * plan.sample_bytes
        for index in range(plan.rounds):
            samples = read_samples(body[index * size : (index + 1) * size], plan.parameters)
            if self._direct is not None:
                useful, second = self._evaluate_useful(samples, self._direct)
            else:
                first, second = self.evaluate(samples[: plan.inputs])
                if plan.hide_weights:
                    first, second = self._hidden(first, second, samples[plan.inputs])
                useful = first[:, self._output, self._position]
            useful += self._shift
            if plan.hide_weights:
                useful += _flood(plan.classes, self._flood, plan.parameters)
            both = np.concatenate((useful, second.reshape(len(second), -1)), axis=1)
            parts.append(pack(switch(both, plan.parameters, plan.answer_bits), plan.answer_bits))
        return parts

    def evaluate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Multiplies ciphertexts by the weights, exactly.

        Args:
            samples: int64 of shape ``(inputs, 2, primes, n)``.

        Returns:
            Both polynomials of every output, int64 of shape ``(primes, outputs, n)``, congruent but not reduced.
        """
        found = []
        for row, prime in enumerate(self._plan.parameters.primes):
            limbs = split(samples[:, :, row], prime, self._limbs)  # -> (limbs, inputs, 2, n)
            found.append(self._product(limbs, prime))
        products = _stacked(found)  # -> (primes, 2, outputs, n)
        return products[:, 0], products[:, 1]

    def _evaluate_useful(self, samples: Integers, direct: Floats) -> tuple[Integers, Integers]:
        """Does what `evaluate` does, but of the first polynomials only what is useful, ``(primes, c)``."""
        useful, seconds = [], []
        for row, prime in enumerate(self._plan.parameters.primes):
            limbs = split(samples[:, :, row], prime, self._limbs)  # -> (limbs, inputs, 2, n)
            flat = np.ascontiguousarray(limbs[:, :, 0]).reshape(self._limbs, -1)
            # Sums of integers below 2**53: `limbs_for` saw to that.
            useful.append(join((flat @ direct).astype(np.int64), prime))
            seconds.append(self._product(limbs[:, :, 1:], prime)[0])
        return _stacked(useful), _stacked(seconds)

    def _product(self, limbs: Floats, prime: int) -> Integers:
        """Multiplies and adds: float64 of shape ``(limbs, inputs, k, n)`` to int64 ``(k, outputs, n)``."""
        spectra = self._ring.forward(limbs)
        if limbs.shape[1] == 1:
            products = spectra[:, 0, :, np.newaxis] * self._weights  # -> (limbs, 2, outputs, n/2)
        else:
            count, inputs, parts, half = spectra.shape
            right = spectra.transpose(3, 1, 0, 2).reshape(half, inputs, parts * count)
            products = (self._weights @ right).transpose(2, 1, 0).reshape(count, parts, -1, half)
        return join(self._ring.backward(products), prime)

    def _hidden(self, first: Integers, second: Integers, zero: Integers) -> tuple[Integers, Integers]:
        """Adds a fresh encryption of zero under the client's key to each output.

        With the client's own encryption of zero (b, a) as if it were a public key: (b u, a u + e), u uniform. Who does
        not know u cannot tell a u + e from random (ring learning with errors), so the second polynomial tells nothing
        of W. What the first one's noise tells is flooded afterwards.

        Args:
            first: int64 of shape ``(primes, outputs, n)``.
            second: The same shape.
            zero: The client's encryption of zero, int64 of shape ``(2, primes, n)``.
        """
        plan, n, outputs = self._plan, self._ring.n, self._plan.outputs
        masks = _masks((outputs, n))
        norm = float(np.sqrt(np.square(masks).sum(1)).max())
        spectrum = self._ring.forward(masks)
        error = _binomial((outputs, n))
        for row, prime in enumerate(plan.parameters.primes):
            limbs = split(zero[:, row], prime, limbs_for(n, prime.bit_length(), norm))
            products = self._ring.forward(limbs)[:, :, np.newaxis] * spectrum  # -> (limbs, 2, outputs, n/2)
            zeros = join(self._ring.backward(products), prime) % prime
            first[row] = first[row] % prime + zeros[0]
            second[row] = second[row] % prime + zeros[1] + error
        return first, second


def _stacked(parts: list[Integers]) -> Integers:
    """Stacks one array for each prime; one alone is not copied."""
    return parts[0][np.newaxis] if len(parts) == 1 else np.stack(parts)


# Secret randomness that hides weights: from the operating system, never from a generator with a state.


def _words(count: int) -> NDArray[np.uint64]:
    return np.frombuffer(os.urandom(8 * count), dtype="<u8")


def _masks(shape: tuple[int, int]) -> Floats:
    """Draws integers that are uniform in [-2**(MASK_BITS - 1), 2**(MASK_BITS - 1)).

    A ternary mask would do for honest encryptions of zero. A crafted one could make each logit's coefficient tell some
    thirty bits of the mask, so a mask is wide: then that is two of its thousands of coefficients.
    """
    words = _words(math.prod(shape)) >> np.uint64(64 - MASK_BITS)
    return words.astype(np.float64).reshape(shape) - 2.0 ** (MASK_BITS - 1)


def _binomial(shape: tuple[int, int]) -> Integers:
    """Draws SEAL's errors: 21 fair bits minus 21 others."""
    words = _words(math.prod(shape)).reshape(shape)
    mask = np.uint64((1 << LARGEST_ERROR) - 1)
    ones, others = np.bitwise_count(words & mask), np.bitwise_count(words >> np.uint64(LARGEST_ERROR) & mask)
    found: Integers = ones.astype(np.int64) - others.astype(np.int64)
    return found


def _flood(count: int, bits: int, parameters: Parameters) -> Integers:
    """Draws integers that are uniform in [-2**(bits - 1), 2**(bits - 1)), as residues of shape ``(primes, count)``."""
    low = (_words(count) >> np.uint64(64 - min(bits, 40))).astype(np.int64)
    high = (_words(count) >> np.uint64(64 - (bits - 40))).astype(np.int64) if bits > 40 else np.zeros_like(low)
    found = [
        (times(high % prime, (1 << 40) % prime, prime) + low - (1 << (bits - 1)) % prime) % prime
        for prime in parameters.primes
    ]
    return np.stack(found)
