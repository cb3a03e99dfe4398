"""The trainer's rewards: screened before anything learns from them, and failing on all processes if on one."""

from typing import Any

import torch
from accelerate.utils import gather

from rookworld_trl.modeling.tokens import completion_texts
from rookworld_trl.training.reward_screen import RewardScreen, screened, share_outcome
from rookworld_trl.training.rollout_trainer import RolloutTrainer


class RewardTrainer(RolloutTrainer):
    """Rewards are finite and within `args.reward_limit`, or None.

    Attributes:
        rewards_unusable: no completion of the last batch, on any process, has a finite reward from any function.
    """

    reward_funcs: list[Any]
    rewards_unusable = False

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], completion_ids_list: Any
    ) -> torch.Tensor:
        """Rewards (N, functions) of all processes; NaN where a function does not apply or gave no usable number.

        Functions get texts by `completion_texts`: TRL's leave special tokens out and do not say whether they ended.

        Raises:
            Exception: what a reward function raised, on its own process; the others raise a RuntimeError with its
                traceback at the same time.
        """
        if all(isinstance(text, str) for text in completions):  # no conversations
            completions = completion_texts(self.processing_class, completion_ids_list, self.eos_token_ids)
        screen = RewardScreen(self.args.reward_limit)
        functions, error = self.reward_funcs, None
        self.reward_funcs = screened(functions, self.reward_func_names, screen)
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        except Exception as raised:
            # TRL gathers the rewards at its end: there the others are waiting.
            error = raised
            blank = torch.full((len(prompts), len(functions)), torch.nan, device=self.accelerator.device)
            rewards = gather(blank)
        finally:
            self.reward_funcs = functions
        not_finite, clamped = share_outcome(screen, error)
        for name, count in (("not_finite", not_finite), ("clamped", clamped)):
            if count:
                self._metrics[self._mode][f"rewards/{name}"].append(count)
        rewards = screen.screen_tensor(rewards)
        self.rewards_unusable = not bool(rewards.isfinite().any())
        return rewards
