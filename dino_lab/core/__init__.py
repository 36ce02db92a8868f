"""ONE trial: torch and timm. Nothing of Ray, MLflow, Optuna or pandas."""
