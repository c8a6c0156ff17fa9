"""Tables, plots and pages of a benchmark: reads metrics, never imports torch."""
