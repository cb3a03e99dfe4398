"""Native rollouts: sampling completions from the live parameters of a GPT-2, with nothing to copy or synchronise.

What makes them fast: each distinct prompt is passed once, and all its samples attend to that one copy of its keys and
values (shared-prefix attention, as in Juravsky et al. 2024, "Hydragen", arXiv 2402.05099); only what a sample adds
itself is cached by sample. Finished samples are compacted away while the others go on.

Drafts are guesses of completions that save forward passes and change no sample. The true completion of an `A:` prompt
is known, and a good model mostly writes it. One pass over prompt and draft gives the distribution at every position of
the draft for all samples of the prompt at once; each sample then draws its tokens from them for as long as it follows
the draft.

This is exact speculative sampling with a certain draft (Leviathan et al. 2023, arXiv 2211.17192: accept the drafted
token x with probability p(x), at the first rejection draw from p without x) in its coupled form: a sample draws from p
with the very random number it would use without a draft, and has followed the draft if x is what it drew. So samples
with and without drafts are equal, not just equal in distribution.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from rookworld_trl.modeling.gpt2 import GPT2
from rookworld_trl.modeling.shared_prefix import SharedPrefixDecoder, prefill

# Logits computed at once along drafts: bounds memory (four tensors of this size, 256 MiB each in fp32; six on a GPU).
LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled completions, prompt-major: sample j of prompt i stands at `i * num_samples + j`.

    Attributes:
        completion_ids: tokens of each completion, the end token included where it was produced.
        logps: natural log-prob of each of those tokens under the distribution it was sampled from (temperature
            included); for greedy decoding, under the model itself.
    """

    completion_ids: list[list[int]]
    logps: list[list[float]]


