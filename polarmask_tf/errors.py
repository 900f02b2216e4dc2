"""The one exception that means "your input, not our bug"."""


class InputError(Exception):
    """What is wrong, where (file, image id, annotation id) and what to do, in one line.

    The command line prints it as `polarmask: error: ...` and exits with 2; library callers catch it.
    """
