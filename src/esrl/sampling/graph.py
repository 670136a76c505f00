"""The conventional way: sample with the graph kept (the paper's Figure 1), for comparison and for the ablation.

Hugging Face's model and its cache, every step's graph held until the backward pass. The draws are those of the
engine, so that both ways can be compared sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from esrl.algorithm.streams import sample_uniforms
from esrl.models.causal import CausalPolicy
from esrl.models.causal_plain import PlainCausalPolicy
from esrl.models.precision import in_precision
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.draw import invert_cumulative
from esrl.sampling.engine import EngineSampler, check_log_probs, decode_texts
from esrl.sampling.generate import left_padded
from esrl.types import Prompts, Rollouts, SamplingPlan


@in_precision
def sample_with_graph(
    policy: MarianPolicy | CausalPolicy,
    prompts: Prompts,
    plan: SamplingPlan,
    sampler: EngineSampler,
    epoch: int,
    at_sampling_temperature: bool = False,
) -> tuple[Rollouts, Tensor]:
    """Sample all rows at once; returns the rollouts and (R, T) log-probabilities with their graph.

    Each prompt runs once and its states are repeated for the samples (the "restructured batch" of Kiegeland and
    Kreutzer 2021, which the paper's baselines also use). Finished rows stay in the batch.
    """
    device, counts = policy.device, plan.num_samples
    if not bool(counts.any()):  # Hugging Face's decoder takes no batch of 0 rows
        rollouts = sampler.sample(prompts, plan, epoch)
        return rollouts, rollouts.log_probs
    owner = torch.repeat_interleave(torch.arange(len(prompts)), counts)
    sample = torch.cat([torch.arange(count) for count in counts.tolist()])
    limits = sampler.limits(prompts, owner).to(device)
    steps = int(limits.max())
    ids = [prompts.example_ids[i] for i in owner.tolist()]
    uniforms = sample_uniforms(sampler.seed, epoch, ids, sample.tolist(), steps).to(device)
    temperature = plan.temperature[owner].to(device)
    projection, truncation = policy.projection(), sampler.config.truncation
    if isinstance(policy, PlainCausalPolicy):
        step = _plain_steps(policy, prompts, owner.to(device))
    elif isinstance(policy, CausalPolicy):
        step = _causal_steps(policy, prompts, owner.to(device))
    else:
        step = _marian_steps(policy, prompts, owner.to(device))
    drawn = policy.start_tokens(prompts)[owner].to(device)
    eos = torch.tensor(policy.eos_tokens, device=device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=device)
    finished = torch.zeros_like(alive)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for position in range(steps):
        logits = projection.logits(step(drawn))
        scaled = logits / temperature[:, None].to(logits.dtype)
        weights = torch.exp(scaled.detach() - scaled.detach().amax(1, keepdim=True))
        if truncation is not None:
            weights = truncation.cut(weights)
            scaled = scaled.masked_fill(weights == 0, -torch.inf)
        drawn, _ = invert_cumulative(weights, uniforms[:, position])
        tokens = drawn[:, None]
        plain = torch.log_softmax(logits, 1).gather(1, tokens)[:, 0]
        heated = torch.log_softmax(scaled, 1).gather(1, tokens)[:, 0]
        columns.append((drawn, alive, plain, heated))
        ended = torch.isin(drawn, eos)
        finished |= alive & ended
        alive = alive & ~ended & (limits > position + 1)
        if not bool(alive.any()):
            break
    token_grid, real, at_one, at_tau = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    token_grid = token_grid * real
    at_one, at_tau = torch.where(real, at_one, 0.0), torch.where(real, at_tau, 0.0)
    check_log_probs(at_one.detach(), owner, prompts)
    rollouts = Rollouts(
        prompt_index=owner,
        sample_index=sample,
        tokens=token_grid,
        mask=real,
        finished=finished,
        log_probs=at_one.detach(),
        sampling_log_probs=at_tau.detach(),
        texts=decode_texts(policy, token_grid.cpu(), real.cpu()),
    )
    return rollouts, at_tau if at_sampling_temperature else at_one


def _marian_steps(policy: MarianPolicy, prompts: Prompts, owner: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from (R,) last tokens to (R, D) states for the next ones."""
    model, mask = policy.model, prompts.mask.to(policy.device)
    states = model.get_encoder()(input_ids=prompts.input_ids.to(policy.device), attention_mask=mask).last_hidden_state
    states, mask = states[owner], mask[owner]
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))

    def step(tokens: Tensor) -> Tensor:
        output = model.model.decoder(
            input_ids=tokens[:, None],
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    return step


def _causal_steps(policy: CausalPolicy, prompts: Prompts, owner: Tensor) -> Callable[[Tensor], Tensor]:
    """The same for a decoder-only model: prompts padded on the left, then a token of all rows at a time."""
    tokens, mask = (part.to(policy.device) for part in left_padded(prompts, policy.pad_token))
    cache = DynamicCache(config=policy.plain.config)
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    states = policy.body(
        input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]
    states, position = states[owner], positions[owner, -1:]
    cache.reorder_cache(owner)
    past = mask[owner]

    def step(tokens: Tensor) -> Tensor:
        nonlocal states, past, position
        if states is not None:  # the prompt has given the first one
            first, states = states, None
            return first
        past = torch.cat([past, past.new_ones(len(past), 1)], 1)
        position = (position + 1).clamp_max(policy.max_length - 1)  # rows that have ended go on
        output = policy.body(
            input_ids=tokens[:, None],
            attention_mask=past,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    return step


def _plain_steps(policy: PlainCausalPolicy, prompts: Prompts, owner: Tensor) -> Callable[[Tensor], Tensor]:
    """The same for a model that runs whole sequences: each step keeps the graph of all that it has run anew."""
    state = policy.encode(prompts)
    said: list[Tensor] = []

    def step(tokens: Tensor) -> Tensor:
        said.append(tokens)
        return policy.hidden_states(state, owner, torch.stack(said, 1))[:, -1]

    return step
