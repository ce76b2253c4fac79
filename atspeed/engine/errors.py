"""The engine's exceptions.

EngineError
+-- BundleError      a bundle that cannot be read or does not fit together
+-- CatalogueError   a catalogue that cannot be built or read
+-- LineError        a file of lines that cannot be read
+-- PromptError      a history that cannot be turned into a prompt
+-- CapacityError    more tokens than the model or the buffers take
+-- NoNumbersError   a pass after which the model's scores are NaN or infinite
+-- OverloadedError  a limit on what is served at once; later, or elsewhere, there may be room
"""


class EngineError(Exception):
    """Anything the engine refuses. The text names the file, field or setting at fault."""


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
    """A pass after which the model's scores are NaN or infinite: of the weights, or of a token that the pass reads."""


class OverloadedError(EngineError):
    """A limit on what is served at once is reached; later, or on another replica, there may be room."""
