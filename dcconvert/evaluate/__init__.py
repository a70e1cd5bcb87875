"""Measuring a converted model: steps, final images, sets of images, and fine detail."""
