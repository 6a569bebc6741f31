"""Experiments: what a config describes, as typed values, with methods to train and evaluate."""

from nonlocal_jax.experiment.experiment import Experiment

__all__ = ['Experiment']
