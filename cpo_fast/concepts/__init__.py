"""Concepts of chest radiology: the graph of diseases and attributes, and a finding labeller."""

from cpo_fast.concepts.graph import load_graph
from cpo_fast.concepts.labeller import label_report

__all__ = ["label_report", "load_graph"]
