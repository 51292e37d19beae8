"""What would break for somebody who keeps versions: numbers that repeat, versions that vanish, mistakes that are answered with a traceback."""

import datetime as dt
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from frames import DATA, orders, same, shop  # noqa: F401
from mlops_nb.core.errors import Conflict, Invalid, MlopsError, NotFound, Unavailable
from mlops_nb.data.store import as_frame, load, log, save
from mlops_nb.data.versions import datasets, manifests, store, version, versions


def test_versions_count_up_and_identical_data_make_none(shop, orders):
    one = save(orders, "orders", message="first")
    assert (one.address, one.rows, one.columns, one.kind, one.new) == ("orders@1", 107_867, 8, "table", True)
    again = save(orders.copy(), "orders", message="second")
    assert again.address == "orders@1" and not again.new and "Nothing has changed since orders@1" in str(again)
    two = save(orders.iloc[:-1], "orders")
    back_to_one = save(orders, "orders", message="back")
    assert (two.version, back_to_one.version, back_to_one.added_bytes) == (2, 3, 0)
    assert back_to_one.digest == one.digest and version(f"orders@{one.digest[:8]}").version == 3
    rows = log("orders").facts["versions"]
    assert [row["version"] for row in rows] == [3, 2, 1] and rows[0]["message"] == "back" and rows[2]["digest"] == one.digest[:8]
    assert log().facts["data_sets"][0]["versions"] == 3 and datasets() == ["orders"]
    dt.datetime.fromisoformat(one.saved_at.replace("Z", "+00:00"))


def test_commit_and_run_are_noted(shop, orders, monkeypatch):
    run = lambda *words: subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *words], cwd=shop, check=True, capture_output=True, text=True, timeout=300).stdout.strip()
    run("init", "-q")
    assert save(orders.head(1), "t").commit == ""
    run("commit", "-q", "--allow-empty", "-m", "x")
    monkeypatch.setenv("MLOPS_STEP_FOLDER", str(shop))
    monkeypatch.setenv("MLOPS_RUN", "run-7")
    noted = save(orders.head(2), "t")
    assert noted.commit == run("rev-parse", "HEAD") and noted.run == "run-7" and noted.by


def test_files_and_folders_come_back(shop, tmp_path):
    folder = tmp_path / "src"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "empty").mkdir()
    (folder / "deep" / "er" / "ä b.bin").write_bytes(b"\x00" * 10)
    (folder / "zero").write_bytes(b"")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    one = save(folder, "files")
    back = load("files")
    listing = lambda place: {path.relative_to(place).as_posix(): (path.read_bytes() if path.is_file() else None, os.access(path, os.X_OK)) for path in place.rglob("*")}
    assert one.kind == "folder" and listing(back) == listing(folder)
    (back / "deep" / "er" / "ä b.bin").chmod(0o644)
    (back / "deep" / "er" / "ä b.bin").write_bytes(b"scribbled over")
    (back / "stray").write_text("x")
    assert listing(load("files")) == listing(folder)
    (folder / "zero").write_bytes(b"1")
    two = save(str(folder), "files")
    assert two.version == 2 and two.added_bytes < 1000
    assert (load("files@1") / "zero").read_bytes() == b"" and (load("files@2") / "zero").read_bytes() == b"1"


def test_a_file_is_a_path_and_a_frame_when_asked(shop, orders):
    orders.head(100).to_csv(shop / "o.csv", index=False)
    orders.head(100).to_parquet(shop / "o.parquet")
    orders.head(100).to_csv(shop / "o.csv.gz", index=False)
    for name in ("o.csv", "o.parquet", "o.csv.gz"):
        save(shop / name, "file")
        assert load("file").read_bytes() == (shop / name).read_bytes() and load("file").name == name
        assert load("file", as_="pandas", columns=["Quantity"])["Quantity"].equals(orders["Quantity"].head(100).astype(load("file", as_="pandas")["Quantity"].dtype))
    assert versions("file")[1].rows == 100
    assert as_frame("file@2")[1] == "file@2" and as_frame(shop / "o.csv")[0].shape == (100, 8) and as_frame(pa.table({"a": [1]}))[0].shape == (1, 1)


