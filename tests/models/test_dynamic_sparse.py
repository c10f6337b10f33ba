"""Dynamic Sparse R-CNN: Sparse R-CNN with the other proposals, the other assignment, and both."""

import json
from dataclasses import replace

import pytest
import torch

from drcnn.config import from_dict, to_dict
from drcnn.dynamics import DynamicProposalsConfig, LearnedProposalsConfig, OptimalTransportConfig
from drcnn.models import FPNConfig, ResNetConfig, SparseHeadConfig, SparseRCNNConfig
from drcnn.structures import ImageBatch, Targets

SPARSE = SparseRCNNConfig(
    num_classes=3,
    backbone=ResNetConfig("resnet18", norm="gn", frozen_stages=0),
    fpn=FPNConfig(channels=32, top="none"),
    proposals=LearnedProposalsConfig(20),
    head=SparseHeadConfig(stages=3, heads=4, dynamic_channels=16, ffn_channels=64),
)
EXPERTS = DynamicProposalsConfig(20, experts=3, anneal_iterations=20, grid=6, hidden=32)
WITH_DPG = replace(SPARSE, proposals=EXPERTS)
WITH_DLA = replace(SPARSE, assignment=OptimalTransportConfig())
WITH_BOTH = replace(WITH_DPG, assignment=OptimalTransportConfig())
ABLATION = pytest.mark.parametrize(
    "config", [SPARSE, WITH_DPG, WITH_DLA, WITH_BOTH], ids=["sparse", "dpg", "dla", "both"]
)


def batch() -> tuple[ImageBatch, Targets]:
    """Two images of noise with bright rectangles, of one colour by class: one object, and three."""
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 60, (2, 3, 64, 96), generator=generator)
    corner = (torch.rand(2, 5, 2, generator=generator) * 30).round()
    size = (15 + torch.rand(2, 5, 2, generator=generator) * 20).round()
    valid = torch.arange(5) < torch.tensor([[1], [3]])
    boxes = torch.cat([corner, corner + size], dim=-1) * valid.unsqueeze(-1)
    labels = torch.randint(0, 3, (2, 5), generator=generator) * valid
    for i, g in valid.nonzero().tolist():
        x1, y1, x2, y2 = boxes[i, g].int().tolist()
        images[i, labels[i, g], y1:y2, x1:x2] = 220
    sizes = torch.tensor([[64, 96], [60, 80]])
    return ImageBatch(images.to(torch.uint8), sizes), Targets(boxes, labels, valid)


def build(config: SparseRCNNConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return config.build().train()


@ABLATION
def test_a_fixed_batch_is_learned(config):
    model, inputs = build(config), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(15):
        total = sum(model(*inputs).values())
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.dynamics.update()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.7 * sum(totals[:3]), totals
    logged = {name: value.item() for name, value in model.dynamics.metrics().items()}
    assert all(logged[f"positives_per_gt_{stage}"] >= 0.5 for stage in range(3))
    assert ("expert_temperature" in logged) == (config.proposals is EXPERTS)
    assert ("conflict_share_0" in logged) == model.dynamics.assignment.many_to_one
    assert logged.get("expert_temperature", 8.25) == pytest.approx(8.25)  # 15 of 20 iterations from 30 to 1


@ABLATION
def test_training_forward_traces_as_one_graph(config):
    torch.compiler.reset()
    model, inputs = build(replace(config, head=replace(config.head, stages=2))), batch()
    expected = model(*inputs)
    losses = torch.compile(model, fullgraph=True, backend="eager")(*inputs)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-6)
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@ABLATION
def test_config_survives_json(config):
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_one_expert_gives_the_losses_of_sparse_rcnn_bit_for_bit():
    sparse = build(SPARSE)
    single = build(replace(SPARSE, proposals=replace(EXPERTS, experts=1)))
    state = sparse.state_dict()
    for name in ("proposals.boxes", "proposals.features"):
        state[name] = state[name].unsqueeze(0)
    report = single.load_state_dict(state, strict=False)
    assert not report.unexpected_keys and all(name.startswith("proposals.") for name in report.missing_keys)
    expected, found = sparse(*batch()), single(*batch())
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_positives_do_not_fall_from_stage_to_stage():
    """Where all stages predict the same; k is fixed, so that overlaps play no part."""
    assignment = OptimalTransportConfig(fixed_k=4)
    model = build(replace(WITH_BOTH, assignment=assignment, head=replace(SPARSE.head, stages=6)))
    images, targets = batch()
    output = model.stages(images)[-1]
    model.head.losses([output] * 6, images, targets, model.dynamics.assignment, model.scale)
    model.dynamics.update()
    metrics = model.dynamics.metrics()
    positives = [metrics[f"positives_per_gt_{stage}"].item() for stage in range(6)]
    assert positives == sorted(positives) and positives[0] < positives[-1]


def test_detections_of_many_to_one_training_pass_nms():
    detected = {}
    for config in (SPARSE, WITH_DLA):
        model = build(config).eval()
        with torch.no_grad():
            detected[config.assignment] = model(batch()[0]).valid.sum().item()
    # Before training, many proposals cover the same part of the image.
    assert detected[SPARSE.assignment] > detected[WITH_DLA.assignment] > 0


@pytest.mark.parametrize("experts", [1, 4])
def test_number_of_weights(experts):
    """Of 300 proposals and 80 classes on a ResNet-50: Sparse R-CNN's, the generator's, more proposals."""
    with torch.device("meta"):
        plain = SparseRCNNConfig().build()
        model = SparseRCNNConfig(proposals=DynamicProposalsConfig(experts=experts)).build()
    of_generator = 60 * 256 + (30**2 + 1) * 1500 + (1500 + 1) * experts * 300
    count = sum(p.numel() for p in plain.parameters())
    assert count == 106_289_768
    assert sum(p.numel() for p in model.parameters()) == count + of_generator + (experts - 1) * 300 * (
        4 + 256
    )
