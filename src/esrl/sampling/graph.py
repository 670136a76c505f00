"""The conventional way: sample with the graph kept (the paper's Figure 1), for comparison and for the ablation.

Hugging Face's decoder and its cache, every step's graph held until the backward pass. The draws are those of the
engine, so that both ways can be compared sample by sample.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

from esrl.algorithm.streams import sample_uniforms
from esrl.models.seq2seq import MarianPolicy
from esrl.sampling.draw import invert_cumulative
from esrl.sampling.engine import EngineSampler, check_log_probs, decode_texts
from esrl.types import Prompts, Rollouts, SamplingPlan


def sample_with_graph(
    policy: MarianPolicy,
    prompts: Prompts,
    plan: SamplingPlan,
    sampler: EngineSampler,
    epoch: int,
    at_sampling_temperature: bool = False,
) -> tuple[Rollouts, Tensor]:
    """Sample all rows at once; returns the rollouts and (R, T) log-probabilities with their graph.

    The encoder runs once per prompt and its states are repeated for the samples (the "restructured batch" of
    Kiegeland and Kreutzer 2021, which the paper's baselines also use). Finished rows stay in the batch.
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
    model, projection = policy.model, policy.projection()
    mask = prompts.mask.to(device)
    states = model.get_encoder()(input_ids=prompts.input_ids.to(device), attention_mask=mask).last_hidden_state
    states, mask = states[owner.to(device)], mask[owner.to(device)]
    cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    tokens = torch.full((len(ids), 1), policy.start_token, device=device)
    eos = torch.tensor(policy.eos_tokens, device=device)
    alive = torch.ones(len(ids), dtype=torch.bool, device=device)
    finished = torch.zeros_like(alive)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for position in range(steps):
        output = model.model.decoder(
            input_ids=tokens,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        )
        logits = projection.logits(output.last_hidden_state[:, -1])
        scaled = logits / temperature[:, None].to(logits.dtype)
        weights = torch.exp(scaled.detach() - scaled.detach().amax(1, keepdim=True))
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
