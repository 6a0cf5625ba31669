"""`python -m runner` is the `em-runner` command."""

from runner.cli import main

main()
