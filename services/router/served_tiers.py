"""The tiers that a router serves: the names of the model, and which tier writes the answer to a request."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from overfill.api.keys import ApiKey
from overfill.errors import InvalidRequest, ModelNotFound, Overloaded, PermissionDenied
from overfill.kv.handshake import CHOSEN_BY_WORKERS, check_same
from overfill.model.manifest import Pair
from overfill.routing.brownout import Brownout
from overfill.routing.pool import Roster
from overfill.routing.tier import NO_FALLBACK, TierChoice
from overfill.v1 import inference_pb2

_ROUNDINGS = ("decoder_quantize", "kv_cache_dtype")

_FORMATS = (*_ROUNDINGS, *CHOSEN_BY_WORKERS.values())
"""Fields of AnswerIdentity that no pair determines, but how its workers load it."""


class ServedTiers:
    """The tiers of one full model, under the names that clients use.

    Args:
        names: names of the model; answers carry the first.
        pairs: pair of each tier, by the tier's name, the default tier's first.
        roster: the workers.
        brownout: chooses the tiers of requests under overload; None if no tier may write another's answers.
        answer_format: as in AnswerIdentity.

    Attributes:
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
    ) -> None:
        self._names = tuple(names)
        self._pairs = pairs
        self.roster = roster
        self._brownout = brownout
        self._answer_format = answer_format
        self._identities: dict[str, inference_pb2.AnswerIdentity] = {}  # without formats and request, by tier
        self._latest_formats: dict[str, dict[str, object]] = {}  # formats of each tier's latest worker
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

    @property
    def models(self) -> tuple[str, ...]:
        """Names under which the router lists the model: its own ones, and each with each of several tiers."""
        tiers = self._pairs if self.several else ()
        return (*self._names, *(f"{name}:{tier}" for name in self._names for tier in tiers))

    def listed(self, caller: ApiKey | None) -> tuple[str, ...]:
        """The names in ``models`` that an API key may use."""
        default = self.roster.default_tier
        return tuple(name for name in self.models if _may_use(caller, self.parse_model(name) or default))

    def pair(self, tier: str) -> Pair:
        """The pair of a tier."""
        return self._pairs[tier]

    def fingerprint(self, tier: str) -> str:
        """Name of what writes a tier's tokens: its decoder, and how its workers store weights and KV if they round."""
        formats = self._formats(tier)
        names = (_rounded(formats.get(name, "")) for name in _ROUNDINGS)
        rounded = "".join(f"-{name}" for name in names if name)
        return f"fp_{self._pairs[tier].decoder_digest[:12]}{rounded}"

    def identity(self, tier: str, prompt: Sequence[int], answer_start: int) -> inference_pb2.AnswerIdentity:
        """Returns what an answer of ``tier`` to the token ids ``prompt`` depends on; ``answer_start`` 0 means none."""
        if tier not in self._identities:
            self._identities[tier] = self._identity(tier)
        identity = inference_pb2.AnswerIdentity()
        identity.CopyFrom(self._identities[tier])
        for name, form in self._formats(tier).items():
            setattr(identity, name, _rounded(form))
        identity.prompt_tokens = len(prompt)
        identity.prompt_digest = hashlib.sha256(array("I", prompt)).hexdigest()
        identity.answer_start = answer_start
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

    def check_resume(self, request: inference_pb2.GenerateRequest, tier: str, prompt: Sequence[int]) -> None:
        """Refuses to continue an answer that depends on something else than an answer here would.

        Before the first worker joins, formats that the router was not told are not compared: a router that has just
        been restarted does not know them.

        Args:
            tier: tier of which the client asks that it writes the rest.
            prompt: token ids of the prompt, as this router has made them.

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
        here, there = self.identity(tier, prompt, request.answer_start), request.resume_identity
        unknown = set(_FORMATS) - self._formats(tier).keys()
        unknown |= {name for name in CHOSEN_BY_WORKERS.values() if not getattr(there, name)}
        names = [f.name for f in here.DESCRIPTOR.fields if f.name not in unknown]
        check_same(
            {f"resume_identity.{name}": getattr(here, name) for name in names},
            {f"resume_identity.{name}": getattr(there, name) for name in names},
            "this router would continue another answer",
        )

    def check_can_score(self, request: inference_pb2.GenerateRequest, tier: str, caller: ApiKey | None) -> None:
        """Raises InvalidRequest if ``request`` has its whole prompt scored in a tier with a smaller decoder."""
        scored, split = request.sampling.HasField("prompt_logprobs"), request.HasField("answer_start")
        if not scored or split or self._pairs[tier].identity:
            return
        exact = _list(name for name, pair in self._pairs.items() if pair.identity and _may_use(caller, name))
        raise InvalidRequest(
            "sampling.prompt_logprobs",
            f"would be the full model's, but a smaller decoder writes the answers of the tier {tier!r}; to score the "
            f"full model, name a tier whose decoder is the full model (here: {exact}); to score the decoder, set "
            "answer_start, the index of the first prompt token that it computes, as `pair lm-eval --address` does",
        )

    def max_model_len(self, tier: str = "") -> int:
        """Maximum number of prompt and answer tokens together, by the model and the tier's largest decode worker.

        Args:
            tier: empty means the default tier.
        """
        capacity = self.roster.decode[tier or self.roster.default_tier].capacity_tokens
        return self._max_positions if capacity is None else min(self._max_positions, capacity)

    def describe(self, name: str, caller: ApiKey | None) -> inference_pb2.Model:
        """Describes the model under one of its names. Raises ModelNotFound unless the API key may use its tier."""
        tier = self.parse_model(name, caller) or self.roster.default_tier
        if not _may_use(caller, tier):
            raise self._not_found(name, caller)
        worker = next(iter(self.roster.workers()), None)
        pair = self._pairs[tier]
        return inference_pb2.Model(
            name=name,
            max_model_len=self.max_model_len(tier),
            full_digest=pair.full_digest,
            decoder_digest=pair.decoder_digest,
            dtype=worker.info.identity.kv.dtype if worker else "",
            tier=tier,
        )

    def parse_model(self, model: str, caller: ApiKey | None = None) -> str:
        """Returns the tier that a model name names; empty if it names none.

        Raises:
            ModelNotFound: there is no such model. The message lists the models that ``caller`` may use.
        """
        if not model or model in self._names:
            return ""
        name, _, tier = model.rpartition(":")
        if name in self._names and tier in self._pairs:
            return tier
        raise self._not_found(model, caller)

    def _not_found(self, model: str, caller: ApiKey | None) -> ModelNotFound:
        return ModelNotFound(f"model {model[:200]!r} does not exist; this router serves {_list(self.listed(caller))}")

    def requested(self, request: inference_pb2.GenerateRequest, caller: ApiKey | None) -> TierChoice:
        """Returns the tier for which a request asks. If it has no worker, that is the one to which it falls back.

        Raises:
            ModelNotFound: there is no such model or tier.
            PermissionDenied: the API key may not use the tier.
            InvalidRequest: model and tier contradict each other, or there is no such tier to fall back to.
        """
        named, tiers = self.parse_model(request.model, caller), self.roster.tiers
        usable = _list(name for name in tiers if _may_use(caller, name))
        if request.tier and request.tier not in tiers:
            raise ModelNotFound(f"tier {request.tier[:200]!r} does not exist; this router has {usable}")
        if named and request.tier not in ("", named):
            raise InvalidRequest("tier", f"is {request.tier!r}, but the model names the tier {named!r}: remove one")
        tier = request.tier or named or self.roster.default_tier
        if caller is not None and not caller.may_use(tier):
            raise PermissionDenied(f"API key {caller.name!r} may not use the tier {tier!r}; it may use {usable}")
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
        # A client that resumes an answer has tokens of the tier that it asks for. Scores of a decoder are of no other.
        if brownout is None or not allowed or request.resume_token_ids or request.HasField("answer_start"):
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
            usable = _list(name for name in tiers if _may_use(caller, name))
            raise InvalidRequest("fallback", f"there is no tier {fallback[:200]!r}; tiers are {usable}")
        if caller is None or caller.may_use(fallback):
            return fallback
        if asked:
            raise PermissionDenied(f"API key {caller.name!r} may not use the tier {fallback!r}, named as fallback")
        return ""

    def _lost(self, tier: str) -> bool:
        """True if no decode worker of the tier is alive or starting."""
        return not self.roster.decode[tier].index.present


def _rounded(form: object) -> str:
    """Returns a format in which weights or KV are rounded, as the wire has it; empty if they are not."""
    return "" if form in ("none", "auto") else str(form)


def _may_use(caller: ApiKey | None, tier: str) -> bool:
    return caller is None or caller.may_use(tier)


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
