"""How good and how fast a model is: perplexity, minimal pairs, lm-eval tasks, tokens per second.

Everything takes a plain transformers model and returns a small frozen dataclass; nothing here changes a model.
"""

from nestling.evaluate.harness import harness
from nestling.evaluate.pairs import Accuracy, MinimalPairs, minimal_pairs
from nestling.evaluate.perplexity import Perplexity, perplexity
from nestling.evaluate.speed import Speed, speed

__all__ = ["Accuracy", "MinimalPairs", "Perplexity", "Speed", "harness", "minimal_pairs", "perplexity", "speed"]
