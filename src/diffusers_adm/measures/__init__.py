"""Measures of a model that both training and evaluation make: the variational bound of images."""
