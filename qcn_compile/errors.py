"""Every error a user can meet. A message names the thing, the place and the cure; tests check the texts."""

from __future__ import annotations


class QcnError(Exception):
    """Base of all expected failures. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class UsageError(QcnError):
    """A flag or an argument that cannot work (unknown target, prompt longer than the context, ...)."""

    exit_code = 2


class ModelError(QcnError):
    """A checkpoint that is missing, damaged, or does not fit its own config."""

    exit_code = 3


class ArtifactError(QcnError):
    """A build directory that is missing, truncated, altered, or of another schema version."""

    exit_code = 4


class IRError(QcnError):
    """Graph IR that does not parse or verify. Names the op and its location."""

    exit_code = 5


class PassError(QcnError):
    """A pass that failed. Carries where its input was left and the command that repeats the failure."""

    exit_code = 5


class LoweringError(QcnError):
    """An op, shape or format for which the target has no kernel."""

    exit_code = 6


class DeviceError(QcnError):
    """The hardware or a kernel refused at run time."""

    exit_code = 7


class RankError(DeviceError):
    """Another rank died or does not come: this process cannot compute any more, a replica of it can."""


class CapacityError(QcnError):
    """A request that does not fit the caches the artifact was started with."""

    exit_code = 8
