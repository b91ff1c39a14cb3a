"""Models, scoring, and the trainer that SFT and RL share."""

from thor.training.model import load_model, model_source
from thor.training.scoring import score_text

__all__ = ["load_model", "model_source", "score_text"]
