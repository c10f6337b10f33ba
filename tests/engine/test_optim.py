import pytest
import torch

from drcnn import presets
from drcnn.engine.optim import (
    OptimConfig,
    build_optimizer,
    describe_lr,
    describe_schedule,
    load_optimizer,
    lr_at,
    set_lr,
)
from drcnn.engine.run_config import TrainConfig
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


def test_short_schedules_of_any_length():
    milestones = {n: presets.short_schedule(n).milestones for n in (1, 2, 3, 4, 5, 6, 600)}
    assert milestones == {1: (), 2: (1,), 3: (2,), 4: (2, 3), 5: (3, 4), 6: (4, 5), 600: (420, 540)}
    assert "no drop of the lr" in describe_schedule(presets.short_schedule(1))
    with pytest.raises(ConfigError, match=r"optim\.iterations must be positive, got 0"):
        presets.short_schedule(0)


def test_lr_is_scaled_to_the_batch():
    assert lr_at(OptimConfig(), 1000, 4) == pytest.approx(0.005, rel=1e-12)
    assert describe_lr(OptimConfig(), 4) == "lr 0.02 for 16 images -> 0.005 for 4 images"
    assert describe_lr(OptimConfig(), 1) == "lr 0.02 for 16 images -> 0.00125 for 1 image"
    assert "16 images" in describe_lr(OptimConfig(), 16) and "->" not in describe_lr(OptimConfig(), 16)


def test_lr_without_warmup():
    assert lr_at(OptimConfig(warmup_iterations=0), 0, 16) == 0.02


def test_schedule_is_said_with_the_drops_that_will_come():
    assert "SGD, 180000 iterations, lr x 0.1 at 120000 and 160000" in describe_schedule(
        OptimConfig(iterations=180_000, milestones=(120_000, 160_000))
    )
    assert "AdamW, 100 iterations, no drop" in describe_schedule(
        OptimConfig(optimizer="adamw", iterations=100)
    )


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
        ("betas", (0.9, 1.0)),
        ("betas", (float("nan"), 0.9)),
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


def train(model, optimizer, steps, inputs):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def test_adamw_equals_its_equations():
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; every weight decays, biases and norms too."""
    config = OptimConfig(optimizer="adamw", lr=0.1, betas=(0.8, 0.9), weight_decay=0.3, warmup_iterations=0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).double()
    inputs = torch.rand(5, 4, dtype=torch.float64)
    weights = [p.detach().clone() for p in model.parameters()]
    means = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    optimizer = build_optimizer(config, model, 16)
    for step in range(1, 6):
        train(model, optimizer, 1, inputs)
        for i, parameter in enumerate(model.parameters()):
            first, second = means[i]
            first = 0.8 * first + 0.2 * parameter.grad
            second = 0.9 * second + 0.1 * parameter.grad**2
            means[i] = first, second
            move = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
            weights[i] = weights[i] - 0.1 * 0.3 * weights[i] - 0.1 * move
            torch.testing.assert_close(parameter.detach(), weights[i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_restored_optimizer_continues_bit_for_bit_with_its_own_settings(name, scaled, tmp_path):
    inputs = torch.rand(4, 8)

    def begin(lr):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        return model, build_optimizer(OptimConfig(optimizer=name, lr=lr), model, 16, scaled=scaled)

    model, optimizer = begin(0.1)
    train(model, optimizer, 3, inputs)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(model, optimizer, 4, inputs)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again, restored = begin(0.2)
    again.load_state_dict(state["model"])
    load_optimizer(restored, state["optimizer"])
    (group,) = restored.param_groups
    assert group["lr"] == pytest.approx(0.2 / 3) and group["fused"] == (scaled or None)
    set_lr(restored, optimizer.param_groups[0]["lr"])
    train(again, restored, 4, inputs)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_count_of_steps_lies_where_the_form_of_adamw_expects_it(scaled):
    """Fused AdamW counts on the device of its weights, the other form on the host."""
    config, weights = OptimConfig(optimizer="adamw"), torch.nn.Linear(2, 2)
    saved = build_optimizer(config, weights, 16, scaled=not scaled)
    train(weights, saved, 1, torch.rand(1, 2))
    moved = torch.nn.Linear(2, 2, device="meta")
    optimizer = build_optimizer(config, moved, 16, scaled=False)
    for group in optimizer.param_groups:
        group["fused"] = scaled or None  # as on a GPU; torch has no fused form on the meta device
    load_optimizer(optimizer, saved.state_dict())
    for state in optimizer.state.values():
        assert state["exp_avg"].is_meta and state["step"].is_meta == scaled


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_scaled_steps_never_read_the_device_and_survive_a_skipped_first_step(monkeypatch, name):
    """Infinite gradients skip the first step; the others equal those of the plain optimizer."""
    inputs = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))

    def train(scaled):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8)
        optimizer = build_optimizer(OptimConfig(name, lr=1.0), model, 16, scaled=scaled)
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


def test_cosine_is_that_of_torch():
    config = OptimConfig(
        schedule="cosine", warmup_iterations=5, iterations=25, final_factor=0.1, lr=0.02, milestones=(7,)
    )
    weight = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([weight], lr=0.02)
    rising = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 3, total_iters=5)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=0.002)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [rising, falling], [5])
    for iteration in range(26):
        expected = optimizer.param_groups[0]["lr"]
        assert lr_at(config, iteration, 16) == pytest.approx(expected, rel=1e-9), iteration
        optimizer.step()
        schedule.step()
    assert lr_at(config, 25, 16) == pytest.approx(0.002) and lr_at(config, 25, 32) == pytest.approx(0.004)
    assert "cosine of the lr down to 0.1 of it, warm-up over 5" in describe_schedule(config)


def test_micro_batches_and_average_are_said():
    text = describe_schedule(OptimConfig(accumulate=4, ema=0.999))
    assert text.endswith("4 micro-batches a step, weights averaged with decay 0.999")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 0}, r"optim\.accumulate must be at least 1, got 0"),
        ({"ema": 1.0}, r"optim\.ema must be at least 0 and less than 1, or None, got 1\.0"),
        ({"final_factor": -0.1}, r"optim\.final_factor must not be negative"),
    ],
)
def test_values_of_no_use_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)


def test_patience_without_evaluations_is_refused():
    with pytest.raises(ConfigError, match=r"counts evaluations; set train\.eval_every too"):
        TrainConfig(patience=3)
    assert TrainConfig(patience=3, eval_every=10).patience == 3


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_moves_weights_alike(name):
    moved = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3)
        config = OptimConfig(optimizer=name, lr=0.1, fused=fused, warmup_iterations=0)
        optimizer = build_optimizer(config, model, 16)
        assert bool(optimizer.defaults["fused"]) == fused
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 5)).square().sum().backward()
            optimizer.step()
        moved.append(model.weight.detach())
    torch.testing.assert_close(moved[1], moved[0])
