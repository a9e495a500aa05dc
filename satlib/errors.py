"""The one exception that the command line shows as a single line."""


class SatlibError(ValueError):
    """Bad input, with the offending name and value, what was expected, and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """
