import pytest
import torch

from drcnn.engine.optim import OptimConfig, build_optimizer, describe_lr, describe_schedule, lr_at, set_lr
from drcnn.errors import ConfigError


@pytest.mark.parametrize(
    ("iteration", "expected"),
    [
        (0, 0.02 / 3),  # a third at the first iteration
        (250, 0.02 * 2 / 3),  # half way up: 1/3 + 2/3 * 1/2
        (499, 0.02 * (1 / 3 + 2 / 3 * 499 / 500)),
        (500, 0.02),
        (59_999, 0.02),
        (60_000, 0.002),
        (79_999, 0.002),
        (80_000, 0.0002),
        (89_999, 0.0002),
    ],
)
def test_lr_of_the_1x_schedule(iteration, expected):
    assert lr_at(OptimConfig(), iteration, 16) == pytest.approx(expected, rel=1e-12)


def test_lr_is_scaled_to_the_batch():
    assert lr_at(OptimConfig(), 1000, 4) == pytest.approx(0.005, rel=1e-12)
    assert describe_lr(OptimConfig(), 4) == "lr 0.02 for 16 images -> 0.005 for 4 images"
    assert describe_lr(OptimConfig(), 1) == "lr 0.02 for 16 images -> 0.00125 for 1 image"
    assert "16 images" in describe_lr(OptimConfig(), 16) and "->" not in describe_lr(OptimConfig(), 16)


def test_lr_without_warmup():
    assert lr_at(OptimConfig(warmup_iterations=0), 0, 16) == 0.02


def test_schedule_is_said_with_the_drops_that_will_come():
    assert "180000 iterations, lr x 0.1 at 120000 and 160000" in describe_schedule(
        OptimConfig(iterations=180_000, milestones=(120_000, 160_000))
    )
    assert "no drop" in describe_schedule(OptimConfig(iterations=100))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", float("nan")),
        ("iterations", 0),
        ("reference_batch", -1),
        ("momentum", -0.1),
        ("milestones", (20, 10)),
        ("milestones", (0,)),
        ("clip_norm", 0.0),
    ],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ConfigError, match=rf"optim\.{field} .*{str(value)[:3].replace('(', '.')}"):
        OptimConfig(**{field: value})


def test_optimizer_holds_trained_weights_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    optimizer = build_optimizer(OptimConfig(momentum=0.8, weight_decay=0.01), model, 8)
    (group,) = optimizer.param_groups
    assert [p.shape for p in group["params"]] == [(1, 3), (1,)]
    assert (group["momentum"], group["weight_decay"]) == (0.8, 0.01)
    assert group["lr"] == pytest.approx(0.02 / 2 / 3)
    set_lr(optimizer, 0.5)
    assert group["lr"] == 0.5


def test_scaled_steps_never_read_the_device_and_survive_a_skipped_first_step(monkeypatch):
    """Infinite gradients skip the first step; the others equal those of plain SGD."""
    inputs = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))

    def train(scaled):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = build_optimizer(OptimConfig(lr=1.0), model, 16, scaled=scaled)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled)
        for step in range(5):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            if step == 0 and not scaled:
                continue
            scaler.scale(loss * (float("inf") if step == 0 else 1)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        return model.weight.detach()

    expected = train(scaled=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "item", lambda self: pytest.fail("the scaler read the device"))
        found = train(scaled=True)
    torch.testing.assert_close(found, expected)
