"""The error that a user can mend."""


class GvuError(ValueError):
    """Bad input in one clear sentence: what was given, what was expected, what to do. The command line exits with 2."""
