"""E2-Train: batches dropped, blocks skipped and signs predicted, each alone or all together (arXiv 1910.13349)."""

from contextlib import AbstractContextManager, nullcontext
from math import isfinite, nan
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from lib.data import Data
from lib.layers.gates import LayerError, RecurrentGate, SkippedBlock, gate_of
from lib.recipes.e2_train.signs import SignPrediction, low_precision, predictive_signs
from lib.training import Hook, TrainingError, fit


class MiniBatchDropping(Hook):
    """Stochastic mini-batch dropping: each batch is left out with probability ``share``, whatever the others did.

    Nothing at all happens for a dropped batch; the learning rate goes on as if it had been seen. The code released with
    the paper (Wang et al., NeurIPS 2019, section 3.1) still lets the optimizer step with zero gradients, so that there
    momentum and weight decay go on moving the weights. The draw depends on ``seed`` and the step alone, and what a
    smaller share drops a larger one drops too.

    Raises:
        TrainingError: a share outside [0, 1).

    >>> from lib.recipes.e2_train import MiniBatchDropping
    >>> half = MiniBatchDropping(0.5, seed=0)
    >>> kept = sum(not half.skips(None, step) for step in range(1000))
    >>> 450 <= kept <= 550
    True
    """

    def __init__(self, share: float, seed: int = 0) -> None:
        if not 0 <= share < 1:
            raise TrainingError(f"drop = {share}: allowed are shares in [0, 1)")
        self.share, self.seed = share, seed

    def skips(self, model: nn.Module, step: int) -> bool:
        """Whether the batch of this step is dropped."""
        return bool(np.random.default_rng((self.seed, step)).random() < self.share)  # seeds are hashed: no neighbours


class _Record(Hook):
    """What ran and what was predicted, epoch by epoch."""

    def __init__(self, gate: RecurrentGate | None, rule: SignPrediction | None) -> None:
        self.gate, self.rule = gate, rule
        self.rows: dict[int, dict[str, float]] = {}

    def before_epoch(self, model: nn.Module, epoch: int) -> None:
        self.epoch, self.executed, self.macs = epoch + 1, 0.0, 0.0
        if self.rule:
            self.rule.reset()

    def after_backward(self, model: nn.Module, step: int) -> None:
        row = {"executed": nan, "predicted": nan, "agreement": nan}
        if self.gate:
            self.executed, self.macs = self.executed + self.gate.now.executed, self.macs + self.gate.now.macs
            row["executed"] = self.executed / self.macs
        if self.rule:
            row |= {"predicted": self.rule.predicted, "agreement": self.rule.agreement}
        self.rows[self.epoch] = row


