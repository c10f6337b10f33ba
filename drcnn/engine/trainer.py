"""The training loop, from top to bottom: fetch, forward, backward, step, observe, log, checkpoint, evaluate.

Between two log events the loop waits for nothing from the device but the early decision of scale training.
Everything random in an iteration follows from (seed, iteration, rank) and from the place of its batches in
the stream, so that a resumed run continues as if it had never stopped.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from drcnn import __version__
from drcnn.data import Batch, CocoDataset, Stitcher, train_loader
from drcnn.engine import distributed
from drcnn.engine.checkpoint import (
    FORMAT,
    changed_settings,
    keep_steps,
    load_checkpoint,
    matching_best,
    newest_intact,
    save_checkpoint,
)
from drcnn.engine.early_read import EarlyRead
from drcnn.engine.evaluator import AMP_TYPES, Metrics, evaluate
from drcnn.engine.finish import write_results
from drcnn.engine.optim import build_optimizer, load_optimizer, lr_at, set_lr
from drcnn.engine.run_config import TrainConfig
from drcnn.engine.run_log import RunLog
from drcnn.engine.signals import RunStopped, StopRequest
from drcnn.engine.splits import open_splits
from drcnn.engine.start import load_initial_weights
from drcnn.engine.summary import build_model, summarize
from drcnn.engine.window import LossWindow
from drcnn.errors import TrainingError

if TYPE_CHECKING:
    from drcnn.config import Config

__all__ = ["TrainConfig", "Trainer"]


class Trainer:
    """Trains one detector in one run folder. The process group, if any, is already there.

    Args:
        config (Config): the experiment.
        plain_config (dict): the same as plain types, for checkpoints and config.json.
        run (Path): the run folder, already prepared.
        resume (bool): continue from RUN/checkpoints/last.pt, or from the newest checkpoint that is whole.
        command (str): the command line, for the record.
    """

    def __init__(
        self, config: "Config", plain_config: dict[str, Any], run: Path, *, resume: bool, command: str
    ) -> None:
        self.config, self.plain_config, self.run, self.command = config, plain_config, run, command
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        fp16 = config.train.amp == "fp16"
        self.device = distributed.rank_device(config.train.device)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)

        self.train_data, self.val_data, self.test_data = open_splits(config)
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        self.model = build_model(config).to(self.device)
        self.optimizer = build_optimizer(config.optim, self.model, config.data.batch_size, scaled=fp16)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.window = LossWindow(self.device)
        self.step = 0  # iterations done
        self.position = 0  # batches of the stream taken by them
        self.evaluated = 0  # step of the last evaluation on val that is recorded
        self.saved = (0, 0)  # step and evaluated of last.pt
        self.best: dict[str, Any] | None = None
        self.changes: list[str] = []
        self.loaded: list[str] = []
        if resume:
            newest = newest_intact(run)
            self.loaded = [f"passed over: {line}" for line in newest.passed_over]
            self.loaded += [f"continued from {newest.path}"] * bool(self.loaded)
            self.load_state(newest.state)
        else:
            self.loaded = load_initial_weights(self.model, config)
        self.stitch = Stitcher(config.model.scale, config.model.pixel_mean, config.data.pad_multiple)
        self.is_collage = EarlyRead(self.device)
        self.is_collage.send(self.model.scale.collage)
        self.parallel = distributed.wrap(self.model, self.device)
        keep = self.was_before if resume else None
        self.log = RunLog(config, run, self.train_data, self.window, keep)

    def fit(self) -> dict[str, Metrics]:
        """Trains to the last iteration and evaluates; returns the metrics of each evaluated split.

        Raises:
            TrainingError: if a loss is no longer finite or a checkpoint cannot be written.
            RunStopped: after Ctrl-C, SIGTERM or SIGUSR1, once the state is saved.
        """
        train, last = self.config.train, self.config.optim.iterations
        self.log.display.start()
        try:
            for line in self.summary():
                self.log.display.say(line)
            with StopRequest() as self.stop:
                if self.best is not None and self.best["step"] == self.step:
                    self.save("last.pt", "best.pt")  # a crash may have come before the second
                if self.evaluation_due():
                    self.evaluate_val()
                batches = self.batches()
                self.log.restart_clock()
                while self.step < last:
                    batch = self.fetch(batches)
                    losses = self.forward(batch)
                    gradient_norm = self.backward(losses)
                    self.update(losses, gradient_norm)
                    self.step += 1

                    if due(train.log_every, self.step) or self.step == last:
                        self.log.write_step(self.step, self.position, self.model)
                    with self.log.paused_clock():
                        if due(train.checkpoint_every, self.step) or self.step == last:
                            self.save("last.pt")
                        if self.evaluation_due():
                            self.evaluate_val()
                    self.stop_if_asked()
                return self.finish()
        finally:
            self.log.close()

    def batches(self) -> Iterator[Batch]:
        """Yields the batches of this rank from the current position on, as many as may be needed."""
        share = {"rank": self.rank, "world_size": self.world_size}
        most = (self.config.optim.iterations - self.step) * self.config.model.scale.most_batches
        steps = {"start_step": self.position, "num_steps": most}
        seed = self.config.train.seed
        return iter(train_loader(self.train_data, self.config.data, seed=seed, **steps, **share))

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Takes the next batch to the device, or several as a collage, and seeds the iteration."""
        scale, start = self.config.model.scale, time.perf_counter()
        wanted = scale.components if scale.most_batches > 1 and self.is_collage.receive() else 1
        try:
            taken = [next(batches) for _ in range(wanted)]
        except (RuntimeError, OSError):
            self.stop_if_asked()  # the signal that asks to stop may have ended the loader's workers
            raise
        indices = torch.cat([batch.indices for batch in taken])
        self.log.fetched(self.step + 1, indices, time.perf_counter() - start)
        self.position += wanted
        torch.manual_seed(iteration_seed(self.config.train.seed, self.step, self.rank))
        return self.stitch(taken, self.device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the losses, and lets them decide on the scale of the next batch."""
        dtype = AMP_TYPES[self.config.train.amp]
        self.parallel.train()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            losses = self.parallel(batch.images, batch.targets)
        self.model.scale.decide()
        self.is_collage.send(self.model.scale.collage)
        return losses

    def backward(self, losses: dict[str, Tensor]) -> Tensor:
        """Computes the gradients, clips them, and returns their norm before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(sum_losses(losses)).backward()
        self.scaler.unscale_(self.optimizer)
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        if self.config.optim.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, self.config.optim.clip_norm, norm)
        return norm

    def update(self, losses: dict[str, Tensor], gradient_norm: Tensor) -> None:
        """Moves the weights, then the dynamics, and records the iteration; nothing here waits."""
        set_lr(self.optimizer, lr_at(self.config.optim, self.step, self.config.data.batch_size))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.dynamics.update()
        self.window.trace(self.model.scale.metrics())
        values = {"loss": sum_losses(losses), **losses}
        norm = {"grad_norm": gradient_norm}
        if self.scaler.is_enabled():  # fp16 meets infinite gradients by design and skips such steps
            self.window.add(self.step + 1, values, norm)
        else:
            self.window.add(self.step + 1, values | norm, {})

    def save(self, *names: str) -> None:
        """Writes the state under each name in the folder of checkpoints, on the main rank.

        Raises:
            TrainingError: if a weight is not finite, before anything is written, or if the disk says no.
        """
        self.log.read_window(self.model)
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()
        if not bool(finite):
            raise TrainingError(
                f"a weight is not finite after iteration {self.step}, so no checkpoint was written; "
                "lower --optim.lr"
            )
        if distributed.is_main():
            self.log.sync()  # no record may be missing that the checkpoint comes after
            folder, state = self.run / "checkpoints", self.state()
            for name in names:
                save_checkpoint(folder / name, state)
            keep_steps(folder, state, self.config.train.keep_last)
        self.saved = (self.step, self.evaluated)

    def evaluation_due(self) -> bool:
        """Tells whether an evaluation on val comes after this iteration and is not done yet."""
        last = self.step == self.config.optim.iterations
        return self.evaluated != self.step and (last or due(self.config.train.eval_every, self.step))

    def evaluate_val(self) -> None:
        """Evaluates on the val split and keeps the best weights by AP, of the masks if there are any.

        ``last.pt`` is written first: after a crash ``best.pt`` can be made from it, but not the other way.
        """
        metrics = self.evaluate("val", self.val_data, self.step)
        self.evaluated, ap = self.step, metrics.selection_ap
        if self.best is None or ap > self.best["AP"]:
            self.best = {"step": self.step, "AP": ap, "metrics": metrics.to_dict()}
            self.save("last.pt", "best.pt")
        else:
            self.save("last.pt")

    def evaluate(self, split: str, dataset: CocoDataset, step: int) -> Metrics:
        """Evaluates the model, whose weights are those of ``step``, on one split and writes a record."""

        def progress(done: int, total: int) -> None:
            self.log.display.evaluation(split, done, total)
            if self.world_size == 1:
                self.stop_if_asked()

        metrics, _ = evaluate(
            self.model,
            dataset,
            self.config.data,
            device=self.device,
            batch_size=max(1, self.config.data.batch_size // self.world_size),
            amp=self.config.train.amp,
            progress=progress,
        )
        self.log.write_evaluation(step, split, metrics)
        return metrics

    def finish(self) -> dict[str, Metrics]:
        """Evaluates the weights that are best on val at the end; writes metrics and pictures.

        A run that is killed here and resumed does all of it again; ``last.pt`` does not change any more.
        """
        best = self.best
        if best["step"] != self.step:
            distributed.barrier()
            state = load_checkpoint(self.run / "checkpoints" / "best.pt")
            self.model.load_state_dict(state["model"])
        self.log.display.say(f"weights of step {best['step']}, the best on val, are evaluated and drawn")
        found = {"val": Metrics.from_dict(best["metrics"])}
        shown = self.val_data
        if self.test_data is not None and self.test_data.has_annotations:
            found["test"] = self.evaluate("test", self.test_data, best["step"])
            shown = self.test_data
        write_results(self.log, self.model, found, best["step"], shown)
        return found

    def stop_if_asked(self) -> None:
        """Saves and leaves after Ctrl-C, SIGTERM or SIGUSR1; several ranks agree on it at log events.

        Raises:
            RunStopped: once the state is saved.
        """
        asked = self.stop.signal
        if self.world_size > 1:
            if not due(self.config.train.log_every, self.step):
                return
            asked = max(distributed.gather_objects(asked))
        if asked:
            if self.saved != (self.step, self.evaluated):
                self.save("last.pt")
            raise RunStopped(
                f"stopped by {signal.Signals(asked).name} after iteration {self.step} with its state saved; "
                "the same command with --resume continues",
                128 + asked,
            )

    def summary(self) -> list[str]:
        """Returns the lines that say what is trained, on what, how, and with which kernels."""
        splits = {"train": self.train_data, "val": self.val_data, "test": self.test_data}
        lines = [f"command: {self.command}"]
        lines += summarize(self.config, self.model, splits, self.device, self.world_size)
        lines += self.loaded
        lines += [f"resumed after iteration {self.step}"] if self.step else []
        return lines + [f"changed, so the continuation is not bit-exact: {c}" for c in self.changes]

    def state(self) -> dict[str, Any]:
        """Returns everything that a resumed run needs; see :mod:`drcnn.engine.checkpoint` for the keys."""
        return {
            "format": FORMAT,
            "drcnn_version": __version__,
            "step": self.step,
            "position": self.position,
            "model": self.model.state_dict(),
            "ema": None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {"seed": self.config.train.seed},
            "window": self.window.state_dict(),
            "best": self.best,
            "evaluated": self.evaluated,
            "config": self.plain_config,
            "categories": list(self.train_data.categories),
            "category_ids": [int(i) for i in self.train_data.category_ids],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint.

        Raises:
            ConfigError: if it is of another model, of other classes or of a later iteration.
        """
        iterations = self.config.optim.iterations
        self.changes = changed_settings(state, self.plain_config, self.train_data.categories, iterations)
        self.model.load_state_dict(state["model"])
        load_optimizer(self.optimizer, state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.window.load_state_dict(state["window"])
        self.step = int(state["step"])
        self.position = int(state.get("position", self.step))
        # An earlier drcnn saved last.pt after the evaluations, but for that of the last iteration.
        self.evaluated = int(state.get("evaluated", self.step if self.step < iterations else 0))
        self.saved = (self.step, self.evaluated)
        self.best, notes = matching_best(self.run, state)
        self.loaded += notes

    def was_before(self, record: dict[str, Any]) -> bool:
        """Tells whether a record of metrics.jsonl stays on resume; that of the test split is made again."""
        if record.get("split") == "val":
            return record["step"] <= self.evaluated
        ended = "split" in record and self.step == self.config.optim.iterations
        return record["step"] <= self.step and not ended


def due(every: int, step: int) -> bool:
    """Tells whether an event that comes every so many iterations comes after iteration ``step``."""
    return every > 0 and step % every == 0


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Adds the losses."""
    return torch.stack([value.float() for value in losses.values()]).sum()


def iteration_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of torch's generators for one iteration on one rank, below 2 ** 63."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)
