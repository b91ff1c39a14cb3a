"""Everything the quick start needs: a small model, synthetic problems, and few-shot demonstrations."""

from thor.demo.few_shot import few_shot_actor, few_shot_critic, few_shot_plain, nearest_demonstrations
from thor.demo.model import DEMO_MODEL, ModelError, demo_model
from thor.demo.problems import synthetic_problems

__all__ = [
    "DEMO_MODEL",
    "ModelError",
    "demo_model",
    "few_shot_actor",
    "few_shot_critic",
    "few_shot_plain",
    "nearest_demonstrations",
    "synthetic_problems",
]
