"""canary and its evidence: exact expectations by scipy, false alarms under continuous looks, how soon a bad version is caught, and what the sentence says."""

import errno
import json
import math
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
from patience import next_line
from scipy import optimize, stats

from mlops_nb.core.report import Report
from mlops_nb.monitor.drift import decile_counts, psi_of_counts
from mlops_nb.serve.canary import KEPT, Bins, Canary, Tally, Watch, plain, quantile, shares, time_gains
from mlops_nb.serve.evidence import FRACTIONS, LIFTS, Evidence, Ledger, interval, ledger_in, nearest, psi_gains, psi_of, share_bet, share_gains
from mlops_nb.serve.plan import ModelPlan, Plan, read_plan

PLAN = ModelPlan("recommender", {"champion": 90, "challenger": 10})


# -- the building blocks, against independent computations -----------------------------------------

def expected_wealth(gains, n_main, n_new, p, q):
    "The mean of exp(gain) over all outcomes of a block, with scipy.stats.binom; gains are those of share_bet."
    fine, failed, new_fine, new_failed = gains
    k, m = np.arange(n_main + 1), np.arange(n_new + 1)
    main = (stats.binom.pmf(k, n_main, p) * np.exp(failed * k + fine * (n_main - k))).sum()
    return main * (stats.binom.pmf(m, n_new, q) * np.exp(new_failed * m + new_fine * (n_new - m))).sum()


@pytest.mark.parametrize("n_main, n_new, margin, p, q", [(9, 1, 0.01, 0.001, 0.05), (90, 10, 0.01, 0.01, 0.8), (5, 20, 0.0, 0.5, 0.7), (1, 1, 0.2, 0.1, 0.9), (30, 30, 0.05, 0.3, 0.5)])
def test_no_share_that_the_claim_allows_makes_the_bet_favourable(n_main, n_new, margin, p, q):
    gains = share_bet(p, q, n_main, n_new, margin)
    for true in np.linspace(0, 1, 21):
        for new in np.linspace(0, min(true + margin, 1), 11):
            assert expected_wealth(gains, n_main, n_new, true, new) <= 1 + 1e-9
    assert expected_wealth(gains, n_main, n_new, p, q) > 1, "and what the bettor expects does"


@pytest.mark.parametrize("n_main, n_new, margin, p, q", [(90, 10, 0.01, 0.001, 0.05), (10, 90, 0.05, 0.2, 0.6), (9, 1, 0.01, 0.01, 0.9), (50, 50, 0.1, 0.4, 0.6)])
def test_the_nearest_shares_are_scipys(n_main, n_new, margin, p, q):
    def divergence(a):  # scipy.stats.entropy is Kullback-Leibler
        return n_main * stats.entropy([p, 1 - p], [a, 1 - a]) + n_new * stats.entropy([q, 1 - q], [a + margin, 1 - a - margin])

    found = optimize.minimize_scalar(divergence, bounds=(p, q - margin), method="bounded", options={"xatol": 1e-10}).x
    assert nearest(p, q, n_main, n_new, margin) == pytest.approx(found, abs=1e-6)


def test_without_a_margin_the_nearest_share_is_the_pooled_one():
    "Turner, Ly & Grünwald 2024, section 2: for equal proportions the nearest point of the claim is (n_a p + n_b q) / (n_a + n_b)."
    assert nearest(0.1, 0.4, 30, 10, 0) == pytest.approx((30 * 0.1 + 10 * 0.4) / 40)
    assert nearest(0.1, 0.4, 30, 10, 1e-9) == pytest.approx((30 * 0.1 + 10 * 0.4) / 40, abs=1e-6)


def test_rates_that_change_together_win_nothing():
    "An outage of both, within a block or from block to block: the bet is against the difference, not against the rate."
    gains = share_bet(0.001, 0.05, 9, 1, 0.01)
    for rate in (0.0, 0.3, 0.9, 1.0):
        assert expected_wealth(gains, 9, 1, rate, rate) <= 1


