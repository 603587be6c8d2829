"""Importance: the record (`Ranking`), the metrics, and the sweep that measures them."""

from nestling.ranking.ranking import Ranking

__all__ = ["Ranking"]
