"""Prediction of label maps: padded shapes, the predictor, and pretrained models."""
