"""Models, scoring, and the trainer that SFT and RL share."""

from thor.training.model import (
    add_value_head,
    load_model,
    model_source,
    policy_parameters,
    sampling_copy,
    save_model,
    shard,
)
from thor.training.scoring import Scores, score_text
from thor.training.trainer import Batch, Counts, Sample, Trainer, TrainSettings, collate

__all__ = [
    "Batch",
    "Counts",
    "Sample",
    "Scores",
    "TrainSettings",
    "Trainer",
    "add_value_head",
    "collate",
    "load_model",
    "model_source",
    "policy_parameters",
    "sampling_copy",
    "save_model",
    "score_text",
    "shard",
]
