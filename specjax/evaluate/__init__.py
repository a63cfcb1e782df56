"""Measuring: prompts, runs, comparisons, reports."""
