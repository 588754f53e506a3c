"""What goes wrong among ranks. A bad argument is a ValueError or TypeError, as everywhere in Python."""


class CommError(RuntimeError):
    """A collective failed: a rank never came, died, or called something else.

    The Comm that raised it cannot be used again: some ranks may have moved their rows and others not.
    """
