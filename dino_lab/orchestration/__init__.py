"""MANY trials: Ray Tune runs them, MLflow shows them. No mathematics."""
