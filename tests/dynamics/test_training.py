"""The policy of Dynamic R-CNN: statistics, windows, limits, presets, and state."""

import math

import numpy as np
import pytest
import torch

from drcnn.dynamics import Assignment, DynamicTraining, DynamicTrainingConfig, FixedTraining
from drcnn.dynamics.training import batch_statistics, mean_of_records, median_of_records

PAPER = DynamicTrainingConfig.paper()


def assignment(ious, errors, positive, *, is_gt=None, sampled=None, has_gt=None, valid=None) -> Assignment:
    """An assignment from lists of one row per image."""
    max_iou = torch.tensor(ious)
    shape = max_iou.shape
    no, yes = torch.zeros(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.bool)
    has_gt = torch.tensor([True] * shape[0] if has_gt is None else has_gt)
    return Assignment(
        boxes=torch.tensor([0.0, 0, 10, 10]).expand(*shape, 4),
        gt_boxes=torch.tensor([0.0, 0, 10, 5]).expand(shape[0], 1, 4),
        gt_valid=has_gt.unsqueeze(1),
        max_iou=max_iou,
        error=torch.tensor(errors),
        valid=yes if valid is None else torch.tensor(valid),
        is_gt=no if is_gt is None else torch.tensor(is_gt),
        positive=torch.tensor(positive),
        sampled=yes if sampled is None else torch.tensor(sampled),
    )


def with_ranks(config: DynamicTrainingConfig, k_iou: int, k_error: int, window: int = 2, **fields):
    return DynamicTrainingConfig(
        **{**vars(config), "iou_top_k": k_iou, "error_top_k": k_error, "window": window, **fields}
    )


def step(policy: DynamicTraining, *batches: Assignment) -> None:
    for batch in batches:
        policy.record(batch)
    policy.update()


FIRST = assignment(
    [[0.9, 0.8, 0.1, 1.0], [0.7, 0.3, 0.2, 1.0]],
    [[0.5, 0.7, 9.0, 0.0], [0.4, 0.6, 8.0, 0.0]],
    [[True, True, False, True], [True, False, False, True]],
    is_gt=[[False, False, False, True]] * 2,
)


def test_paper_averages_per_image_statistics_without_ground_truths():
    policy = DynamicTraining(with_ranks(PAPER, 2, 2))
    step(policy, FIRST)
    # Second largest IoUs 0.8 and 0.3; second smallest errors 0.7 and (one positive only) 0.4.
    assert policy.iou_records[0].item() == pytest.approx(0.55)
    assert policy.error_records[0].item() == pytest.approx(0.55)
    assert policy.iou_threshold.item() == pytest.approx(0.4) and policy.beta.item() == 1.0
    step(policy, FIRST)
    assert policy.iou_threshold.item() == pytest.approx(0.55)
    assert policy.beta.item() == pytest.approx(0.55)
    assert policy.iou_records.isnan().all() and policy.iteration.item() == 0


def test_mmdet_ranks_errors_over_the_batch_with_ground_truths():
    config = with_ranks(DynamicTrainingConfig.mmdet(), 2, 2)
    iou, iou_valid, error, error_valid = batch_statistics(FIRST, config)
    assert iou.tolist() == pytest.approx([0.9, 0.7]) and iou_valid.all()
    # Fourth smallest of 0, 0, 0.4, 0.5, 0.7.
    assert error.tolist() == pytest.approx([0.5]) and error_valid.all()
    assert DynamicTraining(DynamicTrainingConfig.mmdet()).iou_threshold.item() == 0.5


def test_author_ranks_everything_over_the_batch():
    config = with_ranks(DynamicTrainingConfig.author(), 2, 3)
    iou, _, error, _ = batch_statistics(FIRST, config)
    # Background proposals count with their IoU with ground truth 0, which is 0.5 here: the fourth
    # largest of 1, 1, 0.9, 0.8, 0.7, 0.5, 0.5, 0.5. Their error with it is the mean of 0 and 10 * 2.5 / 10:
    # the sixth smallest of 0, 0, 0.4, 0.5, 0.7, 1.25, 1.25, 1.25.
    assert iou.tolist() == pytest.approx([0.8])
    assert error.tolist() == pytest.approx([1.25])


def test_ranks_are_clamped_to_the_count():
    policy = DynamicTraining(with_ranks(PAPER, 75, 10))
    step(policy, FIRST)
    assert policy.iou_records[0].item() == pytest.approx((0.1 + 0.2) / 2)
    assert policy.error_records[0].item() == pytest.approx((0.7 + 0.4) / 2)


@pytest.mark.parametrize(
    ("preset", "expected_iou"), [("paper", 0.8), ("mmdet", (0.9 + 0.0) / 2), ("author", math.nan)]
)
def test_images_without_ground_truths(preset, expected_iou):
    batch = assignment(
        [[0.9, 0.8, 1.0], [0.0, 0.0, 0.0]],
        [[0.5, 0.7, 0.0], [0.0, 0.0, 0.0]],
        [[True, True, True], [False, False, False]],
        is_gt=[[False, False, True], [False, False, False]],
        has_gt=[True, False],
    )
    config = with_ranks(getattr(DynamicTrainingConfig, preset)(), 2, 1)
    policy = DynamicTraining(config)
    step(policy, batch)
    assert policy.iou_records[0].item() == pytest.approx(expected_iou, nan_ok=True)


def test_a_window_without_records_changes_nothing():
    empty = assignment([[0.0, 0.0]], [[0.0, 0.0]], [[False, False]], has_gt=[False])
    policy = DynamicTraining(with_ranks(PAPER, 2, 2))
    for _ in range(4):
        step(policy, empty)
    assert policy.iou_threshold.item() == pytest.approx(0.4) and policy.beta.item() == 1.0
    no_positives = assignment([[0.6, 0.6]], [[0.2, 0.2]], [[False, False]])
    for _ in range(2):
        step(policy, no_positives)
    assert policy.iou_threshold.item() == pytest.approx(0.6) and policy.beta.item() == 1.0


