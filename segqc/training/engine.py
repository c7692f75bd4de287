"""One training, on MONAI's engines: learning curve, early stopping, checkpoints that resume at an epoch's boundary.

What is kept is the exponential moving average of the weights. Its validation loss is smooth, so that a training can end
when that gets no better (compare Morales-Brotons, Vogels & Hendrikx, "Exponential moving average of weights in deep
learning", TMLR 2024). The learning rate falls to zero at the most epochs that are allowed.

With ``start = "warm"`` a training begins at the weights that the last finished one in its folder had, if it may (see
`segqc.training.warm_start`), and without the epochs whose mask input is empty. All else is as in any training: the
learning rate begins at its height, the same rules end it. Snapshots of early epochs stay those of the first training.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import IgniteMetricHandler, LrScheduleHandler, ValidationHandler, from_engine
from monai.utils import set_determinism
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from segqc.networks.device import device_of_choice, has_bfloat16, in_device_memory
from segqc.networks.inference import window_batch_size
from segqc.networks.model import load_content
from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import Weights, build_network
from segqc.progress import Progress
from segqc.training.cases import Example
from segqc.training.patches import Draws, Patch, PatchDataset, centred
from segqc.training.spec import TrainingSettings
from segqc.training.warm_start import Lineage, NoStartError, Origin, Start, check_start
from segqc.volumes import atomic_write

logger = logging.getLogger(__name__)

STEPS = "steps"  # of a training, each of one batch
STEPS_APART = 10_000_019  # between the generator seeds of two trainings
_DECAY: Final = 0.99  # of the weights' moving average, at each step; smaller in the first steps
_POWER: Final = 0.9  # of the learning rate's fall
_LAST: Final = 0.1  # of a training; one whose best epoch lies in this part was still improving

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
PrepareBatch: TypeAlias = Callable[[Patch], tuple[torch.Tensor, torch.Tensor]]
NetworkBuilder: TypeAlias = Callable[[NetworkPlan], nn.Module]
Bound: TypeAlias = Literal["epochs", "minutes"]


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
    ``epochs`` are the most, fewer where their bound on time does not allow so many; in the first part of these,
    ``scan_only_share``, the mask input is empty. Without a ``lineage`` the training begins anew, whatever the settings
    say. ``bounded_by`` is the setting that ``epochs`` comes from, for those who want more of them.
    """

    name: str
    plan: NetworkPlan
    settings: TrainingSettings
    epochs: int
    train: Sequence[Example]
    validation: Sequence[Example]
    prepare: PrepareBatch
    loss: Loss
    scan_only_share: float = 0.0
    first_bias: float | None = None
    snapshots: tuple[int, ...] = ()
    build: NetworkBuilder | None = None
    variant: str = ""
    lineage: Lineage | None = None
    bounded_by: str = "epochs"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A trained network, its learning curve, and the weights after each epoch asked for in ``snapshots``.

    ``seen`` are the patients of the lineage that its labels, or those of a network that it began at, were of.
    ``best_epoch`` is whose weights it has, None where epochs were not compared: then it has the last ones. ``bound`` is
    what ended the training, None where it got no better.
    """

    network: nn.Module
    history: tuple[EpochRecord, ...]
    snapshots: dict[int, Weights]
    best_epoch: int | None
    bound: Bound | None
    seen: tuple[str, ...] = ()

    @property
    def was_improving(self) -> bool | None:
        """Whether the validation loss was still getting better at the end; None where epochs were not compared."""
        if self.best_epoch is None:
            return None
        return self.bound is not None and self.best_epoch > (1 - _LAST) * len(self.history)

    def told(self, name: str, epochs: str = "epochs") -> str:
        """A sentence on how long the training was, and whether longer would have been better.

        Args:
            name: the training's.
            epochs: the setting that bounds its epochs.
        """
        whole = f"{name}: {len(self.history)} epochs"
        if self.was_improving is None:
            return f"{whole}; as no patient validates it, nothing says whether more of them would help."
        if self.was_improving:
            setting = epochs if self.bound == "epochs" else "max_minutes"
            return f"{whole}, and it was still improving at the end: it may become better with larger '{setting}'."
        return f"{whole}, the best was epoch {self.best_epoch}."


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: giving activations back to the system and faulting them in again costs much."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def fingerprint(job: Job, start: Start | None = None) -> str:
    """What a checkpoint must agree on to be continued: plan, settings, length, the examples' contents, the start."""
    # how the network is asked later is no matter of its training, nor is what goes on beside it
    settings = dataclasses.replace(job.settings, average_flips=False, hide_mask=False, side_by_side=True)
    digest = hashlib.sha256(repr((job.plan, settings, job.epochs, job.scan_only_share, job.snapshots)).encode())
    digest.update(job.variant.encode())
    if start is not None:
        digest.update(start.digest.encode())
    for example in (*job.train, *job.validation):
        digest.update(f"{example.case}{example.weight}".encode())
        for array in (example.image, example.truth, example.mask, example.soft, example.ignored):
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def fit(job: Job, folder: Path, progress: Progress, *, from_epoch: Callable[[int], None] | None = None) -> Fitted:
    """Train a network, or continue or return a training of the same job found in ``folder``, wherever that has begun.

    The training ends when the moving average of the weights gets no better on the validation examples for
    ``patience`` epochs, or at its bound; its best weights are returned, the last ones where nothing validates. How many
    epochs ``max_minutes`` allow is decided by the first one. Every draw is a function of (seed, number of the draw), so
    an interrupted training resumes exactly at an epoch's boundary.

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
    training = _begun(job, _checkpoint(folder), progress)
    if from_epoch:
        from_epoch(training.done)
    if not training.is_over:
        with _same_every_time(job.settings.seed, training.device), in_device_memory(job.plan.patch):
            trainer = _trainer(training, progress)
            trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: training.save(folder))
            trainer.run()
    else:
        steps = job.settings.steps_per_epoch
        progress.step(training.done * steps, training.done * steps, job.name, "done by an earlier run", unit=STEPS)
    fitted = training.fitted()
    progress.message(fitted.told(job.name, job.bounded_by))
    return fitted


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


_Checkpoint: TypeAlias = dict[str, Any]


def _checkpoint(folder: Path) -> _Checkpoint | None:
    """The checkpoint of a folder; None where there is none that can be read."""
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    try:
        content = load_content(path)
        content["start"] = Start.of_content(content["start"])
        return content
    except Exception as error:  # torch.load raises many kinds on damaged files, without a common base
        logger.warning("%s: unreadable checkpoint (%s), training anew", path, error)
        return None


def finished_training(folder: Path) -> tuple[NetworkPlan, Start] | None:
    """The plan of a finished training's network, and what came of it; None where its checkpoint does not say it."""
    checkpoint = _checkpoint(folder)
    if checkpoint is None or not checkpoint["is_over"] or checkpoint["origin"] is None:
        return None
    return Origin.of_content(checkpoint["origin"]).plan, _end_of(checkpoint)


