"""Importance: the record (`Ranking`), the metrics, and the passes that measure them."""

import nestling.ranking.baselines  # noqa: F401  registers its metrics
from nestling.ranking.metrics import METRICS, Reading, metric
from nestling.ranking.nested import nested
from nestling.ranking.rank import LAYER_METRICS, rank
from nestling.ranking.ranking import Ranking

__all__ = ["LAYER_METRICS", "METRICS", "Ranking", "Reading", "metric", "nested", "rank"]
