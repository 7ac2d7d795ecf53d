"""Mock workers: the whole protocol without models, with fake tokens, fake KV and configurable times. No torch.

``python -m services.mock prefill|decode|worker FLAGS`` takes the flags of the real worker and a few more (``--help``);
``mock_worker`` runs one in a test's event loop. The tokens of an answer depend on its request alone, so runs repeat and
a migrated answer continues correctly. Mock workers obey grammars and stop ids.
"""
