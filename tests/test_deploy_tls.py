"""A deployment on this machine over TLS: who is answered, who is refused, and what happens when a certificate is renewed."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import httpx
import pytest
from patience import finished, started, until
from test_deploy import ROWS, gone, registered, shop  # noqa: F401

trustme = pytest.importorskip("trustme", reason="trustme makes the certificates: pip install trustme")

from mlops_nb.core.errors import Invalid, Unavailable, Untrusted
from mlops_nb.core.settings import DeploySection
from mlops_nb.deploy.deployments import deploy, deployment, record_of, states, undeploy
from mlops_nb.deploy.swap import caution
from mlops_nb.deploy.tokens import token_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="local deployments hand over ports as POSIX systems do")
NAME = "models.shop.example"


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


def issued(folder: Path, authority, *names: str, **more) -> None:
    "cert.pem and key.pem of a server, as somebody who renews them puts them there; ca.pem of their authority."
    made = authority.issue_cert(*(names or (NAME,)), **more)
    (folder / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
    (folder / "key.pem").touch(mode=0o600)
    made.private_key_pem.write_to_path(folder / "key.pem")
    authority.cert_pem.write_to_path(folder / "ca.pem")


def set_to(folder: Path, **settings) -> None:
    "The section of the deployment."
    file = folder / "settings.ini"
    file.write_text("\n".join([file.read_text().partition("[deploy.large]")[0], "[deploy.large]", *(f"{key} = {value}" for key, value in settings.items()), ""]))


@pytest.fixture
def secure(shop, authority):  # noqa: F811
    "The shop with a certificate; its own client trusts that one certificate."
    issued(shop, authority)
    set_to(shop, cert="cert.pem", cert_key="key.pem")
    return shop


def ask(url: str, verify: object = True, name: str = NAME) -> httpx.Response:
    "As a program elsewhere asks."
    with httpx.Client(verify=verify, trust_env=False, timeout=60) as client:
        return client.post(f"{url}/invocations", json={"instances": [[2, 1.5]]}, headers={"Authorization": f"Bearer {token_of('large')}"}, extensions={"sni_hostname": name})


def plain(url: str) -> bytes:
    "What a server says to a request without TLS."
    with socket.create_connection((url.split(":")[1].strip("/"), int(url.rpartition(":")[2])), timeout=60) as line:
        line.sendall(b"GET /ping HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
        try:
            return line.recv(1000)
        except ConnectionError:
            return b""


def test_it_answers_over_tls_only_and_so_does_the_next_version(secure):
    first = deploy("large@1")
    assert first.url.startswith("https://127.0.0.1:") and first.predict(ROWS) == [1, 1] and first.status()["state"] == "running"
    trusting = ssl.create_default_context(cafile=str(secure / "ca.pem"))
    assert ask(first.url, trusting).json() == {"predictions": [1]}
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(first.url)  # the usual authorities do not know it
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        ask(first.url, trusting, "shop.example")  # another name
    assert not plain(first.url).startswith(b"HTTP")
    second = deploy("large@2")
    assert second.url == first.url and second.predict(ROWS) == [2, 2] == first.predict(ROWS) and gone(first.pid)
    assert ask(second.url, trusting).json() == {"predictions": [2]} and not plain(second.url).startswith(b"HTTP")
    assert second.traffic({"1": 100}).status()["traffic"] == {"1": 100} and record_of("large")["tls"]["name"] == NAME
    deployment("large").scale(2)
    assert deployment("large").url == first.url and len(deployment("large").predict(ROWS)) == 2
    undeploy("large")
    assert [row["state"] for row in states()] == ["stopped"]


def test_the_key_stays_where_it_is(secure):
    one = deploy("large@1")
    key = (secure / "key.pem").read_text().split("\n")[1].encode()
    one.predict(ROWS)
    one.stop()
    assert [str(file.relative_to(secure)) for file in secure.rglob("*") if file.is_file() and key in file.read_bytes()] == ["key.pem"]
    assert key.decode() not in str(one) + repr(one) + str(record_of("large"))


def test_a_renewed_certificate_is_taken_by_the_next_deploy_without_a_failed_request(secure, authority):
    first = deploy("large@1")
    trusting, answers, failures, stop = ssl.create_default_context(cafile=str(secure / "ca.pem")), [], [], threading.Event()

    def customer():
        while not stop.is_set():
            try:
                got = ask(first.url, trusting)
                (answers if got.status_code == 200 else failures).append(got.status_code)
            except httpx.HTTPError as error:
                failures.append(repr(error))

    customers = started(customer, customer)
    try:
        issued(secure, authority)  # a new key, too
        assert first.predict(ROWS) == [1, 1]  # it goes on with the old one, and so does our client
        plan = deploy("large@1", dry_run=True)
        assert [one["action"] for one in plan.facts["changes"]] == ["update"] and "certificate" in plan.facts["changes"][0]["detail"]
        second = deploy("large@1", why="renewed")
        n_before = len(answers)
        until(lambda: len(answers) >= n_before + 20 or failures)
    finally:
        stop.set()
        finished(customers)
    assert failures == [] and second.url == first.url and second.pid != first.pid and second.predict(ROWS) == [1, 1]
    history = deployment("large").history
    assert history[-1]["why"] == "renewed" and "certificate" in history[-1]["changes"][0]
    served = ssl.PEM_cert_to_DER_cert((secure / "cert.pem").read_text())
    with socket.create_connection(("127.0.0.1", int(second.url.rpartition(":")[2])), timeout=60) as line, trusting.wrap_socket(line, server_hostname=NAME) as checked:
        assert checked.getpeercert(binary_form=True) == served
    assert deploy("large@1").summary.startswith("nothing to change")


def test_an_open_deployment_becomes_a_closed_one_at_the_same_port(shop, authority):  # noqa: F811
    before = deploy("large@1")
    assert before.url.startswith("http://") and plain(before.url).startswith(b"HTTP/1.1 401")
    issued(shop, authority, "127.0.0.1")
    set_to(shop, cert="cert.pem", cert_key="key.pem", ca="ca.pem")
    after = deploy("large@1")
    assert after.url == before.url.replace("http", "https") and after.predict(ROWS) == [1, 1] and gone(before.pid) and record_of("large")["tls"]["name"] == "127.0.0.1"
    assert not plain(after.url).startswith(b"HTTP")
    assert ask(after.url, ssl.create_default_context(cafile=str(shop / "ca.pem")), "127.0.0.1").status_code == 200


def test_an_authority_that_does_not_vouch_stops_the_deployment(secure, authority):
    set_to(secure, cert="cert.pem", cert_key="key.pem", ca="ca.pem")
    one = deploy("large@1")
    trustme.CA().cert_pem.write_to_path(secure / "other.pem")
    set_to(secure, cert="cert.pem", cert_key="key.pem", ca="other.pem")
    with pytest.raises(Unavailable, match=r"large@2 was not deployed: the certificate at https://.* is not one that we trust .*large@1 keeps answering"):
        deploy("large@2")
    assert one.predict(ROWS) == [1, 1] and record_of("large")["model"] == "large@1"
    trustme.CA().cert_pem.write_to_path(secure / "ca.pem")  # somebody else's file in its place
    assert one.status()["state"] == "not answering" and "not one that we trust" in one.status()["problem"]
    (secure / "ca.pem").unlink()
    with pytest.raises(Invalid, match="ca.pem holds nobody to trust"):
        one.predict(ROWS)
    authority.cert_pem.write_to_path(secure / "moved.pem")
    set_to(secure, cert="cert.pem", cert_key="key.pem", ca="moved.pem")
    assert one.status()["state"] == "not answering" and deploy("large@2").predict(ROWS) == [2, 2]  # and there is a way out


def test_a_chain_is_trusted_by_its_first_certificate_alone(shop):  # noqa: F811
    root = trustme.CA()
    issued(shop, root.create_child_ca(), "*.shop.example")
    root.cert_pem.write_to_path(shop / "ca.pem")
    set_to(shop, cert="cert.pem", cert_key="key.pem")
    one = deploy("large@1")
    assert one.predict(ROWS) == [1, 1] and record_of("large")["tls"]["trust"].count("BEGIN") == 1
    assert ask(one.url, ssl.create_default_context(cafile=str(shop / "ca.pem")), "any.shop.example").status_code == 200


def test_grpc_has_the_certificate_too(secure):
    triton = pytest.importorskip("tritonclient.grpc")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    set_to(secure, cert="cert.pem", cert_key="key.pem", grpc_port=port)
    deploy("large@1")
    headers, name = {"authorization": f"Bearer {token_of('large')}"}, (("grpc.ssl_target_name_override", NAME),)
    with triton.InferenceServerClient(f"127.0.0.1:{port}", ssl=True, root_certificates=str(secure / "ca.pem"), channel_args=list(name)) as client:
        assert client.is_model_ready("large", headers=headers, client_timeout=60)
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client, pytest.raises(triton.InferenceServerException):
        client.is_server_live(headers=headers, client_timeout=60)


def test_mlflows_client_asks_over_tls(secure):
    from mlops_nb.deploy.mlflow_plugin import Client

    client = Client("mlops_nb")
    made = client.create_deployment("large", "models:/large/1", config={"to": "local"})
    assert made["url"].startswith("https://") and client.predict("large", ROWS).get_predictions("ndarray").tolist() == [1, 1]
    client.update_deployment("large", "models:/large/2")
    assert client.predict("large", ROWS).get_predictions("ndarray").tolist() == [2, 2] and client.get_deployment("large")["state"] == "running"
    client.delete_deployment("large")


def test_a_unit_comes_back_with_the_certificate_of_now(secure, authority):
    one = deploy("large@1")
    os.kill(one.pid, signal.SIGKILL)
    assert gone(one.pid)
    issued(secure, authority, "127.0.0.1", "other.shop.example")
    unit = subprocess.Popen([sys.executable, "-m", "mlops_nb.deploy.systemd", str(secure), "large"], stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        latest = time.monotonic() + 240
        while record_of("large")["pid"] != unit.pid and unit.poll() is None and time.monotonic() < latest:
            time.sleep(0.1)
        assert record_of("large")["pid"] == unit.pid and record_of("large")["tls"]["name"] == "127.0.0.1" and deployment("large").url == one.url
        assert deployment("large").predict(ROWS) == [1, 1]
        assert ask(one.url, ssl.create_default_context(cafile=str(secure / "ca.pem")), "other.shop.example").status_code == 200
    finally:
        unit.terminate()
        unit.wait(60)


def days_from_now(days: int) -> datetime:
    return datetime.now(timezone.utc) + timedelta(days=days)


@pytest.mark.parametrize("how, error, words", [
    ({"cert": "cert.pem"}, Invalid, r"\[deploy.large\] lacks cert_key"), ({"cert_key": "key.pem"}, Invalid, "lacks cert;"), ({"ca": "ca.pem"}, Invalid, "lacks cert;"),
    ({"cert": "cert.pem", "cert_key": "absent.pem"}, Invalid, "absent.pem is not there"), ({"cert": "cert.pem", "cert_key": "ca.pem"}, (Invalid, Untrusted), "ca.pem"),
    ({"cert": "cert.pem", "cert_key": "key.pem", "ca": "settings.ini"}, Invalid, "settings.ini holds nobody to trust")])
def test_mistakes_in_the_settings_are_said_before_anything_starts(secure, how, error, words):
    set_to(secure, **how)
    for dry_run in (True, False):
        with pytest.raises(error, match=words):
            deploy("large@1", dry_run=dry_run)
    assert states() == []


def test_certificates_that_will_not_do(secure, authority):
    issued(secure, authority, not_after=days_from_now(-1), not_before=days_from_now(-9))
    with pytest.raises(Invalid, match="has expired"):
        deploy("large@1")
    made = authority.issue_cert(common_name=NAME)
    made.private_key_and_cert_chain_pem.write_to_path(secure / "cert.pem")
    made.private_key_pem.write_to_path(secure / "key.pem")
    with pytest.raises(Invalid, match="names no host that a client could check"):
        deploy("large@1")
    issued(secure, authority)
    (secure / "key.pem").chmod(0o644)
    with pytest.raises(Untrusted, match="chmod 600"):
        deploy("large@1")
    assert states() == []


def test_what_a_person_should_know_is_in_the_plan_and_in_the_record(secure, authority):
    def notes() -> list[str]:
        return [one["detail"] for one in deploy("large@1", dry_run=True).facts["changes"] if one["what"] == "note"]

    assert notes() == []
    issued(secure, authority, not_after=days_from_now(5))
    assert len(notes()) == 1 and "renew it" in notes()[0]
    assert "renew it" in str(deploy("large@1")) and deploy("large@1").summary.startswith("nothing to change")
    set_to(secure, host="0.0.0.0")
    assert [("tokens and data travel in the clear" in one) for one in notes()] == [True]
    for host, warned in (("192.0.2.7", True), ("::", True), ("127.0.0.1", False), ("127.1.2.3", False), ("::1", False), ("localhost", False)):
        assert ("tokens and data travel in the clear" in caution(DeploySection(host=host), {})) == warned, host
