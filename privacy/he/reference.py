"""The obvious ways, kept to be compared with: TenSEAL's documented matrix product, and SEAL's own multiply-add loop.

`DocumentedHead` is what TenSEAL's tutorials show: ``ckks_vector(context, x).matmul(W)``. It rotates once for each
feature, so it takes seconds and the server holds megabytes of Galois keys. `MultiplyAdd` is the feature-major head as a
loop over SEAL's evaluator, which `bulk` replaces by a matrix product. Neither is on any path of the service.

Only bytes without the secret key are public: TenSEAL's ``make_context_public`` leaves the decryptor in the process.
"""

from __future__ import annotations

import math
from typing import Any, Final, final

import numpy as np

from privacy.errors import PlanError
from privacy.he.parameters import MOST_BITS, Parameters
from privacy.he.plain import plaintext
from privacy.he.ring import Floats, Integers
from privacy.he.stream import context, loads, write_ciphertext

# Ring -> widths of the primes and the scale. In the smaller one the scale is the prime that is dropped: TenSEAL
# overwrites the scale after a rescaling, and any other value gives wrong numbers without a word.
SETS: Final = {8192: ([60, 40, 60], 2.0**40), 4096: ([40, 20, 40], 1032193.0)}


@final
class DocumentedHead:
    """Both ends of TenSEAL's documented linear head.

    Args:
        weights: float64 of shape ``(c, d)``.
        bias: float64 of shape ``(c,)``.
        ring: 8,192 (errors of 1e-7) or 4,096 (errors of 1e-3, twice as fast).
    """

    def __init__(self, weights: Floats, bias: Floats, ring: int = 8192) -> None:
        import tenseal

        bits, scale = SETS[ring]
        if sum(bits) > MOST_BITS[ring]:
            raise PlanError(f"expected at most {MOST_BITS[ring]} bits of modulus, got {sum(bits)}; take a larger ring")
        self._tenseal = tenseal
        self._secret = tenseal.context(tenseal.SCHEME_TYPE.CKKS, ring, coeff_mod_bit_sizes=bits, n_threads=1)
        self._secret.global_scale = scale
        self._secret.generate_galois_keys()
        # What a server would be sent; it must hold the keys before the first query.
        self.keys: Final[bytes] = self._secret.serialize(
            save_public_key=True, save_secret_key=False, save_galois_keys=True, save_relin_keys=False
        )
        self._public = tenseal.context_from(self.keys, n_threads=1)
        self._weights, self._bias = tenseal.plain_tensor(np.ascontiguousarray(weights.T)), bias.tolist()

    def encrypt(self, features: Floats) -> bytes:
        """Encrypts a record, float64 of shape ``(d,)``."""
        sent: bytes = self._tenseal.ckks_vector(self._secret, features.tolist()).serialize()
        return sent

    def answer(self, query: bytes) -> bytes:
        """Answers a query without the secret key."""
        product = self._tenseal.ckks_vector_from(self._public, query).matmul(self._weights)
        product += self._bias
        sent: bytes = product.serialize()
        return sent

    def decrypt(self, answer: bytes) -> Floats:
        """Decrypts an answer to logits, float64 of shape ``(c,)``."""
        return np.array(self._tenseal.ckks_vector_from(self._secret, answer).decrypt())


@final
class MultiplyAdd:
    """The bulk product as a loop over SEAL's evaluator, with the weights transformed beforehand.

    Args:
        parameters: One prime.
        weights: int64 of shape ``(c, d)``, at most ten bits wide or there is much to keep.
    """

    def __init__(self, parameters: Parameters, weights: Integers) -> None:
        import tenseal.sealapi as seal

        self._parameters, self._weights, self._context = parameters, weights, context(parameters)
        self._evaluator = seal.Evaluator(self._context)
        self._forms: dict[int, Any] = {}
        for value in np.unique(weights).tolist():
            # SEAL refuses a product with zero; the loop leaves it out.
            if value:
                self._forms[value] = plaintext([value], parameters.plain_modulus)
                self._evaluator.transform_to_ntt_inplace(self._forms[value], self._context.first_parms_id())

    def ciphertexts(self, samples: Integers) -> list[Any]:
        """Makes SEAL's ciphertexts, transformed, from residues: int64 of shape ``(d, 2, 1, n)``."""
        import tenseal.sealapi as seal

        made = []
        for sample in samples:
            data = write_ciphertext(sample[0], sample[1], self._context.first_parms_id())
            ciphertext = loads(seal.Ciphertext(), self._context, data)
            self._evaluator.transform_to_ntt_inplace(ciphertext)
            made.append(ciphertext)
        return made

    def evaluate(self, ciphertexts: list[Any], classes: int | None = None) -> list[Any]:
        """Multiplies and adds: one transformed ciphertext for each of the first ``classes`` classes."""
        import tenseal.sealapi as seal

        found, product = [], seal.Ciphertext()
        multiply, add = self._evaluator.multiply_plain, self._evaluator.add_inplace
        for row in self._weights[:classes].tolist():
            total: Any = None
            for ciphertext, value in zip(ciphertexts, row, strict=True):
                if not value:
                    continue
                if total is None:
                    total = seal.Ciphertext()
                    multiply(ciphertext, self._forms[value], total)
                else:
                    multiply(ciphertext, self._forms[value], product)
                    add(total, product)
            found.append(total)
        return found

    def residues(self, ciphertext: Any) -> Integers:
        """Reads a transformed ciphertext back, int64 of shape ``(2, n)``."""
        import tenseal.sealapi as seal

        plain = seal.Ciphertext()
        self._evaluator.transform_from_ntt(ciphertext, plain)
        n = self._parameters.ring
        return np.array([plain[index] for index in range(2 * n)], dtype=np.int64).reshape(2, n)


def likely_records(count: int, features: int, seed: int) -> Floats:
    """Draws records for comparisons, float64 of shape ``(count, features)``, standard normal and clipped to [-4, 4]."""
    return np.clip(np.random.default_rng(seed).standard_normal((count, features)), -4.0, 4.0)


def likely_head(features: int, classes: int, seed: int) -> tuple[Floats, Floats]:
    """Draws a head for comparisons: weights of shape ``(classes, features)`` with rows of norm about 1, and biases."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((classes, features)) / math.sqrt(features), rng.standard_normal(classes) / 10