def test_other_versions_survive_a_damaged_manifest(shop, orders):
    save(orders.head(5), "t"), save(orders.head(6), "t")
    file = manifests("t")[2]
    file.chmod(0o644)
    file.write_text(file.read_text().replace('"size"', '"sise"', 1).replace('"digest": "', '"digest": "0', 1))
    assert len(load("t@1")) == 5
    with pytest.raises(Invalid, match="t@2 has a damaged manifest"):
        load("t@2")
    assert save(orders.head(7), "t").version == 3 and len(load("t")) == 7
    for nonsense in ("{", "[]", '"t"', "{}", '{"format": "2"}', '{"format": null}'):
        file.write_text(nonsense)
        with pytest.raises(Invalid, match="damaged"):
            load("t@2")


def test_a_later_format_is_not_guessed_at(shop, orders):
    save(orders.head(5), "t")
    file = manifests("t")[1]
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 3}))
    with pytest.raises(Invalid, match="newer mlops_nb"):
        load("t")


# ---------------------------------------------------------------- mistakes
def test_every_mistake_gets_one_sentence(shop, orders):
    save(orders.head(5), "orders"), save(DATA, "folder")
    (shop / "torn.parquet").write_bytes((DATA / "online_retail_small.parquet").read_bytes()[:200_000])
    damaged = bytearray((DATA / "online_retail_small.parquet").read_bytes())
    damaged[len(damaged) // 2: len(damaged) // 2 + 64] = bytes(64)
    (shop / "damaged.parquet").write_bytes(damaged)
    (shop / "broken.csv").write_bytes(b'a,b\n"1,2\n')
    (shop / "link").symlink_to(shop)
    (shop / "loop").mkdir()
    (shop / "loop" / "in").symlink_to(shop)
    (shop / "dangling").mkdir()
    (shop / "dangling" / "in").symlink_to(shop / "nowhere")
    before = sorted(store().rglob("*.json"))
    for kind, pattern, call in [
        (NotFound, r"no data set 'order'; did you mean orders", lambda: load("order")),
        (NotFound, r"no data set 'x'; there are: folder, orders", lambda: log("x")),
        (NotFound, r"'orders' has no '7'; there are: 1", lambda: load("orders@7")),
        (Invalid, r"'orders@1' has a version", lambda: save(orders, "orders@1")),
        (Invalid, r"not an address", lambda: save(orders, "../orders")),
        (Invalid, r"no column 'Preis'; there are: Country, CustomerID", lambda: load("orders", columns=["Preis"])),
        (Invalid, r"no column 'x'", lambda: save(orders, "orders", key="InvoiceNo, x")),
        (Invalid, r"as_ = 'numpy' is not known", lambda: load("orders", as_="numpy")),
        (Invalid, r"folder and cannot be loaded as pandas", lambda: load("folder", as_="pandas")),
        (Invalid, r"leave columns out", lambda: load("folder", columns=["x"])),
        (Invalid, r"Series is not a table", lambda: save(orders["Quantity"], "orders")),
        (Invalid, r"list is not a table", lambda: save([1, 2], "orders")),
        (Invalid, r"column 'x' cannot be saved", lambda: save(pd.DataFrame({"x": [object()]}), "orders")),
        (NotFound, r"there is no file or folder", lambda: save("nowhere.csv", "orders")),
        (Invalid, r"torn.parquet is not a readable Parquet file", lambda: save(shop / "torn.parquet", "orders")),
        (Invalid, r"damaged.parquet is not a readable Parquet file", lambda: save(shop / "damaged.parquet", "orders")),
        (Invalid, r"torn.parquet is not a readable Parquet file", lambda: as_frame(shop / "torn.parquet")),
        (Invalid, r"broken.csv is not a readable CSV file", lambda: as_frame(shop / "broken.csv")),
        (Invalid, r"contains the data store itself", lambda: save(shop, "orders")),
        (Invalid, r"link to a folder", lambda: save(shop / "loop", "orders")),
        (Invalid, r"broken link", lambda: save(shop / "dangling", "orders")),
        (NotFound, r"there is no file .*orders.csv", lambda: as_frame("orders.csv")),
    ]:
        with pytest.raises(kind, match=pattern) as caught:
            call()
        assert type(caught.value) is kind and str(caught.value).count("\n") == 0
    assert sorted(store().rglob("*.json")) == before and len(load("orders")) == 5


def test_nothing_heavy_at_import():
    done = subprocess.run([sys.executable, "-c", "import sys, mlops_nb.data.store; print(sorted({'pandas', 'pyarrow', 'numpy', 'polars'} & set(sys.modules)))"],
                          capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == "[]"


def test_errors_are_of_one_family():
    assert all(issubclass(kind, MlopsError) for kind in (Conflict, Invalid, NotFound, Unavailable))
