"""What a run leaves for people to read: the page, the model card, and the table at the end of `compress`."""

from nestling.report.card import write_model_card
from nestling.report.page import write_report
from nestling.report.table import comparison

__all__ = ["comparison", "write_model_card", "write_report"]
