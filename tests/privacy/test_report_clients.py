"""The report of a plan that protects clients (G16): three adversaries, three figures, and none without its name."""

import dataclasses
import json
import math
import re

import pytest

from privacy.accounting import Event, pld_epsilon
from privacy.plan import Plan, Unit
from privacy.report import ClientSpend, Prices, RunFacts, Verdict, build, render
from privacy.report_page import INFINITY, UNKNOWN, figure_words
from tests.oracles import gaussian_delta

PLAN = Plan(
    unit=Unit.CLIENT,
    sample_rate=0.5,
    expected_batch=20.0,
    client_rate=0.2,
    l2_clip=0.7,
    noise_multiplier=4.9527,
    steps=3,
    rounds=20,
    joins=11,
    turns=10,
    epsilon=3.0,
    delta=1e-5,
    records_bound=1000,
)
HEADLINE, MODELS = 2.76734, 0.70059


def spend(**changes):
    fields = {
        "name": "client-0",
        "granted_epsilon": 3.0,
        "delta": 1e-5,
        "spent_epsilon": 2.12,
        "rounds_joined": 4,
        "charges": 4,
        "declined": 0,
        "runs": 1,
        "other_runs": 0,
        "receipts_missing": 0,
        "undelivered": 0,
        "test_noise": False,
        "history": ((3, 1.48), (9, 2.12)),
        "public_key": "a3" * 32,
        "ledger_head": "5b" * 32,
        "verdict": Verdict.VERIFIED,
    }
    return ClientSpend(**fields | changes)


def facts(plan=PLAN, clients=None, **changes):
    from privacy.plan import Local

    prices = Prices(
        schedule="Gaussian, no sampling, sigma=4.953, 11 rounds of one client",
        steps=11,
        gate=2.9998,
        gate_order=7.5,
        pld=HEADLINE,
        pld_replace_one=6.1618,
        prv=None,
        prv_note="not asked",
        rdp=2.9998,
        at_deltas=((1e-5, HEADLINE),),
        tpr=((0.001, 0.0159), (0.01, 0.159)),
        accountant="PLD",
        models_alone=MODELS,
    )
    fields = {
        "job": "j",
        "task": "digits",
        "task_summary": "Digits.",
        "record": "one digit",
        "started": "2026-09-01T10:00:00+00:00",
        "finished": "2026-09-01T10:00:41+00:00",
        "status": "finished",
        "config": {"unit": "client"},
        "plan": plan,
        "committed": True,
        "doubts": (),
        "local": Local(lr=2.0),
        "rounds": [{"round": 1, "metrics": {"accuracy": 0.5}, "replies": 20, "epsilon": 2.12, "seconds": 0.2}],
        "clients": clients or (spend(),),
        "prices": prices,
        "multiplicity": 1,
        "multiplicity_epsilon": None,
        "augmented": False,
        "noise_source": "aes",
        "versions": {},
        "code_hash": "9f" * 32,
        "witness": "",
        "covers": "this run only",
        "simulation": {"truth": "counts"},
        "engine": "local",
        "device": "CPU",
        "hardware": "2 cores",
    }
    return RunFacts(**fields | changes)


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def require_labelled(report, page):
    """Fails where the headline names no adversary, or the amplified figure stands anywhere without its own."""
    headline = report["headline"]
    assert headline["against"] == "whoever sees who took part", "the headline names no adversary"
    assert headline["epsilon"] == HEADLINE, "the headline is not the unamplified figure"
    if not isinstance(headline["epsilon"], str):
        assert "whoever sees who took part" in headline["sentence"], "the headline names no adversary"

    def visit(value, around):
        if isinstance(value, dict):
            for item in value.values():
                visit(item, json.dumps(value))
        elif isinstance(value, list):
            for item in value:
                visit(item, json.dumps(item))
        elif value == MODELS or (isinstance(value, str) and figure_words(MODELS) in value):
            assert "models alone" in around, f"the amplified figure stands alone in {around:.80}"

    visit(report, "")
    text = text_of(page)
    for found in re.finditer(re.escape(figure_words(MODELS)), text):
        near = text[max(0, found.start() - 160) : found.end() + 20]
        assert "models alone" in near, f"the amplified figure stands alone on the page: {near}"


