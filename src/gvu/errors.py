"""The error that a user can mend."""


class GvuError(ValueError):
    """Bad input in one clear sentence: what was given, what was expected, what to do. The command line exits with 2."""


def brief(error: BaseException) -> str:
    """What a library said, on one line of at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
