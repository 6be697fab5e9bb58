"""Measurements behind the chapters, each one a module that writes a record: ``python -m``."""
