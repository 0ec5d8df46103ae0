"""Encrypted heads beside the obvious ways, in one process and one thread, turn about.

Times are this process's processor time where both sides are (what other programs do to a core is not what encryption
costs), and the wall's where a target is one. All duties count: encrypt, serialise, evaluate, serialise, decrypt.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable

import numpy as np

RANGE = (-4.0, 4.0)


def single(repeat: int) -> dict[str, object]:
    """512 features, 10 classes, one sample: ours in exact and float mode against ``CKKSVector.matmul``."""
    from privacy.he import EncryptedHead, QueryKey, Scheme, plan_head
    from privacy.he.reference import DocumentedHead, likely_head, likely_records

    weights, bias = likely_head(512, 10, 0)
    x = likely_records(1, 512, 1)[0]
    clear = weights @ x + bias
    exact = EncryptedHead.load(plan_head(features=512, classes=10), weights, bias, RANGE)
    near = EncryptedHead.load(plan_head(features=512, classes=10, scheme=Scheme.FLOAT), weights, bias, RANGE)
    key, near_key = QueryKey.fresh(exact.public, queries=100_000), QueryKey.fresh(near.public, queries=100_000)
    query, near_query = key.encrypt(x), near_key.encrypt(x)
    answer, near_answer = exact.answer(query), near.answer(near_query)
    # What is timed is right.
    whole = np.rint(weights * exact.public.weight_scale).astype(np.int64)
    shift = np.rint(bias * exact.public.weight_scale * exact.public.feature_scale).astype(np.int64)
    assert (key.integers(answer) == exact.public.quantise(x) @ whole.T + shift).all()
    theirs = {ring: DocumentedHead(weights, bias, ring) for ring in (4096, 8192)}
    rows: dict[str, list[float]] = {}

    def clock(row: str, act: Callable[[], object], times: int) -> float:
        began, wall = time.process_time(), time.perf_counter()
        for _ in range(times):
            act()
        spent = (time.process_time() - began) / times
        rows.setdefault(row, []).append(spent)
        rows.setdefault(f"{row}, wall", []).append((time.perf_counter() - wall) / times)
        return spent

    ratios: dict[str, list[float]] = {}
    for _ in range(repeat):
        ours = clock("ours", lambda: key.decrypt(exact.answer(key.encrypt(x))), 50)
        clock("ours, client encrypts", lambda: key.encrypt(x), 50)
        served = clock("ours, server", lambda: exact.answer(query), 50)
        clock("ours, client decrypts", lambda: key.decrypt(answer), 50)
        clock("float", lambda: near_key.decrypt(near.answer(near_key.encrypt(x))), 50)
        for ring, head in theirs.items():
            sent = head.encrypt(x)
            one = clock(f"theirs {ring}", lambda head=head: head.decrypt(head.answer(head.encrypt(x))), 1)
            two = clock(f"theirs {ring}, server", lambda head=head, sent=sent: head.answer(sent), 1)
            ratios.setdefault(f"matmul, ring {ring} / ours, all duties (at least 500)", []).append(one / ours)
            ratios.setdefault(f"matmul, ring {ring} / ours, server", []).append(two / served)
    small = theirs[4096]
    return {
        "512x10 exact, all duties, processor time (ms, at most 2)": 1e3 * statistics.median(rows["ours"]),
        "512x10 exact, all duties, wall (ms)": 1e3 * statistics.median(rows["ours, wall"]),
        "of it the client's encryption (ms)": 1e3 * statistics.median(rows["ours, client encrypts"]),
        "of it the server (ms, at most 0.5)": 1e3 * statistics.median(rows["ours, server"]),
        "of it the client's decryption (ms)": 1e3 * statistics.median(rows["ours, client decrypts"]),
        "512x10 float, all duties (ms)": 1e3 * statistics.median(rows["float"]),
        "CKKSVector.matmul, ring 4096, all duties (ms)": 1e3 * statistics.median(rows["theirs 4096"]),
        "CKKSVector.matmul, ring 8192, all duties (ms)": 1e3 * statistics.median(rows["theirs 8192"]),
        **{row: statistics.median(values) for row, values in ratios.items()},
        "bytes up (at most 16,000)": len(query),
        "bytes down (at most 31,000)": len(answer),
        "keys at the server (bytes, none)": 0,
        "theirs, ring 4096: keys at the server (bytes)": len(small.keys),
        "error, float mode (at most 2e-5)": float(np.abs(near_key.decrypt(near_answer) - clear).max()),
        "error, matmul in ring 4096": float(np.abs(small.decrypt(small.answer(small.encrypt(x))) - clear).max()),
    }


def bulk(repeat: int) -> dict[str, object]:
    """2,048 samples, 512 features, 100 classes: a matrix product over residues against SEAL's multiply-add loop."""
    from privacy.he import EncryptedHead, Packing, QueryKey, plan_head
    from privacy.he.bulk import BulkEvaluator, Engine
    from privacy.he.reference import MultiplyAdd, likely_head, likely_records
    from privacy.he.wire import read_samples

    weights, bias = likely_head(512, 100, 0)
    plan = plan_head(features=512, classes=100, batch=2048, packing=Packing.BULK)
    head = EncryptedHead.load(plan, weights, bias, RANGE)
    key, x = QueryKey.fresh(head.public), likely_records(2048, 512, 1)
    query = key.encrypt(x)
    whole = np.rint(weights * head.public.weight_scale).astype(np.int64)
    samples = read_samples(memoryview(query)[20:], plan.parameters)
    ours = BulkEvaluator(plan, whole, np.zeros((1, 100), dtype=np.int64), Engine.NUMPY)
    loop, classes = MultiplyAdd(plan.parameters, whole), 4
    ciphertexts = loop.ciphertexts(samples)
    # Both give the same residues.
    first, second = ours.evaluate(samples)
    q = plan.parameters.modulus
    assert (loop.residues(loop.evaluate(ciphertexts, 1)[0]) == np.stack((first[0, 0] % q, second[0, 0] % q))).all()
    mine, all_of_it, theirs, ratios = [], [], [], []
    for _ in range(repeat):
        began = time.process_time()
        ours.evaluate(samples)
        mine.append((time.process_time() - began) / 2048)
        began = time.process_time()
        answer = head.answer(query)
        all_of_it.append((time.process_time() - began) / 2048)
        began = time.process_time()
        loop.evaluate(ciphertexts, classes)
        theirs.append((time.process_time() - began) * 100 / classes / 2048)
        ratios.append(theirs[-1] / mine[-1])
    return {
        "512x100 bulk, evaluation (us per sample and core, at most 25)": 1e6 * statistics.median(mine),
        "512x100 bulk, the server's other duties too: read, expand, round, write (us)": 1e6
        * statistics.median(all_of_it),
        "512x100, SEAL's multiply-add loop (us per sample; 4 classes, times 25)": 1e6 * statistics.median(theirs),
        "multiply-add loop / matrix product (at least 20)": statistics.median(ratios),
        "bytes up per sample": plan.query_bytes / 2048,
        "bytes down per sample": len(answer) / 2048,
    }


