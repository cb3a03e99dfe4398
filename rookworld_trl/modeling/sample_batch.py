"""Drawing a batch of samples: along their drafts first, then token by token.

Drafts are guesses of completions that save forward passes and change no sample. The true completion of an `A:` prompt
is known, and a good model mostly writes it. One pass over prompt and draft gives the distribution at every position of
the draft for all samples of the prompt at once; each sample then draws its tokens from them for as long as it follows
the draft.

This is exact speculative sampling with a certain draft (Leviathan et al. 2023, arXiv 2211.17192: accept the drafted
token x with probability p(x), at the first rejection draw from p without x) in its coupled form: a sample draws from p
with the very random number it would use without a draft, and has followed the draft if x is what it drew. So samples
with and without drafts are equal, not just equal in distribution.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.sampling import cumulative_probs, draw, inversion_targets, row_generator, sampling_log_probs
from rookworld_trl.modeling.shared_prefix import SharedPrefixDecoder, prefill

# Logits computed at once along drafts: bounds memory (four tensors of this size, 256 MiB each in fp32; six on a GPU).
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, slots=True)
class Settings:
    """How to sample; see `rollout`.

    Raises:
        ValueError: naming the setting that means nothing, its value and its range.
    """

    max_new_tokens: int
    eos_token_id: int | None
    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: use at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: use 0 for greedy, or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: use 0 for no limit, or a positive number")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use a number in (0, 1], 1 for no limit")


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """Samples of one distinct prompt that are drawn together.

    Attributes:
        draft: the expected completion up to its end token, or nothing.
        rows: where the samples stand in the result.
        first_sample: number of the first of them among the prompt's samples.
    """

    prompt: tuple[int, ...]
    draft: tuple[int, ...]
    rows: tuple[int, ...]
    first_sample: int


class SampleBatch:
    """The samples of some requests while they are drawn; row r of every tensor is one sample.

    Drawn so far: `tokens[r, : lengths[r]]`. Every tensor has a spare row, which empty slots of the decoder
    write to, and `tokens` and `logps` a spare column, which finished rows write to.
    """

    def __init__(self, gpt2: GPT2, requests: Sequence[SampleRequest], settings: Settings) -> None:
        self.gpt2, self.requests, self.settings = gpt2, requests, settings
        self.device, limit = gpt2.wte.device, settings.max_new_tokens
        uniforms = [
            row_generator(settings.seed, request.prompt, request.first_sample + i).random(limit + 1, dtype=np.float32)
            for request in requests
            for i in range(len(request.rows))
        ]
        self.spare = len(uniforms)
        self.uniforms = torch.from_numpy(np.stack([*uniforms, uniforms[0]])).to(self.device)
        self.tokens = torch.zeros(self.uniforms.shape, dtype=torch.long, device=self.device)
        self.logps = torch.zeros_like(self.uniforms)
        self.lengths = torch.zeros(self.spare + 1, dtype=torch.long, device=self.device)
        self.done = self._index(range(self.spare + 1)) == self.spare

    def completions(self) -> Iterator[tuple[int, list[int], list[float]]]:
        """Row in the result, tokens and log-probs of every sample."""
        rows = [row for request in self.requests for row in request.rows]
        columns = (self.lengths.tolist(), self.tokens.tolist(), self.logps.tolist())
        for row, length, tokens, logps in zip(rows, *columns, strict=False):  # the spare row is left over
            yield row, tokens[:length], logps[:length]

    def draw(self) -> None:
        """Draw every sample to its end."""
        drafts = [request.draft for request in self.requests]
        prefix, hidden = prefill(self.gpt2, [request.prompt + request.draft for request in self.requests])
        prompt_lengths = self._index([len(request.prompt) for request in self.requests])
        rows = self._index(range(self.spare))
        prompts = self._index([i for i, request in enumerate(self.requests) for _ in request.rows])
        last_of_prompt = self._index(range(len(drafts))) * hidden.shape[1] + prompt_lengths - 1
        followed = self._follow(hidden.flatten(0, 1), last_of_prompt, drafts, prompts, rows)
        live = ~self.done[rows]
        rows, prompts, followed = rows[live], prompts[live], followed[live]
        if len(rows):
            lengths = prompt_lengths[prompts] + followed
            self._decode(SharedPrefixDecoder(self.gpt2, prefix, prompts, lengths, self.settings.max_new_tokens), rows)

    def _follow(
        self,
        hidden: Tensor,
        first: Tensor,
        drafts: Sequence[Sequence[int]],
        node_of_row: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Let rows draw along the drafts of their nodes, and one token behind what they followed.

        Args:
            hidden: (M, n_embd), final hidden states, those of a node in a row.
            first: (B,), which of them predicts the first token of the node's draft.
            node_of_row: (n,), ascending.

        Returns:
            How many drafted tokens each row drew (n,).
        """
        limit, eos = self.settings.max_new_tokens, self.settings.eos_token_id
        padded, sizes = self._padded(drafts), self._index([len(draft) for draft in drafts])
        ends = self._index([self._ends(draft) for draft in drafts]).bool()
        steps = self._index(range(padded.shape[1] + 1))
        followed = torch.zeros_like(rows)
        at_once = max(1, LOGITS_AT_ONCE // (len(steps) * self.gpt2.config.vocab_size))
        for start in range(0, len(drafts), at_once):
            nodes = slice(start, start + at_once)
            mine = slice(*torch.searchsorted(node_of_row, self._index([start, start + at_once])).tolist())
            node, row = node_of_row[mine] - start, rows[mine]
            log_probs = self._log_probs(hidden[(first[nodes, None] + steps).clamp(max=len(hidden) - 1)])
            columns = (self.lengths[row, None] + steps).clamp(max=limit)
            cumulative = cumulative_probs(log_probs, self.settings.temperature == 0)
            uniforms = self.uniforms[row[:, None], columns]
            followed[mine], drawn = verify(cumulative, padded[nodes], sizes[nodes], node, uniforms)
            logps = log_probs[:, :-1].gather(-1, padded[nodes, :, None]).squeeze(-1)
            # What was followed and the token behind it, at the row's next columns; all else goes to the spare one.
            place = followed[mine, None]
            ended = ends[nodes][node, None] & (place == sizes[nodes][node, None])
            columns = columns.where(steps < place + ~ended, limit)
            spare = logps.new_zeros(len(row), 1)
            tokens = torch.cat([padded[nodes][node], spare.long()], 1).scatter(1, place, drawn[:, None])
            logps = torch.cat([logps[node], spare], 1).scatter(1, place, log_probs[node, place[:, 0], drawn][:, None])
            self.tokens[row[:, None], columns], self.logps[row[:, None], columns] = tokens, logps
            self.lengths[row] = (self.lengths[row] + (place + ~ended).squeeze(1)).clamp(max=limit)
            self.done[row] = (self.lengths[row] == limit) | ended.squeeze(1)
            if eos is not None:
                self.done[row] |= drawn == eos
        return followed

    def _decode(self, decoder: SharedPrefixDecoder, rows: Tensor) -> None:
        """Draw the decoder's items, which are these rows (n,), token by token."""
        rows = rows[decoder.source].where(decoder.filled, self.spare)
        before = -1
        while True:
            last = self.tokens[rows, self.lengths[rows] - 1]
            self._draw_next(rows, decoder.forward(last))
            done = self.done[rows]
            finished = int(done.sum())  # the one wait for the device where nothing has finished
            if finished == len(rows):
                return
            if finished == before:
                continue
            before = finished
            live = decoder.compact(~done)
            if live is not None:
                rows, before = rows[live][decoder.source].where(decoder.filled, self.spare), -1

    def _draw_next(self, rows: Tensor, hidden: Tensor) -> None:
        """One token more of rows (N,), from the final hidden states (N, n_embd) of what they have; in place."""
        limit, eos = self.settings.max_new_tokens, self.settings.eos_token_id
        log_probs = self._log_probs(hidden)
        done, lengths = self.done[rows], self.lengths[rows]
        columns = lengths.masked_fill(done, limit)
        cumulative = cumulative_probs(log_probs, self.settings.temperature == 0)
        tokens = draw(cumulative, self.uniforms[rows, columns])
        self.tokens[rows, columns] = tokens
        self.logps[rows, columns] = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
        self.lengths[rows] = lengths = lengths + ~done
        done |= lengths == limit
        if eos is not None:
            done |= tokens == eos
        self.done[rows] = done

    def _log_probs(self, hidden: Tensor) -> Tensor:
        settings = self.settings
        return sampling_log_probs(self.gpt2.logits(hidden), settings.temperature, settings.top_k, settings.top_p)

    def _ends(self, draft: Sequence[int]) -> bool:
        return bool(draft) and draft[-1] == self.settings.eos_token_id

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def _padded(self, ids: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, ids))
        return self._index([[*row, *[0] * (longest - len(row))] for row in ids]).view(len(ids), longest)


