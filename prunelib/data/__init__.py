"""Models, texts, calibration sets and local tasks: where a run's data comes from."""
