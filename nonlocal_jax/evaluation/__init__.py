"""Evaluation: the evaluator, scores, reports and pictures."""
