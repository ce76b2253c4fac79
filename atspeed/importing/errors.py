"""The exception of imports."""

from atspeed.training.errors import TrainingError


class ImportingError(TrainingError):
    """A checkpoint, index, prompt or history file that cannot be imported. The text is one line that names the file."""
