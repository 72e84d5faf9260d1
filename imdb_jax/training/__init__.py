"""Modules that run only while training."""
