"""Standard output, which may be full, closed, or in an encoding that cannot spell a text."""

import contextlib
import os
import sys

from drivetrain.conf.errors import DrivetrainError


def write(text: str) -> None:
    """A text, at once.

    Raises:
        DrivetrainError: nobody takes it, or its encoding has not all of these characters.
    """
    if sys.stdout is None:
        raise DrivetrainError("standard output is closed, so that nobody can read what is written")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError as error:
        raise DrivetrainError(
            f"standard output is in {sys.stdout.encoding}, which cannot spell {text[error.start]!r}; set "
            "PYTHONIOENCODING=utf-8"
        ) from error
    except OSError as error:
        raise DrivetrainError(_dropped(error)) from error


def fault() -> str | None:
    """Why standard output has not taken all that was written to it, in a sentence. None: it has."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        return _dropped(error)
    return None


def _dropped(error: OSError) -> str:
    """Drop what is left, so that Python does not fail to write it once more when it ends."""
    with contextlib.suppress(OSError):
        place, nowhere = sys.stdout.fileno(), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, place)
        os.close(nowhere)
    return f"standard output cannot be written: {error.strerror or error}"
