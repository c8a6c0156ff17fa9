"""What the workflow needs of a cluster: resources per step, and the cost of an experiment."""
