"""Adapters of agent frameworks: whose calls these are, what the engine is told, and where tools pass through agentrt.

Nothing here is imported by `import agentrt`; each adapter imports its framework when it is used.
"""
