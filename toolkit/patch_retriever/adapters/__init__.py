"""Adapters: small sets of weights, trained through a frozen patch with peft."""
