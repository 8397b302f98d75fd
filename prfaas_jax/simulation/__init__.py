"""Discrete-event simulation of clusters and links, driving the same scheduling objects as the live system."""
