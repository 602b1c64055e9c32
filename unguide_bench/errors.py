"""The failures of a benchmark that one sentence explains. Standard library only."""


class BenchError(Exception):
    """A wrong request or a missing piece: what, what was found, what was expected, the remedy."""