@pytest.mark.parametrize("n_main, n_new", [(2, 1), (1, 2), (3, 3)])
def test_no_predictions_within_the_limit_make_the_bet_favourable(n_main, n_new):
    "All outcomes of small blocks of three bins, with scipy.stats.multinomial, over shares whose index is at or below the limit."
    p, q, limit, rng = [0.5, 0.3, 0.2], [0.1, 0.3, 0.6], 0.25, np.random.default_rng(0)
    outcomes = {n: [one for one in product(range(n + 1), repeat=3) if sum(one) == n] for n in (n_main, n_new)}
    wealth = {(a, b): np.exp(psi_gains(p, q, a, b, limit)) for a in outcomes[n_main] for b in outcomes[n_new]}
    tried = 0
    while tried < 60:
        main, new = rng.dirichlet([1, 1, 1]), rng.dirichlet([1, 1, 1])
        while psi_of(main, new) > limit:
            new = main + (new - main) * 0.8
        mean = sum(stats.multinomial.pmf(a, n_main, main) * stats.multinomial.pmf(b, n_new, new) * one for (a, b), one in wealth.items())
        assert (mean <= 1 + 1e-9).all()
        tried += 1
    assert max(sum(stats.multinomial.pmf(a, n_main, p) * stats.multinomial.pmf(b, n_new, q) * one for (a, b), one in wealth.items())) > 1


def test_the_stability_index_is_that_of_the_monitor():
    rng = np.random.default_rng(0)
    main, new = rng.normal(size=3000), rng.normal(0.5, 1.2, size=400)
    bins = Bins([float(one) for one in main])
    counts = [bins.counts([float(one) for one in side]) for side in (main, new)]
    assert counts[0][:-1] == pytest.approx([300] * 10, abs=1) and counts[0][-1] == 0
    assert psi_of(*map(shares, counts)) == pytest.approx(psi_of_counts(*decile_counts(main, new)), abs=0.01)  # mlops_nb.monitor.drift


@pytest.mark.parametrize("failed, n", [(0, 20), (5, 100), (50, 100), (99, 100), (20, 20), (3, 100_000)])
def test_the_interval_is_robbins(failed, n):
    low, high = interval(failed, n, alpha=0.05)
    at = lambda p: (n + 1) * stats.binom.pmf(failed, n, p)  # scipy.stats.binom: Robbins 1970's inequality for the binomial
    for end in (low, high):
        assert end in (0.0, 1.0) or at(end) == pytest.approx(0.05, rel=1e-4)
    assert low <= failed / n <= high and interval(0, 0) == (0.0, 1.0)
    assert low <= stats.binomtest(failed, n).proportion_ci().low + 1e-12, "wider than an interval for one look"


def test_the_interval_holds_at_every_moment():
    rng, outside = np.random.default_rng(1), 0
    failures = (rng.random((400, 1000)) < 0.05).cumsum(axis=1)
    bounds = {}
    for world in failures:
        for n in range(10, 1001, 10):
            key = int(world[n - 1]), n
            bounds.setdefault(key, interval(*key, alpha=0.05))
            if not bounds[key][0] <= 0.05 <= bounds[key][1]:
                outside += 1
                break
    assert outside <= stats.binom.ppf(0.999, 400, 0.05)
    naive = sum(any(stats.norm.ppf(0.975) * math.sqrt(max(k / n * (1 - k / n), 1e-9) / n) < abs(k / n - 0.05) for n in range(10, 1001, 10) for k in [world[n - 1]]) for world in failures)
    assert naive > 100, "the textbook interval fails in most worlds when it is looked at all the time"


def test_stakes_sum_to_one():
    evidence = Evidence(1)
    for n in (1, 3, 10, 100, 1000, 10**6, 10**9):
        evidence.add([0.0], n)
    assert math.exp(evidence.log) <= 1


# -- false alarms ----------------------------------------------------------------------------------

def worlds(n_worlds, n_looks, *, seed, n_main=90, n_new=10, p=0.001, q=0.001, slower=1.0, spread=0.5, shift=0.0, bands=PLAN.bands):
    "The highest evidence of each criterion, ever, in many worlds; counts are drawn at once, and every look is one block."
    rng, highest = np.random.default_rng(seed), []
    for _ in range(n_worlds):
        watch = Watch(bands, 9)
        failed = rng.binomial(n_main, p, n_looks), rng.binomial(n_new, q, n_looks)
        times = [np.maximum((np.log(rng.lognormal(math.log(scale), spread, (n_looks, n)) / 0.001) * 9 / math.log(bands["latency_ratio"])).astype(int), 0) for n, scale in ((n_main, 0.02), (n_new, 0.02 * slower))]
        answers = rng.normal(0, 1, (n_looks, n_main)), rng.normal(shift, 1, (n_looks, n_new))
        best = [-9.0, -9.0, -9.0]
        for i in range(n_looks):
            for tally, n, f, bins, some in zip((watch.main, watch.new), (n_main, n_new), failed, times, answers):
                tally.n, tally.failed = tally.n + n, tally.failed + int(f[i])
                for bin in bins[i].tolist():
                    tally.times[bin] += 1
                tally.answers += some[i].tolist()
            watch.block(i)
            best = [max(a, one.log) for a, one in zip(best, (watch.errors, watch.slow, watch.drift))]
        highest.append(best)
    return np.array(highest)