def test_g16_the_headline_is_unamplified_and_every_figure_names_its_adversary():
    report = build(facts())
    require_labelled(report, render(report))
    assert [entry["epsilon"] for entry in report["headline"]["adversaries"]] == [HEADLINE, INFINITY, MODELS]
    rows = {row["who"]: row for row in report["adversaries"]}
    assert rows["the server, which saw each update and added the noise"]["epsilon"] == INFINITY
    assert "trusted" in report["warnings"][0]
    text = text_of(render(report))
    for words in ("against whoever sees who took part", "infinity", "none possible", "divides by a constant"):
        assert words in text


def amplified_headline(report):
    report["headline"]["epsilon"] = MODELS


def nameless_headline(report):
    report["headline"]["against"] = ""


def figure_without_a_label(report):
    report["prices"]["at_deltas"].append({"delta": 1e-6, "epsilon": MODELS})


@pytest.mark.parametrize("bug", [amplified_headline, nameless_headline, figure_without_a_label])
def test_g16_planted_bug_a_figure_without_its_adversary_is_caught(bug):
    report = build(facts())
    bug(report)
    with pytest.raises(AssertionError, match=r"headline|alone"):
        require_labelled(report, render(report))


def test_g16_test_noise_is_infinity_for_everybody_and_an_unproven_spend_unknown():
    for client, wanted in ((spend(test_noise=True), INFINITY), (spend(receipts_missing=1), UNKNOWN)):
        report = build(facts(clients=(client,)))
        assert [entry["epsilon"] for entry in report["headline"]["adversaries"]] == [wanted, INFINITY, wanted]
        assert report["prices"]["models_alone"]["epsilon"] == wanted
        assert figure_words(MODELS) not in text_of(render(report))


def test_g16_with_other_runs_in_the_ledger_nobody_knows_the_figure_for_models_alone():
    report = build(facts(clients=(spend(runs=2, other_runs=1),)))
    assert [entry["epsilon"] for entry in report["headline"]["adversaries"]] == [2.12, INFINITY, UNKNOWN]


def test_g16_an_update_that_was_charged_and_never_counted_leaves_no_figure_for_models_alone():
    """It may have been in a model of a round that was drawn again, which no schedule prices."""
    figures = [entry["epsilon"] for entry in build(facts(clients=(spend(undelivered=1),)))["headline"]["adversaries"]]
    assert figures[1:] == [INFINITY, UNKNOWN]
    assert build(facts())["headline"]["adversaries"][2]["epsilon"] == MODELS


@pytest.mark.parametrize("figure", [None, math.nan])
def test_an_amplified_figure_that_was_not_computed_is_unknown(figure):
    made = facts()
    made = dataclasses.replace(made, prices=dataclasses.replace(made.prices, models_alone=figure))
    assert build(made)["headline"]["adversaries"][2]["epsilon"] == UNKNOWN


def test_g16_a_relay_that_reads_unsealed_updates_gets_infinity_in_a_deployment():
    rows = {row["who"]: row["epsilon"] for row in build(facts(simulation=None))["adversaries"] if "epsilon" in row}
    assert rows["the relay and its operator"] == INFINITY


def test_a_clip_that_follows_a_quantile_is_told_with_its_noise():
    following = dataclasses.replace(PLAN, quantile=0.5, clip_lr=0.2, bit_noise=10.0)
    report = build(facts(plan=following))
    assert "0.5 quantile" in report["mechanism"]["clipping"]
    assert "5.11" in report["mechanism"]["noise"]
    assert report["plan"]["quantile"] == 0.5


def test_the_headline_agrees_with_the_exact_price_of_so_many_gaussians():
    # No second accountant is asked where nothing is sampled; there the price has a closed form.
    epsilon = pld_epsilon(Event.of_schedule(PLAN), PLAN.delta)
    exact = gaussian_delta(math.sqrt(PLAN.joins) / PLAN.noise_multiplier, epsilon)
    assert PLAN.delta * 0.97 < exact <= PLAN.delta
    assert epsilon == pytest.approx(HEADLINE, abs=1e-3)
    assert pld_epsilon(Event.of_models(PLAN), PLAN.delta) == pytest.approx(MODELS, abs=1e-3)
