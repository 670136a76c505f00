"""QLoRA's base (Dettmers et al. 2023): a causal model whose linear layers are kept in 4 bits, for adapters on top."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from esrl.models.adapters import ADAPTER_CONFIG
from esrl.models.causal import CausalPolicy
from esrl.models.folders import read_config, read_weights
from esrl.models.load import causal_policy, is_causal

_KIND = "a causal language model"


def require_quantization() -> None:
    """Refuse where there is nothing to quantize with.

    Raises:
        ValueError: bitsandbytes, PEFT or a CUDA device is missing.
    """
    missing = [f"{name} (pip install {name})" for name in ("bitsandbytes", "peft") if find_spec(name) is None]
    missing += [] if torch.cuda.is_available() else ["a CUDA device"]
    if missing:
        raise ValueError(f"lora.load_in_4bit needs {' and '.join(missing)}, missing here; set load_in_4bit = false.")


def load_quantized(path: str) -> CausalPolicy:
    """A causal folder (or hub name) on the current CUDA device: NF4 with double quantization, products in bfloat16.

    All of it is frozen; what is not quantized (embeddings, norms, vocabulary projection) is in float32, as PEFT has it.

    Raises:
        ValueError: see ``require_quantization``; or the folder is no plain causal model.
    """
    require_quantization()
    from peft import prepare_model_for_kbit_training

    if (Path(path) / ADAPTER_CONFIG).is_file() or not is_causal(read_config(path, _KIND)):
        raise ValueError(f"{path}: lora.load_in_4bit takes {_KIND}, whole and no encoder-decoder; leave it out.")
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    place = {"": torch.cuda.current_device()}
    model = read_weights(
        path, AutoModelForCausalLM, torch.bfloat16, _KIND, quantization_config=settings, device_map=place
    )
    return causal_policy(path, prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))
