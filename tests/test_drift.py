"""drift: distances and tests against scipy and published figures, false alarms and power by simulation, columns that must not be compared."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import stats
from scipy.spatial.distance import jensenshannon

from mlops_nb.core.errors import Invalid, NotFound
from mlops_nb.monitor.drift import category_counts, compare, compared_categories, decided, drift, ks_and_wasserstein, ks_p_value, psi, unseen_p_value
from projects import SMALL, shop  # noqa: F401


@pytest.fixture(scope="module")
def months():
    orders = pd.read_parquet(SMALL)
    return {month: lines for month, lines in orders.groupby(orders.InvoiceDate.dt.strftime("%Y-%m"))}


# -- distances and tests, against scipy -----------------------------------------------------------

@pytest.mark.parametrize("month", ["2011-02", "2011-06", "2011-11"])
@pytest.mark.parametrize("column", ["Quantity", "UnitPrice"])
def test_distances_of_real_months_are_scipys(months, month, column):
    reference, current = months["2011-01"][column].to_numpy(float), months[month][column].to_numpy(float)
    ks, moved = ks_and_wasserstein(reference, current)
    scipys = stats.ks_2samp(reference, current, method="asymp")  # scipy.stats.ks_2samp
    assert ks == pytest.approx(scipys.statistic, abs=1e-12)
    assert ks_p_value(reference, current, ks) == pytest.approx(scipys.pvalue, rel=1e-6, abs=1e-300)
    assert moved == pytest.approx(stats.wasserstein_distance(reference, current), rel=1e-9)  # scipy.stats.wasserstein_distance


def test_small_samples_get_the_exact_ks_test():
    reference, current = np.arange(8.0), np.arange(8.0) + 4.5
    ks, _ = ks_and_wasserstein(reference, current)
    assert ks_p_value(reference, current, ks) == pytest.approx(stats.ks_2samp(reference, current, method="exact").pvalue)


def test_psi_of_numbers_is_the_textbook_sum(months):
    reference, current = months["2011-03"].UnitPrice, months["2011-11"].UnitPrice
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, 11)[1:-1]))  # computed again with pandas.cut
    shares = []
    for sample in (reference, current):
        counts = pd.cut(sample, [-np.inf, *edges, np.inf]).value_counts(sort=False).to_numpy() + 0.5
        shares.append(counts / counts.sum())
    assert psi(reference, current) == pytest.approx(((shares[1] - shares[0]) * np.log(shares[1] / shares[0])).sum(), rel=1e-9)
    assert psi(reference, reference) == 0


def test_psi_matches_a_worked_example():
    """Shares 0.1/0.9 against 0.5/0.5: (0.4)ln5 + (-0.4)ln(5/9) = 0.8789, with rows enough that half a row does not count."""
    reference, current = ["a"] * 10_000 + ["b"] * 90_000, ["a"] * 50_000 + ["b"] * 50_000
    assert psi(reference, current) == pytest.approx(0.4 * np.log(5) + 0.4 * np.log(9 / 5), abs=1e-4)


def test_categories_are_scipys(months):
    reference, current = months["2011-01"].Country, months["2011-11"].Country
    found = compared_categories(reference, current)
    _, before, now = category_counts(reference, current)
    table = np.array([before, now])
    chi2 = stats.chi2_contingency(table, correction=False)
    assert found["p_value"] == pytest.approx(chi2.pvalue)
    assert found["distance"] == pytest.approx(jensenshannon(before / before.sum(), now / now.sum(), base=2))
    assert table.sum() == len(reference) + len(current)
    assert chi2.expected_freq[:, :-1].min() >= 5, "pooled so that the chi-square approximation holds"


def test_p_values_are_adjusted_as_in_benjamini_and_hochberg():
    """The 15 p-values of their section 4.1 (1995): at 0.05 the procedure rejects the four smallest."""
    published = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459, 0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    halves = [{"column": str(i), "kind": "numeric", "psi": 1.0, "unseen": 0.0, "missing_reference": 0.0, "missing_current": 0.0, "missing_p_value": p} for i, p in enumerate(published)]
    rows = decided(halves, 0.05, 0.1, 0.05)
    assert sorted(row["column"] for row in rows if row["missing_q_value"] < 0.05) == ["0", "1", "2", "3"]


def test_good_and_turing_expect_what_a_second_sample_shows(months):
    """The expected share of unseen articles, checked against random halves of one month."""
    articles, rng, found, expected = months["2011-11"].StockCode.reset_index(drop=True), np.random.default_rng(0), [], []
    for _ in range(20):
        half = rng.random(len(articles)) < 0.5
        seen = articles[half].value_counts()
        found.append((~articles[~half].isin(seen.index)).mean())
        expected.append(unseen_p_value(found[-1], (seen == 1).sum(), (seen == 2).sum(), half.sum(), (~half).sum())[0])
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.003)


# -- false alarms and power ------------------------------------------------------------------------

def table(rng, n):
    return pd.DataFrame({"normal": rng.normal(size=n), "price": rng.exponential(size=n).round(2), "count": rng.poisson(2, n), "few": rng.choice(list("abcdef"), n),
                         "long tail": rng.choice(500, n, p=np.arange(500, 0, -1) / np.arange(501).sum()).astype(str), "gaps": np.where(rng.random(n) < 0.1, np.nan, rng.random(n))})


@pytest.mark.parametrize("n, m", [(400, 400), (2000, 300), (300, 2000)])
def test_same_distribution_alarms_at_most_alpha_of_the_time(n, m):
    """120 draws at alpha 0.05: 6 expected at most; 13 or more have a chance under 1% (scipy.stats.binom)."""
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(120):
        rows = compare(table(rng, n), table(rng, m), alpha=0.05, psi=1e-9)["rows"]
        alarms += any(row.get(name, 1) < 0.05 for row in rows for name in ("q_value", "missing_q_value", "unseen_q_value"))
    assert alarms < stats.binom.ppf(0.99, 120, 0.05)


def test_a_real_shift_is_found_and_named():
    rng = np.random.default_rng(3)
    reference, current = table(rng, 2000), table(rng, 2000)
    current["normal"] += 1.0
    current["few"] = current.few.replace("a", "zebra")
    current["gaps"] = current.gaps.mask(rng.random(2000) < 0.2)
    report = drift(reference, current, alpha=0.01, psi=0.25)
    drifted = {row["column"]: row["drifted"] for row in report.facts["columns"] if row["drifted"]}
    assert set(drifted) == {"normal", "few", "gaps"} and drifted["gaps"] == "missing"
    assert any("zebra" in check["message"] for check in report.failures) and not report.passed


def test_a_huge_sample_with_a_tiny_change_does_not_cry_wolf():
    rng = np.random.default_rng(0)
    reference, current = pd.DataFrame({"x": rng.normal(size=200_000)}), pd.DataFrame({"x": rng.normal(0.03, 1, 200_000)})
    report = drift(reference, current)
    assert report.facts["columns"][0]["q_value"] < 1e-6 and report.passed


def test_a_new_assortment_is_seen_behind_the_rest(months):
    """Thousands of articles: pooled shares hardly move, a third of the lines are new articles."""
    row = next(row for row in drift(months["2011-03"], months["2011-11"]).facts["columns"] if row["column"] == "StockCode")
    unseen = (~months["2011-11"].StockCode.isin(months["2011-03"].StockCode)).mean()  # counted again with pandas
    assert row["unseen"] == pytest.approx(unseen) and row["drifted"] == "new values" and row["psi"] < 0.25


# -- columns of every kind ---------------------------------------------------------------------------

def test_keys_and_times_are_left_out_with_a_reason(months):
    reasons = {row["column"]: row["reason"] for row in drift(months["2011-03"], months["2011-11"]).facts["not_compared"]}
    assert reasons["InvoiceNo"].startswith("running number") and reasons["InvoiceDate"].startswith("time")


@pytest.mark.parametrize("reference, current, word", [
    (pd.Series(range(100)), pd.Series(range(100, 200)), "identifier"),
    (pd.Series([f"id{i}" for i in range(100)]), pd.Series([f"id{i}" for i in range(200, 300)]), "identifier"),
    (pd.Series([None] * 50, dtype=object), pd.Series([1.0] * 50), "empty"),
])
def test_columns_that_cannot_drift(reference, current, word):
    assert drift(pd.DataFrame({"a": reference}), pd.DataFrame({"a": current})).facts["not_compared"][0]["reason"].startswith(word)


@pytest.mark.parametrize("reference, current, drifted", [
    (pd.Series([1.0] * 200), pd.Series([1.0] * 200), ""),
    (pd.Series([1.0] * 200), pd.Series([2.0] * 200), "values and new values"),
    (pd.Series([True, False] * 200), pd.Series([True] * 400), "values"),
    (pd.Series([0, 1] * 200), pd.Series([0, 1, 1, 1] * 100), "values"),
    (pd.Series([1.0, np.inf] * 200), pd.Series([1.0, 1.0] * 200), "missing"),
    (pd.Series(np.random.default_rng(0).normal(size=300)), pd.Series(["a", "b", "c"] * 100), "type"),
    (pd.Series([["x", "y"], ["x"]] * 100), pd.Series([["x", "y"], ["x"]] * 100), ""),
    (pd.Series([["x", "y"], ["x"]] * 100), pd.Series([["z"], ["z", "w"]] * 100), "values and new values"),
    (pd.Series(["a", "b"] * 100, dtype="category"), pd.Series(["a", "b"] * 100, dtype="category"), ""),
    (pd.Series([1, 2, None] * 100, dtype="Int64"), pd.Series([1, 2, None] * 100, dtype="Int64"), ""),
    (pd.Series([1.5, None] * 100), pd.Series([None, None] * 100, dtype=object), "missing"),
])
def test_odd_columns_get_a_verdict_and_not_a_traceback(reference, current, drifted):
    report = drift(pd.DataFrame({"a": reference}), pd.DataFrame({"a": current}))
    assert report.facts["columns"][0]["drifted"] == drifted
    assert report.html() and report.json() and report.text()


def test_columns_gone_and_new_are_said():
    report = drift(pd.DataFrame({"a": [1.0, 2] * 50, "b": [1.0, 2] * 50}), pd.DataFrame({"a": [1.0, 2] * 50, "c": [1.0, 2] * 50}))
    assert [check["name"] for check in report.failures] == ["column b"] and report.facts["new_columns"] == ["c"]


# -- mistakes ----------------------------------------------------------------------------------------

def test_mistakes_are_one_sentence(months, tmp_path):
    march = months["2011-03"]
    for arguments, options, words in [((march, march.head(0)), {}, "current data has no rows"), ((march, march), {"columns": ["UnitPrize"]}, "did you mean UnitPrice"),
                                      ((march[["Country"]], march[["Quantity"]]), {}, "no column in common"), ((march, 7), {}, "int is not a table"),
                                      ((march, march), {"alpha": 0}, "alpha = 0")]:
        with pytest.raises(Invalid, match=words):
            drift(*arguments, **options)
    with pytest.raises(NotFound, match="there is no file"):
        drift(march, str(tmp_path / "gone.parquet"))


def test_files_and_addresses_are_read(shop, months):
    from mlops_nb.core.settings import in_project
    from mlops_nb.data.store import save

    months["2011-03"].to_parquet(shop / "march.parquet")
    with in_project(shop):
        save(months["2011-11"], "orders")
        asked = {"columns": ["Quantity", "Country"]}
        found = drift(months["2011-03"], months["2011-11"], **asked).json()
        months["2011-03"].to_csv(shop / "march.csv.gz", index=False)
        for march in (shop / "march.parquet", str(shop / "march.parquet"), shop / "march.csv.gz", pa.Table.from_pandas(months["2011-03"])):
            assert drift(march, "orders@1", **asked).json() == found
        (shop / "torn.csv").write_text("a,b\n1,2\n1,2,3\n")
        with pytest.raises(Invalid, match="torn.csv is not a readable CSV file"):
            drift(shop / "torn.csv", "orders@1")


def test_the_same_data_give_the_same_report(months):
    once, again = (drift(months["2011-03"], months["2011-11"]).json() for _ in range(2))
    assert once == again
