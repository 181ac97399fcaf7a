"""Stages, storage, formats, configuration and the command line."""
