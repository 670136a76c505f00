"""The development set that decides which model is the best one."""

from __future__ import annotations

from collections.abc import Sequence

from esrl.data.encoding import Encoder
from esrl.data.examples import Example
from esrl.evaluation.decode import DecodingConfig, corpus_scores, decode
from esrl.evaluation.scores import check_references, metrics_by_name
from esrl.models.causal import CausalPolicy
from esrl.models.seq2seq import MarianPolicy


class Development:
    """Decodes a development set and scores it; without examples or metrics it scores nothing.

    Args:
        encoder: makes token ids of a causal model's prompts; None for an encoder-decoder.

    Raises:
        ValueError: an example has no reference.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        metrics: Sequence[str],
        decoding: DecodingConfig,
        encoder: Encoder | None = None,
    ) -> None:
        for number, example in enumerate(examples, 1):
            if "reference" not in example.columns:
                raise ValueError(f"development example {number} has no reference; its scores need one.")
        self.examples = examples
        self.metrics = metrics_by_name(metrics)
        self.decoding = decoding
        self.encoder = encoder
        check_references(self.metrics, (example.columns["reference"] for example in examples))

    def evaluate(self, policy: MarianPolicy | CausalPolicy) -> dict[str, float]:
        """``dev_<metric>`` of each metric, 0 to 100."""
        if not self.examples or not self.metrics:
            return {}
        texts = decode(policy, self.examples, self.decoding, self.encoder)
        references = [example.columns["reference"] for example in self.examples]
        return {f"dev_{name}": score for name, score in corpus_scores(self.metrics, texts, references).items()}
