"""Exceptions with a meaning of their own: what the user can put right, and files that are not what was written; and exit codes."""

from __future__ import annotations

from dattrain.urls import mask

STALLED = 70
"""Exit code of a process that ended itself because a rank or a data worker stalled (EX_SOFTWARE)."""
REQUEUE = 75
"""Exit code of a process, or of a job's script, that saved because it was preempted and wants to be started again (EX_TEMPFAIL)."""


class UserError(ValueError):
    """Something that the person at the keyboard can put right.

    The message names the file or setting, the value seen, and what would be right. ``dattrain.cli.main`` prints it as one
    line and exits with ``exit_code``: 2 for usage and configuration, 1 for everything met while running. Secrets of
    URLs are masked in it.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(mask(message))
        self.exit_code = exit_code


class ConfigError(UserError):
    """A configuration that cannot be used; ``exit_code`` is 2."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=2)


class Damaged(Exception):
    """A file that is not what was written: missing, cut short, changed, or not of this format."""
