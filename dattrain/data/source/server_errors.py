"""What the errors of fsspec's back ends say: each wraps the answer of a server in its own way."""

from __future__ import annotations

import email.utils
import re
from collections.abc import Iterator, Mapping
from typing import Any

from dattrain.urls import mask


def status(error: BaseException) -> int:
    """HTTP status that an error stands for, 0 where that is not known."""
    found = _answer(error)[0]
    if isinstance(error, FileNotFoundError) and not found:
        # Some back ends say "not found" of everything that kept them from asking.
        return 0 if isinstance(error.__cause__, OSError) else 404
    return 403 if isinstance(error, PermissionError) and not found else found


def reason(error: BaseException) -> str:
    """What went wrong in a few words, for a message."""
    found = _answer(error)[0]
    said = getattr(error, "message", None) if found else None
    text = " ".join(mask(said if isinstance(said, str) else str(error)).split())[:200]
    if isinstance(said, str):
        return f"HTTP {found} {text}".rstrip()
    text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"HTTP {found}, {text}" if found else text


def asked_to_wait(error: BaseException, now: float) -> float:
    """Seconds that the server asks to wait (``Retry-After``, RFC 9110 10.2.3: seconds, or a date); 0 where it does not ask.

    Args:
        now: seconds since 1970, for a date where the answer has none of its own.
    """
    headers = {name.lower(): str(value).strip() for name, value in _answer(error)[1].items()}
    asked = headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    until = _date(asked)
    if until is None:
        return 0.0
    # By the server's own clock, which may not be ours.
    sent = _date(headers.get("date", ""))
    return max(0.0, until - (now if sent is None else sent))


def _date(text: str) -> float | None:
    try:
        fields = email.utils.parsedate_tz(text)
        return None if fields is None else float(email.utils.mktime_tz(fields))
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _answer(error: BaseException) -> tuple[int, Mapping[str, str]]:
    """Status and headers of the answer that an error is about; 0 where it is about none."""
    for each in _causes(error):
        response: Any = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            response = response.get("ResponseMetadata", {})
            code, headers = response.get("HTTPStatusCode"), response.get("HTTPHeaders")
        elif response is not None:  # requests, httpx
            code, headers = getattr(response, "status_code", None), getattr(response, "headers", None)
        elif hasattr(each, "request_info"):  # aiohttp; without headers its own verdict on what no HTTP was
            headers = getattr(each, "headers", None)
            code = None if headers is None else getattr(each, "status", None)
        else:  # gcsfs; aiohttp's parser has such codes too, which no server sent
            named = type(each).__module__.partition(".")[0] in ("gcsfs", "google")
            code, headers = getattr(each, "code", None) if named else None, None
        if isinstance(code, int) and 100 <= code < 600:
            return code, headers if isinstance(headers, Mapping) else {}
    return 0, {}


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those behind it."""
    found: BaseException | None = error
    for _ in range(8):
        if found is None:
            return
        yield found
        found = found.__cause__
