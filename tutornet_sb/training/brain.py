"""What every training stage shares: schedule, logs, checkpoints, scores."""

import json
import logging
import math
import re
import time
from pathlib import Path

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import average_checkpoints
from speechbrain.utils.distributed import if_main_process
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.targets import TeacherTargets
from tutornet_sb.networks.batch_norm import synchronise_batch_norms
from tutornet_sb.training.checkpoints import (
    RandomState,
    RunningMeans,
    StepSize,
    Stopwatch,
)
from tutornet_sb.util import processes, signals
from tutornet_sb.util.errors import InputError
from tutornet_sb.util.files import write_atomically

logger = logging.getLogger(__name__)


class StageBrain(sb.Brain):
    """One stage of training a student.

    A subclass implements ``compute_forward`` and ``compute_objectives``, which
    hands the terms of its loss to :meth:`total`.

    ``hparams`` holds ``epoch_counter``, ``lr_schedule`` (called as
    ``lr_schedule(optimizer, total_steps=steps)``), ``log_folder``,
    ``train_logger``, ``metrics_file`` (JSON lines, one an epoch) and
    ``avg_checkpoints``; ``modules`` holds ``student``.
    """

    # Of the development set, lower is better
    selected_by = "loss"

    def __init__(self, modules, hparams, **kwargs):
        super().__init__(modules, hparams=hparams, **kwargs)
        self.watch = Stopwatch()
        self.terms = RunningMeans()
        # Utterances of the batch at hand, and of all since the last step
        self.size, self.accumulated = 1, 0
        # Steps in a row whose loss or gradient was not finite
        self.lost_steps = 0
        self.told_to_stop = False
        if self.checkpointer is not None:
            self.checkpointer.add_recoverables(
                {
                    # Another number of processes is refused first.
                    "step_size": StepSize(self.grad_accumulation_factor),
                    "watch": self.watch,
                    "terms": self.terms,
                    "random": RandomState(self.device),
                }
            )

    def fit(self, epoch_counter, train_set, valid_set, train_loader_kwargs):
        """Train from the newest checkpoint, or from the start.

        A stopped training ends as one that was never stopped. For that, loaders
        draw from generators of their own, and data sets draw from none.
        """
        loader = self.make_dataloader(
            train_set, stage=sb.Stage.TRAIN, **train_loader_kwargs
        )
        if self.train_sampler is None:
            # SpeechBrain tells only samplers it made itself which epoch it is;
            # an untold one repeats its first batches in every epoch.
            self.train_sampler = train_loader_kwargs["batch_sampler"]
        self.batches_per_epoch = len(loader)
        if processes.count() > 1 and len(loader) < 2:
            # Of a single batch, SpeechBrain's sampler gives the utterances.
            raise InputError(
                f"{processes.count()} processes are too many for the "
                f"{len(train_set)} utterances of an epoch, which make less "
                "than two batches for each: use fewer, or lower batch_seconds"
            )
        with signals.finishing():
            super().fit(epoch_counter, loader, valid_set)

    def load_best(self, valid_set):
        """Load the average of the best checkpoints, or the best if better."""
        key = self.selected_by
        best = self.checkpointer.find_checkpoints(
            min_key=key, max_num_checkpoints=self.hparams.avg_checkpoints
        )
        figures, averaged = best[0].meta["valid"], 1
        if len(best) > 1:
            self._load_mean(best)
            self.evaluate(valid_set)
            if self.test_figures[key] <= figures[key]:
                figures, averaged = self.test_figures, len(best)
        if averaged == 1:
            self._load_mean(best[:1])
        return {
            "selected_by": key,
            "best": figures[key],
            "best_epoch": best[0].meta["epoch"],
            "averaged": averaged,
            "valid": figures,
        }

    def finish(self, valid_set):
        """Load the best weights and give the figures of the whole stage."""
        return {
            "steps": self.lr_schedule.total_steps,
            "train_seconds": self.watch.seconds,
            **self.load_best(valid_set),
            "processes": processes.count(),
        }

    def _load_mean(self, checkpoints):
        for name, module in self.checkpointer.recoverables.items():
            if name in self.modules:
                module.load_state_dict(average_checkpoints(checkpoints, name))

    def on_evaluate_start(self, max_key=None, min_key=None):
        """Score the student as it is: its weights have been loaded."""

    def on_fit_start(self):
        """Go on where a checkpoint was saved, in the logs too."""
        super().on_fit_start()
        if if_main_process():
            done = self.hparams.epoch_counter.current
            for log in (
                self.hparams.metrics_file,
                getattr(self.hparams.train_logger, "save_file", None),
            ):
                if log is not None and Path(log).is_file():
                    _keep_epochs(Path(log), done)
            self.writer = SummaryWriter(
                self.hparams.log_folder, purge_step=done + 1
            )

    def _wrap_distributed(self):
        """Wrap the modules as SpeechBrain does, batch norms for the CPU too."""
        if processes.count() == 1:
            super()._wrap_distributed()
            return
        on_gpus = self.distributed_backend != "gloo"
        for name, module in self.modules.items():
            if any(p.requires_grad for p in module.parameters()):
                self.modules[name] = DistributedDataParallel(
                    synchronise_batch_norms(module),
                    device_ids=[self.device] if on_gpus else None,
                    # Only the student has parts that a stage does not use.
                    find_unused_parameters=(
                        self.find_unused_parameters and name == "student"
                    ),
                    # Their statistics are equal in all processes, and in
                    # evaluation each has another number of batches.
                    broadcast_buffers=False,
                )

    def init_optimizers(self):
        """Optimize what is trainable, by a schedule over all steps."""
        params = [p for p in self.modules.parameters() if p.requires_grad]
        self.optimizer = self.opt_class(params)
        self.optimizers_dict = {"optimizer": self.optimizer}
        steps = -(-self.batches_per_epoch // self.grad_accumulation_factor)
        self.lr_schedule = self.hparams.lr_schedule(
            self.optimizer,
            total_steps=steps * self.hparams.epoch_counter.limit,
        )
        self.checkpointer.add_recoverables(
            {"optimizer": self.optimizer, "lr_schedule": self.lr_schedule}
        )

    def try_loss(self, loss, outputs):
        """Say before training what a loss misses in this teacher."""
        posteriors = torch.zeros(1, 1, self.modules.teacher.symbols)
        hidden, one = torch.zeros(1, 1, 1), torch.ones(1)
        loss(outputs, TeacherTargets(hidden, posteriors, one, frame_period=1.0))

    def align(self, targets, encoding):
        """Put the teacher's targets on the student's frames."""
        return align(
            targets,
            encoding.lengths,
            self.student.frame_period,
            frames=encoding.hidden.shape[1],
            delay=self.hparams.delay,
        )

    @property
    def student(self):
        """The student itself, also where DDP has wrapped it."""
        student = self.modules.student
        return getattr(student, "module", student)

    def total(self, **terms):
        """Add up the terms of the loss and keep each for the log."""
        loss = sum(weight * value for weight, value in terms.values())
        self.terms.add("loss", loss, self.size)
        for name, (_, value) in terms.items():
            self.terms.add(name, value, self.size)
        return loss

    def on_stage_start(self, stage, epoch=None):
        """Forget the figures of the stage before."""
        if stage == sb.Stage.TRAIN:
            self.watch.start()
        self.epoch = epoch
        self.size = 1
        self.not_finite = []
        # Within an epoch, a checkpoint has brought the figures along.
        if stage != sb.Stage.TRAIN or not self.step:
            self.terms.sums = {}

    def fit_batch(self, batch):
        """Take a step, unless its loss or gradient is not finite.

        It is that of the joint batch: of ``grad_accumulation_factor`` batches
        of each process, or of those left at the end of an epoch. Losses are
        means over utterances, and batches differ in size, so gradients are
        added up by utterances and divided by their number before the step.
        """
        should_step = self.should_step
        self.on_fit_batch_start(batch, should_step)
        self.size = len(batch.id)
        sums = dict(self.terms.sums)
        # Running statistics, which the forward pass changes
        buffers = [
            (buffer, buffer.clone())
            for name, module in self.modules.items()
            if name != "teacher"
            for buffer in module.buffers()
        ]
        with self.no_sync(not should_step):
            with self.training_ctx:
                outputs = self.compute_forward(batch, sb.Stage.TRAIN)
                loss = self.compute_objectives(outputs, batch, sb.Stage.TRAIN)
            # Infinity becomes NaN, which gradients carry to all processes.
            sound = 1 + 0 * loss.detach()
            self.scaler.scale(loss * sound * self.size).backward()
        self.accumulated += self.size
        value = loss.detach().cpu()
        if not torch.isfinite(value):
            self.not_finite += batch.id
            self.terms.sums = sums
            for buffer, kept in buffers:
                buffer.copy_(kept)
        if should_step:
            self.optimizers_step()
        self.on_fit_batch_end(batch, outputs, loss, should_step)
        return value

    @property
    def should_step(self):
        """Whether the optimizer takes a step after the batch at hand."""
        return (
            self.step % self.grad_accumulation_factor == 0
            or self.step == self.batches_per_epoch
        )

    def optimizers_step(self):
        """Take a step of the optimizer if the gradient is finite."""
        self.scaler.unscale_(self.optimizer)
        parameters = self.optimizer.param_groups[0]["params"]
        # DDP has taken the mean over the processes.
        utterances = processes.mean(self.accumulated, self.device)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= utterances
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        # fp16 overflows now and then, for which its scaler makes up.
        lost = self.not_finite or not (
            self.scaler.is_enabled() or torch.isfinite(norm)
        )
        if lost:
            self._give_up_step()
        else:
            self.lost_steps = 0
            self.scaler.step(self.optimizer)
            self.optimizer_step += 1
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulated = 0

    def _give_up_step(self):
        self.lost_steps += 1
        whose = "its gradient is not finite, or the loss of another process"
        if self.not_finite:
            whose = f"its loss is not finite: {', '.join(self.not_finite)}"
        where = f"epoch {self.epoch}, step {self.step}"
        self.not_finite = []
        logger.warning("%s is left out, %s", where, whose)
        if self.lost_steps > self.nonfinite_patience:
            raise InputError(
                f"{self.lost_steps} steps in a row up to {where} had no finite "
                f"loss or gradient; of the last, {whose}. Lower --lr or "
                "--max_grad_norm, train by --precision fp32, or see whether "
                "these utterances are sound. The checkpoints in "
                f"{self.checkpointer.checkpoints_dir} are from before"
            )

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the learning rate on with every step of the optimizer."""
        # fp16 may skip a step of the optimizer, so never step past the end.
        schedule = self.lr_schedule
        if should_step and schedule.last_epoch < schedule.total_steps - 1:
            schedule.step()

    def figures(self):
        """Mean loss and mean of each of its terms, over all utterances."""
        means = self.terms.values()
        found = {}
        for part in processes.gather(
            {name: (self.terms.sums[name][0], means[name]) for name in means}
        ):
            for name, pair in part.items():
                found.setdefault(name, []).append(pair)
        figures = {}
        for name, pairs in found.items():
            total = sum(n for n, _ in pairs)
            mean = sum(mean * (n / total) for n, mean in pairs)
            figures[name] = mean if mean.dim() else mean.item()
        return figures

    def evaluate_batch(self, batch, stage):
        """Compute the loss of a batch that is not learnt from."""
        if stage == sb.Stage.VALID:
            signals.check()
        self.size = len(batch.id)
        loss = super().evaluate_batch(batch, stage)
        if not torch.isfinite(loss):
            self.not_finite += batch.id
        return loss

    def _should_save_intra_epoch_ckpt(self, last_ckpt_time, steps_since_ckpt):
        """Save every so often, and when all are to stop."""
        minutes, steps = self.ckpt_interval_minutes, self.ckpt_interval_steps
        due = (
            0 < minutes < (time.time() - last_ckpt_time) / 60
            or 0 < steps <= steps_since_ckpt
        )
        due, self.told_to_stop = self._anyone(due, signals.requested())
        # Half of an accumulated gradient cannot be saved.
        return self.should_step and (due or self.told_to_stop)

    def _anyone(self, *flags):
        """Tell of each flag whether it is true in any process."""
        if not torch.distributed.is_initialized():
            return flags
        counts = torch.tensor(flags, dtype=torch.float, device=self.device)
        torch.distributed.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]

    def _save_intra_epoch_ckpt(self):
        super()._save_intra_epoch_ckpt()
        if self.told_to_stop:
            raise signals.Stopped

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the epoch and keep its checkpoint if it is among the best."""
        figures = self.figures()
        if stage == sb.Stage.TRAIN:
            self.train_figures = figures
            # Whatever ends the validation, the training before it is kept.
            (self.told_to_stop,) = self._anyone(signals.requested())
            self._save_intra_epoch_ckpt()
        elif stage == sb.Stage.VALID:
            not_finite = sum(processes.gather(self.not_finite), [])
            if not_finite:
                logger.warning(
                    "Epoch %d: the loss is not finite for these utterances of "
                    "the development set: %s",
                    epoch,
                    ", ".join(not_finite),
                )
                # SpeechBrain leaves such batches out of its mean.
                figures["loss"] = math.inf
            lr = self.optimizer.param_groups[0]["lr"]
            meta = {"epoch": epoch, "lr": lr, "seconds": self.watch.seconds}
            self.hparams.train_logger.log_stats(
                meta, train_stats=self.train_figures, valid_stats=figures
            )
            if if_main_process():
                named = {"train": self.train_figures, "valid": figures}
                row = meta | {"step": self.optimizer_step} | named
                with open(self.hparams.metrics_file, "a") as file:
                    file.write(json.dumps(row, default=float) + "\n")
                for split, values in named.items():
                    for name, value in values.items():
                        self.writer.add_scalar(f"{name}/{split}", value, epoch)
                self.writer.add_scalar("lr", lr, epoch)
                self.writer.flush()
            self.checkpointer.save_and_keep_only(
                meta={
                    "epoch": epoch,
                    self.selected_by: figures[self.selected_by],
                    "valid": figures,
                },
                min_keys=[self.selected_by],
                num_to_keep=self.hparams.avg_checkpoints,
            )
        else:
            self.test_figures = figures


def _keep_epochs(path, last):
    """Forget the lines of a log that are of epochs to come."""
    pattern = re.compile(r'\{?"?epoch"?: (\d+),')
    kept = "".join(
        line
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
        if (epoch := pattern.match(line)) and int(epoch[1]) <= last
    )
    write_atomically(path, lambda file: file.write_text(kept, "utf-8"))
