"""Times training steps of our detectors and of torchvision's in turns, in one process.

    python bench/step_time.py configs/bccd.py configs/bccd_baseline.py --data.root ../shared/data/bccd

Each round takes one batch and steps every detector on it, in changing order, so that what else the machine
does hits all alike. It prints the median seconds per step and the ratio to torchvision's detector of the
same sizes (built from the last config). Loading is not timed. ``--rounds N`` sets the number of rounds.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from torchvision_baseline import TorchvisionDetector

from drcnn.config import load_config
from drcnn.data import load_split, train_loader
from drcnn.engine.optim import build_optimizer

WARM_UP = 2


def main() -> None:
    """Times and prints."""
    arguments = sys.argv[1:]
    files = [argument for argument in arguments if argument.endswith(".py")]
    flags = [argument for argument in arguments if argument not in files]
    rounds = 15
    if "--rounds" in flags:
        place = flags.index("--rounds")
        rounds = int(flags[place + 1])
        del flags[place : place + 2]
    configs = {Path(file).stem: load_config(file, flags) for file in files}
    last = list(configs.values())[-1]
    torch.manual_seed(0)
    models = {name: config.model.build().train() for name, config in configs.items()}
    models["torchvision"] = TorchvisionDetector(last).train()
    optimizers = {
        name: build_optimizer(last.optim, model, last.data.batch_size) for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    dataset = load_split(last.data, "train")
    batches = train_loader(dataset, last.data, seed=0, start_step=0, num_steps=rounds + WARM_UP)
    names = list(models)
    for index, batch in enumerate(batches):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            loss = sum(models[name](batch.images, batch.targets).values())
            optimizers[name].zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(models[name].parameters(), 10.0)
            optimizers[name].step()
            if name in configs:
                models[name].dynamics.update()
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["torchvision"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {rounds} rounds in turns")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:<16} {median:.3f} s/step  {base / median:.2f}x torchvision's speed")


if __name__ == "__main__":
    main()
