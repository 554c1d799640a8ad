"""IMPALA, a V-trace actor-critic (Espeholt et al. 2018, arXiv 1802.01561)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from offtrace.agents.config import (
    Checks,
    CollectorConfig,
    ConfigError,
    EnvConfig,
    Group,
    MixedConfig,
    NetworkConfig,
    OptimConfig,
    RolloutTrainConfig,
    ShareReplayConfig,
    check_estimator,
    check_truncates,
)

if TYPE_CHECKING:
    from offtrace.agents.agent import Agent
    from offtrace.agents.data import MixedData, RolloutData
    from offtrace.modules.envs import EnvInfo


@dataclass
class LossConfig(Group):
    """The loss; the paper's values."""

    estimator: str = "vtrace"
    """vtrace, importance_sampling (no clips), one_step (policy only), gae (none) or n_step, with options in brackets,
    such as vtrace(lmbda=0.9, rho_clip=2.0); or package.module:Class of an own one."""
    gamma: float = 0.99
    """Discount per agent step."""
    value_coef: float = 0.5
    """Weight of half the squared value error."""
    entropy_coef: float = 0.01
    """Weight of the policy's entropy."""
    reduction: Literal["sum", "mean"] = "sum"
    """Over batch and time: sum as in the paper, or mean."""
    reward_clip: float | None = None
    """Rewards are clipped to plus or minus this in the learner; null for none."""
    normalize_advantage: bool = False
    """Advantages of an update are shifted and scaled to mean 0 and deviation 1."""
    policy_clip: float | None = None
    """Trust region: steps whose ratio has moved further than this get no policy gradient; null for none."""
    max_kl: float | None = None
    """Trust region of LASER, in nats: steps whose state the behaviour policy covers too badly are left out; discrete
    actions only; null for none."""
    entropy_on_replay: bool = True
    """The entropy of replayed rows counts too."""

    def check(self, at: str) -> None:
        """As :meth:`Group.check`."""
        check_estimator(at, self.estimator, "state")
        checks = Checks(self, at)
        checks.fraction("gamma")
        checks.at_least(0, "value_coef", "entropy_coef")
        checks.positive_or_null("reward_clip", "policy_clip", "max_kl")
        if self.max_kl is not None:
            check_truncates(at, self.estimator, self.max_kl)


@dataclass
class ImpalaConfig(MixedConfig):
    """IMPALA."""

    env: EnvConfig = field(default_factory=EnvConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    replay: ShareReplayConfig = field(default_factory=lambda: ShareReplayConfig(capacity=200_000))
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RolloutTrainConfig = field(default_factory=RolloutTrainConfig)

    algorithm = "impala"

    @property
    def actors_fit_machine(self) -> bool:
        """True, because the loss corrects for lag, unless a replay holds what each actor makes."""
        return not self.replay.form

    def check_kind(self, kind: Literal["discrete", "continuous"]) -> None:
        """As :meth:`Config.check_kind`; ``max_kl`` needs discrete ones."""
        if self.loss.max_kl is not None and kind == "continuous":
            raise ConfigError(
                f"loss.max_kl is {self.loss.max_kl}, which needs discrete actions; those of {self.task} are "
                "continuous: it must be null"
            )

    def policy_spec(self, info: EnvInfo) -> dict[str, Any]:
        """A network with a state value beside the policy."""
        from offtrace.agents.assemble import policy_spec

        return policy_spec(self, info)

    def build(self) -> tuple[Agent, MixedData | RolloutData]:
        """As :meth:`Config.build`."""
        return make_impala(self)


def make_impala(config: ImpalaConfig) -> tuple[Agent, MixedData | RolloutData]:
    """The agent and the data module of ``config``, as :meth:`Config.build`."""
    from offtrace.agents.assemble import mixed_agent, read_task
    from offtrace.modules.losses import ImpalaLoss
    from offtrace.modules.networks import build_policy

    info = read_task(config)
    spec = config.policy_spec(info)
    loss = ImpalaLoss(build_policy(**spec["arguments"]), **asdict(config.loss))
    return mixed_agent(config, info, loss, loss.policy, spec)


def atari_config() -> ImpalaConfig:
    """Learns well from few frames on small machines: four passes over each rollout, and the trust region they need."""
    return ImpalaConfig(
        loss=LossConfig(
            estimator="vtrace(lmbda=0.95)", reduction="mean", reward_clip=1.0, normalize_advantage=True, policy_clip=0.1
        )
    )


def paper_config() -> ImpalaConfig:
    """The published form: 32 unrolls of 20 per update, summed loss, TensorFlow's RMSProp, 200 million frames."""
    return ImpalaConfig(
        env=EnvConfig(num_envs=32),
        collector=CollectorConfig(unroll=20),
        loss=LossConfig(reward_clip=1.0),
        optim=OptimConfig(name="rmsprop_tf", lr=6e-4, eps=0.01, decay=0.99, clip_grad_norm=40.0),
        train=RolloutTrainConfig(total_frames=200_000_000, minibatches=1, epochs=1),
    )


def replay_config() -> ImpalaConfig:
    """The published form with replay: half of every batch of 32 unrolls comes from the last 10,000 of them."""
    config = paper_config()
    config.env.num_envs = 16
    config.replay = ShareReplayConfig(share=0.5, capacity=10_000 * config.collector.unroll)
    return config


def laser_config() -> ImpalaConfig:
    """LASER: seven replayed rows for each fresh one, a trust region by state, entropy on fresh rows alone.

    As published: unrolls of 19 steps, 7/8 of every batch replayed, uniform, step size and entropy of IMPALA. Not so: a
    batch has 32 rows, 4 of them fresh, in place of 128, and the replay 800,000 steps, 6 GB, in place of 10 to 15
    million, for a machine with few cores. The bound of the trust region, which the paper does not tell, is a guess. The
    paper's network has an LSTM, and replays whole episodes.
    """
    config = paper_config()
    config.env.num_envs, config.train.minibatches = 16, 4
    config.collector.unroll = 19
    config.replay = ShareReplayConfig(share=7 / 8, capacity=800_000, min_size=20_000)
    config.loss.max_kl, config.loss.entropy_on_replay = 0.2, False
    return config


def laser_control_config() -> ImpalaConfig:
    """CartPole as LASER learns it: one pass, seven replayed rows for each fresh one."""
    config = control_config()
    config.replay = ShareReplayConfig(share=7 / 8, capacity=50_000, min_size=2_000)
    config.loss.max_kl, config.loss.entropy_on_replay, config.loss.policy_clip = 0.2, False, None
    config.train.minibatches, config.train.epochs = 4, 1
    return config


def control_config() -> ImpalaConfig:
    """CartPole in minutes."""
    config = atari_config()
    config.env.task = "CartPole-v1"
    config.collector.unroll = 32
    # returns of hundreds: the value error must not drown the policy's gradient in the shared layers
    config.loss.reward_clip, config.loss.value_coef, config.loss.policy_clip = None, 0.01, 0.2
    config.optim.lr = 2.5e-3
    config.train = RolloutTrainConfig(
        total_frames=150_000, eval_every=50_000, checkpoint_every=50_000, precision="32-true"
    )
    return config


def pendulum_config() -> ImpalaConfig:
    """Pendulum: continuous actions."""
    config = control_config()
    config.env.task = "Pendulum-v1"
    config.loss.gamma, config.loss.entropy_coef, config.loss.value_coef = 0.9, 0.0, 0.05
    config.optim.lr = 1e-3
    config.train.total_frames = 400_000
    return config
