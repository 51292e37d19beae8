"""traffic: shares against a chi-square test, stickiness across processes, and that a change of the plan moves only those who must move."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mlops_nb.serve.plan import ModelPlan
from mlops_nb.serve.traffic import Arms, key_of
from projects import SMALL

KEYS = [f"customer-{i}" for i in range(100_000)]


def arms(model="recommender", **traffic):
    return Arms(ModelPlan(model, traffic))


def chosen(keys=KEYS, model="recommender", **traffic):
    choose = arms(model, **traffic).choose
    return np.array([choose(key, "") for key in keys])


@pytest.fixture(scope="module")
def tenth():
    return chosen(champion=90, challenger=10)


@pytest.mark.parametrize("traffic", [{"champion": 90, "challenger": 10}, {"champion": 99.9, "challenger": 0.1}, {"champion": 1, "challenger": 99}, {"champion": 70, "challenger": 10, "candidate": 20},
                                     {"1": 40, "2": 30, "3": 20, "4": 10}], ids=str)
@pytest.mark.parametrize("keys", [KEYS[:50_000], [str(i) for i in range(50_000)], [f"{i:032x}" for i in range(50_000)]], ids=["names", "numbers", "hex"])
def test_shares_of_keys_are_the_plan(traffic, keys):
    found = Counter(chosen(keys, **traffic).tolist())
    expected = np.array(list(traffic.values())) / 100 * len(keys)
    p_value = stats.chisquare([found[one] for one in traffic], expected).pvalue  # scipy.stats.chisquare
    assert p_value > 1e-4, found


def test_without_a_key_the_request_decides():
    choose = arms(champion=90, challenger=10).choose
    found = sum(choose("", f"request-{i}") == "challenger" for i in range(20_000))
    assert stats.binomtest(found, 20_000, 0.1).pvalue > 1e-4  # scipy.stats.binomtest
    assert {choose("customer-7", f"request-{i}") for i in range(100)} == {choose("customer-7", "")}, "a key is not moved by the request"


@pytest.mark.parametrize("share", [11, 20, 50, 100])
def test_a_larger_share_moves_only_those_who_must(tenth, share):
    after = chosen(champion=100 - share, challenger=share)
    assert not ((tenth == "challenger") & (after == "champion")).any(), "nobody goes back"
    assert (tenth != after).mean() == pytest.approx((share - 10) / 100, abs=0.005)


def test_a_withdrawn_version_gives_its_keys_to_the_main_one(tenth):
    after = chosen(champion=100)
    assert (after == "champion").all() and (tenth != after).mean() == pytest.approx(0.1, abs=0.005)


def test_a_third_version_moves_few(tenth):
    "Ten points are new; those on whom both newcomers have a claim, a tenth of a tenth, may move besides."
    after = chosen(champion=80, challenger=10, candidate=10)
    assert (tenth != after).mean() == pytest.approx(0.1, abs=0.025)
    assert ((tenth == "challenger") & (after == "champion")).mean() < 0.001
    gone = chosen(champion=80, candidate=20)
    assert (chosen(champion=70, challenger=10, candidate=20) != gone).mean() < 0.1 + 0.03


def test_the_order_of_the_plan_does_not_matter(tenth):
    assert (chosen(challenger=10, champion=90) == tenth).all()


def test_another_model_splits_other_customers(tenth):
    other = chosen(model="churn", champion=90, challenger=10)
    both = ((tenth == "challenger") & (other == "challenger")).mean()
    assert both == pytest.approx(0.01, abs=0.003), "independent: a tenth of a tenth"


def test_two_newcomers_are_independent_of_each_other():
    after = chosen(champion=80, challenger=10, candidate=10)
    first, second = chosen(champion=90, challenger=10), chosen(champion=90, candidate=10)
    table = pd.crosstab(first, second)
    assert stats.chi2_contingency(table).pvalue > 1e-4  # scipy.stats.chi2_contingency
    assert set(after) == {"champion", "challenger", "candidate"}


def test_every_process_decides_the_same(tenth):
    code = ("from mlops_nb.serve.traffic import Arms\nfrom mlops_nb.serve.plan import ModelPlan\narms = Arms(ModelPlan('recommender', {'champion': 90, 'challenger': 10}))\n"
            "print(''.join(arms.choose(f'customer-{i}', '')[2] for i in range(2000)))")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONHASHSEED": "123"}).stdout.strip()
    assert out == "".join(one[2] for one in tenth[:2000])


def test_real_customers_are_split_by_the_plan():
    customers = pd.read_parquet(SMALL, columns=["CustomerID"]).CustomerID.dropna().unique()
    found = Counter(chosen([key_of(one) for one in customers], champion=50, challenger=50).tolist())
    assert stats.binomtest(found["challenger"], len(customers), 0.5).pvalue > 1e-4
    assert [key_of(one) for one in customers] == [key_of(int(one)) for one in customers] == [key_of(str(int(one))) for one in customers]


@pytest.mark.parametrize("value, key", [(7, "7"), (7.0, "7"), (7.5, "7.5"), (True, "True"), (None, ""), (float("nan"), ""), (float("inf"), "inf"), ("", ""), ("ä\ud800", "ä\ud800"), (2**70, str(2**70)), ([1], "[1]")])
def test_any_value_can_be_a_key(value, key):
    assert key_of(value) == key
    assert arms(champion=50, challenger=50).choose(key_of(value), "r") in ("champion", "challenger")


@pytest.mark.parametrize("percent", [0.5, 25, 100])
def test_a_shadow_gets_its_sample_of_everyone(percent):
    one = Arms(ModelPlan("recommender", {"champion": 50, "challenger": 50}, shadow="candidate", shadow_percent=percent))
    requests = [f"{i:x}" for i in range(20_000)]
    copied = np.array([one.shadowed(request) == "candidate" for request in requests])
    answered = np.array([one.choose("", request) for request in requests])
    assert stats.binomtest(int(copied.sum()), len(copied), percent / 100).pvalue > 1e-4
    if percent == 25:
        assert stats.chi2_contingency(pd.crosstab(copied, answered)).pvalue > 1e-4, "it does not depend on who answers"
    assert {Arms(ModelPlan("m", {"champion": 100})).shadowed(request) for request in requests[:100]} == {""}


def test_a_version_without_a_share_gets_nothing():
    assert set(chosen(champion=100, challenger=0)) == {"champion"}
    assert set(chosen(champion=0, challenger=100)) == {"challenger"}
