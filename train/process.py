"""The beginning and the end of a rank's process."""

import os
import resource
import sys
from typing import NoReturn


def allow_many_files() -> None:
    """Raise the number of files that may be open to what the system allows: a mapped shard counts as one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS says "unlimited" and refuses it
        return


def end_process(status: int) -> NoReturn:
    """Exit without the interpreter's own tear-down: whatever must be kept is written and closed before.

    A process group lives on in what still holds it, FSDP's modules for one, and so do gloo's threads. One that
    frees the tensors of a finished collective while the interpreter is being torn down aborts the process
    (pytorch/pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
