"""What would break for people who send one version: a file that is half of it, damage that goes in, a history that is lost; and for those who leave DVC."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlops_nb.core.errors import Conflict, Invalid, NotFound
from mlops_nb.core.settings import in_project, init
from mlops_nb.data.bundles import export, import_
from mlops_nb.data.packs import index_bytes
from mlops_nb.data.remotes import pull
from mlops_nb.data.store import load, save
from mlops_nb.data.versions import manifest_of, manifests, seal, store, version


@pytest.fixture
def ann(tmp_path):
    return init(str(tmp_path / "ann"), name="shop").folder


@pytest.fixture
def ben(tmp_path):
    return init(str(tmp_path / "ben"), name="shop").folder


def table(seed: int = 1, rows: int = 5000) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"line": np.arange(rows), "price": rng.normal(10, 3, rows), "city": rng.choice(["Oslo", "Lyon"], rows)})


@pytest.fixture
def bundle(ann, tmp_path):
    """A table's second version as a file."""
    with in_project(ann):
        save(table(), "orders", message="as delivered", key="line")
        save(table().query("price > 5"), "orders", message="dear ones", key="line")
        export("orders@2", str(tmp_path / "orders.zip"))
    return tmp_path / "orders.zip"


# ---------------------------------------------------------------- there and back
def test_a_table_arrives_with_its_history(bundle, ann, ben):
    with in_project(ann):
        sent = version("orders@2")
    with in_project(ben):
        one = import_(str(bundle))
        assert (one.address, one.digest, one.message, one.key, one.rows) == ("orders@1", sent.digest, "dear ones", "line", sent.rows)
        assert manifest_of(one)["origin"] == {"address": "orders@2", "saved_at": sent.saved_at, "by": sent.by}
        pd.testing.assert_frame_equal(load("orders"), table().query("price > 5"))
        assert import_(str(bundle)).new is False
        save(table(), "orders")
        assert import_(str(bundle)).address == "orders@3"
        assert import_(str(bundle), "orders:from-ann").parent == "orders@3"
        assert import_(str(bundle), "theirs").address == "theirs@1"


def test_a_folder_arrives(ann, ben, tmp_path):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "a.bin").write_bytes(os.urandom(500_000))
    (images / "copy.bin").write_bytes((images / "deep" / "a.bin").read_bytes())
    (images / "run.sh").write_text("echo")
    (images / "run.sh").chmod(0o755)
    (images / "empty").mkdir()
    with in_project(ann):
        save(images, "images")
        report = export("images", str(tmp_path))
    assert report.facts["file"] == str(tmp_path / "images-1.mlops.zip") and report.facts["bytes"] < 600_000
    with in_project(ben):
        place = load(import_(report.facts["file"]).address)
        assert (place / "copy.bin").read_bytes() == (images / "deep" / "a.bin").read_bytes() and os.access(place / "run.sh", os.X_OK) and (place / "empty").is_dir()


def test_unpacked_it_is_a_store_and_a_remote(bundle, ben, tmp_path):
    zipfile.ZipFile(bundle).extractall(tmp_path / "unpacked")
    with in_project(ben):
        pull("orders@2", from_=str(tmp_path / "unpacked"))
        pd.testing.assert_frame_equal(load("orders@2"), table().query("price > 5"))


def test_the_same_version_makes_the_same_bytes(bundle, ann, tmp_path):
    with in_project(ann):
        export("orders@2", str(tmp_path / "again.zip"))
        assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()
        export("orders@2", str(bundle))  # the same is no conflict
        with pytest.raises(Conflict, match="is there already and is something else"):
            export("orders@1", str(bundle))
    assert (tmp_path / "again.zip").read_bytes() == bundle.read_bytes()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


def test_an_export_that_is_killed_leaves_no_file(ann, tmp_path):
    with in_project(ann):
        save(table(), "orders")
    code = "import os, signal, sys\nfrom mlops_nb.data import bundles\nbundles.place = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\nbundles.export('orders', sys.argv[1])"
    target = tmp_path / "out" / "orders.zip"
    assert subprocess.run([sys.executable, "-c", code, str(target)], cwd=ann, env={**os.environ, "MLOPS_PROJECT": str(ann)}, timeout=600).returncode == -signal.SIGKILL
    assert not target.exists()
    with in_project(ann):
        export("orders", str(target))
        assert import_(str(target)).new is False


