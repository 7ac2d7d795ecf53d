"""Breaks a running stack under load, at a chosen phase of a request, and judges every answer.

* ``fault_plan`` chooses faults and moments; ``injector`` injects them;
* ``trial`` runs a plan on a stack of its own, under the requests of ``load``;
* ``probes`` runs inside the services and tells ``control`` where each request is; ``rank_probes`` runs in their ranks;
  both change functions by ``patching`` and talk to it through a ``probe``;
* ``proxy`` makes connections fail; ``clock`` sets the wall clock of one process;
* ``memory`` samples the processes' memory; ``trial_report`` prints the result.
"""
