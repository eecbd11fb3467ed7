"""The errors a user can cause or meet. Each message says what was wrong, where, and what to do."""


class DrivetrainError(Exception):
    """Something failed while running. The command line prints the message alone and exits with 1."""

    exit_status = 1


class ConfigError(DrivetrainError):
    """A setting is wrong: nothing was started. The command line exits with 2."""

    exit_status = 2


class DataError(DrivetrainError):
    """A file is missing, torn or not what its name says."""


class CheckpointError(DrivetrainError):
    """A checkpoint is missing, incomplete, corrupt or of another model."""
