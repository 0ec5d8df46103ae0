"""Packets: a request or reply as bytes, with one encoding, and a reader that nothing surprises."""

from __future__ import annotations

import json
import math
import random
import struct
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import wire
from privacy.errors import PlanError
from privacy.ledger import Word
from privacy.wire import (
    Floats,
    Packet,
    array_of,
    floats_by_name,
    floats_of,
    pack,
    packed_bytes,
    read_float32,
    unpack,
    write_float32,
)
from tests.vectors import make_packet as oracle

MOST = 1_000_000
VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "packet.json").read_text())
MODEL = {"w": Floats((2, 3), struct.pack("<6f", 1, -2, 0.5, math.inf, 0, 4)), "b": Floats((1,), b"\0\0\xc0\x7f")}
JOB = {"task": "digits", "round": -(2**63), "lr": 0.1, "test": True, "key": b"\xff\0"}


def joined(configs: Any, arrays: Any) -> bytes:
    return b"".join(pack(configs, arrays))


# -- arrays ----------------------------------------------------------------------------------------------------------


def test_the_numbers_of_an_array_are_views_of_it_and_come_back_as_it() -> None:
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    data = write_float32(value)
    floats = floats_of(data, (3, 4), "w")
    assert floats == ((3, 4), value.tobytes())
    assert np.shares_memory(np.frombuffer(floats.data, np.uint8), np.frombuffer(data, np.uint8))
    assert array_of(floats) == data
    assert (read_float32(array_of(floats), (3, 4), "w") == value).all()


@pytest.mark.parametrize("shape", [(4, 3), (12,), (3, 4, 1), (), (0,)])
def test_the_numbers_of_an_array_of_another_shape_are_not_taken(shape: tuple[int, ...]) -> None:
    data = write_float32(np.zeros((3, 4), np.float32))
    with pytest.raises(PlanError):
        floats_of(data, shape, "w")
    for other in (data.replace(b"<f4", b"<f8"), data[:-1], data + b"\0"):
        with pytest.raises(PlanError):
            floats_of(other, (3, 4), "w")


def test_only_arrays_that_say_they_are_float32_are_taken() -> None:
    data = write_float32(np.zeros((3, 4), np.float32))
    array = SimpleNamespace(dtype="float32", stype="numpy.ndarray", shape=(3, 4), data=data)
    assert floats_by_name({"w": array}) == {"w": floats_of(data, (3, 4), "w")}
    for wrong in ({"dtype": "float16"}, {"stype": "torch.Tensor"}, {"shape": (4, 3)}, {"data": data[:-4]}):
        with pytest.raises(PlanError):
            floats_by_name({"w": SimpleNamespace(**{**vars(array), **wrong})})


# -- what is written is read -----------------------------------------------------------------------------------------


def test_a_request_is_read_as_it_was_written() -> None:
    packet = unpack(joined({"job": JOB}, {"arrays": MODEL}), max_bytes=MOST)
    assert packet == Packet({"job": JOB}, {"arrays": MODEL})
    assert [type(value) for value in packet.configs["job"].values()] == [str, int, float, bool, bytes]
    assert list(packet.arrays["arrays"]) == ["w", "b"]


def test_the_arrays_are_neither_copied_nor_writable_and_are_aligned() -> None:
    (*_, first, second) = pack({"job": JOB}, {"arrays": MODEL})
    assert np.shares_memory(np.frombuffer(first, np.uint8), np.frombuffer(MODEL["w"].data, np.uint8))
    data = bytearray(joined({"job": JOB}, {"arrays": MODEL}))
    for floats in unpack(data, max_bytes=MOST).arrays["arrays"].values():
        assert np.shares_memory(np.frombuffer(floats.data, np.uint8), np.frombuffer(data, np.uint8))
        assert memoryview(floats.data).readonly
    assert len(b"".join(pack({"job": JOB}, {"arrays": MODEL})[:-2])) % 64 == 0
    assert second


_NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
_SCALARS = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
    | st.binary(max_size=50)
)
_SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
_FLOATS = _SHAPES.flatmap(
    lambda shape: st.binary(min_size=4 * math.prod(shape), max_size=4 * math.prod(shape)).map(
        lambda data: Floats(shape, data)
    )
)
_RECORDS = st.lists(_NAMES, max_size=4, unique=True).flatmap(
    lambda names: st.tuples(
        st.fixed_dictionaries({name: st.dictionaries(_NAMES, _SCALARS, max_size=4) for name in names[::2]}),
        st.fixed_dictionaries({name: st.dictionaries(_NAMES, _FLOATS, max_size=4) for name in names[1::2]}),
    )
)


@settings(max_examples=50, deadline=None)
@given(_RECORDS)
def test_any_records_come_back_and_their_length_is_known_beforehand(records: tuple[Any, Any]) -> None:
    configs, arrays = records
    data = joined(configs, arrays)
    packet = unpack(data, max_bytes=len(data))
    assert packet == (configs, arrays)
    assert joined(*packet) == data
    shapes = {name: {key: floats.shape for key, floats in record.items()} for name, record in arrays.items()}
    assert packed_bytes(configs, shapes) == len(data)


# -- vectors from another path ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VECTORS["positive"])
def test_a_vector_is_read_and_written_again_byte_for_byte(name: str) -> None:
    data = bytes.fromhex(VECTORS["positive"][name])
    assert joined(*unpack(data, max_bytes=MOST)) == data


