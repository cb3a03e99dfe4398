"""The KL term of the loss: a direction, an estimator and a controlled coefficient."""

from functools import partial
from typing import Any

import torch

from rookworld_trl.training import kl
from rookworld_trl.training.config import RookWorldGRPOConfig
from rookworld_trl.training.kl_control import KLController, KLMeter, KLStop, ReferenceReset
from rookworld_trl.training.loss import Scale, Scored, aggregate
from rookworld_trl.training.schedules import RateControl
from rookworld_trl.training.scoring import Scorer

# What `--recovery_mode` does, each time it is given.
RECOVERY_BETA = 2.0
RECOVERY_TARGET = 0.5


class KLPenalty:
    """Coefficient times KL, in place of TRL's term, and what follows from the KL of each optimizer step.

    Args:
        args: the configuration.
        accelerator: for its sums over processes.
        scorer: gives hidden states, for the exact estimator.

    Attributes:
        controller: holds and moves the coefficient.
        stop: ends a run that has left its reference.
        rate: of the learning rate; None if that only follows its schedule.
        reset: when the policy becomes the reference.
    """

    def __init__(self, args: RookWorldGRPOConfig, accelerator: Any, scorer: Scorer):
        self.args, self.accelerator, self.scorer = args, accelerator, scorer
        self.exact = args.kl_estimator == "exact"
        self.controller = KLController(
            beta=args.beta,
            control=args.kl_control,
            target=args.kl_target,
            factor=args.kl_factor,
            interval=args.kl_interval,
            minimum=args.beta_min,
            maximum=args.beta_max,
            warmup_steps=args.kl_warmup_steps,
        )
        self.stop = KLStop(args.kl_stop_threshold or 0.0)
        self.rate = RateControl(args.kl_interval) if args.lr_control == "kl" else None
        self.reset = ReferenceReset(args.reference_reset_steps, args.reference_reset_stall)
        self._meter = KLMeter()
        if scorer.reference is None and (self.reset.every or self.reset.stall_window):
            raise ValueError(
                "`reference_reset_steps` and `reference_reset_stall` replace a reference model, but adapters have "
                "none: their reference is the base model. Set both to 0, or train without adapters"
            )

    def tighten(self, recoveries: int, new: int) -> None:
        """What `--recovery_mode` does: to the target for each of so many restarts, to the coefficient for each new."""
        controller = self.controller
        controller.target = self.args.kl_target * RECOVERY_TARGET**recoveries
        if new:
            controller.beta *= RECOVERY_BETA**new
            if controller.control != "fixed":
                controller.beta = min(self.args.beta_max, controller.beta)

    def replace_reference(self, policy: Any) -> None:
        """Give the reference the policy's weights, and start counting from 0 again."""
        plain = partial(self.accelerator.unwrap_model, keep_torch_compile=False)
        plain(self.scorer.reference).load_state_dict(plain(policy).state_dict())
        self.reset.done()

    def __call__(self, scored: Scored, batch: dict[str, Any], scale: Scale) -> torch.Tensor:
        """The term of one micro-batch, with the weights that the loss gives its other terms.

        Args:
            scored: the policy's log-probs and, for the exact estimator, hidden states, with their graph.
            batch: the micro-batch, `ref_per_token_logps` among it.
        """
        args, mask, logps = self.args, batch["completion_mask"], scored.logps
        if self.exact:
            per_token = self._exact(scored.hidden, batch, mask)
        else:
            options = (args.kl_type, args.kl_estimator, args.use_bias_correction_kl)
            per_token = kl.estimate_kl(logps, batch["ref_per_token_logps"], *options)
        # For estimates from the sampled token alone; the sum over the vocabulary does not depend on who sampled.
        if args.use_bias_correction_kl and "old_per_token_logps" in batch and not self.exact:
            per_token = per_token * (logps.detach() - batch["old_per_token_logps"]).exp()
        self._meter.add(per_token, logps - batch["ref_per_token_logps"], mask)
        return self.controller.coefficient * aggregate(per_token, mask, scale)

    def _exact(self, hidden: torch.Tensor | None, batch: dict[str, Any], mask: torch.Tensor) -> torch.Tensor:
        """KL (B, C) over the whole vocabulary, from the loss's hidden states and one more pass of the reference."""
        assert hidden is not None, "asked for"
        scorer, temperature = self.scorer, self.args.temperature
        with scorer.reference_model() as reference:
            reference_hidden = scorer.hidden_states(reference, batch)
        if (temperatures := batch.get("temperatures")) is not None:  # both are captured before they are scaled
            factors = (temperature / temperatures)[:, None, None]
            hidden, reference_hidden = hidden * factors, reference_hidden * factors
        unwrap = self.accelerator.unwrap_model
        heads = [unwrap(model).get_output_embeddings() for model in (scorer.policy, reference)]
        return kl.exact_kl(hidden, heads[0], reference_hidden, heads[1], mask, self.args.kl_type, temperature)

    def finish_step(self, metrics: dict[str, list[float]], training: bool) -> None:
        """After the last micro-batch: reduce over processes, log, adapt the coefficient, judge the stop."""
        mean, sequences = self._meter.reduce(self.accelerator)
        metrics["kl"].append(mean)
        metrics["kl/sequence_mean"].append(sequences.mean().item())
        if not training:
            return
        metrics["kl/coefficient"].append(self.controller.coefficient)
        metrics["kl/sequence_p95"].append(self.stop.observe(sequences)[1])
        if self.rate is not None:
            metrics["kl/rate_scale"].append(self.rate.scale)
            self.rate.observe(mean, self.controller.target * self.controller.factor)
        self.controller.update(mean, len(sequences))
        self.reset.observe(mean)
