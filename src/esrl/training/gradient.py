"""Stage two: the gradient of any objective at constant memory (method.md, section 4).

An objective L is a function of the log-probabilities l of all tokens of all samples, so dL/dtheta = sum c * dl/dtheta
with c = dL/dl. The coefficients c couple the samples of a prompt; once they are known, nothing else does, and the
rows run through the model in micro-batches of any size. The prompts are encoded once with a graph that is cut at the
decoder's view of them (``PromptState``): the micro-batches add up their gradient there, one way back goes through the
encoder. A critic's values are a second function of the same hidden states, with coefficients dL/dV of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from esrl.algorithm.log_probs import MAX_LOGITS, room_for_logits, token_log_probs, weighted_log_prob_sum
from esrl.algorithm.products import accumulating
from esrl.algorithm.streams import seed_of
from esrl.errors import OutOfMemoryError
from esrl.kernels import memory
from esrl.models.policy import Policy, PromptState
from esrl.models.precision import autocast
from esrl.training.oom import free_cached_memory, is_out_of_memory
from esrl.training.packing import pack
from esrl.types import Prompts, Rollouts

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientConfig:
    """Stage two's memory; none of it changes the gradient beyond rounding."""

    kind: Literal["two_stage", "graph"] = "two_stage"
    """`two_stage` (paper) or `graph`: the conventional step that keeps the graph of sampling, for small models (the
    ablation without two stages)."""
    micro_batch_tokens: int | None = None
    """Target tokens in one micro-batch, padding included where it is computed; halved when memory runs out. Unset:
    16,384 on CUDA; on CPUs 131,072 divided by the model's width, but 384 at least."""
    max_prompt_tokens: int | None = None
    """Source tokens, padding included, whose encoder graph is held at a time. Unset: 2,048 on CPUs, 65,536 on CUDA."""
    max_logits: int = MAX_LOGITS
    """Logits computed at a time."""
    dropout: float = 0.0
    """Dropout in both stages of scoring; 0 also turns layer dropout off."""
    rescore: bool | None = None
    """Compute l anew in stage two instead of reusing stage one's; unset means: where dropout or half precision make
    them differ."""

    def __post_init__(self) -> None:
        if self.kind not in ("two_stage", "graph"):
            raise ValueError(f'gradient kind is {self.kind!r}; choose "two_stage" or "graph".')
        for name in ("micro_batch_tokens", "max_prompt_tokens", "max_logits"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must lie in [0, 1).")
        if self.kind == "graph" and self.dropout:
            raise ValueError('dropout needs kind = "two_stage": the conventional step scores what it samples.')


class StageTwo:
    """Scores complete samples and back-propagates coefficients.

    Args:
        critic: gives a value for each hidden state, (n, D) -> (n, 1); its gradient goes on into the policy.

    ``micro_batch_tokens`` may have been halved by a lack of memory; the smaller size is kept.
    """

    def __init__(self, policy: Policy, config: GradientConfig, critic: nn.Module | None = None) -> None:
        self.policy = policy
        self.critic = critic
        self.config = config
        cuda = policy.device.type == "cuda"
        # narrow models need less memory for a token, and more tokens to be worth an operation's start
        few = max(384, (1 << 17) // policy.projection().weight.shape[1])
        self.micro_batch_tokens = config.micro_batch_tokens or (1 << 14 if cuda else few)
        self.max_prompt_tokens = config.max_prompt_tokens or (1 << 16 if cuda else 1 << 11)

    @property
    def rescores(self) -> bool:
        """Whether l must be computed anew: stage one's serves where its numerics agree (method.md, section 4)."""
        if self.config.rescore is not None:
            return self.config.rescore
        exact = (torch.float32, torch.float64)  # the others: half precision, or 4 bits in bytes
        half = self.policy.precision != "float32" or any(p.dtype not in exact for p in self.policy.model.parameters())
        return half or bool(self.config.dropout)

    def shrink(self, micro_batch_tokens: int) -> None:
        """Go on with the micro-batch that an earlier part of the run had to take."""
        while self.micro_batch_tokens > max(1, micro_batch_tokens):
            self._halve()

    def _halve(self) -> None:
        self.micro_batch_tokens //= 2
        self.max_prompt_tokens = max(1, self.max_prompt_tokens // 2)

    def log_probs(self, prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None, seed: int) -> Tensor:
        """(R, T) log-probabilities of the samples, without a graph; 0 outside the mask."""
        return self.scores(prompts, rollouts, temperature, seed)[0]

    def scores(
        self, prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        """(R, T) log-probabilities and, where there is a critic, (R, T) values before each token; 0 elsewhere."""
        with memory.stage(self.policy.device):
            return self._retry(lambda: self._scores(prompts, rollouts, temperature, seed))

    def backward(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        coefficients: Tensor,
        temperature: Tensor | None,
        seed: int,
        value_coefficients: Tensor | None = None,
    ) -> None:
        """Set the parameters' ``grad`` to sum c * dl/dtheta; rows whose coefficients are all 0 cost nothing.

        What was in ``grad`` before is lost: to keep it for a second attempt would take as much memory again.

        Args:
            coefficients: (R, T) c = dL/dl.
            temperature: (R,) of the scores, None for 1.
            seed: of dropout; the same seed as in ``log_probs`` replays it.
            value_coefficients: (R, T) dL/dV of the critic's values.
        """
        assert value_coefficients is None or self.critic is not None, "values need a critic"
        modules = [self.policy.model] if self.critic is None else [self.policy.model, self.critic]

        def attempt() -> None:
            for module in modules:
                module.zero_grad(set_to_none=False)
            self._backward(prompts, rollouts, (coefficients, value_coefficients), temperature, seed)

        with memory.stage(self.policy.device):
            self._retry(attempt)

    def _scores(
        self, prompts: Prompts, rollouts: Rollouts, temperature: Tensor | None, seed: int
    ) -> tuple[Tensor, Tensor | None]:
        log_probs = torch.zeros_like(rollouts.log_probs)
        values = None if self.critic is None else torch.zeros_like(rollouts.log_probs)
        everything = torch.ones(rollouts.num_rows, dtype=torch.bool)
        with torch.no_grad(), autocast(self.policy.device, self.policy.precision):
            for part in self._parts(prompts, rollouts, everything, seed):
                for batch in part.batches:
                    hidden = self._hidden(part, part.state, batch)
                    batch.put(
                        log_probs,
                        token_log_probs(
                            hidden,
                            batch.targets,
                            self.policy.projection(),
                            temperature=batch.per_token(temperature),
                            max_logits=self.config.max_logits,
                        ),
                    )
                    if values is not None:
                        batch.put(values, self._values(hidden))
        return log_probs, values

    def _values(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n,), in the critic's own precision."""
        assert self.critic is not None
        with torch.autocast(hidden.device.type, enabled=False):
            result: Tensor = self.critic(hidden.to(next(self.critic.parameters()).dtype))
        return result[:, 0]

    def _backward(
        self,
        prompts: Prompts,
        rollouts: Rollouts,
        derivatives: tuple[Tensor, Tensor | None],
        temperature: Tensor | None,
        seed: int,
    ) -> None:
        coefficients, of_values = derivatives
        # dropout replays a micro-batch's random state, so both passes must then see the same micro-batches
        useful = (coefficients != 0).any(1).cpu() | bool(self.config.dropout)
        if of_values is not None:
            useful |= (of_values != 0).any(1).cpu()
        room = room_for_logits(self.policy.projection(), self.micro_batch_tokens, self.config.max_logits)
        for part in self._parts(prompts, rollouts, useful, seed):
            cut, leaves = _cut(part.state)
            for batch in part.batches:
                with accumulating():
                    hidden = self._hidden(part, cut, batch)
                with autocast(self.policy.device, self.policy.precision):
                    total = weighted_log_prob_sum(
                        hidden,
                        batch.targets,
                        batch.take(coefficients),
                        self.policy.projection(),
                        temperature=batch.per_token(temperature),
                        max_logits=self.config.max_logits,
                        accumulate=True,
                        room=room,
                    )
                if of_values is not None:
                    values = self._values(hidden)
                    total = total + (batch.take(of_values).to(values.dtype) * values).sum()
                total.backward()
            _go_back(part.state, leaves)

    def _hidden(self, part: _Part, state: PromptState, batch: _MicroBatch) -> Tensor:
        """(n, D)."""
        if self.config.dropout:
            torch.manual_seed(seed_of("micro-batch", part.seed, batch.number))
        return self.policy.token_states(state, batch.prompt_index, batch.inputs, batch.mask)

    def _parts(self, prompts: Prompts, rollouts: Rollouts, rows: Tensor, seed: int) -> Iterator[_Part]:
        """Encode the prompts part by part, each with the micro-batches of its rows."""
        selected = rows.nonzero()[:, 0]
        owner = rollouts.prompt_index[selected]
        used = torch.unique_consecutive(owner)
        size = max(1, self.max_prompt_tokens // max(1, prompts.mask.shape[1]))
        for number, start in enumerate(range(0, len(used), size)):
            members = used[start : start + size]
            if self.config.dropout:
                torch.manual_seed(seed_of("encoder", seed, number))
            chosen = prompts.select(members.tolist())
            state = self.policy.encode(chosen)
            mine = selected[(owner >= members[0]) & (owner <= members[-1])]
            batches = self._micro_batches(rollouts, mine, members, self.policy.start_tokens(chosen))
            yield _Part(state, batches, seed_of(seed, number))

    def _micro_batches(
        self, rollouts: Rollouts, rows: Tensor, members: Tensor, start_tokens: Tensor
    ) -> Iterator[_MicroBatch]:
        """As many rows as the limit takes, the longest first."""
        lengths = rollouts.lengths.cpu()[rows]
        for number, chosen in enumerate(self._groups(lengths)):
            owner = torch.searchsorted(members, rollouts.prompt_index[rows[chosen]])
            first = start_tokens.cpu()[owner]
            yield self._micro_batch(rollouts, rows[chosen], int(lengths[chosen].max()), (owner, first), number)

    def _groups(self, lengths: Tensor) -> list[Tensor]:
        """Indices of rows by micro-batch, the largest one first: what it needs is room enough for each that follows.

        Where only real tokens are computed, nearly all micro-batches have as many of them as the limit allows. Then
        they need memory in pieces of the same sizes, and those that one gives back serve the next.
        """
        limit, order = self.micro_batch_tokens, torch.argsort(lengths, descending=True, stable=True)
        if not self.policy.packs:
            groups, start = [], 0
            while start < len(order):
                groups.append(order[start : start + max(1, limit // max(1, int(lengths[order[start]])))])
                start += len(groups[-1])
            return sorted(groups, key=lambda group: -int(lengths[group[0]]) * len(group))
        alone = int((lengths >= limit).sum())
        rest = order[alone:]
        packed = [rest[members] for members in pack(lengths[rest].tolist(), limit)]
        return [*order[:alone, None], *sorted(packed, key=lambda group: -int(lengths[group].sum()))]

    def _micro_batch(
        self, rollouts: Rollouts, rows: Tensor, width: int, origin: tuple[Tensor, Tensor], number: int
    ) -> _MicroBatch:
        device, (owner, first) = self.policy.device, origin
        tokens = rollouts.tokens[rows, :width].to(device)
        mask = rollouts.mask[rows, :width].to(device)
        return _MicroBatch(
            number=number,
            rows=rows,
            prompt_index=owner.to(device),
            inputs=torch.cat([first[:, None].to(device, tokens.dtype), tokens[:, :-1]], 1),
            mask=mask,
            targets=tokens[mask],
        )

    def _retry(self, work: Callable[[], Result]) -> Result:
        """Run stage two; when memory runs out, halve the micro-batch and begin stage two again."""
        while True:
            try:
                return work()
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.micro_batch_tokens == 1:
                    raise OutOfMemoryError(
                        "out of memory with one sample per micro-batch; take a smaller model, shorter samples "
                        "(sampling.max_new_tokens) or fewer source tokens (gradient.max_prompt_tokens)."
                    ) from error
                self._halve()
            free_cached_memory()


def _cut(state: PromptState) -> tuple[PromptState, tuple[Tensor, ...]]:
    """The state without its graph, and the leaves under it, where gradients add up: in float32 at least.

    Their gradients are there from the beginning: allocated in a micro-batch they would split memory that the next one
    needs in one piece.
    """
    wide = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in state.tensors]
    leaves = tuple(leaf.requires_grad_(tensor.requires_grad) for leaf, tensor in zip(wide, state.tensors, strict=True))
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf) if leaf.requires_grad else None
    return state.with_tensors(
        tuple(leaf.to(part.dtype) for leaf, part in zip(leaves, state.tensors, strict=True))
    ), leaves


def _go_back(state: PromptState, leaves: tuple[Tensor, ...]) -> None:
    """Take the leaves' gradients through the encoder."""
    pairs = zip(state.tensors, leaves, strict=True)
    reached = [(tensor, leaf.grad.to(tensor.dtype)) for tensor, leaf in pairs if leaf.grad is not None]
    if reached:
        tensors, gradients = zip(*reached, strict=True)
        torch.autograd.backward(tensors, gradients)


@dataclass(frozen=True, slots=True)
class _MicroBatch:
    number: int
    rows: Tensor  # (r,) into the rollouts
    prompt_index: Tensor  # (r,) into the part's prompts
    inputs: Tensor  # (r, t)
    mask: Tensor  # (r, t)
    targets: Tensor  # (n,) real tokens

    def per_token(self, values: Tensor | None) -> Tensor | None:
        """(R,) -> (n,): a row's value for each of its tokens."""
        if values is None:
            return None
        return values[self.rows].to(self.mask.device)[:, None].expand(self.mask.shape)[self.mask]

    def take(self, values: Tensor) -> Tensor:
        """(R, T) -> (n,): the values of these rows' real tokens."""
        return values[self.rows, : self.mask.shape[1]].to(self.mask.device)[self.mask]

    def put(self, result: Tensor, values: Tensor) -> None:
        """Write (n,) values to the places of these rows' real tokens in (R, T)."""
        block = result.new_zeros(self.mask.shape)
        block[self.mask] = values.to(result.dtype)
        result[self.rows, : self.mask.shape[1]] = block


@dataclass(frozen=True, slots=True)
class _Part:
    state: PromptState
    batches: Iterator[_MicroBatch]
    seed: int
