"""Pure functions on arrays, used by the network, the loss and the metrics."""
