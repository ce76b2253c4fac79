"""The engine's exceptions.

EngineError
+-- BundleError      a bundle that cannot be read or does not fit together
+-- CatalogueError   a catalogue that cannot be built or read
+-- LineError        a file of lines that cannot be read
+-- PromptError      a history that cannot be turned into a prompt
+-- CapacityError    more tokens than the model or the buffers take
+-- NoNumbersError   a pass after which the model's scores are NaN or infinite
+-- DeviceError      a device that failed in a pass or a copy
+-- OverloadedError  a limit on concurrent work; later, or on another replica, there may be room
"""


class EngineError(Exception):
    """A refusal of the engine. The text names the file, field or setting."""


class BundleError(EngineError):
    """A bundle that cannot be read or whose parts do not fit together."""


class CatalogueError(EngineError):
    """A catalogue that cannot be built or read."""


class LineError(EngineError):
    """A file of lines that cannot be read."""


class PromptError(EngineError):
    """A history that cannot be turned into a prompt."""


class CapacityError(EngineError):
    """More tokens than the model's positions or the buffers take."""


class NoNumbersError(EngineError):
    """A pass after which scores are NaN or infinite, because of the weights or of a token that the pass reads."""


class DeviceError(EngineError):
    """A device that failed in a pass or a copy. What it was doing may be repeated on another replica."""


class OverloadedError(EngineError):
    """A limit on concurrent work is reached; later, or on another replica, there may be room."""
