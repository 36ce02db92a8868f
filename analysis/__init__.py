"""What came out: MLflow's records -> frames -> summary -> tables, figures, report. No torch."""
