"""Client-level privacy at the server (G16): each check below fails on the bug that is planted beside it."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import central
from privacy.accounting import Event, best_order, pld_epsilon, rdp
from privacy.central import Contribution, aggregate, clip_update, draw_cohort, next_clip, turns_of, update_noise
from privacy.errors import LedgerError, PlanError
from privacy.ledger import Receipt, Word
from privacy.noise import Keystream
from privacy.plan import Plan, Unit
from tests.oracles import ACCOUNT, make_grant, make_plan, make_request, open_book

CLIENTS = 100


def client_plan(**changes):
    fields = {
        "unit": Unit.CLIENT,
        "sample_rate": 0.5,
        "expected_batch": 20.0,
        "client_rate": 0.2,
        "l2_clip": 0.7,
        "noise_multiplier": 1.3,
        "steps": 3,
        "rounds": 20,
        "joins": 11,
        "turns": 10,
        "epsilon": 8.0,
        "delta": 1e-5,
        "records_bound": 1000,
    }
    return Plan(**fields | changes)


PLAN = client_plan()
FOLLOWING = client_plan(quantile=0.5, clip_lr=0.2, bit_noise=5.2)


class Silent:
    """No noise at all: shows what the noise would have to hide."""

    name = "silent"

    def gaussian(self, n):
        return torch.zeros(n, dtype=torch.float64)


def contributions(*updates, bit=0.0):
    return [Contribution(np.asarray(update, dtype=np.float32), bit) for update in updates]


# -- clip -------------------------------------------------------------------------------------------------------

HOSTILE = [
    np.zeros(50),
    np.full(50, np.nan),
    np.full(50, np.inf),
    np.r_[np.nan, np.zeros(49)],
    np.r_[-np.inf, np.full(49, 3e38)],
    np.full(50, 3e38),
    np.full(50, 1e-45),
    np.r_[0.7, np.zeros(49)],
    np.r_[0.70001, np.zeros(49)],
    np.random.default_rng(5).standard_normal(50) * 1e20,
    np.zeros(7),
]


def sum_of(make, updates):
    return make(contributions(*updates), 50, PLAN, PLAN.l2_clip, Silent()).mean.astype(np.float64) * PLAN.expected_batch


def require_bounded(make):
    """Fails where one client moves the sum by more than the clip, whatever it sends and beside whatever others."""
    others = [np.full(50, 0.01), np.full(50, 3e38), np.full(50, np.nan)]
    alone = sum_of(make, others)
    for update in HOSTILE:
        moved = np.linalg.norm(sum_of(make, [*others, update]) - alone)
        # The released mean is rounded to float32.
        assert moved <= PLAN.l2_clip * (1 + 1e-5), f"one client moved the sum by {moved}"


def without_clip(given, size, plan, clip, source):
    """Planted bug: the server believes that clients clipped."""
    total = sum(c.update.astype(np.float64) for c in given if c.update.shape == (size,))
    return central.Aggregate((total / plan.expected_batch).astype(np.float32), clip)


def as_flower_clips(given, size, plan, clip, source):
    """Planted bug: ``min(1, C / norm)`` lets a NaN through and divides by zero."""
    total = np.zeros(size)
    for c in given:
        if c.update.shape == (size,):
            total += c.update * min(1.0, clip / max(1e-30, float(np.linalg.norm(c.update))))
    return central.Aggregate((total / plan.expected_batch).astype(np.float32), clip)


def test_g16_one_client_moves_the_sum_by_at_most_the_clip_whatever_it_sends():
    require_bounded(aggregate)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bug", [without_clip, as_flower_clips])
def test_g16_planted_bug_no_clip_at_the_server_is_caught(bug):
    with pytest.raises(AssertionError, match="moved the sum"):
        require_bounded(bug)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(min_value=1e-6, max_value=1e6),
)
def test_g16_a_clipped_update_is_within_the_clip_and_keeps_its_direction(values, clip):
    update = np.asarray(values, dtype=np.float32)
    clipped, within = clip_update(update, clip)
    assert np.linalg.norm(clipped) <= clip
    if not np.isfinite(update).all():
        assert not clipped.any()
        assert not within
        return
    exact = update.astype(np.float64)
    assert within == (float(np.sqrt(np.dot(exact, exact))) <= clip)
    assert np.dot(clipped, exact) >= 0
    if np.linalg.norm(exact) < clip * (1 - 1e-6):
        assert np.array_equal(clipped, exact)


# -- noise and divisor ------------------------------------------------------------------------------------------


def require_full_noise(make):
    """Fails where noise or divisor depend on how many replied. False alarms: below 1e-6 (5 sigma, six figures)."""
    size = 20_000
    for replies in (0, 1, 20, 60):
        given = contributions(*[np.zeros(size)] * replies)
        released = make(given, size, PLAN, PLAN.l2_clip, Keystream()).mean * PLAN.expected_batch
        stated = PLAN.noise_multiplier * PLAN.l2_clip
        assert abs(released.std() / stated - 1) < 5 / math.sqrt(2 * size), (
            f"noise {released.std()} at {replies} replies"
        )
    one = np.r_[PLAN.l2_clip / 2, np.zeros(9)]
    for replies in (1, 20, 60):
        mean = make(contributions(*[one] * replies), 10, PLAN, PLAN.l2_clip, Silent()).mean
        assert mean[0] == pytest.approx(replies * PLAN.l2_clip / 2 / PLAN.expected_batch, rel=1e-5), "another divisor"


class Scaled:
    def __init__(self, source, factor):
        self._source, self._factor = source, factor

    def gaussian(self, n):
        return self._source.gaussian(n) * self._factor


def no_noise(given, size, plan, clip, source):
    return aggregate(given, size, plan, clip, Silent())


def realised_divisor(given, size, plan, clip, source):
    return aggregate(given, size, dataclasses.replace(plan, expected_batch=max(1, len(given))), clip, source)


def noise_by_replies(given, size, plan, clip, source):
    return aggregate(given, size, plan, clip, Scaled(source, math.sqrt(len(given) / plan.expected_batch)))


def no_release_of_nothing(given, size, plan, clip, source):
    if not given:
        return central.Aggregate(np.zeros(size, dtype=np.float32), clip)
    return aggregate(given, size, plan, clip, source)


@pytest.mark.statistical
def test_g16_noise_and_divisor_are_public_constants_however_many_replied():
    require_full_noise(aggregate)


@pytest.mark.statistical
@pytest.mark.parametrize("bug", [no_noise, realised_divisor, noise_by_replies, no_release_of_nothing])
def test_g16_planted_bugs_in_noise_and_divisor_are_caught(bug):
    with pytest.raises(AssertionError, match=r"noise|divisor"):
        require_full_noise(bug)


def test_g16_noise_is_drawn_anew_for_every_round():
    first, second = (aggregate([], 50, PLAN, 1.0, Keystream()).mean for _ in range(2))
    assert not np.array_equal(first, second)


# -- cohorts ----------------------------------------------------------------------------------------------------

SMALL, RATE, DRAWS = 12, 0.25, 4000


def require_poisson(draw):
    """Fails where coins are not one per client, at the rate, for every size. False alarms below 1e-4 (5 sigma)."""
    plan = client_plan(client_rate=RATE, expected_batch=SMALL * RATE, delta=1e-5)
    source = Keystream()
    drawn = [draw(range(1, SMALL + 1), {}, plan, source) for _ in range(DRAWS)]
    # Cohorts of each size are as frequent as for independent coins: small ones and the empty one too.
    for size in range(SMALL + 1):
        chance = math.comb(SMALL, size) * RATE**size * (1 - RATE) ** (SMALL - size)
        seen = sum(len(cohort) == size for cohort in drawn)
        assert abs(seen - DRAWS * chance) < 5 * math.sqrt(DRAWS * chance) + 5, f"{seen} cohorts of {size}"
    for client in range(1, SMALL + 1):
        seen = sum(client in cohort for cohort in drawn)
        assert abs(seen - DRAWS * RATE) < 5 * math.sqrt(DRAWS * RATE * (1 - RATE)), f"client {client}: {seen}"
    both = sum({1, 2} <= set(cohort) for cohort in drawn)
    assert abs(both - DRAWS * RATE**2) < 5 * math.sqrt(DRAWS * RATE**2), f"pairs: {both}"


def redrawn_if_thin(clients, counted, plan, source):
    """Planted bug: a cohort below two is drawn again."""
    while len(cohort := draw_cohort(clients, counted, plan, source)) < 2:
        continue
    return cohort


def fixed_size(clients, counted, plan, source):
    """Planted bug: always as many as expected, still priced as Poisson."""
    order = torch.argsort(source.gaussian(len(clients)))
    return sorted(clients[int(index)] for index in order[: round(plan.client_rate * len(clients))])


@pytest.mark.statistical
def test_g16_every_client_has_a_coin_of_its_own_and_an_empty_cohort_is_legal():
    require_poisson(draw_cohort)


@pytest.mark.statistical
@pytest.mark.parametrize("bug", [redrawn_if_thin, fixed_size])
def test_g16_planted_bug_a_thin_cohort_that_is_redrawn_is_caught(bug):
    with pytest.raises(AssertionError, match="cohorts of"):
        require_poisson(bug)


def test_g16_a_client_is_held_back_by_its_own_earlier_coins_alone():
    plan = client_plan(client_rate=1.0, expected_batch=5.0, turns=2)
    assert draw_cohort(range(1, 6), {1: 2, 2: 1, 3: 7}, plan, Keystream()) == [2, 4, 5]


@pytest.mark.parametrize(("rounds", "rate"), [(20, 0.2), (100, 0.05), (7, 0.9), (1000, 0.01), (5, 1.0)])
def test_the_limit_on_turns_holds_back_at_most_one_client_in_a_thousand(rounds, rate):
    def beyond(turns):
        return sum(math.comb(rounds, k) * rate**k * (1 - rate) ** (rounds - k) for k in range(turns + 1, rounds + 1))

    turns = turns_of(rounds, rate)
    assert 1 <= turns <= rounds
    assert beyond(turns) <= 1e-3
    assert turns == 1 or beyond(turns - 1) > 1e-3


# -- clip that follows a quantile -------------------------------------------------------------------------------


def followed(start, rounds=150, move=next_clip, seed=3):
    """Returns the clip after some rounds of 1,000 clients whose norms are log-normal with median 1."""
    plan = client_plan(
        l2_clip=start, expected_batch=200.0, noise_multiplier=1.0, quantile=0.5, clip_lr=0.2, bit_noise=10.0
    )
    dice, clip, source = np.random.default_rng(seed), start, Keystream()
    for _ in range(rounds):
        norms = np.exp(0.5 * dice.standard_normal(int((dice.random(1000) < 0.2).sum())))
        bits = sum(0.5 if norm <= clip else -0.5 for norm in norms)
        share = 0.5 + (bits + plan.bit_noise * float(source.gaussian(1)[0])) / plan.expected_batch
        clip = move(clip, share, plan)
    return clip


def require_median(move):
    for start in (0.1, 1.0, 30.0):
        found = followed(start, move=move)
        # The clip jitters by its noise; log-normal norms put 0.75 to 1.33 between the quantiles 0.28 and 0.72.
        assert 0.75 < found < 1.33, f"from {start} to {found}, not to the median"


def wrong_sign(clip, share, plan):
    """Planted bug, Flower 1.41's: counts those beyond the clip and shrinks it the more of them there are."""
    return clip * math.exp(-plan.clip_lr * ((1 - share) - plan.quantile))


