"""What a user is told instead of a traceback.

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


def printable(text: object, keep: str = "") -> str:
    """The text with escapes in place of what would steer a terminal or hide in a line, but for the characters `keep`.

    Names of files and scenes may be anybody's: a terminal obeys their control characters.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )
