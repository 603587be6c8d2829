"""Elastic families: one training run, many nested members (Nemotron Elastic, arXiv 2511.16664)."""

from nestling.elastic.family import Entry, Family
from nestling.elastic.learner import ElasticLearner, Plan
from nestling.elastic.settings import WHOLE, ElasticSettings
from nestling.elastic.train import check, train

__all__ = ["WHOLE", "ElasticLearner", "ElasticSettings", "Entry", "Family", "Plan", "check", "train"]
