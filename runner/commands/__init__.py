"""The commands of `em-runner` that need more than a few lines, one module each."""
