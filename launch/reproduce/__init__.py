"""Runs of the paper against what is published: expected curves, the standing after each validation, and the verdict."""
