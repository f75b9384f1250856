"""Names from files and folders as text that can be shown: without control characters, and without markup.

A name of a file may hold any bytes. Control characters would act on a terminal, and Python reads what is not UTF-8 as
lone surrogates, which cannot be written.
"""


def printable(text: str, keep: str = "") -> str:
    """The text with what cannot be printed as escapes, as of `unicode_escape`; the characters in `keep` stay."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def without_math(text: str) -> str:
    """The text for a picture, in which matplotlib would take what stands between two dollars for mathematics."""
    return printable(text, keep="\n").replace("$", "\\$")
