"""A joint byte-pair encoding trained on the data (Sennrich et al. 2016), by Hugging Face's ``tokenizers``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> Any:
    """NFKC, metaspace, punctuation apart, BPE of ``vocab_size`` pieces; PAD is 0, EOS 1, UNK 2.

    Raises:
        ValueError: the text does not hold that many pieces.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[PAD, EOS, UNK], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but the training text has only {tokenizer.get_vocab_size()} pieces; "
            f"set vocab_size = {tokenizer.get_vocab_size() // 100 * 100 or tokenizer.get_vocab_size()} or less."
        )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, model_max_length=max_length
    )