def test_a_version_that_is_as_good_raises_no_alarm():
    highest = worlds(150, 100, seed=1)
    assert (highest >= math.log(300)).any(axis=1).sum() <= stats.binom.ppf(0.999, 150, 0.01)
    assert (highest >= math.log(20)).mean(axis=0).max() <= 0.05


@pytest.mark.parametrize("p, margin", [(0.001, 0.01), (0.1, 0.01), (0.3, 0.05)])
def test_a_version_at_the_very_end_of_its_band_raises_false_alarms_as_seldom_as_promised(p, margin):
    "The hardest honest version: exactly the margin worse. Four hundred worlds, a look after every ten of its 2,000 requests, at 5%."
    rng, alarms, n_worlds = np.random.default_rng(2), 0, 400
    main, new = rng.binomial(90, p, (n_worlds, 200)), rng.binomial(10, p + margin, (n_worlds, 200))
    cache = {}
    for world in range(n_worlds):
        evidence = Evidence(len(LIFTS))
        for a, b in zip(main[world].tolist(), new[world].tolist()):
            if (a, b) not in cache:
                cache[a, b] = share_gains(p, (90, a), (10, b), margin)
            evidence.add(cache[a, b], 10)
            if evidence.log >= math.log(20):
                alarms += 1
                break
    assert alarms <= stats.binom.ppf(0.999, n_worlds, 0.05)


def test_a_fixed_test_looked_at_all_the_time_would_not_do():
    "Two equal versions and the textbook's z test for two proportions at 1%, looked at after every block: why all this is needed."
    rng = np.random.default_rng(2)
    main, new = rng.binomial(90, 0.1, (400, 200)).cumsum(axis=1), rng.binomial(10, 0.1, (400, 200)).cumsum(axis=1)
    n_main, n_new = 90 * np.arange(1, 201), 10 * np.arange(1, 201)
    pooled = (main + new) / (n_main + n_new)
    z = (new / n_new - main / n_main) / np.sqrt(pooled * (1 - pooled) * (1 / n_main + 1 / n_new))
    assert (z > stats.norm.isf(0.01)).any(axis=1).mean() > 0.08, "more than eight times as often as it says"


def test_half_as_slow_again_and_shifted_predictions_within_the_band_are_no_alarm():
    highest = worlds(60, 100, seed=3, slower=1.45, shift=0.4)  # a shift of 0.4 standard deviations: PSI 0.15
    assert (highest >= math.log(300)).any(axis=1).sum() <= stats.binom.ppf(0.999, 60, 0.01)


def test_the_last_digits_and_few_values_are_no_drift():
    "A model answers the same row with other last digits in another batch; a client that asks about one row over and over sends one value only."
    rng = random.Random(3)
    for values in ([459.4], [459.4, 12.25, 0.1], [1 / n for n in range(1, 30)]):
        assert caught(Canary(PLAN), rng, main=lambda i: {"answers": [rng.choice(values)]}, new=lambda i: {"answers": [rng.choice(values) * (1 + 1e-15 * rng.randrange(8))]}) is None
    assert caught(Canary(PLAN), rng, main=lambda i: {"answers": [459.4]}, new=lambda i: {"answers": [459.41]}) is None
    assert caught(Canary(PLAN), rng, main=lambda i: {"answers": [459.4]}, new=lambda i: {"answers": [512.0]}) < 5000
    assert caught(Canary(PLAN), rng, main=lambda i: {"answers": [22728]}, new=lambda i: {"answers": [22731]}) < 5000  # names that are numbers


def test_small_samples_do_not_drift():
    "Forty predictions of a fresh version: their index is over the band by chance alone in most worlds, and no world is alarmed."
    rng, over = random.Random(4), 0
    for _ in range(100):
        canary = Canary(PLAN)
        for i in range(600):
            canary.saw("champion", seconds=0.01, answers=[rng.gauss(0, 1)])
            if i % 15 == 0 and i > 300:
                canary.saw("challenger", seconds=0.01, answers=[rng.gauss(0, 1)])
                assert canary.verdict() is None
        counts = canary.watches["challenger"].counts()
        over += psi_of(*map(shares, counts)) > 0.25
    assert over > 50


