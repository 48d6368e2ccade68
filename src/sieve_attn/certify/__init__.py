"""Stage 5: what was dropped to a certificate, whoever chose it."""

from sieve_attn.certify.meter import RowAudit, key_meter, row_audit
from sieve_attn.certify.reference import certify, true_dropped_mass
from sieve_attn.types import Certificate

__all__ = ["Certificate", "RowAudit", "certify", "key_meter", "row_audit", "true_dropped_mass"]
