"""What object stores' clients raise comes out as errors that Python has for files."""

from __future__ import annotations

import io

import botocore.exceptions as botocore
import pytest

from pipeline.client_errors import as_os_error, speaking_python
from pipeline.errors import InfrastructureError
from pipeline.lease import acquire_lease
from pipeline.storage import Store

UNREACHABLE = botocore.EndpointConnectionError(endpoint_url="http://127.0.0.1:9")


class Client:
    """Raises what it is told to, whatever is asked of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.protocol = "s3"

    def cat_file(self, path: str) -> bytes:
        if self.error is not None:
            raise self.error
        return path.encode()

    def open(self, path: str) -> Client | io.BytesIO:
        return Client(self.error) if self.error else io.BytesIO(path.encode())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UNREACHABLE, ConnectionError),
        (botocore.NoCredentialsError(), PermissionError),
        (botocore.TokenRetrievalError(provider="sso", error_msg="expired"), PermissionError),
        (botocore.CredentialRetrievalError(provider="metadata", error_msg="timed out"), ConnectionError),
        (RuntimeError("surprise"), ConnectionError),
    ],
)
def test_a_clients_own_errors_become_permission_or_connection_errors_that_name_them(
    error: Exception, kind: type[OSError]
) -> None:
    with pytest.raises(kind, match=type(error).__name__):
        speaking_python(Client(error)).cat_file("x")
    with pytest.raises(kind):
        speaking_python(Client(error)).open("x").cat_file("x")


@pytest.mark.parametrize("error", [FileNotFoundError("x"), InfrastructureError("x"), ValueError("x")])
def test_errors_that_say_enough_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        speaking_python(Client(error)).cat_file("x")
    assert caught.value is error


def test_a_client_without_trouble_works_as_before() -> None:
    client = speaking_python(Client())
    assert client.protocol == "s3"
    assert client.cat_file("a") == b"a"
    with client.open("ab") as file:
        assert file.read() == b"ab"
        file.seek(1)
        assert io.BufferedReader(file).read() == b"b"


def test_a_cause_stays_attached() -> None:
    assert "EndpointConnectionError" in str(as_os_error(UNREACHABLE))
    with pytest.raises(ConnectionError) as caught:
        speaking_python(Client(UNREACHABLE)).cat_file("x")
    assert caught.value.__cause__ is UNREACHABLE


def test_a_store_that_is_away_raises_connection_error_and_no_credentials_permission_error(
    s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError):
        Store("s3://bucket/x").read("a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(PermissionError, match="NoCredentialsError"):
        Store("s3://bucket/x").put("a", b"")


def test_a_lease_outlives_whatever_its_storage_raises(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    lease = acquire_lease(local, run_id="first", ttl_s=0.3)

    def surprise(*_: object) -> None:
        raise RuntimeError("what no client was ever seen to raise")

    monkeypatch.setattr(Store, "put", surprise)
    lease._thread.join(timeout=0.5)
    assert lease._thread.is_alive()
    monkeypatch.undo()
    lease._renew()
    lease.check()
    lease.release()
