"""Training: one bare loop with hooks, a cache of finished runs, and a count of what they computed."""

from lib.training.augment import CropAndFlip, crop_and_flip
from lib.training.cache import cached
from lib.training.loop import (
    Hook,
    Objective,
    Progress,
    Schedule,
    TrainingError,
    batches,
    device,
    evaluate,
    fit,
    learning_rate,
    make_optimizer,
    recalibrate,
    steps_per_epoch,
)
from lib.training.spent import charge, charge_all, metered, uncounted
from lib.training.strides import StrideFirst

__all__ = [
    "CropAndFlip",
    "Hook",
    "Objective",
    "Progress",
    "Schedule",
    "StrideFirst",
    "TrainingError",
    "batches",
    "cached",
    "charge",
    "charge_all",
    "crop_and_flip",
    "device",
    "evaluate",
    "fit",
    "learning_rate",
    "make_optimizer",
    "metered",
    "recalibrate",
    "steps_per_epoch",
    "uncounted",
]
