"""The networks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, cast

from offtrace.agents.config.base import Checks, ConfigError, Group
from offtrace.modules.naming import imported, nearest

IMAGE_ENCODERS = ("shallow", "resnet")
VECTOR_ENCODERS = ("mlp", "layernorm_mlp")
ENCODERS = ("auto", *IMAGE_ENCODERS, *VECTOR_ENCODERS)


@dataclass
class FeedForwardConfig(Group):
    """A network without memory: what all of them have."""

    encoder: str = "auto"
    """shallow and resnet (IMPALA's two) read images, mlp and layernorm_mlp (Acme's) vectors; or an own one's import
    path package.module:function. auto: shallow for images, mlp for vectors, in MPO layernorm_mlp."""
    hidden: list[int] | None = None
    """Widths of the fully connected layers; behind the first one of an image encoder they are a LayerNorm MLP. null:
    256 of an image encoder, 64 and 64 of the others."""
    activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "tanh"
    """Of mlp."""
    normalize: bool = False
    """Running normalisation of vectors, saved with the policy; images are divided by 255 alone."""
    channels_last: bool | None = None
    """Memory format of image encoders; null: channels last of resnet, of all of them on a GPU, and of shallow where a
    CPU learns in float32."""

    # what auto takes for vectors; as the next two no field, and so no flag
    vector_encoder = "mlp"

    # a group of an algorithm that has them makes fields of them
    recurrent = 0
    init_scale = cast("float | None", None)

    def check(self, at: str) -> None:
        """As :meth:`Group.check`; a network of the user's own is imported, and torch with it."""
        Checks(self, at).require(
            "hidden",
            lambda value: value is None or (value and min(value) >= 1),
            "a list of sizes of at least 1, or null",
        )
        if ":" in self.encoder:
            try:
                imported(self.encoder, "network", "observation_shape", "hidden")
            except ValueError as error:
                raise ConfigError(f"{at}.encoder: {error}") from error
        elif self.encoder not in ENCODERS:
            raise ConfigError(
                f"{at}.encoder is {self.encoder}; it must be one of {', '.join(ENCODERS)}, or "
                f"package.module:function{nearest(self.encoder, ENCODERS)}"
            )

    def check_reads(self, task: str, images: bool) -> None:
        """Refuse an encoder of vectors for a ``task`` that shows images, and the reverse.

        Raises:
            ConfigError: one sentence.
        """
        wrong, right, shown = (VECTOR_ENCODERS, IMAGE_ENCODERS, "images") if images else (
            IMAGE_ENCODERS, VECTOR_ENCODERS, "vectors"
        )  # fmt: skip
        if self.encoder in wrong:
            raise ConfigError(
                f"network.encoder is {self.encoder}, and {task} shows {shown}; it must be auto, {' or '.join(right)}"
            )


@dataclass
class NetworkConfig(FeedForwardConfig):
    """The policy's network, which the critic shares."""

    recurrent: int = 0
    """Width of an LSTM behind the encoder, which also reads the last action and reward; 0 for none."""
    init_scale: float | None = None
    """Standard deviation of a continuous action at the start; null: the policy's own."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.at_least(0, "recurrent")
        checks.normal_scale("init_scale")


@dataclass
class SeparateNetworksConfig(FeedForwardConfig):
    """Policy and critics, which share nothing."""

    hidden: list[int] | None = field(default_factory=lambda: [256, 256])
    """Widths of the policy's layers; behind the first one of an image encoder they are a LayerNorm MLP."""
    activation: Literal["tanh", "relu", "elu", "silu", "gelu"] = "relu"
    """Of mlp."""
    critic_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of a critic's layers."""
    critics: int = 2
    """Critics, of which the smallest value counts."""
    smoothing: float = 0.0
    """Low pass over executed actions, 0 for none: a = smoothing * last action + (1 - smoothing) * sample."""
    noise_correlation: float | None = None
    """Correlation of the exploration noise with that of the step before; 0: independent. null: 0.8 in SAC with
    continuous actions, an estimator without ratios (one_step, n_step) and no smoothing, to the power of
    env.action_repeat; and else 0."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        super().check(at)
        checks = Checks(self, at)
        checks.sizes("critic_hidden")
        checks.at_least(1, "critics")
        checks.require("smoothing", lambda value: 0 <= value < 1, "at least 0 and below 1")
        checks.require(
            "noise_correlation", lambda value: value is None or 0 <= value < 1, "at least 0, below 1, or null"
        )
        if self.smoothing and self.noise_correlation:
            raise ConfigError(
                f"{at}.smoothing is {self.smoothing} and {at}.noise_correlation {self.noise_correlation}; both make "
                "actions last: one of them must be 0"
            )
