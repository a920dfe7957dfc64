"""Object stores' own exceptions as the ones that Python has for files.

s3fs lets botocore's EndpointConnectionError and NoCredentialsError through, gcsfs its HttpError and adlfs azure's
AzureError; none is an OSError, so no `except OSError` would see an object store that is away for a moment.
Invariant: what a client that `speaking_python` returned raises of a store's is an OSError. ValueError and TypeError
pass: those are our own mistakes in calling it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from pipeline.errors import RunError

_NO_CREDENTIALS = frozenset(
    {
        *("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "TokenRetrievalError"),  # botocore
        *("SSOTokenLoadError", "UnauthorizedSSOTokenError", "NoAuthTokenError"),
        *("DefaultCredentialsError", "ClientAuthenticationError"),  # google, azure
    }
)
"""Classes that only people can cure. Others, such as google's RefreshError, also come from a service that is away."""


def as_os_error(error: Exception) -> OSError:
    """PermissionError for what credentials could cure, else ConnectionError; the text names the original's class."""
    kind = type(error).__name__
    text = f"{kind}: {error}"
    return PermissionError(text) if kind in _NO_CREDENTIALS else ConnectionError(text)


def speaking_python(client: Any) -> Any:
    """Return the client, or a file that it opened, with its methods' errors translated; attributes are its own."""
    return _Translated(client)


class _Translated:
    """Everything of another object; what its methods raise is an OSError or one of this program's errors."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found
        translated = _translated(found)
        return (lambda *args, **kwargs: _Translated(translated(*args, **kwargs))) if name == "open" else translated

    def __enter__(self) -> Self:
        self._inner.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inner.__exit__(kind, error, trace)


def _translated(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except (OSError, RunError, ValueError, TypeError):
            raise
        except Exception as error:
            raise as_os_error(error) from error

    return call
