"""Tests how requests are validated: defaults, tokenization, limits, and the field that each error names."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from overfill.api import requests
from overfill.api.chat import added_by_template, encode_chat
from overfill.api.chat_template import ChatTemplate
from overfill.api.requests import validate_generate
from overfill.api.tokenizer import Tokenizer
from overfill.api.tools_grammar import chat_grammar
from overfill.errors import InvalidRequest, PromptTooLong
from overfill.routing.job import Job
from overfill.routing.tier import Adapter
from overfill.v1.common_pb2 import SamplingParams
from overfill.v1.inference_pb2 import AnswerIdentity, Chat, ChatMessage, GenerateRequest, TokenIds, Tool, ToolCall

MAX_MODEL_LEN = 32
VOCAB = 300


@pytest.fixture
def validate(byte_level_tokenizer: Tokenizer) -> Any:
    def validate(adapter: Adapter | None = None, **fields: Any) -> Job:
        if not {"text", "token_ids", "chat", "no_prompt"} & set(fields):
            fields["token_ids"] = TokenIds(ids=[5, 6, 7])
        fields.pop("no_prompt", None)
        request = GenerateRequest(**fields)
        tools = chat_grammar(request.chat)  # of request.chat, as the router's trial makes it
        return validate_generate(request, byte_level_tokenizer, MAX_MODEL_LEN, VOCAB, tools, adapter=adapter)

    return validate


def test_defaults(validate: Any) -> None:
    request = validate()
    assert request.start.prompt_token_ids == [5, 6, 7]
    assert request.start.sampling.max_tokens == MAX_MODEL_LEN - 3
    assert not request.start.sampling.HasField("temperature"), "absent fields have the defaults of SamplingParams"
    assert request.stop == ()
    assert not request.start.emitted_token_ids
    assert request.start.request_id
    assert not request.start.trace


def test_open_ids_and_seeds_are_drawn_anew_each_time(validate: Any) -> None:
    requests = [validate() for _ in range(8)]
    assert len({r.start.request_id for r in requests}) == 8
    assert len({r.start.sampling.seed for r in requests}) == 8


def test_values_that_the_client_gives_are_kept(validate: Any) -> None:
    request = validate(
        request_id="r",
        stop=["\n"],
        trace=True,
        resume_token_ids=[9],
        sampling=SamplingParams(seed=0, max_tokens=4, temperature=0.5),
    )
    assert (request.start.request_id, request.stop, request.start.trace) == ("r", ("\n",), True)
    assert request.start.emitted_token_ids == [9]
    assert (request.start.sampling.seed, request.start.sampling.max_tokens) == (0, 4)


def test_an_error_about_min_tokens_names_no_limit_that_was_not_given(validate: Any) -> None:
    assert validate(sampling=SamplingParams(min_tokens=29)).start.sampling.max_tokens == 29
    with pytest.raises(PromptTooLong, match="30 tokens after a prompt of 3 do not fit the context of 32") as caught:
        validate(sampling=SamplingParams(min_tokens=30))
    assert caught.value.field == "sampling.min_tokens"


def test_text_and_chat_are_tokenized(validate: Any, byte_level_tokenizer: Tokenizer) -> None:
    assert list(validate(text="Hello").start.prompt_token_ids) == byte_level_tokenizer.encode("Hello")
    message = {"role": "user", "content": "H"}
    chat = Chat(messages=[ChatMessage(**message)])
    assert list(validate(chat=chat).start.prompt_token_ids) == byte_level_tokenizer.encode_chat([message])


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_message_may_be_empty(validate: Any, role: str) -> None:
    assert validate(chat=Chat(messages=[ChatMessage(role=role)])).start.prompt_token_ids


BAD = [
    ("sampling.min_tokens", {"sampling": SamplingParams(max_tokens=4, min_tokens=5)}),
    ("sampling.min_tokens", {"sampling": SamplingParams(min_tokens=30)}),  # the context leaves 29
    ("prompt", {"no_prompt": True}),
    ("prompt", {"text": ""}),
    ("prompt", {"token_ids": TokenIds()}),
    ("prompt", {"chat": Chat()}),
    ("token_ids.ids", {"token_ids": TokenIds(ids=[1, VOCAB])}),
    ("chat.messages[1].role", {"chat": Chat(messages=[{"role": "user", "content": "a"}, {"role": "robot"}])}),
    ("stop[1]", {"stop": ["a", ""]}),
    ("stop[0]", {"stop": ["a" * 1000]}),
    ("stop", {"stop": ["a"] * 100}),
    ("request_id", {"request_id": "x" * 1000}),
    ("request_id", {"request_id": "x\n2026-01-01 00:00:00,000 CRITICAL overfill.rpc: forged"}),
    ("request_id", {"request_id": "x\n"}),
    ("request_id", {"request_id": "x\u2028y"}),
    ("request_id", {"request_id": "x outcome=ok"}),
    ("stream_interval", {"stream_interval": 1025}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=-1)}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=math.nan)}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=math.inf)}),
    ("sampling.temperature", {"sampling": SamplingParams(temperature=0, top_p=0.5)}),
    ("sampling.top_k", {"sampling": SamplingParams(top_k=0)}),
    ("sampling.top_p", {"sampling": SamplingParams(top_p=0)}),
    ("sampling.top_p", {"sampling": SamplingParams(top_p=math.nan)}),
    ("sampling.min_p", {"sampling": SamplingParams(min_p=1.5)}),
    ("sampling.repetition_penalty", {"sampling": SamplingParams(repetition_penalty=1e-39)}),
    ("sampling.repetition_penalty", {"sampling": SamplingParams(repetition_penalty=1e39)}),
    ("sampling.repetition_penalty", {"sampling": SamplingParams(repetition_penalty=math.nan)}),
    ("sampling.max_tokens", {"sampling": SamplingParams(max_tokens=0)}),
    ("sampling.logprobs", {"sampling": SamplingParams(logprobs=21)}),
    ("sampling.stop_token_ids", {"sampling": SamplingParams(stop_token_ids=[VOCAB])}),
    ("sampling.stop_token_ids", {"sampling": SamplingParams(stop_token_ids=[1] * 1025)}),
    ("sampling.logit_bias", {"sampling": SamplingParams(logit_bias=dict.fromkeys(range(1025), 1.0))}),
    ("sampling.seed", {"resume_token_ids": [1]}),
    ("resume_token_ids", {"resume_token_ids": [VOCAB], "sampling": SamplingParams(seed=1)}),
    ("resume_token_ids", {"resume_token_ids": [1, 2, 3], "sampling": SamplingParams(seed=1, max_tokens=2)}),
    ("resume_token_ids", {"resume_token_ids": [1] * (MAX_MODEL_LEN - 2), "sampling": SamplingParams(seed=1)}),
]


@pytest.mark.parametrize(("field", "fields"), BAD, ids=lambda value: str(value)[:40])
def test_each_mistake_names_its_field(validate: Any, field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(**fields)
    assert caught.value.field == field


def test_only_the_same_answer_has_the_same_ids_of_tool_calls(validate: Any) -> None:
    def seed(text: str, resume: tuple[int, ...] = (), **sampling: Any) -> str:
        chat = Chat(messages=[ChatMessage(role="user", content=text)], tools=[{"name": "f"}])
        fields = {"request_id": "r", "sampling": SamplingParams(**sampling), "resume_token_ids": resume}
        return str(validate(chat=chat, truncate_prompt_tokens=24, **fields).answer_digest)

    assert len({seed("a", seed=1), seed("b", seed=1), seed("a", seed=2), seed("a"), seed("a")}) == 5
    assert seed("a", seed=1) == seed("a", (9,), seed=1)
    assert seed("a", temperature=0) == seed("a", (9,), temperature=0)
    assert validate().answer_digest is None


def test_resuming_a_greedy_answer_needs_no_seed(validate: Any) -> None:
    assert validate(resume_token_ids=[1], sampling=SamplingParams(temperature=0)).start.emitted_token_ids == [1]


def test_a_resumed_prompt_keeps_its_length_although_another_one_fits(validate: Any) -> None:
    def kept(tokens: int, **fields: Any) -> list[int]:
        ids, resumed = TokenIds(ids=range(MAX_MODEL_LEN)), AnswerIdentity(prompt_tokens=tokens)
        request = validate(token_ids=ids, truncate_prompt_tokens=-1, resume_identity=resumed, **fields)
        return list(request.prompt_token_ids)

    sampling = SamplingParams(max_tokens=8)
    new = validate(token_ids=TokenIds(ids=[1] * 99), truncate_prompt_tokens=-1, sampling=sampling)
    assert len(new.prompt_token_ids) == MAX_MODEL_LEN - 8
    assert kept(5, sampling=sampling) == list(range(MAX_MODEL_LEN - 5, MAX_MODEL_LEN))
    with pytest.raises(PromptTooLong, match=f"has {MAX_MODEL_LEN} tokens"):
        kept(MAX_MODEL_LEN)


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(validate: Any) -> None:
    fits = validate(token_ids=TokenIds(ids=[1] * (MAX_MODEL_LEN - 1)))
    assert fits.start.sampling.max_tokens == 1
    with pytest.raises(PromptTooLong, match=r"32 tokens.* 32 tokens") as caught:
        validate(token_ids=TokenIds(ids=[1] * MAX_MODEL_LEN))
    assert caught.value.field == "prompt"


def test_ids_are_counted_before_they_are_read(validate: Any) -> None:
    wrong = [VOCAB] * MAX_MODEL_LEN
    with pytest.raises(PromptTooLong, match="has 32 tokens"):
        validate(token_ids=TokenIds(ids=wrong))
    with pytest.raises(InvalidRequest, match="has 32 tokens"):
        validate(resume_token_ids=wrong, sampling=SamplingParams(seed=1))
    cut = validate(token_ids=TokenIds(ids=[*wrong, *range(MAX_MODEL_LEN)]), truncate_prompt_tokens=2)
    assert list(cut.prompt_token_ids) == [MAX_MODEL_LEN - 2, MAX_MODEL_LEN - 1]


def test_an_answer_that_does_not_fit_is_refused_with_both_numbers(validate: Any) -> None:
    fits = validate(sampling=SamplingParams(max_tokens=MAX_MODEL_LEN - 3))
    assert fits.start.sampling.max_tokens == MAX_MODEL_LEN - 3
    with pytest.raises(PromptTooLong, match=r"30 tokens after a prompt of 3 .* 32 tokens") as caught:
        validate(sampling=SamplingParams(max_tokens=30))
    assert caught.value.field == "sampling.max_tokens"
    for asked, given in ((30, MAX_MODEL_LEN - 3), (29, 29), (1, 1), ((1 << 32) - 1, MAX_MODEL_LEN - 3)):
        fitted = validate(sampling=SamplingParams(max_tokens=asked), fit_max_tokens=True)
        assert fitted.start.sampling.max_tokens == given
    with pytest.raises(PromptTooLong) as caught:
        validate(token_ids=TokenIds(ids=[5] * 40), fit_max_tokens=True)
    assert (caught.value.tokens, caught.value.limit) == (40, MAX_MODEL_LEN - 1)


def called(count: int, name: str = "f") -> ChatMessage:
    return ChatMessage(role="assistant", tool_calls=[ToolCall(name=name)] * count)


@pytest.mark.parametrize(
    ("chat", "field", "reason"),
    [
        (Chat(messages=[ChatMessage(role="user")] * 4097), "chat.messages", "4097 messages; at most 4096"),
        (Chat(messages=[called(1025)]), "chat.messages[0].tool_calls", "1025 tool calls; at most 1024"),
        (Chat(messages=[called(1024)] * 16), "chat.messages", "16400 messages and tool calls together; at most 16384"),
        (Chat(messages=[called(2), called(1, "")]), "chat.messages[1].tool_calls[0].name", "is empty"),
        (
            Chat(messages=[ChatMessage(role="user")], chat_template_kwargs=json.dumps({"documents": [{}] * 1025})),
            "chat.documents",
            "1025 documents; at most 1024",
        ),
    ],
)
def test_a_chat_has_as_many_parts_as_over_http(validate: Any, chat: Chat, field: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        validate(chat=chat)
    assert caught.value.field == field


def test_a_chat_with_too_many_tools_is_refused_before_they_are_read() -> None:
    with pytest.raises(InvalidRequest, match="has 129 tools; at most 128"):
        added_by_template(Chat(tools=[Tool()] * 129))


def test_a_template_may_not_make_a_short_chat_long(
    byte_level_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate("{% for m in messages %}{% for n in messages %}{{ m.content }}{% endfor %}{% endfor %}", {})
    monkeypatch.setattr(byte_level_tokenizer, "_chat_template", template)
    chat = Chat(messages=[ChatMessage(role="user", content="x" * 100)] * 200)
    with pytest.raises(
        InvalidRequest, match=r"becomes more than 11\d{5} characters long by this model's chat"
    ) as caught:
        encode_chat(chat, byte_level_tokenizer)
    assert caught.value.field == "chat"
    del chat.messages[100:]
    assert len(encode_chat(chat, byte_level_tokenizer)) == 100 * 100 * 100


def test_scores_of_a_prompt_have_a_maximum(validate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_PROMPT_LOGPROBS", 7)
    assert validate(sampling=SamplingParams(prompt_logprobs=2)).num_scores == (2, 2)
    with pytest.raises(InvalidRequest, match=r"2 tokens make 8 log-probabilities.*at most 7") as caught:
        validate(sampling=SamplingParams(prompt_logprobs=3))
    assert validate(sampling=SamplingParams(prompt_logprobs=3), answer_start=2).num_scores == (1, 3)
    assert caught.value.field == "sampling.prompt_logprobs"
    with pytest.raises(InvalidRequest, match=r"0\.\.20, got 21"):
        validate(sampling=SamplingParams(prompt_logprobs=21))
    assert validate().num_scores is None


def test_8192_tokens_with_20_scores_each_are_allowed() -> None:
    assert requests.MAX_PROMPT_LOGPROBS >= 8192 * 21


CHAT_MESSAGE = Chat(messages=[ChatMessage(role="user", content="Hi")])


@pytest.mark.parametrize(
    ("tail_tokens", "fields", "computed"),
    [
        (0, {"chat": CHAT_MESSAGE}, "<|im_start|>assistant\n"),
        (0, {"chat": CHAT_MESSAGE, "truncate_prompt_tokens": 3}, "t\n"),  # the full model computes one token
        (0, {"chat": Chat(messages=CHAT_MESSAGE.messages, continue_final_message=True)}, "i"),
        (0, {"text": "Hi"}, "i"),
        (2, {"text": "Hi"}, "Hi"),
        (256, {"token_ids": TokenIds(ids=[10, 11, 12])}, "'("),
        (0, {"token_ids": TokenIds(ids=[10, 11, 12])}, "("),
        # A client sets it only to score a prompt.
        (
            0,
            {"token_ids": TokenIds(ids=[9, 10, 11]), "answer_start": 1, "sampling": SamplingParams(prompt_logprobs=0)},
            "&'",
        ),
    ],
)
def test_an_adapters_decoder_computes_the_end_of_the_prompt(
    validate: Any, byte_level_tokenizer: Tokenizer, tail_tokens: int, fields: dict[str, Any], computed: str
) -> None:
    job = validate(Adapter("judge", "d1", "default", tail_tokens), **fields)
    assert job.start.adapter_digest == "d1"
    ids = job.prompt_token_ids[job.start.answer_start :]
    assert b"".join(map(byte_level_tokenizer.token_bytes, ids)).decode() == computed


def test_an_adapter_needs_a_token_that_the_full_model_computes(validate: Any) -> None:
    with pytest.raises(InvalidRequest, match="has 1 token; with the adapter 'judge'") as caught:
        validate(Adapter("judge", "d1", "default"), token_ids=TokenIds(ids=[5]))
    assert caught.value.field == "prompt"
