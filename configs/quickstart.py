"""Dynamic R-CNN, light, from scratch on a CPU in minutes, on synthetic shapes that it makes itself."""

from dataclasses import replace

from drcnn import presets
from drcnn.config import Config
from drcnn.dynamics import DynamicTrainingConfig

# Few objects and few iterations: lower ranks and a shorter window than the paper's, so that T and beta move.
training = DynamicTrainingConfig(iou_top_k=20, error_top_k=3, window=25)

config = Config(
    model=presets.dynamic(presets.light_faster_rcnn(num_classes=4), training),
    data=presets.synthetic_shapes("data/quickstart"),
    # From random weights, a third of the rate at once makes the first losses leap.
    optim=replace(presets.short_schedule(600), warmup_iterations=80, warmup_factor=0.01),
)
