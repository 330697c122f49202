"""The error that means: the user's input or options cannot be served."""


class InputError(ValueError):
    """A file, option or request that cannot be served.

    The message is one line for a person: what is wrong, with the offending value, then what to do about it.
    Command lines print it without a traceback and exit with code 2.
    """