def e2_train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    lr: float,
    drop: float = 0.0,
    skip_cost: float | None = None,
    least: float = 0.0,
    keep: float | None = None,
    eight_bits: bool = False,
    signs: bool = False,
    threshold: float = 0.05,
    sign_scale: float = 0.01,
    hooks: tuple[Hook, ...] = (),
    **fit_options: Any,
) -> pd.DataFrame:
    """Train at less energy, in place: drop batches, skip blocks, predict signs (E2-Train, Wang et al., NeurIPS 2019).

    Args:
        drop: probability that a batch is left out (`MiniBatchDropping`, drawn from fit's ``seed``); the paper's is 0.5.
        skip_cost: weight of the cost loss ``sum_b macs_b p_b / sum_b macs_b``, the mean over a batch's images, which
            teaches the gate of a network that is `skippable` to skip; 0 lets the task alone decide.
        least: while a batch executes less than this share of the gated blocks' work, the cost loss has the other sign.
        keep: instead of a learned gate, pass each block with this probability: the control.
        eight_bits: layers in `low_precision`, with the gradients that they give: what signs save beyond few bits.
        signs: such layers with `predictive_signs`; ``threshold`` is the paper's beta.
        sign_scale: what the signs are multiplied by. They have magnitude 1, which is a hundred times a usual gradient
            or more: ``lr * sign_scale`` is the rate of convolutions and linear layers, ``lr`` that of all else.
        fit_options: as `fit`, weight decay and seed among them.

    The weights that are left are floats in ordinary layers, also after training at 8 bits; `low_precision` around
    an evaluation rounds them as training did. Skipped blocks stay behind
    their gate; in evaluation it is asked as well (`SkippedBlock`).

    Returns:
        One row per epoch that had a batch: ``epoch``, ``train_loss`` (cross-entropy, without the cost loss),
        ``train_accuracy``, ``images``; ``executed``, the share of the gated blocks' multiply-accumulates that ran;
        ``predicted``, the share of signs that were, and ``agreement``, the share of those that are the full
        gradient's. NaN where there is no gate, or no sign.

    Raises:
        TrainingError: a value that is not allowed. LayerError: a network without skippable blocks, where
            a gate is asked for.

    >>> from lib import data, models
    >>> from lib.recipes.e2_train import e2_train
    >>> from lib.layers.gates import skippable
    >>> images = data.load(train_size=200, test_size=100, validation_size=100)
    >>> net = skippable(models.build("resnet8", images.shape, images.classes, width=4))
    >>> log = e2_train(net, images, epochs=1, lr=0.1, batch_size=20, drop=0.5, skip_cost=0.1, signs=True)
    >>> share = log.loc[0].to_dict()
    >>> share["images"] < 200, 0.5 < share["executed"] <= 1, 0 < share["predicted"] < 1
    (True, True, True)
    """
    _check(skip_cost, least, keep, sign_scale)
    dropping = MiniBatchDropping(drop, fit_options.get("seed", 0))
    asks = skip_cost is not None or keep is not None
    gate = gate_of(model) if _gated(model) or asks else None
    if gate and not _gated(model):
        raise LayerError("e2_train: the network's gate skips no block: call skippable(model) before it is trained")
    if gate and (skip_cost is not None or keep is not None):
        gate.keep.fill_(keep or 0.0)
    if skip_cost:
        task = fit_options.get("objective") or (lambda model, x, y, output: data.task.loss(output, y))

        def with_cost(model: nn.Module, x: Tensor, y: Tensor, output: Tensor) -> Tensor:
            sign = -1 if gate.now.share < least else 1
            return task(model, x, y, output) + gate.now.expected(sign * skip_cost)

        fit_options["objective"] = with_cost
    with _arithmetic(model, eight_bits, signs, threshold, sign_scale) as rule:
        record = _Record(gate, rule)
        log = fit(model, data, epochs=epochs, lr=lr, hooks=(dropping, *hooks, record), **fit_options)
    kept = [record.rows[epoch] for epoch in log["epoch"]]
    more = pd.DataFrame(kept, columns=["executed", "predicted", "agreement"], dtype=float)
    return pd.concat([log[["epoch", "train_loss", "train_accuracy", "images"]], more], axis=1)


def _arithmetic(
    model: nn.Module, eight_bits: bool, signs: bool, threshold: float, scale: float
) -> AbstractContextManager[SignPrediction | None]:
    if signs:
        return predictive_signs(model, threshold, scale=scale)
    return low_precision(model) if eight_bits else nullcontext()


def _gated(model: nn.Module) -> bool:
    return any(isinstance(m, SkippedBlock) for m in model.modules())


def _check(skip_cost: float | None, least: float, keep: float | None, sign_scale: float) -> None:
    if skip_cost is not None and not (skip_cost >= 0 and isfinite(skip_cost)):
        raise TrainingError(f"skip_cost = {skip_cost}: allowed are numbers >= 0, or None for no cost loss")
    if keep is not None and not 0 < keep <= 1:
        raise TrainingError(f"keep = {keep}: allowed are probabilities in (0, 1], or None for the learned gate")
    if skip_cost is not None and keep is not None:
        raise TrainingError(f"{skip_cost=}, {keep=}: a constant keep has no gate that a cost could teach; give one")
    if not 0 <= least <= 1 or (least and skip_cost is None):
        raise TrainingError(f"{least=}, {skip_cost=}: allowed are shares in [0, 1], above 0 only with a skip_cost")
    if not (sign_scale > 0 and isfinite(sign_scale)):
        raise TrainingError(f"sign_scale = {sign_scale}: allowed are numbers > 0")
