"""PPO: advantages from a value head instead of groups, and the loss of the value head."""

from __future__ import annotations

import torch

from thor.training.trainer import Sample


def gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016) over the N action tokens of one sample.

    delta_i = r_i + gamma V_{i+1} - V_i,   A_i = delta_i + gamma lam A_{i+1},   with V_N = A_N = 0

    rewards, values [N] -> (advantages, returns = advantages + values) [N]. V_i is the value of the state in which token
    i was sampled. Observation tokens have no entries: credit crosses a tool call as it crosses a token boundary.
    """
    r, v = rewards.tolist(), values.tolist()  # a loop over Python floats is faster than over tensor elements
    advantages, after, value_after = [0.0] * len(v), 0.0, 0.0
    for i in reversed(range(len(v))):
        advantages[i] = after = r[i] + gamma * value_after - v[i] + gamma * lam * after
        value_after = v[i]
    result = torch.tensor(advantages)
    return result, result + values


def ppo_advantages(samples: list[Sample], settings) -> None:
    """Set advantage and returns of each sample from its values. Its reward arrives at its last action token.

    settings: of run_rl.py; gamma, gae_lambda and whiten count.
    """
    for sample in samples:
        rewards = torch.zeros_like(sample.value_old)
        rewards[-1:] = sample.trajectory.reward  # a slice, because a sample may have no action token
        sample.advantage, sample.returns = gae(rewards, sample.value_old, settings.gamma, settings.gae_lambda)
    for level in ("trajectory", "step") if settings.whiten else ():
        chosen = [s for s in samples if s.level == level]
        everything = torch.cat([torch.empty(0), *(s.advantage for s in chosen)])
        mean, std = everything.mean(), everything.std(correction=0)
        for sample in chosen:
            sample.advantage = (sample.advantage - mean) / (std + 1e-6)


def value_loss(value, value_old, returns, clip: float):
    """max((V - R)^2, (V_clipped - R)^2) / 2, where V_clipped is within `clip` of the old value; all [N]."""
    clipped = value_old + (value - value_old).clamp(-clip, clip)
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2) / 2
