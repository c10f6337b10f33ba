"""Mask R-CNN and Cascade R-CNN against recorded outputs of MMDetection 3.3.0 with the same weights."""

import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drcnn.engine.masks import paste_masks
from drcnn.models import BoxHeadConfig, CascadeHeadConfig, FasterRCNNConfig, MaskHeadConfig, RPNConfig
from drcnn.models.mask_head import mask_targets
from drcnn.models.roi_heads import Samples
from drcnn.ops import box_iou, match_boxes, roi_align
from drcnn.structures import Detections, ImageBatch, Targets

EVERYTHING = 10**6
# MMDetection's third stage has the standard deviations 0.033 and 0.067, not 1/30 and 1/15.
MMDET_DELTA_WEIGHTS = tuple(
    tuple(1 / std for std in stds)
    for stds in ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
)
RULES = (
    (r"neck\.lateral_convs\.(\d)\.conv\.", r"fpn.inner_blocks.\1.0."),
    (r"neck\.fpn_convs\.(\d)\.conv\.", r"fpn.layer_blocks.\1.0."),
    (r"rpn_head\.rpn_conv\.", "rpn.conv."),
    (r"rpn_head\.rpn_cls\.", "rpn.objectness."),
    (r"rpn_head\.rpn_reg\.", "rpn.deltas."),
    (r"roi_head\.bbox_head\.(\d)\.", r"roi_head.bbox_head.stages.\1."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?shared_fcs\.0\.", r"box_head.\1fc1."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?shared_fcs\.1\.", r"box_head.\1fc2."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?fc_cls\.", r"box_head.\1classifier."),
    (r"roi_head\.bbox_head\.(stages\.\d\.)?fc_reg\.", r"box_head.\1deltas."),
    (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"mask_head.convs.\1."),
    (r"roi_head\.mask_head\.upsample\.", "mask_head.deconv."),
    (r"roi_head\.mask_head\.conv_logits\.", "mask_head.logits."),
)


@dataclass
class Golden:
    """Recorded outputs, and our detector with the weights that gave them."""

    name: str
    model: nn.Module
    arrays: dict[str, np.ndarray]
    values: dict
    inputs: ModuleType


def own_name(name: str) -> str:
    for pattern, replacement in RULES:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def config_of(name: str, max_positive: int | None = None) -> FasterRCNNConfig:
    """The recorded detector; with ``max_positive``, nothing is random, as every proposal is in the loss."""
    box = BoxHeadConfig(score_threshold=0.02)
    rpn = RPNConfig()
    if max_positive is not None:
        box = replace(box, samples=EVERYTHING, positive_fraction=max_positive / EVERYTHING)
        rpn = replace(rpn, samples=EVERYTHING, positive_fraction=1.0)
    if name == "cascade_rcnn":
        stage = replace(box, class_agnostic=True, delta_weights=MMDET_DELTA_WEIGHTS[0])
        cascade = CascadeHeadConfig(stage, delta_weights=MMDET_DELTA_WEIGHTS, average="logits")
        return FasterRCNNConfig(rpn=replace(rpn, post_nms=2000, allowed_border=0.0), box_head=cascade)
    # Its box losses are L1, which SmoothL1 becomes as beta goes to 0.
    config = FasterRCNNConfig(rpn=replace(rpn, beta=1e-6), box_head=box, mask_head=MaskHeadConfig())
    return replace(config, training=replace(config.training, beta=1e-6))


@pytest.fixture(scope="module", params=["mask_rcnn", "cascade_rcnn"])
def golden(request, shared_data) -> Golden:
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    name = request.param
    shapes = json.loads((folder / f"keys_{name}.json").read_text())
    weights = module_of(folder / "det_weights.py").make_state_dict(shapes)
    model = config_of(name).build().eval()
    ours = {own_name(key): torch.from_numpy(np.asarray(value)) for key, value in weights.items()}
    result = model.load_state_dict({k: v for k, v in ours.items() if "num_batches" not in k}, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith("dynamics.") for key in result.missing_keys)
    values = json.loads((folder / f"{name}.json").read_text())
    arrays = dict(np.load(folder / f"{name}.npz"))
    return Golden(name, model, arrays, values, module_of(folder / "det_inputs.py"))


def images_of(golden: Golden, indices: tuple[int, ...]) -> ImageBatch:
    arrays = [golden.inputs.image(i) for i in indices]
    tensor = torch.zeros(len(arrays), 3, 320, 416, dtype=torch.uint8)
    for slot, array in zip(tensor, arrays, strict=True):
        slot[:, : array.shape[0], : array.shape[1]] = torch.from_numpy(array).permute(2, 0, 1)
    return ImageBatch(tensor, torch.tensor([array.shape[:2] for array in arrays]))


def targets_of(golden: Golden) -> Targets:
    """Both images' ground truths."""
    boxes, labels = (
        torch.stack([torch.from_numpy(make(i)) for i in range(2)])
        for make in (golden.inputs.gt_boxes, golden.inputs.gt_labels)
    )
    masks = torch.zeros(2, 5, 320, 416, dtype=torch.bool)
    for i in range(2):
        mask = torch.from_numpy(golden.inputs.gt_masks(i))
        masks[i, :, : mask.shape[1], : mask.shape[2]] = mask.bool()
    return Targets(boxes, labels, torch.ones_like(labels, dtype=torch.bool), masks)


def assert_recorded(golden: Golden, key: str, value: Tensor) -> None:
    sample, stats = golden.arrays[f"{key}.sample"], golden.arrays[f"{key}.stats"]
    assert list(value.shape) == golden.arrays[f"{key}.shape"].tolist(), key
    flat = value.double().flatten()
    chosen = flat[np.linspace(0, len(flat) - 1, 64).astype(np.int64)]
    scale = np.abs(stats[2:]).max()
    np.testing.assert_allclose(chosen, sample, rtol=0, atol=2e-5 * scale, err_msg=key)
    found = [flat.mean(), flat.std(unbiased=False), flat.min(), flat.max()]
    np.testing.assert_allclose(found, stats, rtol=0, atol=2e-5 * scale, err_msg=key)


def assert_near(found: Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@torch.no_grad()
def test_features_proposals_and_heads(golden):
    model, images = golden.model, images_of(golden, (0,))
    assert_recorded(golden, "input", model.normalize(images))
    features = model.backbone(model.normalize(images))
    for i, feature in enumerate(features):
        assert_recorded(golden, f"backbone{i}", feature)
    features = model.fpn(features)
    for i, feature in enumerate(features):
        assert_recorded(golden, f"fpn{i}", feature)
    proposals, valid, _ = model.rpn(features, images)
    assert valid.all()
    gap = (proposals[0, :200, None] - torch.from_numpy(golden.arrays["rpn.boxes"])).abs().amax(-1)
    assert gap.amin(1).median() < 1e-2 and (gap.amin(0) < 0.1).double().mean() > 0.97
    boxes = torch.from_numpy(golden.inputs.proposals(0)[:100])[None]
    pooled = features[:-1]
    heads = golden.model.box_head.stages if golden.name == "cascade_rcnn" else [golden.model.box_head]
    for s, head in enumerate(heads):
        pool = roi_align(pooled, boxes, head.strides, 7, 0, True)
        assert_recorded(golden, f"roi{s}.feats", pool[0])
        logits, deltas = head(pooled, boxes)
        assert_near(logits[0, :20], golden.arrays[f"roi{s}.cls_score20"])
        assert_near(deltas[0, :20].flatten(1), golden.arrays[f"roi{s}.bbox_pred20"])
    if golden.name == "mask_rcnn":
        labels = torch.full((1, 5), 3)
        masks = model.mask_head(pooled, boxes[:, :5], labels)
        assert_near(masks[0], golden.arrays["roi0.mask_logits5_c3"])


def agreeing(golden: Golden, found: Detections, image: int, key: str) -> tuple[Tensor, Tensor]:
    """Positions of ours and of theirs that are the same detection, one to one."""
    boxes, scores, labels = (
        torch.from_numpy(golden.arrays[f"{key}.{part}"]) for part in ("boxes", "scores", "labels")
    )
    same = box_iou(found.boxes[image], boxes) > 0.99
    same &= (found.scores[image][:, None] - scores).abs() < 1e-3
    same &= (found.labels[image][:, None] == labels) & found.valid[image][:, None]
    ours = same.any(1).nonzero().squeeze(1)
    return ours, same[ours].double().argmax(1)


@torch.no_grad()
def test_detections_of_a_batch_as_sets(golden):
    found = golden.model(images_of(golden, (0, 1)))
    assert (found.masks is not None) == (golden.name == "mask_rcnn")
    for i in range(2):
        ours, theirs = agreeing(golden, found, i, f"b2_det{i}")
        # 100 of many are kept: those at the end of the list may differ.
        assert len(theirs.unique()) >= 97
        if found.masks is not None:
            compare_masks(golden, found, i, ours, theirs)


def compare_masks(golden: Golden, found: Detections, image: int, ours: Tensor, theirs: Tensor) -> None:
    height, width = golden.inputs.IMG_HW[image]
    pasted = paste_masks(found.masks[image, ours], found.boxes[image, ours], (height, width))
    area = golden.arrays[f"b2_det{image}.mask_area"][theirs]
    np.testing.assert_allclose(pasted.sum((1, 2)), area, rtol=0.01, atol=2)
    bits = np.unpackbits(golden.arrays[f"b2_det{image}.mask_bits20"], axis=1)[:, : height * width]
    recorded = torch.from_numpy(bits.reshape(20, height, width).astype(bool))
    compared = theirs < 20
    assert compared.sum() >= 18
    mask, expected = pasted[compared], recorded[theirs[compared]]
    difference = (mask ^ expected).sum((1, 2))
    assert expected.any() and (difference <= 0.01 * expected.sum((1, 2)) + 1).all()


def train_copy(golden: Golden, max_positive: int) -> nn.Module:
    model = config_of(golden.name, max_positive).build()
    model.load_state_dict(golden.model.state_dict())
    return model.train()


def assert_gradients(model: nn.Module, recorded: dict[str, float], beginning: str, least: int = 8) -> None:
    """Compares the norms of the gradients of parameters whose names, MMDetection's, begin so."""
    parameters = dict(model.named_parameters())
    compared = [n for n in recorded if n.startswith(beginning) and own_name(n) in parameters]
    assert len(compared) >= least  # frozen batch norm has no parameters
    for name in compared:
        # Their norm of the largest weight, over 12.8 M values, was added up in single precision.
        found = parameters[own_name(name)].grad.norm().item()
        assert found == pytest.approx(recorded[name], rel=2e-3 if "fcs.0.weight" in name else 2e-4), name


def recorded_losses(golden: Golden, values: dict) -> dict[str, float]:
    """Recorded losses by our names."""
    if golden.name == "cascade_rcnn":
        found = {f"loss_classification_{s}": values[f"s{s}.loss_cls"] for s in range(3)}
        found |= {f"loss_box_{s}": values[f"s{s}.loss_bbox"] for s in range(3)}
    else:
        found = {"loss_classification": values["loss_cls"], "loss_box": values["loss_bbox"]}
        found["loss_mask"] = values["loss_mask"]
    if "loss_rpn_cls" in values:
        found["loss_rpn_objectness"] = sum(values["loss_rpn_cls"])
        found["loss_rpn_box"] = sum(values["loss_rpn_bbox"])
    return found


def test_losses_of_the_whole_detector(golden):
    # Few proposals are positive; the mask head has no more slots than these.
    model = train_copy(golden, max_positive=20 if golden.name == "mask_rcnn" else EVERYTHING)
    losses = model(images_of(golden, (0, 1)), targets_of(golden))
    expected = recorded_losses(golden, golden.values["loss_full"])
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4), name
    sum(losses.values()).backward()
    assert_gradients(model, golden.values["loss_full_grad_norm"], "")


def test_losses_of_the_heads_on_given_proposals(golden):
    # The mask head has a slot for each positive that there can be; a cascade finds more in its later stages.
    positives = [419, 430]
    model = train_copy(golden, max_positive=max(positives) if golden.name == "mask_rcnn" else EVERYTHING)
    images, targets = images_of(golden, (0, 1)), targets_of(golden)
    with torch.no_grad():
        pooled = model.fpn(model.backbone(model.normalize(images)))[:-1]
    proposals = torch.stack([torch.from_numpy(golden.inputs.proposals(i)) for i in range(2)])
    valid = torch.ones(proposals.shape[:2], dtype=torch.bool)
    losses, samples = model.box_head.losses(
        pooled, proposals, valid, images, targets, model.dynamics, model.scale
    )
    recorded = golden.values["roi_fixed"]
    expected = recorded_losses(golden, recorded["losses"])
    assert losses.keys() == expected.keys() - {"loss_mask"}
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-5), name
    sum(losses.values()).backward()
    assert_gradients(model, recorded["grad_norm"], "roi_head.bbox_head")
    if golden.name == "mask_rcnn":
        assert (samples.labels < 80).sum(1).tolist() == positives
        # All positives at once take gigabytes, and gradients of all layers minutes: those of the convolutions
        # are compared on the few positives of the whole detector.
        model.mask_head.convs.requires_grad_(False)
        loss = mask_loss_in_pieces(model.mask_head, pooled, samples, targets.masks)
        assert loss == pytest.approx(expected["loss_mask"], rel=1e-5)
        for layer in ("upsample", "conv_logits"):
            assert_gradients(model, recorded["grad_norm"], f"roi_head.mask_head.{layer}", least=2)


