"""Processes and their edges: prefill server, decode server, router, and what starts them."""
