"""Arrays in, arrays out: what the network, the loss and the scores are computed with."""
