"""What would break for people who share data: a version lost in a race, half a push that looks whole, damage that travels, a password in a message."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from patience import finished, started

from mlops_nb.core.errors import Conflict, Invalid, MlopsError, NotFound, Unavailable
from mlops_nb.core.files import digest_of, write_atomic
from mlops_nb.core.settings import DataSection, in_project, init
from mlops_nb.data import remotes, transfer
from mlops_nb.data.branches import merge, tag
from mlops_nb.data.remotes import Line, pull, push
from mlops_nb.data.store import load, save
from mlops_nb.data.transfer import remote_at, without_secrets
from mlops_nb.data.versions import branches, chunks_of, content_digest, datasets, manifest, manifests, packs_of, place_of, store, tags, version, versions

KINDS = ["folder", "file", "memory", "s3"]


@pytest.fixture(scope="module")
def server():
    """A real S3 API server of our own, on a free port."""
    moto = pytest.importorskip("moto.server")
    one = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    yield "http://{}:{}".format(*one.get_host_and_port())
    one.stop()


@pytest.fixture
def cloud(server, monkeypatch):
    """The environment of somebody who may use the bucket."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLOPS_"))]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "s3cr3t", "AWS_DEFAULT_REGION": "us-east-1", "MLOPS_PROGRESS": "0",
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nowhere/credentials", "AWS_CONFIG_FILE": "/nowhere/config", "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def at(cloud, tmp_path):
    """A fresh remote of a kind."""
    def make(kind: str) -> str:
        if kind == "s3":
            bucket = f"shop-{uuid.uuid4().hex[:12]}"
            import s3fs
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
            return f"s3://{bucket}/data"
        return {"folder": str(tmp_path / "shared"), "file": f"file://{tmp_path}/shared", "memory": f"memory://{uuid.uuid4().hex}"}[kind]
    return make


@pytest.fixture
def people(tmp_path):
    """Projects of people, by name."""
    def of(name: str) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            init(str(folder), name="shop")
        return folder
    return of


def table(seed: int, rows: int = 5000) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"line": np.arange(rows), "price": rng.normal(10, 3, rows), "city": rng.choice(["Oslo", "Lyon", "Kyoto"], rows), "note": rng.integers(0, 10**9, rows).astype(str)})


def everything(url: str, where: Path) -> None:
    """An empty store can pull all there is, and load all of it."""
    init(str(where), name="check")
    with in_project(where):
        pull(from_=url)
        for name in [line for one in datasets() for line in (one, *branches(one))]:
            for one in versions(name):
                load(one.address)


def packs_at(url: str) -> dict[str, int]:
    return remote_at(url).files("packs")


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_saved_arrives(kind, at, people, tmp_path):
    url, images = at(kind), tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    (images / "deep" / "a.bin").write_bytes(os.urandom(300_000))
    (images / "run.sh").write_text("echo")
    (images / "run.sh").chmod(0o755)
    (images / "empty").mkdir()
    with in_project(people("ann")):
        save(table(1), "orders", message="as delivered", key="line")
        save(table(1).query("price > 5"), "orders", message="dear ones")
        save(table(1).query("price > 9"), "orders:dearer")
        save(images, "images")
        save(table(3), "orders2")
        tag("orders@1", "audit")
        report = push(to=url)
        names = ["orders", "orders:dearer", "images", "orders2"]
        kept = {one: {number: path.read_bytes() for number, path in manifests(one).items()} for one in names}
    assert {row["version"] for row in report.facts["versions"]} == {"orders@1", "orders@2", "orders:dearer@1", "images@1", "orders2@1"}
    with in_project(people("ben")):
        pull("orders", from_=url)
        assert sorted(os.listdir(store() / "datasets")) == ["orders"]
        pull(from_=url)
        assert {one: {number: path.read_bytes() for number, path in manifests(one).items()} for one in names} == kept
        pd.testing.assert_frame_equal(load("orders@audit"), table(1))
        pd.testing.assert_frame_equal(load("orders:dearer"), table(1).query("price > 9"))
        place = load("images")
        assert (place / "deep/a.bin").read_bytes() == (images / "deep/a.bin").read_bytes() and os.access(place / "run.sh", os.X_OK) and (place / "empty").is_dir()
        assert pull(from_=url).facts["summary"] == push(to=url).facts["summary"] == "Everything is there already."


