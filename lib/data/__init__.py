"""Data sets by name or folder, as in-memory tensors in a fixed train / validation / test split, with their task."""

from lib.data.as_bytes import pixels
from lib.data.folders import fingerprint
from lib.data.frames import SEQUENCES, log_mel, sequences
from lib.data.loading import check_name, load
from lib.data.named import NAMES, SHIPPED_ROOT, data_root
from lib.data.splits import Data, DataError, Split
from lib.data.task import PADDING, Task, accuracy, classification
from lib.data.texts import TEXTS, texts

__all__ = [
    "NAMES",
    "PADDING",
    "SEQUENCES",
    "SHIPPED_ROOT",
    "TEXTS",
    "Data",
    "DataError",
    "Split",
    "Task",
    "accuracy",
    "check_name",
    "classification",
    "data_root",
    "fingerprint",
    "load",
    "log_mel",
    "pixels",
    "sequences",
    "texts",
]
