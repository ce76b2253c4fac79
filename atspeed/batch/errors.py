"""The exceptions of a batch."""


class BatchError(Exception):
    """A batch that cannot run, or cannot go on. The text is one line that names the file, line or option at fault."""
