"""Training's exceptions.

TrainingError
+-- DataError     a data file that is missing or not what its reader expects
+-- RecipeError   a recipe that cannot be read, or asks for what the data does not have
+-- ExportError   a checkpoint that cannot be exported; defined in atspeed/training/export.py

Paused            no error: a run that stopped where it can go on
"""


class TrainingError(Exception):
    """Anything that training refuses. The text names the file and line, or the recipe's key."""


class DataError(TrainingError):
    """A data file that is missing or not what its reader expects."""


class RecipeError(TrainingError):
    """A recipe that cannot be read, or asks for what the data does not have."""


class Paused(Exception):  # noqa: N818 - no error
    """A run that stopped before its end, everything kept: the same call goes on. The text says where it stopped."""
