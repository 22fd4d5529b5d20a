"""The one exception that means "the input is wrong, not the program"."""


class InputError(ValueError):
    """A mistake that the user can mend: wrong configuration, broken file, mismatched artifact.

    The message is one readable paragraph that says what is wrong, where, and what to do about it.
    The command line prints it without a traceback and exits with status 2; the server answers 4xx.
    """
