"""Encrypted heads beside the obvious ways, in one process and one thread, turn about.

Times are this process's processor time where both sides are (what other programs do to a core is not what encryption
costs), and the wall's where a target is one. All duties count: encrypt, serialise, evaluate, serialise, decrypt.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
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
        # Call by call, and the median: a call that another program interrupts finds its caches empty.
        spent, wall = [], []
        for _ in range(times):
            began, seen = time.process_time(), time.perf_counter()
            act()
            spent.append(time.process_time() - began)
            wall.append(time.perf_counter() - seen)
        rows.setdefault(row, []).append(statistics.median(spent))
        rows.setdefault(f"{row}, wall", []).append(statistics.median(wall))
        return rows[row][-1]

    ratios: dict[str, list[float]] = {}
    for _ in range(repeat):
        ours = clock("ours", lambda: key.decrypt(exact.answer(key.encrypt(x))), 100)
        clock("ours, client encrypts", lambda: key.encrypt(x), 100)
        served = clock("ours, server", lambda: exact.answer(query), 100)
        clock("ours, client decrypts", lambda: key.decrypt(answer), 100)
        clock("float", lambda: near_key.decrypt(near.answer(near_key.encrypt(x))), 100)
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


_PEER = """
import json, statistics, sys, time
import numpy as np
from concrete.ml.sklearn import LogisticRegression
rng = np.random.default_rng(0)
weights, x = rng.standard_normal((10, 512)) / 512**0.5, rng.standard_normal((2000, 512))
model = LogisticRegression(n_bits=8)
model.fit(x, (x @ weights.T).argmax(1))
circuit = model.compile(x[:200])
circuit.client.keygen()
one, spent = model.quantize_input(x[:1]), []
for _ in range(int(sys.argv[1]) + 1):
    began = time.perf_counter()
    circuit.decrypt(circuit.run(circuit.encrypt(one)))
    spent.append(time.perf_counter() - began)
print(json.dumps(statistics.median(spent[1:])))
"""


def peer(repeat: int) -> dict[str, object]:
    """Concrete-ML's logistic regression, 512 to 10, all duties, by a Python of its own; or why it was not run."""
    python = os.environ.get("TACIT_CONCRETE", "")
    if not python:
        return {"Concrete-ML": "skipped: set TACIT_CONCRETE to a Python that has concrete-ml; it wants its own numpy"}
    done = subprocess.run([python, "-c", _PEER, str(repeat)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"Concrete-ML": f"skipped: {python} cannot run it: {(done.stderr.splitlines() or ['no word'])[-1]}"}
    from privacy.he import EncryptedHead, QueryKey, plan_head
    from privacy.he.reference import likely_head, likely_records

    weights, bias = likely_head(512, 10, 0)
    x = likely_records(1, 512, 1)[0]
    head = EncryptedHead.load(plan_head(features=512, classes=10), weights, bias, RANGE)
    key, ours = QueryKey.fresh(head.public, queries=100_000), []
    for _ in range(100):
        began = time.perf_counter()
        key.decrypt(head.answer(key.encrypt(x)))
        ours.append(time.perf_counter() - began)
    theirs = float(json.loads(done.stdout.splitlines()[-1]))
    return {
        "Concrete-ML, 512x10, all duties, wall (ms)": 1e3 * theirs,
        "Concrete-ML / ours (at least 50)": theirs / statistics.median(ours),
    }


def compared(repeat: int) -> dict[str, object]:
    """All rows."""
    return {**single(min(repeat, 3)), **bulk(min(repeat, 3)), **peer(min(repeat, 3))}
