"""Error of a capacity plan that cannot be made."""


class CapacityError(Exception):
    """A plan or a comparison that cannot be made. The text is one line and names the option, the file or the field."""
