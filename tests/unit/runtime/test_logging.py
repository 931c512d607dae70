import io
import logging
import resource

from dattrain.runtime import logging as logs


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_restart_appends_to_the_rank_logs(tmp_path):
    for attempt in range(2):
        log = logs.RankLog(tmp_path, 3, "node1")
        logging.getLogger("dattrain.test").info("attempt %d", attempt)
        log.close()
    lines = (tmp_path / "logs" / "rank_3.log").read_text().splitlines()
    assert [line.split("dattrain.test: ")[1] for line in lines] == ["attempt 0", "attempt 1"]
    assert all("r3@node1" in line for line in lines)


def test_only_rank_0_has_a_console_and_others_libraries_only_warn_there(tmp_path, capsys):
    log = logs.RankLog(tmp_path, 0, "n")
    logging.getLogger("dattrain.x").info("ours")
    logging.getLogger("elsewhere").info("theirs")
    logging.getLogger("elsewhere").warning("beware")
    logging.getLogger("dattrain.x").error("said elsewhere", extra={"console": False})
    log.close()
    assert capsys.readouterr().out.splitlines() == ["ours", "beware"]
    assert "said elsewhere" in (tmp_path / "logs" / "rank_0.log").read_text()
    other = logs.RankLog(tmp_path, 1, "n")
    assert other.console is None
    other.close()


def test_the_live_line_is_redrawn_below_records_and_absent_without_a_terminal():
    console = logs.Console(Terminal())
    console.setFormatter(logging.Formatter("%(message)s"))
    console.live("step 1")
    console.emit(logging.makeLogRecord({"msg": "saved", "levelno": logging.INFO}))
    assert console.stream.getvalue().endswith("\r\x1b[Ksaved\nstep 1")
    console.clear()
    assert console.stream.getvalue().endswith("\r\x1b[K")
    plain = logs.Console(io.StringIO())
    plain.live("step 1")
    plain.clear()
    assert plain.stream.getvalue() == ""


def test_a_full_disk_does_not_hide_what_ended_the_run(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = logs.RankLog(tmp_path, 1, "n1")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
        logging.getLogger("dattrain").warning("more than the disk takes")
        file.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.file.closed