def verify(
    cumulative: Tensor, drafts: Tensor, lengths: Tensor, node_of_row: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw along the drafts: how far each row follows its node's draft, and the token that it draws behind that.

    A node is a context that several rows share. Rows that follow a whole draft draw the token behind it.

    Args:
        cumulative: (B, J + 1, V), distributions at the J positions of each node's draft and behind it.
        drafts: (B, J), any token behind a draft's end.
        lengths: (B,), tokens of each draft.
        node_of_row: (n,).
        uniforms: (n, J + 1), the random numbers that each row has for those positions.

    Returns:
        Number of drafted tokens that each row drew (n,), and the next token it drew (n,).
    """
    size = drafts.shape[1]
    upper = cumulative[:, :size].gather(-1, drafts[..., None]).squeeze(-1)
    lower = cumulative[:, :size].gather(-1, (drafts - 1).clamp(min=0)[..., None]).squeeze(-1)
    lower = torch.where(drafts > 0, lower, 0.0)
    targets = inversion_targets(cumulative[:, :size, -1][node_of_row], uniforms[:, :size])
    within = torch.arange(size, device=drafts.device) < lengths[node_of_row, None]
    follows = (lower[node_of_row] <= targets) & (targets < upper[node_of_row]) & within
    accepted = follows.cumprod(-1).sum(-1)
    drawn = draw(cumulative[node_of_row, accepted], uniforms.gather(1, accepted[:, None]).squeeze(1))
    return accepted, drawn
