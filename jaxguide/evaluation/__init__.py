"""Evaluation of samples: figures with their intervals and protocols, sweeps over the guidance scale, and reports.

Inputs and outputs are NumPy arrays; images are uint8 of shape (n, height, width, channels), labels are whole numbers.
scikit-learn, matplotlib and Jinja are imported only by the functions that need them, so that the import is fast.
"""

from jaxguide.evaluation.classifier_report import ClassifierReport, classifier_report
from jaxguide.evaluation.classifiers import Gradients, gradients
from jaxguide.evaluation.evaluations import (
  chosen_features,
  evaluate,
  evaluate_files,
)
from jaxguide.evaluation.evidence import Evidence, Options
from jaxguide.evaluation.features import Features, extract, pixel_features
from jaxguide.evaluation.grid import Cell, cells
from jaxguide.evaluation.judge import Judge, fit_judge
from jaxguide.evaluation.measures import MEASURES, Measure, measure
from jaxguide.evaluation.metrics import diversity, frechet_distance
from jaxguide.evaluation.protocols import differences, protocol_text, protocols_text
from jaxguide.evaluation.reference import Reference, open_reference, statistics_of
from jaxguide.evaluation.results import Evaluation, Figure, Point, Sweep
from jaxguide.evaluation.statistics import Statistics, read_statistics, write_statistics
from jaxguide.evaluation.sweep_report import write_sweep_report
from jaxguide.evaluation.sweeps import sweep
from jaxguide.evaluation.tables import as_plain, csv_text, table

__all__ = [
  "MEASURES",
  "Cell",
  "ClassifierReport",
  "Evaluation",
  "Evidence",
  "Features",
  "Figure",
  "Gradients",
  "Judge",
  "Measure",
  "Options",
  "Point",
  "Reference",
  "Statistics",
  "Sweep",
  "as_plain",
  "cells",
  "chosen_features",
  "classifier_report",
  "csv_text",
  "differences",
  "diversity",
  "evaluate",
  "evaluate_files",
  "extract",
  "fit_judge",
  "frechet_distance",
  "gradients",
  "measure",
  "open_reference",
  "pixel_features",
  "protocol_text",
  "protocols_text",
  "read_statistics",
  "statistics_of",
  "sweep",
  "table",
  "write_statistics",
  "write_sweep_report",
]
