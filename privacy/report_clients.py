"""What a report says differently where a plan protects clients and the server is trusted (guarantee G16).

Three adversaries see three things, and each has a figure of its own: infinity for the server; the unamplified figure
for whoever sees who took part, which is the headline, because a reader of the report is one of them; and the amplified
figure for somebody who sees the models alone, which is never printed without these words beside it. A relay belongs to
the second only where it cannot read what it carries; nothing is sealed end to end in this version, so a deployment's
relay gets infinity too.

With banded noise turns are public: nobody is in doubt about who took part, so somebody who sees the models alone gets
the headline figure like everybody else, and no amplified figure exists.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from privacy.report_page import INFINITY, UNKNOWN, figure_words

if TYPE_CHECKING:
    from privacy.plan import Plan
    from privacy.report import RunFacts

PROTECTS: Final = "one client with all its records"
AGAINST: Final = "whoever sees who took part"
_SERVER: Final = "the server, which saw each update and added the noise"
_MODELS: Final = "somebody who sees the models alone, and neither messages, receipts nor this report"


def for_clients(report: Mapping[str, Any], facts: RunFacts, *, whole: bool) -> dict[str, Any]:
    """Returns a report whose words and figures are those of a plan at unit client.

    Args:
        report: As built for what all plans share; its headline is the unamplified figure.
        facts: What it was built from.
        whole: Whether every ledger holds the committed schedule and nothing else.
    """
    headline = dict(report["headline"])
    epsilon = headline["epsilon"]
    models = _models_alone(facts, epsilon, whole=whole)
    figures = [(AGAINST, epsilon), (_SERVER, INFINITY), (_MODELS, models)]
    headline |= {
        "protects": PROTECTS,
        "against": AGAINST,
        "adversaries": [{"who": who, "epsilon": figure} for who, figure in figures],
        "person": _person(epsilon, models, facts),
        "federation": headline["federation"]
        | {"rule": "largest over clients; a person with records at several clients is not covered by it"},
    }
    if not isinstance(epsilon, str):
        headline["sentence"] = sentence_of_clients(epsilon, headline["delta"])
        chance = "the coins" if facts.plan.banded is None else "chance, because turns are public"
        headline["basis"] += f"; against {AGAINST}, with no discount for {chance}"
    changed: dict[str, Any] = {
        "headline": headline,
        "run": report["run"] | {"setting": _setting(facts)},
        "warnings": [
            "The server is trusted: it sees each client's update in the clear, and against it epsilon is infinity.",
            f"Every other epsilon here, spent or granted, is the one against {AGAINST}, unless it says otherwise.",
            *(["Turns are public: no figure here has a discount for chance."] if facts.plan.banded is not None else []),
            *report["warnings"],
        ],
        "prices": report["prices"] | {"models_alone": {"epsilon": models, "against": _MODELS}},
        "assumptions": _assumptions(report["assumptions"], facts),
        "covered": [
            "Everything that all records of one client together did to the models.",
            "The model of every round, the final one, and anything computed from them later.",
            *report["covered"][2:],
        ],
        "not_covered": [
            "Each client's update, before the server: it travels in the clear to the server, which could look at it.",
            "That a client took part, and when: the figures hide what its records are, not that it is there.",
            "A person with records at several clients.",
            *report["not_covered"],
        ],
        "adversaries": _adversaries(report["adversaries"], facts, epsilon, models),
        "mechanism": report["mechanism"]
        | {
            "mechanism": "plain training at each client; the server clips updates, sums, adds Gaussian noise, divides "
            "by a constant",
            "clipping": _clipping(facts),
            "noise": _noise_words(facts),
            "augmentation": "each record by itself, at random" if facts.augmented else "none",
            "setting": _setting(facts),
        },
        "sampling": _sampling(facts),
    }
    return {**report, **changed}


def _models_alone(facts: RunFacts, headline: float | str, *, whole: bool) -> float | str:
    """Returns the amplified figure, which is no better known than the headline."""
    figure = facts.prices.models_alone
    # Without secret coins there is no discount for anybody (guarantee G16).
    if isinstance(headline, str) or facts.plan.banded is not None:
        return headline
    # Of another run in the same ledgers nobody here knows the coins.
    if not whole or figure is None or math.isnan(figure):
        return UNKNOWN
    # An update that was charged and never counted may have been in a model of a round that was drawn again.
    if any(client.undelivered for client in facts.clients):
        return UNKNOWN
    return figure if math.isfinite(figure) else INFINITY


def sentence_of_clients(epsilon: float, delta: float) -> str:
    """Returns the headline in plain words, with its adversary."""
    odds = figure_words(math.exp(epsilon) if epsilon < 700 else INFINITY)
    return (
        f"Against {AGAINST} (other clients, readers of this report, a relay that cannot read what it carries): adding "
        "or removing one client's records, all of them, changes the odds of any conclusion from the models by at most "
        f"a factor of {odds}, up to a slack of one in {1 / delta:,.0f} (epsilon {figure_words(epsilon)} at delta "
        f"{figure_words(delta)}). Against the server, which added the noise, there is no guarantee."
    )


def _person(epsilon: float | str, models: float | str, facts: RunFacts) -> list[dict[str, Any]]:
    note = "secret coins decided who took part; it does not hold for anybody who learns how they fell"
    if facts.plan.banded is not None:
        note = "the same figure: whose turn it is is public, so seeing less is no discount"
    return [
        {"who": f"A person whose records are all at one client, against {AGAINST}", "epsilon": epsilon},
        {"who": f"The same person against {_SERVER}", "epsilon": INFINITY},
        {
            "who": f"The same person against {_MODELS}",
            "epsilon": models,
            "note": note,
        },
        {
            "who": "A person with records at several clients",
            "epsilon": "none possible",
            "note": "several of its clients may be in one sum, and nothing bounds how many",
        },
    ]


def _setting(facts: RunFacts) -> str:
    words = (
        "Each client trains plainly and sends its clipped update to the server, which is trusted: it sees the updates, "
        "clips them again and adds the noise. Each holder's own policy allowed that."
    )
    if facts.simulation is None:
        return words
    return words + " This was a simulation: one machine held all data sets and played every part."


def _noise(facts: RunFacts) -> float:
    # Imported here, because only plans at unit client need NumPy for a report.
    from privacy.central import update_noise

    return update_noise(facts.plan)


def _noise_words(facts: RunFacts) -> str:
    plan = facts.plan
    if plan.banded is None:
        return f"standard deviation {_noise(facts):g} x clip on the sum, once each round, however many replied"
    return (
        f"one matrix over all {plan.rounds:,} rounds, {plan.banded.bands} bands: rows of standard deviation "
        f"{_row_noise(facts):g} x clip (noise multiplier {plan.noise_multiplier:g} times the matrix' sensitivity); "
        "each round's noise is a fresh row less a share of those before; it is drawn once, however many replied"
    )


def _row_noise(facts: RunFacts) -> float:
    """Returns the standard deviation of the matrix' fresh rows, divided by the clip."""
    # Imported here, because only plans of banded noise need it.
    from privacy.matrix import matrix_of

    return matrix_of(facts.plan).stddev(facts.plan.noise_multiplier, 1.0)


