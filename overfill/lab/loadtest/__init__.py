"""Load tests: a plan, the test that plays it, and a report against objectives; and users for locust.

No torch.
"""
