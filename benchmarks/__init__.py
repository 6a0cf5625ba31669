"""Measures em-runner beside other ways to do the same; see README.md."""
