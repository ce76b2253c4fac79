"""BenchmarkError, the one exception of this package."""


class BenchmarkError(Exception):
    """A measurement that cannot be made. The text is one line and names what to change."""
