"""Serving: a model of `moecomm.nn` answers many prompts at once. Needs torch: pip install 'moecomm[torch]'."""

import moecomm.nn.requirements  # noqa: F401 - first: it says what to install where torch is missing
from moecomm.serve.engine import Engine
from moecomm.serve.requests import Request, Token

__all__ = ["Engine", "Request", "Token"]