# ---------------------------------------------------------------- damage
def test_a_flipped_byte_anywhere_is_found(bundle, ben):
    whole = bundle.read_bytes()
    rng = np.random.default_rng(7)
    missed = []
    with in_project(ben):
        for at in [*rng.integers(0, len(whole), 60), *range(len(whole) - 120, len(whole), 7)]:
            hurt = bytearray(whole)
            hurt[at] ^= 1 << int(rng.integers(8))
            bundle.write_bytes(hurt)
            try:
                import_(str(bundle))
                missed.append(int(at))
                pd.testing.assert_frame_equal(load("orders"), table().query("price > 5"))  # a flip of a date or a flag of the zip itself does no harm
            except Invalid as error:
                assert str(bundle) in str(error)
    assert len(missed) < 25


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(share, bundle, ben):
    bundle.write_bytes(bundle.read_bytes()[:int(bundle.stat().st_size * share)])
    with in_project(ben), pytest.raises(Invalid, match="is not a bundle, or is damaged"):
        import_(str(bundle))
    with in_project(ben):
        assert not manifests("orders")


def changed(bundle: Path, change) -> None:
    """The bundle with another manifest and pack."""
    with zipfile.ZipFile(bundle) as old:
        members = {name: old.read(name) for name in old.namelist()}
    members = change(members)
    with zipfile.ZipFile(bundle, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def other_rows(members):
    name = "datasets/orders/2.json"
    return {**members, name: members[name].replace(b'"message": "dear ones"', b'"message": "all there"')}


def without_chunks(members):
    return {name: b"MLOPSPK1" + index_bytes([]) if name.startswith("packs/") else content for name, content in members.items()}


def outside(members):
    facts = json.loads(members.pop("datasets/orders/2.json"))
    facts = {"format": 1, **{key: facts[key] for key in ("name", "version", "rows", "columns", "size_bytes", "key", "saved_at", "by", "message")}, "kind": "folder",
             "files": [{"path": "../../../../evil.txt", "size": 0, "digest": "", "executable": False, "chunks": []}]}
    from mlops_nb.data.versions import content_digest
    return {**members, "datasets/orders/2.json": json.dumps({**facts, "digest": content_digest("folder", facts["files"])}).encode()}


@pytest.mark.parametrize(("change", "words"), [(other_rows, "damaged manifest"), (without_chunks, "incomplete|missing"), (outside, "which is outside of it"),
                                              (lambda members: {**members, "datasets/more/1.json": b"{}"}, "is not a bundle"), (lambda members: {"readme.txt": b"hello"}, "is not a bundle")])
def test_a_file_that_somebody_changed_is_refused(change, words, bundle, ben):
    changed(bundle, change)
    with in_project(ben):
        with pytest.raises(Invalid, match=words):
            import_(str(bundle))
        assert not manifests("orders")


def test_names_that_are_not_there(bundle, ben, tmp_path):
    with in_project(ben):
        with pytest.raises(NotFound, match="there is no file"):
            import_(str(tmp_path / "none.zip"))
        with pytest.raises(NotFound, match="there is no data set 'orders'"):
            export("orders@3")
        with pytest.raises(NotFound, match="to make the branch"):
            import_(str(bundle), "orders:trial")


# ---------------------------------------------------------------- DVC
# What DVC 3.67.1 wrote for these files (`dvc add images orders.csv`)
FILES = {"images/a.txt": (b"a\r\nb\n", "d644a230f3ef20b00879aaceb61790af"), "images/deep/b.txt": (b"world", "7d793037a0760186574b0282f2f435e7"),
         "images/ü.txt": (b"x", "9dd4e461268c8034f5c8564e155c67a6"), "orders.csv": (b"line,price\n1,2.5\n2,3.5\n", "ee44330028fce2e4ee52cdac12a2a3c3")}
LISTING = b'[{"md5": "d644a230f3ef20b00879aaceb61790af", "relpath": "a.txt"}, {"md5": "7d793037a0760186574b0282f2f435e7", "relpath": "deep/b.txt"}, {"md5": "9dd4e461268c8034f5c8564e155c67a6", "relpath": "\\u00fc.txt"}]'
IMAGES = "outs:\n- md5: 9475bc8cc9021299d740c1b466731ea9.dir\n  size: 11\n  nfiles: 3\n  hash: md5\n  path: images\n"
ORDERS = "outs:\n- md5: ee44330028fce2e4ee52cdac12a2a3c3\n  size: 23\n  hash: md5\n  path: orders.csv\n"


@pytest.fixture(params=["work tree", "cache", "old cache", "cache elsewhere"])
def dvc(request, tmp_path):
    """A DVC repository whose content is in one of the places where it may be."""
    repo, text = tmp_path / "repo", (IMAGES, ORDERS)
    (repo / ".dvc").mkdir(parents=True)
    cache = {"cache": repo / ".dvc/cache/files/md5", "old cache": repo / ".dvc/cache", "cache elsewhere": tmp_path / "big" / "files/md5"}.get(request.param)
    if request.param == "cache elsewhere":
        (repo / ".dvc/config").write_text("[core]\n    remote = x\n['remote \"x\"']\n    url = s3://bucket\n[cache]\n    dir = ../../big\n    type = symlink\n")
    contents = {**FILES, "listing": (LISTING, "9475bc8cc9021299d740c1b466731ea9.dir")}
    for path, (content, md5) in contents.items():
        if cache is None and path == "listing":
            continue
        place = cache / md5[:2] / md5[2:] if cache else repo / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    for name, one in zip(("images", "orders.csv"), text):
        (repo / f"{name}.dvc").write_text(one.replace("  hash: md5\n", "") if request.param == "old cache" else one)
    return repo


def test_what_dvc_tracked_arrives(dvc, ben):
    with in_project(ben):
        one = import_(str(dvc / "images.dvc"))
        assert (one.address, one.kind, one.message) == ("images@1", "folder", "from images.dvc, MD5 9475bc8cc9021299d740c1b466731ea9.dir")
        place = load("images")
        assert {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()} == {
            name.removeprefix("images/"): content for name, (content, _) in FILES.items() if name.startswith("images/")}
        one = import_(str(dvc / "orders.csv.dvc"), "shop-orders")
        assert load(one.address, as_="pandas")["price"].tolist() == [2.5, 3.5]
        assert import_(str(dvc / "orders.csv.dvc"), "shop-orders").new is False


def test_what_is_not_what_dvc_tracked_is_refused(dvc, ben):
    for path in dvc.parent.rglob("*"):
        if path.is_file() and path.read_bytes() in (b"world", FILES["orders.csv"][0]):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with in_project(ben):
        for name in ("images", "orders.csv"):
            with pytest.raises(Invalid, match="dvc checkout"):
                import_(str(dvc / f"{name}.dvc"))
        assert not (store() / "datasets").exists()


def test_what_is_gone_is_named(dvc, ben):
    for path in dvc.parent.rglob("*"):
        if path.is_file() and path.read_bytes() == FILES["orders.csv"][0]:
            path.unlink()
    with in_project(ben), pytest.raises(NotFound, match="orders.csv of .* is neither in the DVC cache nor beside it; run `dvc pull`"):
        import_(str(dvc / "orders.csv.dvc"))


def test_text_that_an_older_dvc_tracked_with_plain_line_ends(ben, tmp_path):
    (tmp_path / "notes.txt").write_bytes(b"a\r\nb\r\n")
    plain = hashlib.md5(b"a\nb\n").hexdigest()
    (tmp_path / "notes.txt.dvc").write_text(f"outs:\n- md5: {plain}\n  size: 6\n  path: notes.txt\n")
    with in_project(ben):
        assert load(import_(str(tmp_path / "notes.txt.dvc")).address).read_bytes() == b"a\r\nb\r\n"
        (tmp_path / "notes.txt.dvc").write_text(f"outs:\n- md5: {plain}\n  size: 6\n  hash: md5\n  path: notes.txt\n")
        with pytest.raises(Invalid, match="is not what"):
            import_(str(tmp_path / "notes.txt.dvc"))


def test_a_parquet_file_of_dvc_has_its_rows(ben, tmp_path):
    table().to_parquet(tmp_path / "orders.parquet")
    md5 = hashlib.md5((tmp_path / "orders.parquet").read_bytes()).hexdigest()
    (tmp_path / "orders.parquet.dvc").write_text(f"outs:\n- md5: {md5}\n  hash: md5\n  path: orders.parquet\n")
    with in_project(ben):
        assert import_(str(tmp_path / "orders.parquet.dvc")).rows == 5000
        pd.testing.assert_frame_equal(load("orders", as_="pandas"), table())


@pytest.mark.parametrize("text", ["", "a: [", "outs: []", "outs:\n- path: x\n", "outs:\n- md5: zz\n  path: x\n", "stages: {}", "- 1",
                                  "outs:\n- {md5: ee44330028fce2e4ee52cdac12a2a3c3, path: a}\n- {md5: ee44330028fce2e4ee52cdac12a2a3c3, path: b}\n"])
def test_a_dvc_file_that_is_none(text, ben, tmp_path):
    (tmp_path / "x.dvc").write_text(text)
    with in_project(ben), pytest.raises(Invalid, match="does not track one file or folder"):
        import_(str(tmp_path / "x.dvc"))


def test_a_list_of_dvc_cannot_reach_outside(ben, tmp_path):
    (tmp_path / "secret").write_text("s")
    listing = json.dumps([{"md5": hashlib.md5(b"s").hexdigest(), "relpath": "../secret"}]).encode()
    md5 = hashlib.md5(listing).hexdigest()
    place = tmp_path / ".dvc/cache/files/md5" / md5[:2] / f"{md5[2:]}.dir"
    place.parent.mkdir(parents=True)
    place.write_bytes(listing)
    (tmp_path / "data.dvc").write_text(f"outs:\n- md5: {md5}.dir\n  hash: md5\n  path: data\n")
    (tmp_path / "data").mkdir()
    with in_project(ben), pytest.raises(Invalid, match="outside of it"):
        import_(str(tmp_path / "data.dvc"))
