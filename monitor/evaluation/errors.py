"""The error of an evaluation that cannot be made."""


class EvaluationError(ValueError):
    """The run cannot be evaluated, or a snapshot not with this model and text; `str(error)` says what to do."""
