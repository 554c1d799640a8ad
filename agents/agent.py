"""One Lightning module for every algorithm: it is composed, not inherited from."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.objectives.common import LossModule

from offtrace.agents.capture import CapturedUpdate, NotCapturableError, make_capturable
from offtrace.agents.data.acting import ActingData, PlainData
from offtrace.agents.guard import Guard
from offtrace.agents.optim import OptimizerFactory, ScheduleName, learning_rate_factor, match_device
from offtrace.agents.runs.checkpoint import CHECKPOINT_KEY
from offtrace.modules import host
from offtrace.modules.keys import FINALS, INDEX, PRIORITY
from offtrace.modules.losses import compile_loss

ROOM = 1
"""Room for final observations in each row of a compiled or captured batch; few unrolls truncate two episodes."""


class TrainingDivergedError(RuntimeError):
    """A gradient is no longer finite; the weights, which it has not moved, are still good.

    On the CPU the error comes at once. On a GPU it comes with the next log line or checkpoint, or at the end of
    training; the updates in between have moved nothing either.
    """


Capture = Literal["none", "update", "try"]

Update = Callable[["Agent", TensorDictBase], tuple[TensorDictBase, Tensor]]
"""One update of the agent's loss on a batch; what the log gets of it: the loss's outputs, and the gradient's norm."""


