"""Times training steps of our detectors and of torchvision's in turns, in one process.

    python bench/step_time.py configs/bccd.py configs/bccd_baseline.py --data.root ../shared/data/bccd
    python bench/step_time.py configs/bccd.py --backends native reference --rounds 50 --data.root ...

Each round takes one batch and steps every detector on it, in changing order, so that what else the machine
does hits all alike. A config with data settings of its own gets the same images by these settings. A
detector with scale training stitches several batches when it wants a collage, which is timed. It prints the
seconds per step, median and sum, and the ratio to torchvision's detector of the same sizes (from the last
config). Loading is not timed. Other flags set fields of the configs.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torchvision_baseline import TorchvisionDetector

from drcnn.config import load_config
from drcnn.data import Stitcher, load_split, train_loader
from drcnn.engine.optim import build_optimizer
from drcnn.ops import use_backend

WARM_UP = 2


def main() -> None:
    """Times and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("configs", nargs="+", help="files in configs/")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each detector")
    parser.add_argument("--backends", nargs="+", default=["auto"], help="run each config on each of these")
    arguments, flags = parser.parse_known_args()
    configs = {Path(file).stem: load_config(file, flags) for file in arguments.configs}
    last = list(configs.values())[-1]
    detectors = {
        name if backend == "auto" else f"{name} {backend}": (config, backend)
        for name, config in configs.items()
        for backend in arguments.backends
    }
    torch.manual_seed(0)
    models = {name: config.model.build().train() for name, (config, _) in detectors.items()}
    models["torchvision"] = TorchvisionDetector(last).train()
    optimizers = {
        name: build_optimizer(last.optim, model, last.data.batch_size) for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    collages = dict.fromkeys(models, 0)
    dataset, rounds = load_split(last.data, "train"), arguments.rounds + WARM_UP
    most = max(config.model.scale.most_batches for config in configs.values())
    steps = {"seed": 0, "start_step": 0, "num_steps": rounds * most}
    streams = {
        data: iter(train_loader(dataset, data, **steps))
        for data in {config.data for config in configs.values()}
    }
    names = list(models)
    for index in range(rounds):
        loaded = {data: [next(stream) for _ in range(most)] for data, stream in streams.items()}
        for name in names[index % len(names) :] + names[: index % len(names)]:
            config, backend = detectors.get(name, (last, "auto"))
            with use_backend(backend):
                start = time.perf_counter()
                batch = loaded[config.data][0]
                if name in detectors and models[name].scale.collage:
                    stitch = Stitcher(config.model.scale, config.model.pixel_mean, config.data.pad_multiple)
                    batch = stitch(loaded[config.data][: config.model.scale.components], "cpu")
                    collages[name] += index >= WARM_UP
                loss = sum(models[name](batch.images, batch.targets).values())
                if name in detectors:
                    models[name].scale.decide()
                optimizers[name].zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(models[name].parameters(), 10.0)
                optimizers[name].step()
                if name in detectors:
                    models[name].dynamics.update()
            if index >= WARM_UP:
                seconds[name].append(time.perf_counter() - start)
    base = sum(seconds["torchvision"])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds in turns")
    for name, values in seconds.items():
        line = f"{name:<24} {statistics.median(values):.3f} s/step, {sum(values):.1f} s in all  "
        line += f"{base / sum(values):.2f}x torchvision's speed"
        print(line + (f", {collages[name]} collages" if collages[name] else ""))


if __name__ == "__main__":
    main()
