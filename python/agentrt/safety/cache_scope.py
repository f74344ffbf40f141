"""Who may share a prefix in the engine's KV cache: the consequence of taint and trust domains.

A prefix cache answers faster when a prefix is resident, whoever put it there: response times tell one tenant what
another has sent. A *salt* in the block hash ends that, and ends sharing too. So the salt is chosen by what the
prefix holds, position by position; each zone contains the ones before it:

==========  ==================================================  =======================================
zone        holds                                               who shares its blocks
==========  ==================================================  =======================================
public      operator text only (system prompt, tool schemas)    everybody (no salt)
domain      also text of one trust domain, no taint             sessions of that domain
session     also tainted or foreign-domain text                 that session alone
==========  ==================================================  =======================================

A block belongs to the zone of its last token. The salt is keyed (HMAC-like BLAKE2b with the deployment's secret), so
a tenant cannot compute another's. Engines with one salt per request (vLLM `cache_salt`) take
:meth:`Scopes.request_salt`: safe, and it gives up the clean prefix of mixed requests; engines that take extra keys
per block take :meth:`Plan.block_salt` and keep it. What both cost on recorded workloads: docs/policies/safety.md.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from agentrt.tools.spec import Scope

__all__ = ["Plan", "Scopes", "Segment"]

PUBLIC, DOMAIN, SESSION = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of prompt tokens of one origin."""

    tokens: int
    domain: str | None = None
    """Whose text it is; None: the operator's."""
    labels: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """The zones of one prompt."""

    domain_from: int
    """First token that is not public."""
    session_from: int
    """First token that is tainted or foreign."""
    tokens: int
    domain_salt: str
    session_salt: str

    def zone(self, token: int) -> int:
        """Zone of a token: PUBLIC, DOMAIN or SESSION."""
        return SESSION if token >= self.session_from else DOMAIN if token >= self.domain_from else PUBLIC

    def block_salt(self, block: int, block_size: int) -> str | None:
        """Salt of a full block; None: shared by everybody."""
        zone = self.zone((block + 1) * block_size - 1)
        return (None, self.domain_salt, self.session_salt)[zone]


class Scopes:
    """Plans prompts of one deployment.

    Args:
        secret: At least 16 bytes, the same in all replicas that share a cache; random by default.
        trusted: Labels that are no taint, as in the policy.
    """

    def __init__(self, secret: bytes | None = None, trusted: Iterable[str] = ()) -> None:
        if secret is not None and len(secret) < 16:
            raise ValueError(f"secret must have at least 16 bytes, has: {len(secret)}")
        self._secret = secret or secrets.token_bytes(32)
        self._trusted = tuple(trusted)

    def _salt(self, *parts: str) -> str:
        text = "".join(f"{len(part)}:{part}" for part in parts)
        key = hashlib.blake2b(self._secret, digest_size=32).digest()
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), key=key, digest_size=16).hexdigest()

    def is_taint(self, labels: Iterable[str]) -> bool:
        """Whether any of the labels is one."""
        return any(not any(label == t or label.startswith(t + ":") for t in self._trusted) for label in labels)

    def plan(self, scope: Scope, segments: Sequence[Segment]) -> Plan:
        """Zones and salts of a prompt that `scope` sends."""
        domain_from = session_from = None
        at = 0
        for segment in segments:
            if segment.tokens > 0:
                private = segment.domain is not None
                if session_from is None and (
                    self.is_taint(segment.labels) or (private and segment.domain != scope.domain)
                ):
                    session_from = at
                if domain_from is None and (private or session_from is not None):
                    domain_from = at
            at += segment.tokens
        domain_salt = self._salt("domain", scope.domain)
        session_salt = self._salt("session", scope.domain, scope.session)
        session_at = at if session_from is None else session_from
        domain_at = at if domain_from is None else domain_from
        return Plan(domain_at, session_at, at, domain_salt, session_salt)

    def request_salt(self, plan: Plan) -> str | None:
        """One salt for the whole request, for engines that take no other: that of its last token."""
        if plan.tokens == 0:
            return None
        return (None, plan.domain_salt, plan.session_salt)[plan.zone(plan.tokens - 1)]