def test_a_folder_remote_opens_as_a_store(at, people, tmp_path):
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=at("folder"))
    folder = init(str(tmp_path / "reader"), name="reader").folder
    write_atomic(folder / "settings.ini", f"[project]\nname = reader\n[data]\nstore = {tmp_path / 'shared'}\n")
    with in_project(folder):
        pd.testing.assert_frame_equal(load("orders@1"), table(1))
        assert save(table(1), "orders").new is False


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_only_what_the_other_side_lacks_travels(kind, at, people):
    url, wide = at(kind), table(1, 200_000)
    with in_project(people("ann")):
        save(wide, "orders")
        first = push(to=url).facts["bytes"]
        save(pd.concat([wide, table(2, 100)], ignore_index=True), "orders", message="100 more")
        assert 0 < push(to=url).facts["bytes"] < 0.1 * first
        save(wide, "copy")
        assert push(to=url).facts["bytes"] == 0
    with in_project(people("ben")):
        pull("orders@1", from_=url)
        assert list(manifests("orders")) == [1] and not manifests("copy")
        report = pull("orders", from_=url)
        assert 0 < report.facts["bytes"] < 0.1 * first
        assert [row["version"] for row in report.facts["versions"]] == ["orders@2"]


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_many_packs_in_parallel(kind, at, people, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SENT_BYTES", 150_000)
    url = at(kind)
    with in_project(people("ann")):
        save(table(1, 100_000), "orders")
        report = push(to=url)
    assert report.facts["packs"] == len(packs_at(url)) > 8
    assert max(packs_at(url).values()) < 150_000 + (256 << 10) + 10_000
    everything(url, tmp_path / "check")


def test_a_version_and_those_before_it(at, people):
    url = at("memory")
    with in_project(people("ann")):
        for seed in (1, 2, 3):
            save(table(seed), "orders")
        save(table(9), "orders:trial")
        assert [row["version"] for row in push("orders@2", to=url).facts["versions"]] == ["orders@1", "orders@2"]
        assert [row["version"] for row in push("orders:trial", to=url).facts["versions"]] == ["orders:trial@1"]
        assert [row["version"] for row in push("orders", to=url).facts["versions"]] == ["orders@3"]
        digest = version("orders@2").digest
    with in_project(people("ben")):
        assert [row["version"] for row in pull(f"orders@{digest[:8]}", from_=url).facts["versions"]] == ["orders@2"]
        assert [row["version"] for row in pull("orders", from_=url).facts["versions"]] == ["orders@1", "orders@3", "orders:trial@1"]


def test_a_version_of_the_first_format_travels(at, people):
    url, content = at("memory"), os.urandom(100_000)
    with in_project(people("ann")):
        save(table(1), "other")
        digest = digest_of(content)
        write_atomic(store() / "objects" / digest[:2] / digest, content)
        files = [{"path": "photo.raw", "size": len(content), "digest": digest, "executable": False, "chunks": [[digest, len(content)]]}]
        facts = {"format": 1, "name": "photos", "version": 1, "digest": content_digest("file", files), "kind": "file", "rows": None, "columns": None, "size_bytes": len(content),
                 "added_bytes": len(content), "files": files, "key": "", "parent": "", "message": "old", "saved_at": "2026-01-01T00:00:00Z", "by": "ann", "commit": "", "run": ""}
        write_atomic(place_of("photos") / "1.json", json.dumps(facts))
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        assert load("photos").read_bytes() == content


# ---------------------------------------------------------------- killed in the middle
KILLER = """
import itertools, os, signal, sys, time
from mlops_nb.data import transfer
from mlops_nb.data.remotes import pull, push
from mlops_nb.data.packs import Writer
transfer.SENT_BYTES = 150_000
verb, url, stop, when = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
numbers, (owner, name) = itertools.count(1), (transfer.Remote, "put") if verb == "push" else (Writer, "finish")
real = getattr(owner, name)
def put(self, *args, **more):
    number = next(numbers)  # several threads send at once
    if number > stop or (number == stop and when == "before"):
        time.sleep(60 if number > stop else 0)  # the ones behind do not get there before the kill
        os.kill(os.getpid(), signal.SIGKILL)
    done = real(self, *args, **more)
    if number == stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return done
setattr(owner, name, put)
(push if verb == "push" else lambda to: pull(from_=to))(to=url)
"""


def killed(verb: str, folder: Path, url: str, stop: int, when: str) -> int:
    return subprocess.run([sys.executable, "-c", KILLER, verb, url, str(stop), when], cwd=folder, env={**os.environ, "MLOPS_PROJECT": str(folder)}, capture_output=True, timeout=300).returncode


@pytest.mark.parametrize(("kind", "stop", "when"), [("folder", 1, "before"), ("folder", 2, "after"), ("folder", 5, "before"), ("s3", 3, "after"), ("s3", 1000, "manifest")])
def test_a_push_that_was_killed_goes_on_where_it_stopped(kind, stop, when, at, people, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SENT_BYTES", 150_000)
    url = at(kind)
    with in_project(people("ann")):
        save(table(1, 30_000), "orders")
        save(table(2, 30_000), "orders")
        needed = {digest for one in manifests("orders").items() for digest in chunks_of(manifest("orders", *one), packs_of())}
        groups = len(transfer.batches(packs_of(), needed))
    stop = groups + 2 if when == "manifest" else stop
    assert killed("push", people("ann"), url, stop, "before" if when == "manifest" else when) == -signal.SIGKILL
    there = packs_at(url)
    assert there or when == "before"
    everything(url, tmp_path / "half")  # what is listed is whole
    with in_project(people("ann")):
        known = transfer.known_packs(remote_at(url))[0]
        left = sum(next(packs_of().copies(digest))[2] for digest in known.lacks(needed))
        report = push(to=url)
        assert left <= report.facts["bytes"] <= left * 1.02 + 1000  # the chunks that were missing, and their index
        assert set(there) <= set(packs_at(url))
        assert (left == 0) == (when == "manifest")
    everything(url, tmp_path / "whole")
    with in_project(tmp_path / "whole"):
        assert len(versions("orders")) == 2


def test_a_pull_that_was_killed_goes_on_where_it_stopped(at, people, monkeypatch):
    monkeypatch.setattr(transfer, "SENT_BYTES", 150_000)
    url = at("s3")
    with in_project(people("ann")):
        save(table(1, 60_000), "orders")
        push(to=url)
    assert killed("pull", people("ben"), url, 4, "after") == -signal.SIGKILL
    with in_project(people("ben")):
        assert not manifests("orders")
        whole = sum(packs_at(url).values())
        assert pull(from_=url).facts["bytes"] < 0.9 * whole
        pd.testing.assert_frame_equal(load("orders"), table(1, 60_000))


# ---------------------------------------------------------------- damage
def flip(url: str, path: str, at_byte: int) -> None:
    remote = remote_at(url)
    content = bytearray(remote.read(path))
    content[at_byte] ^= 1
    place = Path(remote.root) / path
    if remote.scheme == "file":
        place.chmod(0o644)
        place.write_bytes(content)
    else:
        remote.fs.pipe_file(f"{remote.root}/{path}", bytes(content))


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_a_flipped_byte_is_found_and_nothing_of_that_version_is_saved(kind, at, people):
    url = at(kind)
    with in_project(people("ann")):
        save(table(1), "good")
        push(to=url)
        before = set(packs_at(url))
        save(table(2), "orders")
        push(to=url)
    hurt, = set(packs_at(url)) - before
    flip(url, hurt, 5000)
    with in_project(people("ben")):
        with pytest.raises(Invalid, match="orders@1 cannot be pulled: 1 of its chunks are damaged at .*" + hurt.removeprefix("packs/")):
            pull(from_=url)
        assert not manifests("orders")
        pd.testing.assert_frame_equal(load("good"), table(1))
    remote = remote_at(url)
    remote.fs.rm(f"{remote.root}/{hurt}")  # what the message says
    with in_project(people("ann")):
        assert "versions" not in push("orders@1", to=url).facts
    with in_project(people("ben")):
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders"), table(2))


@pytest.mark.parametrize("kind", ["folder", "memory"])
@pytest.mark.parametrize("hurt", ["index", "cut short", "manifest"])
def test_damage_at_the_remote_is_named(kind, hurt, at, people, tmp_path):
    url = at(kind)
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
        pack, = packs_at(url)
        remote = remote_at(url)
        if hurt == "cut short":
            content = remote.read(pack)[:-1000]
            remote.put(pack, content)
        else:
            flip(url, pack if hurt == "index" else "datasets/orders/1.json", -60)
    with in_project(people("ben")):
        with pytest.raises(Invalid, match="missing at" if hurt != "manifest" else "damaged manifest at"):
            pull(from_=url)
        assert not manifests("orders")
    if hurt != "manifest":
        with in_project(people("ann")):
            assert "counts as absent" in str(push("orders@1", to=url).facts["notes"])
        everything(url, tmp_path / "check")  # pushed again under the same name


def test_a_pull_by_number_mends_a_damaged_store(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
        pack, = (store() / "packs").glob("*.pack")
        pack.chmod(0o644)
        content = bytearray(pack.read_bytes())
        content[3000] ^= 1
        pack.write_bytes(content)
        place = manifests("orders")[1]
        place.write_text(place.read_text().replace("orders", "orderz"))
        with pytest.raises(Invalid, match="pull it from the remote"):
            load("orders@1")
        pull("orders@1", from_=url)
        pd.testing.assert_frame_equal(load("orders@1"), table(1))


# ---------------------------------------------------------------- two at once
def both_go_on(at, people, kind) -> str:
    url = at(kind)
    with in_project(people("ann")):
        save(table(1), "orders", key="line")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        save(table(1).assign(city=lambda rows: rows["city"].str.upper()), "orders", message="shouted")
    with in_project(people("ann")):
        save(table(1).assign(price=lambda rows: rows["price"].round(1)), "orders", message="rounded")
    return url


@pytest.mark.parametrize("kind", KINDS)
def test_two_pushes_at_the_same_moment_lose_nothing(kind, at, people, tmp_path, monkeypatch):
    url, meet, real, outcome = both_go_on(at, people, kind), threading.Barrier(2), remotes.send, {}

    def together(*args):  # both have compared by now, and found nothing in their way
        done = real(*args)
        meet.wait(300)
        return done

    monkeypatch.setattr(remotes, "send", together)

    def go(name: str) -> None:
        with in_project(people(name)):
            try:
                outcome[name] = push(to=url)
            except Conflict as error:
                outcome[name] = error

    finished(started(*(partial(go, name) for name in ("ann", "ben"))), timeout_s=900)
    monkeypatch.setattr(remotes, "send", real)
    late, = [name for name, what in outcome.items() if isinstance(what, Conflict)]
    first, = {"ann", "ben"} - {late}
    for part in ("orders@2", f"saved it at 20", {"ann": "(rounded)", "ben": "(shouted)"}[first], "pull('orders')", "merge('orders:remote')", "push again"):
        assert part in str(outcome[late])
    with in_project(people(late)):
        mine = manifests("orders")[2].read_bytes()
        assert "merge('orders:remote')" in str(pull(from_=url).facts["notes"])
        assert manifests("orders")[2].read_bytes() == mine, "what was saved here is never replaced"
        merge("orders:remote")
        push(to=url)
        assert push(to=url).facts["summary"] == pull(from_=url).facts["summary"] == "Everything is there already."
    wanted = table(1).assign(price=lambda rows: rows["price"].round(1), city=lambda rows: rows["city"].str.upper())
    with in_project(people(first)):
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders@3"), wanted)
        save(wanted.head(10), "orders")
        push(to=url)
    with in_project(people(late)):
        pull(from_=url)
        assert len(load("orders@4")) == 10
    everything(url, tmp_path / "check")


def test_what_both_have_can_be_sent_from_a_line_that_split(at, people):
    url = both_go_on(at, people, "memory")
    with in_project(people("ben")):
        push(to=url)
    with in_project(people("ann")):
        remote = remote_at(url)
        [remote.fs.rm(f"{remote.root}/{pack}") for pack in packs_at(url)]
        assert push("orders@1", to=url).facts["bytes"] > 0
        with pytest.raises(Conflict):
            push("orders@2", to=url)
        pull("orders@1", from_=url)
        assert not branches("orders")
        with in_project(people("ben")):
            push("orders@2", to=url)
        pull(from_=url)
        with pytest.raises(Invalid, match="is what a pull put beside yours"):
            push("orders:remote", to=url)


def test_saving_in_a_folder_remote_and_pushing_to_it(at, people, tmp_path):
    """Somebody works in the shared folder itself while others push to it."""
    url = at("folder")
    write_atomic(people("carl") / "settings.ini", f"[project]\nname = shop\n[data]\nstore = {url}\n")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
        save(table(2), "orders")
    with in_project(people("carl")):
        save(table(3), "orders")
    with in_project(people("ann")), pytest.raises(Conflict, match="orders@2"):
        push(to=url)
    with in_project(people("carl")):
        pd.testing.assert_frame_equal(load("orders@2"), table(3))


def test_damaged_tags_at_the_remote(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        tag("orders@1", "audit")
        push(to=url)
        remote_at(url).put("datasets/orders/tags.json", b"[1")
        for verb in (lambda: push(to=url), lambda: pull(from_=url)):
            with pytest.raises(Invalid, match="the tags of orders at .* are damaged"):
                verb()


def test_the_line_can_split_again_and_again(at, people):
    url = both_go_on(at, people, "memory")
    for turn in range(3):
        with in_project(people("ann")):
            pull(from_=url)
            if "orders:remote" in branches("orders"):
                merge("orders:remote")
            save(load("orders").assign(**{f"ann {turn}": turn}), "orders")
            push(to=url)
        with in_project(people("ben")):
            save(load("orders").assign(**{f"ben {turn}": turn}), "orders")
            with pytest.raises(Conflict, match="merge"):
                push(to=url)
            pull(from_=url)
            merge("orders:remote")
            push(to=url)
    with in_project(people("ann")):
        pull(from_=url)
        last = load("orders")
    assert {f"{who} {turn}" for who in ("ann", "ben") for turn in range(3)} <= set(last.columns)
    assert last["city"].str.isupper().all()


def test_a_branch_that_split_is_put_aside_too(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        save(table(2), "orders:trial")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        save(table(3), "orders:trial")
        push(to=url)
    with in_project(people("ann")):
        save(table(4), "orders:trial")
        save(table(5), "orders")
        with pytest.raises(Conflict, match="orders:trial@2 .* under another name"):
            push(to=url)
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders:trial-remote"), table(3))
        save(load("orders:trial"), "orders:trial2")
        with pytest.raises(Conflict):
            push(to=url)
    with in_project(people("ben")):  # the lines that had no conflict arrived all the same
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders"), table(5))
        pd.testing.assert_frame_equal(load("orders:trial2"), table(4))


def test_equal_data_saved_by_both_is_no_conflict(at, people):
    url = at("memory")
    for name in ("ann", "ben"):
        with in_project(people(name)):
            save(table(1), "orders", message=name)
            push(to=url)
    with in_project(people("ben")):
        assert version("orders@1").message == "ben"
        save(table(2), "orders")
        push(to=url)
    with in_project(people("ann")):
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders@2"), table(2))


def test_lines_that_meet_by_chance_are_still_split(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
    for name, seed in (("ann", 2), ("ben", 3)):
        with in_project(people(name)):
            save(table(seed), "orders")
            save(table(1), "orders", message=f"{name} went back")
            if name == "ann":
                push(to=url)
            else:
                with pytest.raises(Conflict, match="orders@2"):
                    push(to=url)


def test_nothing_is_sent_over_a_line_that_has_nothing_in_common(at, people):
    url = at("memory")
    for name, seed in (("ann", 1), ("ben", 2)):
        with in_project(people(name)):
            save(table(seed), "orders")
            if name == "ann":
                push(to=url)
                continue
            with pytest.raises(Conflict, match="another name"):
                push(to=url)
            pull(from_=url)
            pd.testing.assert_frame_equal(load("orders:remote@1"), table(1))
            pd.testing.assert_frame_equal(load("orders@1"), table(2))


# ---------------------------------------------------------------- tags
@pytest.mark.parametrize("kind", ["folder", "memory", "s3"])
def test_tags_travel_and_those_that_differ_are_kept_and_said(kind, at, people, monkeypatch):
    url = at(kind)
    with in_project(people("ann")):
        save(table(1), "orders")
        save(table(2), "orders")
        tag("orders@1", "audit")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        assert tags("orders") == {"audit": 1}
        tag("orders@2", "audit")
        tag("orders@2", "ben")
        assert "the tag audit of orders is @2 here and @1 there" in str(push(to=url).facts["notes"])
        assert tags("orders") == {"audit": 2, "ben": 2}
    real, late = transfer.Remote.read, []

    def read(self, path, *args):  # between our reading and our writing somebody else writes
        content = real(self, path, *args)
        if path.endswith("tags.json") and not late and kind != "folder":
            late.append(1)
            self.fs.pipe_file(f"{self.root}/{path}", json.dumps({"audit": 1, "ben": 2, "late": 1}).encode())
        return content

    with in_project(people("ann")):
        tag("orders@2", "ann")
        if kind == "s3":
            monkeypatch.setattr(transfer.Remote, "read", read)
        push(to=url)
        there = json.loads(real(remote_at(url), "datasets/orders/tags.json"))
        assert there == {"audit": 1, "ben": 2, "ann": 2, **({"late": 1} if kind == "s3" else {})}


# ---------------------------------------------------------------- what a person is told
def test_a_dead_server_is_one_sentence(cloud, people, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with in_project(people("ann")):
        save(table(1), "orders")
        for verb in (lambda: push(to="s3://shop/data"), lambda: pull(from_="s3://shop/data")):
            with pytest.raises(Unavailable, match=r"^s3://shop/data does not answer \(EndpointConnectionError: .*\); check the address and the connection and try again") as caught:
                verb()
            assert "\n" not in str(caught.value)


def test_a_server_that_dies_in_the_middle(at, people, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "SENT_BYTES", 150_000)
    url, real, count = at("s3"), transfer.Remote.put, []

    def put(self, path, content, **more):
        count.append(path)
        if len(count) > 3:
            raise ConnectionResetError("connection reset by peer")
        return real(self, path, content, **more)

    with in_project(people("ann")):
        save(table(1, 60_000), "orders")
        with monkeypatch.context() as patch:
            patch.setattr(transfer.Remote, "put", put)
            with pytest.raises(Unavailable, match="does not answer .*reset by peer"):
                push(to=url)
        push(to=url)
    everything(url, tmp_path / "check")


def test_without_credentials_and_without_a_bucket(at, people, monkeypatch):
    with in_project(people("ann")):
        save(table(1), "orders")
        with pytest.raises(NotFound, match="s3://no-such-bucket/x lacks something .* make the bucket"):
            push(to="s3://no-such-bucket/x")
        url = at("s3")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(Unavailable, match="does not let us in .*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            push(to=url)


def test_no_secret_is_repeated(people, cloud, monkeypatch):
    assert without_secrets("s3://user:pa55@bucket/x") == "s3://bucket/x"
    assert without_secrets("cannot reach https://a.blob.core.windows.net/c?sig=abc&se=1 now") == "cannot reach https://a.blob.core.windows.net/c now"
    assert without_secrets("abfs://container@account.dfs.core.windows.net/x") == "abfs://container@account.dfs.core.windows.net/x"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with in_project(people("ann")):
        save(table(1), "orders")
        with pytest.raises(MlopsError) as caught:
            push(to="s3://user:pa55word@bucket/x")
    assert "pa55word" not in str(caught.value) and "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize(("url", "error", "words"), [
    ("", Invalid, "set .data. remote in settings.ini"),
    ("zork://bucket", Unavailable, "expected s3://, gs://, abfs://, file://, memory:// or a folder"),
    (".mlops/data", Invalid, "is the data store itself"),
])
def test_a_remote_that_cannot_be(url, error, words, people, monkeypatch):
    monkeypatch.chdir(people("ann"))
    save(table(1), "orders")
    with pytest.raises(error, match=words):
        push(to=url)


@pytest.mark.parametrize(("url", "driver", "extra"), [("gs://b/x", "gcsfs", "gs"), ("abfs://c@a/x", "adlfs", "azure"), ("s3://b/x", "s3fs", "s3")])
def test_a_missing_driver_says_what_to_install(url, driver, extra, people, monkeypatch):
    monkeypatch.setitem(sys.modules, driver, None)
    with in_project(people("ann")):
        save(table(1), "orders")
        with pytest.raises(Unavailable, match=rf"{driver} is not installed; .*mlops_nb\[{extra}\]"):
            push(to=url)


def test_names_that_are_not_there(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
        with pytest.raises(NotFound, match="did you mean orders"):
            push("ordres", to=url)
        with pytest.raises(NotFound, match="has no data set 'ordres'; did you mean orders"):
            pull("ordres", from_=url)
        with pytest.raises(NotFound, match="has no '7'"):
            pull("orders@7", from_=url)


def test_a_full_disk_leaves_the_store_good(at, people, monkeypatch):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
    import errno

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with in_project(people("ben")):
        save(table(2), "other")
        with monkeypatch.context() as patch:
            patch.setattr("mlops_nb.data.packs.os.fsync", full)
            with pytest.raises(Unavailable, match="the disk is full"):
                pull(from_=url)
        assert not manifests("orders")
        pd.testing.assert_frame_equal(load("other"), table(2))
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders"), table(1))


def test_a_branch_of_ones_own_called_remote_travels(at, people):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        save(table(2), "orders:remote")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders:remote"), table(2))


def test_a_remote_cannot_make_us_write_outside(at, people, tmp_path):
    url, folder = at("memory"), tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    with in_project(people("ann")):
        with monkeypaths("../../../../escaped.txt"):
            save(folder, "pictures")
        push(to=url)
    with in_project(people("ben")):
        with pytest.raises(Invalid, match="names a file '../../../../escaped.txt', which is outside of it"):
            pull(from_=url)
        assert not manifests("pictures")


@contextmanager
def monkeypaths(path: str):
    """Whoever saves here gives his file this path."""
    from mlops_nb.data import chunks

    real = chunks.entry_of
    chunks.entry_of = lambda name, facts, mode: real(path, facts, mode)
    try:
        yield
    finally:
        chunks.entry_of = real


def test_a_damaged_cache_is_read_anew(at, people, tmp_path):
    url = at("memory")
    with in_project(people("ann")):
        save(table(1), "orders")
        push(to=url)
        push(to=url)
        cached, = (people("ann") / ".mlops" / "cache" / "indexes").glob("*.pack")
        cached.write_bytes(cached.read_bytes()[:-5] + b"junk!")
        report = push("orders@1", to=url)
        assert report.facts["bytes"] == 0 and "notes" not in report.facts


@pytest.mark.skipif("remote" not in DataSection.model_fields, reason="core/settings has no [data] remote yet")
def test_the_remote_of_the_settings(people, tmp_path):
    for name in ("ann", "ben"):
        write_atomic(people(name) / "settings.ini", "[project]\nname = shop\n[data]\nremote = ../shared\n")
    with in_project(people("ann")):
        save(table(1), "orders")
        push()
    assert (tmp_path / "shared" / "datasets" / "orders" / "1.json").is_file(), "relative to the project, whatever the working directory is"
    with in_project(people("ben")):
        pull()
        pd.testing.assert_frame_equal(load("orders"), table(1))


def test_a_remote_that_has_gone_further(at, people):
    url = both_go_on(at, people, "memory")
    with in_project(people("ann")):
        save(table(1).assign(price=0.0), "orders")
        save(table(1).assign(price=1.0), "orders")
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        merge("orders:remote")
        push(to=url)
        newest = version("orders")
    with in_project(people("ann")):
        pull(from_=url)
        assert version("orders").digest == newest.digest
        assert load("orders")["city"].str.isupper().all() and (load("orders")["price"] == 1).all()


def test_merging_what_came_after_a_merge_takes_nothing_back(at, people):
    url = both_go_on(at, people, "memory")
    with in_project(people("ann")):
        push(to=url)
    with in_project(people("ben")):
        pull(from_=url)
        merge("orders:remote")
    with in_project(people("ann")):  # goes on before Ben has pushed what he merged
        save(load("orders").assign(more=1), "orders")
        push(to=url)
    with in_project(people("ben")):
        with pytest.raises(Conflict, match="orders@3"):
            push(to=url)
        pull(from_=url)
        merge("orders:remote")
        together = load("orders")
        assert "more" in together and together["city"].str.isupper().all() and (together["price"] == together["price"].round(1)).all()
        push(to=url)
    with in_project(people("ann")):
        pull(from_=url)
        pd.testing.assert_frame_equal(load("orders"), together)
