"""Models, scoring, and the trainer that SFT and RL share."""

from thor.training.model import load_model, model_source

__all__ = ["load_model", "model_source"]
