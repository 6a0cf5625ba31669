"""Running queries through the agent's handler."""
