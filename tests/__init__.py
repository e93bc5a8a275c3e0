"""Tests. A package, so that no other one of this name hides ``tests.aot.worker``."""
