"""Everything that can be wrong with what a user gives us, by kind.

Each message is one line that says what is wrong, where, what was expected, what was found and
how to mend it. The command prints it and exits with 1; any other exception is a bug of ours.
"""


class GraftError(Exception):
    """Something the user can mend: a file, a recipe, a model or a choice."""


class StorageError(GraftError):
    """A file or directory could not be written or is in use."""


class RecordError(GraftError):
    """A row of a JSONL file is not what it should be."""


class RecipeError(GraftError):
    """A recipe asks for something that does not exist or contradicts itself."""


class HubError(GraftError):
    """The Hugging Face Hub did not give or take what it should."""


class CheckpointError(GraftError):
    """A checkpoint is missing, incomplete, or does not fit its partner."""


class SamplingError(GraftError):
    """A source gave nothing that can be learnt from."""


class TrainingError(GraftError):
    """Training cannot start or went astray."""


class PackError(GraftError):
    """A SkillPack is damaged, hostile, or made for another base model."""


class PackGoneError(PackError):
    """A SkillPack's file was taken away after it was opened."""


class CompressionError(GraftError):
    """A delta cannot be compressed as asked."""


class BudgetError(CompressionError):
    """A delta does not fit into so few bytes."""


class WorkerError(CompressionError):
    """What shall compress cannot be started; what is finished is kept."""


class FusionError(GraftError):
    """A pack, a router or a grafted directory cannot be combined as asked."""


class ServingError(GraftError):
    """A grafted model cannot be served or exported as asked."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, or the error's class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_failure(error: BaseException) -> bool:
    """Return whether something went wrong, and nobody asked to end: a panic of a Rust library is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
