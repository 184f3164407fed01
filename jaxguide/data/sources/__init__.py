"""Sources of datasets: the TFDS catalogue and scikit-learn's digits."""