def _clipping(facts: RunFacts) -> str:
    plan = facts.plan
    if not plan.quantile:
        return f"L2 norm at most {plan.l2_clip:g} per client and round, at the client and again at the server"
    return (
        f"L2 norm per client and round, at first {plan.l2_clip:g}, then following the {plan.quantile:g} quantile of "
        f"the updates' norms by their number within the clip, noised with standard deviation {plan.bit_noise:g}; "
        "update and number together are one release of the plan's noise multiplier"
    )


def _assumptions(rows: list[dict[str, Any]], facts: RunFacts) -> list[dict[str, Any]]:
    """Returns the chain with the links that run at the server, who is trusted to run them."""
    plan = facts.plan
    first = " at first" if plan.quantile else ""
    by_server = {
        "sample": _cohort_words(plan)
        if plan.banded is not None
        else f"Each client takes part in each round by its own secret coin, at the public rate "
        f"{plan.client_rate:g}, in {plan.turns} rounds at most; coins are stored before the first message and never "
        "drawn again.",
        "clip": f"Each client moves a round's sum by at most the clip ({plan.l2_clip:g}{first}, L2), whatever came.",
        "add noise": f"By the server: Gaussian, {_noise(facts):g} times the clip, however many replied. Source: "
        f"{facts.noise_source}."
        if plan.banded is None
        else f"By the server: {_noise_words(facts)}. Lost or older state of the noise ends the job. Source: "
        f"{facts.noise_source}.",
        "divide": f"By the public constant {plan.expected_batch:g} clients, never by how many replied.",
        "keep": "The noised model is stored before anything reads it; of one round, one is ever used.",
        "send": "The clipped update goes to the server, and nothing else does; only noised models go to anybody else.",
        "examples alone": "Not needed: nothing here bounds a single record, only a client.",
        "schedule": f"At most {plan.joins} charges per client ({plan.turns} turns, the rest for retries), fixed before "
        "the first round."
        if plan.banded is None
        else f"One charge per client for the whole matrix, before its first round; its ledger admits {plan.turns} "
        f"rounds at most, any two {plan.banded.separation} or more apart, of this one drawing.",
    }
    trusted = {"sample", "clip", "add noise", "divide", "keep"}
    changed = []
    for row in rows:
        words = by_server.get(row["name"], row["words"])
        if row["name"] in trusted:
            words += " The server is trusted to do so."
        changed.append(row | {"words": words})
    return changed


