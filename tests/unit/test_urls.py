"""The secrets of URLs, and every place that prints or writes for people."""

from __future__ import annotations

import argparse
import json
import logging
import os
import stat

import pytest

from dattrain.cli import main as cli
from dattrain.config.load import dump, load, loads
from dattrain.data.classes import Classes
from dattrain.data.source.dataset import BadSample
from dattrain.errors import ConfigError, UserError
from dattrain.urls import mask, parts, plain, server, split_query

S = "hunter2"
URL = f"https://ann:{S}@h:8000/a/s-{{0000..0127}}.tar?X-Amz-Credential={S}%2F1&sig={S}"
SHOWN = "https://***@h:8000/a/s-{0000..0127}.tar?***"


@pytest.mark.parametrize(
    "text, shown",
    [
        (URL, SHOWN),
        (f"{URL}: has no index", f"{SHOWN}: has no index"),
        (f"data.train={URL}::{URL}, and", f"data.train={SHOWN}::{SHOWN}, and"),
        (f"'{URL}'", f"'{SHOWN}'"),
        (f"url=URL('http://h/x?t={S}'), 403", "url=URL('http://h/x?***'), 403"),
        (f"https://{S}@h/x", "https://***@h/x"),
        (f"https:/a:{S}@h/x?t={S}: no such config", "https:/***@h/x?***: no such config"),
        (f"{{'Authorization': 'Bearer {S}'}}", "{'Authorization': '***'}"),
        (f'{{"x-amz-security-token": "{S}"}}', '{"x-amz-security-token": "***"}'),
        (f"https://a:{S}@{S}@h/x", "https://***@h/x"),
        (f"https://a:{S}/{S}@h/x", "https://***@h/x"),
        (f"https://a:it's{S}@h/x", "https://***@h/x"),
        (f"https://h/x.tar?{S}", "https://h/x.tar?***"),
        (f"https://h/s-?.tar?a={S}", "https://h/s-?.tar?***"),
        (f"https://h/x.tar?a={S}::b{S}", "https://h/x.tar?***"),
        (f"pipe:curl -H 'Authorization: Bearer {S}' u", "pipe:curl -H 'Authorization: ***' u"),
        (f"https://h/x.tar?a='{S}'&b=\"{S} {S}\": gone", "https://h/x.tar?***: gone"),
        (f"'https://h/x?t=it\\'s<{S}>b'", "'https://h/x?***'"),
        (f'{{"u": "https://h/x#{S}", "v": "w@x"}}', '{"u": "https://h/x#***", "v": "w@x"}'),
        (f"https://h/x;t={S}/y.tar?a={S}: gone", "https://h/x;***: gone"),
        (f"https://h/a.tar?t={S}#{S}::s3://b/c#t={S}, and", "https://h/a.tar?***::s3://b/c#***, and"),
        (f'https://ann:{S} "<`#?;{S}@{S}@h:80/x.tar?{S}', "https://***@h:80/x.tar?***"),
        (f"https://ann@c.com:{S}/{S} {S}@h/x: ask a@b", "https://***@h/x: ask a@b"),
        (f"https://ann:80 {S}@h:80/x", "https://***@h:80/x"),
        (f'Authorization: Digest username="{S}", response="{S}"', "Authorization: ***"),
        (f"-H 'PRIVATE-TOKEN: {S}' -H 'Cookie: a={S}; b={S}'", "-H 'PRIVATE-TOKEN: ***' -H 'Cookie: ***'"),
        (f"zip://a.tar::https://ann:{S}@h/x?t={S}", "zip://a.tar::https://***@h/x?***"),
        (f"https://h/x?a=1 2&b={S}: gone", "https://h/x?***: gone"),
        (f"{{'authorization': b'Bearer {S}'}}", "{'authorization': b'***'}"),
        (f"pipe:curl -s -u ann:{S} https://h/x", "pipe:curl -s -u *** https://h/x"),
        ("https://h:80 is down: a@b/c; https://h: a@b", "https://h:80 is down: a@b/c; https://h: a@b"),
        ("s3://b/a#1.tar; https://h/a.tar; no", "s3://b/a#1.tar; https://h/a.tar; no"),
        ("s3://bucket/s-00?[0-9].tar is gone?", "s3://bucket/s-00?[0-9].tar is gone?"),
        ("hf://datasets/ann/set@main/x.tar", "hf://datasets/ann/set@main/x.tar"),
        ("http://127.0.0.1:80/a@b.tar", "http://127.0.0.1:80/a@b.tar"),
        ("a: b@c.d, what? x=1", "a: b@c.d, what? x=1"),
    ],
)
def test_mask_hides_secrets_and_nothing_else(text, shown):
    assert mask(text) == shown and mask(shown) == shown


