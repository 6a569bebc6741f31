"""Datasets, transforms and loading: from folders of images and labels to batches of arrays."""
