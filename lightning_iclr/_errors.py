"""The one kind of error that the command shows as a line instead of a traceback; standard library only."""


class UsageError(Exception):
    """Something that the user can put right: a name, a key, a value, a missing package or checkpoint."""


def one_line(error: BaseException) -> str:
    """Return an error's message, or its type where it has none, on one line.

    Example:
        >>> one_line(ValueError("two\\n  lines"))
        'two lines'
    """
    return " ".join(str(error).split()) or type(error).__name__
