"""Evaluation of a network on a dataset: the evaluator, metrics, reports and pictures."""