def test_an_outage_of_both_is_no_alarm():
    rng, canary = random.Random(5), Canary(PLAN)
    for i in range(20_000):
        down = 5000 < i < 9000
        canary.saw("champion" if rng.random() < 0.9 else "challenger", seconds=0.1 if down else 0.01, failed=rng.random() < (0.6 if down else 0.001), answers=[1.0])
        if i % 50 == 0:
            assert canary.verdict() is None


# -- bad versions ----------------------------------------------------------------------------------

def caught(canary, rng, *, n=20_000, share=0.1, every=10, main=lambda i: {}, new=lambda i: {}):
    "After how many requests of the new version there is a verdict."
    usual, seen = {"seconds": 0.01}, 0
    for i in range(n):
        is_new = rng.random() < share
        seen += is_new
        canary.saw("challenger" if is_new else "champion", **{**usual, **(new(seen) if is_new else main(i))})
        if i % every == 0 and canary.verdict():
            return seen
    return None


def delays(how, n=15, **more):
    return [caught(Canary(PLAN), rng, new=lambda i, rng=rng: how(i, rng), **more) for rng in map(random.Random, range(n))]


def test_a_version_that_always_fails_is_caught_within_twenty_requests():
    assert max(delays(lambda i, rng: {"failed": True})) <= 20
    assert max(caught(Canary(PLAN), random.Random(seed), share=0.9, new=lambda i: {"failed": True}) for seed in range(5)) <= 40


def test_five_percent_of_errors_are_caught_within_a_few_hundred_requests():
    found = delays(lambda i, rng: {"failed": rng.random() < 0.05})
    assert np.median(found) <= 300 and max(found) <= 900


def test_a_version_that_breaks_after_thousands_of_good_answers_is_caught_at_once():
    found = [caught(Canary(PLAN), random.Random(seed), n=60_000, every=50, new=lambda i: {"failed": i > 4000}) for seed in range(3)]
    assert all(4000 < one <= 4040 for one in found)


@pytest.mark.parametrize("factor, within", [(2.5, 200), (5, 80), (100, 80)])
def test_a_slow_version_is_caught(factor, within):
    def timed(scale):
        return lambda i, rng: {"seconds": rng.lognormvariate(math.log(0.01 * scale), 0.4)}
    found = [caught(Canary(PLAN), rng, main=lambda i, rng=rng: timed(1)(i, rng), new=lambda i, rng=rng: timed(factor)(i, rng)) for rng in map(random.Random, range(8))]
    assert np.median(found) <= within


def test_a_version_that_is_sometimes_very_slow_is_caught():
    "Its median is the same; one answer in six takes ten times as long."
    found = delays(lambda i, rng: {"seconds": 0.1 if rng.random() < 1 / 6 else 0.01}, n=8, main=lambda i: {"seconds": 0.01 + (i % 7) / 1000})
    assert np.median(found) <= 400


@pytest.mark.parametrize("answer, within", [(lambda rng: rng.gauss(1.5, 1), 500), (lambda rng: 0.0, 300), (lambda rng: float("nan"), 300), (lambda rng: None, 300), (lambda rng: rng.gauss(0, 4), 700)],
                         ids=["shifted", "constant", "nan", "nothing", "wide"])
def test_other_predictions_are_caught(answer, within):
    found = [caught(Canary(PLAN), rng, main=lambda i, rng=rng: {"answers": [rng.gauss(0, 1)]}, new=lambda i, rng=rng: {"answers": [answer(rng)]}) for rng in map(random.Random, range(5))]
    assert np.median(found) <= within


def test_other_classes_and_other_articles_are_caught():
    classes = [caught(Canary(PLAN), rng, main=lambda i, rng=rng: {"answers": [rng.choices(["kept", "returned"], [95, 5])[0]]}, new=lambda i, rng=rng: {"answers": [rng.choice(["kept", "returned"])]})
               for rng in map(random.Random, range(4))]
    articles = [caught(Canary(PLAN), rng, main=lambda i, rng=rng: {"answers": [[f"{rng.randrange(8)}", "x"]]}, new=lambda i, rng=rng: {"answers": [[f"{rng.randrange(4, 12)}", "x"]]})
                for rng in map(random.Random, range(4))]
    assert np.median(classes) <= 300 and np.median(articles) <= 400


