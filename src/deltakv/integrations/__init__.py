"""Engines that deltakv runs inside. An engine's types stay in its folder."""
