"""Dynamic R-CNN, light, from scratch on a CPU in minutes, on synthetic shapes that it makes itself."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.dynamic(presets.light_faster_rcnn(num_classes=4)),
    data=presets.synthetic_shapes("data/quickstart"),
    optim=presets.short_schedule(300),
)