# -- what it says and how it behaves ---------------------------------------------------------------

def test_the_sentence_has_figures_and_stays():
    canary, rng = Canary(PLAN), random.Random(0)
    caught(canary, rng, new=lambda i: {"failed": i % 5 == 0})
    why = canary.verdict()
    assert why.startswith("recommender@challenger fails too often: ") and "champion 0 of" in why and why.endswith("the band ends at 1%.")
    for _ in range(500):
        canary.saw("challenger", seconds=0.01)
        canary.saw("champion", seconds=0.01)
    assert canary.verdict() == why and canary.left == "challenger"


def test_late_trouble_is_told_by_its_own_figures():
    canary = Canary(PLAN)
    caught(canary, random.Random(0), n=60_000, every=50, new=lambda i: {"failed": i > 4000})
    failed, n = map(int, canary.why.partition(": ")[2].partition(" answers")[0].replace("its last ", "").split(" of "))
    assert failed / n > 0.011 and n <= 1100


def test_slowness_and_shift_have_their_sentences():
    slow, shifted = Canary(PLAN), Canary(PLAN)
    caught(slow, random.Random(0), new=lambda i: {"seconds": 0.05})
    rng = random.Random(0)
    caught(shifted, rng, main=lambda i: {"answers": [rng.gauss(0, 1)]}, new=lambda i: {"answers": [rng.gauss(2, 1)]})
    assert "is too slow: 50% of its last" in slow.why and "5" in slow.why and "the band is 1.5 times" in slow.why
    assert "a population stability index of" in shifted.why and "the band is 0.25" in shifted.why


def test_its_facts_are_a_report():
    canary = Canary(PLAN)
    assert Report(canary.facts).passed
    caught(canary, random.Random(0), new=lambda i: {"failed": True})
    report = Report(canary.facts)
    assert not report.passed and [one["name"] for one in report.failures] == ["challenger: errors"]
    row = {one["version"]: one for one in canary.facts["versions"]}
    assert row["champion"]["p50_ms"] == pytest.approx(10, rel=0.06) and row["challenger"]["p50_ms"] is None
    assert row["challenger"]["error_rate"] == 1 and row["challenger"]["low"] < 1 == row["challenger"]["high"]
    json.dumps(canary.facts), report.to_html() if hasattr(report, "to_html") else str(report)


def test_quantiles_are_within_half_a_bin():
    canary, rng = Canary(PLAN), np.random.default_rng(0)
    seconds = rng.lognormal(-4, 1, 20_000)
    for one in seconds:
        canary.saw("champion", seconds=one)
    canary.verdict()
    row = canary.facts["versions"][1]
    for level in (50, 95, 99):
        assert row[f"p{level}_ms"] == pytest.approx(1000 * np.percentile(seconds, level), rel=0.04)  # numpy.percentile


def test_one_version_alone_or_a_canary_that_is_off_watches_nothing():
    for plan in (ModelPlan("m", {"champion": 100}), ModelPlan("m", {"champion": 50, "challenger": 50}, canary={"off": True})):
        canary = Canary(plan)
        for _ in range(100):
            canary.saw("challenger", seconds=0.1, failed=True)
        assert canary.verdict() is None and not canary.watches and Report(canary.facts).passed


def test_several_newcomers_are_judged_each_against_the_main_one():
    canary, rng = Canary(ModelPlan("m", {"champion": 80, "a": 10, "b": 10})), random.Random(0)
    while not canary.verdict():
        one = rng.choices(["champion", "a", "b"], [80, 10, 10])[0]
        canary.saw(one, seconds=0.01, failed=one == "b" and rng.random() < 0.3)
    assert canary.left == "b" and canary.wealth == pytest.approx(math.log(600))


def test_workers_are_judged_as_one():
    "Four workers, each with a quarter of the requests, whose counts travel as JSON to one of them."
    rng, judge, workers = random.Random(0), Canary(PLAN), [Canary(PLAN) for _ in range(4)]
    seen = 0
    while not judge.verdict() and seen < 5000:
        for worker in workers:
            for _ in range(20):
                new = rng.random() < 0.1
                seen += new
                worker.saw("challenger" if new else "champion", seconds=0.01, failed=new and rng.random() < 0.1, answers=[rng.gauss(0, 1)])
            judge.add(json.loads(json.dumps(worker.taken())))
    assert judge.left == "challenger" and seen < 300
    assert sum(one["requests"] for one in judge.facts["versions"]) == pytest.approx(10 * seen, rel=0.3)


