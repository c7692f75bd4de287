"""One training, on MONAI's engines: learning curve, early stopping, checkpoints that resume at an epoch's boundary."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, LrScheduleHandler, ValidationHandler, from_engine
from monai.utils import set_determinism
from torch import nn
from torch.utils.data import DataLoader

from segqc.networks.device import device_of_choice, has_bfloat16, in_device_memory
from segqc.networks.inference import window_batch_size
from segqc.networks.model import load_content
from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import build_network
from segqc.progress import Progress
from segqc.training.cases import Example
from segqc.training.patches import Draws, Patch, PatchDataset, centred
from segqc.training.spec import TrainingSettings
from segqc.volumes import atomic_write

logger = logging.getLogger(__name__)

STEPS = "steps"  # of a training, each of one batch
STEPS_APART = 10_000_019  # between the generator seeds of two trainings
EARLIER_WEIGHT = 0.8  # of an epoch against the next one, in the mean validation loss that is compared

Weights: TypeAlias = dict[str, torch.Tensor]
Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PrepareBatch: TypeAlias = Callable[[Patch], tuple[torch.Tensor, torch.Tensor]]
NetworkBuilder: TypeAlias = Callable[[NetworkPlan], nn.Module]


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """One point of the learning curve."""

    epoch: int
    train_loss: float
    validation_loss: float | None


@dataclass(frozen=True, slots=True)
class Job:
    """What `fit` trains: a plan, its data, and how a batch becomes input and target.

    ``build`` makes another network than the plan's U-Net, its first weights drawn from torch's generator; ``variant``
    then names it and its loss, as plan and settings do not tell it from others. One tensor comes out of a network.
    """

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
    build: NetworkBuilder | None = None
    variant: str = ""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained network, its learning curve, and the weights after each epoch asked for in ``snapshots``."""

    network: nn.Module
    history: tuple[EpochRecord, ...]
    snapshots: dict[int, Weights]


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: giving activations back to the system and faulting them in again costs much."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def fingerprint(job: Job) -> str:
    """What a checkpoint must agree on to be continued: plan, settings, length and the examples' contents."""
    # how the network is asked later is no matter of its training
    settings = dataclasses.replace(job.settings, average_flips=False, hide_mask=False)
    digest = hashlib.sha256(repr((job.plan, settings, job.epochs, job.empty_mask_epochs, job.snapshots)).encode())
    digest.update(job.variant.encode())
    for example in (*job.train, *job.validation):
        digest.update(f"{example.case}{example.weight}".encode())
        for array in (example.image, example.truth, example.mask, example.soft):
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def fit(job: Job, folder: Path, progress: Progress, *, from_epoch: Callable[[int], None] | None = None) -> Fitted:
    """Train a network, or continue or return a training of the same fingerprint found in ``folder``.

    The best weights on the validation examples are returned, the last ones where there are none; see
    `moving_validation`. Every draw is a function of (seed, number of the draw), so an interrupted training resumes
    exactly at an epoch's boundary.

    Args:
        job: what to train.
        folder: gets ``checkpoint.pt`` and ``curve.json``.
        progress: reports after each step.
        from_epoch: called with the number of the epoch at which the training starts (0 for a new one).

    Raises:
        DeviceMemoryError: if the GPU's memory does not hold a batch.
    """
    _keep_freed_memory()
    folder.mkdir(parents=True, exist_ok=True)
    training = _Training(job)
    training.restore(folder)
    if from_epoch:
        from_epoch(training.done)
    if training.done < job.epochs and not training.exhausted:
        with _same_every_time(job.settings.seed, training.device), in_device_memory(job.plan.patch):
            trainer = _trainer(training, progress)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: training.save(folder))
            trainer.run()
    else:
        steps = job.settings.steps_per_epoch
        progress.step(training.done * steps, training.done * steps, job.name, "done by an earlier run", unit=STEPS)
    return training.fitted()


@contextlib.contextmanager
def _same_every_time(seed: int, device: torch.device) -> Iterator[None]:
    """Seed all generators; on a GPU, let PyTorch refuse what adds up in another order each time."""
    set_determinism(seed=seed)
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's own condition for it
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def moving_validation(history: Sequence[EpochRecord]) -> float | None:
    """Mean of a learning curve's validation losses, later epochs weighing more; None where nothing validates.

    It decides which epoch is the best one: of few patients the loss of a single epoch is mostly noise, and the luckiest
    epoch is often an early one that has not learned the small structures yet. (nnU-Net averages for the same reason.)
    """
    losses = [point.validation_loss for point in history if point.validation_loss is not None]
    if not losses:
        return None
    weights = [EARLIER_WEIGHT**age for age in reversed(range(len(losses)))]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


