"""Load tests with locust: plan, users, workload, and a verdict against objectives.

No torch.
"""
