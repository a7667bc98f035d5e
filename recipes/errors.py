"""What goes wrong by the user's doing."""


class UserError(ValueError):
    """A mistake in what the user asked for: shown as one line, without a traceback, exit code 2."""

    def __init__(self, message: str) -> None:
        # What it quotes, a file's name or a library's words, may hold ends of lines.
        super().__init__(" ".join(message.splitlines()))


class Failure(RuntimeError):
    """The disk, a process or the network failed: shown as one line, without a traceback, exit code 1."""
