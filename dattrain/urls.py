"""URLs as text: the query string apart from the name, and messages without the secrets that URLs carry.

A ``?`` in a pattern of shards is a wildcard; what follows ``?`` is a query string where it holds ``=`` or ``&``, follows a
whole file name, or does not read like the rest of one.
"""

from __future__ import annotations

import re

# One slash: what is left of a URL that was taken for a path. Behind ? # and ; quotes are part of it where they hold a value, or
# where it goes on behind them.
_URL = re.compile(
    r"[A-Za-z][A-Za-z0-9+.\-]*:(?://|(?<=[A-Za-z0-9]{2}:)/)[^\s'\"<>`?#;]*"
    r"(?:[?#;](?:=\"[^\"\n]*\"|='[^'\n]*'|[^\s'\"<>`]|['\"<>`](?=[\w%&=+~\-])| (?=[^\s:/]*&[\w.\-]+=))*)?"
)
# Up to the last @ before a slash or space; or whatever stands between a colon, which no port follows, and the next @.
_USER = re.compile(
    r"(?<=:/)(/?)(?:[^\s/@:]*(?:@[^\s/@:]*)?:"
    r"(?![\s:]|\d+(?:$|[^\w@\s]|\s(?![^\n@:]*@[\w.\-]+(?::\d+)?/)))[^\n@]*@(?:[^\s/@]*@)*|[^\s/]*@)"
)
_HEADER = re.compile(
    r"((?:authorization|-token|api-key|cookie)['\"]?\s*[:=]\s*(?:b(?=['\"]))?['\"]?)"
    r"(?:=\"[^\"\n]*\"|[^'\"\n,}])+(?:,\s*\w+=(?:\"[^\"\n]*\"|[^'\"\n,}])*)*",
    re.IGNORECASE,
)
_CURL = re.compile(r"((?:^|\s)(?:-u|--user|--proxy-user)[ =]?['\"]?)[^\s'\":]+:[^\s'\"]+")
_PARAMETERS = {True: re.compile("([;#]).+"), False: re.compile("([;#]).*=.*")}
"""Behind ``;`` or ``#``, by whether it is HTTP; keys in buckets may have either in their names."""
_FILE = re.compile(r"\.(?:tar|txt|json|npz)$")
_REST_OF_A_NAME = re.compile(r"[\[\]{}*,.\-_\d]{0,8}|.*\.(?:tar|txt|json|npz)")
_PARTS = re.compile(r"::(?![0-9A-Fa-f:.]*\])")
_BETWEEN = re.compile(r"::(?=[A-Za-z][A-Za-z0-9+.\-]*://)")


def mask(text: str) -> str:
    """The text with ``***`` for every secret of a URL. Whatever is printed or written for people goes through here.

    Secrets are a URL's user and password, query string, parameters (``;``) and fragment (``#``), and what headers with
    credentials and curl's user say.
    """
    text = _CURL.sub(r"\1***", _HEADER.sub(r"\1***", text))
    if ":/" not in text:
        return text
    return _URL.sub(
        lambda url: "::".join(map(_without_query, _BETWEEN.split(url[0]))), _USER.sub(r"\1***@", text)
    )


def _without_query(url: str) -> str:
    end = len(url.rstrip(":;,.)]}"))
    path, query = split_query(_PARAMETERS[url[:4].lower() == "http"].sub(r"\1***", url[:end]))
    return path + ("?***" if query else "") + url[end:]


def split_query(url: str) -> tuple[str, str]:
    """The URL up to its query string, and that, without the ``?``; "" where there is none."""
    start = url.find("?")
    while start >= 0:
        end = url.find("?", start + 1)
        piece = url[start + 1 :] if end < 0 else url[start + 1 : end]
        if (
            _FILE.search(url[:start])
            or re.search("[=&]", piece)
            or (end < 0 and not _REST_OF_A_NAME.fullmatch(piece))
        ):
            return url[:start], url[start + 1 :]
        start = end
    return url, ""


def with_query(url: str, query: str) -> str:
    """The URL with a query string, unless that is empty."""
    return f"{url}?{query}" if query else url


def beside(url: str, name: str) -> str:
    """The URL of a file in the same folder, with the same query string."""
    path, query = split_query(url)
    return with_query(f"{path.rpartition('/')[0]}/{name}", query)


def plain(url: str) -> str:
    """The URL without user, password and query string: what names the file, whoever asks for it."""
    return _USER.sub(r"\1", split_query(url)[0])


def server(url: str) -> str:
    """Whom a URL asks, without user and password; the scheme alone where the name of a host is not in it."""
    scheme, _, rest = plain(url).partition("://")
    return f"{scheme}://{rest.partition('/')[0]}" if scheme in ("http", "https") else f"{scheme}://"


def parts(spec: str) -> list[str]:
    """What stands between the ``::`` of a specification (those of an IPv6 address do not part it)."""
    return _PARTS.split(spec)
