"""The concept graph of diseases and imaging attributes, and a finding labeller for reports."""

from cpo_fast.concepts.graph import load_graph
from cpo_fast.concepts.labeller import label_report

__all__ = ["label_report", "load_graph"]