def test_memory_is_bounded():
    canary, rng = Canary(PLAN), random.Random(0)
    for i in range(60_000):
        canary.saw("champion", seconds=rng.lognormvariate(0, 5), answers=[rng.random()] * 3)
    assert len(canary.tallies["champion"].answers) == KEPT and len(canary.tallies["champion"].times) < 500
    for _ in range(50):
        for i in range(100):
            canary.saw("challenger" if i % 2 else "champion", seconds=rng.lognormvariate(0, 5), answers=[rng.random()])
        canary.verdict()
    watch = canary.watches["challenger"]
    assert max(len(one.answers) for one in (*canary.totals.values(), watch.main, watch.new, *watch.recent[0], *watch.recent[1])) <= KEPT


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1e-9, 1e9, float("inf"), float("nan")])
@pytest.mark.parametrize("answers", [None, [], [None], [[]], [{}], [{"a": []}], [float("inf")], [10**400], [b"x"], [object()]], ids=lambda one: str(one)[:12])
def test_no_answer_can_break_it(seconds, answers):
    canary = Canary(PLAN)
    for _ in range(30):
        canary.saw("champion", seconds=seconds, answers=answers)
        canary.saw("challenger", seconds=seconds, answers=answers)
        canary.saw("unknown", seconds=seconds, answers=answers)
    assert canary.verdict() is None
    json.dumps(canary.facts, allow_nan=False)


def test_the_bins_of_times_shift_by_the_allowed_ratio():
    "Exactly 1.5 times as slow in every answer is the end of the band: the bet is fair at best."
    rng = np.random.default_rng(0)
    canary = Canary(PLAN)
    for seconds in rng.lognormal(-4, 0.7, 4000):
        canary.saw("champion", seconds=seconds)
        canary.saw("challenger", seconds=1.499 * seconds)
    times = {one: tally.times for one, tally in canary.tallies.items()}
    per_ratio = canary.watches["challenger"].per_ratio
    for level in (0.5, 0.95):
        assert quantile(times["challenger"], level) - quantile(times["champion"], level) in (per_ratio - 1, per_ratio)
    assert max(time_gains(times["champion"], times["champion"], times["challenger"], per_ratio)) < 1


def test_a_ranking_counts_by_its_first_and_a_record_by_its_first_field():
    assert [plain(one) for one in (["a", "b"], [["a"]], {"x": 3}, 3, True, None, "a" * 200)] == ["a", "a", 3.0, 3.0, "True", "None", "a" * 100]
    assert Tally(**json.loads(json.dumps(Tally(1, 0, {7: 1}, ["a"]).facts))).times == {7: 1}
    assert len(FRACTIONS) == 3


# -- several workers, one ledger -------------------------------------------------------------------

def workers_of(folder, n, plan=PLAN, **more):
    return [Canary(plan, ledger=ledger_in(folder, plan.model), workers=n, **more) for _ in range(n)]


class Memory(Ledger):
    "A ledger without a file, for simulations."

    @contextmanager
    def turn(self):
        values = json.loads(self.path)
        yield values
        self.path = json.dumps(values)


def told(canary, main, new, failed=0, main_failed=0, bin=40, main_bin=40):
    "So many answers, since the last look."
    canary.tallies["champion"].add(Tally(main, main_failed, {main_bin: main - main_failed}))
    canary.tallies["challenger"].add(Tally(new, failed, {bin: new - failed}))
    return canary.verdict()


@pytest.mark.parametrize("n", [1, 4, 16])
def test_workers_with_a_ledger_are_one_process(tmp_path, n):
    "The same looks in the same order, by one canary in memory and by n that share a file: every bettor has the same wealth to the last bit, so what holds for one holds for all."
    rng, alone, workers = random.Random(n), Canary(PLAN, clock=lambda: 7.0), workers_of(tmp_path, n, clock=lambda: 7.0)
    for i in range(240):
        worker = rng.choice(workers)
        for _ in range(rng.randrange(12)):
            seen = {"selector": "challenger" if rng.random() < 0.3 else "champion", "seconds": rng.lognormvariate(-4, 1), "failed": rng.random() < 0.02, "answers": [rng.choice([rng.gauss(0, 1), "a", "\ud800"])]}
            worker.saw(**seen), alone.saw(**seen)
        assert worker.verdict() == alone.verdict() is None
    one, many = alone.watches["challenger"], worker.watches["challenger"]
    assert [(a.logs, a.seen) for a in (one.errors, one.slow, one.drift)] == [(a.logs, a.seen) for a in (many.errors, many.slow, many.drift)] and one.seen == many.seen > 200
    assert {name: tally.facts for name, tally in alone.totals.items()} == {name: tally.facts for name, tally in worker.totals.items()} and one.counts() == many.counts() is not None
    assert alone.facts == worker.facts


