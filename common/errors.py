"""The errors of Vigil: a small tree, caught by name.

Each message says what is wrong, where, and what would be right. Only a process's one top-level
handler (`common.service`, the command line's `main`) catches `VigilError` itself.
"""


class VigilError(Exception):
    """Something outside the code is wrong; the message is fit to be shown to a user as it is."""


class ConfigError(VigilError):
    """vigil.toml can't be used: the message names file, line, key, value and what was expected."""


class ModelError(VigilError):
    """A model, its manifest or its labels can't be used, or don't fit together."""


class UnsaidError(ModelError):
    """Neither the model's file nor its manifest says what is needed; `missing` has, for each flag
    of the command line that would answer, what it says.
    """

    def __init__(self, message: str, missing: dict[str, str]) -> None:
        super().__init__(message)
        self.missing = missing


class EngineError(VigilError):
    """A model that was loaded could not be run: the runtime or its accelerator failed."""


class SourceError(VigilError):
    """A camera, video or picture can't be opened or read."""


class RingError(VigilError):
    """A frame ring can't be made, opened or trusted."""


class RingFullError(RingError):
    """Under `every`, the frame to be overwritten is not decided yet."""


class RingGoneError(RingError):
    """There is no such ring: it was never made, or is drained and removed."""


class FencedError(VigilError):
    """A decision was refused: another epoch holds the ring's fence, or the frame is decided."""


class StorageError(VigilError):
    """A file or folder can't be written, or its content is damaged."""


class AlreadyRunningError(VigilError):
    """Another process holds the lock of this name under the same root."""


class NotRunningError(VigilError):
    """Nothing answers where a running system was expected."""


class TransitionError(VigilError):
    """The record of slots does not allow this transition now; nothing has changed."""


class LockedError(VigilError):
    """A lock was not free within the time given."""


class BundleError(VigilError):
    """A bundle's tar is damaged, or holds what no bundle may hold; nothing of it was kept."""


class AcceleratorLostError(EngineError):
    """An accelerator that ran no longer does: unplugged, hung up or too hot. Another may judge."""


class UpdateError(VigilError):
    """An update can't go on; what runs is not touched by that."""


class FetchError(UpdateError):
    """Something did not come from where updates come from.

    Args:
        status: the HTTP status; 404 for a file that is not there; 0 where there was no answer.
        wait_s: how long the server asks to be left alone.
    """

    def __init__(self, text: str, status: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(text)
        self.status, self.wait_s = status, wait_s


class UntrustedError(UpdateError):
    """Metadata or a file is not what somebody trusted has signed, or no longer so."""


class BudgetError(UpdateError):
    """The bytes that may be moved are used up for now."""
