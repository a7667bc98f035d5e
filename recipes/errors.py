"""What goes wrong by the user's doing."""


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one line, without a traceback, exit code 2."""


class Failure(RuntimeError):
    """The disk, a process or the network failed: shown as one line, without a traceback, exit code 1."""
