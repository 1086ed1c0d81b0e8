"""What an S3 server or its SDK says, sorted: worth another try, or whose mistake it is."""

from __future__ import annotations

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from kompressor_worker.errors import AccessDenied, KompressorError, NoSpaceLeft, NotFound, StorageError, UserError
from kompressor_worker.storage.locations import Place

PRECONDITION = frozenset({"PreconditionFailed", "412"})
ABSENT = frozenset({"NoSuchKey", "404", "NotFound"})
UNSUPPORTED = frozenset({"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "MalformedTrailerError", "UnsupportedOperation"})
_DENIED = frozenset({
    "AccessDenied", "403", "401", "Forbidden", "Unauthorized", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken",
    "InvalidToken", "TokenRefreshRequired", "AccountProblem", "AllAccessDisabled", "InvalidSecurity", "NotSignedUp",
    "UnauthorizedAccess", "InvalidClientTokenId", "AuthFailure", "XAdminUserNotFound",  # versitygw
})  # fmt: skip
_RETRIED = frozenset({
    "SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "ThrottlingException", "TooManyRequests",
    "TooManyRequestsException", "RequestLimitExceeded", "BandwidthLimitExceeded", "ProvisionedThroughputExceededException",
    "PriorRequestNotComplete", "OperationAborted", "ConditionalRequestConflict", "InternalError", "ServiceUnavailable",
    "BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "IncompleteBody",
})  # fmt: skip
_FULL = frozenset({"QuotaExceeded", "EntityTooLarge", "XMinioStorageFull", "InsufficientCapacity", "XMinioAdminBucketQuotaExceeded", "507"})
_NETWORK = (HTTPClientError, BotoConnectionError, IncompleteReadError, ResponseStreamingError, FlexibleChecksumError, OSError, EOFError)


def code_of(error: BaseException) -> str:
    """The error code of an answer, such as NoSuchKey; empty when there was no answer."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""


def status_of(error: BaseException) -> int:
    """The HTTP status of an answer; 0 when there was none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) if isinstance(error, ClientError) else 0


def is_transient(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        code, status = code_of(error), status_of(error)
        if code in _FULL or status in (501, 507):
            return False
        return code in _RETRIED or status >= 500 or status in (408, 429)
    if isinstance(error, SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    return isinstance(error, (*_NETWORK, CredentialRetrievalError))


def may_be_done(error: BaseException) -> bool:
    """Whether a failed write may have been done all the same: its answer was lost, or the server failed after it."""
    return not isinstance(error, ClientError) or status_of(error) >= 500


def translate(error: BaseException, place: Place, what: str, attempts: int) -> KompressorError:
    """`what` names operation and object. Errors that stay transient after all attempts end as StorageError."""
    code, said = code_of(error), explain(error)
    at = place.endpoint or "AWS S3"
    if code == "NoSuchBucket":
        return NotFound(f"{place.uri}: no bucket {place.authority} at {at}; create it or correct {place.field}.uri", reason=place.missing)
    if code in _DENIED or (isinstance(error, ClientError) and status_of(error) in (401, 403) and code != "RequestTimeTooSkewed"):
        return AccessDenied(f"{place.uri}: {what} at {at} was denied ({said}); check {place.credentials_source} and the bucket's policy")
    if isinstance(error, (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)):
        return AccessDenied(f"{place.uri}: no usable credentials ({said}); check {place.credentials_source}, or set credentialsSecret")
    if code in _FULL or status_of(error) == 507:
        return NoSpaceLeft(
            f"{place.uri}: {what} at {at}: no room ({said}); raise the quota or free space, the next worker goes on from here"
        )
    if code in ABSENT:
        return NotFound(f"{place.uri}: {what} at {at}: no such object; check {place.field}.uri", reason=place.missing)
    if isinstance(error, SSLError) and not is_transient(error):
        return UserError(f"{place.uri}: the certificate of {at} is not trusted ({said}); give its authority as {place.field}.caBundle")
    if code in ("PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"):
        return UserError(f"{place.uri}: the bucket is in another region ({said}); set {place.field}.region")
    if isinstance(error, ParamValidationError) or code == "InvalidBucketName":
        return UserError(f"{place.uri}: {said}; correct {place.field}.uri")
    tries = f"after {attempts} attempts" if attempts > 1 else "at once"
    return StorageError(f"{place.uri}: {what} at {at} failed {tries}: {said}; check that the endpoint is up and reachable from the worker")


def explain(error: BaseException) -> str:
    if isinstance(error, ClientError):
        message = str(error.response.get("Error", {}).get("Message", "")).strip()
        return f"{code_of(error)}, HTTP {status_of(error)}" + (f", {message}" if message else "")
    if isinstance(error, BotoCoreError) or str(error):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__
