"""The one family of errors that a user's mistake or a bad file can raise.

Everything else that escapes Loadstone is a defect of Loadstone. The command line prints these as one paragraph and
exits with status 2; nobody meets a traceback for a file that somebody else wrote.
"""

from __future__ import annotations

from pathlib import Path


class LoadstoneError(ValueError):
    """Bad input. The text names the file, the tensor, what was expected, what was found, and the next step."""


class FormatError(LoadstoneError):
    """A file that is not what it claims to be: truncated, corrupt, hostile, or of another format.

    Args:
        path: the file, as the user named it.
        problem: what was expected and what was found.
        hint: what to do next.
    """

    def __init__(self, path: Path | str, problem: str, hint: str = "") -> None:
        self.path, self.problem, self.hint = str(path), problem, hint
        super().__init__(f"{path}: {problem}" + (f" {hint}" if hint else ""))


class SourceError(LoadstoneError):
    """A source (file, folder, hub name, URL) that cannot be found, reached or chosen."""


class ConfigError(LoadstoneError):
    """A configuration that is incomplete, contradicts itself, or asks for what the model does not do."""


class PlanError(LoadstoneError):
    """The tensors of a checkpoint do not fill the model exactly: missing, unused, mismatched or claimed twice."""


class TokenizerError(LoadstoneError):
    """A tokenizer that is missing, broken, or does not belong to the model."""