@pytest.mark.statistical
def test_g16_the_clip_finds_the_median_from_below_and_from_above():
    require_median(next_clip)


@pytest.mark.statistical
def test_g16_planted_bug_the_wrong_sign_drives_the_clip_away_from_the_median():
    with pytest.raises(AssertionError, match="not to the median"):
        require_median(wrong_sign)


@pytest.mark.statistical
def test_g16_the_whole_mechanism_finds_the_median_of_its_clients_updates():
    plan = client_plan(l2_clip=0.1, expected_batch=40.0, noise_multiplier=1.0, quantile=0.5, clip_lr=0.3, bit_noise=4.0)
    dice, clip = np.random.default_rng(1), 0.1
    for _ in range(60):
        updates = []
        for norm in np.exp(0.5 * dice.standard_normal(40)):
            direction = dice.standard_normal(8)
            update = (norm * direction / np.linalg.norm(direction)).astype(np.float32)
            clipped, within = clip_update(update, clip)
            updates.append(Contribution(clipped.astype(np.float32), float(within)))
        clip = aggregate(updates, 8, plan, clip, Keystream()).clip
    assert 0.6 < clip < 1.6


def require_noise_of_this_clip(make):
    """Fails where noise is drawn for another clip than the one that clipped. False alarms below 1e-6 (5 sigma)."""
    size, plan = 20_000, dataclasses.replace(FOLLOWING, clip_lr=1.0)
    given = contributions(*[np.zeros(size)] * 20, bit=1.0)
    released = make(given, size, plan, 1.0, Keystream())
    spread = released.mean.std() * plan.expected_batch / update_noise(plan)
    assert abs(spread - 1.0) < 5 / math.sqrt(2 * size), f"noise for a clip of {spread}"
    return released


