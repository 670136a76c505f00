"""Efficient sampling-based reinforcement learning for sequence generation (ESRL, AAAI 2024).

The commands are functions of a configuration, and the parts can be used on their own::

    import esrl
    config = esrl.rl_config("esrl", model="runs/mle/model", output_dir="runs/esrl", data={"path": "train.tsv"})
    result = esrl.rl(config)

    plan = esrl.allocate(torch.tensor([0.1, 0.4]), esrl.AllocationConfig(max_samples=10))
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module, or module:its name there; imported at first use, so that `import esrl` costs nothing
_PUBLIC = {
    "AllocationConfig": "esrl.algorithm.allocation",
    "allocate": "esrl.algorithm.allocation",
    "BaselineConfig": "esrl.algorithm.baselines",
    "RewardQueue": "esrl.algorithm.baselines",
    "CapabilityConfig": "esrl.algorithm.capability",
    "CapabilityMemory": "esrl.algorithm.capability",
    "Groups": "esrl.algorithm.groups",
    "CriticConfig": "esrl.algorithm.objective_config",
    "ObjectiveConfig": "esrl.algorithm.objectives",
    "RewardedSamples": "esrl.algorithm.objectives",
    "coefficients": "esrl.algorithm.objectives",
    "objective_loss": "esrl.algorithm.objectives",
    "Encoder": "esrl.data.encoding",
    "PromptConfig": "esrl.data.encoding",
    "DataConfig": "esrl.data.readers",
    "load_examples": "esrl.data.readers",
    "DecodingConfig": "esrl.evaluation.decode",
    "JudgeConfig": "esrl.judge",
    "RequestConfig": "esrl.judge",
    "LoraSettings": "esrl.models.adapters",
    "CausalPolicy": "esrl.models.causal",
    "load_policy": "esrl.models.load",
    "RewardConfig": "esrl.rewards.calling",
    "build_reward": "esrl.rewards.calling",
    "BLEU": "esrl.rewards.text",
    "ChrF": "esrl.rewards.text",
    "ExactMatch": "esrl.rewards.text",
    "RougeL": "esrl.rewards.text",
    "EngineSampler": "esrl.sampling.engine",
    "SamplingConfig": "esrl.sampling.engine",
    "StageTwo": "esrl.training.gradient",
    "GradientConfig": "esrl.training.gradient",
    "LoopConfig": "esrl.training.loop",
    "LikelihoodConfig": "esrl.training.mle",
    "OptimizerConfig": "esrl.training.optimization",
    "StepConfig": "esrl.training.method",
    "PairwiseConfig": "esrl.training.reward_model",
    "SFTConfig": "esrl.training.sft",
    "Prompts": "esrl.types",
    "Rollouts": "esrl.types",
    "SamplingPlan": "esrl.types",
    "DevelopmentConfig": "esrl.config",
    "MLEConfig": "esrl.config",
    "ModelConfig": "esrl.config",
    "RLConfig": "esrl.config",
    "RewardModelConfig": "esrl.config",
    "rl_config": "esrl.config",
    "RunResult": "esrl.commands",
    "judge_answers": "esrl.commands:judge",
    "mle": "esrl.commands",
    "reward_model": "esrl.commands",
    "rl": "esrl.commands",
    "EvaluateConfig": "esrl.apply",
    "GenerateConfig": "esrl.apply",
    "MergeConfig": "esrl.apply",
    "evaluate": "esrl.apply",
    "generate": "esrl.apply",
    "merge": "esrl.apply",
    "write_report": "esrl.report",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'esrl' has no attribute {name!r}")
    module, _, own_name = _PUBLIC[name].partition(":")
    return getattr(import_module(module), own_name or name)


if TYPE_CHECKING:  # what type checkers and editors see
    from esrl.algorithm.allocation import AllocationConfig, allocate
    from esrl.algorithm.baselines import BaselineConfig, RewardQueue
    from esrl.algorithm.capability import CapabilityConfig, CapabilityMemory
    from esrl.algorithm.groups import Groups
    from esrl.algorithm.objective_config import CriticConfig
    from esrl.algorithm.objectives import ObjectiveConfig, RewardedSamples, coefficients, objective_loss
    from esrl.apply import EvaluateConfig, GenerateConfig, MergeConfig, evaluate, generate, merge
    from esrl.commands import RunResult, mle, reward_model, rl
    from esrl.commands import judge as judge_answers
    from esrl.config import DevelopmentConfig, MLEConfig, ModelConfig, RewardModelConfig, RLConfig, rl_config
    from esrl.data.encoding import Encoder, PromptConfig
    from esrl.data.readers import DataConfig, load_examples
    from esrl.evaluation.decode import DecodingConfig
    from esrl.judge import JudgeConfig, RequestConfig
    from esrl.models.adapters import LoraSettings
    from esrl.models.causal import CausalPolicy
    from esrl.models.load import load_policy
    from esrl.report import write_report
    from esrl.rewards.calling import RewardConfig, build_reward
    from esrl.rewards.text import BLEU, ChrF, ExactMatch, RougeL
    from esrl.sampling.engine import EngineSampler, SamplingConfig
    from esrl.training.gradient import GradientConfig, StageTwo
    from esrl.training.loop_config import LoopConfig
    from esrl.training.method import StepConfig
    from esrl.training.mle import LikelihoodConfig
    from esrl.training.optimization import OptimizerConfig
    from esrl.training.reward_model import PairwiseConfig
    from esrl.training.sft import SFTConfig
    from esrl.types import Prompts, Rollouts, SamplingPlan
