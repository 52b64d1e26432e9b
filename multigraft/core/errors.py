"""Errors a user can cause. Each message says what was wrong, the value, and what would be right.

`status` is the HTTP status a front end answers with; `code` is a stable machine-readable name.
Anything else that is raised is a bug of ours.
"""


class MultigraftError(Exception):
    """Base of every error that is somebody's mistake or a limit reached, not a bug."""

    status = 400
    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None):
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(MultigraftError, ValueError):
    """A request's parameter is wrong; `param` names it."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt, or prompt plus `max_tokens`, does not fit the model's context."""

    code = "context_length_exceeded"


class AdapterError(MultigraftError, ValueError):
    """An adapter cannot be used as it is: missing or corrupt files, wrong shapes, an unsupported field."""

    code = "invalid_adapter"


class ModelNotFound(MultigraftError, LookupError):
    """A request names a model that is neither the base nor a registered adapter."""

    status = 404
    code = "model_not_found"


class NotFound(MultigraftError, LookupError):
    """A file, job or checkpoint is named that does not exist."""

    status = 404
    code = "not_found"


class ModelNotSupported(MultigraftError, ValueError):
    """The base model's architecture, file or dtype cannot be run."""

    code = "model_not_supported"


class CapacityExceeded(MultigraftError):
    """A bounded resource is too small for what was asked, even when empty; the message has the arithmetic."""

    code = "capacity_exceeded"


class TooLarge(MultigraftError, ValueError):
    """An upload exceeds its limit."""

    status = 413
    code = "request_too_large"


class StorageFull(MultigraftError):
    """The disk of the data folder is full."""

    status = 507
    code = "storage_full"


class ShuttingDown(MultigraftError):
    """The server finishes what runs and takes nothing new."""

    status = 503
    code = "shutting_down"


class InvalidLogits(MultigraftError, ArithmeticError):
    """The model gave a request no usable next-token distribution: NaN, infinity, or every token ruled out."""

    status = 500
    code = "invalid_logits"


class JobFailed(MultigraftError):
    """A training job cannot go on; the others, and serving, do."""

    code = "job_failed"
