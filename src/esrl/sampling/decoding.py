"""The loop of stage one: a token for every row, rows that end leave, others take their places.

As many rows are decoded at a time as the cache may hold. Where there are more, a new wave of them begins as soon as
enough of the places are free, beside those that are not done: long samples do not hold up the others, and products
stay large. On a CPU the loop itself may be compiled; ``Decoding`` is its slow twin.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from esrl.models.compiled_decoder import CompiledMarianDecoder, Wanted
from esrl.models.policy import BatchSizes, Decoder, FrozenDecoder, PromptState, behind_each_other
from esrl.sampling.draw import Drawn, Temperature, draw_tokens

_WAITING = 32
"""Steps after which what was drawn is put in place."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What is to be sampled."""

    local: Tensor  # (R,) prompt within the encoded part
    prompt: Tensor  # (R,) prompt within the batch
    sample: Tensor  # (R,)


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of an encoded part, and all that their samples depend on."""

    state: PromptState
    rows: Rows
    starts: Tensor  # (R,) first decoder inputs
    limits: Tensor  # (R,) longest samples
    uniforms: Tensor  # (steps, R), or (1, R) where nothing is drawn
    temperature: Temperature  # of all rows


@dataclass(frozen=True, slots=True)
class Pace:
    """How the work is done; none of it changes what is drawn. The compiled loop looks at the first two alone."""

    places: int  # rows decoded at a time
    logits: int  # logits that exist at a time
    check_steps: int  # steps between two looks at how many rows have ended: each look waits for the device
    compaction_share: float  # rows that end leave once they are about this share of the batch
    free_share: float  # and others begin once so many of the places are free
    batch_sizes: BatchSizes  # that the decoder takes without preparation


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of the batch; (A,) each."""

    drawn: Drawn
    alive: Tensor  # the rows in the batch
    positions: Tensor  # where their tokens go
    done: Tensor  # rows that had ended before: theirs do not count
    ended: Tensor  # rows that it ends


class Output:
    """What R rows have drawn.

    Steps are put in place many at a time: each operation on a few tokens costs as much as one on many.
    """

    def __init__(self, rows: Rows, steps: int, records: tuple[str, ...], dtype: torch.dtype, device: torch.device):
        num_rows = len(rows.prompt)
        self.rows = rows
        wide = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
        names = ("log_probs", "sampling_log_probs", *records)
        self.tensors = {name: torch.zeros(num_rows, steps, dtype=wide, device=device) for name in names}
        self.tensors["tokens"] = torch.zeros(num_rows, steps, dtype=torch.int64, device=device)
        self.tensors["mask"] = torch.zeros(num_rows, steps, dtype=torch.bool, device=device)
        self.tensors["ended"] = torch.zeros(num_rows, steps, dtype=torch.bool, device=device)
        self._waiting: list[_Step] = []

    @property
    def finished(self) -> Tensor:
        """(R,) rows that have ended by themselves."""
        return self.tensors["ended"].any(1)

    def append(self, step: _Step) -> None:
        self._waiting.append(step)
        if len(self._waiting) == _WAITING:
            self.flush()

    def flush(self) -> None:
        """Put the steps in place that are not there yet."""
        if not self._waiting:
            return
        place = torch.cat([step.alive for step in self._waiting]), torch.cat([step.positions for step in self._waiting])
        real = ~torch.cat([step.done for step in self._waiting])
        drawn = [step.drawn for step in self._waiting]
        columns = {
            "tokens": [values.tokens for values in drawn],
            "log_probs": [values.log_probs for values in drawn],
            "sampling_log_probs": [values.sampling_log_probs for values in drawn],
        }
        columns |= {name: [values.records[name] for values in drawn] for name in drawn[0].records}
        for name, values in columns.items():
            self.tensors[name][place] = torch.where(real, torch.cat(values), 0)
        self.tensors["mask"][place] = real
        self.tensors["ended"][place] = torch.cat([step.ended for step in self._waiting]) & real
        self._waiting = []


@dataclass(slots=True)
class _Wave:
    """Rows that have begun together."""

    size: int
    position: int  # steps taken


def decode(
    frozen: FrozenDecoder, work: Work, pace: Pace, eos_tokens: tuple[int, ...], records: tuple[str, ...]
) -> Output:
    """Draw all rows of an encoded part, in the compiled loop where there is one (``kernels/decode.h``).

    Args:
        frozen: the decoder's weights.
        eos_tokens: what ends a sample.
        records: what to record per token besides the log-probabilities.
    """
    temperature = work.temperature
    if (
        not isinstance(frozen, CompiledMarianDecoder)
        or frozen.projection.compiled is None
        or temperature.truncation is not None
    ):
        return Decoding(frozen, work, pace, eos_tokens, records).run()
    output = Output(work.rows, int(work.limits.max()), records, torch.float32, work.state.mask.device)
    wanted = Wanted(
        prompt_index=work.rows.local,
        starts=work.starts,
        limits=work.limits,
        temperatures=temperature.values.double(),
        uniforms=None if temperature.greedy else work.uniforms.double(),
        eos_tokens=eos_tokens,
    )
    frozen.sample(work.state, wanted, pace.places, pace.logits, output.tensors)
    return output


