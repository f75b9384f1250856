"""Configs and flows as files."""
