"""Experiment entry points: flags in, one library call, results out."""
