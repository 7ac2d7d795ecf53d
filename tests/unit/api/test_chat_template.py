"""Tests options that requests give to a chat template, and prompts that end within a message."""

import json

import pytest

from overfill.api import chat_template
from overfill.api.chat import encode_chat
from overfill.api.chat_template import ChatTemplate, TemplateOptions
from overfill.api.requests import validate_generate
from overfill.errors import InvalidRequest
from overfill.v1 import inference_pb2

# Like Qwen3's template: it inserts an empty, finished thought.
THINKS = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{%- endif %}"""
# Like DeepSeek-R1's template.
DROPS_THOUGHTS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
NOT_AS_IT_IS = "repeats or changes the last message"
HI = {"role": "user", "content": "Hi"}
END = {"role": "assistant", "content": "The end of im_end "}


@pytest.fixture(scope="module")
def template():
    return ChatTemplate(THINKS, {"bos_token": "<s>"})


def test_variables_reach_the_template(template):
    assert "<think>" not in template.render([HI])
    off = TemplateOptions({"enable_thinking": False})
    assert template.render([HI], options=off).endswith("assistant\n<think></think>")
    assert template.render([HI], options=TemplateOptions({"unknown": 1})) == template.render([HI])


@pytest.mark.parametrize(
    "name",
    ["messages", "tools", "add_generation_prompt", "continue_final_message", "bos_token", "chat_template", "range"],
)
def test_requests_cannot_set_the_servers_template_variables(template, name):
    with pytest.raises(InvalidRequest, match="is the server's to set") as caught:
        template.render([HI], options=TemplateOptions({name: []}))
    assert caught.value.field == f"chat.chat_template_kwargs.{name}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", ".*unsafe"),
        ("{{ messages.append(1) }}", ".*unsafe"),
        ("{{ x | dictsort }}", "."),  # AttributeError
        ("{{ x() }}", "."),  # TypeError
        ("{{ x.a.b }}", "."),  # UndefinedError
        ("{{ 1 // (x - 1) }}", ".*zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "."),  # RecursionError
    ],
)
def test_whatever_a_template_raises_is_a_refusal(source, reason):
    with pytest.raises(InvalidRequest, match=f"are refused by the chat template: {reason}") as caught:
        ChatTemplate(source, {}).render([HI], options=TemplateOptions({"x": 1}))
    assert caught.value.field == "chat.messages"


def test_a_prompt_may_end_without_opening_an_answer(template):
    closed = template.render([HI], options=TemplateOptions(add_generation_prompt=False))
    assert template.render([HI]) == closed + "<|im_start|>assistant\n"


def test_a_message_is_continued_from_its_last_character_on(template):
    options = TemplateOptions(add_generation_prompt=False, continue_final_message=True)
    text = template.render([HI, END], options=options)
    assert text.endswith("<|im_start|>assistant\nThe end of im_end "), "white space at its end is kept"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (THINKS, [HI, {"role": "assistant", "content": ""}], "needs a last message that has text"),
        (THINKS, [], "needs a last message that has text"),
        (THINKS, [HI, {"role": "assistant", "content": [{"type": "text", "text": "Hi"}]}], "needs a last message that"),
        ("{{ messages[0].content }}", [HI, END], NOT_AS_IT_IS),
        ("{{ messages[-1].content }} {{ messages[-1].content }}", [HI, END], NOT_AS_IT_IS),
        (DROPS_THOUGHTS, [HI, {"role": "assistant", "content": "<think>Hm</think>So"}], NOT_AS_IT_IS),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(source, messages, reason):
    options = TemplateOptions(add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        ChatTemplate(source, {}).render(messages, options=options)
    assert caught.value.field == "chat.continue_final_message"


def test_a_message_that_the_template_does_not_change_is_continued():
    options = TemplateOptions(add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(DROPS_THOUGHTS, {}).render([HI, END], options=options) == "HiThe end of im_end "


def test_documents_are_shown_or_refused(template):
    shows = ChatTemplate("{% for d in documents or [] %}{{ d.text }}{% endfor %}", {})
    documents = [{"title": "t", "text": "what it says"}]
    assert shows.render([HI], options=TemplateOptions({"documents": documents})) == "what it says"
    with pytest.raises(InvalidRequest, match="does not show documents"):
        template.render([HI], options=TemplateOptions({"documents": documents}))


def chat(**fields):
    return inference_pb2.Chat(messages=[HI, {"role": "assistant", "content": "Hello wo"}], **fields)


def test_options_of_a_chat_arrive_over_the_wire(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer
    plain = tokenizer.decode(encode_chat(chat(), tokenizer))
    assert plain.endswith("Hello wo\nassistant\n")  # special tokens have no text
    assert tokenizer.decode(encode_chat(chat(add_generation_prompt=False), tokenizer)).endswith("Hello wo\n")
    begun = chat(continue_final_message=True)
    assert tokenizer.decode(encode_chat(begun, tokenizer)).endswith("Hello wo")
    request = inference_pb2.GenerateRequest(chat=begun)
    assert validate_generate(request, tokenizer, 64, 400).continues_text, "the first word keeps its space"
    with pytest.raises(InvalidRequest, match="conflicts with add_generation_prompt"):
        encode_chat(chat(continue_final_message=True, add_generation_prompt=True), tokenizer)
    for wrong in ("[]", "{", json.dumps({"messages": []})):
        with pytest.raises(InvalidRequest, match="chat_template_kwargs"):
            encode_chat(chat(chat_template_kwargs=wrong), tokenizer)


def test_only_the_end_of_a_prompt_is_kept(byte_level_tokenizer):
    def kept(count, **sampling):
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=range(5, 45)), sampling=sampling, truncate_prompt_tokens=count
        )
        return list(validate_generate(request, byte_level_tokenizer, 32, 300).start.prompt_token_ids)

    assert kept(3) == [42, 43, 44]
    assert kept(-1, max_tokens=10) == list(range(23, 45))
    assert kept(-1) == list(range(14, 45)), "one token remains for the answer"
    for wrong in (0, -2):
        with pytest.raises(InvalidRequest, match="truncate_prompt_tokens"):
            kept(wrong)


def test_indented_json_has_a_maximum_length(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_INDENTED", 1000)
    template = ChatTemplate("{{ tools | tojson(indent=4) }}", {})
    assert template.render([HI], [{"a": [1]}]) == json.dumps([{"a": [1]}], indent=4)
    deep = [1] * 50
    for _ in range(50):
        deep = [deep]
    with pytest.raises(InvalidRequest, match="becomes more than 1000 characters long when this model's chat template"):
        template.render([HI], [{"a": deep}])


ANYWHERE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('first') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}"
)
DROPPING = (
    "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' or (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (ANYWHERE, "[system]a[system]b[user]c[user]d[assistant]e[system]f[user]g"),
        (REFUSING, "[system]a\n\nb[user]c[user]d[assistant]e[user]f[user]g"),
        (DROPPING, "[system]a\n\nb[user]c[user]d[assistant]e[user]f[user]g"),
        (ALTERNATING, "[user]a\n\nb\n\nc\n\nd[assistant]e[user]f\n\ng"),
    ],
)
def test_messages_that_a_template_would_refuse_or_drop_are_joined_or_become_the_user_s(source, text):
    roles = ("system", "system", "user", "user", "assistant", "system", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, "abcdefg", strict=True)]
    template = ChatTemplate(source, {})
    assert template.render(messages) == text
    for turn in (4, 5):
        assert text.startswith(template.render(messages[:turn])), "what earlier turns have cached stays a prefix"
