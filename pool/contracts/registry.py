"""The contracts by name."""

from __future__ import annotations

from pool.contracts.base import Contract
from pool.contracts.fc import FcContract
from pool.contracts.web import WebContract

CONTRACTS: dict[str, Contract] = {contract.name: contract for contract in (WebContract(), FcContract())}
