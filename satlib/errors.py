"""The one exception that the command line shows as a single line, and what helps to mend a misspelt name."""

import difflib
from collections.abc import Iterable


class SatlibError(ValueError):
    """Bad input, with the offending name and value, what was expected, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `names`, else all of them."""
    names = sorted(names)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names)}" if names else "; there is none"
