"""Every error that nemoport raises on purpose, and the exit code that the command line gives it.

    NemoportError
    ├── CheckFailed          1   a validation, a check or a gate did not hold
    ├── UsageError           2   the command asks for something that makes no sense
    ├── InputError           3   the input is not supported or damaged
    │   ├── UnsupportedInput     known for what it is, and not readable or not writable here
    │   └── DamagedInput         truncated, inconsistent, incomplete
    ├── MachineError         4   this machine lacks something
    │   └── MissingPackage       an optional package, with the extra that installs it
    └── PolicyError          5   refused: unsafe pickle, promotion without a green validation

A message is one sentence for one reader at the worst moment: the object, what was found, what was
needed, the way out.
"""

from __future__ import annotations

from typing import ClassVar


class NemoportError(Exception):
    exit_code: ClassVar[int] = 1


class CheckFailed(NemoportError):
    exit_code = 1


class UsageError(NemoportError):
    exit_code = 2


class InputError(NemoportError):
    exit_code = 3


class UnsupportedInput(InputError):
    pass


class DamagedInput(InputError):
    pass


class MachineError(NemoportError):
    exit_code = 4


class MissingPackage(MachineError):
    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package}, which is not installed; "
            f"install it with: pip install 'nemoport[{extra}]'"
        )
        self.package, self.extra = package, extra


class PolicyError(NemoportError):
    exit_code = 5