def _begun(job: Job, checkpoint: _Checkpoint | None, progress: Progress) -> _Training:
    """A job's training: continued from its own checkpoint, or begun, where it may at the end of the one before it."""
    if checkpoint is None:
        return _Training(job, None)
    if checkpoint["fingerprint"] == fingerprint(job, checkpoint["start"]):
        training = _Training(job, checkpoint["start"])
        training.restore(checkpoint)
        return training
    if job.settings.start == "scratch" or job.lineage is None:
        logger.info("%s: the last training was of other data or settings, training anew", job.name)
        return _Training(job, None)
    try:
        start = _start_of(job, job.lineage, checkpoint)
    except NoStartError as reason:
        progress.message(f"{job.name}: begins anew, as {reason}.")
        return _Training(job, None)
    progress.message(f"{job.name}: begins at the weights of the last training.")
    return _Training(job, start)


def _start_of(job: Job, lineage: Lineage, checkpoint: _Checkpoint) -> Start:
    """What the last finished training made: that of the checkpoint, or the one that it began at.

    Raises:
        NoStartError: if there is none that the job may begin at.
    """
    if checkpoint["origin"] is None:
        raise NoStartError("nobody knows what the last network has seen")
    start: Start | None = checkpoint["start"]
    if checkpoint["is_over"]:
        start = _end_of(checkpoint)
    if start is None:
        raise NoStartError("the last training did not come to its end")
    check_start(Origin.of_content(checkpoint["origin"]), start, _origin(job, lineage), lineage)
    return start


def _end_of(checkpoint: _Checkpoint) -> Start:
    """What a finished training made."""
    average = {name: tensor for name, tensor in checkpoint["average"].items() if name.startswith("module.")}
    last = {name.removeprefix("module."): tensor for name, tensor in average.items()}
    return Start(weights=checkpoint["best"] or last, seen=tuple(checkpoint["seen"]), snapshots=checkpoint["snapshots"])


