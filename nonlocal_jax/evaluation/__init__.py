"""Evaluation: inference protocols, metrics and the evaluator."""
