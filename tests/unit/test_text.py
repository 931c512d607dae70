import io
import logging

from dattrain.runtime.logging import Console
from dattrain.text import has_colour, one_line, styled


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert has_colour(Terminal()) and not has_colour(io.StringIO())
    assert styled("x", "error", Terminal()) == "\x1b[31mx\x1b[0m" and styled("x", "", Terminal()) == "x"
    assert not has_colour(Terminal(), {"NO_COLOR": "1"}) and not has_colour(Terminal(), {"TERM": "dumb"})
    assert has_colour(Terminal(), {"NO_COLOR": ""})


def test_the_console_colours_warnings_and_what_is_good_and_a_file_gets_plain_text(monkeypatch):
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    written = []
    for stream in (Terminal(), io.StringIO()):
        console = Console(stream)
        console.setFormatter(logging.Formatter("%(message)s"))
        for level, style in ((logging.INFO, ""), (logging.INFO, "good"), (logging.WARNING, "")):
            record = logging.LogRecord("dattrain", level, "", 0, "said", None, None)
            record.style = style
            console.emit(record)
        written.append(stream.getvalue())
    assert written == ["said\n\x1b[1;32msaid\x1b[0m\n\x1b[33msaid\x1b[0m\n", "said\n" * 3]


def test_any_name_can_be_drawn_on_a_line():
    assert one_line("traffic\nlight \udcff.png") == "traffic light \\udcff.png"
