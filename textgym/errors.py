"""The errors that textgym raises of its own: `except TextgymError` catches all of them.

Each is also the built-in error that Python programmers expect, so `except ValueError` works as well.
"""

from __future__ import annotations


class TextgymError(Exception):
    """Base class of textgym's errors."""


class ConfigError(TextgymError, ValueError):
    """A setting has a value that it cannot have."""


class ExcludedOptionError(ConfigError):
    """An option is set beside another one that excludes it.

    Attributes:
        option: Name of the option.
        idle: Whether the option has no effect there, so that it could be left out.
    """

    def __init__(self, message: str, option: str, idle: bool) -> None:
        super().__init__(message)
        self.option, self.idle = option, idle


class NonFiniteError(TextgymError, FloatingPointError):
    """A number that training rests on is NaN or infinite."""


class UnchangedWeightsError(TextgymError, RuntimeError):
    """Training ended, and all weights are as they were."""


class UnknownArgumentError(TextgymError, TypeError):
    """An environment is given an argument that it does not have."""


class CutPromptsWarning(UserWarning):
    """Prompts are longer than `max_prompt_tokens` and lose their beginning."""


class DataError(TextgymError, ValueError):
    """Data cannot be learned from: a row has a wrong form, or too many rows have a fault."""


class DataWarning(UserWarning):
    """Rows of data have faults, or a held-out set is not one."""


class DamagedFolderError(TextgymError, ValueError):
    """A saved folder is incomplete, changed, or of another kind or format than is asked for."""


class RunFolderError(TextgymError, FileExistsError):
    """A folder cannot be used for a run, or holds none: it has other files, another run, or one of another version."""


class UntrustedNameError(TextgymError, ValueError):
    """A saved folder names code that is not textgym's, which loading does not run."""


class IsolatedError(TextgymError, RuntimeError):
    """A function in a process of its own failed, was late or too large, or ended its process."""