def clip_moves_first(given, size, plan, clip, source):
    """Planted bug, Flower 1.41's: clips at this round's clip and draws the noise for the next one."""
    moved = aggregate(given, size, plan, clip, source).clip
    return dataclasses.replace(aggregate([], size, plan, moved, source), clip=moved)


@pytest.mark.statistical
def test_g16_noise_is_drawn_for_the_clip_that_clipped():
    # All within, so the clip shrinks: by about exp(-0.5), give or take the noise on the bits.
    assert require_noise_of_this_clip(aggregate).clip < 1.0 * math.exp(2)


@pytest.mark.statistical
def test_g16_planted_bug_a_clip_that_moves_before_the_noise_is_caught():
    with pytest.raises(AssertionError, match="noise for a clip"):
        require_noise_of_this_clip(clip_moves_first)


def require_stated_price(multiplier):
    """Fails where update and bit together cost more, or less, than the one event that is charged."""
    stated = Event.of_round(FOLLOWING)
    for order in (1.5, 4.0, 32.0):
        update = Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=multiplier(FOLLOWING), steps=1)
        # The bit is -1/2 or +1/2: adding or removing a client moves the sum by 1/2.
        bit = dataclasses.replace(update, noise_multiplier=2 * FOLLOWING.bit_noise)
        assert rdp(update, order) + rdp(bit, order) == pytest.approx(rdp(stated, order), rel=1e-9)


