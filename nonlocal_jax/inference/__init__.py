"""Predicting label maps: padded shapes, the predictor, and pretrained models."""
