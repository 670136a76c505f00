"""`esrl judge`: answers judged by a language model, one by one or in pairs."""

from __future__ import annotations

from esrl.judge.client import JudgeError
from esrl.judge.run import run_judge
from esrl.judge.settings import JudgeConfig, RequestConfig
from esrl.judge.show import show_judgment

__all__ = ["JudgeConfig", "JudgeError", "RequestConfig", "run_judge", "show_judgment"]
