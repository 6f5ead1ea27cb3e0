"""Errors that a user reads instead of a traceback.

A message names the file or configuration key, what was found, what is allowed and what to do.
"""


class UserError(Exception):
    """A mistake or a broken input that the user can mend; the command line prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigError(UserError):
    """The configuration, or a file that it names, cannot be used; raised before what needs it starts."""

    exit_code = 2


class CorpusError(UserError):
    """The corpus cannot be used as it is; the message lists every offending file or row."""
