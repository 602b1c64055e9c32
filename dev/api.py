"""The HTTP API of a running ComfyUI: the one client that `dev`, the tests and `unguide_bench` share."""

from unguide_bench.api import Api, ApiError, ExecutionFailedError, Graph, NoAnswerError, PromptRejectedError, seconds_of

__all__ = ["Api", "ApiError", "ExecutionFailedError", "Graph", "NoAnswerError", "PromptRejectedError", "seconds_of"]
