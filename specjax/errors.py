"""Errors that a user can mend: each names the field, the value, what was expected and what to do."""


class SpecJAXError(ValueError):
    """Base of every error caused by what the user passed in, rather than by a fault in SpecJAX."""


class CheckpointError(SpecJAXError):
    """A checkpoint (weights, config or tokenizer files) is missing something, damaged, or of an unsupported kind."""


class ConfigError(SpecJAXError):
    """A configuration field has a value that is wrong by itself or does not fit the other fields."""


class AssetError(SpecJAXError):
    """A named model could not be found, downloaded or verified."""


class DraftWarning(UserWarning):
    """The drafter works, but probably not as it was meant to."""
