"""Who gets in: tokens on disk, changed under running processes, limits across processes, browsers and certificates."""

import json
import logging
import multiprocessing
import os
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from mlops_nb.core.errors import Conflict, Invalid, NotFound, Untrusted
from mlops_nb.core.files import digest_of
from mlops_nb.serve.access import Forbidden, RateLimits, Tokens, Unauthenticated, add_token, listed_tokens, moment, revoke_token, rotate_token
from mlops_nb.serve.edge import Cors, checked_tls

posix = pytest.mark.skipif(os.name != "posix", reason="file modes and fork")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tokens.json"


def records(path) -> dict:
    return json.loads(path.read_text())["tokens"]


def edited(path, **changes) -> None:
    "What somebody does by hand in an editor."
    content = json.loads(path.read_text())
    for name, change in changes.items():
        content["tokens"][name].update(change)
    path.write_text(json.dumps(content))


# the file


def test_a_token_is_256_random_bits_and_is_not_in_the_file(path):
    tokens = [add_token(path, f"client-{n}") for n in range(5)]
    assert len(set(tokens)) == 5 and all(len(token) == 43 for token in tokens)  # 32 bytes in base64
    assert not any(token in path.read_text() or token[:12] in path.read_text() for token in tokens)
    assert records(path)["client-0"]["digest"] == digest_of(tokens[0].encode())


@posix
def test_the_file_is_private_after_every_change(path):
    for change in (lambda: add_token(path, "a"), lambda: add_token(path, "b"), lambda: rotate_token(path, "a"), lambda: revoke_token(path, "b")):
        change()
        assert path.stat().st_mode & 0o777 == 0o600


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o602, 0o601, 0o610])
def test_a_file_that_others_can_reach_is_refused(path, mode):
    add_token(path, "a")
    path.chmod(mode)
    for use in (lambda: Tokens(path), lambda: add_token(path, "b"), lambda: listed_tokens(path)):
        with pytest.raises(Untrusted, match="chmod 600"):
            use()


