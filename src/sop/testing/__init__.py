"""Fakes that validate the contract while faking, and one set of contract tests per protocol."""
