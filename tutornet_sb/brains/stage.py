"""What every training stage shares: schedule, logs, checkpoints, scores."""

import os
import time

import speechbrain as sb
import torch
from speechbrain.utils.checkpoints import (
    METAFNAME,
    Checkpointer,
    mark_as_loader,
    mark_as_saver,
    register_checkpoint_hooks,
)
from speechbrain.utils.distributed import if_main_process
from torch.utils.tensorboard import SummaryWriter

from tutornet_sb.distillation.alignment import align
from tutornet_sb.distillation.targets import TeacherTargets


@register_checkpoint_hooks
class Stopwatch:
    """Seconds of training, kept across stops and continuations.

    Example
    -------
    >>> watch = Stopwatch()
    >>> watch.start()
    >>> watch.seconds >= 0
    True
    """

    def __init__(self):
        self.before = 0.0
        self.started = None

    def start(self):
        """Count from now on; what was counted is kept."""
        self.before = self.seconds
        self.started = time.monotonic()

    @property
    def seconds(self):
        """Seconds counted so far."""
        if self.started is None:
            return self.before
        return self.before + time.monotonic() - self.started

    @mark_as_saver
    def _save(self, path):
        with open(path, "w", encoding="utf-8") as file:
            file.write(str(self.seconds))

    @mark_as_loader
    def _load(self, path, end_of_epoch=False):
        del end_of_epoch
        with open(path, encoding="utf-8") as file:
            self.before = float(file.read())


class AtomicCheckpointer(Checkpointer):
    """A checkpointer that never offers half of a checkpoint.

    SpeechBrain writes ``CKPT.yaml``, by which it knows a checkpoint, before the
    parameters; a run killed in between would find a broken one and could not
    continue. Here that file gets its name when all others are written.
    """

    def save_checkpoint(self, *args, **kwargs):
        """Save as SpeechBrain does, then make the checkpoint known.

        Arguments
        ---------
        *args, **kwargs
            As for SpeechBrain's ``Checkpointer``.

        Returns
        -------
        speechbrain.utils.checkpoints.Checkpoint
            The saved checkpoint; None on other processes than the main one.
        """
        checkpoint = super().save_checkpoint(*args, **kwargs)
        if checkpoint is not None:
            meta = checkpoint.path / METAFNAME
            os.replace(meta.with_suffix(".unfinished"), meta)
        return checkpoint

    def _save_checkpoint_metafile(self, fpath, *args, **kwargs):
        return super()._save_checkpoint_metafile(
            fpath.with_suffix(".unfinished"), *args, **kwargs
        )