def test_g16_update_and_bit_together_cost_exactly_the_one_event_that_is_charged():
    require_stated_price(update_noise)
    assert update_noise(PLAN) == PLAN.noise_multiplier < update_noise(FOLLOWING)


def test_g16_planted_bug_a_bit_that_is_not_paid_for_is_caught():
    with pytest.raises(AssertionError):
        require_stated_price(lambda plan: plan.noise_multiplier)


@pytest.mark.parametrize("bit", [math.nan, math.inf, -3.0, 0.999, 2.0, 1e30])
def test_g16_a_bit_that_is_none_counts_as_beyond_the_clip(bit):
    silent = aggregate(contributions(np.zeros(3), bit=bit), 3, FOLLOWING, 1.0, Silent())
    assert silent.clip == aggregate(contributions(np.zeros(3), bit=0.0), 3, FOLLOWING, 1.0, Silent()).clip
    assert silent.clip > aggregate(contributions(np.zeros(3), bit=1.0), 3, FOLLOWING, 1.0, Silent()).clip


# -- what it costs, and to whom ---------------------------------------------------------------------------------


def test_g16_a_turn_is_charged_without_a_discount_for_the_coin():
    assert Event.of_round(PLAN) == Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=1.3, steps=1)
    assert Event.of_schedule(PLAN) == Event(unit=Unit.CLIENT, sample_rate=1.0, noise_multiplier=1.3, steps=11)
    models = Event.of_models(PLAN)
    assert (models.sample_rate, models.steps) == (0.2, 20)
    assert pld_epsilon(models, 1e-5) < best_order(models, 1e-5)[1] < pld_epsilon(Event.of_schedule(PLAN), 1e-5)
    with pytest.raises(PlanError, match="protects clients"):
        Event.of_models(make_plan())


