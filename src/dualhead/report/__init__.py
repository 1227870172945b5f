"""What people read of a run, made from the files it left and from nothing else."""

from dualhead.report.gallery import change, picture
from dualhead.report.model_card import ONNX_SECTION, model_card
from dualhead.report.page import write_report
from dualhead.report.summary import summary

__all__ = ["ONNX_SECTION", "change", "model_card", "picture", "summary", "write_report"]