class StageBrain(sb.Brain):
    """One stage of training a student.

    A subclass implements ``compute_forward`` and ``compute_objectives`` and
    hands the terms of its loss to :meth:`total`.

    ``hparams`` holds ``epoch_counter``, ``lr_schedule`` (called as
    ``lr_schedule(optimizer, total_steps=steps)``), ``log_folder``,
    ``train_logger`` and ``avg_checkpoints``; ``modules`` holds ``student``.

    Attributes
    ----------
    selected_by : str
        The figure of the development set that names the best checkpoint,
        lower is better.
    """

    selected_by = "loss"

    def __init__(self, modules, hparams, **kwargs):
        super().__init__(modules, hparams=hparams, **kwargs)
        self.watch = Stopwatch()
        self.terms = {}
        if self.checkpointer is not None:
            self.checkpointer.add_recoverable("watch", self.watch)

    def fit(self, epoch_counter, train_set, valid_set, train_loader_kwargs):
        """Train from the newest checkpoint, or from the start.

        Arguments
        ---------
        epoch_counter : speechbrain.utils.epoch_loop.EpochCounter
            Epochs of this stage.
        train_set : torch.utils.data.Dataset
            Training utterances.
        valid_set : torch.utils.data.DataLoader
            Batches of the development set.
        train_loader_kwargs : dict
            For ``make_dataloader``; holds ``batch_sampler``.

        Raises
        ------
        ValueError
            If gradients are accumulated over more batches than an epoch has.
        """
        loader = self.make_dataloader(
            train_set, stage=sb.Stage.TRAIN, **train_loader_kwargs
        )
        if self.train_sampler is None:
            # SpeechBrain tells only samplers it made itself which epoch it is;
            # an untold one repeats its first batches in every epoch.
            self.train_sampler = train_loader_kwargs["batch_sampler"]
        self.steps_per_epoch = len(loader) // self.grad_accumulation_factor
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"grad_accumulation_factor {self.grad_accumulation_factor} is "
                f"more than the {len(loader)} batches of an epoch; lower it or "
                "lower batch_seconds"
            )
        if if_main_process():
            self.writer = SummaryWriter(self.hparams.log_folder)
        super().fit(epoch_counter, loader, valid_set)

    def init_optimizers(self):
        """Optimize what is trainable, and make sure that it is saved too."""
        params = [p for p in self.modules.parameters() if p.requires_grad]
        saved = {
            id(p)
            for obj in self.checkpointer.recoverables.values()
            if isinstance(obj, torch.nn.Module)
            for p in obj.parameters()
        }
        unsaved = [
            name
            for name, p in self.modules.named_parameters()
            if p.requires_grad and id(p) not in saved
        ]
        if unsaved:
            raise ValueError(
                f"{unsaved[0]} and {len(unsaved) - 1} more parameters would be "
                "trained but not saved: add their module to the recoverables"
            )
        self.optimizer = self.opt_class(params)
        self.optimizers_dict = {"optimizer": self.optimizer}
        self.lr_schedule = self.hparams.lr_schedule(
            self.optimizer,
            total_steps=self.steps_per_epoch * self.hparams.epoch_counter.limit,
        )
        self.checkpointer.add_recoverables(
            {"optimizer": self.optimizer, "lr_schedule": self.lr_schedule}
        )

    def try_loss(self, loss, outputs):
        """Say before training what a loss misses in this teacher.

        Arguments
        ---------
        loss : callable
            Called as ``loss(outputs, targets)``.
        outputs : torch.Tensor
            Of a student for one frame, ``(1, 1, dim)``.

        Raises
        ------
        ValueError
            If the loss cannot be computed, for instance for want of posteriors.
        """
        posteriors = torch.zeros(1, 1, self.modules.teacher.symbols)
        hidden, one = torch.zeros(1, 1, 1), torch.ones(1)
        loss(outputs, TeacherTargets(hidden, posteriors, one, frame_period=1.0))

    def teacher_targets(self, batch, encoding):
        """Ask the teacher about a batch, on the student's frames.

        Arguments
        ---------
        batch : speechbrain.dataio.batch.PaddedBatch
            With ``sig``, or ``targets`` from a store.
        encoding : Encoding
            The student's own.

        Returns
        -------
        TeacherTargets
            Shapes as in ``encoding``.
        """
        return align(
            self.modules.teacher.teach(batch),
            encoding.lengths,
            self.student.frame_period,
            frames=encoding.hidden.shape[1],
            blank_index=self.hparams.blank_index,
            delay=self.hparams.delay,
        )

    @property
    def student(self):
        """The student itself, also where DDP has wrapped it."""
        student = self.modules.student
        return getattr(student, "module", student)

    def total(self, **terms):
        """Add up the terms of the loss and keep each for the log.

        Arguments
        ---------
        **terms : tuple of (float, torch.Tensor)
            Weight and value of each term, by name.

        Returns
        -------
        torch.Tensor
            The weighted sum.
        """
        for name, (_, value) in terms.items():
            count, so_far = self.terms.get(name, (0, 0.0))
            self.terms[name] = (count + 1, so_far + value.detach())
        return sum(weight * value for weight, value in terms.values())

    def on_stage_start(self, stage, epoch=None):
        """Forget the figures of the stage before."""
        if stage == sb.Stage.TRAIN:
            self.watch.start()
        self.epoch = epoch
        self.terms = {}

    def on_fit_batch_end(self, batch, outputs, loss, should_step):
        """Move the learning rate on with every step of the optimizer."""
        # fp16 may skip a step of the optimizer, so never step past the end.
        schedule = self.lr_schedule
        if should_step and schedule.last_epoch < schedule.total_steps - 1:
            schedule.step()

    def figures(self, stage_loss):
        """Mean loss and mean of each of its terms.

        Arguments
        ---------
        stage_loss : float
            Mean loss of the stage.

        Returns
        -------
        dict
            Floats by name.
        """
        means = {name: float(s / n) for name, (n, s) in self.terms.items()}
        return {"loss": float(stage_loss), **means}

    def on_stage_end(self, stage, stage_loss, epoch=None):
        """Log the epoch and keep its checkpoint if it is among the best."""
        figures = self.figures(stage_loss)
        if stage == sb.Stage.TRAIN:
            self.train_figures = figures
        elif stage == sb.Stage.VALID:
            lr = self.optimizer.param_groups[0]["lr"]
            meta = {"epoch": epoch, "lr": lr, "seconds": self.watch.seconds}
            self.hparams.train_logger.log_stats(
                meta, train_stats=self.train_figures, valid_stats=figures
            )
            if if_main_process():
                named = {"train": self.train_figures, "valid": figures}
                for split, values in named.items():
                    for name, value in values.items():
                        self.writer.add_scalar(f"{name}/{split}", value, epoch)
                self.writer.add_scalar("lr", lr, epoch)
                self.writer.flush()
            self.checkpointer.save_and_keep_only(
                meta={
                    "epoch": epoch,
                    self.selected_by: figures[self.selected_by],
                },
                min_keys=[self.selected_by],
                num_to_keep=self.hparams.avg_checkpoints,
            )
