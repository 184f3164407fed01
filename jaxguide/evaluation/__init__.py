"""Evaluation of guided samples: measures, tables of sweeps over the scale, and a report to open in a browser.

Inputs and outputs are NumPy arrays; images are uint8 of shape (n, height, width, channels), labels are whole numbers.
scikit-learn, matplotlib and Jinja are imported only by the functions that need them, so that the import is fast.
"""

from jaxguide.evaluation.classifier_report import ClassifierReport, classifier_report
from jaxguide.evaluation.classifiers import Gradients, gradients
from jaxguide.evaluation.features import pixel_features
from jaxguide.evaluation.judge import Judge
from jaxguide.evaluation.measures import MEASURES, Evidence, Figures, Measure, Measures, measure
from jaxguide.evaluation.metrics import diversity, frechet_distance
from jaxguide.evaluation.report import TITLES, fidelity_plot, write_report
from jaxguide.evaluation.sweep import Row, evaluate, read_csv, table, write_csv

__all__ = [
  "MEASURES",
  "TITLES",
  "ClassifierReport",
  "Evidence",
  "Figures",
  "Gradients",
  "Judge",
  "Measure",
  "Measures",
  "Row",
  "classifier_report",
  "diversity",
  "evaluate",
  "fidelity_plot",
  "frechet_distance",
  "gradients",
  "measure",
  "pixel_features",
  "read_csv",
  "table",
  "write_csv",
  "write_report",
]
