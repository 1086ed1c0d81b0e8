"""Where a server is: who says so, and what is no address, refused before anything is asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kompressor_api.names import Role
from kompressor_api.v1alpha1 import SourceLocation
from kompressor_worker.cli import run_cli
from kompressor_worker.errors import UserError
from kompressor_worker.storage.locations import locate, open_source
from kompressor_worker.storage.patience import Patience
from kompressor_worker.storage.s3 import S3Store

NO_ADDRESS = {
    "http://x y": "Host 'x y' contains invalid character",
    "http://[::1": "Invalid IPv6 URL",
    "http://:80": "it names no host",
    "http://store:90000": "Port out of range",
    "http://store:http": "'http'",
    "http://store:0": "no server listens at port 0",
}
KEYS = {"SOURCE_AWS_ACCESS_KEY_ID": "a", "SOURCE_AWS_SECRET_ACCESS_KEY": "b"}


@pytest.mark.parametrize("endpoint", [None, "https://store.example"])
def test_no_configuration_file_says_where_s3_is(endpoint: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator can keep a variable its own, but not what lies in a file that a job names."""
    (tmp_path / "config").write_text("[default]\nendpoint_url = https://elsewhere.example\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.setenv(name, "")
    environ = {"AWS_REGION": "us-east-1"}
    place = locate(SourceLocation(uri="s3://models/x", endpoint=endpoint), Role.SOURCE, environ)
    store = S3Store(place, environ, Patience.from_environ(environ, None))
    assert store.client.meta.endpoint_url == (endpoint or "https://s3.amazonaws.com")


@pytest.mark.parametrize("uri", ["s3://models/x", "hf://models/x"])
@pytest.mark.parametrize("endpoint", NO_ADDRESS)
def test_what_is_no_address_is_refused_at_once(endpoint: str, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pause(*_: object) -> None:
        pytest.fail("it was tried, and will be again")

    monkeypatch.setattr(Patience, "pause", pause)
    said = rf"{re.escape(endpoint)} is no address \(.*{re.escape(NO_ADDRESS[endpoint])}.*\); give one such as https://s3.example.org:9000$"
    with pytest.raises(UserError, match=f"^{uri}: endpoint {said}"):
        open_source(SourceLocation(uri=uri, endpoint=endpoint), KEYS)
    variable = "HF_ENDPOINT" if uri.startswith("hf:") else "AWS_ENDPOINT_URL"
    with pytest.raises(UserError, match=f"^{uri}: {variable} {said}"):
        open_source(SourceLocation(uri=uri), {**KEYS, variable: endpoint})


def test_a_host_without_a_scheme_in_the_environment() -> None:
    with pytest.raises(UserError, match=r"HF_ENDPOINT hub\.example is no address \(it begins with neither http:// nor https://\)"):
        open_source(SourceLocation(uri="hf://models/x"), {"HF_ENDPOINT": "hub.example"})


@pytest.mark.parametrize("command", ["verify", "clean"])
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["s3://models/x", "--endpoint", "127.0.0.1:7070"], "--endpoint 127.0.0.1:7070: no URL of a server"),
        (["s3://models/x", "--endpoint", "http://127.0.0.1:70700"], "endpoint http://127.0.0.1:70700 is no address (Port out of range"),
        (["s3://models/x", "--region", "x" * 300], "x: no name of a region (String should have at most 253 characters)"),
        (["gs://models/x"], "gs://models/x: String should match pattern"),
        (["s3://models/../x"], "s3://models/../x: '..' gives one place two names; write the place that it leads to"),
    ],
    ids=lambda value: value[-1][:24] if isinstance(value, list) else "",
)
def test_an_error_names_the_wrong_argument(command: str, arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_cli([command, *arguments]) == 64
    said = capfd.readouterr().err.replace("\n", "")
    assert says in said
    assert ("give s3://" in said) == says.startswith("gs:"), "the remedy is that of the argument"
