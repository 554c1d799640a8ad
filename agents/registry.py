"""The package's algorithms, a line each: name, and where its configuration is. One from outside needs no line."""

from __future__ import annotations

from importlib import import_module

from offtrace.agents.config import Config

AGENTS = {
    "a2c": "offtrace.agents.a2c:A2CConfig",
    "acer": "offtrace.agents.acer:ACERConfig",
    "dqn": "offtrace.agents.dqn:DQNConfig",
    "impala": "offtrace.agents.impala:ImpalaConfig",
    "mpo": "offtrace.agents.mpo:MPOConfig",
    "ppo": "offtrace.agents.ppo:PPOConfig",
    "q_actor_critic": "offtrace.agents.q_actor_critic:QActorCriticConfig",
    "reactor": "offtrace.agents.reactor:ReactorConfig",
    "sac": "offtrace.agents.sac:SACConfig",
    "trpo": "offtrace.agents.trpo:TRPOConfig",
    "vmpo": "offtrace.agents.vmpo:VMPOConfig",
}


def config_class(algorithm: str) -> type[Config]:
    """The configuration of one of :data:`AGENTS`.

    Raises:
        KeyError: when there is none of that name.
    """
    module, _, name = AGENTS[algorithm].partition(":")
    kind: type[Config] = getattr(import_module(module), name)
    return kind
