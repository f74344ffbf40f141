"""Adapters of agent frameworks: whose calls these are, and where a tool call passes through agentrt.

Nothing here is imported by `import agentrt`; each adapter imports its framework when it is used.
"""
