"""User agents that rate items: on a base in this process, or on a server that hosts the exported adapters."""
