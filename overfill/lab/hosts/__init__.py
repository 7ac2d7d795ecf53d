"""Runs each process of a stack on a host of its own: a network namespace with its own address and link.

* ``network`` makes hosts on a bridge, and changes or cuts their links; ``relay.c`` carries their frames;
* ``place`` gives a stack's processes a host each, certificates and API keys.
"""
