"""The mark of a factor that belongs to a training objective and to no density."""

__all__ = ["TRAINING_ONLY"]

TRAINING_ONLY = "training_only"
"""Key in the ``infer`` of a factor site. Its value says what the factor is a function of: ``"draw"``, the
value of a latent, or ``"expectation"``, the posterior alone, so that it is the same for every particle."""
