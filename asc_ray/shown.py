"""Text from anywhere, made fit for where it is shown: a terminal, a table, a page, a log."""

import re
from urllib.parse import unquote, unquote_plus


def printable(text: object, keep: str = "") -> str:
    """Escape the characters that would steer a terminal or hide in a line, except those in `keep`.

    Names of files and scenes may come from anybody, and a terminal obeys control characters in them.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape", "backslashreplace").decode()
        for c in str(text)
    )


def masked(text: object, *uris: str | None) -> str:
    """Return the text without the user names, passwords and tokens of the URIs in it, and without those of `uris`."""
    shown = str(text)
    for uri in uris:
        for secret in _secrets(uri or ""):
            shown = shown.replace(secret, "***")
    return _QUERY.sub(r"\1=***", _LOGIN.sub("***@", shown))


def _secrets(uri: str) -> list[str]:
    """Return a URI's passwords and tokens, as they stand in it and decoded; the longest first."""
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
    """Return the text as a cell that no spreadsheet takes for a formula."""
    return f"'{printable(text)}" if text[:1] in _FORMULA else printable(text)


def path_in_csv(name: str) -> str:
    """Return a file's name as such a cell, and as a name that still leads to it; the CSV writer quotes a tab in it."""
    return printable(f"./{name}" if name[:1] in _FORMULA else name, keep="\t")


def in_markdown(text: object) -> str:
    """Escape the characters that Markdown, or HTML in it, would interpret."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", printable(text))


_FORMULA = tuple("=+-@\t\r\n")
