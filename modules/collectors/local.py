"""One actor in the learner's own process, which acts when it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from tensordict import TensorDictBase
from torch import Tensor

from offtrace.modules.collectors.actors import ActorSpec, shut_down
from offtrace.modules.collectors.frames import FRAMES, Packer
from offtrace.modules.collectors.memory import Key
from offtrace.modules.collectors.protocol import Copy
from offtrace.modules.collectors.weights import SharedWeights


class LocalBackend:
    """Meets :class:`~offtrace.modules.collectors.protocol.Backend`: a rollout begins when it is asked for.

    Nothing runs beside the learner. Actions are drawn from the generators of this process. What its environments raise
    ends it: they are of this process, which cannot be replaced.

    Args:
        spec: of the actor.
        shared: the weights.

    Raises:
        ValueError: the environments do not divide a rollout.
    """

    restarts = 0

    def __init__(self, spec: ActorSpec, shared: SharedWeights) -> None:
        self._shared = shared
        self._collector = spec.make(shared, 0)
        self._packer = Packer(spec.frame_stack)
        self._frames: Tensor | None = None
        self._iterator: Iterator[TensorDictBase] | None = None

    @property
    def version(self) -> int:
        """As of the protocol."""
        return self._shared.version

    @version.setter
    def version(self, value: int) -> None:
        self._shared.version = value

    @property
    def num_envs(self) -> int:
        """As of the protocol."""
        return self._shared.num_envs

    def publish(self, tensors: Mapping[str, Tensor]) -> int:
        """As of the protocol."""
        return self._shared.publish(tensors)

    def take(self, copied: Copy) -> tuple[dict[Key, Tensor], torch.Size, int]:
        """As of the protocol; the actor is number 0.

        Raises:
            EnvironmentFailure: the environment or the policy raised, and nothing takes its place.
        """
        try:
            if self._iterator is None:
                self._iterator = self._collector.iterator()
            rollout = next(self._iterator)
            packed = self._packer.pack(rollout, self._frames)
            self._frames = packed.get(FRAMES)
            return copied(packed), rollout.shape, 0
        except Exception as error:
            raise self._shared.failure(error) from error
        except BaseException:  # Ctrl-C: the rollout is lost, and the next one goes on from where it was
            self._iterator = None
            raise

    def shutdown(self) -> None:
        """As of the protocol."""
        self._shared.stop()
        shut_down(self._collector)
        self._iterator = None
