"""The errors that command lines print as one line."""


class InputError(ValueError):
    """A file, option or request that cannot be served.

    The message is one line for a person: what is wrong, with the offending value, then what to do about it.
    Command lines print it without a traceback and exit with code 2.
    """


class DoesNotFit(InputError):
    """A program that needs more memory than its devices have."""


class GenerationError(RuntimeError):
    """The model produced numbers that mean nothing; no answer can be trusted. Command lines exit with code 1."""