@pytest.mark.parametrize("n", [1, 4, 16])
def test_false_alarms_of_all_workers_together_are_as_seldom_as_promised(n):
    "The hardest honest version, at the very end of its band, in sixty worlds of 800 of its requests; each worker looks after every fifth of those it saw."
    rng, alarms, n_worlds = np.random.default_rng(n), 0, 60
    for _ in range(n_worlds):
        ledger = Memory("")
        ledger.path = "{}"
        workers = [Canary(PLAN, ledger=ledger, workers=n, alpha=0.15) for _ in range(n)]  # a third of it for errors, about which they are told: 5%
        for i, (main, new) in enumerate(zip(rng.binomial(45, 0.1, 160).tolist(), rng.binomial(5, 0.11, 160).tolist())):
            if told(workers[i % n], 45, 5, new, main):
                alarms += 1
                break
    assert alarms <= stats.binom.ppf(0.999, n_worlds, 0.05)  # scipy.stats.binom


def needed(folder, n, seed, *, shared=True):
    "Requests of a new version that fails in one of twenty until it is found, over all workers; each looks after every fifth of those it saw."
    rng, seen = np.random.default_rng(seed), 0
    workers = workers_of(folder / f"{n} {seed} {shared}" if shared else None, n)
    while not any(worker.why for worker in workers):
        for worker in workers:
            seen += 5
            told(worker, 45, 5, int(rng.binomial(5, 0.05)), int(rng.binomial(45, 0.001)))
    return seen


def test_eight_workers_need_as_many_requests_as_one_and_alone_many_times_as_many(tmp_path):
    one, together, alone = (np.mean([needed(tmp_path, n, seed, shared=shared) for seed in range(12)]) for n, shared in ((1, True), (8, True), (8, False)))
    assert together <= 1.3 * one and alone >= 3 * one


def test_least_numbers_count_all_workers(tmp_path):
    "Twelve slow answers for each of four workers are less than fifty, thirteen are more; three failures each are more than five."
    slow = workers_of(tmp_path / "slow", 4)
    assert [told(worker, 100, 12, bin=80) for worker in slow] == [None] * 4 and slow[3].watches["challenger"].slow.log > slow[3].wealth
    assert "is too slow" in [told(worker, 9, 1, bin=80) for worker in slow][1]
    failing = workers_of(tmp_path / "failing", 4)
    assert [bool(told(worker, 40, 3, 3)) for worker in failing] == [False, False, False, True]


def test_who_found_it_says_so_and_the_others_when_nothing_came_of_it(tmp_path):
    now = [100.0]
    first, second, late = workers_of(tmp_path, 3, clock=lambda: now[0])
    assert "fails too often" in told(first, 90, 20, 20) and not told(second, 9, 1, 1)
    now[0] += 4.9
    assert not second.verdict()
    now[0] += 0.2
    assert second.verdict() == first.verdict() and second.left == "challenger"
    now[0] = 3.0  # the machine was started again, and its clock with it
    assert late.verdict() == first.why


def test_a_full_disk_delays_what_was_seen_and_doubles_nothing(tmp_path, monkeypatch, caplog):
    first, second = workers_of(tmp_path, 2)
    full, replace = [True], os.replace

    def replaced(*paths):
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(*paths)
    monkeypatch.setattr(os, "replace", replaced)
    for _ in range(3):
        assert told(first, 9, 1) is None
    full[0] = False
    told(second, 90, 10), first.verdict()
    full[0] = True
    told(first, 9, 1)
    full[0] = False
    first.verdict()
    assert (first.totals["champion"].n, first.totals["challenger"].n) == (126, 14) and first.watches["challenger"].seen == 14
    assert sum("waits for its ledger" in one.message for one in caplog.records) == 2, "once each time"


def test_an_idle_server_writes_nothing(tmp_path):
    first, second = workers_of(tmp_path, 2)
    told(first, 90, 10)
    before = first.ledger.path.stat()
    assert second.verdict() is None and second.totals["challenger"].n == 10
    after = first.ledger.path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("left", [b"", bytes(4096), b"\xff{"])
