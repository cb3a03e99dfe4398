"""Per-token advantages by generalised advantage estimation, from a small value head of its own.

The head is a regression from the policy's hidden states to returns, apart from the model: it reads states without
sending gradients back, and has an optimizer of its own, so that it neither disturbs the policy nor ends up in the
exported model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rookworld_trl.settings.parser import option
from rookworld_trl.training.plugin import Plugin, Row


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, equations 11 and 16).

    A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, with V = 0 after the last token.

    Args:
        rewards, values: (B, C), reward received with token t, and value of the state before it.
        mask: (B, C), 1 for tokens; they come first in each row.

    Returns:
        Advantages and returns A + V, both (B, C), 0 where masked.
    """
    mask = mask.to(values.dtype)
    values = values * mask
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = (delta + gamma * lam * running) * mask[:, t]
        advantages[:, t], following = running, values[:, t]
    return advantages, (advantages + values) * mask


class ValueHead:
    """V(s): LayerNorm, one hidden tanh layer, and an output that starts at 0.

    Args:
        width: size of the hidden states.
        hidden: size of the hidden layer.
        learning_rate: constant Adam learning rate.
        epochs: full-batch steps in each fit.
        seed: draws the initial weights, the same in every process.
    """

    def __init__(
        self,
        width: int,
        hidden: int = 64,
        learning_rate: float = 1e-3,
        epochs: int = 4,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPUs too
            output = nn.Linear(hidden, 1)
            self.net = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.Tanh(), output)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.net.to(device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=learning_rate)
        self.epochs = epochs

    def values(self, states: torch.Tensor) -> torch.Tensor:
        """States (..., width) to values (...), without gradients."""
        with torch.no_grad():
            return self.net(states.float())[..., 0]

    def fit(self, states: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, accelerator: Any) -> float:
        """Regress towards `returns` (B, C) where `mask` (B, C) is set, over the batches of all processes together.

        Returns:
            Mean squared error before the fit.
        """
        chosen = mask.bool()
        states, targets = states[chosen].float(), returns[chosen].float()
        count = accelerator.reduce(chosen.sum().float(), reduction="sum").clamp(min=1)
        first = 0.0
        with torch.enable_grad():
            for epoch in range(self.epochs):
                self.optimizer.zero_grad()
                loss = (self.net(states)[..., 0] - targets).square().sum() / count
                loss.backward()
                for parameter in self.net.parameters():
                    parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
                self.optimizer.step()
                if epoch == 0:
                    first = accelerator.reduce(loss.detach(), reduction="sum").item()
        return first

    def state_dict(self) -> dict[str, Any]:
        moments = [self.optimizer.state[parameter] for parameter in self.net.parameters()]
        return {"weights": self.net.state_dict(), "moments": moments}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises:
        ValueError: the state of a head of another shape.
        """
        try:
            self.net.load_state_dict(state["weights"])
        except RuntimeError as error:
            raise ValueError(
                f"the value head cannot be restored ({error}); resume from a checkpoint of a run of the same model"
            ) from error
        for parameter, moments in zip(self.net.parameters(), state["moments"], strict=True):
            self.optimizer.state[parameter] = {name: tensor.clone() for name, tensor in moments.items()}


@dataclass
class GAE(Plugin):
    """Puts per-token advantages (B, C) in place of the groups'; the value head is the baseline."""

    NAME = "use_gae"
    STATE = "value_head"
    SAMPLED = True
    UNDONE = True

    use_gae: bool = option(False, "Per-token advantages by GAE, from a small value head of its own.")
    gae_gamma: float = option(1.0, "Discount of GAE, per token.", least=0, most=1)
    gae_lambda: float = option(0.95, "Lambda of GAE.", least=0, most=1)

    @property
    def on(self) -> bool:
        return self.use_gae

    def refusals(self, args: Any, others: Sequence[str]) -> Iterator[str]:
        if "mining" in others:
            yield (
                "use_gae: with `mining` groups are dropped whose rewards agree, and with a value head as the baseline "
                "these still teach. Set one of them to False"
            )
        if args.multi_objective_aggregation != "sum_then_normalize":
            yield (
                "multi_objective_aggregation: only TRL's group mean can normalise each reward by itself. Set it to "
                "sum_then_normalize, or `use_gae` to False"
            )
        if args.importance_sampling_level == "sequence" or args.off_policy_mask_threshold is not None:
            yield (
                "use_gae: GAE gives each token its own advantage, and sequence-level importance sampling and "
                "`off_policy_mask_threshold` take one for the whole completion. Set `use_gae` to False, or use "
                "token-level importance sampling and no such mask"
            )
        if "advantage_baseline" in others or args.scale_rewards == "group":
            yield (
                "use_gae: the value head is the baseline, token by token; groups play no part. Leave "
                "`advantage_baseline` at group_mean and set `scale_rewards` to batch or none"
            )

    def attach(self, trainer: Any) -> None:
        self.trainer = trainer
        width, device = trainer.model.config.hidden_size, trainer.accelerator.device
        self.head = ValueHead(width, seed=trainer.args.seed, device=device)

    def rewarded(self, rows: list[Row], rewards: torch.Tensor) -> None:
        self.rewards = rewards[self.trainer.mine(rows)]

    def sampled(self, rows: list[Row], batch: Row) -> None:
        trainer = self.trainer
        states = trainer.scorer.hidden_states(trainer.model, batch)  # (B, C, width), before each completion token
        # A row without a reward gets advantage 0 and teaches the head nothing.
        mask = batch["completion_mask"] * (~self.rewards.isnan())[:, None]
        last = mask.sum(dim=1).long() - 1
        counted = torch.nonzero(last >= 0)[:, 0]
        placed = torch.zeros_like(mask, dtype=self.rewards.dtype)
        placed[counted, last[counted]] = self.rewards[counted]
        advantages, returns = gae(placed, self.head.values(states), mask, self.gae_gamma, self.gae_lambda)
        trainer.record("value/error", self.head.fit(states, returns, mask, trainer.accelerator))
        if trainer.args.scale_rewards == "batch":
            # By the root mean square over all processes' tokens; nothing is subtracted, so a positive one stays that.
            sums = torch.stack([advantages.square().sum(), mask.sum().float()])
            total, count = trainer.accelerator.reduce(sums, reduction="sum")
            advantages = advantages / ((total / count.clamp(min=1)).sqrt() + 1e-4)
        batch["advantages"] = advantages

    def state_dict(self) -> dict[str, Any]:
        return self.head.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state)
