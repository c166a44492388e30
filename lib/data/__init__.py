"""Data sets by name or folder, as in-memory tensors in a fixed train / validation / test split, with their task."""

from lib.data.as_bytes import pixels
from lib.data.errors import DataError
from lib.data.folders import fingerprint
from lib.data.frames import SEQUENCES, log_mel, sequences
from lib.data.loading import check_name, load
from lib.data.medical import auc, balanced_accuracy, illness, medmnist
from lib.data.named import NAMES, SHIPPED_ROOT, data_root
from lib.data.poses import SKELETONS, poses
from lib.data.skeletons import FACE, FIGURE, Skeleton
from lib.data.splits import Data, Split
from lib.data.task import PADDING, Task, accuracy, classification
from lib.data.texts import TEXTS, texts

__all__ = [
    "FACE",
    "FIGURE",
    "NAMES",
    "PADDING",
    "SEQUENCES",
    "SHIPPED_ROOT",
    "SKELETONS",
    "TEXTS",
    "Data",
    "DataError",
    "Skeleton",
    "Split",
    "Task",
    "accuracy",
    "auc",
    "balanced_accuracy",
    "check_name",
    "classification",
    "data_root",
    "fingerprint",
    "illness",
    "load",
    "log_mel",
    "medmnist",
    "pixels",
    "poses",
    "sequences",
    "texts",
]
