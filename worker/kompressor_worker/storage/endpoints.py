"""The address of a server: the location's own or the environment's, looked at before anything is asked of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from urllib3.exceptions import LocationParseError
from urllib3.util import parse_url

from kompressor_worker.errors import UserError

if TYPE_CHECKING:
    from kompressor_worker.storage.locations import Place


def endpoint_of(place: Place, environ: Mapping[str, str], *variables: str) -> str | None:
    """The location's endpoint, else what the first of `variables` says that is set. Raises UserError: an endpoint that is no address."""
    for name, endpoint in (("endpoint", place.endpoint), *((variable, environ.get(variable)) for variable in variables)):
        if endpoint:
            if wrong := flaw(endpoint):
                raise no_address(place, name, endpoint, wrong)
            return endpoint
    return None


def no_address(place: Place, name: str, endpoint: str, why: object) -> UserError:
    return UserError(f"{place.uri}: {name} {endpoint} is no address ({why}); give one such as https://s3.example.org:9000")


def flaw(endpoint: str) -> str | None:
    """Why no connection can ever be made to a URL: a client would try again and again, as if the server were away."""
    try:
        parts = urlsplit(endpoint)
        port = parts.port
        parse_url(endpoint)
    except (ValueError, LocationParseError) as error:
        return str(error)
    if parts.scheme not in ("http", "https"):
        return "it begins with neither http:// nor https://"
    if not parts.hostname:
        return "it names no host"
    return "no server listens at port 0" if port == 0 else None