class Decoding:
    """The rows in the batch, wave after wave, from the first to the last.

    Args:
        frozen: the decoder's weights.
        eos_tokens: what ends a sample.
        records: what to record per token besides the log-probabilities.
    """

    def __init__(
        self, frozen: FrozenDecoder, work: Work, pace: Pace, eos_tokens: tuple[int, ...], records: tuple[str, ...]
    ) -> None:
        self.frozen, self.work, self.pace, self.records = frozen, work, pace, records
        state = work.state
        self.device = state.mask.device
        self.eos = torch.tensor(eos_tokens, device=self.device)
        self.steps = int(work.limits.max())
        self.shortest_limit = int(work.limits.min())
        self.all_limits = work.limits.to(self.device)
        self.output = Output(work.rows, self.steps, records, state.keys[0].dtype, self.device)
        self.decoder: Decoder | None = None
        self.waves: list[_Wave] = []
        self.begun = 0  # rows that have begun
        self.alive = torch.empty(0, dtype=torch.int64, device=self.device)  # (A,) the rows in the batch
        self.positions = self.alive  # (A,) tokens that each of them has
        self.limits = self.alive  # (A,) and may have
        self.tokens = self.alive  # (A,) its last one
        self.done = torch.empty(0, dtype=torch.bool, device=self.device)  # (A,)
        self.temperature = work.temperature

    def run(self) -> Output:
        """Decode all rows."""
        step = 0
        while self._begin() or self.waves:
            self._step()
            step += 1
            if step % self.pace.check_steps == 0 or self.waves[0].position == self.steps:
                self._leave()
        self.output.flush()
        return self.output

    def _begin(self) -> bool:
        """Let a wave begin where there is room for it."""
        total, free = self.work.rows.prompt.shape[0], self.pace.places - self.alive.shape[0]
        size = min(free, total - self.begun)
        if size < 1 or size < min(int(self.pace.free_share * self.pace.places), total - self.begun):
            return False
        new = torch.arange(self.begun, self.begun + size)
        self.begun += size
        prompt_index = self.work.rows.local[new].to(self.device)
        if self.decoder is None:
            self.decoder = self.frozen.start(self.work.state, prompt_index)
        else:
            self.decoder.join(self.work.state, prompt_index)
        self.waves.append(_Wave(size, 0))
        new = new.to(self.device)
        self.alive = torch.cat([self.alive, new])
        self.positions = torch.cat([self.positions, torch.zeros_like(new)])
        self.tokens = torch.cat([self.tokens, self.work.starts[new]])
        self.done = torch.cat([self.done, torch.zeros_like(new, dtype=torch.bool)])
        self.limits, self.temperature = self.all_limits[self.alive], self.work.temperature.rows(self.alive)
        return True

    def _step(self) -> None:
        """A token for every row in the batch."""
        assert self.decoder is not None
        uniforms, greedy = self.work.uniforms, self.temperature.greedy
        numbers = uniforms[0, self.alive] if greedy else uniforms[self.positions, self.alive]
        hidden = self.decoder.step(self.tokens)
        drawn = draw_tokens(hidden, self.frozen.projection, self.temperature, numbers, self.records, self.pace.logits)
        self.tokens = drawn.tokens
        ended = self.tokens == self.eos if len(self.eos) == 1 else torch.isin(self.tokens, self.eos)
        self.output.append(_Step(drawn, self.alive, self.positions, self.done, ended))
        self.positions = self.positions + 1
        self.done = self.done | ended
        for wave in self.waves:
            wave.position += 1
        if self.waves[0].position >= self.shortest_limit:  # the oldest
            self.done = self.done | (self.positions == self.limits)

    def _leave(self) -> None:
        """Take rows that have ended out of the batch, if they are many, or their wave is at the end of its steps."""
        assert self.decoder is not None
        over = [wave.position == self.steps for wave in self.waves]
        done = self.done.tolist()  # lists: a hundred rows are not worth a dozen operations on tensors for each wave
        size = batch_size(done.count(False), self.pace.batch_sizes)
        few = size > (1 - self.pace.compaction_share) * len(done) or size >= len(done)
        if few and not over[0]:
            return
        sizes = [wave.size for wave in self.waves]
        kept = survivors(done, sizes, over, size)
        self.decoder.keep(*kept)
        left = torch.tensor(behind_each_other(kept, sizes), dtype=torch.int64, device=self.device)
        self.alive, self.positions, self.tokens = self.alive[left], self.positions[left], self.tokens[left]
        self.limits, self.done, self.temperature = self.limits[left], self.done[left], self.temperature.rows(left)
        for wave, rows in zip(self.waves, kept, strict=True):
            wave.size = len(rows)
        self.waves = [wave for wave in self.waves if wave.size]


def batch_size(rows: int, sizes: BatchSizes) -> int:
    """A size for so many rows; few different ones where oneDNN makes a new kernel for each (docs/performance.md)."""
    if sizes == "any":
        return rows
    step = 8 if rows <= 64 else 32
    return -(-rows // step) * step


def survivors(done: list[bool], sizes: list[int], over: list[bool], size: int) -> list[list[int]]:
    """Rows of each wave with all that have not ended; some that have fill them up to ``size`` altogether, if there are.

    Args:
        done: (A,) which rows have ended; sizes: of the waves, which follow each other.
        over: waves at the end of their steps: none of their rows may stay.
    """
    ends = list(itertools.accumulate(sizes))
    parts = [done[end - length : end] for end, length in zip(ends, sizes, strict=True)]
    counts = [part.count(False) for part in parts]
    spare = size - sum(counts)
    kept = []
    for part, count, end in zip(reversed(parts), reversed(counts), reversed(over), strict=True):
        more = 0 if end or not count else min(spare, len(part) - count)
        spare -= more
        kept.append(_survivors(part, count + more))
    return kept[::-1]


def _survivors(done: list[bool], size: int) -> list[int]:
    """``size`` rows with all that have not ended; the last ones take the places of those that have, the others stay."""
    order = list(range(size))
    movers = [row for row in range(size, len(done)) if not done[row]]
    holes = [row for row in order if done[row]]
    for hole, mover in zip(holes, movers, strict=False):
        order[hole] = mover
    return order
