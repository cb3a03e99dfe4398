"""A small value head for GAE: a regression from the policy's hidden states to returns, apart from the model itself.

The head reads hidden states without sending gradients back, and has an optimizer of its own, so that it neither
disturbs the policy nor ends up in the exported model.
"""

from typing import Any

import torch
from torch import nn

from rookworld_trl.training.advantages import at_last_token, gae


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

    def advantages(
        self,
        states: torch.Tensor,
        rewards: torch.Tensor,
        mask: torch.Tensor,
        gamma: float,
        lam: float,
        scaled: bool,
        accelerator: Any,
    ) -> tuple[torch.Tensor, float]:
        """Per-token advantages (B, C) by GAE on this head's values, which are then fitted to the returns.

        Args:
            states: (B, C, width), hidden states before each completion token.
            rewards: (B,), received with the last token; a NaN row gets advantage 0 and teaches the head nothing.
            mask: (B, C).
            scaled: divide by the root mean square over the tokens of all processes; nothing is subtracted, so a
                positive advantage stays one.

        Returns:
            Advantages, and the head's mean squared error before the fit.
        """
        mask = mask * (~rewards.isnan())[:, None]
        values = self.values(states)
        advantages, returns = gae(at_last_token(rewards.nan_to_num(), mask), values, mask, gamma, lam)
        error = self.fit(states, returns, mask, accelerator)
        if scaled:
            sums = torch.stack([advantages.square().sum(), mask.sum().float()])
            total, count = accelerator.reduce(sums, reduction="sum")
            advantages = advantages / ((total / count.clamp(min=1)).sqrt() + 1e-4)
        return advantages, error

    # Saved, restored and taken back like any control.

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
