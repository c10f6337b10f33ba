"""Loading weights: backbones from torchvision or a file, whole detectors from ours or other systems."""

from drcnn.weights.backbone import load_backbone_weights
from drcnn.weights.files import Weights, read_content, read_state_dict, read_weights, unwrap
from drcnn.weights.loading import LoadReport, load_weights
from drcnn.weights.sources import Detector, differing_settings, recognise

__all__ = [
    "Detector",
    "LoadReport",
    "Weights",
    "differing_settings",
    "load_backbone_weights",
    "load_weights",
    "read_content",
    "read_state_dict",
    "read_weights",
    "recognise",
    "unwrap",
]
