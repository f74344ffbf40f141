"""Safety: rules on tool calls, taint, an audit log, and who may share a cached prefix.

>>> from agentrt.safety import Guard, check_file
>>> from agentrt.tools import ToolRuntime  # runtime = ToolRuntime(guard=Guard("policy.toml"))

Rules and their matching: docs/policies/safety.md; what is and is not defended: docs/threat_model.md. The file's shape
as JSON Schema: `agentrt/safety/policy.schema.json`.
"""

from agentrt.safety.audit import AuditLog, verify
from agentrt.safety.cache_scope import Plan, Scopes, Segment
from agentrt.safety.guard import Decision, DeniedError, Finding, Guard, Permit, Report, check_file
from agentrt.safety.taint import Taint

__all__ = [
    "AuditLog",
    "Decision",
    "DeniedError",
    "Finding",
    "Guard",
    "Permit",
    "Plan",
    "Report",
    "Scopes",
    "Segment",
    "Taint",
    "check_file",
    "verify",
]
