"""The tiers and adapters that a router serves: the names of the model, and what writes the answer to a request."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from overfill.api.keys import ApiKey
from overfill.errors import InvalidRequest, ModelNotFound, Overloaded, PermissionDenied, Unavailable
from overfill.kv.handshake import CHOSEN_BY_WORKERS, check_same
from overfill.model.manifest import Pair
from overfill.routing.brownout import Brownout
from overfill.routing.job import Job
from overfill.routing.pool import Roster
from overfill.routing.tier import NO_FALLBACK, Adapter, TierChoice
from overfill.v1 import inference_pb2

_ROUNDINGS = ("decoder_quantize", "kv_cache_dtype")

_FORMATS = (*_ROUNDINGS, *CHOSEN_BY_WORKERS.values())
"""Fields of AnswerIdentity that no pair determines, but how its workers load it."""


_SHOWN = 20
"""Maximum number of names in a message."""


class ServedTiers:
    """The tiers of one full model and the adapters of their workers, under the names that clients use.

    Args:
        names: names of the model; answers carry the first.
        pairs: pair of each tier, by the tier's name, the default tier's first.
        roster: the workers.
        brownout: chooses the tiers of requests under overload; None if no tier may write another's answers.
        answer_format: as in AnswerIdentity.
        complete: number of decode workers of each tier in a complete stack; 1 for a tier that it leaves out.

    Attributes:
        revision: revision of the pairs; empty in a stack without revisions.
        roster: as the argument.
        vocab_size: number of token ids of the full model.
    """

    def __init__(
        self,
        names: Sequence[str],
        pairs: Mapping[str, Pair],
        roster: Roster,
        brownout: Brownout | None = None,
        answer_format: str = "",
        complete: Mapping[str, int] | None = None,
    ) -> None:
        self._names = tuple(names)
        self._pairs = pairs
        self.roster = roster
        self._brownout = brownout
        self._answer_format = answer_format
        self._complete = complete or {}
        self._identities: dict[str, inference_pb2.AnswerIdentity] = {}  # without formats and request, by tier
        self._latest_formats: dict[str, dict[str, object]] = {}  # formats of each tier's latest worker
        self.revision = pairs[roster.default_tier].revision
        full = pairs[roster.default_tier].full_config
        self.vocab_size, self._max_positions = full.vocab_size, full.max_positions

    @property
    def model(self) -> str:
        """Model name in answers, without a tier."""
        return self._names[0]

    @property
    def several(self) -> bool:
        """True if requests can choose among tiers."""
        return len(self._pairs) > 1

    def listed(self, caller: ApiKey | None) -> tuple[str, ...]:
        """The names under which the router lists the model, as far as an API key may use them.

        They are the model's own names, and each with each of several tiers and with each adapter.
        """
        writers = [*(self._pairs if self.several else ()), *(a.name for a in self.roster.adapters.known())]
        usable = [writer for writer in writers if _may_use(caller, writer)]
        own = self._names if _may_use(caller, self.roster.default_tier) else ()
        return (*own, *(f"{name}:{writer}" for name in self._names for writer in usable))

    def pair(self, tier: str) -> Pair:
        """The pair of a tier."""
        return self._pairs[tier]

    def model_name(self, choice: TierChoice) -> str:
        """Model name in answers, with what writes them if requests can choose."""
        return f"{self.model}:{choice.writer}" if self.several or choice.adapter is not None else self.model

    def fingerprint(self, choice: TierChoice) -> str:
        """Name of what writes the tokens: decoder, formats of weights and KV if rounded, adapter, and revision."""
        formats = self._formats(choice.tier)
        parts = [
            self._pairs[choice.tier].decoder_digest[:12],
            *(_rounded(formats.get(name, "")) for name in _ROUNDINGS),
        ]
        parts += ["" if choice.adapter is None else choice.adapter.digest[:12], self.revision]
        return f"fp_{'-'.join(filter(None, parts))}"

    def identity(self, writer: str, job: Job) -> inference_pb2.AnswerIdentity:
        """Returns what the answer to ``job`` depends on where ``writer`` writes it: its adapter, or a tier."""
        tier = writer if job.adapter is None else job.adapter.tier
        if tier not in self._identities:
            self._identities[tier] = self._identity(tier)
        identity = inference_pb2.AnswerIdentity()
        identity.CopyFrom(self._identities[tier])
        for name, form in self._formats(tier).items():
            setattr(identity, name, _rounded(form))
        identity.prompt_tokens = job.prompt_tokens
        identity.prompt_digest = hashlib.sha256(array("I", job.prompt_token_ids)).hexdigest()
        identity.answer_start, identity.adapter_digest = job.start.answer_start, job.start.adapter_digest
        return identity

    def _identity(self, tier: str) -> inference_pb2.AnswerIdentity:
        model = self._pairs[tier].model_identity("decoder")
        identity = inference_pb2.AnswerIdentity(answer_format=self._answer_format)
        for name in {f.name for f in identity.DESCRIPTOR.fields} & {f.name for f in model.DESCRIPTOR.fields}:
            setattr(identity, name, getattr(model, name))
        for name in _FORMATS:
            identity.ClearField(name)
        return identity

    def _formats(self, tier: str) -> dict[str, object]:
        """Returns the formats of a tier's weights and KV that the router knows, by field of AnswerIdentity.

        It knows those that it was told, and those of the tier's workers, which are the same. They stay when the last
        worker leaves: others that join write in the same formats, or the router refuses to resume an answer.
        """
        worker = next(iter(self.roster.decode[tier]), None)
        if worker is not None:
            self._latest_formats[tier] = {**worker.info.decoder, **worker.info.identity.chosen_by_workers()}
        known = {**self._latest_formats.get(tier, {}), **self.roster.tiers[tier].decoder}
        return {name: known[name] for name in _FORMATS if name in known}

    def check_resume(self, request: inference_pb2.GenerateRequest, choice: TierChoice, job: Job) -> None:
        """Refuses to continue an answer that depends on something else than an answer here would.

        Before the first worker joins, formats that the router was not told are not compared: a router that has just
        been restarted does not know them.

        Args:
            choice: what is asked to write the rest.
            job: the request, with its prompt as this router has made it.

        Raises:
            InvalidRequest: the request has tokens of an answer and not its identity.
            Incompatible: the identities differ; names the fields.
        """
        if not request.HasField("resume_identity"):
            if request.resume_token_ids:
                raise InvalidRequest(
                    "resume_identity", "is missing; to resume an answer, give the identity with which it was accepted"
                )
            return
        tier = choice.fallback_from or choice.tier
        here, there = self.identity(tier, job), request.resume_identity
        unknown = set(_FORMATS) - self._formats(tier).keys()
        unknown |= {name for name in CHOSEN_BY_WORKERS.values() if not getattr(there, name)}
        names = [f.name for f in here.DESCRIPTOR.fields if f.name not in unknown]
        check_same(
            {f"resume_identity.{name}": getattr(here, name) for name in names},
            {f"resume_identity.{name}": getattr(there, name) for name in names},
            "this router would continue another answer",
        )

    def check_can_score(
        self, request: inference_pb2.GenerateRequest, choice: TierChoice, caller: ApiKey | None
    ) -> None:
        """Raises InvalidRequest if ``request`` has its whole prompt scored, but another than the full model writes."""
        tier = choice.fallback_from or choice.tier
        scored, split = request.sampling.HasField("prompt_logprobs"), request.HasField("answer_start")
        if not scored or split or (self._pairs[tier].identity and choice.adapter is None):
            return
        writes = f"a smaller decoder writes the answers of the tier {tier!r}"
        if choice.adapter is not None:
            writes = f"the adapter {choice.writer!r} writes the answer"
        exact = _list([name for name, pair in self._pairs.items() if pair.identity and _may_use(caller, name)])
        raise InvalidRequest(
            "sampling.prompt_logprobs",
            f"would be the full model's, but {writes}; to score the full model, name a tier whose decoder is the full "
            f"model (here: {exact}); to score the decoder, set answer_start, the index of the first prompt token that "
            "it computes, as `pair lm-eval --address` does",
        )

    def max_model_len(self, tier: str = "", adapter: Adapter | None = None) -> int:
        """Maximum number of prompt and answer tokens together, by the model and the largest decode worker.

        Args:
            tier: empty means the default tier.
            adapter: counts only the tier's workers that have it; None counts all.
        """
        capacity = self.roster.decode[tier or self.roster.default_tier].capacity_tokens(adapter)
        return self._max_positions if capacity is None else min(self._max_positions, capacity)

    def describe(self, name: str, caller: ApiKey | None) -> inference_pb2.Model:
        """Describes the model under one of its names. Raises ModelNotFound unless the API key may use what writes."""
        writer = self.parse_model(name, caller) or self.roster.default_tier
        choice = self._choice(writer)
        if choice is None or not _may_use(caller, writer):
            raise self._not_found(name, caller)
        worker = next((worker for pool in self.roster.pools() for worker in pool), None)
        pair = self._pairs[choice.tier]
        return inference_pb2.Model(
            name=name,
            max_model_len=self.max_model_len(choice.tier, choice.adapter),
            full_digest=pair.full_digest,
            decoder_digest=pair.decoder_digest,
            dtype=worker.info.identity.kv.dtype if worker else "",
            tier=choice.tier,
            adapter_digest="" if choice.adapter is None else choice.adapter.digest,
        )

    def parse_model(self, model: str, caller: ApiKey | None = None) -> str:
        """Returns the tier or adapter that a model name names; empty if it names none.

        Raises:
            ModelNotFound: there is no such model. The message lists the models that ``caller`` may use.
        """
        if not model or model in self._names:
            return ""
        name, _, writer = model.rpartition(":")
        if name in self._names and self._choice(writer) is not None:
            return writer
        raise self._not_found(model, caller)

    def tier_of(self, request: inference_pb2.GenerateRequest) -> str | None:
        """Returns the tier that a request names, itself or by its adapter; None if what it names is not here."""
        try:
            named = self.parse_model(request.model)
        except ModelNotFound:
            return None
        choice = self._choice(request.tier or named or self.roster.default_tier)
        return None if choice is None else choice.tier

    def _choice(self, writer: str) -> TierChoice | None:
        """Returns the tier of this name, or the adapter with its tier; None if there is none."""
        if writer in self._pairs:
            return TierChoice(writer)
        adapter = self.roster.adapters.get(writer)
        return None if adapter is None else TierChoice(adapter.tier, adapter=adapter)

    def _not_found(self, model: str, caller: ApiKey | None) -> ModelNotFound:
        return ModelNotFound(f"model {model[:200]!r} does not exist; this router serves {_list(self.listed(caller))}")

    def requested(self, request: inference_pb2.GenerateRequest, caller: ApiKey | None) -> TierChoice:
        """Returns what a request asks to write its answer. If its tier has no worker, the fallback's tier writes.

        Raises:
            ModelNotFound: there is no such model, tier or adapter.
            PermissionDenied: the API key may not use the tier or adapter.
            InvalidRequest: model and tier contradict each other, or there is no such tier to fall back to.
            Unavailable: the client resumes an answer of an adapter that no worker has now, or what it names may be an
                adapter of a decode worker that has not joined yet.
        """
        try:
            named = self.parse_model(request.model, caller)
            choice = self._choice(request.tier or named or self.roster.default_tier)
            if choice is None:
                usable = self._usable(caller)
                raise ModelNotFound(f"tier {request.tier[:200]!r} does not exist; this router has {usable}")
        except ModelNotFound as error:
            # Another router may know the adapter. This one learns adapters from the workers that join it.
            if request.resume_identity.adapter_digest:
                raise Unavailable(f"no decode worker has the adapter that began the answer; {error}") from None
            names_writer = request.tier or request.model.rpartition(":")[0] in self._names
            if names_writer and not all(map(self._knows_adapters, self.roster.decode)):
                raise Unavailable(
                    f"not all decode workers have joined this router, so it may not know all adapters; {error}"
                ) from None
            raise
        tier, writer = choice.tier, choice.writer
        kind = "tier" if choice.adapter is None else "adapter"
        if named and named != writer:
            raise InvalidRequest("tier", f"is {writer!r}, but the model names {named!r}: remove one")
        if caller is not None and not caller.may_use(writer):
            usable = self._usable(caller)
            raise PermissionDenied(f"API key {caller.name!r} may not use the {kind} {writer!r}; it may use {usable}")
        if choice.adapter is not None:
            if request.fallback not in ("", NO_FALLBACK):
                asked = request.fallback[:200]
                raise InvalidRequest(
                    "fallback", f"is {asked!r}, but only the adapter {writer!r} may write its answers: remove it"
                )
            return choice
        fallback = "" if request.HasField("answer_start") else self._fallback(tier, request.fallback, caller)
        if fallback and self._lost(tier) and not self._lost(fallback):
            # It starts there, because it would leave its own tier's queue at once.
            return TierChoice(fallback, fallback_from=tier)
        return TierChoice(tier, fallback)

    def admitted(
        self,
        choice: TierChoice,
        request: inference_pb2.GenerateRequest,
        caller: ApiKey | None,
        admit: Callable[[str], None],
        now: float,
    ) -> TierChoice:
        """Returns ``choice``, or that of a cheaper tier under overload if the request or its key allows it.

        Args:
            admit: raises Overloaded if a tier would refuse the request.
            now: seconds on the event loop's clock.

        Raises:
            Overloaded: no tier that may write the answer admits the request.
        """
        asked, brownout = choice.tier, self._brownout
        allowed = caller is not None and caller.allow_brownout
        if request.HasField("allow_brownout"):
            allowed = request.allow_brownout
        # A client that resumes an answer has tokens of the tier that it asks for. Scores of a decoder are of no other,
        # and an adapter's answers neither.
        fixed = choice.adapter is not None or request.resume_token_ids or request.HasField("answer_start")
        if brownout is None or not allowed or fixed:
            admit(asked)
            return choice

        may_use = partial(_may_use, caller)
        chosen = brownout.choose(asked, may_use, now)
        refusal: Overloaded | None = None
        for tier in dict.fromkeys((chosen, asked, *filter(may_use, brownout.cheaper(asked)))):
            try:
                admit(tier)
            except Overloaded as error:
                refusal = refusal or error
            else:
                fallback = "" if choice.fallback == tier else choice.fallback
                return replace(choice, tier=tier, fallback=fallback, brownout_from="" if tier == asked else asked)
        assert refusal is not None
        raise refusal

    def _fallback(self, tier: str, asked: str, caller: ApiKey | None) -> str:
        """Returns the tier to which a request of ``tier`` falls back; empty if it stays."""
        tiers = self.roster.tiers
        fallback = asked or tiers[tier].fallback
        if fallback in ("", NO_FALLBACK, tier):
            return ""
        if fallback not in tiers:
            usable = _list([name for name in tiers if _may_use(caller, name)])
            raise InvalidRequest("fallback", f"there is no tier {fallback[:200]!r}; tiers are {usable}")
        if caller is None or caller.may_use(fallback):
            return fallback
        if asked:
            raise PermissionDenied(f"API key {caller.name!r} may not use the tier {fallback!r}, named as fallback")
        return ""

    def _usable(self, caller: ApiKey | None) -> str:
        """Names the tiers and adapters that an API key may use."""
        names = [*self.roster.tiers, *(adapter.name for adapter in self.roster.adapters.known())]
        return _list([name for name in names if _may_use(caller, name)])

    def _knows_adapters(self, tier: str) -> bool:
        """True unless the tier has no worker, or workers have not joined since the router's start."""
        pool, complete = self.roster.decode[tier], self._complete.get(tier, 1)
        return pool.most_joined >= complete and len(pool) >= min(1, complete)

    def _lost(self, tier: str) -> bool:
        """True if no decode worker of the tier is alive or starting."""
        return not self.roster.decode[tier].index.present


def _rounded(form: object) -> str:
    """Returns a format in which weights or KV are rounded, as the wire has it; empty if they are not."""
    return "" if form in ("none", "auto") else str(form)


def _may_use(caller: ApiKey | None, tier: str) -> bool:
    return caller is None or caller.may_use(tier)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more or "none"
