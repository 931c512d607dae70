"""fsspec's file systems, one for each kind of URL, as ``download.Transfer`` needs them."""

from __future__ import annotations

import os
from typing import Any

from dattrain.errors import UserError

_EXTRA = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface-hub",
}
"""What each kind of source needs besides fsspec: the extra ``remote`` has them all."""


class FileSystems:
    """File systems by scheme, opened when first used, and anew in a forked process; for several threads.

    Args:
        timeout: seconds for one request.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._systems: dict[str, Any] = {}
        self._owner = os.getpid()

    def opened(self, url: str) -> Any:
        """The file system that is in use for a URL; None where there is none yet."""
        return self._systems.get(_scheme(url))

    def forget(self, url: str, system: Any) -> None:
        """Open a file system anew when it is next used, unless another thread has done so since ``system`` was taken."""
        if system is None or self.opened(url) is system:
            self._systems.pop(_scheme(url), None)

    def open(self, url: str) -> Any:
        """The file system of a URL. Raises UserError where its package is not installed."""
        if self._owner != os.getpid():
            # Sockets and the thread of the event loop stayed in the parent.
            self._systems, self._owner = {}, os.getpid()
        scheme = _scheme(url)
        system = self._systems.get(scheme)
        if system is not None:
            return system
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if is_http(url):
            # HTTPS_PROXY, NO_PROXY and .netrc, which the other kinds of source heed by themselves.
            options["client_kwargs"] = {"trust_env": True}
        if scheme == "s3":
            # Attempts are counted by Transfer alone, not multiplied by botocore's.
            options["config_kwargs"] = {
                "retries": {"max_attempts": 0},
                "connect_timeout": self.timeout,
                "read_timeout": self.timeout,
            }
        try:
            system = fsspec.filesystem(scheme, **options)
        except (ImportError, ValueError, TypeError) as error:
            needs = _EXTRA.get(scheme)
            hint = f"; install {needs} (in the checkout: pip install -e '.[remote]')" if needs else ""
            raise UserError(f"{url}: cannot be opened ({error}){hint}") from error
        if scheme == "s3":
            system.retries = 1
        # Another thread may have opened one meanwhile.
        return self._systems.setdefault(scheme, system)


def _scheme(url: str) -> str:
    return url.partition("://")[0]


def is_http(url: str) -> bool:
    """Whether a URL is one of HTTP."""
    return _scheme(url) in ("http", "https")


def inside(url: str) -> str:
    """A URL as its file system wants it: without the scheme, but for HTTP, whose paths are URLs."""
    return url if is_http(url) else url.partition("://")[2]


def url_like(pattern: str, path: str) -> str:
    """The URL of a path that a file system found for a pattern."""
    return path if "://" in path else f"{_scheme(pattern)}://{path.lstrip('/')}"