def _adversaries(
    rows: list[dict[str, str]], facts: RunFacts, epsilon: float | str, models: float | str
) -> list[dict[str, Any]]:
    seen = "who took part, and the models that they may see"
    # Unsealed messages show it each update. In a simulation none travelled, so there the figure is a condition.
    relay = INFINITY if facts.simulation is None else epsilon
    central = [
        (_SERVER, "each client's clipped update, in the clear", INFINITY, "nothing: it is trusted"),
        (
            "the relay and its operator",
            f"{seen}; updates too, where messages are not sealed",
            relay,
            "only where messages are sealed end to end, which this version does not do; else infinity",
        ),
        ("other clients", "the model of every round, and perhaps who took part", epsilon, "the headline"),
        ("readers of this report or of receipts", seen, epsilon, "the headline"),
        (_MODELS, "the final model, at most every model", models, "the coins' secrecy besides the noise"),
    ]
    kept = [row for row in rows if row["who"] not in ("the server", "the relay and its operator", "other clients")]
    words = {
        "the network": "the headline figure for models; updates travel in simulations alone, within one machine",
        "a thief of a disk": "nothing for kept updates, coins and records: they are not encrypted in a simulation"
        if facts.plan.banded is None
        else "nothing for kept updates and records, nor, until the last round erases it, for the state of the noise, "
        "which takes it off the last models: they are not encrypted in a simulation",
    }
    kept = [row | {"protected_by": words.get(row["who"], row["protected_by"])} for row in kept]
    changed: list[dict[str, Any]] = [
        {"who": who, "sees": sees, "epsilon": figure, "protected_by": f"epsilon {_words(figure)}; {why}"}
        for who, sees, figure, why in central
    ]
    return changed + [row for row in kept if row["who"] != "the public, users of the model"]


def _words(figure: float | str) -> str:
    return figure if isinstance(figure, str) else figure_words(figure)


def _cohort_words(plan: Plan) -> str:
    """Returns whose turn it is with banded noise, in words."""
    classes = 0 if plan.banded is None else plan.banded.separation
    return (
        f"Clients are dealt once into {classes:,} classes, in public, and take turns: each in {plan.turns:,} rounds at "
        "most; a thin class is never dealt again."
    )


def _sampling(facts: RunFacts) -> list[dict[str, str]]:
    plan = facts.plan
    cohorts = [
        (
            "cohorts",
            f"for the headline: none. For models alone: Poisson, each client with probability {plan.client_rate:g} per "
            "round",
            "a coin per client and round from the noise source; a thin or an empty cohort is never drawn again",
        )
    ]
    turns = (
        f"{facts.prices.steps:,} per client at most",
        f"{plan.turns} by its coins, the rest for retries, counted by the ledger; a client is held back by its own "
        "earlier coins alone",
    )
    if plan.banded is not None:
        cohorts = [("cohorts", "none: turns are public", _cohort_words(plan))]
        turns = (
            f"{plan.turns:,} per client at most, any two {plan.banded.separation} or more rounds apart",
            "counted and spaced by each client's ledger, which commits to this one drawing; a round is joined once",
        )
    size = "rate times their public number" if plan.banded is None else "their public number over that of classes"
    rows = [
        *cohorts,
        ("missing replies", "add nothing", "noise and divisor stay what they are"),
        (
            "expected cohort",
            "a public constant",
            f"{plan.expected_batch:g} clients, {size}",
        ),
        ("turns", *turns),
        ("local batches", "no assumption", "plain training; nothing rests on how a client samples its records"),
    ]
    return [{"what": what, "assumed": assumed, "actual": actual} for what, assumed, actual in rows]
