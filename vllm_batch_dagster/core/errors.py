"""Every exception of the product, in one tree. Raised at any step of the data path, mapped to HTTP once (api_shim).

BatchError
├── InvalidInput            the caller sent something wrong: says which field and how to mend it
├── NotFound                no such file, batch or chunk
├── StateConflict           the object is in a state that does not allow the call
│   ├── ClaimConflict       its Idempotency-Key came with another body before
│   └── StaleAttempt        a newer attempt owns the chunk: this one must stop without publishing
├── StorageFailure          bytes could not be stored or read back
│   ├── CorruptJournal      the record of a published answer fails its checksum
│   └── UnprovenMerge       the merged files do not hold every line of the input exactly once
├── ConfigurationError      a setting, a model entry or the installation is wrong
├── DeliveryFailed          a result handler did not take the results: it is asked again later
│   └── Undeliverable       and asking again is useless
├── ReviewFailed            Label Studio did not take or give what it was asked for
└── EngineFailure           the engine cannot answer
    ├── EngineUnavailable   connection refused, reset, shutting down: answers in flight are void, try again
    ├── EngineUnreachable   no server of ENGINE_URL can be used: the batch pauses
    └── EngineStartFailed   the server never became ready: quotes its log, says whether trying again can help
"""


class BatchError(Exception):
    """Root of the tree. Catch this to catch everything that the product raises on purpose."""


class InvalidInput(BatchError):
    """The caller's request is wrong. `param` and `code` are OpenAI's (error envelope, contract E.1)."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class NotFound(BatchError):
    """No such object. `kind` is the API's word for it: file, batch, chunk, key."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"no {kind} with id {object_id}")
        self.kind = kind
        self.object_id = object_id


class StateConflict(BatchError):
    """The object is in a state that does not allow this call; nothing was changed."""


class ClaimConflict(StateConflict):
    """An Idempotency-Key was used for a call with another body; that call's object stands, this call made nothing."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The Idempotency-Key '{key}' was used within the last 24 hours for a request with another body. "
            "Send the same body again, or a new key."
        )


class StaleAttempt(StateConflict):
    """A newer attempt at the chunk exists. The holder of this one stops without publishing (design section 5)."""


class StorageFailure(BatchError):
    """Bytes could not be written durably or read back."""


class CorruptJournal(StorageFailure):
    """The record of an answer that was published fails its checksum. Before that, damage only means: send it again."""


class UnprovenMerge(StorageFailure):
    """The walk over the merged files found a line missing, twice or out of place; the files are not published."""

    def __init__(self, batch_id: str, problem: str) -> None:
        super().__init__(f"merge of {batch_id} refused: {problem}; run its chunks again")
        self.problem = problem


class ConfigurationError(BatchError):
    """A setting, a model entry or the installation is wrong. The message says the mend."""


class DeliveryFailed(BatchError):
    """A result handler did not take the results of a batch; it is given them again later."""


class Undeliverable(DeliveryFailed):
    """It never will: the delivery is dead at once. A handler raises it for what no retry can mend."""


class ReviewFailed(BatchError):
    """Label Studio refused a call or did not answer it. `status` is its HTTP status, None without an answer: then the
    call may have been carried out. `may_pass` is False when only a change of a setting or of the project helps."""

    def __init__(self, message: str, *, status: int | None = None, may_pass: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.may_pass = may_pass


class EngineFailure(BatchError):
    """The engine cannot answer. `may_pass` is False when the same call cannot succeed before somebody has changed a
    setting, the model or the machine: trying again only burns attempts."""

    may_pass = True


class EngineUnavailable(EngineFailure):
    """No answer came: connection refused or reset, engine shutting down. Safe to send again. `was_sent` is False when
    the request cannot have reached the engine, and so cannot be what it died of."""

    def __init__(self, message: str, *, was_sent: bool = True) -> None:
        super().__init__(message)
        self.was_sent = was_sent


class EngineUnreachable(EngineFailure):
    """No server of somebody else serves the model, or none answered in time."""


class EngineStartFailed(EngineFailure):
    """The engine's process ended or did not become ready in time, at every rung of the memory ladder that was tried.

    The message quotes the engine's log and names what to change. `cause` is the value of a `start_faults.Cause`
    ("weights", "model_gated", "unknown", ...): a stable word for metadata and for the reason of a pause.
    """

    def __init__(self, message: str, *, cause: str = "unknown", may_pass: bool = True) -> None:
        super().__init__(message)
        self.cause = cause
        self.may_pass = may_pass