@posix
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="giving files away needs root")
@pytest.mark.parametrize("owner, mode, opens", [(0, 0o440, True), (0, 0o640, True), (0, 0o444, False), (0, 0o660, False), (10001, 0o400, True), (10001, 0o440, False)])
def test_a_secret_mounted_for_our_group_opens(tmp_path, path, owner, mode, opens):
    add_token(path, "a")
    os.chown(path, owner, 10001)
    path.chmod(mode)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and str(folder).count(os.sep) > 1:
            folder.chmod(0o755)
    code = (f"import os, sys\nfrom mlops_nb.serve.access import Tokens\nimport blake3\nos.setgid(10001); os.setuid(10001)\n"
            f"try: print(len(Tokens({str(path)!r}).known))\nexcept Exception as error: print(type(error).__name__)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == ("1" if opens else "Untrusted"), done.stderr


def test_names_scopes_and_times_are_checked(path):
    add_token(path, "a")
    for call, kind, words in [
        (lambda: add_token(path, "a"), Conflict, "rotate it"), (lambda: add_token(path, "b c"), Invalid, "b c"), (lambda: add_token(path, "a@1"), Invalid, "a@1"),
        (lambda: add_token(path, "b", scopes=()), Invalid, "none"), (lambda: add_token(path, "b", scopes=("root",)), Invalid, "root"),
        (lambda: add_token(path, "b", digest="abc"), Invalid, "64 hex"), (lambda: add_token(path, "b", expires_at="2001-01-01"), Invalid, "over already"),
        (lambda: add_token(path, "b", expires_at="99999d99"), Invalid, "90d"), (lambda: add_token(path, "b", expires_at="99999999d"), Invalid, "90d"),
        (lambda: rotate_token(path, "shop"), NotFound, "there are: a"), (lambda: revoke_token(path, "shop"), NotFound, "there are: a")]:
        with pytest.raises(kind, match=words):
            call()
    assert list(records(path)) == ["a"]


def test_times_to_expire():
    def hours(text):
        return (datetime.fromisoformat(moment(text)) - datetime.now(timezone.utc)).total_seconds() / 3600

    assert moment("") == "" and hours("90d") == pytest.approx(90 * 24, abs=0.01) and hours("12h") == pytest.approx(12, abs=0.01)
    assert moment("2999-01-31") == "2999-01-31T00:00:00Z" and moment("2999-01-31T06:00+02:00") == "2999-01-31T04:00:00Z"


def test_many_processes_add_at_once(path):
    code = "import sys; from mlops_nb.serve.access import add_token; [add_token(sys.argv[1], f'{sys.argv[2]}-{n}') for n in range(8)]"
    running = [subprocess.Popen([sys.executable, "-c", code, str(path), f"p{n}"]) for n in range(3)]
    assert [one.wait(300) for one in running] == [0, 0, 0]
    assert len(records(path)) == 24 and len(Tokens(path).known) == 24
    assert {one.name for one in path.parent.iterdir()} <= {"tokens.json", ".tokens.json.lock"}


def test_a_listing_holds_no_token_and_no_digest(path):
    token = add_token(path, "a", expires_at="1h", scopes=("admin", "predict"))
    rotated = rotate_token(path, "a", grace_s=600)
    (one,) = listed_tokens(path)
    assert one["name"] == "a" and one["scopes"] == "admin, predict" and one["state"] == "valid" and one["old_until"] > one["rotated_at"] >= one["created_at"]
    assert not any(secret in str(one) for secret in (token, rotated, *map(digest_of, (token.encode(), rotated.encode()))))
    edited(path, a={"expires_at": "2001-01-01T00:00:00Z"})
    assert listed_tokens(path)[0]["state"] == "expired"
    assert add_token(path, "a"), "a name whose token is over can be used again"


# asked with every request


@pytest.mark.parametrize("shown", [b"", b"x", b"\xff\xfe", b"a" * 100_000])
def test_strangers_are_not_let_in(path, shown):
    token = add_token(path, "a").encode()
    tokens = Tokens(path)
    for one in (shown, token[:-1], token + b"x", token.swapcase(), digest_of(token).encode()):
        assert tokens.grant(one) is None
    assert tokens.grant(token).name == "a"


@pytest.mark.parametrize("header", [b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic %s", b"%s", b"Bearer %sx", b"Bearer x%s", b"Bearer %s %s"])
def test_headers_that_do_not_open(path, header):
    token = add_token(path, "a").encode()
    with pytest.raises(Unauthenticated, match="Authorization: Bearer"):
        Tokens(path).check(header.replace(b"%s", token), "predict")
    assert Tokens(path).check(b"bEARER  " + token + b" ", "predict").name == "a"


@pytest.mark.parametrize("scopes", [("predict",), ("admin",), ("metrics",), ("predict", "metrics")])
def test_no_scope_contains_another(path, scopes):
    header = b"Bearer " + add_token(path, "a", scopes=scopes).encode()
    for scope in ("predict", "admin", "metrics"):
        if scope in scopes:
            assert Tokens(path).check(header, scope).scopes == set(scopes)
        else:
            with pytest.raises(Forbidden, match=f"this route wants {scope}"):
                Tokens(path).check(header, scope)


def test_digests_that_come_with_the_order(tmp_path):
    tokens = Tokens(None, also=["", digest_of(b"the deployment's own")])
    assert tokens.check(b"Bearer the deployment's own", "admin").name == "owner" and tokens.grant(b"") is None and len(tokens.known) == 1


def within(seconds: float, true) -> bool:
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_a_running_server_follows_the_file(path):
    tokens = Tokens(path)  # not there yet
    first = add_token(path, "a").encode()
    assert within(60, lambda: tokens.grant(first))
    second = rotate_token(path, "a", grace_s=3600).encode()
    assert within(60, lambda: tokens.grant(second)) and tokens.grant(first), "the old token is valid in its grace time"
    third = rotate_token(path, "a", grace_s=3600).encode()
    assert within(60, lambda: tokens.grant(third)) and tokens.grant(second) and tokens.grant(first), "which a later rotation does not end"
    leaked, third = third, rotate_token(path, "a", grace_s=0).encode()
    assert within(60, lambda: tokens.grant(third)) and not any(map(tokens.grant, (first, second, leaked))), "unless it is to end everything at once"
    revoke_token(path, "a")
    assert within(60, lambda: tokens.grant(third) is None) and tokens.grant(first) is None


def test_grace_and_expiry_end_by_themselves(path, monkeypatch):
    first = add_token(path, "a").encode()
    second = rotate_token(path, "a", grace_s=600).encode()
    tokens, now = Tokens(path), time.time
    assert tokens.grant(first) and tokens.grant(second)
    with monkeypatch.context() as later:
        later.setattr(time, "time", lambda: now() + 601)
        assert tokens.grant(first) is None and tokens.grant(second)
    edited(path, a={"expires_at": "2001-01-01T00:00:00Z"})
    assert within(60, lambda: tokens.grant(second) is None)


def test_a_rotated_token_lives_as_long_as_the_old_one_was_made_for(path):
    add_token(path, "a", expires_at="90d")
    edited(path, a={"created_at": "2026-01-01T00:00:00Z", "expires_at": "2999-01-31T00:00:00Z"})
    rotate_token(path, "a")
    one = records(path)["a"]
    lives = datetime.fromisoformat(one["expires_at"]) - datetime.fromisoformat(one["rotated_at"])
    assert abs(lives - (datetime.fromisoformat("2999-01-31T00:00:00Z") - datetime.fromisoformat("2026-01-01T00:00:00Z"))) <= timedelta(seconds=1)


DAMAGE = [b"", b"{", b"[]", b"null", b'{"tokens": []}', b'{"tokens": {"a": {}}}', b'\xff\xfe{"', b'{"tokens": {"a": {"scopes": ["root"], "digest": "%s", "created_at": "", "rotated_at": "", "expires_at": "", "old": {}}}}' % (b"0" * 64),
          b'{"tokens": {"a": {"scopes": ["admin"], "digest": "0", "created_at": "", "rotated_at": "", "expires_at": "", "old": {}}}}',
          b'{"tokens": {"a": {"scopes": ["admin"], "digest": "%s", "created_at": "", "rotated_at": "", "expires_at": "soon", "old": {}}}}' % (b"0" * 64)]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_keeps_what_was_known_and_is_said_once(path, damage, caplog):
    token = add_token(path, "a").encode()
    tokens = Tokens(path)
    good = path.read_bytes()
    path.write_bytes(damage)
    with pytest.raises(Invalid, match="not a file of tokens"):
        Tokens(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            tokens.follow()
            assert tokens.grant(token)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "stays in force" in caplog.text
    path.write_bytes(good)
    os.utime(path, ns=(1, 1))
    revoke_token(path, "a")
    tokens.follow()
    assert tokens.grant(token) is None, "and the repaired file counts"


@posix
@pytest.mark.parametrize("fault", ["gone", "open to all", "a folder"])
def test_a_file_that_cannot_be_used_any_more(path, fault, caplog):
    token = add_token(path, "a").encode()
    tokens, good = Tokens(path), path.read_bytes()
    if fault == "open to all":
        path.chmod(0o666)
    else:
        path.unlink()
        path.mkdir() if fault == "a folder" else None
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tokens.follow()
            assert tokens.grant(token)
    assert len(caplog.records) == 1
    path.rmdir() if fault == "a folder" else path.unlink(missing_ok=True)
    path.write_bytes(good)
    path.chmod(0o600)
    newer = rotate_token(path, "a", grace_s=0).encode()
    tokens.follow()
    assert tokens.grant(newer) and tokens.grant(token) is None


def test_a_wrong_token_is_in_no_log(path, caplog):
    add_token(path, "a")
    tokens = Tokens(path)
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(Unauthenticated) as refused:
            tokens.check(b"Bearer my-secret-of-elsewhere", "predict")
        path.write_text("my-secret-of-elsewhere")
        tokens.follow()
    assert "my-secret" not in caplog.text + str(refused.value)


def test_threads_ask_while_the_file_changes(path):
    "Every one of 40 rotations leaves its two tokens valid at every moment."
    token, stop, refused = add_token(path, "a").encode(), threading.Event(), []
    tokens = Tokens(path)

    def asking():
        while not stop.is_set():
            tokens.next_look = 0
            if tokens.grant(token) is None:
                refused.append(1)

    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(asking)
        for _ in range(40):
            rotate_token(path, "a", grace_s=3600)
        stop.set()
    assert refused == []


# how often


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize("rate, burst, gap, n", [(10, 15, 1 / 30, 90), (5, 5, 0.01, 400), (1, 1, 0.3, 40), (100, 1, 0.003, 300), (7, 20, 0.0, 50), (50, 50, 0.5, 20)])
def test_it_is_a_token_bucket(rate, burst, gap, n):
    "Against the textbook's bucket, which counts tokens (Turner 1986; exact fractions)."
    from fractions import Fraction

    clock = Clock()
    limits = RateLimits(rate, burst, clock=clock)
    level, last, ours, theirs = Fraction(burst), 0, [], []
    for i in range(n):
        at = i * Fraction(gap).limit_denominator(1000)
        clock.now = 1000 + float(at)
        level, last = min(Fraction(burst), level + (at - last) * rate), at
        theirs.append(level >= 1)
        level -= level >= 1
        ours.append(limits.take("a") == 0.0)
    assert ours == theirs


def test_waiting_as_long_as_told_always_helps():
    clock = Clock()
    limits = RateLimits(3, 2, total_per_s=4, total_burst=3, clock=clock)
    passed = 0
    for n in range(200):
        while wait := limits.take(f"client-{n % 3}"):
            assert 0 < wait <= 1
            clock.now += wait
        passed += 1
    assert passed == 200 and clock.now - 1000 == pytest.approx((200 - 3) / 4, rel=0.02)


def test_names_do_not_share_and_all_together_are_bounded():
    clock = Clock()
    limits = RateLimits(1, 2, total_per_s=1, total_burst=5, clock=clock)
    assert [limits.take("a") == 0 for _ in range(4)] == [True, True, False, False], "refused requests cost nothing"
    assert [limits.take(name) == 0 for name in ("b", "b", "c", "c")] == [True, True, True, False]
    assert RateLimits().take("a") == 0.0
    with pytest.raises(Invalid, match="below 0"):
        RateLimits(-1)


def test_memory_does_not_grow_with_names():
    import tracemalloc

    limits = RateLimits(1, 1)
    limits.take("warm")
    tracemalloc.start()
    for n in range(20_000):
        limits.take(f"name-{n}")
    grown = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert grown < 10_000


def spend(limits, passed):
    for _ in range(500):
        if limits.take("a") == 0.0:
            with passed.get_lock():
                passed.value += 1


@posix
def test_forked_workers_share_a_limit():
    limits, fork = RateLimits(1, 60, clock=lambda: 1e6), multiprocessing.get_context("fork")
    passed = fork.Value("i", 0)
    running = [fork.Process(target=spend, args=(limits, passed)) for _ in range(3)]
    for one in running:
        one.start()
    for one in running:
        one.join(300)
    assert 60 <= passed.value <= 75, "one bucket of 60, not three; a race may let few more pass"


# browsers


@pytest.mark.parametrize("origin", ["*", "null", "", "shop.example", "https://shop.example/", "https://Shop.example", "https://shop.example:443", "http://shop.example:80", "https://*.shop.example",
                                    "https://a b", "ftp://shop.example", "https://shop.example\r\nx: y", "https://user@shop.example"])
def test_only_exact_origins_are_taken(origin):
    with pytest.raises(Invalid, match="exactly what a browser sends"):
        Cors([origin])


def test_answers_for_browsers():
    cors = Cors(["https://shop.example", "http://localhost:8888", "http://[::1]:8888"])
    status, headers = cors.preflight(b"http://localhost:8888", b"POST")
    assert status == 204 and dict(headers)[b"access-control-allow-origin"] == b"http://localhost:8888" and b"authorization" in dict(headers)[b"access-control-allow-headers"]
    for origin, method in [(b"https://evil.example", b"POST"), (b"null", b"POST"), (b"https://shop.example.evil", b"GET"), (b"https://shop.example", b"DELETE"), (b"https://shop.example", b"")]:
        answer = cors.preflight(origin, method)
        assert answer is None and not method or answer == (403, ((b"vary", b"origin"),))
    assert dict(cors.headers(b"https://shop.example"))[b"access-control-allow-origin"] == b"https://shop.example"
    assert cors.headers(b"https://evil.example") == ((b"vary", b"origin"),) == cors.headers(b"")
    assert Cors().headers(b"https://shop.example") == () and Cors().preflight(b"https://shop.example", b"POST") is None
    everything = [*cors.headers(b"https://shop.example"), *headers]
    assert not any(b"credentials" in name or value == b"*" for name, value in everything)


# certificates


def issued(folder, *, start=-1, days=90, key=None, password=None, purpose=None, mode=0o600, names=("models.shop.example",)):
    key, now = key or ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, names[0])])
    made = (x509.CertificateBuilder().subject_name(who).issuer_name(who).public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now + timedelta(days=start)).not_valid_after(now + timedelta(days=days, minutes=5)).add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), False))
    if purpose:
        made = made.add_extension(x509.ExtendedKeyUsage([purpose]), False)
    cert_file, key_file = folder / f"{len(list(folder.iterdir()))}.pem", folder / f"{len(list(folder.iterdir()))}.key"
    cert_file.write_bytes(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    locked = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    key_file.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    key_file.chmod(mode)
    return cert_file, key_file


def test_facts_of_a_good_certificate(tmp_path):
    facts = checked_tls(*issued(tmp_path, names=("models.shop.example", "localhost")))
    assert facts["names"] == ["models.shop.example", "localhost"] and facts["days_left"] == 90 and facts["protocol"] == "TLSv1.3" and "warning" not in facts
    assert "renew it" in checked_tls(*issued(tmp_path, days=3))["warning"]
    assert checked_tls(*issued(tmp_path, purpose=x509.ExtendedKeyUsageOID.SERVER_AUTH))["days_left"] == 90


@pytest.mark.parametrize("words, how", [
    ("has expired", {"start": -30, "days": -1}), ("not valid yet", {"start": 5}), ("password", {"password": b"hush"}), ("not issued for a server", {"purpose": x509.ExtendedKeyUsageOID.CLIENT_AUTH}),
    ("too short", {"key": lambda: rsa.generate_private_key(65537, 1024)})])
def test_a_certificate_that_would_not_hold(tmp_path, words, how):
    how = {name: value() if callable(value) else value for name, value in how.items()}
    with pytest.raises(Invalid, match=words):
        checked_tls(*issued(tmp_path, **how))


def test_files_that_do_not_belong_together(tmp_path):
    (one, its_key), (other, other_key) = issued(tmp_path), issued(tmp_path)
    for cert, key, words in [(one, other_key, "does not belong"), (its_key, its_key, "PEM"), (one, one, "not in PEM form|can be read"), (one, tmp_path / "no.key", "no.key is not there"), (tmp_path / "no.pem", its_key, "not there")]:
        with pytest.raises((Invalid, Untrusted), match=words):
            checked_tls(cert, key)


@posix
def test_a_key_that_others_can_read_is_refused(tmp_path):
    with pytest.raises(Untrusted, match="chmod 600"):
        checked_tls(*issued(tmp_path, mode=0o644))


def test_a_checked_certificate_serves_a_real_client(tmp_path):
    import socket

    cert, key = issued(tmp_path, names=("localhost",))
    checked_tls(cert, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(120)
        served = threading.Thread(target=lambda: context.wrap_socket(listener.accept()[0], server_side=True).sendall(b"hello"))
        served.start()
        with ssl.create_default_context(cafile=cert).wrap_socket(socket.create_connection(listener.getsockname(), 120), server_hostname="localhost") as client:
            assert client.recv(5) == b"hello"
        served.join(10)