@pytest.mark.parametrize(
    "url, path, query",
    [
        ("https://h/a.tar", "https://h/a.tar", ""),
        ("https://h/a.tar?", "https://h/a.tar", ""),
        ("https://h/s-??.tar", "https://h/s-??.tar", ""),
        ("s3://b/s-000?", "s3://b/s-000?", ""),
        ("https://h/s-?.tar?sig=a?b", "https://h/s-?.tar", "sig=a?b"),
        ("https://h/folder?sv=1&sig=2", "https://h/folder", "sv=1&sig=2"),
        ("https://h/folder/?token", "https://h/folder/", "token"),
    ],
)
def test_a_query_string_is_told_from_a_wildcard(url, path, query):
    assert split_query(url) == (path, query)


def test_names_and_servers():
    assert plain(URL) == "https://h:8000/a/s-{0000..0127}.tar" and server(URL) == "https://h:8000"
    assert server("s3://bucket/a") == server("s3://other/b") == "s3://"
    assert parts("http://[::1]:80/a.tar::b.tar") == ["http://[::1]:80/a.tar", "b.tar"]


@pytest.mark.parametrize("kind", [UserError, ConfigError, BadSample])
def test_errors_hide_them(kind):
    assert str(kind(f"{URL}: gone")) == f"{SHOWN}: gone"


def test_logs_hide_them_with_tracebacks_and_other_libraries(tmp_path, capsys):
    from dattrain.runtime.logging import RankLog

    log = RankLog(tmp_path, 0, "host")
    try:
        try:
            raise ValueError(URL)
        except ValueError:
            logging.getLogger("httpx").exception("HTTP Request: GET %s", URL)
    finally:
        log.close()
    told = capsys.readouterr().out + (tmp_path / "logs" / "rank_0.log").read_text()
    assert told.count(SHOWN) == 4 and S not in told


def test_a_run_folder_holds_them_for_its_owner_alone_and_only_where_going_on_needs_them(
    tmp_path, monkeypatch
):
    from dattrain.engine.run_folder import open_run
    from dattrain.runtime.environment import resolve

    monkeypatch.setattr("sys.argv", ["dattrain", "train", "x.yaml", f"data.train={URL}"])
    config = loads(f"data: {{train: '{URL}'}}").config
    open_run(tmp_path / "run", config, Classes(1000), resolve({}), "cpu", {})
    assert load(tmp_path / "run" / "config.yaml").config.data.train == URL
    assert stat.S_IMODE((tmp_path / "run" / "config.yaml").stat().st_mode) == 0o600
    holds = [p.name for p in (tmp_path / "run").rglob("*") if p.is_file() and S in p.read_text()]
    assert holds == ["config.yaml"]
    assert json.loads((tmp_path / "run" / "env.json").read_text())["starts"][0]["command"][3].endswith(SHOWN)
    open_run(
        tmp_path / "other",
        loads("data: {train: 's3://b/a.tar'}").config,
        Classes(1000),
        resolve({}),
        "cpu",
        {},
    )
    mask_of_all = os.umask(0)
    os.umask(mask_of_all)
    assert stat.S_IMODE((tmp_path / "other" / "config.yaml").stat().st_mode) == 0o666 & ~mask_of_all


@pytest.mark.parametrize("more", [[], ["--yaml"]])
def test_a_shown_recipe_hides_them(tmp_path, capsys, more):
    for name, train in (("a", URL), ("b", f"{URL}2")):
        (tmp_path / f"{name}.yaml").write_text(dump(loads(f"data: {{train: '{train}'}}").config))
    assert cli.main(["config", "show", str(tmp_path / "a.yaml"), *more]) == 0
    assert cli.main(["config", "diff", str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]) == 1
    told = capsys.readouterr()
    assert SHOWN in told.out and S not in told.out + told.err


def test_the_command_line_hides_them_in_usage_errors_and_in_tracebacks(capsys, monkeypatch):
    def broken(args: argparse.Namespace) -> int:
        raise RuntimeError(URL)

    with pytest.raises(SystemExit):
        cli.main(["data", "ls", "x", URL])
    assert cli.main(["config", "show", "none.yaml", f"data.train={URL}", "more=1"]) == 2
    try:
        broken(argparse.Namespace())
    except RuntimeError as error:
        cli._bug(type(error), error, error.__traceback__)
    told = capsys.readouterr()
    assert "RuntimeError: " + SHOWN in told.err and S not in told.out + told.err


def test_reports_of_ranks_and_jobs_hide_them(tmp_path, monkeypatch, capsys):
    from dattrain.runtime import spawn
    from dattrain.submit.job import Job

    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", "1")
    monkeypatch.delenv(spawn.REPORT, raising=False)
    spawn.report(f"RuntimeError: {URL}")
    Job(str(tmp_path))._report(RuntimeError(URL))
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    told = capsys.readouterr().err + written
    assert told.count(SHOWN) == 2 and S not in told


def test_a_submitted_recipe_with_a_secret_is_its_owners(tmp_path):
    from dattrain.files import write_text

    write_text(tmp_path / "config.yaml", f"train: {URL}")
    assert stat.S_IMODE((tmp_path / "config.yaml").stat().st_mode) == 0o600
