"""A synthetic detection data set: textured shapes on textured backgrounds, with boxes and masks.

``python -m drcnn.data.synthetic OUT --images 200`` makes one on disk, in COCO format.
"""

from drcnn.data.synthetic.maker import SyntheticConfig, make_synthetic
from drcnn.data.synthetic.shapes import SHAPES

__all__ = ["SHAPES", "SyntheticConfig", "make_synthetic"]
