"""The Python client of the recommendation service."""

from atspeed.client.errors import CallError, RecommenderError, UsageError
from atspeed.client.recommender import RecommenderClient
from atspeed.engine.search.mode import Mode

__all__ = ["CallError", "Mode", "RecommenderClient", "RecommenderError", "UsageError"]
