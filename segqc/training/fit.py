"""One training, on MONAI's engines: learning curve, early stopping, checkpoints that resume at an epoch's boundary."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, LrScheduleHandler, ValidationHandler, from_engine
from monai.utils import set_determinism
from torch.utils.data import DataLoader

from segqc.networks import NetworkPlan, StemUNet, build_network, device_of_choice
from segqc.training.cases import Example
from segqc.training.patches import Draws, Patch, PatchDataset, centred
from segqc.training.progress import Progress
from segqc.training.settings import TrainingSettings
from segqc.volumes import atomic_write

logger = logging.getLogger(__name__)

Weights: TypeAlias = dict[str, torch.Tensor]
Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PrepareBatch: TypeAlias = Callable[[Patch], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One point of the learning curve."""

    epoch: int
    train_loss: float
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """What `fit` trains: a plan, its data, and how a batch becomes input and target."""

    name: str
    plan: NetworkPlan
    settings: TrainingSettings
    epochs: int
    train: Sequence[Example]
    validation: Sequence[Example]
    prepare: PrepareBatch
    loss: Loss
    empty_mask_epochs: int = 0
    first_bias: float | None = None
    snapshots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained network, its learning curve, and the weights after each epoch asked for in ``snapshots``."""

    network: StemUNet
    history: tuple[EpochRecord, ...]
    snapshots: dict[int, Weights]


@dataclass(slots=True)
class _State:
    """What a checkpoint holds beside weights, optimizer and scheduler."""

    history: list[EpochRecord]
    best_loss: float
    best: Weights | None
    snapshots: dict[int, Weights]
    since_best: int = 0


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: giving activations back to the system and faulting them in again costs much."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def fingerprint(job: Job) -> str:
    """What a checkpoint must agree on to be continued: plan, settings, length and the examples' contents."""
    digest = hashlib.sha256(repr((job.plan, job.settings, job.epochs, job.empty_mask_epochs, job.snapshots)).encode())
    for example in (*job.train, *job.validation):
        digest.update(f"{example.case}{example.weight}".encode())
        for array in (example.image, example.truth, example.mask):
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def fit(job: Job, folder: Path, progress: Progress, *, from_epoch: Callable[[int], None] | None = None) -> Fitted:
    """Train a network, or continue or return a training of the same fingerprint found in ``folder``.

    The best weights on the validation examples are returned, the last ones where there are none. Every draw is a
    function of (seed, number of the draw), so an interrupted training resumes exactly at an epoch's boundary.

    Args:
        job: what to train.
        folder: gets ``checkpoint.pt`` and ``curve.json``.
        progress: told after each step.
        from_epoch: called with the number of the epoch at which the training starts (0 for a new one).
    """
    _keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    settings, checkpoint, mark = job.settings, folder / "checkpoint.pt", fingerprint(job)
    device = device_of_choice()
    network = build_network(job.plan, seed=settings.seed, first_bias=job.first_bias).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=job.epochs, power=0.9)
    state = _State([], float("inf"), None, {})
    if checkpoint.is_file():
        _restore(checkpoint, mark, network, optimizer, scheduler, state)
    done = len(state.history)
    if from_epoch:
        from_epoch(done)
    if done < job.epochs and not _exhausted(job, state):
        set_determinism(seed=settings.seed)
        trainer = _trainer(job, network, optimizer, scheduler, state, done, progress, device)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda _: _save(checkpoint, mark, network, optimizer, scheduler, state, folder)
        )
        trainer.run()
    if state.best is not None:
        network.load_state_dict(state.best)
    return Fitted(network.cpu().eval(), tuple(state.history), state.snapshots)


def _exhausted(job: Job, state: _State) -> bool:
    return bool(job.validation) and state.since_best >= job.settings.patience


