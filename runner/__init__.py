"""The parent: supervises the workers, routes queries to them, serves HTTP.

Never talks to an em_disco node and never imports a handler, so that neither can bring it down.
"""
