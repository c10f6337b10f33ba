"""Training, evaluation and prediction: everything that runs a detector."""
