"""What can go wrong, as one small tree. Every message names the thing, what is wrong with it, and the next step.

`exit_code` is what the command line ends with (design, section 6): 1 failed, 2 wrong usage, 3 a check did not hold.
"""


class MultisboraError(Exception):
    """Root of everything that multisbora raises on purpose."""

    exit_code = 1


class UsageError(MultisboraError):
    """A flag, a project file, a recipe or an argument that cannot mean anything. The caller changes what they wrote."""

    exit_code = 2


class GeometryError(MultisboraError):
    """A base model, card or config whose adaptable matrices cannot be read."""


class RegistryError(MultisboraError):
    """The store of claims cannot be opened, read or written."""


class MissingRegistryError(RegistryError):
    """No store of claims is there yet."""


class AllocationError(RegistryError):
    """Claims that cannot be made: too few free indices, or a task that already holds other ones."""


class DataError(MultisboraError):
    """Training or evaluation rows that are missing, unreadable or do not fit the recipe."""


class CheckpointError(MultisboraError):
    """Model files that are missing, corrupt or cannot be written."""


class AdapterError(MultisboraError):
    """An adapter folder that is unreadable, damaged, or belongs to another base model or to other claims."""


class TrainingError(MultisboraError):
    """A run that cannot start, go on or resume."""


class MergeError(MultisboraError):
    """Adapters that cannot be composed into one checkpoint."""


class VerificationError(MultisboraError):
    """A proof that did not hold."""

    exit_code = 3