def test_the_request_is_that_of_the_vectors() -> None:
    assert joined({"job": JOB}, {"arrays": MODEL}).hex() == VECTORS["positive"]["a request"]
    assert joined({"refusal": {"word": Word.DECLINED.value}}, {}).hex() == VECTORS["positive"]["a refusal"]


@pytest.mark.parametrize("name", VECTORS["negative"])
def test_a_packet_with_one_fault_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="is it the same program"):
        unpack(bytes.fromhex(VECTORS["negative"][name]), max_bytes=MOST)


def test_the_vectors_are_those_of_the_script() -> None:
    for part, made in (("positive", oracle.POSITIVE), ("negative", oracle.NEGATIVE)):
        assert {name: bytes.fromhex(data) for name, data in VECTORS[part].items()} == made


def test_a_reader_that_checks_nothing_takes_most_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: the faults are ones that a reader must look for."""
    monkeypatch.setattr(wire, "require", lambda condition, message: None)
    taken = 0
    for data in VECTORS["negative"].values():
        try:
            unpack(bytes.fromhex(data), max_bytes=MOST)
        except (PlanError, struct.error, IndexError):
            continue
        taken += 1
    assert taken >= 12


# -- what is not written ---------------------------------------------------------------------------------------------


class _Number(int):
    """Would come back as another type."""


@pytest.mark.parametrize(
    "value",
    [None, math.nan, math.inf, 2**63, -(2**63) - 1, [1], _Number(3), Word.DECLINED, "\ud800", b"x" * (8 * 2**20 + 1)],
)
def test_a_value_of_another_form_is_not_written(value: Any) -> None:
    with pytest.raises(PlanError):
        pack({"job": {"key": value}}, {})


@pytest.mark.parametrize(
    ("configs", "arrays"),
    [
        ({"a": {}}, {"a": {}}),
        ({"": {}}, {}),
        ({"a": {"": 1}}, {}),
        ({"a": {"x" * 256: 1}}, {}),
        ({str(at): {} for at in range(17)}, {}),
        ({"a": {str(at): True for at in range(65536)}}, {}),
        ({"a": {str(at): "x" * 2**20 for at in range(8)}}, {}),
        ({}, {"a": {"w": Floats((2,), bytes(4))}}),
        ({}, {"a": {"w": Floats((1,) * 9, bytes(4))}}),
        ({}, {"a": {"w": Floats((-1,), bytes(4))}}),
        ({}, {"a": {"w": Floats((2**32,), b"")}}),
        ({}, {"a": {"w": Floats((True,), bytes(4))}}),
    ],
)
def test_records_of_another_form_are_not_written(configs: Any, arrays: Any) -> None:
    with pytest.raises(PlanError):
        pack(configs, arrays)


def test_a_head_that_is_too_long_is_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"a": {str(at): "x" * 2**20 for at in range(8)}}
    monkeypatch.setattr(wire, "_MOST_HEAD_BYTES", 2**24)
    data = joined(texts, {})
    assert unpack(data, max_bytes=2**24)
    monkeypatch.undo()
    with pytest.raises(PlanError):
        joined(texts, {})
    with pytest.raises(PlanError):
        unpack(data, max_bytes=2**24)


def test_a_packet_that_is_too_long_is_not_read() -> None:
    data = joined({"job": JOB}, {"arrays": MODEL})
    with pytest.raises(PlanError):
        unpack(data, max_bytes=len(data) - 1)
    assert unpack(data, max_bytes=len(data))


def test_g12_a_refusal_can_be_padded_to_the_length_of_any_release() -> None:
    """A receipt's text grows with what was spent; the bound is on its longest form."""
    receipts = ["x" * length for length in (300, 900, 4096)]
    bound = packed_bytes({"receipt": {"receipt": receipts[-1]}}, {"arrays": {"w": (2, 3), "b": (1,)}})
    for receipt in receipts:
        assert len(joined({"receipt": {"receipt": receipt}}, {"arrays": MODEL})) <= bound
    for word in Word:
        assert len(joined({"refusal": {"word": word.value}}, {})) < bound


# -- whatever comes --------------------------------------------------------------------------------------------------


def _fuzz(cases: int) -> None:
    dice = random.Random(21)
    seeds = [bytes.fromhex(data) for data in VECTORS["positive"].values()]
    accepted = 0
    tracemalloc.start()
    for _ in range(cases):
        data = bytearray(dice.choice(seeds))
        for _ in range(dice.randrange(1, 4)):
            match dice.randrange(4):
                case 0:
                    del data[dice.randrange(len(data) + 1) :]
                case 1:
                    at = dice.randrange(len(data) + 1)
                    data[at:at] = dice.randbytes(dice.randrange(1, 70))
                case 2 if data:
                    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
                case _ if data:
                    data[dice.randrange(len(data))] = dice.choice((0, 255, 1, 127, 128))
        try:
            packet = unpack(data, max_bytes=MOST)
        except PlanError:
            continue
        # What is read has one encoding.
        assert joined(*packet) == data
        accepted += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 2**20
    # Some changes are to texts and numbers only: the fuzz gets past the first check.
    assert 0 < accepted < cases / 2


def test_garbage_is_refused_or_read_as_what_it_says() -> None:
    _fuzz(500)


@pytest.mark.slow
def test_ten_thousand_pieces_of_garbage_are_refused_or_read_as_what_they_say() -> None:
    _fuzz(10_000)
