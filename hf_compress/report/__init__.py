from hf_compress.report.card import model_card
from hf_compress.report.compare import compare
from hf_compress.report.result import Difference, Entry, Interval, Report

__all__ = ["Difference", "Entry", "Interval", "Report", "compare", "model_card"]