def _origin(job: Job, lineage: Lineage) -> Origin:
    return Origin(
        plan=job.plan,
        outputs=lineage.outputs,
        seed=job.settings.seed,
        variant=job.variant,
        snapshots=tuple(job.snapshots),
    )


class _Training:
    """A job's network and optimizer, and what came of them so far: all that a checkpoint holds."""

    def __init__(self, job: Job, start: Start | None) -> None:
        settings = job.settings
        self.job = job
        self.start = start
        self.device = device_of_choice()
        self.epochs = job.epochs
        self.network = _first_network(job).to(self.device)
        if start is not None:
            self.network.load_state_dict(start.weights)
        if self.device.type == "cpu":
            # oneDNN takes a third less time for the weights' gradients of 3D convolutions in this layout
            self.network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.average = AveragedModel(self.network, multi_avg_fn=_moving_average)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: float(max(0.0, 1 - epoch / self.epochs) ** _POWER)
        )
        self.fingerprint = fingerprint(job, start)
        self.history: list[EpochRecord] = []
        self.best_loss = math.inf
        self.best: Weights | None = None
        self.best_epoch: int | None = None
        self.snapshots: dict[int, Weights] = {} if start is None else dict(start.snapshots)

    @property
    def done(self) -> int:
        """Number of finished epochs."""
        return len(self.history)

    @property
    def scan_only_epochs(self) -> int:
        """For how many epochs the mask input is empty."""
        return round(self.epochs * self.job.scan_only_share) if self.start is None else 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the validation loss has not become better for long enough."""
        return self.best_epoch is not None and self.done - self.best_epoch >= self.job.settings.patience

    @property
    def is_over(self) -> bool:
        """Whether there is no further epoch."""
        return self.done >= self.epochs or self.is_exhausted

    def computing(self, network: nn.Module) -> nn.Module:
        """A network as its convolutions are to be computed here."""
        mixed = self.job.settings.mixed_precision and has_bfloat16(self.device)
        return _MixedPrecision(network) if mixed else network

    def prepare(self, batch: Patch, *_: object, **__: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and target of a batch, on the device; MONAI's engines give more arguments than are needed."""
        image, target = self.job.prepare(batch)
        return image.to(self.device), target.to(self.device)

    def bound_by(self, seconds: float) -> None:
        """Allow no more epochs, each of so many seconds, than the bound on time does; at least two."""
        allowed = int(60 * self.job.settings.max_minutes / max(seconds, 1e-9))
        self.epochs = min(self.epochs, max(2, allowed))

    def finish_epoch(self, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        """Note an epoch on the learning curve, and keep its weights where they are asked for or the best so far."""
        self.history.append(EpochRecord(epoch, train_loss, validation_loss))
        if epoch in self.job.snapshots and self.start is None:
            self.snapshots[epoch] = self._weights()
        # while the mask input is empty the validation loss speaks of another task
        if validation_loss is not None and epoch > self.scan_only_epochs and validation_loss < self.best_loss:
            self.best_loss, self.best, self.best_epoch = validation_loss, self._weights(), epoch

    @property
    def seen(self) -> tuple[str, ...]:
        """The patients whose labels the network has seen, or one that it began at."""
        own = () if self.job.lineage is None else self.job.lineage.seen
        return tuple(sorted({*own, *(() if self.start is None else self.start.seen)}))

    def fitted(self) -> Fitted:
        """The result: the best weights where epochs were compared, the last ones otherwise."""
        self.network.load_state_dict(self.best or self._weights())
        bound: Bound | None = None
        if not self.is_exhausted:
            bound = "epochs" if self.epochs == self.job.epochs else "minutes"
        network, history = self.network.cpu().eval(), tuple(self.history)
        return Fitted(network, history, self.snapshots, self.best_epoch, bound, self.seen)

    def save(self, folder: Path) -> None:
        """Write ``checkpoint.pt`` and ``curve.json``."""
        lineage = self.job.lineage
        history = [dataclasses.asdict(record) for record in self.history]
        with atomic_write(folder / "checkpoint.pt") as temporary:
            torch.save(
                {
                    "fingerprint": self.fingerprint,
                    "network": self.network.state_dict(),
                    "average": self.average.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scheduler": self.scheduler.state_dict(),
                    "epochs": self.epochs,
                    "history": history,
                    "best_loss": self.best_loss,
                    "best": self.best,
                    "best_epoch": self.best_epoch,
                    "snapshots": self.snapshots,
                    "is_over": self.is_over,
                    "seen": list(self.seen),
                    "origin": None if lineage is None else _origin(self.job, lineage).content(),
                    "start": None if self.start is None else self.start.content(),
                },
                temporary,
            )
        with atomic_write(folder / "curve.json") as temporary:
            temporary.write_text(json.dumps(history, indent=1), encoding="utf-8")

    def restore(self, content: _Checkpoint) -> None:
        """Continue from a checkpoint of this job and this start."""
        self.network.load_state_dict(content["network"])
        self.average.load_state_dict(content["average"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        self.epochs = content["epochs"]
        self.history = [EpochRecord(**record) for record in content["history"]]
        self.best_loss, self.best, self.best_epoch = (content[name] for name in ("best_loss", "best", "best_epoch"))
        self.snapshots = content["snapshots"]

    def _weights(self) -> Weights:
        return {name: tensor.detach().cpu().clone() for name, tensor in self.average.module.state_dict().items()}


@torch.no_grad()
def _moving_average(
    averages: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], steps: torch.Tensor | int
) -> None:
    """Move the averages towards the weights, after so many steps: at first by much, as the first weights are random."""
    decay = min(_DECAY, int(steps) / (20 + int(steps)))
    for average, weight in zip(averages, weights, strict=True):
        average.lerp_(weight, 1 - decay)


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
    per_epoch = steps * job.settings.batch
    patches = PatchDataset(job.train, job.plan, job.settings, empty_until=training.scan_only_epochs * per_epoch)
    trainer = SupervisedTrainer(
        device=training.device,
        max_epochs=training.epochs,
        train_data_loader=_loader(training, patches),
        network=training.computing(training.network),
        optimizer=training.optimizer,
        loss_function=job.loss,
        epoch_length=steps,
        prepare_batch=training.prepare,
    )
    trainer.state.epoch = training.done
    trainer.state.iteration = training.done * steps
    losses: list[float] = []
    started = time.monotonic()

    def after_step(engine: Engine) -> None:
        training.average.update_parameters(training.network)
        losses.append(float(engine.state.output[0]["loss"]))
        at = f"epoch {engine.state.epoch} of {training.epochs}, loss {losses[-1]:.3f}"
        progress.step(engine.state.iteration, training.epochs * steps, job.name, at, unit=STEPS)

    def after_epoch(engine: Engine) -> None:
        if engine.state.epoch == 1:
            training.bound_by(time.monotonic() - started)
            patches.empty_until = training.scan_only_epochs * per_epoch
        validation = engine.state.metrics.get("validation_loss") if job.validation else None
        training.finish_epoch(engine.state.epoch, sum(losses) / max(1, len(losses)), validation)
        losses.clear()
        if training.is_over:
            engine.terminate()

    def before_step(engine: Engine) -> None:
        # what a network draws itself must not depend on where a training was resumed
        torch.manual_seed(job.settings.seed * STEPS_APART + engine.state.iteration)

    trainer.add_event_handler(Events.ITERATION_STARTED, before_step)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, after_step)
    if job.validation:
        _validate_each_epoch(trainer, training)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, after_epoch)
    LrScheduleHandler(training.scheduler, print_lr=False).attach(trainer)
    return trainer


def _loader(training: _Training, patches: PatchDataset) -> Iterable[Patch]:
    settings = training.job.settings
    draws = Draws(training.done * settings.steps_per_epoch * settings.batch)
    batches = DataLoader(patches, batch_size=settings.batch, sampler=draws)
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
    ignoring = any(example.ignored is not None for example in job.validation)
    patches = [centred(example, job.plan.patch, ignoring=ignoring) for example in job.validation]
    batch_size = window_batch_size(job.plan.patch)
    metric = IgniteMetricHandler(loss_fn=job.loss, output_transform=from_engine(["pred", "label"]))
    evaluator = SupervisedEvaluator(
        device=training.device,
        val_data_loader=[
            torch.utils.data.default_collate(patches[i : i + batch_size]) for i in range(0, len(patches), batch_size)
        ],
        network=training.computing(training.average.module),
        prepare_batch=training.prepare,
        key_val_metric={"validation_loss": metric},
        metric_cmp_fn=lambda new, best: new < best,
    )
    ValidationHandler(interval=1, validator=evaluator).attach(trainer)
    trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(evaluator.state.metrics)
    )
