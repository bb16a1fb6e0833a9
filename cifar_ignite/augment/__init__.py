"""Augmentation of batches on their device, with separate random parameters for every image."""
