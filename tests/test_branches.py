"""What would break for somebody who experiments with data: a branch that loses changes, a way back that is none, a clean-up that takes too much."""

import os
import random
import time

import numpy as np
import pandas as pd
import pytest
from frames import same, shop  # noqa: F401

from mlops_nb.core.errors import Conflict, Invalid, NotFound
from mlops_nb.data.branches import drop, merge, rollback, tag
from mlops_nb.data.packs import writing
from mlops_nb.data.store import load, log, save
from mlops_nb.data.upkeep import gc, verify
from mlops_nb.data.versions import branches, datasets, packs_of, store, version, versions


def table(rows=3000, seed=0):
    dice = np.random.default_rng(seed)
    return pd.DataFrame({"id": np.arange(rows), "price": dice.normal(size=rows), "city": pd.Series(dice.choice(["Rome", "Oslo", "Bern"], rows), dtype="str"),
                         "at": pd.Timestamp("2024-01-01") + pd.to_timedelta(dice.integers(0, 10**6, rows), unit="s"), "kind": pd.Categorical(dice.choice(["a", "b"], rows))})


def store_bytes():
    return sum(path.stat().st_size for path in store().rglob("*.pack"))


EDITS = {
    "append": lambda frame, dice: pd.concat([frame, table(50, seed=int(dice.integers(99)))], ignore_index=True).astype(frame.dtypes.to_dict()),
    "drop": lambda frame, dice: frame.drop(frame.index[dice.choice(len(frame), len(frame) // 50, replace=False)]),
    "sort": lambda frame, dice: frame.sort_values("price", kind="stable"),
    "sample": lambda frame, dice: frame.sample(frac=0.6, random_state=int(dice.integers(99))),
    "repeat": lambda frame, dice: pd.concat([frame, frame.head(100)]),
    "edit": lambda frame, dice: frame.assign(price=frame["price"].where(dice.random(len(frame)) > 0.01, 0.0)),
    "column": lambda frame, dice: frame.assign(**{f"c{dice.integers(9)}": dice.normal(size=len(frame))}),
    "fewer columns": lambda frame, dice: frame.drop(columns=[c for c in frame.columns if c.startswith("c") and c != "city"][:1]),
    "scale": lambda frame, dice: frame.assign(price=frame["price"] * 2 + 1),
    "gaps": lambda frame, dice: frame.assign(city=frame["city"].mask(dice.random(len(frame)) < 0.02)),
    "index": lambda frame, dice: frame.reset_index(drop=True),
    "none": lambda frame, dice: frame.iloc[:0],
}


@pytest.mark.parametrize("seed", range(6))
def test_a_long_life_of_edits_comes_back_version_by_version(shop, seed):
    """Whatever way each version is stored, as a file or as rows of earlier ones, each is what was saved; also after a clean-up."""
    dice, frame, kept = np.random.default_rng(seed), table(), {}
    for _ in range(14):
        name = dice.choice([edit for edit in EDITS if edit != "none" or len(kept) > 8])
        frame = EDITS[name](frame if len(frame) else table(), dice)
        kept[save(frame, "t", message=str(name)).version] = frame
    for number, saved in kept.items():
        same(load(f"t@{number}"), saved)
        some = [column for column in saved.columns if dice.random() < 0.5] or ["id"]
        same(load(f"t@{number}", columns=some), saved[some])
    assert verify().passed
    gc(grace_days=0)
    for number, saved in kept.items():
        same(load(f"t@{number}"), saved)
    assert pd.read_parquet(load("t", as_="path")).shape[0] == len(frame)


def test_rows_dropped_here_and_there_cost_little(shop):
    frame = table(60_000)
    whole = save(frame, "t")
    fewer = save(frame.drop(np.random.default_rng(0).choice(60_000, 300, replace=False)), "t")
    assert fewer.added_bytes < 0.02 * whole.added_bytes
    assert save(frame, "t").added_bytes == 0


def test_several_pieces_of_a_large_table(shop, monkeypatch):
    import mlops_nb.data.stored as module

    monkeypatch.setattr(module, "ROWS", 1000)
    frame = table(3500)
    save(frame, "t")
    same(load("t"), frame)
    same(load("t", where="price > 0", columns=["id"]), frame.loc[frame["price"] > 0, ["id"]].reset_index(drop=True))
    save(frame.iloc[1:], "t")
    same(load("t"), frame.iloc[1:])


CONDITIONS = {
    "price > 0.5": "price > 0.5", "city == 'Rome' and id < 100": "city == 'Rome' and id < 100", "city in ('Rome', 'Oslo') or not price < 1": "city in ('Rome', 'Oslo') or not price < 1",
    "10 <= id <= 20": "10 <= id <= 20", "city is None": "city.isna()", "city is not None": "city.notna()", "at >= '2024-01-05'": "at >= '2024-01-05'", "kind == 'a'": "kind == 'a'",
    "price > 0.5 and id > price": "price > 0.5 and id > price", "col('two words') == 1": "`two words` == 1", "5 > id": "5 > id", "id not in [1, 2, 3]": "id not in [1, 2, 3]",
}


@pytest.mark.parametrize("stored", ["whole", "as rows"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_rows_are_chosen_as_pandas_would(shop, condition, stored):
    frame = table(500).assign(**{"two words": np.arange(500) % 3})
    frame["city"] = frame["city"].mask(frame["id"] % 7 == 0)
    save(frame, "t")
    if stored == "as rows":
        frame = frame.drop(index=[3, 4, 77])
        save(frame, "t")
    wanted = frame.query(CONDITIONS[condition])
    same(load("t", where=condition), wanted if stored == "as rows" else wanted.reset_index(drop=True))


@pytest.mark.parametrize(("where", "pattern"), [("nope > 1", "no column 'nope'"), ("price >", "cannot be read"), ("price + 1 > 2", "no condition on columns"), ("open('x')", "no condition"),
                                                ("price > 'x'", "which holds double"), ("1 < 2", "no condition"), ("price.mean() > 1", "no condition"), ("id in price", "no condition")])
def test_a_condition_that_is_none(shop, where, pattern):
    save(table(10), "t")
    with pytest.raises(Invalid, match=pattern):
        load("t", where=where)


def test_tags_move_and_are_found(shop):
    save(table(5), "t"), save(table(6), "t")
    tag("t@1", "gold")
    assert version("t@gold").version == 1 and version("t@1").aliases == ("gold",) and log("t").facts["versions"][1]["tags"] == "gold"
    tag("t@2", "gold")
    assert version("t@gold").version == 2 and not version("t@1").aliases
    tag("t@2", "")
    with pytest.raises(NotFound):
        version("t@gold")
    for bad in ("3", "a b", "../x"):
        with pytest.raises(Invalid, match="cannot be a tag"):
            tag("t", bad)


def test_going_back_keeps_history_and_costs_nothing(shop):
    save(table(500), "t", key="id"), save(table(400), "t")
    before = store_bytes()
    back = rollback("t@1")
    assert (back.version, back.added_bytes, back.key, back.message) == (3, 0, "id", "back to t@1") and store_bytes() == before
    same(load("t"), table(500))
    with pytest.raises(Invalid, match="needs the version"):
        rollback("t")
    (shop / "f").mkdir(), (shop / "f" / "x").write_text("1")
    save(shop / "f", "f")
    (shop / "f" / "x").write_text("2")
    save(shop / "f", "f"), rollback("f@1")
    assert (load("f") / "x").read_text() == "1"


def test_a_branch_shares_and_is_merged_or_refused(shop):
    frame = table(5000)
    first = save(frame, "t", key="id")
    one = save(frame[frame["price"] > -2], "t:calm")
    assert one.parent == "t@1" and one.added_bytes < first.added_bytes * 0.1 and branches("t") == ["t:calm"] and datasets() == ["t"] and one.key == "id"
    assert log("t").facts["branches"][0]["branch"] == "t:calm" and versions("t:calm")[0].address == "t:calm@1"
    assert merge("t:calm").merged == "t:calm@1"
    same(load("t").reset_index(drop=True), frame[frame["price"] > -2].reset_index(drop=True))
    assert not merge("t:calm").new  # there is nothing more to take
    for bad, kind, pattern in (("t", Invalid, "is no branch"), ("t:no", NotFound, "no branch"), ("u:x", NotFound, "no data set")):
        with pytest.raises(kind, match=pattern):
            merge(bad)
    with pytest.raises(NotFound, match="to make the branch"):
        save(frame, "nothing:x")


def test_a_second_merge_keeps_what_the_main_line_did_in_between(shop):
    frame = table(100)
    save(frame, "t", key="id"), save(frame.assign(price=1.0), "t:b")
    save(frame.assign(city="Rome"), "t"), merge("t:b")
    save(load("t").assign(extra=1), "t")
    save(load("t:b").assign(price=2.0), "t:b")
    merge("t:b")
    now = load("t")
    assert set(now["price"]) == {2.0} and set(now["city"]) == {"Rome"} and set(now["extra"]) == {1}
    save(now.assign(price=3.0), "t"), save(load("t:b").assign(price=4.0), "t:b")
    with pytest.raises(Conflict, match="price"):
        merge("t:b")


def test_a_dropped_branch_waits_for_the_grace_period(shop):
    save(table(10), "t")
    noise = pd.DataFrame({"x": np.random.default_rng(0).normal(size=20_000)})
    save(noise, "t:noise")
    drop("t:noise")
    with pytest.raises(NotFound):
        load("t:noise")
    size = store_bytes()
    gc()
    gc(grace_days=0.0001)
    assert store_bytes() == size
    old = time.time() - 30 * 86400
    for path in [*store().rglob("*.pack"), *store().glob("datasets/*/dropped/*")]:
        os.utime(path, (old, old))
    assert gc(dry_run=True).facts["freed_bytes"] > 100_000 and store_bytes() == size
    gc()
    assert store_bytes() < size / 10 and verify().passed and not list(store().glob("datasets/*/dropped/*"))
    same(load("t"), table(10))
    with pytest.raises(Invalid, match="not dropped"):
        drop("t")


def test_many_small_packs_become_one(shop):
    frames = [table(20, seed=seed) for seed in range(40)]
    for frame in frames:
        save(frame, "t")
    count = len(packs_of().paths)
    gc(grace_days=0)
    assert len(packs_of().paths) < count / 4 and verify().passed
    for number, frame in enumerate(frames, 1):
        same(load(f"t@{number}"), frame)


def test_nothing_is_dropped_while_a_manifest_cannot_be_read(shop):
    save(table(10), "t"), save(table(11), "t")
    with writing(packs_of()) as writer:
        writer.add(random.Random(0).randbytes(50_000))
    file = store() / "datasets" / "t" / "1.json"
    file.write_text(file.read_text().replace('"rows": 10', '"rows": 12'))
    with pytest.raises(Invalid, match="nothing was dropped"):
        gc(grace_days=0)
    assert not verify().passed and "t@1" in str(verify())
    same(load("t@2"), table(11))


def test_a_clean_up_while_a_save_is_under_way_is_noticed(shop, monkeypatch):
    """The chunks of a save that has not committed yet are nobody's; if they go, the save says so and keeps nothing half."""
    import mlops_nb.data.store as module

    save(table(10), "t")
    commit = module.commit

    def late(*args, **more):
        gc(grace_days=0)
        return commit(*args, **more)

    monkeypatch.setattr(module, "commit", late)
    with pytest.raises(Conflict, match="cleaned up while t was being saved"):
        save(table(1000, seed=5), "t")
    monkeypatch.undo()
    assert save(table(1000, seed=5), "t").version == 2 and verify().passed
