"""The cost of a handoff over real links between hosts: slow, distant and lossy ones, by codec."""
