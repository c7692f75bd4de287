"""The root of the errors that a user can mend, and what an HTTP client and a shell get of each."""

from __future__ import annotations


class SegqcError(Exception):
    """Something that a user can mend; its text is a sentence that says what was wrong, and what to do.

    Any other exception is a mistake of ours and shows where it happened.

    Attributes:
        status: the HTTP status that a client gets.
        exit_code: the exit code of a command, or of a job's process, that ends by it.
    """

    status: int = 409  # what was asked for does not go with what is there, as most of them say
    exit_code: int = 1

    def __str__(self) -> str:
        """The message, with a full stop."""
        return sentence(super().__str__())

    @property
    def clause(self) -> str:
        """The message without its full stop, for a sentence that goes on."""
        return str(self).removesuffix(".")


def sentence(text: str) -> str:
    """A message with one full stop at its end.

    >>> sentence("there is no scan 'a'"), sentence("It is there."), sentence("is the server running?")
    ("there is no scan 'a'.", 'It is there.', 'is the server running?')
    """
    text = text.rstrip()
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."