def test_what_a_power_cut_left_of_a_ledger_is_no_trouble(tmp_path, left):
    first, second = workers_of(tmp_path, 2)
    told(first, 90, 10), told(second, 90, 10)
    first.ledger.path.write_bytes(left)
    assert told(second, 9, 1) is None and second.totals["challenger"].n == 21
    assert told(first, 9, 1) is None and first.totals["challenger"].n == 22


def test_a_ledger_belongs_to_one_question_and_is_cleared_away(tmp_path):
    old, new = (ledger_in(tmp_path, "m", [revision, vars(PLAN), {"champion": ["m@1", "d1"]}]) for revision in (3, 4))
    with old.turn() as values:
        values["seen"] = 1
    with new.turn() as values:
        assert values == {}
    with pytest.raises(ZeroDivisionError), new.turn() as values:
        values["seen"] = 1 / 0
    ledger_in(tmp_path, "m")
    assert old.path.exists()
    os.utime(old.path, (1, 1))
    ledger_in(tmp_path, "m")
    assert not old.path.exists() and new.path.exists()


def test_workers_without_a_folder_share_alpha(tmp_path):
    (tmp_path / "m").touch()  # nothing can be written there
    assert ledger_in(None, "m") is ledger_in(tmp_path, "m") is None
    assert Canary(PLAN, workers=4).wealth == pytest.approx(math.log(3 * 4 / 0.01))
    assert workers_of(tmp_path, 4)[0].wealth == pytest.approx(math.log(3 / 0.01))


WORKER = """
import sys
from mlops_nb.serve.canary import Canary, Tally
from mlops_nb.serve.evidence import ledger_in
from mlops_nb.serve.plan import ModelPlan
folder, looks = sys.argv[1], int(sys.argv[2])
canary = Canary(ModelPlan("recommender", {"champion": 90, "challenger": 10}), ledger=ledger_in(folder, "recommender"))
for i in range(looks):
    canary.tallies["champion"].add(Tally(9, 0, {40: 9}))
    canary.tallies["challenger"].add(Tally(1, 0, {40: 1}))
    canary.verdict()
    while canary.said:  # the others were quicker for a second
        canary.verdict()
    print(i + 1, flush=True)
"""


def test_a_worker_that_is_killed_leaves_its_evidence_once(tmp_path):
    "Four processes at one ledger; one that would never end is killed in the middle, and another takes its place."
    def start(looks):
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path), str(looks)], stdout=subprocess.PIPE, text=True)

    workers = [start(looks) for looks in (60, 60, 60, 10**9)]
    try:
        looks = 0
        while line := next_line(workers[3]):
            looks = int(line)  # the last that it spoke of; it may have made one more
            if looks == 20:
                workers[3].kill()
        workers.append(start(40))
        for one in (*workers[:3], workers[4]):
            one.communicate(timeout=300)
            assert one.returncode == 0
    finally:
        for one in workers:
            one.kill()
            one.wait(60)
    left = workers_of(tmp_path, 1)[0]
    left.verdict()
    assert left.totals["challenger"].n - 3 * 60 - 40 in (looks, looks + 1) and left.totals["champion"].n == 9 * left.totals["challenger"].n


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a pool forks")
def test_real_workers_judge_together_and_a_killed_one_is_counted_once(tmp_path):
    from test_workers import ask, pool, until

    def seen():
        return [sum(tally["n"] for tally in json.loads(one.read_text())["totals"].values()) for one in (tmp_path / "shop" / "metrics" / "canaries" / "slow").glob("*.json")]

    plan = Plan((ModelPlan("slow", {"1": 50, "2": 50}),))
    with pool(tmp_path / "shop", plan=plan, workers=4) as found:
        for sent in (40, 80):
            assert {ask(found.url).status_code for _ in range(40)} == {200}
            until(lambda: seen() == [sent])
            if sent == 40:
                children = found.family.children()
                children[0].kill()
                until(lambda: len(found.family.children()) == 4 and children[0] not in found.family.children())

        def withdrawn():
            assert ask(found.url, body=[{"fail": 1}]).status_code in (200, 500)
            return read_plan(found.plan).revision == 2
        until(withdrawn)
        written = read_plan(found.plan)
        assert (written.by, written.of("slow").traffic) == ("canary", {"1": 100}) and "fails too often" in written.why