def _trainer(
    job: Job,
    network: StemUNet,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: _State,
    done: int,
    progress: Progress,
    device: torch.device,
) -> SupervisedTrainer:
    settings, steps = job.settings, job.settings.steps_per_epoch
    draws_per_epoch = steps * settings.batch
    dataset = PatchDataset(job.train, job.plan, settings, empty_until=job.empty_mask_epochs * draws_per_epoch)
    loader = DataLoader(dataset, batch_size=settings.batch, sampler=Draws(done * draws_per_epoch))

    def prepare(batch: Patch, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        image, target = job.prepare(batch)
        return image.to(device), target.to(device)

    trainer = SupervisedTrainer(
        device=device,
        max_epochs=job.epochs,
        train_data_loader=loader,
        network=network,
        optimizer=optimizer,
        loss_function=job.loss,
        epoch_length=steps,
        prepare_batch=prepare,
    )
    trainer.state.epoch = done
    trainer.state.iteration = done * steps
    losses: list[float] = []

    def after_step(engine: Engine) -> None:
        losses.append(float(engine.state.output[0]["loss"]))
        progress.step(engine.state.iteration, job.epochs * steps, f"{job.name}: loss {losses[-1]:.3f}")

    def after_epoch(engine: Engine) -> None:
        validation = engine.state.metrics.get("validation_loss") if job.validation else None
        epoch = engine.state.epoch
        state.history.append(EpochRecord(epoch, sum(losses) / max(1, len(losses)), validation))
        losses.clear()
        if epoch in job.snapshots:
            state.snapshots[epoch] = _copy(network)
        # while the mask input is empty the validation loss speaks of another task
        if validation is not None and epoch > job.empty_mask_epochs:
            if validation < state.best_loss:
                state.best_loss, state.best, state.since_best = validation, _copy(network), 0
            else:
                state.since_best += 1
            if _exhausted(job, state):
                logger.info("%s: no better for %d epochs, stopped at epoch %d", job.name, settings.patience, epoch)
                engine.terminate()

    trainer.add_event_handler(Events.ITERATION_COMPLETED, after_step)
    if job.validation:
        batches = [torch.utils.data.default_collate([centred(e, job.plan.patch)]) for e in job.validation]
        evaluator = SupervisedEvaluator(
            device=device,
            val_data_loader=batches,
            network=network,
            prepare_batch=prepare,
            key_val_metric={
                "validation_loss": IgniteMetricHandler(
                    loss_fn=job.loss, output_transform=from_engine(["pred", "label"])
                )
            },
            metric_cmp_fn=lambda new, best: new < best,
        )
        ValidationHandler(interval=1, validator=evaluator).attach(trainer)
        trainer.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(evaluator.state.metrics)
        )
    LrScheduleHandler(scheduler, print_lr=False).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
    return trainer


def _copy(network: StemUNet) -> Weights:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def _save(
    path: Path,
    mark: str,
    network: StemUNet,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: _State,
    folder: Path,
) -> None:
    history = [dataclasses.asdict(record) for record in state.history]
    with atomic_write(path) as temporary:
        torch.save(
            {
                "fingerprint": mark,
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "history": history,
                "best_loss": state.best_loss,
                "best": state.best,
                "since_best": state.since_best,
                "snapshots": state.snapshots,
            },
            temporary,
        )
    with atomic_write(folder / "curve.json") as temporary:
        temporary.write_text(json.dumps(history, indent=1))


def _restore(
    path: Path,
    mark: str,
    network: StemUNet,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    state: _State,
) -> None:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError) as error:
        logger.warning("%s: unreadable checkpoint (%s), training anew", path, error)
        return
    if content["fingerprint"] != mark:
        logger.info("%s: of other data or settings, training anew", path)
        return
    network.load_state_dict(content["network"])
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    state.history = [EpochRecord(**record) for record in content["history"]]
    state.best_loss, state.best = content["best_loss"], content["best"]
    state.since_best, state.snapshots = content["since_best"], content["snapshots"]