def mask_loss_in_pieces(head: nn.Module, pooled: list[Tensor], samples: Samples, masks: Tensor) -> float:
    """The mean over all positives from those of a few slots at a time, with gradients."""
    positive, total = samples.labels < head.num_classes, 0.0
    for start in range(0, positive.shape[1], 16):
        slots = slice(start, start + 16)
        piece = Samples(*(values[:, slots] for values in samples[:-1]), samples.max_positive)
        share = positive[:, start : start + 16].sum() / positive.sum()
        loss = head.losses(pooled, piece, masks)["loss_mask"] * share
        loss.backward()
        total += loss.item()
    return total


def test_mask_targets(shared_data):
    folder = shared_data.parent / "golden"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    arrays = np.load(folder / "ops.npz")
    inputs = module_of(folder / "det_inputs.py")
    boxes = torch.from_numpy(inputs.proposals(0)[arrays["mask_target.index"]])[None]
    match = match_boxes(boxes, torch.from_numpy(inputs.gt_boxes(0))[None])
    masks = torch.from_numpy(inputs.gt_masks(0)).bool()[None]
    wanted = torch.ones_like(match.gt_index, dtype=torch.bool)
    found = mask_targets(masks, boxes, match.gt_index, wanted, 28)
    expected = np.unpackbits(arrays["mask_target.bits"], axis=1).reshape(1, 20, 28, 28)
    assert expected.any()
    np.testing.assert_array_equal(found, expected)