def test_limits():
    low = assignment([[0.1, 0.1]], [[0.0, 0.0]], [[True, True]])
    policy = DynamicTraining(with_ranks(PAPER, 1, 1))
    for _ in range(2):
        step(policy, low)
    assert policy.iou_threshold.item() == pytest.approx(0.4)
    assert policy.beta.item() == pytest.approx(1e-3)
    high = assignment([[0.9, 0.9]], [[7.0, 7.0]], [[True, True]])
    for _ in range(2):
        step(policy, high)
    assert policy.iou_threshold.item() == pytest.approx(0.9) and policy.beta.item() == 1.0
    kept = DynamicTraining(with_ranks(DynamicTrainingConfig.mmdet(), 1, 1))
    for _ in range(2):
        step(kept, low)
    assert kept.beta.item() == 1.0


def test_micro_batches_are_one_iteration():
    together, apart = (DynamicTraining(with_ranks(PAPER, 2, 2)) for _ in range(2))
    halves = [Assignment(*(field[i : i + 1] for field in FIRST[:9])) for i in range(2)]
    step(together, FIRST)
    step(apart, *halves)
    assert apart.iteration.item() == together.iteration.item() == 1
    torch.testing.assert_close(apart.iou_records, together.iou_records, equal_nan=True)
    torch.testing.assert_close(apart.error_records, together.error_records, equal_nan=True)


def test_statistics_that_are_not_finite_are_left_out_and_counted():
    bad = assignment([[math.nan, 0.8]], [[math.inf, 0.3]], [[True, True]])
    policy = DynamicTraining(with_ranks(PAPER, 2, 2))
    step(policy, bad)
    assert policy.metrics()["non_finite_statistics"].item() == 2
    assert policy.iou_records.isnan().all() and policy.error_records.isnan().all()
    step(policy, FIRST)
    assert policy.iou_threshold.item() == pytest.approx(0.55)


def test_switches_freeze_each_half():
    labels = DynamicTraining(with_ranks(PAPER, 2, 2, dynamic_loss=False))
    loss = DynamicTraining(with_ranks(PAPER, 2, 2, dynamic_labels=False, iou_threshold=0.5))
    for policy in (labels, loss):
        for _ in range(2):
            step(policy, FIRST)
    assert (labels.iou_threshold.item(), labels.beta.item()) == (pytest.approx(0.55), 1.0)
    assert (loss.iou_threshold.item(), loss.beta.item()) == (0.5, pytest.approx(0.55))


def test_state_continues_exactly_in_the_middle_of_a_window():
    config = with_ranks(PAPER, 2, 2, window=5)
    policy = DynamicTraining(config)
    for _ in range(3):
        step(policy, FIRST)
    resumed = DynamicTraining(config)
    resumed.load_state_dict(policy.state_dict())
    other = assignment([[0.95, 0.9]], [[0.1, 0.2]], [[True, True]])
    for current in (policy, resumed):
        for _ in range(4):
            step(current, other)
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, equal_nan=True)
    assert policy.iteration.item() == 2


def test_medians_and_means_of_records():
    nan = math.nan
    records = torch.tensor([0.4, nan, 0.1, 0.3, 0.2])
    assert median_of_records(records, "middle")[0].item() == pytest.approx(0.25)
    assert median_of_records(records, "upper")[0].item() == pytest.approx(0.3)
    assert median_of_records(records[:4], "upper")[0].item() == pytest.approx(0.3)
    assert mean_of_records(records, False)[0].item() == pytest.approx(0.25)
    assert mean_of_records(records, True)[0].item() == pytest.approx(0.2)
    for value, known in (median_of_records(records[1:2], "middle"), mean_of_records(records[1:2], False)):
        assert not known and value.ndim == 0


def test_a_long_training_follows_the_algorithm():
    """Against a transcription of algorithm 1 on random statistics."""
    generator = np.random.default_rng(0)
    policy = DynamicTraining(with_ranks(PAPER, 3, 2, window=10))
    threshold, beta, s_i, s_e = 0.4, 1.0, [], []
    for _ in range(35):
        ious, errors = generator.random((2, 2, 20)).astype(np.float32)
        positive = ious > threshold
        s_i.append(np.mean([np.sort(row)[-3] for row in ious]))
        ranked = [np.sort(e[p]) for e, p in zip(errors, positive, strict=True)]
        s_e.append(np.mean([row[min(2, len(row)) - 1] for row in ranked if len(row)]))
        step(policy, assignment(ious.tolist(), errors.tolist(), positive.tolist()))
        if len(s_i) == 10:
            threshold, beta = max(0.4, np.mean(s_i)), min(1.0, np.median(s_e))
            s_i, s_e = [], []
        assert policy.iou_threshold.item() == pytest.approx(threshold, abs=1e-6)
        assert policy.beta.item() == pytest.approx(beta, abs=1e-6)
    assert threshold > 0.8


def test_fixed_training_stays():
    policy = FixedTraining(0.6, beta=0.5)
    step(policy, FIRST)
    assert policy.metrics()["iou_threshold"].item() == pytest.approx(0.6)
    assert policy.beta.item() == 0.5


@pytest.mark.parametrize("field", ["window", "iou_top_k", "error_top_k"])
def test_ranks_and_windows_are_at_least_one(field):
    with pytest.raises(ValueError, match="at least 1"):
        DynamicTraining(DynamicTrainingConfig(**{field: 0}))
