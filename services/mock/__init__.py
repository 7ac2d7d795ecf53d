"""Workers without models: the whole protocol with fake tokens, fake KV and adjustable times.

No torch.
``python -m services.mock prefill|decode FLAGS`` takes the flags of the real worker and a few of its own
(``--help``); ``mock_worker`` runs one in a test's event loop. What a sequence says is a function of its request alone,
so that runs repeat and a migrated answer goes on where it was; grammars and stop ids are obeyed.
"""
