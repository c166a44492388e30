"""Network builders by name, and the layers that constraints apply to."""

from lib.models.attention import Attention, by_projection
from lib.models.builders import (
    NAMES,
    BasicBlock,
    PaddedShortcut,
    Pixels,
    build,
    builder,
    lenet5,
    lenet300,
    own,
    resnet,
    set_weights,
    vgg,
)
from lib.models.errors import ModelError
from lib.models.poses import PoseNet
from lib.models.recurrent import Direction, Recurrent, SequenceNet, by_gate, fused, gru, lengths_of, lstm
from lib.models.replacing import copied, more_than, replaced
from lib.models.spiking import LeakyNeurons, SpikingLayer, SpikingNetwork, spike, spiking, stored, unrolled

__all__ = [
    "NAMES",
    "Attention",
    "BasicBlock",
    "Direction",
    "LeakyNeurons",
    "ModelError",
    "PaddedShortcut",
    "Pixels",
    "PoseNet",
    "Recurrent",
    "SequenceNet",
    "SpikingLayer",
    "SpikingNetwork",
    "build",
    "builder",
    "by_gate",
    "by_projection",
    "copied",
    "fused",
    "gru",
    "lenet5",
    "lenet300",
    "lengths_of",
    "lstm",
    "more_than",
    "own",
    "replaced",
    "resnet",
    "set_weights",
    "spike",
    "spiking",
    "stored",
    "unrolled",
    "vgg",
]