@torch.no_grad()
def rollout(
    model: nn.Module | GPT2,
    prompt_ids: Sequence[Sequence[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    drafts: Sequence[Sequence[int] | None] | None = None,
) -> Rollout:
    """Sample `num_samples` completions of each prompt.

    A sample depends on the weights, the seed, its prompt and its number among that prompt's samples, and on nothing
    else in the batch (up to rounding of the logits). A prompt listed twice has its samples numbered through, so its
    copies differ. The model's mode and dropout do not matter and are left as they are. Under `torch.autocast` the
    matrix products run in its dtype, as they do in training.

    Args:
        model: transformers `GPT2LMHeadModel`, whose parameters are used in place, or what `GPT2.sharing` made of it.
        prompt_ids: token ids of each prompt, without padding; lengths may differ.
        max_new_tokens: tokens at most in a completion.
        eos_token_id: the token that ends a completion; None: all run to `max_new_tokens`.
        temperature: 0 for greedy decoding.
        batch_size: samples drawn at the same time; None: all.
        drafts: for each prompt the completion to expect, its end token included, or None. The samples are the same with
            any draft; the better it is, the sooner they are there.

    Raises:
        ValueError: an unsupported model, a prompt that is empty or leaves no room for `max_new_tokens`, or a sampling
            setting out of its range.
    """
    counts = {"num_samples": num_samples, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: use at least 1")
    if not temperature >= 0:
        raise ValueError(f"temperature is {temperature}: use 0 for greedy, or a positive number")
    if drafts is not None and len(drafts) != len(prompt_ids):
        raise ValueError(f"{len(drafts)} drafts for {len(prompt_ids)} prompts: give one for each, or None")
    gpt2 = model if isinstance(model, GPT2) else GPT2.sharing(model)
    vocabulary, longest = gpt2.config.vocab_size, gpt2.config.n_positions - max_new_tokens
    for what, sequences in (("prompt", prompt_ids), ("draft", drafts or [])):
        for i, ids in enumerate(sequences):
            if wrong := [token for token in ids or () if not 0 <= token < vocabulary]:
                raise ValueError(f"{what} {i} holds token {wrong[0]}: the model knows 0 to {vocabulary - 1}")
    for i, prompt in enumerate(prompt_ids):
        if not 0 < len(prompt) <= longest:
            room = f"the context leaves room for 1 to {longest} beside max_new_tokens"
            raise ValueError(f"prompt {i} has {len(prompt)} tokens: {room}")
    rows = len(prompt_ids) * num_samples
    result = Rollout([[]] * rows, [[]] * rows)
    usable = [tuple(draft or ())[:max_new_tokens] for draft in drafts or [()] * len(prompt_ids)]
    usable = [draft[: draft.index(eos_token_id) + 1] if eos_token_id in draft else draft for draft in usable]
    for requests in plan(prompt_ids, usable, num_samples, batch_size or max(1, rows)):
        batch = _Batch(gpt2, requests, max_new_tokens, eos_token_id, temperature, seed)
        for row, ids, logps in batch.drawn():
            result.completion_ids[row], result.logps[row] = ids, logps
    if torch.is_autocast_enabled(gpt2.wte.device.type):
        torch.clear_autocast_cache()  # it holds weights cast without grad, which a training pass must not pick up
    return result


@dataclass(frozen=True, slots=True)
class Request:
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


def plan(
    prompt_ids: Sequence[Sequence[int]], drafts: Sequence[tuple[int, ...]], num_samples: int, limit: int
) -> list[list[Request]]:
    """Group the samples by distinct prompt and cut them into batches: with and without drafts, of similar length.

    A prompt listed twice takes the draft of its first place.

    Args:
        limit: samples of a batch.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    draft_of: dict[tuple[int, ...], tuple[int, ...]] = {}
    for i, (ids, draft) in enumerate(zip(prompt_ids, drafts, strict=True)):
        draft_of.setdefault(tuple(ids), draft)
        rows.setdefault(tuple(ids), []).extend(range(i * num_samples, (i + 1) * num_samples))
    batches: list[list[Request]] = []
    for drafted in (False, True):
        room = 0
        for prompt in sorted((ids for ids in rows if bool(draft_of[ids]) == drafted), key=len):
            for first in range(0, len(rows[prompt]), limit):
                request = Request(prompt, draft_of[prompt], tuple(rows[prompt][first : first + limit]), first)
                if room < len(request.rows):
                    batches.append([])
                    room = limit
                batches[-1].append(request)
                room -= len(request.rows)
    return batches


class _Batch:
    """The samples of some requests while they are drawn: along their drafts first, then token by token.

    Row r of every tensor is one sample; drawn so far: `tokens[r, : lengths[r]]`. Every tensor has a spare row, which
    empty slots of the decoder write to, and `tokens` and `logps` a spare column, which finished rows write to.

    Args:
        limit, eos, temperature, seed: `max_new_tokens` and the other settings of `rollout`.
    """

    def __init__(
        self, gpt2: GPT2, requests: Sequence[Request], limit: int, eos: int | None, temperature: float, seed: int
    ) -> None:
        self.gpt2, self.requests, self.device = gpt2, requests, gpt2.wte.device
        self.limit, self.eos, self.temperature = limit, eos, temperature
        uniforms = [
            row_generator(seed, request.prompt, request.first_sample + i).random(limit + 1, dtype=np.float32)
            for request in requests
            for i in range(len(request.rows))
        ]
        self.spare = len(uniforms)
        self.uniforms = torch.from_numpy(np.stack([*uniforms, uniforms[0]])).to(self.device)
        self.tokens = torch.zeros(self.uniforms.shape, dtype=torch.long, device=self.device)
        self.logps = torch.zeros_like(self.uniforms)
        self.lengths = torch.zeros(self.spare + 1, dtype=torch.long, device=self.device)
        self.done = self._index(range(self.spare + 1)) == self.spare

    def _index(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def drawn(self) -> Iterator[tuple[int, list[int], list[float]]]:
        """Draw every sample to its end; yields row in the result, tokens and log-probs of each."""
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
            self._decode(SharedPrefixDecoder(self.gpt2, prefix, prompts, lengths, self.limit), rows)
        places = [row for request in self.requests for row in request.rows]
        columns = (self.lengths.tolist(), self.tokens.tolist(), self.logps.tolist())
        for place, length, tokens, logps in zip(places, *columns, strict=False):  # the spare row is left over
            yield place, tokens[:length], logps[:length]

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
        limit, eos, longest = self.limit, self.eos, max(map(len, drafts))
        padded = self._index([[*draft, *[0] * (longest - len(draft))] for draft in drafts]).view(len(drafts), longest)
        sizes = self._index([len(draft) for draft in drafts])
        ends = self._index([bool(draft) and draft[-1] == eos for draft in drafts]).bool()
        steps = self._index(range(longest + 1))
        followed = torch.zeros_like(rows)
        at_once = max(1, LOGITS_AT_ONCE // (len(steps) * self.gpt2.config.vocab_size))
        for start in range(0, len(drafts), at_once):
            nodes = slice(start, start + at_once)
            mine = slice(*torch.searchsorted(node_of_row, self._index([start, start + at_once])).tolist())
            node, row = node_of_row[mine] - start, rows[mine]
            states = hidden[(first[nodes, None] + steps).clamp(max=len(hidden) - 1)]
            log_probs = sampling_log_probs(self.gpt2.logits(states), self.temperature)
            columns = (self.lengths[row, None] + steps).clamp(max=limit)
            cumulative = cumulative_probs(log_probs, self.temperature == 0)
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
            hidden = decoder.forward(self.tokens[rows, self.lengths[rows] - 1])
            log_probs = sampling_log_probs(self.gpt2.logits(hidden), self.temperature)
            done, lengths = self.done[rows], self.lengths[rows]
            columns = lengths.masked_fill(done, self.limit)
            cumulative = cumulative_probs(log_probs, self.temperature == 0)
            tokens = draw(cumulative, self.uniforms[rows, columns])
            self.tokens[rows, columns] = tokens
            self.logps[rows, columns] = log_probs.gather(-1, tokens[:, None]).squeeze(-1)
            self.lengths[rows] = lengths = lengths + ~done
            done |= lengths == self.limit
            if self.eos is not None:
                done |= tokens == self.eos
            self.done[rows] = done
            finished = int(done.sum())  # the one wait for the device where nothing has finished
            if finished == len(rows):
                return
            if finished == before:
                continue
            before = finished
            live = decoder.compact(~done)
            if live is not None:
                rows, before = rows[live][decoder.source].where(decoder.filled, self.spare), -1


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


# The distribution, the draw, and random numbers that belong to a row and not to its batch


def sampling_log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs (..., V) of the distribution that is sampled from; for greedy decoding (0), the model's own."""
    logits = logits.float()
    return (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)


def cumulative_probs(log_probs: Tensor, greedy: bool = False) -> Tensor:
    """Cumulative distribution (..., V); for greedy decoding, that of the certain choice of the most probable token."""
    if greedy:
        tokens = torch.arange(log_probs.shape[-1], device=log_probs.device)
        return (tokens >= log_probs.argmax(-1, keepdim=True)).float()
    probs = log_probs.exp()
    sums = probs.cumsum(-1)
    # A CPU adds one after the other, in double precision: sums never fall, and stay where the probability is 0. The
    # parallel scan of a GPU promises neither.
    return sums if sums.device.type == "cpu" else rising(sums, probs)


def rising(sums: Tensor, probs: Tensor) -> Tensor:
    """Rounded sums (..., V) of probabilities made to rise where a token has one, and nowhere else.

    Then the first sum above any target below the total is that of a token with a probability, and a binary search
    finds it.
    """
    return sums.masked_fill(probs == 0, 0).cummax(-1).values


def inversion_targets(totals: Tensor, uniforms: Tensor) -> Tensor:
    """Where uniforms in [0, 1) fall in distributions that sum to `totals`; a token holds [sum before it, its sum).

    Rounding must reach neither the total itself nor a token of probability 0: the first sum above the target has one.
    """
    return (uniforms * totals).minimum(totals.nextafter(torch.zeros_like(totals)))


def draw(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """One token for each row by inverting its cumulative distribution (N, V) at its uniform (N,) in [0, 1).

    A row of NaN, where nothing can be drawn, gets a token too: its log-prob tells the caller.
    """
    targets = inversion_targets(cumulative[:, -1:], uniforms[:, None])
    tokens = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)
    return tokens.clamp(max=cumulative.shape[-1] - 1)


def row_generator(seed: int, prompt_ids: Sequence[int], sample: int) -> np.random.Generator:
    """The random stream of one sample: a function of the seed, the prompt and the sample's number alone.

    Whatever else is in the batch, and in whichever order, the row draws the same numbers. Philox is counter-based
    (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), so a key is all the setup it needs.
    """
    text = f"{seed}|{sample}|{','.join(map(str, prompt_ids))}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
