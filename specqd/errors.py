"""Every error a user of specqd can meet; the command line prints the message and exits with code 2."""

__all__ = ["ArtifactError", "CaptureError", "CodegenError", "ContractError", "InputError", "SpecqdError"]


class SpecqdError(Exception):
    """Root of all errors specqd raises on purpose: says what was met, where, and what to do."""


class InputError(SpecqdError):
    """A value given by the user (option, prompt, tensor, file path) cannot be used."""


class CaptureError(SpecqdError):
    """A checkpoint or module could not be turned into a Program."""


class ContractError(SpecqdError):
    """A pass was handed, or left behind, a program that breaks its contract."""


class CodegenError(SpecqdError):
    """A program holds something that cannot be compiled for the chosen CPU; `reasons` are all that were found."""

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


class ArtifactError(SpecqdError):
    """A built artifact is missing, changed, cut off, or made for another CPU."""
