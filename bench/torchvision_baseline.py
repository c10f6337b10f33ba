"""Trains torchvision's Faster R-CNN on the data, schedule and sizes of one of our configs, for comparison.

    python bench/torchvision_baseline.py configs/bccd_baseline.py --data.root ../shared/data/bccd

It uses our loader, schedule and evaluator, so that the detectors are all that differs. It prints the loss
every 20 iterations, then the seconds per iteration and the metrics of the test split (or of val).
"""

import json
import statistics
import sys
import time

import torch
from torch import Tensor, nn

from drcnn.config import Config, load_config
from drcnn.data import load_split, train_loader
from drcnn.engine.evaluator import evaluate
from drcnn.engine.optim import build_optimizer, lr_at, set_lr
from drcnn.engine.torchvision_twin import torchvision_twin
from drcnn.structures import Detections, ImageBatch, Targets


class TorchvisionDetector(nn.Module):
    """torchvision's detector of the sizes of one of our configs, behind the interface of ours."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        data = config.data
        self.detector = torchvision_twin(
            config.model, min_size=data.test_short_side, max_size=data.test_max_size
        )

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Computes losses or detections, as our detectors do; the background is class 0 inside."""
        pixels = images.tensor.float() / 255
        listed = [image[:, :h, :w] for image, (h, w) in zip(pixels, images.sizes.tolist(), strict=True)]
        if not self.training:
            return _pad(self.detector(listed))
        wanted = [
            {"boxes": boxes[valid], "labels": labels[valid] + 1}
            for boxes, labels, valid in zip(*targets[:3], strict=True)
        ]
        return self.detector(listed, wanted)


def _pad(outputs: list[dict[str, Tensor]]) -> Detections:
    slots = max(1, *(len(output["scores"]) for output in outputs))
    boxes, scores = torch.zeros(len(outputs), slots, 4), torch.zeros(len(outputs), slots)
    labels, valid = (
        torch.zeros(len(outputs), slots, dtype=torch.int64),
        torch.zeros(len(outputs), slots).bool(),
    )
    for i, output in enumerate(outputs):
        count = len(output["scores"])
        boxes[i, :count], scores[i, :count] = output["boxes"], output["scores"]
        labels[i, :count], valid[i, :count] = output["labels"] - 1, True
    return Detections(boxes, scores, labels, valid)


def main() -> None:
    """Trains and evaluates."""
    config = load_config(sys.argv[1], sys.argv[2:])
    torch.manual_seed(config.train.seed)
    model = TorchvisionDetector(config).train()
    dataset = load_split(config.data, "train")
    optimizer = build_optimizer(config.optim, model, config.data.batch_size)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"torchvision Faster R-CNN, {config.model.backbone.name}, {parameters:.2f} M parameters", flush=True
    )
    loader = train_loader(
        dataset, config.data, seed=config.train.seed, start_step=0, num_steps=config.optim.iterations
    )
    seconds = []
    start = time.perf_counter()
    for step, batch in enumerate(loader):
        set_lr(optimizer, lr_at(config.optim, step, config.data.batch_size))
        loss = sum(model(batch.images, batch.targets).values())
        optimizer.zero_grad()
        loss.backward()
        if config.optim.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        if (step + 1) % 20 == 0:
            pace = statistics.fmean(seconds[-20:])
            print(
                f"step {step + 1}/{config.optim.iterations}  loss {loss.item():.4f}  {pace:.3f} s/it",
                flush=True,
            )
    split = "test" if config.data.test is not None else "val"
    metrics, _ = evaluate(
        model,
        load_split(config.data, split),
        config.data,
        device=torch.device("cpu"),
        batch_size=4,
        amp="off",
    )
    print(json.dumps({"split": split, "seconds_per_iteration": statistics.fmean(seconds), **metrics.summary}))


if __name__ == "__main__":
    main()
