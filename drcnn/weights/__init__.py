"""Loading weights: backbones from torchvision or a file, whole detectors from ours or other systems."""

from drcnn.weights.backbone import load_backbone_weights
from drcnn.weights.files import read_state_dict
from drcnn.weights.loading import LoadReport, load_weights

__all__ = ["LoadReport", "load_backbone_weights", "load_weights", "read_state_dict"]