def test_g16_a_ledger_for_records_declines_a_plan_for_clients_and_the_other_way_round(tmp_path):
    granted = {Unit.RECORD: make_grant(epsilon=50.0), Unit.CLIENT: make_grant(epsilon=50.0, unit=Unit.CLIENT)}
    plans = {Unit.RECORD: make_plan(), Unit.CLIENT: PLAN}
    for unit, grant in granted.items():
        with open_book(tmp_path / unit, grant) as book:
            other = next(plan for of, plan in plans.items() if of is not unit)
            assert book.charge([make_request(plan=other)]) == [Word.CONFLICT]
            assert book.accounts[ACCOUNT].charges == 0
            assert isinstance(book.charge([make_request(plan=plans[unit])])[0], Receipt)
            assert book.accounts[ACCOUNT].spent_rdp == rdp(Event.of_round(plans[unit]), grant.order)


def test_g16_the_ledger_admits_the_plans_joins_and_no_more(tmp_path):
    with open_book(tmp_path, make_grant(epsilon=500.0, unit=Unit.CLIENT)) as book:
        outcomes = [book.charge([make_request(number, plan=PLAN)])[0] for number in range(1, 14)]
    assert [isinstance(outcome, Receipt) for outcome in outcomes] == [True] * 11 + [False] * 2
    # The receipt names the unit, and reads back.
    assert Receipt.from_json(outcomes[0].to_json()).event.unit is Unit.CLIENT
    with pytest.raises(LedgerError):
        Receipt.from_json(outcomes[0].to_json().replace('"unit":"client"', '"unit":"record"'))


class _Ones:
    """Every number is 1, and each request for some is remembered: shows by what noise is scaled."""

    name = "ones"

    def __init__(self):
        self.asked = []

    def gaussian(self, n):
        self.asked.append(n)
        return torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize("replies", [0, 3])
def test_g16_the_bits_get_the_noise_that_the_plan_prices_them_at_from_words_of_their_own(replies):
    source, step = _Ones(), np.full(7, 1e-3)
    released = aggregate(contributions(*[step] * replies, bit=1.0), 7, FOLLOWING, 0.7, source)
    share = 0.5 + (replies / 2 + FOLLOWING.bit_noise) / FOLLOWING.expected_batch
    assert released.clip == pytest.approx(0.7 * math.exp(-FOLLOWING.clip_lr * (share - 0.5)), rel=1e-12)
    # One bit moves their sum by 1/2: its multiplier and that of the update make up exactly the plan's.
    scale = (released.mean[0] * FOLLOWING.expected_batch - replies * 1e-3) / 0.7
    assert scale**-2 + (FOLLOWING.bit_noise / 0.5) ** -2 == pytest.approx(FOLLOWING.noise_multiplier**-2, rel=1e-5)
    assert source.asked == [7, 1]
