"""Text from anywhere, made fit for where it is shown: a terminal, a table, a page, a log."""

import re
from urllib.parse import unquote, unquote_plus


def printable(text: object, keep: str = "") -> str:
    """The text with escapes in place of what would steer a terminal or hide in a line, but for the characters `keep`.

    Names of files and scenes may be anybody's: a terminal obeys their control characters.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


def masked(text: object, *uris: str | None) -> str:
    """The text without the user names, passwords and tokens of the URIs in it, and without those of `uris`."""
    shown = str(text)
    for uri in uris:
        for secret in _secrets(uri or ""):
            shown = shown.replace(secret, "***")
    return _QUERY.sub(r"\1=***", _LOGIN.sub("***@", shown))


def _secrets(uri: str) -> list[str]:
    """Passwords and tokens, as they stand in a URI and as they are meant; the longest first."""
    found = [value for _, value in _QUERY.findall(uri)]
    if login := _LOGIN.search(uri):
        user, separator, password = login.group().removesuffix("@").partition(":")
        found.append(password if separator else user)
    return sorted({*found, *map(unquote_plus, found), *map(unquote, found)} - {""}, key=len, reverse=True)


_LOGIN = re.compile(r"(?<=://)\S+@")
_QUERY = re.compile(
    r"([\w.-]*(?:password|passwd|pwd|token|secret|key|sig|signature|auth|credential)[\w.-]*)=([^&\s]+)", re.IGNORECASE
)


def in_csv(text: str) -> str:
    """The text as a cell that no spreadsheet takes for a formula."""
    return f"'{printable(text)}" if text[:1] in _FORMULA else printable(text)


def path_in_csv(name: str) -> str:
    """As `in_csv` for the name of a file, which it stays; a tab in it is the writer's to quote."""
    return printable(f"./{name}" if name[:1] in _FORMULA else name, keep="\t")


def in_markdown(text: object) -> str:
    """The text with nothing in it that Markdown, or HTML in it, takes for more."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", printable(text))


_FORMULA = tuple("=+-@\t\r\n")
