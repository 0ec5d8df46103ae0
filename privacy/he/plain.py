"""The same head by SEAL's own loader, evaluator and decryptor: slow, plain, and what everything else is compared with.

Where the installed library writes streams that `stream.sound` does not know, plans come here: queries and answers are
SEAL's streams as they are, filled up to one size. Answers then hold whole products, so one of them tells the weights to
who asks (guarantee G23). SEAL's loader checks what it reads against the parameters and has bounded sizes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from privacy.errors import HeadError, PlanError
from privacy.he.planner import HEAD_BYTES, HeadPlan
from privacy.he.ring import Integers
from privacy.he.stream import bounded, context, dumps, loads

if TYPE_CHECKING:
    import tenseal.sealapi as seal

_LENGTH: Final = struct.Struct("<I")


def filled(stream: bytes, size: int) -> bytes:
    """Writes a stream's length, the stream, and zeros up to ``size`` bytes."""
    if len(stream) > size - _LENGTH.size:
        raise HeadError(f"expected a stream of at most {size - _LENGTH.size} bytes, got {len(stream)}; plan again")
    return (_LENGTH.pack(len(stream)) + stream).ljust(size, b"\0")


def emptied(data: memoryview) -> bytes:
    """Reads what `filled` wrote.

    Raises:
        HeadError: The length is beyond the data.
    """
    (length,) = _LENGTH.unpack_from(data)
    if length > len(data) - _LENGTH.size:
        raise HeadError("expected a stream that fits its message, got a longer one; encrypt the record anew")
    return bytes(data[_LENGTH.size : _LENGTH.size + length])


def plaintext(coefficients: list[int], modulus: int) -> seal.Plaintext:
    """Makes SEAL's plaintext from signed integers, by the text form that SEAL documents."""
    import tenseal.sealapi as seal

    terms = [
        f"{value % modulus:X}x^{power}" if power else f"{value % modulus:X}"
        for power, value in reversed(list(enumerate(coefficients)))
        if value % modulus
    ]
    return seal.Plaintext(" + ".join(terms) or "0")


class PlainEvaluator:
    """Answers by SEAL alone.

    Args:
        plan: What to do; packing SINGLE, one prime.
        weights: int64 of shape ``(c, d)``.
        bias: Integer biases, one a class.
    """

    def __init__(self, plan: HeadPlan, weights: Integers, bias: tuple[int, ...]) -> None:
        import tenseal.sealapi as seal

        self._plan, self._context = plan, context(plan.parameters)
        self._evaluator = seal.Evaluator(self._context)
        n, block, rows, modulus = plan.parameters.ring, plan.block, plan.rows, plan.parameters.plain_modulus
        identity = self._context.first_parms_id()
        self._weights: list[list[Any]] = []
        self._bias: list[Any] = []
        for output in range(plan.outputs):
            kept = range(output * rows, min(plan.classes, (output + 1) * rows))
            row: list[Any] = []
            for part in range(plan.inputs):
                coefficients = np.zeros(n, dtype=np.int64)
                for place, label in enumerate(kept):
                    piece = weights[label, part * block : (part + 1) * block]
                    end = (place + 1) * block
                    coefficients[end - len(piece) : end] = piece[::-1]
                made = plaintext(coefficients.tolist(), modulus)
                # SEAL refuses products with zero: such a block adds nothing.
                if made.is_zero():
                    row.append(None)
                    continue
                self._evaluator.transform_to_ntt_inplace(made, identity)
                row.append(made)
            if not any(made is not None for made in row):
                raise PlanError("expected classes with a weight that is not zero, got none; train the head again")
            self._weights.append(row)
            offsets = [0] * n
            for place, label in enumerate(kept):
                offsets[place * block + block - 1] = bias[label]
            self._bias.append(plaintext(offsets, modulus))

    def answer(self, body: memoryview) -> list[bytes]:
        """Answers the query's samples one after the other."""
        import tenseal.sealapi as seal

        plan, parts = self._plan, []
        size = plan.inputs * plan.sample_bytes
        slot = (plan.answer_bytes - HEAD_BYTES) // (plan.rounds * plan.outputs)
        # Two polynomials and the members before them; a stream that becomes more is no ciphertext of these.
        most = 1024 + 16 * plan.parameters.ring
        for index in range(plan.rounds):
            here = body[index * size : (index + 1) * size]
            loaded = []
            for part in range(plan.inputs):
                piece = here[part * plan.sample_bytes : (part + 1) * plan.sample_bytes]
                ciphertext = loads(seal.Ciphertext(), self._context, bounded(emptied(piece), most))
                if ciphertext.size() != 2 or ciphertext.is_ntt_form():
                    raise HeadError("expected a fresh ciphertext of two polynomials, got another; encrypt anew")
                loaded.append(ciphertext)
            parts += [filled(dumps(made), slot) for made in self.evaluate(loaded)]
        return parts

    def evaluate(self, ciphertexts: list[Any]) -> list[Any]:
        """Multiplies SEAL's ciphertexts by the weights and adds the bias; one ciphertext for each output."""
        import tenseal.sealapi as seal

        forms = []
        try:
            for ciphertext in ciphertexts:
                form = seal.Ciphertext()
                self._evaluator.transform_to_ntt(ciphertext, form)
                forms.append(form)
            made = []
            for row, offset in zip(self._weights, self._bias, strict=True):
                total: Any = None
                for form, weight in zip(forms, row, strict=True):
                    if weight is None:
                        continue
                    product = seal.Ciphertext()
                    self._evaluator.multiply_plain(form, weight, product)
                    if total is None:
                        total = product
                    else:
                        self._evaluator.add_inplace(total, product)
                self._evaluator.transform_from_ntt_inplace(total)
                self._evaluator.add_plain_inplace(total, offset)
                made.append(total)
        except (RuntimeError, ValueError) as error:
            raise HeadError(f"expected a ciphertext that SEAL evaluates, got: {error}; encrypt anew") from None
        return made
