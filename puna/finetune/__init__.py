"""Adapting a pretrained model to instructions."""
