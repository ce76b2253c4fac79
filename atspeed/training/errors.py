"""Training's exceptions.

TrainingError
+-- DataError        a data file that is missing or not as its reader expects
+-- RecipeError      a recipe that cannot be read, or does not fit the data
+-- ExportError      a checkpoint that cannot be exported, or an export that differs from it
+-- InflationError   a model that cannot be inflated; defined in atspeed/training/inflation.py

Paused               not an error: a run that stopped and can be continued
"""


class TrainingError(Exception):
    """Anything that training refuses. The text names the file and line, or the recipe's key."""


class DataError(TrainingError):
    """A data file that is missing or not as its reader expects."""


class RecipeError(TrainingError):
    """A recipe that cannot be read, or does not fit the data."""


class ExportError(TrainingError):
    """A checkpoint that cannot be exported, or an export that computes something else than its checkpoint."""


class Paused(Exception):  # noqa: N818 - no error
    """A run that stopped before its end and kept everything; the same call continues it. The text names the place."""
