"""An HTTP server with limits that protect it from hostile clients."""
