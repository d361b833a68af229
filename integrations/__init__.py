"""Adapters for training frameworks: each describes layouts, none has a step loop."""
