"""Stochastic variational inference from start to finish: one call, one run folder, resumable at any point."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pvae.data import Data, Split, from_tensors

from .distributed import Team
from .isolation import device_of
from .loop import Callback, Loop, Monitor, Run
from .objective import ELBO, Kind
from .precision import Precision
from .progress import reporting
from .schedule import Schedule
from .threads import threads_set
from .trainer import OptimizerChoice, Trainer

__all__ = ["fit"]


def fit(
    model: nn.Module,
    guide: nn.Module,
    data: Data | Split | Tensor,
    *,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int = 128,
    optimizer: OptimizerChoice = "adam",
    lr: float = 1e-3,
    schedule: str | Schedule | None = None,
    objective: Kind | ELBO = "elbo",
    num_particles: int = 1,
    beta_warmup: float = 0,
    free_bits: float = 0.0,
    grad_clip: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    engine: str = "eager",
    compile: bool = True,
    precision: Precision = "float32",
    device: str | torch.device | None = None,
    threads: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    log_every: int | None = None,
    checkpoint_every: float = 30.0,
    callbacks: Sequence[Callback | Monitor] = (),
    progress: bool | None = None,
    distributed: bool | None = None,
) -> Run:
    r"""Train model and guide by stochastic variational inference.

    The batches' order and every random draw follow from ``seed``; torch's own generators are left as they
    were. With ``out``, rows go to ``metrics.jsonl`` and checkpoints to ``checkpoints/``; a run that was
    interrupted or killed goes on from the last one with ``resume=True``, bit-identically on a CPU.

    Args:
        model: The model program.
        guide: The guide program, with the model's latent sites.
        data: A data set (its ``valid`` split is used for early stopping, its ``test`` split never), one
            split, or a tensor ``(N, *x_shape)``.
        epochs: Passes over the training split; or give ``steps``.
        steps: Optimisation steps.
        batch_size: Data per step; what is left over at the end of an epoch waits for the next epoch.
        optimizer: ``"adam"``, ``"adamw"``, ``"adamax"``, ``"sgd"``, or a function of the parameters.
        lr: Learning rate.
        schedule: ``"constant"``, ``"cosine"``, ``"linear"``, or a function ``(step, total_steps) -> factor``.
        objective: ``"elbo"``, ``"mean_field"``, ``"iwae"``, ``"dreg"``, or an :class:`ELBO`.
        num_particles: Particles per datum; ignored if ``objective`` is an :class:`ELBO`.
        beta_warmup: Epochs over which the KL weight rises from 0 to 1. Training only.
        free_bits: Nats per latent site that are not penalised. Training only.
        grad_clip: Largest gradient norm of the loss in nats per datum.
        ema: Decay of a moving average of the parameters, which then validates and is what remains.
        patience: Stop after so many epochs without a better validation loss, and return the best.
        engine: ``"eager"``; ``"traced"``, one graph of tensor operations without Pyro or autograd in it, to
            the same values, or ``"auto"``, which is that from the hundredth step on where the programs can be
            traced, and ``"eager"`` else; ``"graph"``, that graph compiled (faster after a minute); or
            ``"cuda_graph"``: on a CUDA device the whole step, from the gathering of the batch to the moving
            average, captured once and replayed. What cannot be captured is trained by the engine ``"graph"``
            (a step that waits for the host: by ``"eager"``), and a sentence in the run's ``notes`` says why.
        compile: Whether the graph engine compiles its graph; of ``"cuda_graph"``, whether such a graph is
            what is captured.
        precision: ``"float32"``; or ``"bf16"``: in training, the networks of both programs under autocast to
            bfloat16. Parameters, gradients, log-densities and sums are in float32 all the same, and so is all
            of a flow, of :math:`r(u \mid x)`, of a posterior made of Jacobians
            (:class:`pvae.inference.precision.Networks` says why), and every evaluation. Programs that do not
            run so are trained in float32, and a sentence in the run's ``notes`` says why.
        device: Where to train; by default where the model lies.
        threads: Threads of torch on the CPU until this returns; by default as many as before. Another number
            sums in another order: a run is repeated or resumed to the bit on its own.
        seed: Seed of order and draws.
        out: The run's folder.
        resume: Go on from the last checkpoint in ``out``, if there is one.
        log_every: Steps per row of the history; by default an epoch, at most 100.
        checkpoint_every: Least seconds between checkpoints.
        callbacks: Called with the run and each new row, once it is written. A
            :class:`pvae.inference.Monitor` is asked before instead, and what it measures is in the row.
        progress: Whether to show a bar; by default on a terminal only.
        distributed: Whether to share each batch with the other processes that ``torchrun`` started, or of the
            process group that is initialised; by default if there are any. All of them then call ``fit`` with
            the same arguments; ``batch_size`` is that of all together. The first process alone writes, shows
            the bar, and calls callbacks.

    Returns:
        The run, with its history.

    Raises:
        ValueError: For a setting out of range, in one sentence, before anything is changed.
        NonFiniteLoss: If the loss, a gradient, a parameter or the validation loss became NaN or infinite:
            names the term or parameter, the step and the batch's data. The programs then hold the parameters
            and buffers of the last row of the history (or of the start), the last checkpoint is as it was.
        KeyboardInterrupt: On SIGINT or SIGTERM, after the step in hand, with a checkpoint written.
        CheckpointError: If ``resume`` finds no sound checkpoint, or one of another program. Where the last
            one is damaged it warns and goes on from the one before it.
        pvae.files.Busy: If another process trains in ``out``.
        pvae.files.WriteError: If a file cannot be written; the last checkpoint stands.
    """
    began = time.monotonic()
    train, valid = _splits(data)
    team = Team.find(distributed)
    if device is not None:
        device = team.place(device)
        model.to(device)
        guide.to(device)
    place = device_of(model, guide)
    train, valid = train.to(place), None if valid is None else valid.to(place)
    per_epoch, total = _length(epochs, steps, len(train), batch_size)
    if patience is not None and valid is None:
        raise ValueError("patience needs a validation split, and the data have none")
    if not isinstance(objective, ELBO):
        objective = ELBO(objective, num_particles, free_bits)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be positive, got {threads}")
    if log_every is not None and log_every < 1:
        raise ValueError(f"log_every must be positive, got {log_every}")
    trainer = Trainer(
        model,
        guide,
        total_steps=total,
        objective=objective,
        optimizer=optimizer,
        lr=lr,
        rates=schedule,
        beta_steps=beta_warmup * per_epoch,
        grad_clip=grad_clip,
        ema=ema,
        engine=engine,
        compile=compile,
        precision=precision,
        seed=seed,
        window=log_every or min(100, per_epoch),
        team=team,
    )
    loop = Loop(
        trainer=trainer,
        train=train,
        valid=valid,
        run=Run(model, guide, out=None if out is None else Path(out)),
        batch_size=batch_size,
        per_epoch=per_epoch,
        patience=patience,
        seed=seed,
        checkpoint_every=checkpoint_every,
        callbacks=tuple(callback for callback in callbacks if not isinstance(callback, Monitor)),
        monitors=tuple(callback for callback in callbacks if isinstance(callback, Monitor)),
    )
    loop.run.notes = trainer.notes
    with threads_set(threads), loop.claimed():
        loop.prepare(resume)
        model.train()
        guide.train()
        with reporting("training", total, progress if team.leads else False) as report:
            for note in trainer.notes:
                report(trainer.step_count, note)
            loop.go(report)
    loop.run.seconds = time.monotonic() - began
    return loop.run


def _splits(data: Any) -> tuple[Split, Split | None]:
    if isinstance(data, Tensor):
        data = from_tensors(data)
    if isinstance(data, Data):
        return data.train, data.valid if "valid" in data.parts else None
    if isinstance(data, Split):
        return data, None
    raise TypeError(f"data must be a data set, a split or a tensor, got {type(data).__name__}")


def _length(epochs: int | None, steps: int | None, num_data: int, batch_size: int) -> tuple[int, int]:
    """Return steps per epoch and in all."""
    if (epochs is None) == (steps is None):
        raise ValueError("give either epochs or steps" + ("" if epochs is None else ", not both"))
    length = epochs if epochs is not None else steps
    assert length is not None
    if length < 1:
        raise ValueError(f"{'epochs' if epochs is not None else 'steps'} must be positive, got {length}")
    if not 1 <= batch_size <= num_data:
        raise ValueError(f"batch_size must lie between 1 and the {num_data} training data, got {batch_size}")
    per_epoch = num_data // batch_size
    return per_epoch, length * per_epoch if epochs is not None else length
