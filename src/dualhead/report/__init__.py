"""Reports of runs, made from the files that these left and from nothing else."""

from dualhead.report.comparison import cost_unit
from dualhead.report.differences import other_images
from dualhead.report.gallery import NO_CLASS, change, picture, save_sheet
from dualhead.report.generation import ROWS as SAMPLE_ROWS
from dualhead.report.generation import judge_name
from dualhead.report.lights import believable, light_lines, lights
from dualhead.report.model_card import ONNX_SECTION, model_card
from dualhead.report.page import write_report
from dualhead.report.routers import router_lines, router_rows
from dualhead.report.routes import WARNING as ROUTES_WARNING
from dualhead.report.routes import route_rows
from dualhead.report.rows import evaluation_row, rows_html, rows_text
from dualhead.report.sequence import OLD as OLD_ATTACKS
from dualhead.report.sequence import sequence_cells, sequence_text
from dualhead.report.sources import MEANS, measured_in, measured_title
from dualhead.report.summary import summary
from dualhead.report.table import accuracy_columns, balanced_columns, share_cell
from dualhead.report.text import duration, eps_texts, points, threat_text

__all__ = [
    "MEANS",
    "NO_CLASS",
    "OLD_ATTACKS",
    "ONNX_SECTION",
    "ROUTES_WARNING",
    "SAMPLE_ROWS",
    "accuracy_columns",
    "balanced_columns",
    "believable",
    "change",
    "cost_unit",
    "duration",
    "eps_texts",
    "evaluation_row",
    "judge_name",
    "light_lines",
    "lights",
    "measured_in",
    "measured_title",
    "model_card",
    "other_images",
    "picture",
    "points",
    "route_rows",
    "router_lines",
    "router_rows",
    "rows_html",
    "rows_text",
    "save_sheet",
    "sequence_cells",
    "sequence_text",
    "share_cell",
    "summary",
    "threat_text",
    "write_report",
]
