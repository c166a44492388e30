"""E2-Train: fewer batches, fewer blocks and fewer bits while a network is trained (Wang et al., NeurIPS 2019)."""

from lib.recipes.e2_train.recipe import MiniBatchDropping, e2_train
from lib.recipes.e2_train.signs import SignPrediction, low_precision, predictive_signs

__all__ = [
    "MiniBatchDropping",
    "SignPrediction",
    "e2_train",
    "low_precision",
    "predictive_signs",
]
