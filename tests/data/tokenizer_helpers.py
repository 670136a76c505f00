"""Small tokenizers of the kinds there are: byte-level with and without BOS and PAD, with a chat template, BERT-like."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "What is the capital of France? The capital of France is Paris. Add 23 and 48: 71. Say hello. Hello there!",
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def byte_level(*, bos: bool = False, pad: bool = True, chat: str | None = None, append_eos: bool = False) -> Any:
    """A byte-level BPE of 300 pieces, as GPT-2's; with ``bos`` it puts BOS before every text, as Llama's does."""
    special = ["<eos>", *(["<bos>"] if bos else []), *(["<pad>"] if pad else []), "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos or append_eos:
        single = f"{'<bos> ' if bos else ''}$A{' <eos>' if append_eos else ''}"
        known = [(name, tokenizer.token_to_id(name)) for name in ("<bos>", "<eos>") if name in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=known)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        pad_token="<pad>" if pad else None,
    )
    result.chat_template = chat
    return result


def bert_like() -> Any:
    """Words, CLS and SEP, pairs with token types."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
