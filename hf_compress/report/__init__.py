from hf_compress.report.card import model_card
from hf_compress.report.compare import compare
from hf_compress.report.report import Report
from hf_compress.report.result import Difference, Entry, Interval

__all__ = ["Difference", "Entry", "Interval", "Report", "compare", "model_card"]
