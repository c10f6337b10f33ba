"""The training loop, from top to bottom: fetch, forward, backward, step, observe, log, checkpoint, evaluate.

An iteration is one step of the optimizer, from one batch or from several micro-batches.

Between two log events the loop waits for nothing from the device but the early decision of scale training.
Everything random in an iteration follows from (seed, iteration, rank) and from the place of its batches in
the stream, so that a resumed run continues as if it had never stopped.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from drcnn.data import Batch, CocoDataset, Stitcher, split_batch, train_loader
from drcnn.engine import checkpoint, distributed
from drcnn.engine.batch_size import check_batch_size
from drcnn.engine.compiled import compile_training
from drcnn.engine.determinism import COST, deterministic, iteration_seed
from drcnn.engine.early_read import EarlyRead
from drcnn.engine.ema import AveragedWeights, evaluated_weights
from drcnn.engine.evaluator import AMP_TYPES, Metrics, evaluate
from drcnn.engine.finish import write_results
from drcnn.engine.loggers import open_loggers
from drcnn.engine.optim import build_optimizer, clip_gradients, lr_at, set_lr
from drcnn.engine.profiling import StepProfiler
from drcnn.engine.run_config import TrainConfig, due
from drcnn.engine.run_log import RunLog
from drcnn.engine.run_state import collect_state, restore_state
from drcnn.engine.signals import RunStopped, StopRequest
from drcnn.engine.splits import open_splits
from drcnn.engine.start import load_initial_weights
from drcnn.engine.summary import build_model, summarize
from drcnn.engine.window import LossWindow, sum_losses
from drcnn.errors import TrainingError

if TYPE_CHECKING:
    from drcnn.config import Config

__all__ = ["TrainConfig", "Trainer", "iteration_seed"]


class Trainer:
    """Trains one detector in one run folder. The process group, if any, is already there.

    Args:
        config (Config): the experiment.
        plain_config (dict): the same as plain types, for checkpoints and config.json.
        run (Path): the run folder, already prepared.
        resume (bool): continue from RUN/checkpoints/last.pt, or from the newest checkpoint that is whole.
        command (str): the command line, for the record.
        profile (int): iterations to trace after the first few.
        notes (Sequence[str]): more lines to begin the log with.
    """

    def __init__(
        self,
        config: "Config",
        plain_config: dict[str, Any],
        run: Path,
        *,
        resume: bool,
        command: str,
        profile: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        self.config, self.plain_config, self.run, self.command = config, plain_config, run, command
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        check_batch_size(config, self.world_size)
        main, fp16 = distributed.is_main(), config.train.amp == "fp16"
        self.device = distributed.rank_device(config.train.device)
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)

        self.train_data, self.val_data, self.test_data = open_splits(config)
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        self.layout = torch.channels_last if config.train.channels_last else torch.preserve_format
        self.model = build_model(config).to(self.device, memory_format=self.layout)
        if config.train.sync_bn:
            distributed.synchronize_batch_norm(self.model, self.device)
        self.optimizer = build_optimizer(config.optim, self.model, config.data.batch_size, scaled=fp16)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.window = LossWindow(self.device)
        self.step = 0  # iterations done
        self.position = 0  # batches of the stream taken by them
        self.evaluated = 0  # step of the last evaluation on val that is recorded
        self.saved = (0, 0)  # step and evaluated of last.pt
        self.best: dict[str, Any] | None = None
        self.since_best = 0  # evaluations without a better AP
        self.changes: list[str] = []
        newest = checkpoint.newest_intact(run) if resume else None
        self.notes = [*notes, *(newest.notes if newest else load_initial_weights(self.model, config))]
        decay = config.optim.ema
        self.averaged = None if decay is None else AveragedWeights(self.model, decay)
        if newest is not None:
            restore_state(self, newest.state)
        self.stitch = Stitcher(config.model.scale, config.model.pixel_mean, config.data.pad_multiple)
        self.is_collage = EarlyRead(self.device)
        self.is_collage.send(self.model.scale.collage)
        # The compiled detector shares its weights with the plain one, which detects.
        own = compile_training(self.model) if config.train.compile else self.model
        self.parallel = distributed.wrap(own, self.device)
        keep = self.was_before if resume else None
        loggers = open_loggers(config.train.loggers, run, plain_config, self.step) if main else ()
        self.log = RunLog(config, run, self.train_data, self.window, keep, loggers)
        self.profiler = StepProfiler(profile if main else 0, run / "trace.json", self.log.display.say)

    def fit(self) -> dict[str, Metrics]:
        """Trains to the last iteration and evaluates; returns the metrics of each evaluated split.

        Raises:
            TrainingError: if a loss is no longer finite or a checkpoint cannot be written.
            RunStopped: after Ctrl-C, SIGTERM or SIGUSR1, once the state is saved.
        """
        train, last = self.config.train, self.config.optim.iterations
        try:
            self.log.start(self.summary())
            with deterministic(train.deterministic), StopRequest() as self.stop:
                if self.best is not None and self.best["step"] == self.step:
                    self.save("last.pt", "best.pt")  # a crash may have come before the second
                if self.evaluation_due():
                    self.evaluate_val()
                with self.profiler:
                    batches = self.batches()
                    self.log.restart_clock()
                    while not self.ended:
                        micro_batches = self.fetch(batches)
                        losses = self.compute_gradients(micro_batches)
                        gradient_norm = self.clip_gradients()
                        self.update(losses, gradient_norm)
                        self.step += 1
                        self.profiler.step()

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

    @property
    def ended(self) -> bool:
        """Whether training is over: by its number of iterations, or early as no evaluation got better."""
        patience = self.config.train.patience
        return self.step >= self.config.optim.iterations or 0 < patience <= self.since_best

    def fetch(self, batches: Iterator[Batch]) -> list[Batch]:
        """Takes the next batch to the device, or several as a collage, and seeds the iteration.

        Returns:
            list[Batch]: the micro-batches; number j of a collage is made of number j of each of its batches.
        """
        self.log.watchdog.waits_for(f"the loader, before iteration {self.step + 1}")
        scale, start = self.config.model.scale, time.perf_counter()
        wanted = scale.components if scale.most_batches > 1 and self.is_collage.receive() else 1
        try:
            taken = [next(batches) for _ in range(wanted)]
        except (RuntimeError, OSError, EOFError):
            self.stop_if_asked()  # the signal that asks to stop may have ended the loader's workers
            raise
        indices = torch.cat([batch.indices for batch in taken])
        self.log.fetched(self.step + 1, indices, time.perf_counter() - start)
        self.position += wanted
        self.log.watchdog.waits_for(f"iteration {self.step + 1}")
        torch.manual_seed(iteration_seed(self.config.train.seed, self.step, self.rank))
        split = [split_batch(batch, self.config.optim.accumulate) for batch in taken]
        return [self.stitch(parts, self.device) for parts in zip(*split, strict=True)]

    def compute_gradients(self, micro_batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Averages losses and gradients over the micro-batches, and lets the losses decide on the next scale.

        Ranks exchange their gradients after the last one alone.
        """
        self.optimizer.zero_grad(set_to_none=True)
        count, found = len(micro_batches), []
        for number, batch in enumerate(micro_batches, start=1):
            alone = self.world_size > 1 and number < count
            with self.parallel.no_sync() if alone else nullcontext():
                losses = self.forward(batch)
                if number == count:
                    self.model.scale.decide()
                    self.is_collage.send(self.model.scale.collage)
                self.backward({name: loss / count for name, loss in losses.items()})
            found.append({name: loss.detach() for name, loss in losses.items()})
        return {name: torch.stack([own[name] for own in found]).mean(dim=0) for name in found[0]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Computes the losses of a micro-batch."""
        dtype = AMP_TYPES[self.config.train.amp]
        images = batch.images._replace(tensor=batch.images.tensor.to(memory_format=self.layout))
        self.parallel.train()
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.parallel(images, batch.targets)

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Adds the gradients of a micro-batch to those of the iteration."""
        self.scaler.scale(sum_losses(losses)).backward()

    def clip_gradients(self) -> Tensor:
        """Clips the gradients and returns their norm before that."""
        self.scaler.unscale_(self.optimizer)
        return clip_gradients(self.optimizer, self.config.optim.clip_norm)

    def update(self, losses: dict[str, Tensor], gradient_norm: Tensor) -> None:
        """Moves the weights, the dynamics, and the average; records the iteration; nothing here waits."""
        set_lr(self.optimizer, lr_at(self.config.optim, self.step, self.config.data.batch_size))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.dynamics.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
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
        self.log.watchdog.waits_for(f"the checkpoint of iteration {self.step}")
        self.log.read_window(self.model)
        finite = torch.stack([p.detach().isfinite().all() for p in self.model.parameters()]).all()
        if not bool(finite):
            raise TrainingError(
                f"a weight is not finite after iteration {self.step}, so no checkpoint was written; "
                "lower --optim.lr"
            )
        windows = distributed.gather_objects(self.window.sums.cpu())
        if distributed.is_main():
            self.log.sync()  # no record may be missing that the checkpoint comes after
            state = collect_state(self) | {"rank_sums": windows}
            checkpoint.save_run(self.run, names, state, self.config.train.keep_last)
        self.saved = (self.step, self.evaluated)

    def evaluation_due(self) -> bool:
        """Tells whether an evaluation on val comes after this iteration and is not done yet."""
        last = self.step == self.config.optim.iterations
        return self.evaluated != self.step and (last or due(self.config.train.eval_every, self.step))

    @property
    def evaluated_model(self) -> nn.Module:
        """The detector that is evaluated: with averaged weights where there are any."""
        return self.model if self.averaged is None else self.averaged.module

    def evaluate_val(self) -> None:
        """Evaluates on the val split and keeps the best weights by AP, of the masks if there are any.

        ``last.pt`` is written first: after a crash ``best.pt`` can be made from it, but not the other way.
        """
        metrics = self.evaluate("val", self.val_data, self.step)
        self.evaluated, ap = self.step, metrics.selection_ap
        if self.best is None or ap > self.best["AP"]:
            self.best = {"step": self.step, "AP": ap, "metrics": metrics.to_dict()}
            self.since_best = 0
        else:
            self.since_best += 1
        if self.ended and self.window.count:  # early, between two records
            self.log.write_step(self.step, self.position, self.model)
        self.save("last.pt", *(["best.pt"] if self.since_best == 0 else []))

    def evaluate(self, split: str, dataset: CocoDataset, step: int) -> Metrics:
        """Evaluates the model, whose weights are those of ``step``, on one split and writes a record."""

        def progress(done: int, total: int) -> None:
            self.log.watchdog.waits_for(f"the evaluation on {split}, after {done} of {total} images")
            self.log.display.evaluation(split, done, total)
            if self.world_size == 1:
                self.stop_if_asked()

        self.log.watchdog.waits_for(f"the evaluation on {split}")
        metrics, _ = evaluate(
            self.evaluated_model,
            dataset,
            self.config.data,
            device=self.device,
            batch_size=self.config.train.eval_batch_size,
            amp=self.config.train.amp,
            progress=progress,
        )
        self.log.write_evaluation(step, split, metrics)
        return metrics

    def finish(self) -> dict[str, Metrics]:
        """Evaluates the weights that are best on val at the end; writes metrics and pictures.

        A run that is killed here and resumed does all of it again; ``last.pt`` does not change any more.
        """
        if self.step < self.config.optim.iterations:
            self.log.display.say(
                f"stopped early, after iteration {self.step}: no better AP in {self.since_best} evaluations"
            )
        best = self.best
        if best["step"] != self.step:
            distributed.barrier()
            state = checkpoint.load_checkpoint(self.run / "checkpoints" / "best.pt")
            self.evaluated_model.load_state_dict(evaluated_weights(state))
        self.log.display.say(f"weights of step {best['step']}, the best on val, are evaluated and drawn")
        found = {"val": Metrics.from_dict(best["metrics"])}
        shown = self.val_data
        if self.test_data is not None and self.test_data.has_annotations:
            found["test"] = self.evaluate("test", self.test_data, best["step"])
            shown = self.test_data
        write_results(self.log, self.evaluated_model, found, best["step"], shown)
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
            raise RunStopped(asked, self.step)

    def summary(self) -> list[str]:
        """Returns the lines that say what is trained, on what, how, and with which kernels."""
        splits = {"train": self.train_data, "val": self.val_data, "test": self.test_data}
        lines = [f"command: {self.command}"]
        lines += summarize(self.config, self.model, splits, self.device, self.world_size)
        lines += [*self.notes, *([COST] * self.config.train.deterministic)]
        lines += [f"resumed after iteration {self.step}"] if self.step else []
        return lines + [f"changed, so the continuation is not bit-exact: {c}" for c in self.changes]

    def was_before(self, record: dict[str, Any]) -> bool:
        """Tells whether a record of metrics.jsonl stays on resume; that of the test split is made again."""
        if record.get("split") == "val":
            return record["step"] <= self.evaluated
        # The window holds the iterations since the last record.
        return "split" not in record and record["step"] <= self.step - self.window.count