class Agent(pl.LightningModule):
    """A loss, an optimiser and a schedule, trained under manual optimisation.

    Every ``training_step`` is one update, or one for each of several batches: the loss in one call, one backward pass
    of the sum of its terms, the clip, the step, and the target networks. Then the data module sees the batch again, and
    what the loss wrote into it; priorities that lie on a device it sees one update later, when they have come. The
    frame counter belongs to the data module, which knows about ranks and repeated passes. An algorithm whose update is
    something else gives ``update``, which stands in for the loss, the backward pass, the clip and the step, and may
    call :meth:`gradient_step` for them.

    Under several ranks only gradients cross them, and DDP averages those. For the average to equal the gradient of
    the joined batch, a summed loss is multiplied by the number of ranks, and an averaged one by the rank's share of the
    valid steps.

    Args:
        loss: a TorchRL loss: TensorDict in; scalars ``loss_*``, which are summed, and diagnostics out. It needs
            ``reduction`` (``"sum"`` or ``"mean"``), and ``valid_count`` among its diagnostics where that is ``"mean"``.
            If it has ``set_progress``, that is called before each update with the part of the frames that is done.
        policy: the acting policy inside the loss, what actors and evaluations get.
        optimizer: builds the optimiser over the loss's parameters, in one group or several.
        total_frames: environment frames of the whole training, over all ranks; the schedule's end.
        schedule: ``"linear"`` (to 0 at ``total_frames``) or ``"constant"``.
        clip_grad_norm: maximum of the norm over each of the optimiser's groups, or ``None``.
        update: makes an update, where that is more than one :meth:`gradient_step`; called with the agent and the batch.
        after_update: called with the number of updates after each: moves target networks. Where it does nothing after
            some of them, its method ``due`` says so of a number; a captured update must know.
        compile: ``torch.compile`` the loss, from the second update on. Every row of a batch then has room for one final
            observation, so that all batches have the same shape. A batch that needs more room runs eagerly.
        capture: ``"update"`` runs whole updates as CUDA graphs, with the shapes of ``compile`` and with fused Adam.
            ``"try"`` runs them eagerly where the loss cannot be captured. ``"none"`` captures nothing. For one learner
            on a GPU. Lightning's ``global_step`` does not count captured updates.
        checkpoint_facts: plain values for the checkpoints: ``policy``, which says how
            :func:`offtrace.agents.load_policy` rebuilds it (``builder`` and its ``arguments``), ``env`` and
            ``eval_mode``, by which it is evaluated.

    Attributes:
        updates: so far, those of earlier parts of the run included.
        eager_updates: those that ran eagerly since training started, because their batch needed more room.
        data: the trainer's data module, or :class:`offtrace.agents.data.PlainData` around what is none of ours.

    Raises:
        TrainingDivergedError: in ``training_step``, or on a GPU later, when the gradient's norm is not finite; weights,
            targets and the optimiser's state stay.
        NotCapturableError: in ``training_step``, where ``capture`` is ``"update"`` and the update cannot be captured.
    """

    def __init__(
        self,
        loss: LossModule,
        policy: nn.Module,
        *,
        optimizer: OptimizerFactory,
        total_frames: int,
        schedule: ScheduleName = "linear",
        clip_grad_norm: float | None = None,
        update: Update | None = None,
        after_update: Callable[[int], None] | None = None,
        compile: bool = False,
        capture: Capture = "none",
        checkpoint_facts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.loss = loss
        self.policy = policy
        self.updates = self.eager_updates = 0
        self.total_frames = total_frames
        self.schedule: ScheduleName = schedule
        self.clip_grad_norm = clip_grad_norm
        self.checkpoint_facts = checkpoint_facts or {}
        self.data: ActingData | PlainData = PlainData(None, 1)
        self._make_optimizer = optimizer
        self._make_update: Update = update or Agent.gradient_step
        self._after_update = after_update
        # not a submodule: the parameters would stand in a checkpoint twice
        self.__dict__["_compiled"] = compile_loss(loss) if compile else None
        self._set_progress: Callable[[float], object] | None = getattr(loss, "set_progress", None)
        self._frames_before = 0  # frames already learned from: the first update has the full learning rate
        self._random_state: dict[str, Any] | None = None
        # the first update of a process is eager and checked at once: it makes the optimiser's state and looks up what
        # a compiler cannot follow, such as the formula of the KL of two distributions
        self._first = True
        self._static = False  # whether the present update is compiled or captured
        self._guard: Guard | None = None
        self._capture: Capture = capture
        self._captured: CapturedUpdate | None = None
        self._priorities: host.Copies | None = None  # of the last update
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._count = 0
        # a list made once: walking the modules costs more than a small update's clip
        self._parameters_to_train = [p for p in loss.parameters() if p.requires_grad]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The one optimiser, over every parameter of the loss."""
        optimizer = self._make_optimizer(self._parameters_to_train)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return optimizer

    @property
    def frames(self) -> int:
        """Environment frames so far, over all ranks."""
        return self.data.frames

    def training_step(self, batch: TensorDictBase | Iterable[TensorDictBase], batch_idx: int) -> None:
        """One update on ``batch``, which the data module yields in the loss's layout, or one on each of several."""
        for part in self.data.updates(batch):
            self._update(part)

    def _update(self, batch: TensorDictBase) -> None:
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        if self._first:
            match_device(optimizer)
            if self._capture != "none":
                make_capturable(optimizer)
        if not self._first and self._guard is None and self._checks_later():
            self._guard = Guard(self.loss, optimizer)
        self._set_learning_rate(optimizer)
        if self._set_progress is not None:
            self._set_progress(min(1.0, self._frames_before / self.total_frames))
        self._static = not self._first and self._fits(batch)
        out, norm = self._replayed(batch) if self._static and self._capture != "none" else self._on_device(batch)
        self._first = False
        self.updates += 1
        self._feed_back(batch, norm)
        self._frames_before = self.frames
        self._add_metrics(out, norm)

    def _feed_back(self, batch: TensorDictBase, norm: Tensor) -> None:
        """Shows the data module the batch; where its priorities lie on a device, those of the batch before."""
        priority = batch.get(PRIORITY, None) if self.data.reads_priorities else None
        if priority is None or host.readable(priority):
            self.data.feedback(batch)
            return
        self.settle()
        self._priorities = host.Copies(batch[INDEX], priority, norm if self._guard is None else self._guard.norm)

    def settle(self) -> None:
        """Gives the data module the priorities that are still on their way from the device; before it is saved."""
        if self._priorities is None:
            return
        index, priority, norm = self._priorities.read()
        self._priorities = None
        if norm.isfinite():  # else the update was undone, which is told with the next log line
            self.data.feedback(TensorDict({INDEX: index, PRIORITY: priority}, [len(index)]))

    def _set_learning_rate(self, optimizer: torch.optim.Optimizer) -> None:
        factor = learning_rate_factor(self.schedule, self._frames_before, self.total_frames)
        for group in optimizer.param_groups:
            if self._capture == "none":
                group["lr"] = group["base_lr"] * factor
            else:  # graphs read it where it lies
                group["lr"].fill_(group["base_lr"] * factor)

    def _checks_later(self) -> bool:
        """Whether the host leaves it to a :class:`Guard` to check the gradient.

        Not on the CPU, where looking costs nothing; nor with several learners, which must raise together; nor in an
        ``update`` of the algorithm's own, which may look itself.

        Raises:
            NotCapturableError: the update is to be captured, and the host checks.
        """
        later = not host.readable(self._parameters_to_train[0]) and self.trainer.world_size == 1
        later = later and self._make_update is Agent.gradient_step
        if not later and self._capture != "none":
            raise NotCapturableError(
                f"capture is {self._capture!r}, which needs one learner, on a GPU, and an update that is one gradient "
                "step; it must be 'none'"
            )
        return later

    def _fits(self, batch: TensorDictBase) -> bool:
        """Whether the update can be compiled or captured, if that is asked for; gives ``batch`` the shape for it."""
        if self._compiled is None and self._capture == "none":
            return False
        finals = batch.get(FINALS, None)
        if finals is None:
            return True
        if finals.shape[2] > ROOM:
            self.eager_updates += 1
            return False
        batch[FINALS] = finals.new_empty(*batch.shape, ROOM, 0)
        return True

    def _replayed(self, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """As :meth:`_on_device`, by a CUDA graph."""
        if self._captured is None:
            assert self._guard is not None
            self._captured = CapturedUpdate(
                self._on_device,
                self._guard.undo,
                name=type(self.loss).__name__,
                eager_if_refused=self._capture == "try",
                graphs=self._parameters_to_train[0].is_cuda,
            )
        due = getattr(self._after_update, "due", None)
        return self._captured(batch, due is None or due(self.updates + 1))

    def _on_device(self, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """All that the device does in an update; what it returns is detached."""
        if self._guard is not None:
            self._guard.remember()
        out, norm = self._make_update(self, batch)
        if self._after_update is not None:
            self._after_update(self.updates + 1)
        if self._guard is not None:
            self._guard.restore()
        return out.detach(), norm.detach()

    def gradient_step(self, batch: TensorDictBase) -> tuple[TensorDictBase, Tensor]:
        """The loss of ``batch``, the gradient of its terms' sum, the clip and the optimiser's step.

        Returns:
            The loss's outputs, and the norm of the gradient before the clip.

        Raises:
            TrainingDivergedError: as :meth:`check_finite`.
        """
        # a graph does not repeat what Lightning's wrappers do on the host
        raw = self._captured is not None
        optimizer: Any = self.optimizers(use_pl_optimizer=not raw)
        out = self._compiled(batch) if self._static and self._compiled is not None else self.loss(batch)
        total = torch.stack([value for name, value in out.items() if name.startswith("loss_")]).sum()
        optimizer.zero_grad()
        total = total * self._rank_scale(out)
        total.backward() if raw else self.manual_backward(total)
        if self.clip_grad_norm is None:
            norm = _norm(self._parameters_to_train)
        else:
            limit = self.clip_grad_norm
            norm = torch.stack([_clipped(group["params"], limit) for group in optimizer.param_groups]).norm()
        self.check_finite(norm)
        optimizer.step()
        return out, norm

    def check_finite(self, norm: Tensor) -> None:
        """Refuse a gradient whose ``norm`` is not finite; called before the weights move.

        Raises:
            TrainingDivergedError: one sentence; where a :class:`Guard` takes note of it, not yet.
        """
        if self._guard is not None:
            self._guard.note(norm)
        elif not torch.isfinite(norm):
            raise TrainingDivergedError(
                f"the gradient's norm is {norm.item()} at update {self.updates} ({self.frames} frames); "
                "the weights were left as they were before this step"
            )

    def check_guard(self) -> None:
        """Raise what :meth:`check_finite` left for later; waits for the device. Then updates move the weights again.

        Raises:
            TrainingDivergedError: one sentence.
        """
        if self._guard is None or math.isfinite(norm := float(self._guard.norm)):
            return
        undone = self._guard.forget()
        self.updates -= undone
        raise TrainingDivergedError(
            f"the gradient's norm was {norm} at update {self.updates}, {undone - 1} updates before it was looked at "
            f"({self.frames} frames); the weights were left as they were before that update"
        )

    def _rank_scale(self, out: TensorDictBase) -> Tensor | float:
        ranks = self.trainer.world_size
        if ranks == 1:
            return 1.0
        if self.loss.reduction == "sum":
            return float(ranks)
        count = out["valid_count"].to(torch.float32)
        joined = count.clone()
        torch.distributed.all_reduce(joined)
        return ranks * count / joined.clamp(min=1)

    def _add_metrics(self, out: TensorDictBase, norm: Tensor) -> None:
        self._names = [*(str(name) for name in out.keys()), "grad_norm"]  # noqa: SIM118 - a TensorDict
        values = torch.stack([*(value.float() for value in out.values()), norm.float()])
        self._sums = values if self._sums is None else self._sums + values
        self._count += 1

    def pop_metrics(self) -> dict[str, float]:
        """Means of the loss's outputs and the gradient norm since the last call; waits for the device.

        Raises:
            TrainingDivergedError: a gradient since then was not finite, on a GPU.
        """
        self.check_guard()
        if self._sums is None:
            return {}
        means = dict(zip(self._names, (self._sums / self._count).tolist(), strict=True))
        self._sums, self._count = None, 0
        return means

    def policy_weights(self) -> TensorDict:
        """The policy's parameters and buffers, detached; the same memory, so copy before keeping them."""
        return TensorDict.from_module(self.policy).data

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds counters, random state and the facts, all loadable with ``weights_only=True``.

        Raises:
            TrainingDivergedError: as :meth:`pop_metrics`: the counters would tell of updates that were undone.
        """
        self.check_guard()
        checkpoint[CHECKPOINT_KEY] = {
            "updates": self.updates,
            "frames": self.frames,
            "random": random_state(),
            **self.checkpoint_facts,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores the counters; the random state is set when training starts, after everything is built."""
        saved = checkpoint[CHECKPOINT_KEY]
        self.updates = saved["updates"]
        self._random_state = saved["random"]
        self.data.resume(checkpoint, saved["frames"])

    def setup(self, stage: str) -> None:
        """Takes the trainer's data, and refuses a trainer that would leave the actors with their first weights.

        Raises:
            ValueError: no :class:`offtrace.agents.WeightSync` among the callbacks.
        """
        from offtrace.agents.callbacks import WeightSync  # imports this module

        module = self.trainer.datamodule
        if not isinstance(module, ActingData):
            self.data = PlainData(module, self.trainer.world_size)
            return
        self.data = module
        if not any(isinstance(callback, WeightSync) for callback in self.trainer.callbacks):
            raise ValueError(
                "the trainer has no WeightSync among its callbacks, so the actors would keep their first weights; "
                "add offtrace.agents.WeightSync()"
            )

    def on_train_start(self) -> None:
        """Sets the random state of a resumed run."""
        self._frames_before = self.frames
        if self._random_state is not None:
            set_random_state(self._random_state)
            self._random_state = None
        if self.trainer.global_rank:  # the weights are the same on every rank; what is drawn in losses must not be
            # a hash and not a sum: of which two would be one, of neighbouring ranks and seeds
            own = np.random.SeedSequence([torch.initial_seed(), self.updates, self.trainer.global_rank])
            torch.manual_seed(int(own.generate_state(1, np.uint64)[0]))

    def on_train_end(self) -> None:
        """Raises what no log line has told: a last gradient that was not finite."""
        self.check_guard()


def _norm(parameters: list[nn.Parameter]) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)


def _clipped(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Clips the gradients of one group to the norm ``limit``; their norm before."""
    norm = _norm(parameters)
    nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators as plain values and tensors."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