def write_mean_curve(members: Sequence[Path], folder: Path) -> None:
    """Write the mean learning curve of several trainings, as far as all of them went, as ``curve.json``.

    Args:
        members: the folders of the trainings.
        folder: gets the file.
    """
    curves = [
        [EpochRecord(**point) for point in json.loads((m / "curve.json").read_text(encoding="utf-8"))] for m in members
    ]
    mean = []
    for points in zip(*curves, strict=False):
        measured = [p.validation_loss for p in points if p.validation_loss is not None]
        loss = sum(p.train_loss for p in points) / len(points)
        mean.append(EpochRecord(points[0].epoch, loss, sum(measured) / len(measured) if measured else None))
    with atomic_write(folder / "curve.json") as temporary:
        temporary.write_text(json.dumps([dataclasses.asdict(record) for record in mean], indent=1), encoding="utf-8")


class _MixedPrecision(nn.Module):
    """A network whose convolutions compute in bfloat16; weights, what comes out, and so the loss stay in float32."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the network makes of a batch."""
        with torch.autocast(x.device.type, torch.bfloat16):
            return torch.as_tensor(self.network(x)).float()


class _Training:
    """A job's network, optimizer and schedule, and what came of them so far: all that a checkpoint holds."""

    def __init__(self, job: Job) -> None:
        settings = job.settings
        self.job = job
        self.device = device_of_choice()
        self.network = _first_network(job).to(self.device)
        if self.device.type == "cpu":
            # oneDNN takes a third less time for the weights' gradients of 3D convolutions in this layout
            self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        mixed = settings.mixed_precision and has_bfloat16(self.device)
        self.computes: nn.Module = _MixedPrecision(self.network) if mixed else self.network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        self.scheduler = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, total_iters=job.epochs, power=0.9)
        self.fingerprint = fingerprint(job)
        self.history: list[EpochRecord] = []
        self.best_loss = float("inf")
        self.best: Weights | None = None
        self.since_best = 0
        self.snapshots: dict[int, Weights] = {}

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def exhausted(self) -> bool:
        """Whether the validation loss has not become better for long enough."""
        return bool(self.job.validation) and self.since_best >= self.job.settings.patience

    def prepare(self, batch: Patch, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and target of a batch, on the device; MONAI's engines give more arguments than are needed."""
        image, target = self.job.prepare(batch)
        return image.to(self.device), target.to(self.device)

    def finish_epoch(self, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        """Note an epoch on the learning curve, and keep its weights where they are asked for or the best so far."""
        self.history.append(EpochRecord(epoch, train_loss, validation_loss))
        if epoch in self.job.snapshots:
            self.snapshots[epoch] = self._weights()
        # while the mask input is empty the validation loss speaks of another task
        average = moving_validation(self.history[self.job.empty_mask_epochs :])
        if average is None:
            return
        if average < self.best_loss:
            self.best_loss, self.best, self.since_best = average, self._weights(), 0
        else:
            self.since_best += 1

    def fitted(self) -> Fitted:
        """The result: the best weights where epochs were compared, the last ones otherwise."""
        if self.best is not None:
            self.network.load_state_dict(self.best)
        return Fitted(self.network.cpu().eval(), tuple(self.history), self.snapshots)

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt`` and ``curve.json``."""
        history = [dataclasses.asdict(record) for record in self.history]
        with atomic_write(folder / "checkpoint.pt") as temporary:
            torch.save(
                {
                    "fingerprint": self.fingerprint,
                    "network": self.network.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "history": history,
                    "best_loss": self.best_loss,
                    "best": self.best,
                    "since_best": self.since_best,
                    "snapshots": self.snapshots,
                },
                temporary,
            )
        with atomic_write(folder / "curve.json") as temporary:
            temporary.write_text(json.dumps(history, indent=1), encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Continue from the folder's checkpoint, if there is one of this fingerprint."""
        path = folder / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            content = load_content(path)
            of_this = content["fingerprint"] == self.fingerprint
        except Exception as error:  # torch.load raises many kinds on damaged files, without a common base
            logger.warning("%s: unreadable checkpoint (%s), training anew", path, error)
            return
        if not of_this:
            logger.info("%s: of other data or settings, training anew", path)
            return
        self.network.load_state_dict(content["network"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.history = [EpochRecord(**record) for record in content["history"]]
        self.best_loss, self.best = content["best_loss"], content["best"]
        self.since_best, self.snapshots = content["since_best"], content["snapshots"]

    def _weights(self) -> Weights:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.network.state_dict().items()}


def _first_network(job: Job) -> nn.Module:
    """The untrained network; a function of the seed alone."""
    if job.build is None:
        return build_network(job.plan, seed=job.settings.seed, first_bias=job.first_bias)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.settings.seed)
        return job.build(job.plan)


def _trainer(training: _Training, progress: Progress) -> SupervisedTrainer:
    """MONAI's engine for the epochs that are left."""
    job, steps = training.job, training.job.settings.steps_per_epoch
    trainer = SupervisedTrainer(
        device=training.device,
        max_epochs=job.epochs,
        train_data_loader=_loader(training),
        network=training.computes,
        optimizer=training.optimizer,
        loss_function=job.loss,
        epoch_length=steps,
        prepare_batch=training.prepare,
    )
    trainer.state.epoch = training.done
    trainer.state.iteration = training.done * steps
    losses: list[float] = []

    def after_step(engine: Engine) -> None:
        losses.append(float(engine.state.output[0]["loss"]))
        at = f"epoch {engine.state.epoch} of {job.epochs}, loss {losses[-1]:.3f}"
        progress.step(engine.state.iteration, job.epochs * steps, job.name, at, unit=STEPS)

    def after_epoch(engine: Engine) -> None:
        validation = engine.state.metrics.get("validation_loss") if job.validation else None
        training.finish_epoch(engine.state.epoch, sum(losses) / max(1, len(losses)), validation)
        losses.clear()
        if training.exhausted:
            logger.info("%s: no better for %d epochs, stopped", job.name, job.settings.patience)
            engine.terminate()

    def before_step(engine: Engine) -> None:
        # what a network draws itself must not depend on where a training was resumed
        torch.manual_seed(job.settings.seed * STEPS_APART + engine.state.iteration)

    trainer.add_event_handler(Events.ITERATION_STARTED, before_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, after_step)
    if job.validation:
        _validate_each_epoch(trainer, training)
    LrScheduleHandler(training.scheduler, print_lr=False).attach(trainer)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
    return trainer


def _loader(training: _Training) -> Iterable[Patch]:
    job, settings = training.job, training.job.settings
    per_epoch = settings.steps_per_epoch * settings.batch
    dataset = PatchDataset(job.train, job.plan, settings, empty_until=job.empty_mask_epochs * per_epoch)
    batches = DataLoader(dataset, batch_size=settings.batch, sampler=Draws(training.done * per_epoch))
    return _Ahead(batches) if training.device.type == "cuda" else batches


class _Ahead:
    """Endless batches, each made in a thread while the one before it is used.

    A GPU takes less time for a step than a CPU for its patches. One thread, and no further process: batches come in
    order, and containers often have too little shared memory for them. MONAI's `ThreadBuffer` is as fast, but where
    making a batch fails it ends as if there were no more.
    """

    def __init__(self, batches: Iterable[Patch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Patch]:
        batches = iter(self._batches)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, batches)
            while True:
                batch = coming.result()
                coming = thread.submit(next, batches)
                yield batch


def _validate_each_epoch(trainer: SupervisedTrainer, training: _Training) -> None:
    """Let the trainer compute ``validation_loss`` after each epoch, on unaugmented patches."""
    job = training.job
    patches = [centred(example, job.plan.patch) for example in job.validation]
    batch_size = window_batch_size(job.plan.patch)
    metric = IgniteMetricHandler(loss_fn=job.loss, output_transform=from_engine(["pred", "label"]))
    evaluator = SupervisedEvaluator(
        device=training.device,
        val_data_loader=[
            torch.utils.data.default_collate(patches[i : i + batch_size]) for i in range(0, len(patches), batch_size)
        ],
        network=training.computes,
        prepare_batch=training.prepare,
        key_val_metric={"validation_loss": metric},
        metric_cmp_fn=lambda new, best: new < best,
    )
    ValidationHandler(interval=1, validator=evaluator).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(evaluator.state.metrics)
    )