def peer(repeat: int) -> dict[str, object] | str:
    """Concrete-ML's logistic regression, 512 to 10, all duties; or the reason why it cannot run here."""
    if importlib.util.find_spec("concrete") is None or importlib.util.find_spec("concrete.ml") is None:
        return "skipped: concrete-ml is not installed in this environment (it wants one of its own)"
    from concrete.ml.sklearn import LogisticRegression

    from privacy.he import EncryptedHead, QueryKey, plan_head
    from privacy.he.reference import likely_head, likely_records

    weights, bias = likely_head(512, 10, 0)
    x = likely_records(2000, 512, 1)
    labels = (x @ weights.T + bias).argmax(1)
    model = LogisticRegression(n_bits=8)
    model.fit(x, labels)
    circuit = model.compile(x[:200])
    circuit.client.keygen()
    head = EncryptedHead.load(plan_head(features=512, classes=10), weights, bias, RANGE)
    key, theirs, ours = QueryKey.fresh(head.public, queries=100_000), [], []
    quantised = model.quantize_input(x[:1])

    def one() -> None:
        circuit.decrypt(circuit.run(circuit.encrypt(quantised)))

    one()
    for _ in range(repeat):
        began = time.perf_counter()
        one()
        theirs.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(20):
            key.decrypt(head.answer(key.encrypt(x[0])))
        ours.append((time.perf_counter() - began) / 20)
    return {
        "Concrete-ML, 512x10, all duties (ms)": 1e3 * statistics.median(theirs),
        "Concrete-ML / ours (at least 50)": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
    }


def compared(repeat: int) -> dict[str, object]:
    """All rows."""
    other = peer(repeat)
    return {
        **single(min(repeat, 3)),
        **bulk(min(repeat, 3)),
        **(other if isinstance(other, dict) else {"Concrete-ML": other}),
    }
