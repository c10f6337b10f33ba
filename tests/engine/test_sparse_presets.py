"""The recipe of Sparse R-CNN (arXiv 2011.12450, section 4) and of its dynamic form (arXiv 2205.02101)."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drcnn import sparse_presets
from drcnn.config import load_config
from drcnn.dynamics import DynamicProposalsConfig, OptimalTransportConfig
from drcnn.engine.optim import describe_lr, describe_schedule, lr_at

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0.5, 2.5e-5), (26.99, 2.5e-5), (27, 2.5e-6), (32.99, 2.5e-6), (33, 2.5e-7), (35.99, 2.5e-7)],
)
def test_lr_by_epoch(epoch, lr):
    schedule = sparse_presets.sparse_schedule()
    steps_per_epoch = 117_266 / 16
    assert schedule.iterations == pytest.approx(36 * steps_per_epoch, rel=1e-3)
    step = round(epoch * sparse_presets.COCO_EPOCH)
    assert lr_at(schedule, step, 16) == pytest.approx(lr, rel=1e-9)


def test_warm_up_is_from_a_hundredth_over_1000_iterations():
    schedule = sparse_presets.sparse_schedule()
    assert lr_at(schedule, 0, 16) == pytest.approx(2.5e-7)
    assert lr_at(schedule, 500, 16) == pytest.approx(2.5e-5 * (0.01 + 0.99 / 2))
    assert lr_at(schedule, 1000, 16) == pytest.approx(2.5e-5)


def test_the_start_of_a_run_says_which_batch_the_lr_is_for():
    schedule = sparse_presets.sparse_schedule()
    assert describe_lr(schedule, 2) == "lr 2.5e-05 for 16 images -> 3.125e-06 for 2 images"
    assert describe_schedule(schedule) == (
        "AdamW, 263880 iterations, lr x 0.1 at 197910 and 241890, warm-up over 1000 from 0.01 of the lr, "
        "gradient norm clipped at 1"
    )


def test_data_is_that_of_detr():
    data = sparse_presets.coco_sparse()
    assert data.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert data.max_size == 1333 and data.hflip == 0.5 and data.batch_size == 16
    crop = data.crop
    assert (crop.probability, crop.short_sides) == (0.5, (400, 500, 600))
    assert (crop.min_size, crop.max_size) == (384, 600)


@pytest.mark.parametrize(
    ("plain", "dpg", "dla", "both"),
    [
        (
            "sparse_rcnn_r50_300_3x",
            "sparse_rcnn_r50_300_dpg_3x",
            "sparse_rcnn_r50_300_dla_3x",
            "dynamic_sparse_rcnn_r50_300_3x",
        ),
        ("bccd_sparse", "bccd_sparse_dpg", "bccd_sparse_dla", "bccd_dynamic_sparse"),
    ],
)
def test_ablations_differ_in_the_design_alone(plain, dpg, dla, both):
    base = load_config(CONFIGS / f"{plain}.py")
    for name, proposals, assignment in ((dpg, True, False), (dla, False, True), (both, True, True)):
        config = load_config(CONFIGS / f"{name}.py")
        model = config.model
        assert isinstance(model.proposals, DynamicProposalsConfig) == proposals
        assert isinstance(model.assignment, OptimalTransportConfig) == assignment
        assert model.proposals.count == base.model.proposals.count
        own = replace(model, proposals=base.model.proposals, assignment=base.model.assignment)
        assert replace(config, model=own) == base


def test_dynamic_proposals_cost_as_many_weights_as_the_paper_says():
    """arXiv 2205.02101 counts 77.8 M and 81.0 M."""

    def count(config):
        with torch.device("meta"):
            return sum(p.numel() for p in config.proposals.build(256).parameters())

    plain, dynamic = sparse_presets.sparse_rcnn(), sparse_presets.dynamic_sparse_rcnn()
    assert count(dynamic) - count(plain) == pytest.approx(3.2e6, rel=0.12)


def test_a_fixed_k_is_the_same_in_every_stage():
    detector = sparse_presets.dynamic_assignment(sparse_presets.sparse_rcnn(), fixed_k=2)
    assert detector.assignment == OptimalTransportConfig(fixed_k=2, unit_increasing=False)
