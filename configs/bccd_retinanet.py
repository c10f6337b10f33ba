"""RetinaNet, light, from scratch on a CPU, on blood cells (BCCD)."""

from drcnn import presets
from drcnn.config import Config

config = Config(
    model=presets.light_retinanet(num_classes=3),
    data=presets.small_images("data/bccd"),
    optim=presets.short_schedule(600, lr=0.01),
)
