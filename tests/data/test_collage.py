"""Collages: where images, boxes, labels and masks of several batches come to lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drcnn.data import Batch, Stitcher, pad_targets
from drcnn.data.bitmasks import pack_masks, pad_masks
from drcnn.dynamics import ScaleTrainingConfig, box_area
from drcnn.ops import collage, collage_cells
from drcnn.structures import ImageBatch

FILL = (123.675, 116.28, 103.53)
DST = ScaleTrainingConfig()


def make_batch(generator: np.random.Generator, images: int, most: int, *, masks: bool) -> Batch:
    """A batch whose images have up to ``most`` rectangles; odd padded sides, sizes and boxes."""
    height, width = generator.integers(25, 90, 2).tolist()
    tensor = torch.zeros(images, 3, height, width, dtype=torch.uint8)
    sizes, boxes, labels, drawn = [], [], [], []
    for b in range(images):
        h, w = (int(generator.integers(side // 2, side + 1)) for side in (height, width))
        tensor[b, :, :h, :w] = torch.from_numpy(generator.integers(1, 256, (3, h, w), dtype=np.uint8))
        count = int(generator.integers(0, most + 1))
        corner = np.stack([generator.integers(0, s - 8, count) for s in (w, h)], axis=1)
        room = np.array([w, h]) - corner
        size = 8 + np.floor(generator.random((count, 2)) * (room - 8))
        own = np.concatenate([corner, corner + size], axis=1).astype(np.float32)
        mask = np.zeros((count, h, w), dtype=bool)
        for i, (x1, y1, x2, y2) in enumerate(own.astype(int)):
            mask[i, y1:y2, x1:x2] = True
        sizes.append((h, w))
        boxes.append(torch.from_numpy(own))
        labels.append(torch.from_numpy(generator.integers(0, 80, count)))
        drawn.append(pack_masks(mask))
    targets = pad_targets(boxes, labels)
    packed = pad_masks(drawn, targets.valid.shape[1], height, width) if masks else None
    indices = torch.from_numpy(generator.integers(0, 1000, images))
    return Batch(ImageBatch(tensor, torch.tensor(sizes)), targets, indices, torch.tensor(sizes), masks=packed)


def make_batches(seed: int, count: int, images: int = 2, most: int = 5, *, masks: bool = True) -> list[Batch]:
    generator = np.random.default_rng(seed)
    return [make_batch(generator, images, most, masks=masks) for _ in range(count)]


def stitch(batches: list[Batch], config: ScaleTrainingConfig = DST, multiple: int = 8) -> Batch:
    return Stitcher(config, FILL, multiple)(batches, "cpu")


def shape(batch: Batch) -> tuple[int, int]:
    return batch.images.tensor.shape[2], batch.images.tensor.shape[3]


def canvases(joined: Batch, batches: list[Batch], layout: str):
    """For each object of each batch, in the order of its canvas: its batch, image, old slot, canvas, cell."""
    for c in range(len(joined.images.tensor)):
        images = len(batches[0].indices)
        parts = [(j, c) for j in range(len(batches))] if layout == "spatial" else [divmod(c, images)]
        members = [batches[j] for j, _ in parts]
        cells = collage_cells([shape(batch) for batch in members], *shape(joined))
        found = [
            (j, b, slot, cell)
            for (j, b), cell in zip(parts, cells, strict=True)
            for slot in batches[j].targets.valid[b].nonzero().flatten().tolist()
        ]
        yield c, found


LAYOUTS = st.sampled_from([("spatial", 4), ("spatial", 9), ("batch", 2), ("batch", 3), ("batch", 4)])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), LAYOUTS, st.integers(0, 6), st.sampled_from(["nearest", "bilinear"]))
def test_objects_keep_their_order_their_labels_and_their_share_of_the_cell(seed, layout, most, mode):
    layout, components = layout
    batches = make_batches(seed, components, most=most)
    joined = stitch(batches, replace(DST, layout=layout, components=components, interpolation=mode))
    boxes, labels, valid, masks = joined.targets
    assert valid.shape[1] >= 8 and valid.shape[1] & (valid.shape[1] - 1) == 0
    assert not boxes[~valid].any() and not labels[~valid].any() and not masks[~valid].any()
    for c, found in canvases(joined, batches, layout):
        assert valid[c].tolist() == [slot < len(found) for slot in range(valid.shape[1])]
        for new, (j, b, old, cell) in enumerate(found):
            targets, (height, width) = batches[j].targets, shape(batches[j])
            assert labels[c, new] == targets.labels[b, old]
            before, box = targets.boxes[b, old], boxes[c, new]
            ratio = cell.height * cell.width / (height * width)
            torch.testing.assert_close(box_area(box), box_area(before) * ratio, rtol=1e-3, atol=1e-3)
            x1, y1, x2, y2 = box.tolist()
            assert cell.left <= x1 < x2 <= cell.left + cell.width
            assert cell.top <= y1 < y2 <= cell.top + cell.height
            assert x2 <= joined.images.sizes[c, 1] and y2 <= joined.images.sizes[c, 0]
            rows, columns = masks[c, new].any(dim=1), masks[c, new].any(dim=0)
            for line, start, end in ((rows, y1, y2), (columns, x1, x2)):
                drawn = line.nonzero().flatten()
                if len(drawn) == 0:
                    assert end - start < 1, "only an object thinner than a pixel may lose all of them"
                else:
                    assert abs(drawn[0] - start) <= 1 and abs(drawn[-1] + 1 - end) <= 1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(["device", "loader"]))
def test_images_and_masks_are_those_of_the_operator(seed, place):
    batches = make_batches(seed, 4)
    joined = stitch(batches, replace(DST, stitch_on=place))
    images = [batch.images.tensor for batch in batches]
    sizes = [batch.images.sizes for batch in batches]
    height, width = shape(batches[0])
    assert torch.equal(joined.images.tensor, collage(images, sizes, height, width, fill=FILL))
    assert joined.images.sizes.tolist() == [[height, width]] * 2 and joined.images.parts == 1
    for c, found in canvases(joined, batches, "spatial"):
        for new, (j, b, old, _) in enumerate(found):
            # The same through the operator: the mask in the place of its image, nothing in the others'.
            alone = [torch.zeros(1, 1, *shape(batch), dtype=torch.uint8) for batch in batches]
            alone[j] += batches[j].to("cpu").targets.masks[b, old].to(torch.uint8)
            full = [torch.tensor([shape(batch)]) for batch in batches]
            expected = collage(alone, full, height, width, fill=(0.0,)).bool()
            assert torch.equal(joined.targets.masks[c, new], expected[0, 0])


def test_one_batch_is_left_as_it_is():
    (batch,) = make_batches(0, 1)
    joined, expected = stitch([batch], replace(DST, components=1)), batch.to("cpu")
    assert joined.images.parts == 1
    for one, other in ((joined.images[:2], expected.images[:2]), (joined.targets, expected.targets)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_all_images_are_named_batch_after_batch():
    batches = make_batches(1, 4, images=3)
    for layout in ("spatial", "batch"):
        joined = stitch(batches, replace(DST, layout=layout))
        assert torch.equal(joined.indices, torch.cat([batch.indices for batch in batches]))
        assert torch.equal(joined.original_sizes, torch.cat([batch.original_sizes for batch in batches]))


@pytest.mark.parametrize(("components", "sides"), [(4, (32, 48)), (2, (48, 64)), (3, (40, 56))])
def test_layout_batch(components, sides):
    batches = make_batches(2, components, images=3)
    own = torch.zeros(3, 3, 64, 90, dtype=torch.uint8)
    batches[0] = batches[0]._replace(images=ImageBatch(own, torch.tensor([[60, 80]] * 3)))
    batches = [batch._replace(masks=None) for batch in batches]
    joined = stitch(batches, replace(DST, layout="batch", components=components))
    assert joined.images.tensor.shape == (3 * components, 3, *sides) and joined.images.parts == components
    (cell,) = collage_cells([(64, 90)], *sides)
    assert joined.images.sizes[0].tolist() == [-(-60 * cell.height // 64), -(-80 * cell.width // 90)]
    assert (joined.images.sizes <= torch.tensor(sides)).all()
    moved = joined.images.to("cpu")
    assert moved.parts == components


def test_small_boxes_are_dropped_with_their_masks_and_the_others_close_the_gap():
    batches = make_batches(3, 4, most=6)
    everything = stitch(batches)
    few = stitch(batches, replace(DST, min_box_area=100.0))
    large = box_area(everything.targets.boxes) >= 100
    kept = everything.targets.valid & large
    assert 0 < kept.sum() < everything.targets.valid.sum()
    for c in range(2):
        own = few.targets.valid[c]
        for name in ("boxes", "labels", "masks"):
            assert torch.equal(
                getattr(few.targets, name)[c][own], getattr(everything.targets, name)[c][kept[c]]
            )


def test_a_canvas_is_as_large_as_the_batch_whose_place_it_takes():
    batches = make_batches(5, 4)
    for first in range(4):
        turned = batches[first:] + batches[:first]
        assert shape(stitch(turned)) == tuple(turned[0].images.tensor.shape[2:])


def test_batches_without_any_object():
    batches = make_batches(4, 4, most=0)
    joined = stitch(batches)
    assert joined.targets.boxes.shape == (2, 8, 4) and not joined.targets.valid.any()
    assert joined.targets.masks.shape == (2, 8, *shape(joined)) and not joined.targets.masks.any()
